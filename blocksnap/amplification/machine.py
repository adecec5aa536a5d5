"""The machine that a result was taken on: what a reader needs to judge seconds and latencies."""

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

from .. import mount
from ..file_system import find_program

__all__ = ["describe_machine", "file_system_of"]

# What makes the file systems and serves the layers of drivers, and how it is asked for its version.
_PROGRAMS = {
    "mke2fs": "-V",
    "mkfs.xfs": "-V",
    "mkfs.btrfs": "-V",
    "fuse-overlayfs": "--version",
    "qemu-storage-daemon": "--version",
}


def describe_machine(work_dir: Path) -> dict[str, object]:
    """Return the object "machine" of a JSON result; an unknown entry is None."""
    file_system, source = file_system_of(work_dir)
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "system": _os_release(),
        "processor": _field("/proc/cpuinfo", "model name"),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory_bytes(),
        "work_dir": str(work_dir),
        "work_dir_file_system": file_system,
        "work_dir_device": source,
        "root": os.geteuid() == 0,
        "blocksnap": version("blocksnap"),
        "python": platform.python_version(),
        **{name: _program_version(name, argument) for name, argument in _PROGRAMS.items()},
    }


def file_system_of(path: Path) -> tuple[str | None, str | None]:
    """Return the type and the source of the mount that holds path."""
    resolved = path.resolve()
    holding = [entry for entry in mount.mount_table() if resolved.is_relative_to(entry.target)]
    if not holding:
        return None, None
    deepest = max(reversed(holding), key=lambda entry: len(Path(entry.target).parts))
    return deepest.fstype, deepest.source


def _program_version(name: str, argument: str) -> str | None:
    path = find_program(name)
    if path is None:
        return None
    done = subprocess.run([path, argument], capture_output=True, text=True, check=False)
    named = re.search(rf"{re.escape(name)}[^0-9\n]* v?(\d[\w.+~-]*)", done.stdout + done.stderr)
    return named[1] if named else None


def _field(path: str, name: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _memory_bytes() -> int | None:
    total = _field("/proc/meminfo", "MemTotal")
    return int(total.split()[0]) * 1024 if total else None


def _os_release() -> str | None:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    return values.get("PRETTY_NAME", "").strip('"') or None
