"""Mapped devices with a udevd that runs and without one."""

import fcntl
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blocksnap.device_mapper import Control, Device, DeviceNumber, LinearTarget, OtherTarget
from blocksnap.dm_cookie import udev_cookie
from blocksnap.errors import ArgumentError, BusyError, DeviceNotFoundError
from blocksnap.kernel_device import KernelDevice
from blocksnap.pool import Pool
from blocksnap.udev import (
    BlockEvent,
    BlockEvents,
    candidates,
    check_unused,
    left_cookies,
    make_node,
    settle,
    udev_runs,
)
from tests.kernel.devices import MIB, Disks, linear, read_at
from tests.kernel.udevd import udevd

__all__ = ["udevd"]


@pytest.fixture
def disk(disks: Disks) -> DeviceNumber:
    return disks.attach("disk", 16 * MIB)


def mkfs(path: str) -> None:
    subprocess.run(["mkfs.ext4", "-q", path], check=True)


def links_to(device: Device) -> set[str]:
    found = Path("/dev").glob("disk/*/*")
    return {str(path) for path in found if os.path.realpath(path) == device.path}


def test_the_node_is_there_once_a_device_was_made_and_gone_with_it(
    control: Control, disk: DeviceNumber, udevd: bool
) -> None:
    device = linear(control, "node", disk, MIB)
    assert make_node(device.number) == device.path
    assert DeviceNumber.of(device.path) == device.number
    link = Path("/dev/mapper", device.name)
    assert link.exists() == udevd
    device.rename("other")
    assert link.exists() is False
    assert Path("/dev/mapper", device.name).exists() == udevd
    device.remove()
    assert not Path("/dev/mapper", device.name).exists()
    assert not Path(device.path).exists()


def test_no_cookie_is_left_on_any_path(control: Control, disk: DeviceNumber, udevd: bool) -> None:
    assert udev_runs() == udevd
    device = linear(control, "cookie", disk, MIB)
    device.replace([LinearTarget(2 * MIB, disk)])
    opened = os.open(device.path, os.O_RDONLY)
    with pytest.raises(BusyError):
        device.remove(timeout=0)
    os.close(opened)
    with pytest.raises(BusyError):
        linear(control, "cookie", disk, MIB)
    with pytest.raises(ArgumentError):
        Device.create(control, "refused", [OtherTarget(MIB, "linear", "nonsense")])
    device.resume()
    device.remove()
    with pytest.raises(DeviceNotFoundError):
        device.resume()
    with pytest.raises(KeyboardInterrupt), udev_cookie():
        raise KeyboardInterrupt
    assert left_cookies() == []


def test_a_cookie_is_used_only_where_udevd_runs(udevd: bool) -> None:
    with udev_cookie() as cookie:
        assert [key & 0xFFFF for key in left_cookies()] == [cookie.value & 0xFFFF][: int(udevd)]
    assert bool(cookie.value) == udevd


def test_links_lead_to_a_file_system_unless_the_device_is_private(
    control: Control, disk: DeviceNumber, udevd: bool
) -> None:
    linear(control, "made", disk, 8 * MIB).remove()
    mkfs(Device.create(control, "maker", [LinearTarget(8 * MIB, disk)], private=True).path)
    Device.open(control, "maker" + control.name_suffix).remove()
    public = linear(control, "public", disk, 8 * MIB)
    assert any("by-uuid" in link for link in links_to(public)) == udevd
    public.remove()
    assert links_to(public) == set()
    private = Device.create(control, "private", [LinearTarget(8 * MIB, disk)], private=True)
    assert Path("/dev/mapper", private.name).exists() == udevd
    assert links_to(private) == set()


def test_events_tell_what_happens_to_a_device(control: Control, disk: DeviceNumber, udevd: bool) -> None:
    assert udev_runs() == udevd
    with BlockEvents() as events:

        def await_action(action: str) -> BlockEvent:
            for _ in range(100):
                event = events.wait(1)
                if event is not None and event.number == device.number and event.action == action:
                    return event
            pytest.fail(f"no event {action}")

        device = linear(control, "seen", disk, MIB)
        await_action("add")
        change = await_action("change")
        assert (change.name, change.uuid) == (device.name, device.uuid)
        assert change.kernel_name == Path(device.path).name
        assert (f"/dev/mapper/{device.name}" in change.links) == udevd
        device.remove()
        await_action("remove")


def test_settling_returns_the_node(disks: Disks, udevd: bool) -> None:
    assert udev_runs() == udevd
    number = disks.attach("fresh", MIB)
    assert settle(number) == disks.path("fresh")
    with pytest.raises(DeviceNotFoundError):
        settle(DeviceNumber(240, 5), timeout=0.1)


def test_a_node_that_is_missing_or_wrong_is_made(disks: Disks, disk: DeviceNumber) -> None:
    path = disks.path("disk")
    os.unlink(path)
    assert make_node(disk) == path
    os.unlink(path)
    Path(path).touch()
    assert make_node(disk) == path
    assert DeviceNumber.of(path) == disk


