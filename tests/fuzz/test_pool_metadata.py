"""A pool whose metadata have flipped bits under right checksums gives an error or a result, never a crash."""

import os
import random
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from blocksnap import errors
from blocksnap.pool import Pool
from tests.thin_image import BLOCK, SALTS, checksums

Blocks = npt.NDArray[np.uint8]
CASES_A_SEED = 12


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool with trees of two levels, shared nodes and many devices."""
    path = tmp_path_factory.mktemp("sound") / "pool"
    with Pool.create(path, size="32M", block_size="4K") as pool:
        base = pool.create_device("base", "16M")
        for block in range(0, 3000, 2):
            base.write(block * 4096, b"x" * 100)
        snap = base.snapshot("snap")
        for block in range(0, 1000, 3):
            snap.write(block * 4096, b"y")
        with pool.transaction():
            for number in range(150):
                pool.create_device(f"d{number}", "1M").write(0, b"x")
    return path


def checksum(block: Blocks, kind: str) -> Blocks:
    value = int(checksums(block[np.newaxis], np.array([SALTS[kind]], dtype=np.uint32))[0])
    return np.frombuffer(value.to_bytes(4, "little"), dtype=np.uint8)


def kinds_of(blocks: Blocks) -> dict[int, str]:
    """Return the kind of each block in use: the one whose salt makes its checksum right."""
    used = np.flatnonzero(blocks.any(axis=1))
    stored = blocks[used, :4].copy().view("<u4").ravel()
    kinds = {}
    for kind, salt in SALTS.items():
        fits = checksums(blocks[used], np.full(len(used), salt, dtype=np.uint32)) == stored
        kinds.update({int(number): kind for number in used[fits]})
    return kinds


def mutate(blocks: Blocks, kinds: dict[int, str], rng: random.Random) -> None:
    number = rng.choice(list(kinds))
    offset = rng.choice([rng.randrange(4, 48), rng.randrange(4, 364), rng.randrange(4, BLOCK)])
    blocks[number, offset] ^= 1 << rng.randrange(8)
    if rng.random() < 0.9:
        blocks[number, :4] = checksum(blocks[number], kinds[number])


def use(path: Path) -> None:
    with Pool.open(path) as pool:
        for device in pool.devices()[:20]:
            device.read(0, 1 << 20)
            device.write(5000, b"z" * 10000)
        pool.create_device("new", "1M").write(0, b"1")
        pool.device("base").snapshot("another")
        pool.device("snap").delete()
        pool.device("base").discard(0, 1 << 20)
        pool.usage()
        pool.check()


def use_in_child(path: Path) -> int:
    """Use the pool in a child with a time limit; return its exit status: 0 for a result or our error."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            with suppress(errors.BlocksnapError):
                use(path)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("seed", range(4))
def test_mutated_metadata_give_an_error_or_a_result(sound: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    original = np.fromfile(sound / "metadata", dtype=np.uint8).reshape(-1, BLOCK)
    kinds = kinds_of(original)
    assert set(kinds.values()) == set(SALTS)
    for case in range(CASES_A_SEED):
        path = tmp_path / str(case)
        path.mkdir()
        for part in ("data", "catalog.db"):
            subprocess.run(["cp", "--sparse=always", sound / part, path / part], check=True)
        blocks = original.copy()
        for _ in range(rng.choice([1, 1, 2, 5])):
            mutate(blocks, kinds, rng)
        blocks.tofile(path / "metadata")
        assert use_in_child(path) == 0, f"seed {seed}, case {case}"
        shutil.rmtree(path)
