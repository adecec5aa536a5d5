"""Scrubbing pools: every mapped block is read once, and what cannot be read is told by device and offset."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blocksnap import mount, pool_client, pool_scrub
from blocksnap.pool import Pool
from blocksnap.pool_scrub import Unreadable
from tests.command_line import CommandLine, command_line

__all__ = ["command_line"]

BLOCK = 64 << 10
SIZE = 32 * BLOCK

needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK),
    reason="needs root and /dev/loop-control",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A pool with 10 blocks that two devices share, 2 of the snapshot alone, and 3 far behind."""
    path = tmp_path / "pool"
    with Pool.create(path, size="8M", block_size=BLOCK) as pool:
        base = pool.create_device("base", SIZE)
        base.write(0, b"x" * 10 * BLOCK)
        snap = base.snapshot("snap")
        snap.write(0, b"y" * 2 * BLOCK)
        pool.create_device("apart", SIZE).write(20 * BLOCK, b"z" * 3 * BLOCK)
    return path


def scrub(path: Path) -> pool_scrub.Scrub:
    return pool_scrub.scrub(lambda: Pool.open(path, read_only=True), path / "data")


# ---- what is read


def test_each_mapped_block_is_read_once(path: Path) -> None:
    found = scrub(path)
    assert found == pool_scrub.Scrub(15 * BLOCK, 0, ())


def test_mapped_blocks_are_the_union_of_all_devices(path: Path) -> None:
    with Pool.open(path, read_only=True) as pool:
        bits = np.unpackbits(pool.mapped_blocks(), bitorder="little")
        mapped = set()
        for run in pool.reverse_mappings():
            mapped |= set(range(int(run["data_begin"]), int(run["data_begin"] + run["length"])))
    assert set(np.flatnonzero(bits).tolist()) == mapped


def test_progress_ends_with_all_that_there_is(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pool_scrub.scrub(
        lambda: Pool.open(path, read_only=True),
        path / "data",
        lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (15 * BLOCK, 15 * BLOCK)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_empty_pool_has_nothing_to_read(tmp_path: Path) -> None:
    Pool.create(tmp_path / "pool", size="8M").close()
    assert scrub(tmp_path / "pool") == pool_scrub.Scrub(0, 0, ())


def test_more_blocks_than_a_window_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with Pool.create(path, size="5G", block_size="4K") as pool:
        device = pool.create_device("device", "8G")
        for offset in (0, 1 << 30, 5 << 30):
            device.write(offset, b"a" * 8192)
    assert scrub(path).read_bytes == 3 * 8192


# ---- real errors: a loop device whose file was cut off below it


@pytest.fixture
def cut(path: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The pool with its data on a loop device that cannot read behind the middle of data block 9."""
    data = tmp_path / "disk"
    (path / "data").rename(data)
    with mount.LoopDevice.attach(data) as loop:
        os.truncate(data, 9 * BLOCK + BLOCK // 2)
        yield {"metadata": path / "metadata", "data": Path(loop.path), "catalog": path / "catalog.db"}


@needs_loop
def test_unreadable_bytes_are_told_by_device_and_offset(cut: dict[str, Any]) -> None:
    found = pool_scrub.scrub(lambda: Pool.open(**cut, read_only=True), cut["data"])
    half = BLOCK // 2
    assert found.unreadable == (
        Unreadable("base", 9 * BLOCK + half, half, 9 * BLOCK + half),
        Unreadable("snap", 9 * BLOCK + half, half, 9 * BLOCK + half),
        Unreadable("snap", 0, 2 * BLOCK, 10 * BLOCK),
        Unreadable("apart", 20 * BLOCK, 3 * BLOCK, 12 * BLOCK),
    )
    assert found.unreadable_bytes == half + 5 * BLOCK
    assert found.read_bytes == 9 * BLOCK + half


@needs_loop
def test_unreadable_blocks_that_nobody_maps_any_more_have_no_device(cut: dict[str, Any]) -> None:
    def reopened() -> Iterator[Pool]:
        yield Pool.open(**cut, read_only=True)
        with Pool.open(**cut) as pool:
            pool.device("apart").delete()
        yield Pool.open(**cut, read_only=True)

    pools = reopened()
    found = pool_scrub.scrub(lambda: next(pools), cut["data"])
    assert found.unreadable[-1] == Unreadable(None, 0, 3 * BLOCK, 12 * BLOCK)


@needs_loop
def test_verb_exits_3_and_reports_as_json(cut: dict[str, Any], command_line: CommandLine) -> None:
    options = [word for name, part in cut.items() for word in (f"--{name}", part)]
    assert command_line("pool", "scrub", *options) == 3
    assert "apart" in command_line.out.decode()
    assert command_line("pool", "scrub", *options, "--json") == 3
    assert b'"device": "apart"' in command_line.out


# ---- pools in use


def test_verb_reads_a_pool_that_another_process_serves(path: Path, command_line: CommandLine) -> None:
    with pool_client.serve(path):
        found = command_line.json("pool", "scrub", path)
    assert found == {"read_bytes": 15 * BLOCK, "unreadable_bytes": 0, "unreadable": []}


def test_pool_is_open_for_others_while_its_data_are_read(path: Path) -> None:
    opened = []

    def open_meanwhile(done: int, total: int) -> None:  # noqa: ARG001 - the signature of a progress
        with Pool.open(path) as pool:
            opened.append(len(pool.devices()))

    pool_scrub.scrub(lambda: Pool.open(path, read_only=True), path / "data", open_meanwhile)
    assert opened
    assert set(opened) == {3}


def test_writes_go_on_while_a_served_pool_is_scrubbed(path: Path) -> None:
    with pool_client.serve(path) as client:
        stop = threading.Event()
        rounds: list[int] = []

        def write() -> None:
            device = client.device("base")
            while not stop.is_set():
                rounds.append(len(rounds) % 250 + 1)
                device.write(0, bytes([rounds[-1]]) * SIZE)
                device.discard(0, SIZE // 2)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(5):
                found = pool_scrub.scrub(lambda: connected(path), path / "data")
                assert found.unreadable == ()
        finally:
            stop.set()
            writer.join()
        assert client.device("base").read(SIZE // 2, SIZE // 2) == bytes([rounds[-1]]) * (SIZE // 2)
        assert client.check().findings == ()


def connected(path: Path) -> pool_client.PoolClient:
    client = pool_client.connect(path)
    assert client is not None
    return client
