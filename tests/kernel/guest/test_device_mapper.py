"""Every ioctl of device-mapper on a real kernel."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blocksnap.device_mapper import (
    UUID_PREFIX,
    Control,
    Device,
    DeviceNumber,
    LinearTarget,
    OtherTarget,
    SnapshotOriginTarget,
    SnapshotStatus,
    SnapshotTarget,
)
from blocksnap.errors import (
    ArgumentError,
    BlocksnapError,
    BusyError,
    DeviceIOError,
    DeviceNotFoundError,
    NotSupportedError,
    PrivilegeError,
)
from blocksnap.mount import mount, unmount
from tests.kernel.devices import MIB, Disks, leftovers, linear, read_at, sweep, write_at


@pytest.fixture
def disk(disks: Disks) -> DeviceNumber:
    return disks.attach("disk", 16 * MIB)


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def in_child(body: Callable[[], None]) -> int:
    """Run in a child process; its exit status is 0 if the body returns."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- the machine ----


def test_the_interface_has_a_version(control: Control) -> None:
    assert (4, 37, 0) <= control.version < (5, 0, 0)


def test_a_target_that_is_asked_for_is_loaded_and_listed(control: Control) -> None:
    version = control.target_version("thin-pool")
    assert control.target_versions()["thin-pool"] == version


@pytest.mark.parametrize("kind", ["no-such-target", "a" * 40, "thin pool", ""])
def test_an_unknown_target_is_refused(control: Control, kind: str) -> None:
    with pytest.raises(NotSupportedError, match="this kernel has no target"):
        control.target_version(kind)


def test_without_privilege_the_error_says_so(control: Control) -> None:
    def unprivileged() -> None:
        os.setresuid(65534, 65534, 65534)
        with pytest.raises(PrivilegeError, match="run as root"):
            Control.open()
        with pytest.raises(PrivilegeError, match="listing devices: no privilege"):
            control.devices()

    assert in_child(unprivileged) == 0


def test_a_closed_control_is_refused() -> None:
    closed = Control.open()
    closed.close()
    closed.close()
    with pytest.raises(ArgumentError, match="open it again"):
        closed.devices()


# ---- life of a device ----


def test_a_linear_device_maps_its_range(control: Control, disks: Disks, disk: DeviceNumber) -> None:
    device = linear(control, "range", disk, MIB, offset=3 * MIB)
    write_at(device.path, 4096, b"through the table")
    assert read_at(disks.file("disk"), 3 * MIB + 4096, 17) == b"through the table"


def test_the_table_is_what_was_loaded(control: Control, disk: DeviceNumber) -> None:
    table = (LinearTarget(MIB, disk, MIB), OtherTarget(MIB, "error", ""), LinearTarget(512, disk))
    device = Device.create(control, "table", table)
    assert device.table() == table
    assert device.dependencies() == (disk,)
    assert device.info().target_count == 3


def test_a_device_of_ours_is_told_by_its_uuid(control: Control, disk: DeviceNumber) -> None:
    device = Device.create(control, "known", [LinearTarget(MIB, disk)], uuid="some-uuid")
    (entry,) = [entry for entry in control.devices() if entry.ours]
    assert entry.uuid == device.uuid == UUID_PREFIX + "some-uuid"
    assert entry.name == device.name == "known" + control.name_suffix
    assert entry.number == device.number
    again = Device.open(control, uuid=device.uuid)
    assert (again.name, again.number) == (device.name, device.number)


def test_states_show_in_info(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "states", disk, MIB)
    device.load([LinearTarget(2 * MIB, disk)], read_only=True)
    device.suspend()
    info = device.info()
    assert (info.suspended, info.live, info.pending, info.read_only) == (True, True, True, False)
    assert device.table(pending=True) == (LinearTarget(2 * MIB, disk),)
    device.clear()
    assert not device.info().pending
    device.resume()
    assert not device.info().suspended


def test_suspend_and_resume_twice_is_once(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "twice", disk, MIB)
    for act in (device.suspend, device.suspend, device.resume, device.resume):
        act()
    assert not device.info().suspended


