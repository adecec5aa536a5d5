"""Deleting devices that somebody uses: refused with the name of the user, or put off until nobody does."""

from collections.abc import Callable

import pytest

from blocksnap import errors
from blocksnap.pool import Pool

SIZE = 1 << 20

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_device_in_use_is_deleted_when_it_is_not_any_more(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    snap = device.snapshot("snap")
    with device.hold() as handle:
        handle.write(0, b"x")
        with pytest.raises(errors.BusyError, match=r'"a" is in use \(.*open 1 times.*\)'):
            device.delete()
        device.delete(deferred=True)
        assert [each.name for each in pool.devices()] == ["snap"]
        assert snap.origin is None
        assert (pool.status().devices, pool.status().condemned_devices) == (2, 1)
        handle.write(0, b"still there")
        with pytest.raises(errors.DeviceNotFoundError, match="deleted"):
            device.read(0, 1)
        replacement = pool.create_device("a", 2 * SIZE)
        assert replacement.id != device.id
        assert replacement.read(0, 1) == b"\0"
    pool.create_device("b", SIZE)
    assert (pool.status().devices, pool.status().condemned_devices) == (3, 0)
    assert not pool.check().findings


def test_an_unused_device_is_deleted_at_once(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)
    device.write(0, b"x")
    device.delete(deferred=True)
    assert (pool.status().devices, pool.status().condemned_devices) == (0, 0)


def test_what_was_to_be_deleted_is_deleted_by_the_next_open(pool: Pool, reopen: Callable[[], Pool]) -> None:
    device = pool.create_device("a", SIZE)
    device.hold()
    device.delete(deferred=True)
    pool.create_device("a", SIZE).write(0, b"new")
    pool.commit()
    pool.abandon()
    with reopen() as again:
        assert [each.name for each in again.devices()] == ["a"]
        assert again.device("a").read(0, 3) == b"new"
        assert (again.status().devices, again.status().condemned_devices) == (1, 0)
        assert not again.check().findings


def test_a_transaction_that_fails_puts_nothing_off(pool: Pool) -> None:
    device = pool.create_device("a", SIZE)

    def fail() -> None:
        with pool.transaction():
            device.delete(deferred=True)
            pool.create_device("a", SIZE)
            raise KeyboardInterrupt

    with device.hold() as handle:
        with pytest.raises(KeyboardInterrupt):
            fail()
        handle.write(0, b"kept")
    assert pool.device("a").read(0, 4) == b"kept"
    assert pool.status().condemned_devices == 0
    device.delete()


def test_a_closed_pool_waits_for_no_device_that_is_to_be_deleted(
    pool: Pool, reopen: Callable[[], Pool]
) -> None:
    device = pool.create_device("a", SIZE)
    handle = device.hold()
    device.delete(deferred=True)
    with pytest.raises(errors.BusyError):
        pool.close()
    handle.close()
    pool.close()
    with reopen() as again:
        assert again.status().devices == 0
