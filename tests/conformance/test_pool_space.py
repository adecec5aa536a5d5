"""Pools that grow by a policy, and what they tell of their space."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blocksnap import errors
from blocksnap.pool import Pool
from blocksnap.space_policy import (
    ExtendFailed,
    ExtendPolicy,
    PoolEvent,
    PoolExtended,
    PoolPart,
    SpaceLow,
    SpaceOut,
)

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("nothing_left")


class Events(list[PoolEvent]):
    """What a pool told, and waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self._told = threading.Condition()

    def __call__(self, event: PoolEvent) -> None:
        with self._told:
            self.append(event)
            self._told.notify_all()

    def await_kind(self, kind: type[PoolEvent], part: PoolPart = PoolPart.DATA) -> PoolEvent:
        def found() -> PoolEvent | None:
            kinds = (each for each in self if isinstance(each, kind))
            return next((each for each in kinds if getattr(each, "part", part) is part), None)

        with self._told:
            event = self._told.wait_for(found, 60)
        assert event is not None, f"no {kind.__name__} of {part} in {list(self)}"
        return event


@pytest.fixture
def make(tmp_path: Path, engine: str) -> Callable[..., Pool]:
    def create(policy: ExtendPolicy | None, events: Events, metadata_size: str | None = None) -> Pool:
        return Pool.create(
            tmp_path / "pool",
            size="8M",
            metadata_size=metadata_size,
            engine=engine,
            auto_extend=policy,
            on_event=events,
        )

    return create


def test_a_writer_does_not_notice_that_the_pool_grows(make: Callable[..., Pool]) -> None:
    events = Events()
    with make(ExtendPolicy(0.5, "2M", "32M"), events) as pool:
        device = pool.create_device("a", "24M")
        for number in range(24):
            device.write(number * MIB, bytes([number]) * MIB)
        device.flush()
        for number in range(24):
            assert device.read(number * MIB, MIB) == bytes([number]) * MIB
        low, extended = events.await_kind(SpaceLow), events.await_kind(PoolExtended)
        assert isinstance(low, SpaceLow)
        assert isinstance(extended, PoolExtended)
        assert low.free_bytes <= 4 * MIB
        assert (extended.before, low.size) == (8 * MIB, 8 * MIB)
        assert 24 * MIB <= pool.status().data_bytes <= 32 * MIB
        assert not pool.check().findings


def test_a_writer_without_a_mark_waits_until_the_pool_has_grown(make: Callable[..., Pool]) -> None:
    with make(ExtendPolicy(threshold=0, step="1M"), Events()) as pool:
        device = pool.create_device("a", "12M")
        device.write(0, b"x" * (12 * MIB))
        device.flush()
        assert pool.status().data_bytes >= 12 * MIB


def test_a_pool_grows_within_a_transaction(make: Callable[..., Pool]) -> None:
    with make(ExtendPolicy(step="4M"), Events()) as pool:
        with pool.transaction():
            pool.create_device("a", "12M").write(0, b"x" * (12 * MIB))
        assert pool.device("a").read(12 * MIB - 1, 1) == b"x"


def test_at_its_maximum_the_pool_fails_writes_and_says_why(make: Callable[..., Pool]) -> None:
    events = Events()
    with make(ExtendPolicy(0.5, "2M", "10M"), events) as pool:
        device = pool.create_device("a", "24M")
        with pytest.raises(errors.NoSpaceError):
            device.write(0, b"x" * (24 * MIB))
        failed = events.await_kind(ExtendFailed)
        assert isinstance(failed, ExtendFailed)
        assert "data of pool" in str(failed.error)
        assert "10M, the most that they may" in str(failed.error)
        events.await_kind(SpaceOut)
        assert pool.status().data_bytes == 10 * MIB
        pool.extend(size="32M")
        device.write(0, b"y" * (24 * MIB))
        assert device.read(24 * MIB - 1, 1) == b"y"


@pytest.mark.parametrize("preallocate", [False, True])
def test_what_a_pool_grows_by_is_reserved(make: Callable[..., Pool], preallocate: bool) -> None:
    with make(ExtendPolicy(0.5, "8M", preallocate=preallocate), Events()) as pool:
        pool.create_device("a", "24M").write(0, b"x" * (9 * MIB))
        size = pool.status().data_bytes
        assert size >= 16 * MIB
        assert os.stat(pool.path / "data").st_blocks * 512 >= size - 8 * MIB


def test_metadata_grow_before_they_are_full(make: Callable[..., Pool]) -> None:
    events = Events()
    with make(ExtendPolicy(), events, "512K") as pool:
        for number in range(100):
            pool.create_device(f"d{number}", MIB).write(0, b"x")
        assert events.await_kind(PoolExtended, PoolPart.METADATA)
        assert pool.status().metadata_bytes > 512 << 10
        assert not pool.check().findings


def test_without_a_policy_events_tell_and_the_writer_fails_at_once(make: Callable[..., Pool]) -> None:
    events = Events()
    with make(None, events) as pool:
        device = pool.create_device("a", "24M")
        with pytest.raises(errors.NoSpaceError):
            device.write(0, b"x" * (24 * MIB))
        assert events.await_kind(SpaceLow)
        assert events.await_kind(SpaceOut)
        assert pool.status().data_bytes == 8 * MIB
    assert not any(isinstance(each, PoolExtended) for each in events)


def test_a_receiver_that_fails_does_not_keep_the_pool_from_growing(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", told.append)

    def fail(event: PoolEvent) -> None:
        raise RuntimeError(str(event))

    with Pool.create(
        tmp_path / "pool", size="8M", engine=engine, auto_extend=ExtendPolicy(step="8M"), on_event=fail
    ) as pool:
        pool.create_device("a", "24M").write(0, b"x" * (16 * MIB))
    assert told


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"threshold": "many"}, "threshold"),
        ({"step": 0}, "a step of 0 bytes"),
        ({"step": "x"}, "step"),
        ({"maximum": -1}, "maximum"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(errors.ArgumentError, match=complaint):
        ExtendPolicy(**options)  # type: ignore[arg-type]
