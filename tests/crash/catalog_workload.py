"""Random operations on a pool and its catalog, for states of a power cut; and what must hold of each state.

    python -m tests.crash.catalog_workload POOL SEED STEPS

runs the operations. Each says before and after, in the file `marks` of the pool's directory, what the
pool must then hold: its devices with their sizes and labels, and for each device the values that its
pieces may have. Meanwhile a second thread writes to a device of its own and flushes it, so that flushes
share commits with operations.
"""

import json
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blocksnap.errors import NoSpaceError
from blocksnap.pool import Pool

__all__ = ["BLOCK", "BUSY", "PIECES", "Workload", "main"]

BLOCK = 4096
PIECES = 16
"""What a device has at least, and what is written to it."""
BUSY = "busy"


class Workload:
    """The operations on an open pool; `tell` gets each mark, a line of JSON, before it goes on."""

    def __init__(self, pool: Pool, seed: int, tell: Callable[[bytes], object], *, piece: int = BLOCK) -> None:
        self._rng = random.Random(seed)
        self._tell = tell
        self._piece = piece
        self._lock = threading.Lock()
        self._pool = pool
        self._size = self._pool.status().data_bytes
        self._number = 0
        self._value = 0
        self._stop = threading.Event()
        # Of each device: size, labels, and the values that each block may have, the latest last.
        self._devices: dict[str, dict[str, Any]] = {}

    def _mark(self, what: str, **facts: Any) -> None:
        with self._lock:
            self._tell(json.dumps({"what": what, **facts}).encode())

    def _begin(self, after: dict[str, Any]) -> None:
        self._mark("begin", devices=after)

    def _end(self) -> None:
        """Note that an operation returned: all that was written before it is durable."""
        for device in self._devices.values():
            device["values"] = [[values[-1]] for values in device["values"]]
        self._mark("end", devices=self._devices)

    def _changed(self, **devices: dict[str, Any] | None) -> dict[str, Any]:
        merged = {**self._devices, **devices}
        return {name: device for name, device in merged.items() if device is not None}

    # ---- the operations

    def _create(self) -> None:
        name = self._next_name()
        device = {"size": PIECES * self._piece, "labels": {}, "values": [[0]] * PIECES}
        self._do(
            self._changed(**{name: device}), lambda: self._pool.create_device(name, PIECES * self._piece)
        )

    def _snapshot(self, origin: str) -> None:
        name = self._next_name()
        copy = json.loads(json.dumps(self._devices[origin]))
        self._do(
            self._changed(**{name: {**copy, "labels": {}}}), lambda: self._pool.device(origin).snapshot(name)
        )

    def _delete(self, name: str) -> None:
        self._do(self._changed(**{name: None}), lambda: self._pool.device(name).delete())

    def _resize(self, name: str) -> None:
        size = self._devices[name]["size"] + self._piece
        device = {**self._devices[name], "size": size}
        self._do(self._changed(**{name: device}), lambda: self._pool.device(name).resize(size))

    def _relabel(self, name: str) -> None:
        labels = {"number": str(self._next_value())}
        device = {**self._devices[name], "labels": labels}
        self._do(self._changed(**{name: device}), lambda: self._pool.device(name).set_labels(labels))

    def _several(self, old: str) -> None:
        first, second = self._next_name(), self._next_name()
        copy = json.loads(json.dumps(self._devices[old]))
        empty = {"size": PIECES * self._piece, "labels": {}, "values": [[0]] * PIECES}

        def operations() -> None:
            with self._pool.transaction():
                self._pool.device(old).snapshot(first)
                self._pool.create_device(second, PIECES * self._piece)
                self._pool.device(old).delete()

        self._do(self._changed(**{first: {**copy, "labels": {}}, second: empty, old: None}), operations)

    def _extend(self) -> None:
        self._size += PIECES * self._piece
        self._do(self._devices, lambda: self.extend(self._size))

    def extend(self, size: int) -> None:
        self._pool.extend(size=size)

    def _write(self, name: str) -> None:
        first = self._rng.randrange(PIECES)
        count = self._rng.randint(1, PIECES - first)
        value = self._next_value()
        for block in range(first, first + count):
            self._devices[name]["values"][block] = [*self._devices[name]["values"][block], value]
        self._mark("write", devices=self._devices)
        try:
            self._pool.device(name).write(first * self._piece, bytes([value]) * count * self._piece)
        except NoSpaceError:
            self._adopt(name)

    def _adopt(self, name: str) -> None:
        """Take what the device shows after a write that failed half-way."""
        content = self._pool.device(name).read(0, PIECES * self._piece)
        for block, values in enumerate(self._devices[name]["values"]):
            values.append(content[block * self._piece])

    def _do(self, after: dict[str, Any], operation: Any) -> None:
        self._begin(after)
        operation()
        self._devices = json.loads(json.dumps(after))
        self._end()

    # ---- all of it

    def step(self) -> None:
        names = sorted(self._devices)
        if len(names) < 2:
            self._create()
            return
        name = self._rng.choice(names)
        match self._rng.randrange(12):
            case 0:
                self._create()
            case 1 | 2 if len(names) < 8:
                self._snapshot(name)
            case 3:
                self._delete(name)
            case 4:
                self._resize(name)
            case 5:
                self._relabel(name)
            case 6:
                self._several(name)
            case 7:
                self._extend()
            case 8:
                self._do(self._devices, self._pool.commit)
            case _:
                self._write(name)

    def _keep_busy(self) -> None:
        device = self._pool.device(BUSY)
        value = 0
        while not self._stop.is_set():
            value += 1
            self._mark("busy", value=value)
            device.write(0, value.to_bytes(4, "little") * (self._piece // 4))
            device.flush()
            self._mark("flushed", value=value)

    def run(self, steps: int) -> None:
        self._end()
        busy = threading.Thread(target=self._keep_busy)
        busy.start()
        for _ in range(steps):
            self.step()
        self._stop.set()
        busy.join()

    def _next_name(self) -> str:
        self._number += 1
        return f"d{self._number}"

    def _next_value(self) -> int:
        self._value = self._value % 255 + 1
        return self._value


def main(path: str, seed: str, steps: str) -> None:
    marks = os.open(Path(path) / "marks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    Workload(Pool.open(path), int(seed), lambda mark: os.write(marks, mark)).run(int(steps))
    # As a power cut: no close.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
