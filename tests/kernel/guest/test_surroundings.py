"""What happens around a pool under load: the clock jumps, the file system below becomes read-only."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from blocksnap import metadata, mount
from blocksnap.device_mapper import Control
from blocksnap.errors import BlocksnapError
from blocksnap.pool import Pool
from blocksnap.space_policy import ExtendPolicy
from blocksnap.user_pool import UserPool
from tests.file_systems import fresh_file_system, unmount_when_free
from tests.kernel.devices import BLOCK, MIB, sweep
from tests.kernel.pool_load import Load
from tests.kernel.pools import let_go

BLOCKS = 20
DAY = 86400

both = pytest.mark.parametrize("engine", ["user", "kernel"])


@contextmanager
def clock_put_back() -> Iterator[None]:
    begun, before = time.monotonic(), time.clock_gettime(time.CLOCK_REALTIME)
    try:
        yield
    finally:
        time.clock_settime(time.CLOCK_REALTIME, before + time.monotonic() - begun)


def make(path: Path, engine: str) -> None:
    with Pool.create(path, size="16M", engine=engine) as pool:
        base = pool.create_device("base", "4M")
        base.write(0, b"x" * BLOCKS * BLOCK)
        base.snapshot("snap")


def assert_recovered(path: Path, engine: str) -> None:
    with Pool.open(path, engine=engine) as pool:
        assert pool.device("snap").read(0, BLOCKS * BLOCK) == b"x" * BLOCKS * BLOCK
        content = pool.device("base").read(0, BLOCKS * BLOCK)
        assert {content[at : at + 512] for at in range(0, len(content), 512)} <= {b"x" * 512, b"y" * 512}
        pool.create_device("later", MIB).delete()
        assert {info.id for info in pool._engine.devices()} == {device.id for device in pool.devices()}
    assert not metadata.check(path / "metadata").fatal


@both
def test_clock_that_jumps_disturbs_nothing(path: Path, engine: str) -> None:
    make(path, engine)
    policy = ExtendPolicy(0.8, step="8M", maximum="64M")
    with clock_put_back(), Pool.open(path, engine=engine, auto_extend=policy) as pool:
        load = Load(pool, BLOCKS)
        for number, jump in enumerate((DAY, -2 * DAY, 400 * DAY, -10000 * DAY)):
            time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) + jump)
            load.goes_on()
            device = pool.create_device(f"d{number}", "8M")
            device.write(0, b"d" * 8 * MIB)  # waits until the pool has grown
            device.snapshot(f"s{number}")
            device.delete()
            assert pool.device(f"s{number}").read(0, 8 * MIB) == b"d" * 8 * MIB
        assert load.end() is None
    assert_recovered(path, engine)


def opened(path: Path, engine: str) -> AbstractContextManager[Pool]:
    return let_go(Pool.open(path, engine=engine))


def repair_file_system(disk: Path) -> None:
    (source,) = (entry.source for entry in mount.mount_table() if entry.target == str(disk))
    unmount_when_free(disk)
    assert subprocess.run(["e2fsck", "-fy", source], check=False).returncode == 1
    mount.mount(source, disk, "ext4")


def break_file_system(disk: Path) -> None:
    """Make it meet an error, after which it is read-only."""
    (entry,) = (entry for entry in mount.mount_table() if entry.target == str(disk))
    subprocess.run(["mount", "-o", "remount,errors=remount-ro", disk], check=True)
    Path("/sys/fs/ext4", Path(entry.source).name, "trigger_fs_error").write_text("on purpose")


@both
def test_file_system_that_becomes_read_only_is_an_error_and_loses_nothing(
    control: Control, tmp_path: Path, engine: str
) -> None:
    with fresh_file_system(tmp_path, "ext4", 64 * MIB) as disk:
        path = disk / "pool"
        make(path, engine)
        with opened(path, engine) as pool:
            load = Load(pool, BLOCKS)
            load.goes_on()
            break_file_system(disk)
            with pytest.raises(BlocksnapError) as refused:
                pool.create_device("refused", MIB)
            assert "\n" not in str(refused.value)
            assert "\n" not in str(load.ends())
            assert pool.device("snap").read(0, BLOCKS * BLOCK) == b"x" * BLOCKS * BLOCK
        sweep(control)
        repair_file_system(disk)
        if metadata.check(path / "metadata").needs_check:
            UserPool.clear_needs_check(path / "metadata")
        assert_recovered(path, engine)
