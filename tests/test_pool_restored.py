"""A big pool written by thin_restore: its devices read what the mappings say, and it can be worked on."""

import os
from pathlib import Path

import numpy as np

from blocksnap import metadata
from blocksnap.pool import Pool
from tests.thin_tools import needs_thin_tools, our_text, thin_tool
from tests.thin_xml import history, restore, to_xml

BLOCK = 64 << 10


@needs_thin_tools
def test_a_million_mappings_in_64_snapshots_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.mkdir()
    history_of_devices = history(22, snapshots=64, mappings=16_000)
    image = restore(to_xml(history_of_devices), path, metadata_bytes=96 << 20)
    (path / "pool.xml").unlink()
    rng = np.random.default_rng(22)
    with (path / "data").open("wb") as data:
        data.truncate(history_of_devices.nr_data_blocks * BLOCK)
    descriptor = os.open(path / "data", os.O_WRONLY)
    expected = []
    for device in history_of_devices.devices:
        for place in rng.integers(0, len(device.thin_blocks), 20):
            block = int(device.data_blocks[place])
            os.pwrite(descriptor, block.to_bytes(8, "little"), block * BLOCK + 500)
            expected.append((device.id, int(device.thin_blocks[place]), block))
    os.close(descriptor)

    with Pool.open(path) as pool:
        assert len(pool.devices()) == 65
        for device_id, thin_block, block in expected:
            content = pool.device(f"thin-{device_id}").read(thin_block * BLOCK + 500, 8)
            assert int.from_bytes(content, "little") == block
        first = history_of_devices.devices[0]
        assert pool.device("thin-1").size == (int(first.thin_blocks[-1]) + 1) * BLOCK
        named = pool.device("thin-7").snapshot("named")
        pool.device("thin-7").delete()
        named.write(int(expected[0][1]) * BLOCK, b"changed")
        assert sum(use.mapped_bytes for use in pool.usage()) >= 65 * 16_000 * BLOCK
    assert not metadata.check(image).damaged
    assert our_text(image) == thin_tool("thin_dump", image)
    thin_tool("thin_check", "-q", image)