def test_a_read_only_device_takes_no_writes(control: Control, disk: DeviceNumber) -> None:
    device = Device.create(control, "fixed", [LinearTarget(MIB, disk)], read_only=True)
    assert device.info().read_only
    with pytest.raises(PermissionError):
        write_at(device.path, 0, b"x")


def test_rename_keeps_uuid_and_number(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "before", disk, MIB)
    device.rename("after")
    assert device.name == "after" + control.name_suffix
    assert device.info().name == device.name
    assert Device.open(control, device.name).number == device.number


def test_a_device_under_the_name_of_ours_is_not_taken_for_it(control: Control, disk: DeviceNumber) -> None:
    ours = linear(control, "name", disk, MIB)
    stale = Device.open(control, ours.name)
    ours.remove()
    other = linear(control, "name", disk, MIB)
    with pytest.raises(DeviceNotFoundError):
        stale.remove()
    assert other.info().live


def test_remove_waits_for_a_brief_user_and_names_the_busy_device(
    control: Control, disk: DeviceNumber
) -> None:
    device = linear(control, "busy", disk, MIB)
    opened = os.open(device.path, os.O_RDONLY)
    with pytest.raises(BusyError, match=r"busy.*: removing: .*close it") as caught:
        device.remove(timeout=0)
    assert caught.value.errno == errno.EBUSY
    assert caught.value.filename == device.name
    assert device.info().open_count == 1
    threading.Timer(0.3, os.close, [opened]).start()
    device.remove()
    assert leftovers(control) == []


def test_deferred_remove_happens_at_the_last_close(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "deferred", disk, MIB)
    opened = os.open(device.path, os.O_RDONLY)
    device.remove(deferred=True)
    assert device.info().deferred_remove
    device.cancel_deferred_remove()
    assert not device.info().deferred_remove
    device.remove(deferred=True)
    os.close(opened)
    assert eventually(lambda: leftovers(control) == [])


def test_holders_are_the_devices_above(control: Control, disk: DeviceNumber) -> None:
    below = linear(control, "below", disk, MIB)
    above = linear(control, "above", below.number, MIB)
    assert below.holders() == [f"dm-{above.number.minor}"]
    with pytest.raises(BusyError):
        below.remove(timeout=0)


def test_sweeping_removes_a_stack_and_suspended_devices(control: Control, disk: DeviceNumber) -> None:
    below = linear(control, "below", disk, MIB)
    linear(control, "above", below.number, MIB).suspend()
    assert len(sweep(control)) == 2


# ---- names ----


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-x", ".x", "a/b", "a b", "ä", "a\nb", "a\\x20b", "n" * 128, "control/../x"]
)
def test_a_name_that_cannot_be_never_reaches_the_kernel(disk: DeviceNumber, name: str) -> None:
    with Control.open(name_suffix="") as control, pytest.raises(ArgumentError, match="cannot name a device"):
        linear(control, name, disk, MIB)


@pytest.mark.parametrize("uuid", ["a/b", "u" * 120, "a b"])
def test_a_uuid_that_cannot_be_never_reaches_the_kernel(
    control: Control, disk: DeviceNumber, uuid: str
) -> None:
    with pytest.raises(ArgumentError, match="cannot be a device's uuid"):
        Device.create(control, "u", [LinearTarget(MIB, disk)], uuid=uuid)


def test_a_nul_in_a_name_is_refused(control: Control, disk: DeviceNumber) -> None:
    with pytest.raises(ArgumentError, match="NUL"):
        linear(control, "a\0b", disk, MIB)


def test_the_longest_name_and_uuid_work(control: Control, disk: DeviceNumber) -> None:
    name = "n" * (127 - len(control.name_suffix))
    uuid = "u" * (128 - len(UUID_PREFIX))
    device = Device.create(control, name, [LinearTarget(MIB, disk)], uuid=uuid)
    assert [(entry.name, entry.uuid) for entry in control.devices()] == [(device.name, device.uuid)]


# ---- errors and rollback ----


def test_a_taken_name_or_uuid_is_busy(control: Control, disk: DeviceNumber) -> None:
    Device.create(control, "one", [LinearTarget(MIB, disk)], uuid="1")
    for name, uuid in (("one", "2"), ("two", "1")):
        with pytest.raises(BusyError, match=r"creating: .*another device has that name or uuid"):
            Device.create(control, name, [LinearTarget(MIB, disk)], uuid=uuid)


