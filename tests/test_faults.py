"""What can befall a process that runs a pool in the user engine: limits, full file systems, rivals.

After each: an error at the caller, in one line, nothing wrong to be read, clean recovery, nothing left.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import errors, mount, pool_client
from blocksnap.pool import Pool
from tests.file_systems import fresh_file_system
from tests.pool_servers import wait_until, wait_until_free
from tests.thin_tools import assert_sound, needs_thin_tools, thin_tool

MIB = 1 << 20
LETTERS = b"abcdefgh"
START = "import os, resource, sys\nfrom blocksnap import errors\nfrom blocksnap.pool import Pool\n"

pytestmark = needs_thin_tools


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A pool with eight full MiB in "base", of which "snap" is a snapshot."""
    make(tmp_path / "pool")
    return tmp_path / "pool"


def make(path: Path) -> None:
    with Pool.create(path, size="64M") as pool:
        base = pool.create_device("base", "32M")
        for place, letter in enumerate(LETTERS):
            base.write(place * MIB, bytes([letter]) * MIB)
        base.snapshot("snap")


def assert_recovered(path: Path, *possible: int) -> None:
    """Assert that the pool is sound and works, with "snap" as it was, "base" as it was or as possible."""
    with Pool.open(path) as pool:
        for place, letter in enumerate(LETTERS):
            assert pool.device("snap").read(place * MIB, MIB) == bytes([letter]) * MIB
            content = pool.device("base").read(place * MIB, MIB)
            sectors = {content[at : at + 512] for at in range(0, MIB, 512)}
            assert sectors <= {bytes([byte]) * 512 for byte in (letter, *possible)}
        pool.device("base").write(0, b"a")
        pool.device("base").flush()
        pool.create_device("later", "1M").delete()
        assert {info.id for info in pool._engine.devices()} == {device.id for device in pool.devices()}
    assert_sound(path / "metadata")


def run(program: str, *words: object) -> str:
    """Run a program in a process of its own."""
    command = [sys.executable, "-c", START + program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- full, read-only and failing file systems


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with fresh_file_system(tmp_path, "ext4", 40 * MIB) as mounted:
        yield mounted
    assert [loop for loop in mount.loop_devices() if str(tmp_path) in loop.backing_path] == []


def fill(file: Path) -> None:
    """Take all the room of a file system."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    for length in (MIB, 4096, 1):
        try:
            while os.write(descriptor, b"f" * length):
                pass
        except OSError:
            os.fsync(descriptor)
    os.close(descriptor)


def overwrite(pool: Pool) -> None:
    for place in range(len(LETTERS)):
        pool.device("base").write(place * MIB, b"z" * MIB)
        pool.device("base").flush()


@pytest.mark.parametrize("direct_io", [False, True])
def test_full_disk_is_no_space_and_room_mends_it(disk: Path, *, direct_io: bool) -> None:
    make(disk / "pool")
    with Pool.open(disk / "pool", direct_io=direct_io) as pool:
        fill(disk / "filler")
        with pytest.raises(errors.NoSpaceError) as full:
            overwrite(pool)
        assert "\n" not in str(full.value)
        for place, letter in enumerate(LETTERS):
            assert pool.device("snap").read(place * MIB, MIB) == bytes([letter]) * MIB
        (disk / "filler").unlink()
    assert_recovered(disk / "pool", ord("z"))


def test_pool_on_a_full_disk_is_not_created_and_leaves_nothing(disk: Path) -> None:
    fill(disk / "filler")
    with pytest.raises(errors.NoSpaceError):
        Pool.create(disk / "pool", size="64M")
    assert not (disk / "pool").exists()


def create_many(pool: Pool, made: list[str]) -> None:
    for number in range(1000):
        made.append(pool.create_device(f"d{number:03}", "1M", labels={"long": "x" * 2000}).name)


def test_transaction_on_a_full_disk_is_done_or_not(disk: Path) -> None:
    make(disk / "pool")
    made = ["base", "snap"]
    with Pool.open(disk / "pool") as pool:
        fill(disk / "filler")
        with pytest.raises(errors.BlocksnapError) as full:
            create_many(pool, made)
        assert "\n" not in str(full.value)
        assert [device.name for device in pool.devices()] == made
        (disk / "filler").unlink()
    with Pool.open(disk / "pool") as pool:
        assert [device.name for device in pool.devices()] == made
    assert_recovered(disk / "pool")


def test_pool_on_a_read_only_file_system_is_read_and_not_written(disk: Path) -> None:
    make(disk / "pool")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(errors.BlocksnapError, match="Read-only file system") as refused:
        Pool.open(disk / "pool")
    assert "\n" not in str(refused.value)
    with Pool.open(disk / "pool", read_only=True) as pool:
        assert pool.device("base").read(0, MIB) == b"a" * MIB
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert_recovered(disk / "pool")


# ---- limits of a process


def test_limit_of_file_size_is_an_error_of_the_write(path: Path) -> None:
    """The data file of the pool is larger than what its process may write."""
    program = """
pool = Pool.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (12 << 20, 12 << 20))
base = pool.device("base")
try:
    for place in range(32):
        base.write(place << 20, b"z" * (1 << 20))
        base.flush()
except errors.DeviceIOError as error:
    print(error.strerror)
assert pool.device("snap").read(0, 1 << 20) == b"a" * (1 << 20)
try:
    pool.close()
except errors.BlocksnapError:
    pool.abandon()
