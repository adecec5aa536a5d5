"""Snapshots of a mounted file system that is written to: each is clean by itself and mounts."""

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blocksnap import mount
from blocksnap.errors import DeviceExistsError
from blocksnap.kernel_device import KernelDevice
from blocksnap.pool import Pool
from blocksnap.thin_device import ThinDevice

SNAPSHOTS, A_TEST = 100, 20

# Makes, overwrites, renames and removes files; prints a line after each sync.
WRITER = """
import os, time
number = 0
while True:
    name, target = f"new-{number % 7}", f"file-{number % 40}"
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.write(file, b"%08d" % number * 8 * (number % 60 + 1))
    if number % 3 == 0:
        os.fsync(file)
    os.close(file)
    os.rename(name, target)
    if number % 5 == 0:
        os.unlink(target)
    if number % 10 == 0:
        os.sync()
        print(number, flush=True)
    number += 1
    time.sleep(0.003)  # the test is to get its share of the one processor
"""


@dataclass(frozen=True)
class Kind:
    """A file system, and the commands that make and check it."""

    name: str
    size: str
    make: tuple[str, ...]
    check: tuple[str, ...]
    options: str = ""
    replays: bool = False
    """A freeze leaves work in its log on purpose (inodes to remove): it is clean once that is replayed."""


KINDS = [
    Kind("ext4", "32M", ("mkfs.ext4", "-q", "-J", "size=4"), ("e2fsck", "-fn")),
    Kind("xfs", "300M", ("mkfs.xfs", "-q"), ("xfs_repair", "-n"), "nouuid", replays=True),
]


@contextmanager
def opened(device: ThinDevice) -> Iterator[KernelDevice]:
    with device.hold() as handle:
        assert isinstance(handle, KernelDevice)
        yield handle


@contextmanager
def mounted(node: str, target: Path, kind: Kind, options: str = "") -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    mount.mount(node, target, kind.name, options=options)
    try:
        yield target
    finally:
        mount.unmount(target)


@contextmanager
def writing(directory: Path, writers: int = 2) -> Iterator[list["subprocess.Popen[str]"]]:
    """Programs that write below a directory; each has synced something by now."""
    processes = []
    try:
        for number in range(writers):
            (directory / str(number)).mkdir(exist_ok=True)
            command = [sys.executable, "-S", "-c", WRITER]
            processes.append(
                subprocess.Popen(command, cwd=directory / str(number), stdout=subprocess.PIPE, text=True)
            )
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline()
        yield processes
        assert all(process.poll() is None for process in processes), "a writer has ended"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def goes_on(process: "subprocess.Popen[str]") -> bool:
    """Whether a writer syncs something from now on; what it told before is read over."""
    assert process.stdout is not None
    told = process.stdout.readline()
    while select.select([process.stdout], [], [], 0)[0]:
        told = process.stdout.readline()
    return told != "" and process.stdout.readline() != ""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.create(tmp_path / "pool", size="192M", engine="kernel") as made:
        yield made


@pytest.fixture(params=KINDS, ids=[kind.name for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


def made(pool: Pool, kind: Kind) -> ThinDevice:
    """Return a device with a file system."""
    device = pool.create_device("origin", kind.size)
    with opened(device) as handle:
        subprocess.run([*kind.make, handle.path], check=True)
    return device


def assert_clean(snapshot: ThinDevice, kind: Kind, target: Path, synced: str) -> None:
    with opened(snapshot) as handle:

        def check() -> None:
            done = subprocess.run([*kind.check, handle.path], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

        if not kind.replays:
            check()
        with mounted(handle.path, target, kind, kind.options) as root:
            assert (root / "synced").read_text() == synced
            assert list(root.glob("*/file-*"))
            (root / "written to").write_text("a snapshot")
        if kind.replays:
            check()


def sync_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("part", range(SNAPSHOTS // A_TEST))
def test_snapshots_under_write_load_are_clean_and_mount(
    pool: Pool, kind: Kind, tmp_path: Path, part: int
) -> None:
    device = made(pool, kind)
    with (
        opened(device) as handle,
        mounted(handle.path, tmp_path / "origin", kind) as root,
        writing(root),
    ):
        for number in range(A_TEST):
            text = f"{part} {number}"
            sync_text(root / "synced", text)
            snapshot = device.snapshot(f"snapshot {number}")
            assert_clean(snapshot, kind, tmp_path / "snapshot", text)
            snapshot.delete()
    assert not pool.check().damaged


def test_there_are_100_snapshots_of_each_file_system() -> None:
    assert SNAPSHOTS // A_TEST * A_TEST == 100


def test_writers_go_on_when_a_snapshot_cannot_be_taken(pool: Pool, kind: Kind, tmp_path: Path) -> None:
    device = made(pool, kind)
    taken = pool.create_device("taken", kind.size)
    with (
        opened(device) as handle,
        mounted(handle.path, tmp_path / "origin", kind) as root,
        writing(root) as writers,
    ):
        with pytest.raises(DeviceExistsError, match=f"create_snap {taken.id} {device.id}"):
            pool._engine.create_snapshot(taken.id, device.id)
        assert all(map(goes_on, writers))
        device.snapshot("another").delete()