def test_an_absent_device_is_not_found(control: Control) -> None:
    with pytest.raises(
        DeviceNotFoundError, match=r"absent: asking for its state: .*no such device"
    ) as caught:
        Device.open(control, "absent")
    assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (LinearTarget(MIB, DeviceNumber(240, 77)), BlocksnapError, "loading a table"),
        (OtherTarget(MIB, "no-such-target", ""), ArgumentError, "dmesg"),
        (OtherTarget(MIB, "linear", "nonsense"), ArgumentError, 'loading a table "nonsense": Invalid'),
        (LinearTarget(1 << 40, DeviceNumber(7, 0)), BlocksnapError, "loading a table"),
        (OtherTarget(MIB, "a" * 16, ""), ArgumentError, "type of a target"),
    ],
)
def test_a_device_whose_table_is_refused_is_rolled_back(
    control: Control, disk: DeviceNumber, target: OtherTarget, error: type[BlocksnapError], text: str
) -> None:
    assert disk
    with pytest.raises(error, match=text):
        Device.create(control, "refused", [target])
    assert leftovers(control) == []


def test_an_empty_table_is_refused(control: Control) -> None:
    with pytest.raises(ArgumentError, match="at least one line"):
        Device.create(control, "empty", [])
    assert leftovers(control) == []


def test_replace_grows_a_live_device(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "grown", disk, MIB)
    device.replace([LinearTarget(2 * MIB, disk)])
    write_at(device.path, 2 * MIB - 4, b"tail")
    assert device.table() == (LinearTarget(2 * MIB, disk),)


def test_replace_by_a_refused_table_leaves_the_old_one_running(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "kept", disk, MIB)
    with pytest.raises(ArgumentError):
        device.replace([OtherTarget(MIB, "linear", "nonsense")])
    info = device.info()
    assert (info.live, info.pending, info.suspended) == (True, False, False)


# ---- buffers ----


def test_lists_of_devices_longer_than_the_first_buffer(control: Control, disk: DeviceNumber) -> None:
    names = {f"{number:03}-{'x' * 80}" for number in range(120)}
    for name in names:
        Device.create(control, name, [LinearTarget(MIB, disk)], uuid=name)
    entries = control.devices()
    assert {entry.name.removesuffix(control.name_suffix) for entry in entries} == names
    assert {entry.uuid.removeprefix(UUID_PREFIX) for entry in entries} == names
    assert len({entry.number for entry in entries}) == 120


def test_tables_longer_than_the_first_buffer(control: Control, disk: DeviceNumber) -> None:
    table = tuple(LinearTarget(4096, disk, number * 4096) for number in range(1500))
    device = Device.create(control, "long", table)
    assert device.table() == table
    assert len(device.status()) == 1500


# ---- suspending ----


def write_in_thread(path: str | Path) -> threading.Thread:
    thread = threading.Thread(target=write_at, args=(path, 0, b"x" * 4096), daemon=True)
    thread.start()
    return thread


def test_writes_wait_while_a_device_is_suspended(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "waiting", disk, MIB)
    with device.suspended():
        writer = write_in_thread(device.path)
        writer.join(0.2)
        assert writer.is_alive()
    writer.join(10)
    assert not writer.is_alive()