"""
    assert run(program, path).strip().endswith("File too large")
    assert_recovered(path, ord("z"))


WORKS = {
    "changes": """
    with Pool.open(path) as pool:
        base = pool.device("base")
        base.write(0, b"a" * 100000)
        base.snapshot("new")
        assert base.read(0, 100000) == b"a" * 100000
        pool.usage()
        pool.device("new").delete()
""",
    "creation": """
    try:
        Pool.create(path + ".new", size="1M").close()
    finally:  # nothing, or a whole pool that could not be opened
        if os.path.exists(path + ".new"):
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
            Pool.open(path + ".new").close()
            shutil.rmtree(path + ".new")
""",
    "repair": """
    pool_repair.repair(path)
    os.unlink(path + "/metadata.repaired")
""",
    "scrub": """
    assert not pool_scrub.scrub(lambda: Pool.open(path), Path(path, "data")).unreadable
""",
    "client": """
    with pool_client.serve(path) as client:
        client.device("base").read(0, 4096)
        client.create_device("new", "1M").delete()
""",
}

FEW_DESCRIPTORS = """
import shutil
from pathlib import Path
from blocksnap import pool_client, pool_repair, pool_scrub

path = sys.argv[1]

def count():
    return len(os.listdir("/proc/self/fd"))

def work():
    {work}

work()
before = count()
failed = 0
for limit in range(before - 1, before + 60):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
    try:
        work()
        break
    except errors.BlocksnapError as error:
        failed += 1
        assert "\\n" not in str(error), error
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
    assert count() == before, f"descriptors are left after limit {{limit}}"
    assert not os.path.exists(path + ".new")
    with Pool.open(path) as pool:
        for name in {{device.name for device in pool.devices()}} - {{"base", "snap"}}:
            pool.device(name).delete()
print(failed)
"""


@pytest.mark.parametrize("work", WORKS)
def test_each_lack_of_a_descriptor_is_an_error_and_leaves_none_open(path: Path, work: str) -> None:
    assert int(run(FEW_DESCRIPTORS.format(work=WORKS[work].strip()), path)) > 3
    assert_recovered(path)


FEW_FOR_A_SERVER = """
from blocksnap import pool_client
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
with pool_client.serve(sys.argv[1]):
    print("served", flush=True)
    sys.stdin.read()
"""


def connect_many(path: Path, clients: list[pool_client.PoolClient]) -> None:
    for _ in range(100):
        client = pool_client.connect(path)
        assert client is not None
        clients.append(client)


def test_server_without_a_descriptor_turns_clients_away_and_serves_on(path: Path) -> None:
    clients: list[pool_client.PoolClient] = []
    with subprocess.Popen(
        [sys.executable, "-c", START + FEW_FOR_A_SERVER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "served\n"
        with pytest.raises(errors.BusyError, match="has no descriptor left: close other connections"):
            connect_many(path, clients)
        assert len(clients) > 10
        assert clients[0].device("base").read(0, MIB) == b"a" * MIB
        for client in clients:
            client.close()
        wait_until(lambda: can_connect(path))
        holder.communicate("")
    wait_until_free(path)
    assert_recovered(path)


def can_connect(path: Path) -> bool:
    try:
        client = pool_client.connect(path)
    except errors.BusyError:
        return False
    assert client is not None
    with client:
        return len(client.devices()) == 2


# ---- rivals


def test_rivals_for_one_pool_take_turns(path: Path) -> None:
    """Each process counts up a number in the pool; who finds it in use is told by whom."""
    program = """
done = 0
while done < 25:
    try:
        with Pool.open(sys.argv[1]) as pool:
            base = pool.device("base")
            number = int.from_bytes(base.read(31 << 20, 8), "little")
            base.write(31 << 20, (number + 1).to_bytes(8, "little"))
        done += 1
    except errors.BusyError as error:
        assert "in use by" in str(error), error
"""
    command = [
        sys.executable,
        "-c",
        "import sys\nfrom blocksnap import errors\nfrom blocksnap.pool import Pool\n",
    ]
    command[-1] += program
    rivals = [subprocess.Popen([*command, path], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for rival in rivals:
        assert rival.communicate(timeout=120)[1] == ""
        assert rival.returncode == 0
    with Pool.open(path) as pool:
        assert int.from_bytes(pool.device("base").read(31 * MIB, 8), "little") == 100
    assert_recovered(path)


# ---- repair, killed


@pytest.mark.parametrize("seed", range(6))
def test_killed_repair_can_be_done_again(path: Path, seed: int) -> None:
    damaged = bytearray((path / "metadata").read_bytes())
    root = int.from_bytes(damaged[64 + 16 : 64 + 24], "little")  # the bitmaps of the data
    damaged[root * 4096 + 8 : root * 4096 + 4096] = os.urandom(4088)
    (path / "metadata").write_bytes(damaged)
    with pytest.raises(errors.BlocksnapError):
        Pool.open(path).close()
    program = (
        "from blocksnap.pool_repair import repair; print('go', flush=True); repair(sys.argv[1], swap=True)"
    )
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", f"import sys; {program}", path], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.03))
        child.kill()
        child.communicate()
        kept = [(path / name) for name in ("metadata", "metadata.damaged") if (path / name).exists()]
        assert bytes(damaged) in [part.read_bytes() for part in kept]
    run("from blocksnap.pool_repair import repair\nrepair(sys.argv[1], swap=True)", path)
    assert_recovered(path)
    thin_tool("thin_check", "-q", path / "metadata")
    left = {part.name for part in path.iterdir()}
    assert {name for name in left if "new" in name or "repaired" in name} == set()
