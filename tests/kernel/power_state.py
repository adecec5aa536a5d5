"""What a pool must hold after a power cut: what its user was told before, as the log that survived tells.

The log is outside of the machine whose power is cut. A line is written when something has been done, so all
of it holds after the cut, and of what one thread does in order (the records of a writer, the structural
operations) at most the next as well:

    begin ROUND NAME=SIZE ...       a load began, rounds count from there; the devices other than the writers'
    done ROUND STEP                 a structural operation (see `after`)
    written WRITER SLOT=NUMBER ...  records that were flushed
"""

import random
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from blocksnap import metadata
from blocksnap.pool import Pool
from blocksnap.thin_device import ThinDevice
from tests.thin_tools import thin_tool

__all__ = [
    "RECORD",
    "SIZE",
    "SLOTS",
    "STEPS",
    "WRITERS",
    "Told",
    "after",
    "assert_sound",
    "is_block_lost_by_kernel",
    "read_log",
    "record",
    "slot_offset",
    "verify",
]

WRITERS = ("flushing", "flushing too", "through")
SIZE = 1 << 20
RECORD, SLOTS = 4096, 32
STEPS = ("clear", "snapshot", "pair", "grow", "delete")
_STRIDE = SIZE // SLOTS
_HEADER = struct.Struct("<III")

Devices = dict[str, int]


def slot_offset(slot: int) -> int:
    """Return where a record lies: not at the beginning of its block, so that blocks are copied in parts."""
    return slot * _STRIDE + slot % 4 * RECORD


def record(writer: int, slot: int, number: int) -> bytes:
    """Return the number-th record of a slot: a checksum, then what tells where it belongs, then noise."""
    header = _HEADER.pack(writer, slot, number)
    body = header + random.Random(header).randbytes(RECORD - 4 - len(header))
    return struct.pack("<I", zlib.crc32(body)) + body


def number_of(content: bytes, writer: int, slot: int) -> int:
    """Return the number of the record in a slot, 0 for none; anything else fails."""
    if not any(content):
        return 0
    (checksum,) = struct.unpack_from("<I", content)
    found = _HEADER.unpack_from(content, 4)
    assert checksum == zlib.crc32(content[4:]), f"slot {slot} of writer {writer} is torn"
    assert found[:2] == (writer, slot), f"slot {slot} of writer {writer} holds a record of {found}"
    return int(found[2])


def after(devices: Devices, number: int, step: str) -> Devices:
    """Return the devices after a structural operation: each is one transaction."""
    now = dict(devices)
    match step:
        case "clear":
            now.clear()
        case "snapshot":
            now[f"s{number}"] = SIZE
        case "pair":
            now |= {f"d{number}": SIZE, f"t{number}": SIZE}
        case "grow":
            now[f"d{number}"] = 2 * SIZE
        case "delete":
            for name in (f"s{number - 2}", f"d{number - 2}", f"t{number - 2}"):
                now.pop(name, None)
    return now


def writer_of(number: int) -> int:
    """Return the writer whose device a round takes its snapshots of."""
    return number % len(WRITERS)


def next_step(number: int, step: str) -> tuple[int, str]:
    place = STEPS.index(step) + 1
    return (number, STEPS[place]) if place < len(STEPS) else (number + 1, STEPS[1])


@dataclass
class Told:
    """What was acknowledged. `snapshots` has what each snapshot must hold at least, by slot."""

    written: list[list[int]] = field(default_factory=lambda: [[0] * SLOTS for _ in WRITERS])
    devices: Devices = field(default_factory=dict)
    then: Devices | None = None
    """What the devices are if the operation under way was done; None if none is."""
    snapshots: dict[str, list[int]] = field(default_factory=dict)
    rounds: int = 0
    records: int = 0
    operations: int = 0
    _written_then: list[list[int]] = field(default_factory=list)

    def take(self, line: str) -> None:
        kind, *words = line.split()
        match kind:
            case "begin":
                self.rounds = int(words[0])
                self.devices = {name: int(size) for name, size in (word.split("=") for word in words[1:])}
                self._expect(self.rounds, "clear")
            case "done":
                self._do(int(words[0]), words[1])
            case "written":
                for word in words[1:]:
                    slot, number = map(int, word.split("="))
                    self.written[int(words[0])][slot] = number
                self.records += len(words) - 1

    def _expect(self, number: int, step: str) -> None:
        self.then = after(self.devices, number, step)
        self._written_then = [list(slots) for slots in self.written]

    def _do(self, number: int, step: str) -> None:
        self.devices = after(self.devices, number, step)
        if step == "snapshot":
            self.snapshots[f"s{number}"] = self._written_then[writer_of(number)]
        elif step == "pair":
            self.snapshots[f"t{number}"] = self.snapshots[f"s{number}"]
        self.rounds, self.operations = number, self.operations + 1
        self._expect(*next_step(number, step))


def read_log(path: Path) -> Told:
    told = Told()
    *lines, _torn = path.read_text().split("\n")
    for line in lines:
        told.take(line)
    return told


def is_block_lost_by_kernel(finding: metadata.Finding) -> bool:
    """Tell whether it is this: a data block is taken, zeroed, then mapped; a commit may come between."""
    return finding.severity == "leak" and finding.text.startswith("data space map")


def assert_sound(path: Path | str) -> None:
    """Assert that thin_check and our own check find nothing but blocks that the kernel loses."""
    thin_tool("thin_check", "-q", path)
    for finding in metadata.check(path).findings:
        assert is_block_lost_by_kernel(finding), finding


def _verify_records(device: ThinDevice, writer: int, at_least: list[int]) -> list[int]:
    content = device.read(0, SIZE)
    numbers = []
    for slot, told in enumerate(at_least):
        begin = slot_offset(slot)
        found = number_of(content[begin : begin + RECORD], writer, slot)
        assert found >= told, f"{device.name}: slot {slot} holds record {found}, {told} was acknowledged"
        numbers.append(found)
    return numbers


def verify(pool: Pool, told: Told) -> tuple[Devices, list[list[int]]]:
    """Assert that an opened pool holds what was told.

    Return its devices other than the writers', and the numbers of each writer's records.
    """
    found = {device.name: device.size for device in pool.devices() if device.name not in WRITERS}
    assert found in (told.devices, told.then), f"{found}, not {told.devices} or {told.then}"
    assert {info.id for info in pool._engine.devices()} == {device.id for device in pool.devices()}
    for name in found.keys() & told.snapshots.keys():
        _verify_records(pool.device(name), writer_of(int(name[1:])), told.snapshots[name])
    numbers = [
        _verify_records(pool.device(name), writer, told.written[writer])
        for writer, name in enumerate(WRITERS)
    ]
    return found, numbers
