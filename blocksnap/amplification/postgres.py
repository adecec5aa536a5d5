"""PostgreSQL as a workload: a cluster in the image, a server on the mounted container, a client, a shutdown.

The cluster is made once, by initdb and pgbench's initialisation, and copied into the image of every driver.
The server is that of Debian's package, run as `postgres` or, where that user is not there, `nobody`; this
process need not be let through to the container's directory for that user (postgres_session.py).

Settings are PostgreSQL's own but for these: no TCP; autovacuum off, which writes when it likes; SysV shared
memory for parallel queries, which ends with the session's name space.
"""

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from ..errors import ArgumentError
from . import postgres_session
from .child_process import WorkloadError, run_script
from .latency import Samples
from .workload import Check, Counted, Outcome, Workload

__all__ = ["CopyWorkload", "PgbenchWorkload", "PostgresWorkload"]

CLUSTER = "var/lib/postgresql/data"
_PROGRAMS = ("postgres", "initdb", "pgbench", "psql")
_DEBIAN = Path("/usr/lib/postgresql")
_SOCKET = ".s.PGSQL.5432"
_SOCKET_NAME_MAX = 107  # of sockaddr_un's 108 bytes, the last is 0
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class PostgresWorkload(Workload):
    """A server on a container, and a client."""

    ROOM: ClassVar[int] = 512 * _MIB
    COUNTED: ClassVar[Counted] = Counted(
        "what all processes of the server handed to write calls (wchar of /proc/self/io, which includes "
        "children that were waited for), less its log",
        "tables, the write-ahead log (new segments are written full of zeros), the shutdown's checkpoint",
        "the client; fallocate, names, truncation",
    )

    def missing(self) -> str | None:
        version = str(self.parameters["version"])
        if (_programs(version)) is not None:
            return None
        if version and (found := _installed()):
            return f"PostgreSQL {version} is not installed, {', '.join(found)} is"
        return "PostgreSQL is not installed: apt install postgresql"

    def problem(self) -> str | None:
        if os.geteuid() == 0 and _account() is None:
            return "PostgreSQL does not run as root, and there is no user postgres or nobody"
        return None

    def versions(self) -> dict[str, str]:
        programs = _programs(str(self.parameters["version"]))
        if programs is None:
            return {}
        command = [str(programs / "postgres"), "-V"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {"postgresql": re.sub(r".*?\) ([^ ]*).*", r"\1", said.strip())}

    def stage(self, directory: Path, *, check: Check = lambda: None) -> Self:
        tree = directory / "tree"
        cluster = tree / CLUSTER
        cluster.mkdir(parents=True)
        for above in cluster.relative_to(directory).parents:
            (directory / above).chmod(0o755)
        cluster.chmod(0o700)
        if (account := _account()) is not None:
            os.chown(cluster, *account)
        initialise = ["-i", "-s", str(self.parameters["scale"]), "-q"]
        self._session(tree, check, make=True, client="pgbench", arguments=initialise)
        return replace(self, base=replace(self.base, tree=tree))

    def run(self, root: Path, *, epoch: int = 0, check: Check = lambda: None) -> Outcome:
        reply = self._session(root, check, make=False, **self._client(epoch))
        return Outcome(reply["seconds"], reply["application_bytes"], Samples(tuple(reply["latencies"])))

    @abstractmethod
    def _client(self, epoch: int) -> Mapping[str, Any]:
        """Return what the session's client does."""

    def _session(self, root: Path, check: Check, **request: Any) -> dict[str, Any]:
        programs = _programs(str(self.parameters["version"]))
        assert programs is not None
        account = _account()
        with _short_directory() as place:
            if account is not None:
                os.chown(place, *account)
            request |= {
                "root": str(root),
                "cluster": CLUSTER,
                "programs": str(programs),
                "account": account,
                "place": str(place),
            }
            reply = run_script(postgres_session.__file__, request, check, isolated=True)
        if "error" in reply:
            raise WorkloadError(f"workload {self.name}: {reply['error']}")
        return reply


@dataclass(frozen=True, slots=True)
class PgbenchWorkload(PostgresWorkload):
    """pgbench's own transactions, a fixed number a client; the latencies are those of its log."""

    def _client(self, epoch: int) -> Mapping[str, Any]:
        arguments = ["-n", "-j", "1", "-c", str(self.parameters["clients"])]
        arguments += ["-t", str(self.parameters["transactions"])]
        arguments += [f"--random-seed={self.number('seed') + epoch}"]
        return {"client": "pgbench", "arguments": arguments, "log": True}


@dataclass(frozen=True, slots=True)
class CopyWorkload(PostgresWorkload):
    """COPY in batches, each a transaction; the latencies are psql's."""

    def _client(self, epoch: int) -> Mapping[str, Any]:
        rows, batch = self.number("rows"), self.number("batch")
        return {
            "client": "psql",
            "arguments": [],
            "load": {"table": f"loaded_{epoch}", "rows": rows, "batch": batch},
            "seed": self.number("seed") + epoch,
        }


def _installed() -> list[str]:
    """Return Debian's versions that have all programs, the newest first."""
    names = [path.parent.name for path in _DEBIAN.glob("*/bin") if _is_complete(path)]
    return sorted((name for name in names if name.isdigit()), key=int, reverse=True)


def _programs(version: str) -> Path | None:
    """Return the directory of the programs of a version, of the newest if it is empty."""
    for name in [version] if version else _installed():
        if _is_complete(path := _DEBIAN / name / "bin"):
            return path
    elsewhere = None if version else shutil.which("postgres")
    if elsewhere is not None and _is_complete(path := Path(elsewhere).resolve().parent):
        return path
    return None


def _is_complete(path: Path) -> bool:
    return all((path / program).exists() for program in _PROGRAMS)


def _account() -> tuple[int, int] | None:
    """Return the user and group of the server; None when it is the present one, or when there is nobody."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    return None


@contextmanager
def _short_directory() -> Iterator[Path]:
    """Make a directory for the socket and the logs whose name leaves room for the name of a socket."""
    with tempfile.TemporaryDirectory(prefix="bs-") as name:
        if len(os.fsencode(f"{name}/{_SOCKET}")) > _SOCKET_NAME_MAX:
            raise ArgumentError(f"{name} is too long for a socket: set TMPDIR to a shorter directory")
        yield Path(name)
