"""The processes of a workload: run apart from this one, watched, and gone when the call returns.

A script of this package is run with one JSON object as its argument and prints one as its reply. An isolated
one gets a PID and an IPC name space of its own where this process may make them: whatever it starts, also in
sessions of their own as the processes of PostgreSQL and fio are, ends with it, or with this process, and so
does its shared memory.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import BlocksnapError

__all__ = ["WorkloadError", "run_program", "run_script"]

_LINGER_SECONDS = 2.0

Check = Callable[[], None]


class WorkloadError(BlocksnapError):
    """The workload itself failed: an operation raised, a server did not start, a command ended badly."""


def run_script(
    script: str, request: Mapping[str, object], check: Check, *, isolated: bool = False
) -> dict[str, Any]:
    """Run a script with a request and return its reply; `check` is called ten times a second and may raise.

    Raises WorkloadError when there is no reply.
    """
    done = run_program([sys.executable, "-I", script, json.dumps(request)], check, isolated=isolated)
    if done.returncode != 0 or not done.stdout:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise WorkloadError(f"the process of the workload failed: {last[0]}")
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def run_program(
    command: Sequence[str], check: Check, *, isolated: bool = False, cwd: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command; nothing of its session, nor of its name space, outlives the call."""
    words = [*_isolation(), *command] if isolated else list(command)
    child = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd=cwd,
    )
    try:
        out, complaint = _communicate(child, check)
    finally:
        _end_session(child)
    return subprocess.CompletedProcess(words, child.returncode, out, complaint)


def _isolation() -> list[str]:
    """Return what goes before a command: name spaces of its own, which end when this process does."""
    unshare, setpriv = shutil.which("unshare"), shutil.which("setpriv")
    if os.geteuid() != 0 or unshare is None or setpriv is None:
        return []
    spaces = [unshare, "--pid", "--ipc", "--fork", "--kill-child", "--"]
    return [setpriv, "--pdeathsig", "KILL", "--", *spaces]


def _communicate(child: subprocess.Popen[str], check: Check) -> tuple[str, str]:
    while True:
        check()
        try:
            return child.communicate(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue


def _end_session(child: subprocess.Popen[str]) -> None:
    """Kill what is left of the child's session: a process that lingers would keep the container mounted."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        deadline = time.monotonic() + _LINGER_SECONDS
        while time.monotonic() < deadline:
            os.killpg(child.pid, 0)
            time.sleep(0.01)
    child.wait()