def test_an_exception_while_suspended_resumes(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "raised", disk, MIB)
    with pytest.raises(ZeroDivisionError), device.suspended():
        print(1 // (not device.info().suspended))
    assert not device.info().suspended


def test_a_killed_process_leaves_no_device_suspended(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "orphan", disk, MIB)
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with device.suspended():
            os.write(tell, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(told, 1)
    assert device.info().suspended
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert eventually(lambda: not device.info().suspended)
    os.close(told)
    os.close(tell)


def test_a_suspend_that_takes_too_long_is_given_up(control: Control, disk: DeviceNumber) -> None:
    below = linear(control, "below", disk, MIB)
    device = linear(control, "above", below.number, MIB)
    below.suspend()
    writer = write_in_thread(device.path)
    assert eventually(lambda: device.info().open_count > 0)
    time.sleep(0.2)
    with (
        pytest.raises(DeviceIOError, match=r"above.*took longer than 200 ms") as caught,
        device.suspended(timeout=0.2),
    ):
        pytest.fail("the write under way cannot end")
    assert caught.value.errno == errno.ETIMEDOUT
    below.resume()
    writer.join(10)
    assert not writer.is_alive()
    assert eventually(lambda: not device.info().suspended)


def test_suspending_an_absent_device_is_refused(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "gone", disk, MIB)
    device.remove()
    with pytest.raises(DeviceNotFoundError, match=r"gone.*: suspending"), device.suspended():
        pytest.fail("there is nothing to suspend")


@pytest.mark.parametrize("skip_lockfs", [False, True])
def test_suspending_freezes_the_file_system_above_unless_told(
    control: Control, disk: DeviceNumber, tmp_path: Path, skip_lockfs: bool
) -> None:
    device = linear(control, "mounted", disk, 16 * MIB)
    os.spawnlp(os.P_WAIT, "mkfs.ext4", "mkfs.ext4", "-q", device.path)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    mount(device.path, mounted, "ext4")
    file = os.open(mounted / "file", os.O_RDWR | os.O_CREAT)
    os.write(file, b"once")
    try:
        with device.suspended(skip_lockfs=skip_lockfs, noflush=skip_lockfs):
            # Into the page cache: only a frozen file system keeps it out.
            writer = threading.Thread(target=os.pwrite, args=(file, b"then", 0), daemon=True)
            writer.start()
            writer.join(0.3)
            assert writer.is_alive() != skip_lockfs
        writer.join(10)
        assert os.pread(file, 4, 0) == b"then"
    finally:
        os.close(file)
        unmount(mounted)


# ---- events ----


def test_a_rename_is_an_event_and_nothing_else_is(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "event", disk, MIB)
    seen = {device.uuid: device.info().event_nr}
    linear(control, "other", disk, MIB)
    assert control.await_events(seen, timeout=0.1) == seen
    threading.Timer(0.2, device.rename, ["renamed"]).start()
    changed = control.await_events(seen, timeout=10)
    assert changed[device.uuid] > seen[device.uuid]


def test_a_device_that_goes_is_an_event(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "event", disk, MIB)
    threading.Timer(0.2, device.remove).start()
    assert control.await_events({device.uuid: device.info().event_nr}, timeout=10) == {}


def test_waiting_ends_when_another_descriptor_is_readable(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "event", disk, MIB)
    seen = {device.uuid: device.info().event_nr}
    wakeup, wake = os.pipe()
    os.write(wake, b"x")
    assert control.await_events(seen, wakeup=wakeup) == seen
    os.close(wakeup)
    os.close(wake)


def test_waiting_for_one_device(control: Control, disk: DeviceNumber) -> None:
    device = linear(control, "event", disk, MIB)
    before = device.info().event_nr
    threading.Timer(0.2, device.rename, ["renamed"]).start()
    assert device.wait(before).event_nr != before
    assert device.wait(before).event_nr != before


# ---- classic snapshots ----


def test_a_classic_snapshot_keeps_the_old_content(control: Control, disks: Disks, disk: DeviceNumber) -> None:
    cow = disks.attach("cow", 4 * MIB)
    write_at(disks.path("disk"), 0, b"old" + bytes(4093))
    origin = Device.create(control, "origin", [SnapshotOriginTarget(16 * MIB, disk)])
    with origin.suspended():
        snapshot = Device.create(control, "snapshot", [SnapshotTarget(16 * MIB, disk, cow)])
    write_at(origin.path, 0, b"new" + bytes(4093))
    assert read_at(snapshot.path, 0, 3) == b"old"
    assert snapshot.table() == (SnapshotTarget(16 * MIB, disk, cow, 4096),)
    assert origin.table() == (SnapshotOriginTarget(16 * MIB, disk),)
    (status,) = snapshot.status()
    assert isinstance(status, SnapshotStatus)
    assert 0 < status.metadata_bytes < status.used_bytes < status.total_bytes == 4 * MIB
