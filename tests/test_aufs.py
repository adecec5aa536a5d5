"""The aufs driver, as far as it can be told without its kernel: how it mounts, what it says elsewhere."""

import os
from pathlib import Path

import pytest

from blocksnap import drivers, errors
from blocksnap.drivers.aufs import AufsDriver, mount_options

HAS_AUFS = "aufs" in Path("/proc/filesystems").read_text().split()


@pytest.mark.skipif(HAS_AUFS or os.geteuid() != 0, reason="needs root and a kernel without aufs")
def test_kernel_without_aufs_is_told_of_overlay(tmp_path: Path) -> None:
    with pytest.raises(
        errors.NotSupportedError, match="no aufs, which was never in the mainline: take overlay"
    ):
        drivers.open("aufs", tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_layer_is_the_writable_branch_above_its_parents() -> None:
    options, rest = mount_options(
        Path("/r/own/diff"), [Path("/r/a/diff"), Path("/r/b/diff")], "", read_only=False
    )
    assert options == "dirperm1,br:/r/own/diff=rw:/r/a/diff=ro+wh:/r/b/diff=ro+wh"
    assert rest == []


def test_layer_with_children_is_no_writable_branch() -> None:
    options, _ = mount_options(Path("/r/own/diff"), [Path("/r/a/diff")], "label", read_only=True)
    assert options == 'dirperm1,br:/r/own/diff=ro+wh:/r/a/diff=ro+wh,context="label"'


def test_branches_beyond_the_page_of_mount_data_are_appended_in_their_order() -> None:
    lowers = [Path(f"/root/aufs/{number:064}/diff") for number in range(127)]
    options, rest = mount_options(Path("/root/aufs/own/diff"), lowers, "x" * 200, read_only=False)
    assert len(options) <= 4095
    branches = options.removesuffix(f',context="{"x" * 200}"').split(":")[2:]
    branches += [option.removeprefix("append:") for option in rest]
    assert branches == [f"{lower}=ro+wh" for lower in lowers]
    assert 0 < len(rest) < 127


def test_root_whose_name_means_something_to_aufs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="aufs takes no root with"):
        AufsDriver(tmp_path / "a:b")


def test_layers_are_kept_without_being_mounted(tmp_path: Path) -> None:
    driver = AufsDriver(tmp_path / "root")
    driver.create("base")
    driver.create("child", "base")
    assert driver.metadata("child") == {
        "LowerDir": str(driver.root / "aufs/base/diff"),
        "UpperDir": str(driver.root / "aufs/child/diff"),
        "MergedDir": str(driver.root / "aufs/child/merged"),
    }
    driver.remove("child")
    assert driver.layers() == ["base"]
