"""The kernel that runs as a process: what it tells, how it ends, and that nothing of it is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kernel.user_mode import Guest, GuestError, missing

pytestmark = pytest.mark.skipif(missing() != "", reason=f"needs {missing()}")


def words_of_processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # ended meanwhile
            continue
    return found


def test_a_command_has_its_status_output_and_directories(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    script = f"echo out; echo err >&2; pwd; echo kept >{tmp_path}/shared/f; echo gone >{tmp_path}/g; exit 3"
    with Guest(["sh", "-c", script], writable=[tmp_path / "shared"]) as guest:
        assert guest.wait(60) == 3
        assert sorted(guest.output().splitlines()) == sorted(["out", "err", os.getcwd()])
    assert (tmp_path / "shared/f").read_text() == "kept\n"
    assert not (tmp_path / "g").exists()
    assert not guest.directory.exists()


def test_a_panic_shows_the_console() -> None:
    panics = pytest.raises(GuestError, match=r"without an exit status[^$]*sysrq triggered crash")
    with Guest(["sh", "-c", "echo c >/proc/sysrq-trigger"]) as guest, panics:
        guest.wait(60)


def test_a_killed_guest_leaves_no_process_and_no_write(tmp_path: Path) -> None:
    """The guest's processes must not go on as processes of this machine (ptrace_shim.c)."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    mark = f"blocksnap-mark-{os.getpid()}"
    loop = f"echo ready | dd of=/dev/ubda conv=fsync; : {mark}; while :; do echo x >>{tmp_path}/escaped; done"
    with Guest(["sh", "-c", loop], disks=[disk]) as guest:
        deadline = time.monotonic() + 60
        while not disk.read_bytes().startswith(b"ready") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert disk.read_bytes().startswith(b"ready")
        guest.kill()
        left = [words for words in words_of_processes() if mark in words or str(guest.directory) in words]
        assert left == []
    assert not (tmp_path / "escaped").exists()


def test_the_guest_ends_with_the_process_that_started_it() -> None:
    program = (
        "import os; from tests.kernel.user_mode import Guest\n"
        "guest = Guest(['sh', '-c', 'echo up; sleep 100'], output=lambda piece: os.write(1, piece))\n"
        "print(guest.directory, flush=True); guest.wait()"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    directory = owner.stdout.readline().strip()
    assert owner.stdout.readline() == "up\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 20
    while any(directory in words for words in words_of_processes()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The next guest sweeps the directory of one that could not.
    with Guest(["true"]) as guest:
        assert not Path(directory).exists()
        assert guest.wait(60) == 0


SUITE = """
import pytest
pytestmark = pytest.mark.kernel

def test_good(): print("from inside")
@pytest.mark.parametrize("word", ["a b", "[ä]"])
def test_bad(word): assert open("/proc/sys/kernel/hostname").read() == word
@pytest.mark.skip(reason="not today")
def test_skipped(): pass
def test_deadly():
    open("/proc/sysrq-trigger", "w").write("b")
    while True: pass
def test_after(): pass
"""


def test_each_test_is_reported_as_its_own_also_when_the_guest_dies(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.kernel.plugin import *")
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-vrA", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for line in ("PASSED test_suite.py::test_good", "PASSED test_suite.py::test_after", "from inside"):
        assert line in done.stdout, done.stdout
    assert "FAILED test_suite.py::test_bad[a b]" in done.stdout
    assert "FAILED test_suite.py::test_deadly - the guest ended in this test" in done.stdout
    assert "'guest\\n'" in done.stdout
    assert "3 failed, 2 passed, 1 skipped" in done.stdout
