"""What happens under a live pool that its engine did not do: devices that fail, fill, are renamed or removed.

Every call ends, with an error of one line at most; once the device is well again the pool opens and is sound.
"""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blocksnap import metadata
from blocksnap.device_mapper import Control, Device, LinearTarget, OtherTarget
from blocksnap.errors import BlocksnapError, DeviceIOError, NoSpaceError, PoolFormatError
from blocksnap.kernel_device import KernelDevice
from blocksnap.mount import loop_devices, mount, unmount
from blocksnap.pool import Pool
from blocksnap.thin_device import ThinDevice
from blocksnap.user_pool import UserPool
from tests.kernel.devices import BLOCK, MIB, Disks, leftovers, linear
from tests.thin_tools import needs_thin_tools, thin_tool

METADATA, DATA, SIZE = 4 * MIB, 16 * MIB, 4 * MIB
KEPT = b"kept" * 1000


class Below:
    """The two devices of a pool, which a test can break and mend."""

    def __init__(self, control: Control, disks: Disks, folder: Path) -> None:
        self._disks = disks
        self.metadata = linear(control, "metadata", disks.attach("metadata", METADATA), METADATA)
        self.data = linear(control, "data", disks.attach("data", DATA), DATA)
        self._folder = folder
        self._pools: list[Pool] = []

    @property
    def where(self) -> dict[str, Any]:
        paths = {"metadata": self.metadata.path, "data": self.data.path}
        return paths | {"catalog": self._folder / "catalog.db"}

    def create(self, size: int = DATA) -> Pool:
        pool = Pool.create(**self.where, size=size, engine="kernel")
        pool.create_device("kept", SIZE).write(0, KEPT)
        pool.device("kept").flush()
        pool.create_device("used", SIZE).write(0, KEPT)
        self._pools.append(pool)
        return pool

    def break_(self, device: Device, kind: str = "error", options: str = "") -> None:
        (before,) = device.table()
        target = OtherTarget(before.length, kind, options and f"{device.dependencies()[0]} 0 {options}")
        device.replace([target], noflush=True, skip_lockfs=True)

    def mend(self, device: Device) -> None:
        number = self._disks.attach(device.name.split("-")[0])
        (broken,) = device.table()
        device.replace([LinearTarget(broken.length, number)], noflush=True, skip_lockfs=True)

    def mend_all(self) -> None:
        """Leave no pool of a failed test in the way of the next."""
        for device in (self.metadata, self.data):
            self.mend(device)
        for pool in self._pools:
            let_go(pool)

    def assert_well(self) -> None:
        """Assert that the pool opens in either engine, is sound and holds what it held.

        The kernel loses the blocks that it took for writes which failed then: leaks are no damage.
        """
        if metadata.check(self.metadata.path).needs_check:
            UserPool.clear_needs_check(self.metadata.path)
        for engine in ("kernel", "user"):
            with Pool.open(**self.where, engine=engine) as pool:
                assert pool.device("kept").read(0, len(KEPT)) == KEPT
                pool.create_device(f"after {engine}", SIZE).write(0, b"x")
        report = metadata.check(self.metadata.path)
        assert report.fatal == 0, report.findings
        thin_tool("thin_check", "-q", self.metadata.path)


@pytest.fixture
def below(control: Control, disks: Disks, tmp_path: Path) -> Iterator[Below]:
    made = Below(control, disks, tmp_path)
    yield made
    made.mend_all()
    names = {device.name for device in leftovers(control)}
    assert names <= {made.metadata.name, made.data.name}, "the pool left devices"


def outcome(work: Callable[[], object], seconds: float = 60) -> BlocksnapError | None:
    """Do something that may fail but must end, and return its error, which has one line."""
    errors: list[BlocksnapError | None] = []

    def run() -> None:
        try:
            work()
            errors.append(None)
        except BlocksnapError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    (error,) = errors
    assert error is None or "\n" not in str(error), error
    return error


def use(pool: Pool) -> list[BlocksnapError]:
    """Do some of everything with a pool but change what "kept" holds; return the errors."""

    def write(name: str, offset: int) -> None:
        pool.device(name).write(offset, b"more" * 20000)
        pool.device(name).flush()

    works: list[Callable[[], object]] = [
        lambda: pool.device("kept").read(0, SIZE),
        lambda: write("used", MIB),
        lambda: pool.device("used").snapshot("snapshot"),
        lambda: write("used", 0),
        lambda: pool.device("kept").snapshot("another"),
        lambda: pool.device("used").discard(2 * MIB, MIB),
        lambda: pool.create_device("new", SIZE),
        lambda: write("new", 0),
        lambda: pool.device("used").resize(2 * SIZE),
        lambda: pool.device("snapshot").delete(),
        lambda: pool.device("used").delete(),
        pool.commit,
        pool.usage,
        pool.status,
    ]
    return [error for work in works if (error := outcome(work)) is not None]


def let_go(pool: Pool) -> None:
    """Close a pool whose devices may be broken, or leave it to the next who opens it."""
    outcome(pool.close)
    if not pool.closed:
        pool.abandon()


# ---- devices that fail


@needs_thin_tools
@pytest.mark.parametrize("part", ["metadata", "data"])
def test_a_device_that_vanishes_under_a_pool_makes_errors_of_one_line(below: Below, part: str) -> None:
    device: Device = getattr(below, part)
    pool = below.create()
    below.break_(device)
    assert use(pool)
    let_go(pool)
    below.mend(device)
    below.assert_well()


