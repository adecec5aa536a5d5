"""What a failed test leaves is cleared by force: the next one finds a clean kernel."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blocksnap.device_mapper import Control
from blocksnap.pool import Pool
from tests.kernel.devices import BLOCK, MIB, Disks, leftovers, linear, sweep
from tests.kernel.leftovers import clear
from tests.kernel.pools import make_thin, start_pool
from tests.pool_servers import loops_below, mounts_below

LEAVE = """
import os, signal, sys
from pathlib import Path
from blocksnap import mount
from blocksnap.file_system import make_file_system
from blocksnap.pool import Pool

pool = Pool.create(sys.argv[1], size="64M", engine="kernel")
node = pool.create_device("a", "32M").hold().path
make_file_system(Path(node), "ext4")
mount.mount(node, sys.argv[2], "ext4")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_mounted_device_of_a_dead_pool_goes_with_its_users(tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run([sys.executable, "-c", LEAVE, tmp_path / "pool", mounted], check=False)
    user = subprocess.Popen(["sleep", "1000"], cwd=mounted)
    told = clear(tmp_path, grace=0)
    assert user.wait() == -signal.SIGKILL
    for what in (f"mounted at {mounted}", "-pool", "/pool/metadata", "/pool/data"):
        assert [each for each in told if what in each], told
    assert (mounts_below(tmp_path), loops_below(tmp_path), clear(tmp_path, grace=0)) == ([], [], [])
    Pool.create(tmp_path / "next", size="64M", engine="kernel").close()


def test_a_device_that_is_open_goes_at_its_last_close(disks: Disks, tmp_path: Path) -> None:
    with Control.open() as control:
        thin = make_thin(control, start_pool(control, disks), 1)
        thin.suspend()
        opened = os.open(thin.path, os.O_RDWR)
        assert len(clear(tmp_path, grace=0)) == 4  # with two loop devices
        assert leftovers(control) == []
        with pytest.raises(OSError, match="Input/output"):
            os.pread(opened, BLOCK, 0)
        os.close(opened)
        assert thin.number not in [entry.number for entry in control.devices()]


def test_a_device_that_no_test_made_is_left_alone(control: Control, disks: Disks, tmp_path: Path) -> None:
    ours = linear(control, "ours", disks.attach("disk", MIB), MIB // 2)
    with Control.open(name_suffix="") as plain:
        other = linear(plain, "somebody-elses", disks.attach("other", MIB), MIB // 2)
        try:
            assert sweep(control) == [ours.name]
            assert clear(tmp_path / "elsewhere", grace=0) == []
            assert other.info().live
        finally:
            other.remove()
