"""The registered drivers as parameters of tests; those that the kernel runs are kernel tests."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from blocksnap import drivers
from tests.file_systems import can_mount, fresh_file_system

__all__ = ["driver_params", "driver_root", "host_drivers"]

_SIZE = 4 << 30
_OF_THE_KERNEL = ("devicemapper", "dm-snapshot")


def host_drivers() -> list[str]:
    """Return the drivers that are no kernel tests."""
    return [name for name, _ in drivers.available() if name not in _OF_THE_KERNEL]


def driver_params(without: Collection[str] = ()) -> list[str | ParameterSet]:
    names = [name for name, _ in drivers.available() if name not in without]
    return [
        pytest.param(name, marks=pytest.mark.kernel) if name in _OF_THE_KERNEL else name for name in names
    ]


@contextmanager
def driver_root(directory: Path, name: str) -> Iterator[Path]:
    """Give where a driver can have its root, on a fresh file system if need be; skip where it cannot run."""
    kind = drivers.driver_class(name).file_system
    with ExitStack() as stack:
        lacks = dict(drivers.available(directory))[name]
        if lacks is not None and can_mount(kind):
            (directory / "disk").mkdir()
            directory = stack.enter_context(fresh_file_system(directory / "disk", kind, _SIZE))
            lacks = dict(drivers.available(directory))[name]
        if lacks is not None:
            pytest.skip(f"{name}: {lacks}")
        yield directory / "root"
