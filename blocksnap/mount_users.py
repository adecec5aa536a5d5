"""Who keeps a mount busy: processes with open files or working directories on it, and mounts below it."""

import os
from collections.abc import Iterator
from pathlib import Path

from . import mount

__all__ = ["mount_users"]

_LINKS = ("cwd", "root", "exe")


def mount_users(target: str) -> list[str]:
    """Return in words who uses the file system mounted at a path, as far as this user may know."""
    below = [entry.target for entry in mount.mount_table() if entry.target.startswith(f"{target}/")]
    found = [f"the mount at {place}" for place in below]
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and any(_is_within(path, target) for path in _paths(process)):
            found.append(f"process {process.name} ({_name(process)})")
    return found


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


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return "ended"
