"""Processes that a driver has started, found by the paths in their arguments."""

import os
import signal
import time
from pathlib import Path

__all__ = ["kill_processes", "processes_below"]


def processes_below(root: Path) -> list[int]:
    """Return the processes with a path below a root among their arguments."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(os.fsencode(root) + b"/") for word in words[1:]):
            found.append(int(directory.name))
    return found


def kill_processes(root: Path) -> None:
    for pid in processes_below(root):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while processes_below(root) and time.monotonic() < deadline:
        time.sleep(0.01)
