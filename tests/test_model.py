"""The copy-on-write model: equal to a slow, obvious one, to exact relations, and to what pools really do."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap import ThinDevice
from blocksnap.amplification.model import CowModel, SnapshotEvery
from blocksnap.errors import ArgumentError
from blocksnap.pool import Pool
from blocksnap.traces.request import DISCARD, FLUSH, READ, REQUEST, WRITE, Requests
from tests.slow_model import Request, SlowModel

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SECOND = 10**9


def array_of(rows: list[Request]) -> Requests:
    return np.array(rows, dtype=REQUEST)


def write(offset: int, length: int, *, time: int = 0, device: int = 0) -> Request:
    return time, offset, length, WRITE, device


def discard(offset: int, length: int, *, device: int = 0) -> Request:
    return 0, offset, length, DISCARD, device


# ---- the same as the slow model

UNITS = st.sampled_from([1, 512, 4 * KIB, 64 * KIB])
KINDS = st.sampled_from([WRITE] * 6 + [DISCARD] * 2 + [FLUSH, READ])


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    """Draw requests in order of time: aligned ones and odd ones, small and large, on two devices."""
    rows = []
    time = draw(st.integers(0, SECOND))
    for _ in range(draw(st.integers(0, 60))):
        time += draw(st.sampled_from([0, 1, SECOND // 4, 3 * SECOND]))
        unit, kind = draw(UNITS), draw(KINDS)
        offset = draw(st.integers(0, 4 * MIB // unit)) * unit
        length = draw(st.integers(0, draw(st.sampled_from([3, 40, 2 * MIB // unit])))) * unit
        rows.append((time, offset, length, kind, draw(st.integers(0, 1))))
    return rows


SNAPSHOTS = st.sampled_from(
    [
        SnapshotEvery(),
        SnapshotEvery(writes=1),
        SnapshotEvery(writes=7),
        SnapshotEvery(bytes=3 * MIB),
        SnapshotEvery(seconds=0.75),
    ]
)
OPTIONS = st.fixed_dictionaries({"fresh": st.booleans(), "keep_parts": st.booleans()})


@settings(max_examples=150, deadline=None)
@given(
    requests(),
    st.sets(st.sampled_from([512 << step for step in range(17)]), min_size=1, max_size=3),
    SNAPSHOTS,
    OPTIONS,
    st.data(),
)
def test_c_model_is_the_slow_model(
    rows: list[Request], sizes: set[int], every: SnapshotEvery, options: dict[str, Any], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(rows)))
    with CowModel(sorted(sizes), snapshot_every=every, **options) as model:
        model.feed(array_of(rows[:cut]))
        model.snapshot()
        model.feed(array_of(rows[cut:]))
        results = model.results()
        for result in results:
            slow = SlowModel(
                result.block_size,
                snapshot_writes=every.writes or 0,
                snapshot_bytes=every.bytes or 0,
                snapshot_ns=round((every.seconds or 0) * SECOND),
                commit_ns=SECOND,
                **options,
            )
            slow.feed(rows[:cut])
            slow.snapshot()
            slow.feed(rows[cut:])
            row = result.as_dict()
            expected = slow.result()
            assert {name: row[name] for name in expected} == expected
            assert model.epochs(result.block_size).tolist() == slow.epochs()


# ---- exact relations


@given(st.integers(0, GIB), st.integers(1, 8 * MIB))
def test_a_write_touches_the_blocks_that_it_overlaps(offset: int, length: int) -> None:
    with CowModel() as model:
        model.feed(array_of([write(offset, length)]))
        for result in model.results():
            size = result.block_size
            assert result.blocks_written == -(-(offset % size + length) // size)


@given(st.integers(0, GIB), st.integers(1, 8 * MIB))
def test_block_level_cost_is_the_blocks_not_wholly_overwritten(offset: int, length: int) -> None:
    with CowModel() as model:
        model.feed(array_of([write(offset, length), write(offset, length)]))
        for result in model.results():
            size = result.block_size
            whole = max(0, (offset + length) // size - -(-offset // size))
            assert result.blocks_overwritten == whole
            assert result.copy_bytes == (result.blocks_written - whole) * size
            assert result.space_bytes == result.blocks_written * size
            assert result.write_amplification == (result.copy_bytes + 2 * length) / (2 * length)


def test_snapshots_with_a_write_between_cost_a_copy_each_without_one_none() -> None:
    with CowModel(["64K"]) as model:
        for _ in range(5):
            model.snapshot()
            model.feed(array_of([write(0, 1)]))
        for _ in range(5):
            model.snapshot()
        assert model.results()[0].blocks_copied == 5
        model.feed(array_of([write(0, 1)]))
        assert model.results()[0].blocks_copied == 6


def test_one_byte_in_a_file_costs_a_block() -> None:
    with CowModel(["64K"]) as model:
        model.feed(array_of([write(12345678, 1)]))
        (result,) = model.results()
    assert result.copy_bytes == 65536
    assert result.write_amplification == 65537


def test_a_trace_cut_anywhere_gives_the_same() -> None:
    rng = np.random.default_rng(5)
    rows = np.zeros(20_000, REQUEST)
    rows["time"] = np.arange(len(rows)) * 10**6
    rows["offset"] = rng.integers(0, 256 * MIB, len(rows))
    rows["length"] = rng.integers(1, 100_000, len(rows))
    rows["kind"] = rng.choice([WRITE, WRITE, READ, FLUSH, DISCARD], len(rows))
    every = SnapshotEvery(writes=999)
    with CowModel(snapshot_every=every) as whole, CowModel(snapshot_every=every) as pieces:
        whole.feed(rows)
        for piece in np.split(rows, [1, 2, 3000, 3001, 17_000]):
            pieces.feed(piece)
        assert pieces.results() == whole.results()


# ---- snapshots: how often


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100000", SnapshotEvery(writes=100_000)),
        ("60s", SnapshotEvery(seconds=60)),
        ("0.5 s", SnapshotEvery(seconds=0.5)),
        ("64M", SnapshotEvery(bytes=64 * MIB)),
        ("512B", SnapshotEvery(bytes=512)),
    ],
)
def test_snapshot_every_is_written_as_people_write_it(text: str, expected: SnapshotEvery) -> None:
    assert SnapshotEvery.parse(text) == expected


@pytest.mark.parametrize("text", ["", "often", "-5", "0", "0s", "5 minutes"])
def test_snapshot_every_names_what_is_no_interval(text: str) -> None:
    with pytest.raises(ArgumentError, match="a snapshot every"):
        SnapshotEvery.parse(text)


def test_a_time_without_writes_makes_no_snapshot() -> None:
    rows = [write(0, 1), write(0, 1, time=100 * SECOND), write(0, 1, time=101 * SECOND)]
    with CowModel(["4K"], snapshot_every=SnapshotEvery(seconds=1)) as model:
        model.feed(array_of(rows))
        assert model.trace().snapshots == 2
        assert model.epochs(4 * KIB)["blocks_exclusive"].tolist() == [1, 1, 1]


# ---- what cannot be


def test_an_impossible_request_is_named_and_those_before_it_count() -> None:
    rows = [write(0, 1), write(0, 1), write(2**63 - 1, 2)]
    with CowModel(["4K"]) as model:
        with pytest.raises(ArgumentError, match=r"request 2, a write of 2 bytes at .* beyond"):
            model.feed(array_of(rows))
        assert model.trace().writes == 2


def test_a_closed_model_says_so() -> None:
    model = CowModel(["4K"])
    model.close()
    model.close()
    with pytest.raises(ArgumentError, match="closed"):
        model.results()


@pytest.mark.parametrize("sizes", [["3K"], ["256"], ["2G"], []])
def test_impossible_block_sizes_are_refused(sizes: list[str]) -> None:
    with pytest.raises(ArgumentError, match="block size"):
        CowModel(sizes)


def test_an_array_of_something_else_is_refused() -> None:
    with CowModel() as model, pytest.raises(ArgumentError, match="REQUEST"):
        model.feed(np.zeros(3, np.int64))


def test_running_out_of_memory_is_an_error() -> None:
    program = """
