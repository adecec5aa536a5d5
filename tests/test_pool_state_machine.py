"""Random operations on a pool against a plain model; afterwards every checker and printer must agree."""

import shutil
import tempfile
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from blocksnap.device_record import SECTOR_SIZE
from blocksnap.pool import Pool
from tests.thin_tools import assert_sound, needs_thin_tools, our_text, thin_tool

MAX_SIZE = 2 << 20
MAX_DEVICES = 6
STEPS, RUNS = 60, 20

steps_done: Counter[int] = Counter()

picks = st.integers(0, 1 << 16)
seeds = st.integers(0, 1 << 16)
sizes = st.integers(1, MAX_SIZE // SECTOR_SIZE).map(lambda sectors: sectors * SECTOR_SIZE)
# Fractions, so that they mean something for a device of any size; every tenth or so is aligned to something.
places = st.floats(0, 1)
grains = st.sampled_from([1, 1, 512, 4096, 65536])
lengths = st.one_of(
    st.integers(0, 9000), st.sampled_from([512, 4096, 65536, 131072]), st.integers(0, MAX_SIZE)
)


def content(seed: int, length: int) -> bytes:
    return np.random.default_rng(seed).bytes(length)


class PoolMachine(RuleBasedStateMachine):
    """One pool and its model: the content of each device by name."""

    block_size = 65536

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="blocksnap-machine-"))
        self.path = self.folder / "pool"
        self.model: dict[str, bytearray] = {}
        self.named = 0
        self.pool: Pool | None = None

    @property
    def open_pool(self) -> Pool:
        assert self.pool is not None
        steps_done[self.block_size] += 1
        return self.pool

    @initialize()
    def make(self) -> None:
        self.pool = Pool.create(self.path, size="16M", block_size=self.block_size)

    def pick(self, number: int) -> str:
        return sorted(self.model)[number % len(self.model)]

    def place(self, name: str, place: float, grain: int, length: int) -> tuple[int, int]:
        size = len(self.model[name])
        offset = int(place * size) // grain * grain
        length = min(length, size - offset)
        return offset, length // grain * grain

    def new_name(self) -> str:
        self.named += 1
        return f"device {self.named}"

    def has_devices(self) -> bool:
        return bool(self.model)

    def has_room(self) -> bool:
        return len(self.model) < MAX_DEVICES

    @precondition(has_room)
    @rule(size=sizes)
    def create(self, size: int) -> None:
        name = self.new_name()
        self.open_pool.create_device(name, size)
        self.model[name] = bytearray(size)

    @precondition(lambda self: self.has_devices() and self.has_room())
    @rule(number=picks)
    def snapshot(self, number: int) -> None:
        origin, name = self.pick(number), self.new_name()
        self.open_pool.device(origin).snapshot(name)
        self.model[name] = bytearray(self.model[origin])

    @precondition(has_devices)
    @rule(number=picks, place=places, grain=grains, length=lengths, seed=seeds)
    def write(self, number: int, place: float, grain: int, length: int, seed: int) -> None:
        name = self.pick(number)
        offset, length = self.place(name, place, grain, length)
        written = content(seed, length)
        assert self.open_pool.device(name).write(offset, written) == length
        self.model[name][offset : offset + length] = written

    @precondition(has_devices)
    @rule(number=picks, place=places, grain=grains, length=lengths)
    def read(self, number: int, place: float, grain: int, length: int) -> None:
        name = self.pick(number)
        offset, length = self.place(name, place, grain, length)
        assert self.open_pool.device(name).read(offset, length) == self.model[name][offset : offset + length]

    @precondition(has_devices)
    @rule(number=picks, place=places, grain=grains, length=lengths)
    def discard(self, number: int, place: float, grain: int, length: int) -> None:
        name = self.pick(number)
        offset, length = self.place(name, place, grain, length)
        self.open_pool.device(name).discard(offset, length)
        self.model[name][offset : offset + length] = bytes(length)

    @precondition(has_devices)
    @rule(number=picks)
    def delete(self, number: int) -> None:
        name = self.pick(number)
        self.open_pool.device(name).delete()
        del self.model[name]

    @precondition(has_devices)
    @rule(number=picks, size=sizes)
    def resize(self, number: int, size: int) -> None:
        name = self.pick(number)
        self.open_pool.device(name).resize(size)
        self.model[name] = self.model[name][:size].ljust(size, b"\0")

    @precondition(lambda self: self.has_devices() and self.has_room())
    @rule(number=picks, size=sizes, fails=st.booleans())
    def transact(self, number: int, size: int, fails: bool) -> None:
        victim, name = self.pick(number), self.new_name()
        pool = self.open_pool
        try:
            with pool.transaction():
                pool.device(victim).snapshot(name)
                pool.device(victim).delete()
                made = pool.create_device(victim, size)
                made.write(0, b"new content")
                if fails:
                    raise InterruptedError
        except InterruptedError:
            return
        self.model[name] = self.model[victim]
        self.model[victim] = bytearray(b"new content".ljust(size, b"\0"))

    @rule()
    def commit(self) -> None:
        self.open_pool.commit()

    @rule(direct_io=st.booleans())
    def reopen(self, direct_io: bool) -> None:
        self.open_pool.close()
        self.pool = Pool.open(self.path, direct_io=direct_io)

    @rule()
    def crash_after_commit(self) -> None:
        self.open_pool.commit()
        self.open_pool.abandon()
        self.pool = Pool.open(self.path)

    def teardown(self) -> None:
        try:
            if self.pool is not None:
                self.compare(self.pool)
                self.compare_with_the_tools()
        finally:
            if self.pool is not None and not self.pool.closed:
                self.pool.abandon()
            shutil.rmtree(self.folder)

    def compare(self, pool: Pool) -> None:
        assert {device.name: device.size for device in pool.devices()} == {
            name: len(expected) for name, expected in self.model.items()
        }
        for name, expected in self.model.items():
            assert pool.device(name).read(0, len(expected)) == expected
        self.ids = {device.name: device.id for device in pool.devices()}
        pool.close()

    def compare_with_the_tools(self) -> None:
        metadata = self.path / "metadata"
        assert_sound(metadata)
        assert our_text(metadata) == thin_tool("thin_dump", metadata)
        for left, right in permutations(sorted(self.ids.values()), 2):
            theirs = thin_tool("thin_delta", "--thin1", left, "--thin2", right, metadata)
            assert our_text(metadata, left, right) == theirs


@needs_thin_tools
@pytest.mark.parametrize("block_size", [4096, 65536, 192 << 10])
def test_a_pool_does_what_the_model_does(block_size: int) -> None:
    machine: Any = type("Machine", (PoolMachine,), {"block_size": block_size})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert steps_done[block_size] >= 700
