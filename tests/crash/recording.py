"""What a process did to the files of a pool, and the states in which a power cut can leave them.

A process runs with record_io.c loaded before libc. At a cut each file holds all that was done to it
before its last sync; of what came later a subset, in any order among what does not overlap, each write
whole or torn at multiples of 512 bytes. A file made since the last sync of its directory may be missing.
"""

import os
import random
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

__all__ = ["Change", "Cut", "Kind", "Recording", "build_recorder", "record"]

_HEAD = struct.Struct("<IIQQ")
_SECTOR = 512


class Kind(IntEnum):
    WRITE = 1
    SYNC = 2
    TRUNCATE = 3
    GROW = 4
    ZERO = 5
    NAME = 6


class Cut(IntEnum):
    """What becomes of changes that were not synced: all were made, or some, or parts of some."""

    PREFIX = 0
    SUBSET = 1
    TORN = 2


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a file, or a sync; the file "." is the directory."""

    kind: Kind
    file: str
    offset: int
    length: int
    content: bytes = b""


def build_recorder(directory: Path) -> Path:
    """Compile record_io.c; return the library."""
    library = directory / "record_io.so"
    source = Path(__file__).with_name("record_io.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def _parse(log: bytes, root: Path) -> list[Change]:
    changes, at = [], 0
    while at < len(log):
        kind, path_length, offset, length = _HEAD.unpack_from(log, at)
        at += _HEAD.size
        path = os.fsdecode(log[at : at + path_length])
        at += path_length
        content = log[at : at + length] if kind == Kind.WRITE else b""
        at += len(content)
        changes.append(Change(Kind(kind), os.path.relpath(path, root), offset, length, content))
    return changes


@dataclass(frozen=True, slots=True)
class Recording:
    """The files at the start, and every change since."""

    start: Mapping[str, bytes]
    changes: Sequence[Change]

    def state(self, position: int, cut: Cut, seed: int) -> dict[str, bytes]:
        """Return the files as a cut before the change at a position can leave them."""
        rng = random.Random(seed)
        synced = {
            change.file: i for i, change in enumerate(self.changes[:position]) if change.kind is Kind.SYNC
        }
        files = {name: bytearray(content) for name, content in self.start.items()}
        made: dict[str, int] = {}
        for i, change in enumerate(self.changes[:position]):
            made.setdefault(change.file, i)
            if change.kind is Kind.SYNC or change.file == ".":
                continue
            durable = i < synced.get(change.file, -1)
            if durable or cut is Cut.PREFIX or rng.random() < 0.5:
                _apply(files, change, rng if cut is Cut.TORN and not durable else None)
        for name in set(files) - set(self.start):
            if cut is not Cut.PREFIX and made[name] > synced.get(".", -1) and rng.random() < 0.5:
                del files[name]
        return {name: bytes(content) for name, content in files.items()}


def _apply(files: dict[str, bytearray], change: Change, torn: random.Random | None) -> None:
    content = files.setdefault(change.file, bytearray())
    end = change.offset + change.length
    if change.kind is Kind.TRUNCATE:
        del content[change.length :]
    if len(content) < end and change.kind is not Kind.ZERO:
        content.extend(bytes(end - len(content)))
    if change.kind not in (Kind.WRITE, Kind.ZERO):
        return
    new = change.content or bytes(max(0, min(end, len(content)) - change.offset))
    if torn is None:
        content[change.offset : change.offset + len(new)] = new
        return
    at = change.offset
    while at < change.offset + len(new):
        part = min(_SECTOR - at % _SECTOR, change.offset + len(new) - at)
        if torn.random() < 0.5:
            content[at : at + part] = new[at - change.offset : at - change.offset + part]
        at += part


def record(recorder: Path, root: Path, log: Path, program: Sequence[str]) -> Recording:
    """Run a Python program (arguments for the interpreter) and record what it does to the files in root."""
    start = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    environment = {
        **os.environ,
        "LD_PRELOAD": str(recorder),
        "RECORD_IO_ROOT": str(root),
        "RECORD_IO_LOG": str(log),
    }
    done = subprocess.run(
        [sys.executable, *program],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Recording(start, _parse(log.read_bytes(), root))
