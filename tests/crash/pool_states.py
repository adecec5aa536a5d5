"""What a pool and its catalog must hold after a power cut, as the marks of catalog_workload.py tell."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blocksnap import metadata
from blocksnap.errors import BlocksnapError
from blocksnap.pool import Pool
from tests.crash.catalog_workload import BUSY, PIECES

__all__ = ["Expectation", "expectation", "judge"]


@dataclass(slots=True)
class Expectation:
    """What may be there: the devices before or after the operation under way, and the busy device's value."""

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    flushed: int = 0
    written: int = 0
    started: bool = False


def expectation(marks: Iterable[bytes]) -> Expectation:
    """Read the marks before a cut."""
    found = Expectation()
    for line in marks:
        mark = json.loads(line)
        match mark["what"]:
            case "begin":
                found.after = mark["devices"]
            case "end":
                found.before = found.after = mark["devices"]
                found.started = True
            case "write":
                found.before = found.after = mark["devices"]
            case "busy":
                found.written = mark["value"]
            case "flushed":
                found.flushed = mark["value"]
    return found


def _sectors_are_right(content: bytes, values: list[list[int]]) -> bool:
    sectors = np.frombuffer(content, np.uint8).reshape(PIECES, -1, 512)
    uniform = (sectors == sectors[:, :, :1]).all()
    allowed = [np.isin(piece[:, 0], possible).all() for piece, possible in zip(sectors, values, strict=True)]
    return bool(uniform and all(allowed))


def _is_as(pool: Pool, devices: dict[str, Any], piece: int) -> bool:
    """Return whether the pool holds exactly these devices with these sizes, labels and contents."""
    present = {device.name: device for device in pool.devices() if device.name != BUSY}
    if present.keys() != devices.keys():
        return False
    for name, expected in devices.items():
        device = present[name]
        if (device.size, dict(device.labels)) != (expected["size"], expected["labels"]):
            return False
        if not _sectors_are_right(device.read(0, PIECES * piece), expected["values"]):
            return False
    return True


def _wrong_in(pool: Pool, expected: Expectation, piece: int) -> str:
    if {info.id for info in pool._engine.devices()} != {device.id for device in pool.devices()}:
        return "pool and catalog name different devices"
    if expected.started and not (_is_as(pool, expected.before, piece) or _is_as(pool, expected.after, piece)):
        return f"devices are {[device.name for device in pool.devices()]}, not as before or after"
    busy = np.frombuffer(pool.device(BUSY).read(0, piece), "<u4")
    if busy.min() < expected.flushed or busy.max() > expected.written:
        return f"busy has {busy.min()}..{busy.max()}, possible {expected.flushed}..{expected.written}"
    return ""


def _nothing(_finding: metadata.Finding) -> bool:
    return False


def judge(
    directory: Path,
    expected: Expectation,
    piece: int,
    is_harmless: Callable[[metadata.Finding], bool] = _nothing,
) -> str:
    """Open a pool; return what is wrong with it, be it that it cannot be opened, nothing if it is right."""
    try:
        with Pool.open(directory) as pool:
            if wrong := _wrong_in(pool, expected, piece):
                return wrong
        findings = metadata.check(directory / "metadata").findings
        return "; ".join(str(finding) for finding in findings if not is_harmless(finding))
    except BlocksnapError as error:
        return str(error).replace(str(directory), "the pool")  # the same words each time