@needs_thin_tools
@pytest.mark.parametrize("part", ["metadata", "data"])
def test_what_was_flushed_between_errors_that_come_and_go_is_there(below: Below, part: str) -> None:
    device: Device = getattr(below, part)
    pool = below.create()
    below.break_(device, "flakey", "1 1")
    flushed: list[tuple[int, str, int]] = []
    errors, begun = 0, time.monotonic()
    for number in range(10000):
        if (errors > 3 and len(flushed) > 30) or time.monotonic() > begun + 30:
            break
        name, offset = f"device {number // 100}", number % 100 * 5000

        def work(number: int = number, name: str = name, offset: int = offset) -> None:
            target = pool.create_device(name, SIZE) if number % 100 == 0 else pool.device(name)
            target.write(offset, b"%04d" % number * 1000)
            target.flush()

        if outcome(work) is None:
            flushed.append((number, name, offset))
        else:
            errors += 1
            time.sleep(0.1)
    assert len(flushed) > 30
    assert errors > 3
    let_go(pool)
    below.mend(device)
    below.assert_well()
    with Pool.open(**below.where) as pool:
        for number, name, offset in flushed:
            assert pool.device(name).read(offset, 4000) == b"%04d" % number * 1000


def test_a_pool_filled_by_many_writers_at_once_refuses_each_and_goes_on_when_extended(below: Below) -> None:
    pool = below.create(8 * MIB)
    devices = [pool.create_device(f"device {number}", SIZE) for number in range(4)]

    def fill(device: ThinDevice) -> BlocksnapError | None:
        return outcome(lambda: [device.write(block, b"x" * BLOCK) for block in range(0, SIZE, BLOCK)])

    with ThreadPoolExecutor(len(devices)) as threads:
        errors = list(threads.map(fill, devices))
    assert any(errors)
    assert all(error is None or isinstance(error, NoSpaceError) for error in errors), errors
    pool.extend(size=DATA)
    for device in devices[2:]:  # which may have got most of it
        device.delete()
    with ThreadPoolExecutor(len(devices)) as threads:
        assert not any(threads.map(fill, [*devices[:2], pool.device("kept")]))
    pool.close()


def test_a_snapshot_is_given_up_when_the_file_system_cannot_be_frozen_in_time(
    below: Below, tmp_path: Path
) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    pool = below.create()
    device = pool.create_device("mounted", 2 * SIZE)
    with device.hold() as handle:
        assert isinstance(handle, KernelDevice)
        subprocess.run(["mkfs.ext4", "-q", handle.path], check=True)
        mount(handle.path, target, "ext4")
        try:
            (target / "file").write_text("not on disk yet")
            with below.data.suspended(), handle.freezing_within(0.5):
                error = outcome(lambda: device.snapshot("in vain"))
            assert isinstance(error, DeviceIOError)
            assert error.errno == errno.ETIMEDOUT
            (target / "another").write_text("it goes on")
            os.sync()
            device.snapshot("in time")
        finally:
            unmount(target)
    assert {"mounted", "in time"} <= {each.name for each in pool.devices()}
    assert "in vain" not in {each.name for each in pool.devices()}
    pool.close()
    below.assert_well()


# ---- what others do to the devices of a pool


def test_a_pool_goes_on_under_other_names(control: Control, below: Below) -> None:
    pool = below.create()
    for number, device in enumerate(leftovers(control)):
        if device.name not in (below.metadata.name, below.data.name):
            device.rename(f"renamed-{number}")
    assert use(pool) == []
    pool.close()
    below.assert_well()


@needs_thin_tools
def test_a_thin_device_that_somebody_took_out_of_the_kernel_is_an_error_until_the_pool_is_opened_again(
    control: Control, below: Below
) -> None:
    pool = below.create()
    device_id = pool.device("used").id
    (active,) = [device for device in leftovers(control) if device.uuid.endswith(f"-{device_id}")]
    active.replace([OtherTarget(SIZE, "error", "")])  # what dmsetup remove --force does
    error = outcome(lambda: pool.device("used").write(0, b"x"))
    assert isinstance(error, DeviceIOError)
    assert '"used"' in str(error) or f"thin device {device_id}" in str(error)
    let_go(pool)
    below.assert_well()


def test_a_loop_device_that_somebody_detaches_stays_until_the_pool_is_closed(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", size=DATA, engine="kernel") as pool:
        pool.create_device("kept", SIZE).write(0, KEPT)
        loops = loop_devices(tmp_path)
        assert len(loops) == 2
        for loop in loops:
            subprocess.run(["losetup", "--detach", loop.path], check=True)
        assert pool.device("kept").read(0, len(KEPT)) == KEPT
        pool.device("kept").snapshot("snapshot").write(0, b"x")
    assert loop_devices(tmp_path) == []
    with Pool.open(tmp_path / "pool", engine="kernel") as pool:
        assert pool.device("kept").read(0, len(KEPT)) == KEPT


def test_a_transaction_id_that_nobody_can_explain_is_refused_with_both(
    control: Control, below: Below
) -> None:
    pool = below.create()
    own = pool.status().transaction_id
    (device,) = [device for device in leftovers(control) if device.uuid.endswith("-pool")]
    device.set_transaction_id(own, own + 7)
    let_go(pool)
    for engine in ("kernel", "user"):
        with pytest.raises(
            PoolFormatError, match=f"describes transaction {own}, but the pool is at {own + 7}"
        ):
            Pool.open(**below.where, engine=engine)


def test_a_thin_device_that_somebody_made_is_refused_with_its_id(control: Control, below: Below) -> None:
    pool = below.create()
    (device,) = [device for device in leftovers(control) if device.uuid.endswith("-pool")]
    device.create_thin(77)
    let_go(pool)
    with pytest.raises(PoolFormatError, match="77"):
        Pool.open(**below.where, engine="kernel")
    Pool.open(**below.where, engine="kernel", adopt=True).close()
    below.assert_well()
