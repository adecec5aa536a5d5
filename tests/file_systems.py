"""File systems of a kind for tests, each on a loop device of its own."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap import errors, mount
from blocksnap.amplification.testbed import make_file_system, missing_for

__all__ = ["can_mount", "fresh_file_system", "unmount_when_free", "used_bytes"]


def can_mount(kind: str) -> bool:
    may = os.geteuid() == 0 and os.access("/dev/loop-control", os.W_OK)
    return may and missing_for(kind) is None


@contextmanager
def fresh_file_system(directory: Path, kind: str, size: int = 512 << 20) -> Iterator[Path]:
    """Give where one is mounted; the test is skipped where that cannot be."""
    if not can_mount(kind):
        pytest.skip(f"{kind}: needs root and loop devices; {missing_for(kind) or 'the rest is there'}")
    image, target = directory / "image", directory / "mounted"
    target.mkdir()
    make_file_system(image, size, kind)
    with mount.LoopDevice.attach(image) as loop:
        mount.mount(loop.path, target, kind)
        try:
            yield target
        finally:
            unmount_when_free(target)


def unmount_when_free(target: Path, seconds: float = 20) -> None:
    """Unmount; a server of the driver's may need a moment to end after its last client has left."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            mount.unmount(target)
            return
        except errors.BusyError:
            if time.monotonic() > deadline:
                mount.unmount(target, lazy=True)
                raise
            time.sleep(0.05)


def used_bytes(path: Path) -> int:
    mount.sync_filesystem(path)
    info = os.statvfs(path)
    return (info.f_blocks - info.f_bfree) * info.f_frsize
