"""Operations of a kernel pool, killed: python -m tests.kernel.kill_matrix OPERATION (before | after) [ioctls]

A program, preloaded with kill_points.c. For each ioctl and each write to the catalog it lets a child process
run the operation and be killed before, or after, that call; then it opens the pool, which must be as it was
before the operation or as it is after it, with nothing left anywhere. It prints what the calls were, as JSON.
With "ioctls" it leaves out the writes to the catalog.
"""

import ctypes
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from blocksnap import metadata
from blocksnap.device_mapper import Control
from blocksnap.dm_cookie import udev_runs
from blocksnap.errors import BusyError
from blocksnap.pool import Pool
from blocksnap.udev import left_cookies
from tests.kernel.devices import leftovers, sweep
from tests.kernel.pool_places import Places

__all__ = ["OPERATIONS"]

SIZE = 1 << 20
DATA_SIZE = 4 << 20
CONTENT = os.urandom(SIZE)
BEGINNING = {"base": SIZE, "snap": SIZE}

_DM_CALLS = (
    *("version", "remove all", "list", "create", "remove", "rename", "suspend", "info", "wait", "load"),
    *("clear", "dependencies", "status", "list targets", "message", "geometry", "arm", "target version"),
)
_CATALOG_CALLS = {1: "catalog write", 2: "catalog sync", 3: "catalog truncation"}
_DM = 0xFD


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done to a pool, and the devices (sizes by name) that may be found after a kill in it."""

    work: Callable[[Pool], object]
    after: dict[str, int]
    between: tuple[dict[str, int], ...] = ()
    data_size: int = DATA_SIZE
    """Of the pool, after it."""
    on_files: bool = False
    """With loop devices of the pool's own, which takes longer."""
    interrupted: bool = False
    """It is the opening, after a kill in a transaction of which half is in the kernel's metadata."""


def change_much(pool: Pool) -> None:
    with pool.transaction():
        pool.create_device("new", SIZE)
        pool.device("base").snapshot("second")
        pool.device("snap").delete()


def fail_half_way(pool: Pool) -> None:
    """Delete two devices, of which the second is found in use when the first is gone."""
    base = pool.device("base")
    size = base.size
    with suppress(BusyError), ExitStack() as secret, pool.transaction():
        pool.create_device("new", SIZE)
        pool.device("snap").delete()
        base.delete()
        secret.enter_context(pool._engine.open_device(base.id, size))


