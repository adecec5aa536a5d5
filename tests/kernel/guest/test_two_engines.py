"""One pool that both engines open in turn: contents, counts and metadata agree after every hop."""

import random
import subprocess
from pathlib import Path

import pytest

from blocksnap import metadata
from blocksnap.device_mapper import Control, ThinStatus
from blocksnap.user_pool import UserPool
from tests.kernel.devices import BLOCK, MIB, Disks, read_at, write_at
from tests.kernel.pools import DATA, METADATA, activate, discard, start_pool
from tests.thin_tools import needs_thin_tools

SIZE = 2 * MIB


class Model:
    """What the devices of a pool must hold, and random operations on them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.devices: dict[int, bytearray] = {}
        self._next_id = 0

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def some_device(self) -> int:
        return self.random.choice(sorted(self.devices))

    def some_range(self) -> tuple[int, int]:
        unit = self.random.choice((512, 4096, BLOCK))
        begin = self.random.randrange(SIZE // unit)
        return begin * unit, min(self.random.randint(1, 3 * BLOCK // unit), SIZE // unit - begin) * unit


class UserHop:
    """The pool in the user engine for a few operations."""

    def __init__(self, disks: Disks, model: Model) -> None:
        self._pool = UserPool.open(disks.file("metadata"), disks.file("data"))
        self._open = {device_id: self._pool.open_device(device_id, SIZE) for device_id in model.devices}

    def create(self, device_id: int) -> None:
        self._pool.create_device(device_id)
        self._open[device_id] = self._pool.open_device(device_id, SIZE)

    def snapshot(self, device_id: int, origin_id: int) -> None:
        self._pool.create_snapshot(device_id, origin_id)
        self._open[device_id] = self._pool.open_device(device_id, SIZE)

    def delete(self, device_id: int) -> None:
        self._open.pop(device_id).close()
        self._pool.delete_device(device_id)

    def write(self, device_id: int, offset: int, content: bytes) -> None:
        self._open[device_id].write(offset, content)

    def discard(self, device_id: int, offset: int, length: int) -> None:
        self._open[device_id].discard(offset, length)

    def read(self, device_id: int) -> bytes:
        content = bytearray(SIZE)
        self._open[device_id].read_into(0, content)
        return bytes(content)

    def mapped_blocks(self) -> dict[int, int]:
        return {device.id: device.mapped_blocks for device in self._pool.devices()}

    def close(self) -> None:
        for device in self._open.values():
            device.close()
        self._pool.close()


class KernelHop:
    """The pool in the kernel for a few operations."""

    def __init__(self, control: Control, disks: Disks, model: Model) -> None:
        self._control, self._disks = control, disks
        self._pool = start_pool(control, disks)
        self._open = {
            device_id: activate(control, self._pool, device_id, SIZE) for device_id in model.devices
        }

    def create(self, device_id: int) -> None:
        self._pool.create_thin(device_id)
        self._open[device_id] = activate(self._control, self._pool, device_id, SIZE)

    def snapshot(self, device_id: int, origin_id: int) -> None:
        with self._open[origin_id].suspended():
            self._pool.create_snap(device_id, origin_id)
        self._open[device_id] = activate(self._control, self._pool, device_id, SIZE)

    def delete(self, device_id: int) -> None:
        self._open.pop(device_id).remove()
        self._pool.delete(device_id)

    def write(self, device_id: int, offset: int, content: bytes) -> None:
        write_at(self._open[device_id].path, offset, content)

    def discard(self, device_id: int, offset: int, length: int) -> None:
        discard(self._open[device_id].path, offset, length)

    def read(self, device_id: int) -> bytes:
        return read_at(self._open[device_id].path, 0, SIZE)

    def mapped_blocks(self) -> dict[int, int]:
        found = {}
        for device_id, device in self._open.items():
            (status,) = device.status(commit=True)
            assert isinstance(status, ThinStatus)
            found[device_id] = status.mapped_bytes // BLOCK
        return found

    def close(self) -> None:
        for device in self._open.values():
            device.remove()
        self._pool.remove()
        self._disks.detach()


Hop = UserHop | KernelHop


def operate(hop: Hop, model: Model) -> None:
    """Do one random operation on the pool and on the model."""
    choice = model.random.random()
    if not model.devices or (choice < 0.1 and len(model.devices) < 6):
        device_id = model.new_id()
        hop.create(device_id)
        model.devices[device_id] = bytearray(SIZE)
        return
    one = model.some_device()
    if choice < 0.3 and len(model.devices) < 6:
        device_id = model.new_id()
        hop.snapshot(device_id, one)
        model.devices[device_id] = bytearray(model.devices[one])
    elif choice < 0.4:
        hop.delete(one)
        del model.devices[one]
    elif choice < 0.5:
        begin = model.random.randrange(SIZE // BLOCK - 4) * BLOCK
        length = model.random.randint(1, 4) * BLOCK
        hop.discard(one, begin, length)
        model.devices[one][begin : begin + length] = bytes(length)
    else:
        offset, length = model.some_range()
        content = model.random.randbytes(length)
        hop.write(one, offset, content)
        model.devices[one][offset : offset + length] = content


def assert_sound(disks: Disks) -> Path:
    """Assert that thin_check and our own check find nothing; return the metadata file."""
    path = disks.file("metadata")
    assert metadata.check(path).findings == ()
    # thin_check takes direct I/O, which a tmpfs does not have.
    disks.attach("metadata")
    subprocess.run(["thin_check", "-q", disks.path("metadata")], check=True)
    disks.detach()
    return path


def assert_as_modelled(hop: Hop, model: Model, disks: Disks) -> None:
    for device_id, content in model.devices.items():
        assert hop.read(device_id) == content, f"thin device {device_id}"
    mapped = hop.mapped_blocks()
    hop.close()
    path = assert_sound(disks)
    assert {one.id: one.mapped_blocks for one in metadata.usage(path)} == mapped


@needs_thin_tools
@pytest.mark.parametrize("seed", range(6))
def test_a_pool_goes_from_engine_to_engine_unharmed(control: Control, disks: Disks, seed: int) -> None:
    model = Model(seed)
    parts = disks.file("metadata", METADATA), disks.file("data", DATA)
    kernel_first = seed % 2
    if not kernel_first:  # the kernel formats metadata that begin with zeros
        UserPool.format(*parts, data_bytes=DATA, block_size=BLOCK)
    for number in range(6):
        in_kernel = (number + kernel_first) % 2
        hop: Hop = KernelHop(control, disks, model) if in_kernel else UserHop(disks, model)
        for _ in range(8):
            operate(hop, model)
        assert_as_modelled(hop, model, disks)
