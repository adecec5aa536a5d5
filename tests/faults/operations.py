"""Operations on a pool's files, each call of which fails in turn: python -m tests.faults.operations [NAME...]

A program, preloaded with fail_io.c. For each operation it lets each system call on the files of the pool
fail, with EIO and with ENOSPC, alone or with all that follow. Then: an error of one line (or none, where a
call may fail), no descriptor left open, and a pool that is as before or as after, sound, and works.

It prints, as JSON, how many faults each kind of call got.
"""

import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from blocksnap import metadata, pool_repair
from blocksnap.errors import BlocksnapError, PoolFormatError
from blocksnap.pool import Pool
from blocksnap.user_pool import UserPool

__all__ = ["OPERATIONS"]

SIZE = 64 << 10
CONTENT = bytes(range(256)) * (SIZE // 256)
OTHER = CONTENT[::-1]

State = dict[str, tuple[int, str]]
BEFORE: State = {"base": (SIZE, ""), "snap": (SIZE, "")}
BIG = 3 << 20
"""A device with more mappings than a block of metadata holds."""


@dataclass(frozen=True)
class Operation:
    """What is done with the directory of a pool; `pool` says that it wants an open one."""

    work: Callable[..., object]
    after: State
    before: State | None = field(default_factory=lambda: BEFORE)
    pool: bool = True
    damaged: bool = False


def change_much(pool: Pool) -> None:
    with pool.transaction():
        pool.device("base").snapshot("second")
        pool.create_device("new", SIZE)
        pool.device("snap").delete()


def write(pool: Pool) -> None:
    """Write what is there already: whatever comes of it the content is known."""
    base = pool.device("base")
    base.write(100, CONTENT[100:20000])
    base.flush()
    base.write(0, CONTENT)
    pool.commit()


def discard(pool: Pool) -> None:
    new = pool.create_device("new", SIZE)
    new.write(0, OTHER)
    pool.commit()
    new.discard(0, SIZE)
    pool.commit()
    pool.commit()


def walk(pool: Pool) -> None:
    pool.usage()
    pool.delta("base", "snap")
    pool.reverse_mappings()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        pool.dump(nowhere)
    finally:
        os.close(nowhere)


def read(pool: Pool) -> None:
    for name in ("base", "snap"):
        try:
            assert pool.device(name).read(0, SIZE) == CONTENT
        finally:
            pool.device(name).read(1, 100)


def open_and_close(path: Path) -> None:
    Pool.open(path).close()


OPERATIONS: dict[str, Operation] = {
    "creation": Operation(
        lambda path: Pool.create(path, size="512K", block_size="4K", metadata_size="512K").close(),
        {},
        before=None,
        pool=False,
    ),
    "opening and closing": Operation(open_and_close, BEFORE, pool=False),
    "check": Operation(
        lambda path: metadata.check(path / "metadata"),
        {**BEFORE, "big": (BIG, "")},
        before={**BEFORE, "big": (BIG, "")},
        pool=False,
    ),
    "repair": Operation(lambda path: pool_repair.repair(path, swap=True), BEFORE, pool=False, damaged=True),
    "create_device": Operation(lambda pool: pool.create_device("new", SIZE), {**BEFORE, "new": (SIZE, "")}),
    "snapshot": Operation(lambda pool: pool.device("base").snapshot("new"), {**BEFORE, "new": (SIZE, "")}),
    "delete": Operation(lambda pool: pool.device("snap").delete(), {"base": (SIZE, "")}),
    "resize": Operation(
        lambda pool: pool.device("snap").resize(2 * SIZE), {**BEFORE, "snap": (2 * SIZE, "")}
    ),
    "set_labels": Operation(
        lambda pool: pool.device("snap").set_labels({"key": "value"}), {**BEFORE, "snap": (SIZE, "value")}
    ),
    "transaction": Operation(change_much, {"base": (SIZE, ""), "second": (SIZE, ""), "new": (SIZE, "")}),
    "write, flush, commit": Operation(write, BEFORE),
    "discard": Operation(discard, {**BEFORE, "new": (SIZE, "")}),
    "read": Operation(read, BEFORE),
    "extend": Operation(lambda pool: pool.extend(size="1M", metadata_size="1M"), BEFORE),
    "walks": Operation(walk, BEFORE),
    "close": Operation(Pool.close, BEFORE),
}


class Calls:
    """The preloaded fail_io.c."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.fail_io_name.restype = ctypes.c_char_p

    def arm(self, directory: Path, number: int, error: int, *, lasting: bool) -> None:
        self._library.fail_io_arm(os.fsencode(directory), number, error, lasting)

    def disarm(self) -> None:
        self._library.fail_io_disarm()

    def names(self) -> list[str]:
        return [self._library.fail_io_name(n).decode() for n in range(self._library.fail_io_count())]


class Trial:
    """One operation, on the same pool again and again."""

    def __init__(self, operation: Operation, folder: Path, calls: Calls) -> None:
        self._operation = operation
        self._calls = calls
        self._path = folder / "pool"
        self._kept = folder / "kept"
        self._result: object = None
        self._allowed: tuple[State, ...] = ()
        if operation.before is not None:
            self._make(big="big" in operation.before)
        if operation.damaged:
            self._damage(self._kept / "metadata")

    def _make(self, *, big: bool) -> None:
        size = "4M" if big else "512K"
        with Pool.create(self._kept, size=size, block_size="4K", metadata_size="512K") as pool:
            pool.create_device("base", SIZE).write(0, CONTENT)
            pool.device("base").snapshot("snap")
            pool.device("base").write(0, CONTENT[:4096])
            if big:
                pool.create_device("big", BIG).write(0, CONTENT * (BIG // SIZE))

    @staticmethod
    def _damage(path: Path) -> None:
        """Spoil the root of the data's bitmaps, which can be made again."""
        with path.open("r+b") as file:
            file.seek(80)
            root = int.from_bytes(file.read(8), "little")
            file.seek(root * 4096 + 100)
            file.write(b"damage")

    def run(self) -> Counter[str]:
        """Let each call fail in turn; return how often each kind of call did."""
        done: Counter[str] = Counter()
        for error in (errno.EIO, errno.ENOSPC):
            for lasting in (False, True):
                number = 0
                while name := self._once(number, error, lasting=lasting):
                    done[name] += 1
                    number += 1
        return done

    def _once(self, number: int, error: int, *, lasting: bool) -> str:
        """Return the call that failed, empty if there were not so many."""
        shutil.rmtree(self._path, ignore_errors=True)
        if self._operation.before is not None:
            shutil.copytree(self._kept, self._path)
        before = len(os.listdir("/proc/self/fd"))
        names: list[str] = []
        try:
            self._operate(number, error, lasting=lasting)
            names = self._calls.names()
            assert len(os.listdir("/proc/self/fd")) == before, "a descriptor is left open"
            self._recover()
        except BaseException:
            names = self._calls.names()
            print(f"{os.strerror(error)}{' from here on' if lasting else ''}: call {number} of {names}")
            raise
        return names[number] if number < len(names) else ""

    def _operate(self, number: int, error: int, *, lasting: bool) -> None:
        self._result, error_text = None, ""
        self._allowed = (self._operation.before or {}, self._operation.after)
        pool = Pool.open(self._path, passdown=True) if self._operation.pool else None
        self._calls.arm(self._path, number, error, lasting=lasting)
        try:
            self._result = self._operation.work(self._path if pool is None else pool)
            self._allowed = (self._operation.after,)
        except BlocksnapError as caught:
            error_text = str(caught)
        finally:
            with suppress(BlocksnapError):
                if pool is not None:
                    pool.close()
            self._calls.disarm()
            if pool is not None:
                pool.abandon()
        assert "\n" not in error_text, error_text

    def _recover(self) -> None:
        if self._operation.before is None and self._never_completed():
            return
        if isinstance(self._result, pool_repair.PoolRepair):
            assert self._result.complete, "what may be read another time is taken for lost"
        if self._operation.damaged and metadata.check(self._path / "metadata").fatal:
            pool_repair.repair(self._path, swap=True)
        if metadata.check(self._path / "metadata").needs_check:
            UserPool.clear_needs_check(self._path / "metadata")  # as the error said
        with Pool.open(self._path) as pool:
            found = {device.name: (device.size, device.labels.get("key", "")) for device in pool.devices()}
            assert found in self._allowed, f"{found} is none of {self._allowed}"
            assert {info.id for info in pool._engine.devices()} == {device.id for device in pool.devices()}
            for name in found.keys() - {"new"}:
                assert pool.device(name).read(0, SIZE) == CONTENT, name
            pool.create_device("works", SIZE).write(0, OTHER)
            pool.device("works").delete()
        report = metadata.check(self._path / "metadata")
        assert report.findings == (), report.findings

    def _never_completed(self) -> bool:
        """Return whether creation left nothing, or what says that it is no pool."""
        if not self._path.exists():
            return True
        try:
            Pool.open(self._path).close()
        except PoolFormatError as error:
            return "never completed" in str(error)
        return False


def main(*names: str) -> None:
    calls, told = Calls(), {}
    for name in names or OPERATIONS:
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="blocksnap-faults-") as folder:
            try:
                told[name] = Trial(OPERATIONS[name], Path(folder), calls).run()
            except BaseException:
                print(f"in {name}")
                raise
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