def shrink_among_others(pool: Pool) -> None:
    with pool.transaction():
        pool.create_device("new", SIZE)
        pool.device("base").resize(SIZE // 2 + 512)
        pool.device("snap").delete()


OPERATIONS = {
    "create": Operation(lambda pool: pool.create_device("new", SIZE), BEGINNING | {"new": SIZE}),
    "snapshot": Operation(lambda pool: pool.device("base").snapshot("new"), BEGINNING | {"new": SIZE}),
    "delete": Operation(lambda pool: pool.device("base").delete(), {"snap": SIZE}),
    "grow": Operation(lambda pool: pool.device("snap").resize(2 * SIZE), BEGINNING | {"snap": 2 * SIZE}),
    "shrink": Operation(lambda pool: pool.device("base").resize(SIZE // 2), BEGINNING | {"base": SIZE // 2}),
    "shrink among others": Operation(shrink_among_others, {"base": SIZE // 2 + 512, "new": SIZE}),
    "transaction": Operation(change_much, {"base": SIZE, "new": SIZE, "second": SIZE}),
    "failing transaction": Operation(fail_half_way, {"base": SIZE}, ({"new": SIZE},)),
    "extend": Operation(
        lambda pool: pool.extend(size=2 * DATA_SIZE), BEGINNING, data_size=2 * DATA_SIZE, on_files=True
    ),
    "close": Operation(Pool.close, BEGINNING, on_files=True),
    "recovery": Operation(lambda pool: pool, BEGINNING, on_files=True, interrupted=True),
}


class KillPoints:
    """The preloaded kill_points.c."""

    def __init__(self, *, after: bool, catalog: bool) -> None:
        self.after = after
        self._catalog = catalog
        self._library = ctypes.CDLL(None)
        self._library.kill_points_kind.restype = ctypes.c_ulong

    def arm(self, target: int) -> None:
        self._library.kill_points_arm(target, ctypes.c_bool(self.after), ctypes.c_bool(self._catalog))

    def disarm(self) -> None:
        self._library.kill_points_disarm()

    def busy(self) -> int:
        """Return how many removals were repeated since it was armed."""
        count: int = self._library.kill_points_busy()
        return count

    def calls(self) -> list[str]:
        """Return what was counted since it was armed."""
        count = self._library.kill_points_count()
        return [_name(self._library.kill_points_kind(number)) for number in range(count)]


def _name(kind: int) -> str:
    if kind in _CATALOG_CALLS:
        return _CATALOG_CALLS[kind]
    group, number = kind >> 8 & 0xFF, kind & 0xFF
    return _DM_CALLS[number] if group == _DM else f"ioctl {kind:#x}"


class Matrix:
    """One operation and the pool that it is killed on, which is the same each time."""

    def __init__(self, operation: Operation, places: Places, points: KillPoints) -> None:
        self._operation = operation
        self._places = places
        self._points = points
        with Pool.create(**places.options, size=DATA_SIZE) as pool:
            pool.create_device("base", SIZE).write(0, CONTENT)
            pool.device("base").snapshot("snap")
        if operation.interrupted:
            self._interrupt()
        places.keep()
        self._loops = loops_of_pools()
        self._data_bytes = DATA_SIZE

    def _interrupt(self) -> None:
        """Leave a transaction half done, and nothing in the kernel: opening has to undo it."""
        child = os.fork()
        if child == 0:
            with Pool.open(**self._places.options, engine="kernel") as pool, pool.transaction():
                pool.create_device("new", SIZE)
                pool.device("base").snapshot("second")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        with Control.open() as control:
            assert sweep(control)

    def run(self) -> list[str]:
        """Kill it at every call; return the calls, once it came to its end."""
        number = 1
        while True:
            self._places.restore()
            killed = self._killed_at(number)
            self._points.disarm()
            calls, busy = self._points.calls(), self._points.busy()
            try:
                # A scan of udevd has a new device open for a moment, not each time: the removal is repeated.
                assert not busy or udev_runs(), f"{busy} removals of busy devices"
                found = self._recovered("user" if (number + self._points.after) % 2 else "kernel")
                allowed = (self._operation.after, BEGINNING, *self._operation.between)
                assert found in allowed, f"{found} is none of {allowed}"
                self._assert_nothing_left()
            except BaseException:
                when = "after" if self._points.after else "before"
                print(f"killed {when} call {number} ({calls[number - 1 : number]}) of {calls}", flush=True)
                raise
            if not killed:
                assert found == self._operation.after
                assert self._data_bytes == self._operation.data_size
                assert len(calls) - busy == number - 1, f"{number - 1} points visited of {calls}"
                return calls
            # After a repeated removal this was another point than the one that had its turn.
            number += not busy

    def _killed_at(self, number: int) -> bool:
        """Do the operation in a child process; return whether it was killed in it."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self._operate(number)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)

    def _operate(self, number: int) -> None:
        if self._operation.interrupted:
            self._points.arm(number)
        pool = Pool.open(**self._places.options, engine="kernel")
        pool.device("base").read(0, 1)
        if not self._operation.interrupted:
            self._points.arm(number)
        self._operation.work(pool)
        self._points.disarm()
        pool.close()

    def _recovered(self, engine: str) -> dict[str, int]:
        """Open the pool after a kill; return the sizes of its devices."""
        with Pool.open(**self._places.options, engine=engine) as pool:
            found = {device.name: device.size for device in pool.devices()}
            assert pool.status().devices == len(found)
            self._data_bytes = pool.status().data_bytes
            assert self._data_bytes in (DATA_SIZE, self._operation.data_size)
            assert {info.id for info in pool._engine.devices()} == {device.id for device in pool.devices()}
            for name in found.keys() - {"new"}:
                size = min(found[name], SIZE)
                assert pool.device(name).read(0, size) == CONTENT[:size], name
        report = metadata.check(self._places.metadata)
        assert report.findings == (), report.findings
        assert report.devices == len(found)
        return found

    def _assert_nothing_left(self) -> None:
        # A child that attached a loop device for a killed process may just be about to let it go.
        deadline = time.monotonic() + 5
        while (loops := loops_of_pools() - self._loops) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not loops, f"loop devices: {loops}"
        with Control.open() as control:
            assert not (devices := leftovers(control)), f"mapped devices: {devices}"
        assert not (cookies := left_cookies()), f"cookies: {list(map(hex, cookies))}"
        nodes = [*Path("/dev").glob("dm-*"), *Path("/dev/mapper").glob("*blocksnap*")]
        assert not nodes, f"nodes: {nodes}"


def loops_of_pools() -> set[str]:
    """Return the loop devices over files of this program, asked of sysfs alone."""
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    with suppress(OSError):
        return {str(file) for file in files if "/kill-matrix-" in file.read_text()}
    return loops_of_pools()  # one was detached meanwhile


def main(name: str, when: str, only: str = "") -> None:
    operation = OPERATIONS[name]
    points = KillPoints(after=when == "after", catalog=only != "ioctls")
    with tempfile.TemporaryDirectory(prefix="kill-matrix-") as folder:
        places = Places(Path(folder), devices=not operation.on_files, data_size=DATA_SIZE)
        try:
            calls = Matrix(operation, places, points).run()
        finally:
            with Control.open() as control:
                sweep(control)
            places.close()
    print(json.dumps(calls))


if __name__ == "__main__":
    main(*sys.argv[1:])
