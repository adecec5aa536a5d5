"""The user engine as Python sees it: handles, buffers, listings, locks."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blocksnap import errors, metadata
from blocksnap.user_pool import UserPool

BLOCK = 4096


class Files:
    """Metadata and data of a pool below a folder."""

    def __init__(self, folder: Path, data_bytes: int = 8 << 20, block_size: int = BLOCK) -> None:
        self.metadata, self.data = folder / "metadata", folder / "data"
        for part, size in ((self.metadata, 16 << 20), (self.data, data_bytes)):
            with part.open("wb") as made:
                made.truncate(size)
        UserPool.format(self.metadata, self.data, data_bytes=data_bytes, block_size=block_size)

    def open(self, *, read_only: bool = False) -> UserPool:
        return UserPool.open(self.metadata, self.data, read_only=read_only)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def pool(files: Files) -> Iterator[UserPool]:
    made = files.open()
    yield made
    made.abandon()


def test_format_refuses_metadata_in_use(files: Files) -> None:
    with pytest.raises(errors.DeviceExistsError):
        UserPool.format(files.metadata, files.data, data_bytes=8 << 20, block_size=BLOCK)


@pytest.mark.parametrize("block_size", [0, 512, 5000, 65536 + 4096, 2 << 30])
def test_format_refuses_other_block_sizes(tmp_path: Path, block_size: int) -> None:
    with pytest.raises(errors.ArgumentError, match="block size"):
        Files(tmp_path, block_size=block_size)


def test_second_open_says_which_process_holds_the_pool(files: Files, pool: UserPool) -> None:
    program = (
        "import sys; from blocksnap.user_pool import UserPool; from blocksnap.errors import BusyError\n"
        "try: UserPool.open(*sys.argv[1:])\n"
        "except BusyError as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(files.metadata), str(files.data)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"in use by process {os.getpid()}" in done.stdout
    assert not pool.closed


def test_close_with_an_open_device_is_busy_and_the_pool_goes_on(pool: UserPool) -> None:
    pool.create_device(1)
    device = pool.open_device(1, 1 << 20)
    with pytest.raises(errors.BusyError):
        pool.close()
    device.write(0, b"still here")
    device.close()
    pool.close()
    assert pool.closed


def test_use_after_close_is_refused(pool: UserPool) -> None:
    pool.create_device(1)
    device = pool.open_device(1, 1 << 20)
    device.close()
    device.close()
    with pytest.raises(errors.ArgumentError, match=r"thin device 1 .* is closed"):
        device.flush()
    pool.close()
    pool.close()
    for use in (pool.status, pool.devices, pool.commit, lambda: pool.open_device(1, 512)):
        with pytest.raises(errors.ArgumentError, match="is closed"):
            use()


def test_abandon_drops_what_was_not_committed(files: Files) -> None:
    pool = files.open()
    pool.create_device(1)
    pool.commit()
    pool.begin()
    pool.create_device(2)
    pool.abandon()
    with pytest.raises(errors.ArgumentError):
        pool.commit()
    again = files.open()
    assert [info.id for info in again.devices()] == [1]
    again.close()


def test_end_moves_the_transaction_id_only_from_the_right_one(pool: UserPool) -> None:
    pool.begin()
    pool.create_device(1)
    pool.end(0, 5)
    assert pool.status().transaction_id == 5
    pool.begin()
    with pytest.raises(errors.ArgumentError):
        pool.end(4, 6)
    assert pool.status().transaction_id == 5


def test_devices_and_mappings_are_listed_whole(files: Files, pool: UserPool) -> None:
    pool.begin()
    for device_id in range(0, 3000, 2):
        pool.create_device(device_id)
    pool.end(0, 1)
    assert [info.id for info in pool.devices()] == list(range(0, 3000, 2))
    with pool.open_device(4, 1 << 30) as device:
        for block in range(0, 1400, 2):
            device.write(block * BLOCK, b"x")
        device.write((1 << 30) - 1, b"x")
    pool.commit()
    assert metadata.devices(files.metadata) == pool.devices()
    found = np.concatenate(list(metadata.mappings(files.metadata, 4)))
    assert found["thin_block"].tolist() == [*range(0, 1400, 2), (1 << 18) - 1]
    assert len(set(found["data_block"].tolist())) == 701
    assert [some["thin_block"].tolist() for some in metadata.mappings(files.metadata, 4, 1399)] == [
        [(1 << 18) - 1]
    ]
    assert [metadata.end_of_mappings(files.metadata, number) for number in (4, 6)] == [1 << 18, 0]


def test_missing_devices_are_named(pool: UserPool) -> None:
    for use in (
        lambda: pool.delete_device(9),
        lambda: pool.open_device(9, 512),
    ):
        with pytest.raises(errors.DeviceNotFoundError, match="9"):
            use()
    with pytest.raises(errors.DeviceNotFoundError, match="9"):
        pool.create_snapshot(1, 9)


def test_a_device_that_is_open_cannot_be_deleted(pool: UserPool) -> None:
    pool.create_device(1)
    with pool.open_device(1, 512), pytest.raises(errors.BusyError):
        pool.delete_device(1)
    pool.delete_device(1)


def test_buffers_that_cannot_be_used_are_refused(pool: UserPool) -> None:
    pool.create_device(1)
    with pool.open_device(1, 1 << 20) as device:
        with pytest.raises(errors.ArgumentError, match="buffer"):
            device.read_into(0, b"not writable")
        with pytest.raises(errors.ArgumentError, match="buffer"):
            device.write(0, np.zeros((8, 8))[:, ::2])
        with pytest.raises(TypeError):
            device.write(0, "no buffer")


def test_read_only_refuses_writes_and_leaves_the_files_alone(files: Files) -> None:
    pool = files.open()
    pool.create_device(1)
    with pool.open_device(1, 1 << 20) as device:
        device.write(0, b"content")
    pool.close()
    before = files.metadata.read_bytes(), files.data.read_bytes()
    pool = files.open(read_only=True)
    assert pool.status().read_only
    with pool.open_device(1, 1 << 20) as device:
        target = bytearray(7)
        device.read_into(0, target)
        assert target == b"content"
        with pytest.raises(errors.BlocksnapError, match="read-only"):
            device.write(0, b"x")
    pool.close()
    assert (files.metadata.read_bytes(), files.data.read_bytes()) == before


def test_closing_a_handle_waits_for_the_calls_that_use_it(pool: UserPool) -> None:
    pool.create_device(1)
    failures: list[BaseException] = []
    for _ in range(30):
        device = pool.open_device(1, 4 << 20)

        def use(device: object = device) -> None:
            try:
                while True:
                    device.write(0, bytes(64 << 10))  # type: ignore[attr-defined]
            except errors.ArgumentError:
                pass
            except BaseException as failure:
                failures.append(failure)
                raise

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        device.close()
        for thread in threads:
            thread.join()
    assert not failures
    pool.close()


def test_counters_add_up_to_what_reached_the_data_file(pool: UserPool) -> None:
    pool.create_device(1)
    with pool.open_device(1, 1 << 20) as device:
        device.write(100, b"x" * 1000)
        device.write(BLOCK * 4, bytes(BLOCK))
        pool.create_snapshot(2, 1)
        device.write(0, b"y" * 10)
        counters = pool.counters()
    assert counters.application_bytes == 1000 + BLOCK + 10
    assert counters.zero_filled_bytes == BLOCK - 1000
    assert counters.copied_bytes == BLOCK - 10
    assert (counters.blocks_provisioned, counters.blocks_copied) == (2, 1)
