"""One session of PostgreSQL, run as a script (one JSON object) with the standard library alone.

A server is started on a cluster below a root directory, a client does its work, the server is shut down. The
server's user need not be able to walk to the root directory: it gets a descriptor of it.

Application bytes are the kernel's count, `wchar` of /proc/self/io, which includes children that were waited
for and, through the server, all its processes. What the client wrote and what the server logged is taken off.
Inside are all writes below the root: tables, the write-ahead log (new segments are written full of zeros),
the control file. Outside of that count are fallocate, truncate and names.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from glob import glob
from itertools import islice
from typing import Any

_START_SECONDS = 60.0
_STOP_SECONDS = 120.0
_REASON = re.compile(r"(?:PANIC|FATAL|ERROR|error):\s+(.*)")
_CONSEQUENCES = ("terminating connection", "the database system is", "connection to client lost")
_SETTINGS = {
    "listen_addresses": "",
    "log_line_prefix": "",
    "autovacuum": "off",
    "dynamic_shared_memory_type": "sysv",
}


class FailureError(Exception):
    """A program of the session failed; the message is for people."""


def write_count() -> int | None:
    """Return what this process and its waited-for children handed to write calls so far."""
    try:
        with open("/proc/self/io", encoding="ascii") as counters:
            return int(dict(line.split(": ") for line in counters)["wchar"])
    except (OSError, KeyError, ValueError):
        return None


def reason_in(text: str) -> str | None:
    """Return the last complaint of a program that is not the consequence of another, with its detail."""
    lines, found = text.splitlines(), None
    for number, line in enumerate(lines):
        match = _REASON.search(line)
        if match is not None and not match[1].startswith(_CONSEQUENCES):
            detail = re.match(r"DETAIL:\s+(.*)", lines[number + 1]) if number + 1 < len(lines) else None
            found = match[1] + (f" ({detail[1]})" if detail else "")
    return found


class Session:
    """The programs of one version, as one user, on one cluster, with their files in one place."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.root = os.open(request["root"], os.O_PATH | os.O_DIRECTORY)
        self.cluster = os.path.join(request["root"], request["cluster"])
        self.place = request["place"]
        self.log = os.path.join(self.place, "server.log")
        self._programs = request["programs"]
        self._inside = f"/proc/self/fd/{self.root}/{request['cluster']}"
        self._as_user: dict[str, Any] = {"pass_fds": (self.root,), "cwd": "/"}
        if (account := request["account"]) is not None:
            user, group = account
            self._as_user |= {"user": user, "group": group, "extra_groups": []}

    def make_cluster(self) -> None:
        options = ["-U", "postgres", "--auth=trust", "--no-locale", "-E", "UTF8", "--no-sync"]
        self._run("initdb", "-D", self._inside, *options, "--no-instructions", **self._as_user)

    def start(self, **settings: str) -> subprocess.Popen[bytes]:
        """Start the server and return when it takes connections."""
        command = [f"{self._programs}/postgres", "-D", self._inside, "-k", self.place]
        for name, value in (_SETTINGS | settings).items():
            command += ["-c", f"{name}={value}"]
        with open(self.log, "wb") as log:
            server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as_user
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready(server.pid):
            if server.poll() is not None:
                raise FailureError(f"PostgreSQL did not start: {self.said() or self._logged()}")
            if time.monotonic() > deadline:
                raise FailureError(f"PostgreSQL was not ready after {_START_SECONDS:.0f} s: {self.said()}")
            time.sleep(0.005)
        return server

    def _is_ready(self, pid: int) -> bool:
        """Say what pg_ctl would: the last line of postmaster.pid is the server's state."""
        try:
            with open(os.path.join(self.cluster, "postmaster.pid"), encoding="utf-8") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def stop(self, server: subprocess.Popen[bytes]) -> None:
        """Shut the server down in good order: it writes a checkpoint."""
        server.send_signal(signal.SIGINT)
        try:
            status = server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise FailureError(f"PostgreSQL did not stop within {_STOP_SECONDS:.0f} s") from None
        if status != 0:
            raise FailureError(f"PostgreSQL ended with status {status}: {self.said()}")

    def said(self) -> str | None:
        """Return why the server ended or refused, where its log has a reason."""
        return reason_in(self._logged())

    def _logged(self) -> str:
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read().strip().replace(self._inside, self.cluster)

    def run_client(self, name: str, *arguments: str, given: bytes = b"") -> str:
        """Run a client of the server and return what it printed."""
        connection = ["-h", self.place, "-U", "postgres"]
        try:
            return self._run(name, *connection, *arguments, "postgres", given=given)
        except FailureError as failure:
            said = self.said()
            raise FailureError(f"{failure}; the server: {said}" if said else str(failure)) from None

    def _run(self, name: str, *arguments: str, given: bytes = b"", **how: Any) -> str:
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
        done = subprocess.run(
            [f"{self._programs}/{name}", *arguments],
            input=given,
            capture_output=True,
            env=environment,
            check=False,
            **how,
        )
        if done.returncode != 0:
            complaint = done.stderr.decode(errors="replace")
            last = complaint.strip().splitlines()[-1:] or [f"status {done.returncode}"]
            raise FailureError(f"{name} failed: {reason_in(complaint) or last[0]}")
        printed: bytes = done.stdout
        return printed.decode(errors="replace")