def test_an_unused_device_may_be_taken(disks: Disks, disk: DeviceNumber, udevd: bool) -> None:
    assert udev_runs() == udevd
    path = disks.path("disk")
    assert check_unused(path) == disk
    (candidate,) = [candidate for candidate in candidates() if candidate.path == path]
    assert (candidate.reason, candidate.size) == ("", 16 * MIB)


def test_a_device_in_use_is_refused(
    control: Control, disks: Disks, disk: DeviceNumber, udevd: bool, tmp_path: Path
) -> None:
    assert udev_runs() == udevd
    device = linear(control, "above", disk, MIB)
    with pytest.raises(BusyError, match=f"in use by {Path(device.path).name}"):
        check_unused(disks.path("disk"))
    device.remove()
    path = disks.path("disk")
    mkfs(path)
    subprocess.run(["mount", path, tmp_path], check=True)
    with pytest.raises(BusyError, match="mounted or in use"):
        check_unused(path)
    subprocess.run(["umount", tmp_path], check=True)
    with pytest.raises(ArgumentError, match="ext"):
        check_unused(path)


@pytest.mark.parametrize(
    ("offset", "magic", "what"),
    [(510, b"\x55\xaa", "partition table"), (0, b"LUKS\xba\xbe", "LUKS"), (512, b"LABELONE", "LVM")],
)
def test_a_device_that_carries_something_is_refused(
    disks: Disks, disk: DeviceNumber, offset: int, magic: bytes, what: str
) -> None:
    assert disk
    with open(disks.path("disk"), "r+b") as device:
        device.seek(offset)
        device.write(magic)
    with pytest.raises(ArgumentError, match=what):
        check_unused(disks.path("disk"))


def test_what_is_no_device_to_write_to_is_refused(control: Control, disk: DeviceNumber) -> None:
    read_only = Device.create(control, "fixed", [LinearTarget(MIB, disk)], read_only=True)
    with pytest.raises(ArgumentError, match="read-only"):
        check_unused(read_only.path)
    with pytest.raises(ArgumentError, match="no block device"):
        check_unused("/dev/null")


# ---- pools ----


@pytest.fixture
def pool(tmp_path: Path, udevd: bool) -> Iterator[Pool]:
    """A pool in the kernel; afterwards no node, no link and no cookie of it is left."""
    assert udev_runs() == udevd
    before = nodes()
    with Pool.create(tmp_path / "pool", size=64 * MIB, engine="kernel") as made:
        yield made
    assert nodes() == before
    assert left_cookies() == []


def nodes() -> set[Path]:
    """Return what leads to mapped devices."""
    found = [*Path("/dev").glob("dm-*"), *Path("/dev/mapper").iterdir(), *Path("/dev").glob("disk/*/*")]
    return {path for path in found if "loop" not in os.path.realpath(path)}


def test_the_devices_of_a_pool_have_nodes_and_links_once_they_are_open(pool: Pool, udevd: bool) -> None:
    with pool.create_device("made", 16 * MIB).hold() as handle:
        assert isinstance(handle, KernelDevice)
        mkfs(handle.path)
    with BlockEvents() as events, pool.device("made").hold() as handle:
        assert isinstance(handle, KernelDevice)
        number = DeviceNumber.of(handle.path)
        assert settle(number) == handle.path
        links = {path for path in nodes() if os.path.realpath(path) == handle.path}
        assert any("by-uuid" in str(link) for link in links) == udevd
        handle.close()
        while (event := events.wait(10)) is not None:
            if (event.action, event.number) == ("remove", number):
                return
    pytest.fail("no event tells that the device was removed")


def test_a_snapshot_has_its_own_node(pool: Pool) -> None:
    origin = pool.create_device("origin", MIB)
    origin.write(0, b"origin")
    snapshot = origin.snapshot("snapshot")
    snapshot.write(0, b"snap")
    with origin.hold() as first, snapshot.hold() as second:
        assert isinstance(first, KernelDevice)
        assert isinstance(second, KernelDevice)
        assert DeviceNumber.of(first.path) != DeviceNumber.of(second.path)
        assert [read_at(each.path, 0, 6) for each in (first, second)] == [b"origin", b"snapin"]


@pytest.mark.parametrize("engine", ["user", "kernel"])
def test_a_device_that_udevd_looks_into_is_waited_for(disks: Disks, tmp_path: Path, engine: str) -> None:
    where: dict[str, Any] = {"catalog": tmp_path / "catalog.db"}
    for part in ("metadata", "data"):
        disks.attach(part, 4 * MIB)
        where[part] = disks.path(part)
    Pool.create(**where).close()
    with open(where["metadata"], "rb") as looked_into:
        fcntl.flock(looked_into, fcntl.LOCK_SH)  # as udevd has it
        threading.Timer(0.5, fcntl.flock, [looked_into, fcntl.LOCK_UN]).start()
        Pool.open(**where, engine=engine).close()
        fcntl.flock(looked_into, fcntl.LOCK_EX)  # as a pool in use has it
        with pytest.raises(BusyError, match="in use"):
            Pool.open(**where, engine=engine)
