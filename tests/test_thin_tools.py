"""Our walks against thin-provisioning-tools 0.9.0 on the same images, byte for byte."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blocksnap import metadata
from tests.thin_image import build
from tests.thin_tools import needs_thin_tools, our_text, thin_tool
from tests.thin_xml import Device, Pool, history, restore, to_xml

pytestmark = needs_thin_tools

POOLS: dict[str, Callable[[], Pool]] = {
    "no_devices": lambda: Pool([], 128, 0, 0, 0, np.zeros(0, dtype=np.uint64)),
    "one_empty_device": lambda: history(0, snapshots=0, mappings=0),
    "empty_snapshots": lambda: history(1, snapshots=3, mappings=0),
    "one_mapping": lambda: history(2, snapshots=0, mappings=1),
    "one_device": lambda: history(3, snapshots=0, mappings=5000),
    "device_id_0": lambda: history(4, snapshots=4, mappings=900, first_id=0),
    "largest_device_id": lambda: history(5, snapshots=3, mappings=900, first_id=(1 << 24) - 4),
    "no_gaps": lambda: history(6, snapshots=3, mappings=9000, longest_run=2000, gaps=0),
    "fragmented": lambda: history(7, snapshots=4, mappings=6000, longest_run=1, gaps=0.5, change=0.3),
    "64_devices": lambda: history(8, snapshots=63, mappings=2000),
    "three_levels": lambda: history(9, snapshots=2, mappings=90_000, longest_run=3),
    "runs_split_by_time": lambda: split_by_time(),
}


def split_by_time() -> Pool:
    """Return devices in which thin and data blocks go on while the time changes."""
    blocks = np.arange(2000, dtype=np.uint64)
    times = blocks // np.uint64(7) % np.uint64(3)
    later = Device(2, 3, 3, 3, blocks, blocks, times)
    return Pool([Device(1, 0, 0, 3, blocks, blocks, times), later], 128, 2000, 3, 3, blocks)


@pytest.fixture(scope="module", params=list(POOLS))
def pool(request: pytest.FixtureRequest) -> Pool:
    return POOLS[request.param]()


@pytest.fixture(scope="module", params=["restored", "sharing"])
def image(request: pytest.FixtureRequest, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool as thin_restore writes it, and with nodes shared as the kernel shares them."""
    directory = tmp_path_factory.mktemp("pool")
    if request.param == "restored":
        return restore(to_xml(pool), directory, metadata_bytes=16 << 20)
    return build(pool).save(directory / "metadata")


def pairs(pool: Pool) -> list[tuple[int, int]]:
    ids = [device.id for device in pool.devices]
    chosen = {(a, b) for a in ids[:2] for b in ids[-2:]} | {(a, a) for a in ids[:1]}
    return sorted(chosen | {(b, a) for a, b in chosen})


def test_dump_equals_thin_dump_and_what_was_restored(pool: Pool, image: Path) -> None:
    text = our_text(image)
    assert text == thin_tool("thin_dump", image)
    assert text == to_xml(pool)


def test_delta_equals_thin_delta(pool: Pool, image: Path) -> None:
    for left, right in pairs(pool):
        expected = thin_tool("thin_delta", "--thin1", left, "--thin2", right, image)
        assert our_text(image, left, right) == expected


def test_delta_ranges_are_those_of_thin_delta(pool: Pool, image: Path) -> None:
    for left, right in pairs(pool):
        text = thin_tool("thin_delta", "--thin1", left, "--thin2", right, image)
        expected = [
            (int(begin), int(length), kind)
            for kind, begin, length in re.findall(r'<(\w+) begin="(\d+)" length="(\d+)"/>', text)
            if kind != "same"
        ]
        found = metadata.delta_ranges(image, left, right)
        assert [(int(b), int(n), metadata.DELTA_KINDS[int(k)]) for b, n, k in found] == expected


def test_usage_equals_thin_ls(image: Path) -> None:
    text = thin_tool("thin_ls", "--no-headers", "-o", "DEV,MAPPED_BLOCKS,EXCLUSIVE_BLOCKS", image)
    assert metadata.usage(image) == tuple(tuple(map(int, line.split())) for line in text.splitlines())


def test_check_agrees_with_thin_check(pool: Pool, image: Path) -> None:
    thin_tool("thin_check", "-q", image)
    report = metadata.check(image)
    assert [finding for finding in report.findings if finding.severity != "warning"] == []
    assert report.devices == len(pool.devices)


def test_only_known_flaws_of_thin_restore_are_warned_of(image: Path) -> None:
    known = re.compile(r"nr_free is|none_free_before is|nr_allocated is")
    assert [f for f in metadata.check(image).findings if not known.search(f.text)] == []


def test_dump_restores_to_itself(image: Path, tmp_path: Path) -> None:
    text = our_text(image)
    assert our_text(restore(text, tmp_path, metadata_bytes=16 << 20)) == text


def test_a_million_mappings_in_64_snapshots(tmp_path: Path) -> None:
    pool = history(21, snapshots=64, mappings=16_000)
    image = restore(to_xml(pool), tmp_path, metadata_bytes=64 << 20)
    assert our_text(image) == to_xml(pool) == thin_tool("thin_dump", image)
    assert our_text(image, 1, 65) == thin_tool("thin_delta", "--thin1", 1, "--thin2", 65, image)
    report = metadata.check(image)
    assert not report.damaged
    assert report.mappings == 65 * 16_000


def test_thin_delta_refuses_an_absent_device_too(tmp_path: Path) -> None:
    image = build(history(1, snapshots=1, mappings=10)).save(tmp_path / "metadata")
    done = subprocess.run(
        ["thin_delta", "--thin1", "1", "--thin2", "9", image], capture_output=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == b""


def test_needs_check_shows_in_the_dump_as_thin_dump_shows_it(tmp_path: Path) -> None:
    flagged = build(history(1, snapshots=1, mappings=10))
    flagged.put(0, 4, "I", 1)
    image = flagged.save(tmp_path / "metadata")
    assert our_text(image) == thin_tool("thin_dump", image)
    assert metadata.check(image).needs_check