def pgbench_latencies(prefix: str) -> list[float]:
    """Return the seconds of the transactions in pgbench's logs, in the order in which they began.

    A line is: client, number, microseconds, script, time of its end in seconds and microseconds.
    """
    found = []
    for path in glob(f"{prefix}*"):
        with open(path, encoding="ascii") as log:
            for line in log:
                fields = line.split()
                took, seconds, rest = int(fields[2]), int(fields[4]), int(fields[5])
                found.append((seconds * 1_000_000 + rest - took, took))
    return [took / 1e6 for _, took in sorted(found)]


def copy_script(table: str, rows: int, batch: int, seed: int) -> bytes:
    """Return the psql script that loads random rows by COPY, with the time of each batch printed."""
    source = random.Random(seed)
    lines = (f"{number}\t{source.getrandbits(31)}\t{source.randbytes(100).hex()}\n" for number in range(rows))
    script = [f"CREATE TABLE {table} (id int PRIMARY KEY, key int, payload text);\n\\timing on\n"]
    for _ in range(0, rows, batch):
        script += [f"COPY {table} FROM STDIN;\n", *islice(lines, batch), "\\.\n"]
    return "".join(script).encode()


def work(session: Session, request: dict[str, Any]) -> list[float]:
    """Let the client do its work and return its latencies in seconds."""
    arguments = list(request["arguments"])
    if "load" in request:
        script = copy_script(**request["load"], seed=request["seed"])
        printed = session.run_client("psql", "-q", "-X", "-v", "ON_ERROR_STOP=1", *arguments, given=script)
        return [float(time) / 1e3 for time in re.findall(r"^Time: ([0-9.]+) ms", printed, re.MULTILINE)]
    prefix = os.path.join(session.place, "latency")
    if request.get("log"):
        arguments += ["--log", f"--log-prefix={prefix}"]
    session.run_client(request["client"], *arguments)
    return pgbench_latencies(prefix)


def run_session(request: dict[str, Any]) -> dict[str, Any]:
    session = Session(request)
    if request["make"]:
        session.make_cluster()
    before, start = write_count(), time.perf_counter()
    server = session.start(**({"fsync": "off"} if request["make"] else {}))
    try:
        client_before = write_count()
        latencies = work(session, request)
        client_after = write_count()
    except BaseException:
        server.kill()
        server.wait()
        raise
    session.stop(server)
    seconds = time.perf_counter() - start
    counts = (before, client_before, client_after, write_count())
    return {
        "seconds": seconds,
        "application_bytes": _server_bytes(counts, os.path.getsize(session.log)),
        "latencies": latencies,
    }


def _server_bytes(counts: tuple[int | None, ...], logged: int) -> int | None:
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    before, client_before, client_after, after = known
    return after - before - (client_after - client_before) - logged


def main() -> int:
    """Read the request, run it, print the reply as JSON; a failure is a reply with "error"."""
    try:
        reply = run_session(json.loads(sys.argv[1]))
    except (FailureError, OSError) as error:
        reply = {"error": str(error)}
    sys.stdout.write(json.dumps(reply))
    return 0


if __name__ == "__main__":
    sys.exit(main())
