"""A served pool through its client: the same answers as from the pool itself."""

import threading
from pathlib import Path

import numpy as np
import pytest

from blocksnap import errors, pool_client
from blocksnap.pool import Pool
from blocksnap.pool_client import PoolClient
from tests.pool_servers import (
    engine,
    pool_path,
    run_command,
    served,
)

__all__ = ["engine", "pool_path", "served"]

BLOCK = 64 << 10


def fill(path: Path) -> None:
    with Pool.open(path) as pool:
        base = pool.create_device("base", "10M", labels={"kind": "test"})
        base.write(0, bytes(range(256)) * 1024)
        snap = base.snapshot("snap")
        snap.write(3 * BLOCK, b"y" * BLOCK)
        snap.discard(0, BLOCK)


def test_served_pool_tells_what_the_pool_itself_tells(pool_path: Path, tmp_path: Path) -> None:
    fill(pool_path)
    with Pool.open(pool_path) as pool:
        usage, delta, runs = pool.usage(), pool.delta("base", "snap"), pool.reverse_mappings()
        found = [(d.name, d.id, d.size, d.origin, d.created, dict(d.labels)) for d in pool.devices()]
        with (tmp_path / "dump").open("wb") as dump, (tmp_path / "delta").open("wb") as text:
            pool.dump(dump.fileno())
            pool.write_delta("base", "snap", text.fileno())
        report, status = pool.check(), pool.status()
    with pool_client.serve(pool_path) as client:
        assert client.usage() == usage
        assert np.array_equal(client.delta("base", "snap"), delta)
        assert np.array_equal(client.reverse_mappings(), runs)
        assert [
            (d.name, d.id, d.size, d.origin, d.created, dict(d.labels)) for d in client.devices()
        ] == found
        assert (client.status().transaction_id, client.status().data_free_bytes) == (
            status.transaction_id,
            status.data_free_bytes,
        )
        assert client.check() == report
        assert not client.read_only
        assert run_command("pool", "dump", pool_path).encode() == (tmp_path / "dump").read_bytes()
        assert (
            run_command("pool", "delta", pool_path, "base", "snap").encode()
            == (tmp_path / "delta").read_bytes()
        )


def test_devices_of_a_served_pool_read_and_write(served: PoolClient) -> None:
    device = served.create_device("base", "30M", labels={"a": "b"})
    content = np.random.default_rng(1).bytes(9 << 20)
    assert device.write(1000, content) == len(content)
    device.flush()
    assert device.read(0, len(content) + 2000) == bytes(1000) + content + bytes(1000)
    device.discard(BLOCK, 2 * BLOCK)
    assert device.read(BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
    device.resize("40M")
    device.set_labels({"c": "d"})
    assert (device.size, dict(device.labels)) == (40 << 20, {"c": "d"})
    snap = device.snapshot("snap")
    assert (snap.origin, snap.read(1000, 10)) == ("base", content[:10])
    snap.delete()
    served.commit()
    assert [one.name for one in served.devices()] == ["base"]
    with pytest.raises(errors.DeviceNotFoundError, match="snap"):
        snap.read(0, 1)
    with pytest.raises(errors.ArgumentError):
        device.read(40 << 20, 1)


def test_served_pool_is_extended_with_progress(served: PoolClient) -> None:
    seen: list[tuple[int, int]] = []
    served.extend(size="520M", preallocate=True, progress=lambda done, total: seen.append((done, total)))
    assert served.status().data_bytes == 520 << 20
    assert seen[-1] == (8 << 20, 8 << 20)
    with pytest.raises(errors.ArgumentError, match="shrink"):
        served.extend(size="1M")


def test_threads_of_one_client_take_turns(served: PoolClient) -> None:
    devices = [served.create_device(f"d{number}", "8M") for number in range(4)]

    def work(number: int) -> None:
        for round in range(20):
            devices[number].write(round * 4096, bytes([number]) * 4096)
            assert devices[number].read(round * 4096, 4096) == bytes([number]) * 4096

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, device in enumerate(devices):
        assert device.read(0, 20 * 4096) == bytes([number]) * (20 * 4096)
