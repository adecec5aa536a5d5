"""Machines that the kernel engine cannot run on."""

import os
from pathlib import Path

import pytest

from blocksnap.device_mapper import Control
from blocksnap.dm_control import require_interface
from blocksnap.errors import NotSupportedError
from blocksnap.pool import Pool


@pytest.mark.skipif(
    os.geteuid() != 0 or "device-mapper" in Path("/proc/misc").read_text(),
    reason="needs root and a kernel without device-mapper",
)
def test_without_device_mapper_the_module_is_named_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(NotSupportedError, match="no device-mapper here: load it with modprobe dm_mod"):
        Control.open()
    with pytest.raises(NotSupportedError, match="modprobe dm_mod"):
        Pool.create(tmp_path / "pool", size="16M", engine="kernel")
    assert list(tmp_path.iterdir()) == []
    Pool.create(tmp_path / "pool", size="16M").close()
    with pytest.raises(NotSupportedError, match="modprobe dm_mod"):
        Pool.open(tmp_path / "pool", engine="kernel")


@pytest.mark.parametrize("version", [(4, 36, 0), (3, 0, 0), (5, 0, 0)])
def test_an_interface_that_lacks_something_is_refused_with_its_version(version: tuple[int, int, int]) -> None:
    with pytest.raises(NotSupportedError, match=".".join(map(str, version))):
        require_interface(version)


def test_the_interface_of_linux_4_13_is_enough() -> None:
    require_interface((4, 37, 0))
