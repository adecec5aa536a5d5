"""Walks over the metadata of a pool that goes on: each sees one moment, and nothing stays held."""

import re
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from blocksnap import errors, metadata, mount
from blocksnap.pool import Pool
from tests.thin_tools import needs_thin_tools

BLOCK = 64 << 10
SIZE = 1 << 20

pytestmark = pytest.mark.usefixtures("nothing_left")


def make_devices(pool: Pool) -> None:
    base = pool.create_device("base", SIZE)
    base.write(0, b"a" * (4 * BLOCK))
    snap = base.snapshot("snap")
    snap.write(BLOCK, b"b")
    snap.write(8 * BLOCK, b"c" * BLOCK)


def change_everything(pool: Pool) -> None:
    pool.device("base").write(0, b"d" * SIZE)
    pool.device("snap").snapshot("third").write(0, b"e")
    pool.device("snap").delete()
    pool.commit()


def test_the_pool_goes_on_while_its_metadata_are_read(pool: Pool) -> None:
    make_devices(pool)
    before = pool.usage(), pool.delta("base", "snap").tolist(), pool.reverse_mappings().tolist()
    ids = [pool.device(name).id for name in ("base", "snap")]
    with pool._walk() as read:
        assert read.held
        change_everything(pool)
        exclusive = {one.id: one.exclusive_blocks for one in metadata.usage(read.path, held=True)}
        assert exclusive == {one.id: one.exclusive_bytes // BLOCK for one in before[0]}
        assert metadata.delta_ranges(read.path, *ids, held=True).tolist() == before[1]
        assert [one.id for one in metadata.devices(read.path, held=True)] == ids
    assert pool.status().held_root == 0
    assert {one.name for one in pool.usage()} == {"base", "third"}
    assert not pool.check().findings


def test_a_failing_walk_holds_nothing(pool: Pool) -> None:
    make_devices(pool)
    with pytest.raises(KeyboardInterrupt), pool._walk():
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="descriptor"):
        pool.dump(1 << 20)
    assert pool.status().held_root == 0


def test_what_a_killed_walk_held_is_released_by_the_next_open(pool: Pool, reopen: Callable[[], Pool]) -> None:
    make_devices(pool)
    with pytest.raises(errors.BlocksnapError), pool._walk():
        pool.abandon()
    with reopen() as again:
        assert again.status().held_root == 0
        assert len(again.usage()) == 2
        assert not again.check().findings


def test_a_metadata_snapshot_of_somebody_else_stays(pool: Pool, reopen: Callable[[], Pool]) -> None:
    make_devices(pool)
    pool._engine.hold_metadata()
    root = pool.status().held_root
    assert root != 0
    with pool._walk() as read:
        assert not read.held
    assert len(pool.usage()) == 2
    pool.close()
    with reopen() as again:
        assert again.status().held_root == root
        change_everything(again)
        assert {one.name for one in again.usage()} == {"base", "third"}
        again._engine.release_metadata()
        assert not again.check().findings


def told_by(command: list[str], image: Path) -> str:
    done = subprocess.run([*command, image], check=True, capture_output=True, text=True)
    # A metadata snapshot has no sizes: the tools say 0, we what the superblock says.
    return re.sub(r'nr_data_blocks="\d+"', 'nr_data_blocks="0"', done.stdout, count=1)


def written_by(write: Callable[[int], object], path: Path) -> str:
    with path.open("wb") as output:
        write(output.fileno())
    return re.sub(r'nr_data_blocks="\d+"', 'nr_data_blocks="0"', path.read_text(), count=1)


@needs_thin_tools
def test_dump_and_delta_of_a_held_state_are_those_of_the_tools(
    pool: Pool, engine: str, tmp_path: Path
) -> None:
    make_devices(pool)
    left, right = (pool.device(name).id for name in ("base", "snap"))
    with pool._walk() as read, ExitStack() as stack:
        change_everything(pool)
        image = tmp_path / "image"
        image.write_bytes(read.path.read_bytes())
        dump = written_by(lambda out: metadata.dump(image, out, held=True), tmp_path / "dump")
        delta = written_by(
            lambda out: metadata.write_delta(image, left, right, out, held=True), tmp_path / "delta"
        )
        if engine == "kernel":  # the tools take direct I/O, which the guest's tmpfs does not have
            image = Path(stack.enter_context(mount.LoopDevice.attach(image)).path)
        assert dump == told_by(["thin_dump", "-m"], image)
        assert delta == told_by(["thin_delta", "-m", "--thin1", str(left), "--thin2", str(right)], image)