import resource
import numpy as np
from blocksnap.amplification.model import CowModel
from blocksnap.traces import REQUEST

with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
requests = np.zeros(1 << 20, REQUEST)
requests["offset"] = np.arange(len(requests)) << 40
requests["length"] = requests["kind"] = 1
resource.setrlimit(resource.RLIMIT_AS, (now + (96 << 20), -1))
with CowModel() as model:
    try:
        model.feed(requests)
    except OSError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("out of memory after ")


# ---- pools


class Replay:
    """A pool whose devices get what a model gets, and are snapshotted together."""

    def __init__(self, path: Path, block_size: int, devices: int, *, fresh: bool) -> None:
        self.pool = Pool.create(path, size="1G", block_size=block_size)
        self.devices = [self.pool.create_device(f"device-{n}", 8 * MIB) for n in range(devices)]
        if not fresh:
            self.devices = [self._container(device) for device in self.devices]
        self.snapshots = 0
        self.before = self.pool.status().counters

    @staticmethod
    def _container(image: ThinDevice) -> ThinDevice:
        image.write(0, bytes(image.size))
        return image.snapshot(f"{image.name}-container")

    def take(self, rows: list[Request]) -> None:
        for _, offset, length, kind, device in rows:
            if kind == WRITE:
                self.devices[device].write(offset, b"w" * length)
            elif kind == DISCARD:
                self.devices[device].discard(offset, length)
            elif kind == FLUSH:
                self.devices[device].flush()

    def snapshot(self) -> None:
        for device in self.devices:
            device.snapshot(f"{device.name}-{self.snapshots}")
        self.snapshots += 1

    def counters(self, *names: str) -> dict[str, int]:
        now = self.pool.status().counters
        return {name: getattr(now, name) - getattr(self.before, name) for name in names}

    def exclusive_blocks(self) -> list[int]:
        """Return the blocks that the snapshots of each round hold alone; last, those of the devices."""
        status = self.pool.status()
        bytes_of = {each.name: each.exclusive_bytes for each in self.pool.usage()}
        rounds = [[f"{device.name}-{n}" for device in self.devices] for n in range(self.snapshots)] + [
            [device.name for device in self.devices]
        ]
        return [sum(bytes_of[name] for name in names) // status.block_size for names in rounds]


def random_rows(seed: int, count: int, devices: int) -> list[Request]:
    """Return requests of odd places and lengths, more often within the first megabyte."""
    rng = np.random.default_rng(seed)
    rows: list[Request] = []
    for _ in range(count):
        unit = int(rng.choice([1, 512, 4 * KIB, 64 * KIB]))
        end = int(rng.choice([MIB, 8 * MIB]))
        offset = int(rng.integers(0, end // unit)) * unit
        length = min(int(rng.integers(0, 300_000 // unit + 2)) * unit, end - offset)
        kind = int(rng.choice([WRITE, WRITE, WRITE, DISCARD]))
        rows.append((0, offset, length, kind, int(rng.integers(devices))))
    return rows


NAMES = ("blocks_provisioned", "blocks_copied", "blocks_overwritten", "copied_bytes", "zero_filled_bytes")
ENGINE_SIZES = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB]


@pytest.mark.parametrize("block_size", ENGINE_SIZES)
@pytest.mark.parametrize("fresh", [False, True], ids=["on-images", "fresh"])
def test_several_devices_do_what_the_model_says(block_size: int, fresh: bool, tmp_path: Path) -> None:
    replay = Replay(tmp_path / "pool", block_size, 3, fresh=fresh)
    with replay.pool, CowModel(ENGINE_SIZES, fresh=fresh) as model:
        for epoch in range(4):
            rows = random_rows(epoch, 120, 3)
            replay.take(rows)
            model.feed(array_of(rows))
            if epoch < 3:
                replay.snapshot()
                model.snapshot()
        result = next(each for each in model.results() if each.block_size == block_size)
        assert replay.counters(*NAMES) == {name: getattr(result, name) for name in NAMES}
        assert replay.exclusive_blocks() == model.epochs(block_size)["blocks_exclusive"].tolist()
        assert replay.counters("discarded_bytes")["discarded_bytes"] == result.blocks_discarded * block_size


PATTERNS: dict[str, Any] = {
    "scattered": lambda n: n * 7919 % 8192 * 16 * KIB,
    "in one place": lambda n: n * 7919 % 512 * 16 * KIB,
    "in sequence": lambda n: n * 16 * KIB,
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_metadata_come_near_what_the_engine_writes(pattern: str, tmp_path: Path) -> None:
    size, commit = 128 * MIB, 100
    place = PATTERNS[pattern]
    with (
        Pool.create(tmp_path / "pool", size="512M", block_size="4K") as pool,
        CowModel(["4K"], commit_seconds=0, device_size=size) as model,
    ):
        image = pool.create_device("image", size)
        image.write(0, bytes(size))
        container = image.snapshot("container")
        before = pool.status().counters.metadata_bytes
        for epoch in range(4):
            for n in range(epoch * 1000, epoch * 1000 + 1000):
                container.write(place(n), bytes(4096))
                model.feed(array_of([write(place(n), 4096)]))
                if n % commit == commit - 1:
                    container.flush()
                    model.feed(array_of([(0, 0, 0, FLUSH, 0)]))
            container.snapshot(f"snapshot-{epoch}")
            model.snapshot()
        written = pool.status().counters.metadata_bytes - before
        predicted = model.results()[0].metadata_bytes
    print(f"{pattern}: model {predicted}, engine {written} bytes of metadata: {predicted / written:.2f}")
    assert predicted == pytest.approx(written, rel=0.25)
