"""Every write that reaches a block device, as the kernel tells it (tracefs), and what an ext4 has there."""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from blocksnap import mount

__all__ = ["INNER", "Write", "ext4_regions", "missing", "traced_writes", "written_by_region"]

_LINE = re.compile(r"block_rq_complete: \d+,\d+ (?P<kind>\w+) \(.*?\) (?P<sector>\d+) \+ (?P<sectors>\d+)")
_SECTOR = 512
_BLOCK = 4096
INNER = "extent trees and attributes"


class Write(NamedTuple):
    offset: int
    length: int


def missing(directory: Path) -> str | None:
    """Return why writes cannot be traced, None when they can."""
    if os.geteuid() != 0:
        return "needs root"
    with _tracefs(directory) as tracing:
        has = tracing is not None and (tracing / "events/block/block_rq_complete").is_dir()
    return None if has else "needs a kernel with tracefs and block events"


@contextmanager
def _tracefs(directory: Path) -> Iterator[Path | None]:
    place = directory / "tracefs"
    place.mkdir()
    try:
        mount.mount("tracefs", place, "tracefs")
    except OSError:
        yield None
    else:
        try:
            yield place
        finally:
            mount.unmount(place)
    finally:
        place.rmdir()


@contextmanager
def traced_writes(directory: Path, device: str) -> Iterator[list[Write]]:
    """Collect the writes to a block device; the list is filled when the block ends."""
    number = os.stat(device).st_rdev
    found: list[Write] = []
    with _tracefs(directory) as tracing:
        assert tracing is not None
        instance = tracing / "instances" / f"blocksnap-{os.getpid()}"
        instance.mkdir()
        try:
            event = instance / "events/block/block_rq_complete"
            (instance / "buffer_size_kb").write_text("8192")
            (event / "filter").write_text(f"dev == {os.major(number) << 20 | os.minor(number)}")
            (event / "enable").write_text("1")
            yield found
            (event / "enable").write_text("0")
            for match in map(_LINE.search, (instance / "trace").read_text().splitlines()):
                if match is not None and "W" in match["kind"] and "D" not in match["kind"]:
                    found.append(Write(int(match["sector"]) * _SECTOR, int(match["sectors"]) * _SECTOR))
        finally:
            instance.rmdir()


def ext4_regions(device: str) -> dict[str, list[range]]:
    """Return where an ext4 with blocks of 4096 bytes has its own structures, by name; ranges in bytes."""
    told = _tool("dumpe2fs", device)
    size = int(_field(told, "Block size"))
    found: dict[str, list[range]] = {"journal": []}
    for begin, end in re.findall(
        r"\(\d+(?:-\d+)?\):(\d+)(?:-(\d+))?", _tool("debugfs", "-R", "stat <8>", device)
    ):
        found["journal"].append(range(int(begin) * size, (int(end or begin) + 1) * size))
    per_table = int(_field(told, "Inode blocks per group"))
    for name, length in (("Block bitmap", 1), ("Inode bitmap", 1), ("Inode table", per_table)):
        begins = [int(begin) for begin in re.findall(rf"{name} at (\d+)", told)]
        found[name.lower()] = [range(begin * size, (begin + length) * size) for begin in begins]
    heads = re.findall(r"superblock at (\d+)(?:, Group descriptors at (\d+)(?:-(\d+))?)?", told)
    found["superblock and group descriptors"] = [
        range(int(begin) * size, (int(last or first or begin) + 1) * size) for begin, first, last in heads
    ]
    return found


def _tool(name: str, *arguments: str) -> str:
    command = [f"/usr/sbin/{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*(\S+)", text, re.MULTILINE)
    assert match is not None, name
    return match[1]


def written_by_region(
    writes: Sequence[Write], regions: dict[str, list[range]], device: str
) -> dict[str, int]:
    """Sum the bytes of writes by the region that they fall in, sector by sector; the rest is "elsewhere".

    What is in no region and belongs to an inode all the same are the inner blocks of files.
    """
    at = {block: name for name, places in regions.items() for place in places for block in place[::_BLOCK]}
    found: dict[int, int] = {}
    for write in writes:
        for offset in range(write.offset, write.offset + write.length, _SECTOR):
            block = offset // _BLOCK * _BLOCK
            found[block] = found.get(block, 0) + _SECTOR
    at |= dict.fromkeys(_of_inodes(device, [block for block in found if block not in at]), INNER)
    sums: dict[str, int] = {}
    for block, size in found.items():
        name = at.get(block, "elsewhere")
        sums[name] = sums.get(name, 0) + size
    return sums


def _of_inodes(device: str, blocks: Sequence[int]) -> list[int]:
    told = _tool("debugfs", "-R", f"icheck {' '.join(str(block // _BLOCK) for block in blocks)}", device)
    return [int(block) * _BLOCK for block in re.findall(r"^(\d+)\t\d+$", told, re.MULTILINE)]
