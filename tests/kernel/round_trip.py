"""Pools that go from engine to engine: python -m tests.kernel.round_trip (files | devices) SEED...

A program, because the guards of the kernel engine are forked, which takes a small process far less time than
pytest. It ends with 1 at the first difference and tells the seed and what led there.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocksnap import metadata
from blocksnap.device_mapper import Control, Device, DeviceNumber, ThinPoolTarget
from blocksnap.mount import LoopDevice
from blocksnap.pool import Pool
from tests.kernel.devices import BLOCK, leftovers
from tests.kernel.pool_model import MAX_DATA, MIN_DATA, PoolModel
from tests.kernel.pool_places import Places
from tests.kernel.pools import kernel_counts

HOPS, OPERATIONS = 4, 6


@contextmanager
def metadata_device(places: Places) -> Iterator[str]:
    """Give the metadata for direct I/O, which a file on tmpfs does not take."""
    if places.on_devices:
        yield places.metadata
        return
    with LoopDevice.attach(places.metadata, read_only=True) as loop:
        yield loop.path


def assert_contents(pool: Pool, model: PoolModel) -> None:
    assert {device.name: device.size for device in pool.devices()} == {
        name: len(content) for name, content in model.contents.items()
    }
    for name, content in model.contents.items():
        assert pool.device(name).read(0, len(content)) == content, f"{name!r} has another content"


def assert_counts(pool: Pool, model: PoolModel) -> int:
    """Assert that everybody counts the same blocks; return how many are used."""
    expected = {name: len(blocks) for name, blocks in model.mapped.items()}
    counted = {each.name: each.mapped_bytes // BLOCK for each in pool.usage()}
    assert counted == expected, f"usage: {counted}, model: {expected}"
    status = pool.status()
    assert status.data_bytes == model.data_bytes
    used = (status.data_bytes - status.data_free_bytes) // BLOCK
    if status.engine == "kernel":
        told = kernel_counts(pool)
        usage = {name: blocks * BLOCK for name, blocks in expected.items()}, used
        assert told == usage, f"the kernel: {told}, usage: {usage}"
    return used


def hop(places: Places, model: PoolModel, engine: str) -> int:
    """Do some operations on the pool in one engine; return the number of its used data blocks."""
    with Pool.open(**places.options, engine=engine) as pool:
        assert pool.status().engine == engine
        assert_contents(pool, model)
        for _ in range(OPERATIONS):
            model.operate(pool)
        assert_contents(pool, model)
        return assert_counts(pool, model)


def assert_sound(places: Places, model: PoolModel, used: int) -> None:
    """Assert that thin_check and our own check find nothing, and count what the engine counted."""
    with metadata_device(places) as device:
        report = metadata.check(device)
        assert report.findings == (), report.findings
        assert (report.devices, report.data_blocks_used) == (len(model.contents), used), report
        subprocess.run(["thin_check", "-q", device], check=True)


def make(places: Places, seed: int) -> None:
    """Make a pool; some are formatted by the kernel, which does so with metadata that begin with zeros."""
    if not places.on_devices or seed % 4:
        Pool.create(**places.options, size=MIN_DATA).close()
        return
    metadata_number, data_number = (DeviceNumber.of(places.options[part]) for part in ("metadata", "data"))
    with Control.open() as control:
        target = ThinPoolTarget(MIN_DATA, metadata_number, data_number, BLOCK)
        Device.create(control, "formatting", [target]).remove()


def run_sequence(seed: int, places: Places) -> None:
    model = PoolModel(seed)
    engines = ("user", "kernel")[:: -1 if seed % 2 else 1]
    try:
        make(places, seed)
        for number in range(HOPS):
            engine = engines[number % 2]
            model.journal.append(f"-- {engine} engine")
            used = hop(places, model, engine)
            assert_sound(places, model, used)
    except BaseException:
        print(f"seed {seed} failed after:", *model.journal, sep="\n", flush=True)
        raise


def main(kind: str, *seeds: str) -> None:
    with tempfile.TemporaryDirectory(prefix="round-trip-") as folder:
        places = Places(Path(folder), devices=kind == "devices", data_size=MAX_DATA)
        try:
            for seed in seeds:
                places.clear()
                run_sequence(int(seed), places)
        finally:
            places.close()
    with Control.open() as control:
        assert leftovers(control) == []
    print(f"{len(seeds)} sequences of {HOPS} hops")


if __name__ == "__main__":
    os.environ.setdefault("BLOCKSNAP_DEVICE_SUFFIX", "-blocksnap-test")
    main(*sys.argv[1:])
