"""Who keeps a mount busy: processes with open files or working directories on it, and mounts below it."""

import os
from collections.abc import Iterator
from pathlib import Path

from . import mount

__all__ = ["mount_users", "processes_on"]

_LINKS = ("cwd", "root", "exe")


def mount_users(target: str) -> list[str]:
    """Return in words who uses the file system mounted at a path, as far as this user may know."""
    below = [entry.target for entry in mount.mount_table() if entry.target.startswith(f"{target}/")]
    processes = [f"process {number} ({_name(number)})" for number in processes_on(target)]
    return [*(f"the mount at {place}" for place in below), *processes]


def processes_on(target: str) -> list[int]:
    """Return the processes with something open on the file system mounted at a path."""
    processes = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [int(process.name) for process in processes if any(_is_within(p, target) for p in _paths(process))]


def _is_within(path: str, target: str) -> bool:
    return path == target or path.startswith(f"{target}/")


def _paths(process: Path) -> Iterator[str]:
    """Yield what a process has open; nothing for one that is gone or somebody else's."""
    try:
        links = [process / name for name in _LINKS]
        links += [process / "fd" / name for name in os.listdir(process / "fd")]
    except OSError:
        return
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return "ended"
