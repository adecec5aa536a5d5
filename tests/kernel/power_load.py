"""A load until the power is cut: python -m tests.kernel.power_load DIRECTORY (files | disk)

Opens the pool that the last cut left, verifies it, then writes and changes it for ever, and logs what was
done (power_state.py) in the directory, which is outside of this machine.

The pool's files are in the directory, too, and what is written to them survives. Or they are in a file system
on a disk, as loop devices that write to the page cache: what is not flushed is lost.
"""

import mmap
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from blocksnap.mount import LoopDevice, mount
from blocksnap.pool import Pool
from tests.kernel.power_state import (
    RECORD,
    SIZE,
    SLOTS,
    STEPS,
    WRITERS,
    assert_sound,
    read_log,
    record,
    slot_offset,
    verify,
    writer_of,
)

DISK = Path("/disk")


class Log:
    """Lines that are outside once `say` has returned."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        # A cut may have torn the last line, and what follows must not become part of it.
        os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)
        self._lock = threading.Lock()

    def say(self, *words: object) -> None:
        with self._lock:
            os.write(self._file, " ".join(map(str, words)).encode() + b"\n")
            os.fsync(self._file)


class Load:
    """Threads that write records to a device each, and one that makes and deletes devices."""

    def __init__(self, pool: Pool, log: Log, written: list[list[int]], number: int) -> None:
        self._pool = pool
        self._log = log
        self._numbers = written
        self._number = number

    def run(self) -> None:
        """Start some of the works: the commits of each make the records of the others durable. None ends."""
        through = len(WRITERS) - 1
        works: list[Callable[[], None]] = [partial(self._flush, writer) for writer in range(through)]
        works += [partial(self._write_through, through), self._change]
        for work in random.sample(works, random.randint(1, len(works))):
            threading.Thread(target=work).start()

    def _some_records(self, writer: int, count: int) -> Iterator[tuple[int, int]]:
        for slot in random.sample(range(SLOTS), count):
            self._numbers[writer][slot] += 1
            yield slot, self._numbers[writer][slot]

    def _flush(self, writer: int) -> None:
        device = self._pool.device(WRITERS[writer])
        while True:
            records = list(self._some_records(writer, random.randint(1, 8)))
            for slot, number in records:
                device.write(slot_offset(slot), record(writer, slot, number))
            device.flush()
            self._log.say("written", writer, *(f"{slot}={number}" for slot, number in records))

    def _write_through(self, writer: int) -> None:
        """Write as a program does that has the block device: each record must be durable by itself."""
        with self._pool.device(WRITERS[writer]).hold() as handle:
            node = os.open(str(handle.path), os.O_WRONLY | os.O_DIRECT | os.O_DSYNC)  # type: ignore[union-attr]
            buffer = mmap.mmap(-1, RECORD)
            while True:
                ((slot, number),) = self._some_records(writer, 1)
                buffer[:] = record(writer, slot, number)
                assert os.pwrite(node, buffer, slot_offset(slot)) == RECORD
                self._log.say("written", writer, f"{slot}={number}")

    def _change(self) -> None:
        self._step(self._number, "clear")
        while True:
            for step in STEPS[1:]:
                self._step(self._number, step)
            self._number += 1

    def _step(self, number: int, step: str) -> None:
        with self._pool.transaction():
            self._do(number, step)
        self._log.say("done", number, step)

    def _do(self, number: int, step: str) -> None:
        pool = self._pool
        match step:
            case "clear":
                self._delete({device.name for device in pool.devices()} - set(WRITERS))
            case "snapshot":
                pool.device(WRITERS[writer_of(number)]).snapshot(f"s{number}")
            case "pair":
                pool.create_device(f"d{number}", SIZE)
                pool.device(f"s{number}").snapshot(f"t{number}")
            case "grow":
                pool.device(f"d{number}").resize(2 * SIZE)
            case "delete":
                old = {f"s{number - 2}", f"d{number - 2}", f"t{number - 2}"}
                self._delete(old & {device.name for device in pool.devices()})

    def _delete(self, names: set[str]) -> None:
        for name in sorted(names):
            self._pool.device(name).delete()


def _die(arguments: threading.ExceptHookArgs) -> None:
    traceback.print_exception(arguments.exc_value)
    os._exit(1)


def parts_on_disk() -> dict[str, Any]:
    """Return where the pool is on the disk, sound as the cut left it."""
    DISK.mkdir()
    mount("/dev/ubda", DISK, "ext4")
    parts = {name: LoopDevice.attach(DISK / name).path for name in ("metadata", "data")}
    assert_sound(parts["metadata"])
    return {**parts, "catalog": DISK / "catalog.db"}


def main(directory: str, kind: str) -> None:
    threading.excepthook = _die
    log_path = Path(directory, "log")
    tell = os.open("/dev/ttyS1", os.O_WRONLY | os.O_NOCTTY)
    os.write(tell, b"opening\n")
    told = read_log(log_path)
    where = parts_on_disk() if kind == "disk" else {"path": Path(directory, "pool")}
    if kind == "disk" and random.random() < 0.5:
        with Pool.open(**where) as recovered:
            verify(recovered, told)
    pool = Pool.open(**where, engine="kernel")
    found, numbers = verify(pool, told)
    log = Log(log_path)
    number = told.rounds + len(STEPS)
    log.say("begin", number, *(f"{name}={size}" for name, size in found.items()))
    os.write(tell, b"loading\n")
    Load(pool, log, numbers, number).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
