"""What a served pool can be asked: one method a verb, with plain values that travel over the socket.

Verbs of different connections run at the same time. What changes a device that is mounted, or walks all
metadata, takes the lock of that device or of the walks; data I/O of mounted devices passes none of this.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .device_mounts import DeviceMounts
from .errors import ArgumentError, BusyError
from .pool import Pool
from .pool_protocol import PAYLOAD_BYTES
from .thin_device import ThinDevice
from .user_pool import PoolCounters

__all__ = ["VERBS", "Answer", "PoolService", "mount_namespace"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """A result with a payload."""

    result: Any
    payload: Any = b""


@dataclass(frozen=True, slots=True)
class _Baseline:
    """The pool's figures when a device was made."""

    created: int
    counters: PoolCounters
    metadata_used: int


def _described(device: ThinDevice) -> dict[str, Any]:
    return {
        "name": device.name,
        "id": device.id,
        "size": device.size,
        "origin": device.origin,
        "created": device.created,
        "labels": dict(device.labels),
    }


class PoolService:
    """The verbs: every public method."""

    def __init__(self, pool: Pool, mounts: DeviceMounts) -> None:
        self._pool = pool
        self._mounts = mounts
        self._walking = threading.RLock()
        self._baselines: dict[str, _Baseline] = {}

    # ---- devices

    def devices(self) -> list[dict[str, Any]]:
        return [_described(device) for device in self._pool.devices()]

    def device(self, name: str) -> dict[str, Any]:
        return _described(self._pool.device(name))

    def create_device(self, name: str, size: int, labels: dict[str, str]) -> dict[str, Any]:
        return self._made(self._pool.create_device(name, size, labels=labels))

    def snapshot(self, name: str, new: str, labels: dict[str, str], freeze_timeout: float) -> dict[str, Any]:
        """Take a snapshot of a device; its file system, if mounted, is frozen meanwhile."""
        origin = self._pool.device(name)
        # A walk would make the snapshot wait, and with it everybody who writes to the frozen file system.
        with self._walking, self._mounts.frozen(name, freeze_timeout):
            return self._made(origin.snapshot(new, labels=labels))

    def delete(self, name: str) -> None:
        with self._unmounted(name, "delete"):
            self._pool.device(name).delete()
        self._mounts.forget(name)
        self._baselines.pop(name, None)

    def resize(self, name: str, size: int) -> None:
        """Resize a device; a mounted one only grows."""
        device = self._pool.device(name)
        with self._mounts.holding(name) as mounted:
            if mounted is not None and size < device.size:
                raise BusyError(
                    f'thin device "{name}" is mounted at {mounted.target}: unmount it to shrink it'
                )
            device.resize(size)
            self._mounts.refresh(name)

    def set_labels(self, name: str, labels: dict[str, str]) -> None:
        self._pool.device(name).set_labels(labels)

    # ---- contents

    def read(self, name: str, offset: int, length: int) -> Answer:
        if length > PAYLOAD_BYTES:
            raise ArgumentError(f"{length} bytes in one request: read at most {PAYLOAD_BYTES}")
        return Answer(length, self._pool.device(name).read(offset, length))

    def write(self, name: str, offset: int, payload: bytearray) -> int:
        with self._unmounted(name, "write to"):
            return self._pool.device(name).write(offset, payload)

    def discard(self, name: str, offset: int, length: int) -> None:
        with self._unmounted(name, "discard on"):
            self._pool.device(name).discard(offset, length)

    def flush(self, name: str) -> None:
        self._pool.device(name).flush()

    # ---- the pool

    def status(self) -> dict[str, Any]:
        return asdict(self._pool.status())

    def commit(self) -> None:
        self._pool.commit()

    def extend(
        self, size: int | None, metadata_size: int | None, preallocate: bool, progress: Progress | None = None
    ) -> None:
        self._pool.extend(size=size, metadata_size=metadata_size, preallocate=preallocate, progress=progress)

    def usage(self) -> list[dict[str, Any]]:
        with self._walking:
            return [asdict(one) for one in self._pool.usage()]

    def delta(self, left: str, right: str) -> Answer:
        with self._walking:
            found = self._pool.delta(left, right)
        return Answer(len(found), found)

    def reverse_mappings(self, begin: int, end: int | None) -> Answer:
        found = self._pool.reverse_mappings(begin, end)
        return Answer(len(found), found)

    def mapped_blocks(self) -> Answer:
        with self._walking:
            found = self._pool.mapped_blocks()
        return Answer(len(found), found)

    def write_delta(self, left: str, right: str, output: int) -> None:
        with self._walking:
            self._pool.write_delta(left, right, output)

    def dump(self, output: int) -> None:
        with self._walking:
            self._pool.dump(output)

    def check(self) -> dict[str, Any]:
        with self._walking:
            return asdict(self._pool.check())

    # ---- mounts

    def mounts(self) -> list[dict[str, Any]]:
        return [asdict(one) for one in self._mounts.mounts()]

    def mount(self, name: str, target: str, read_only: bool, options: str, namespace: int) -> dict[str, Any]:
        if namespace != mount_namespace():
            raise BusyError(
                f"pool {self._pool.path} is served in another mount namespace, and its mounts with it:"
                " unmount there first"
            )
        return asdict(self._mounts.mount(name, Path(target), read_only=read_only, options=options))

    def umount(self, name: str) -> None:
        self._mounts.umount(name)

    def make_file_system(self, name: str, kind: str) -> None:
        self._mounts.make_file_system(name, kind)

    def grow_ext4(self, name: str) -> None:
        self._mounts.grow_ext4(name)

    # ---- figures

    def figures(self, name: str) -> dict[str, Any] | None:
        """Return what the pool wrote since a device was made, None for one that is older than this server.

        filesystem_bytes is of this device, the counters and the metadata space are of the whole pool.
        """
        baseline = self._baselines.get(name)
        if baseline is None or baseline.created != self._pool.device(name).created:
            return None
        now, before = asdict(self._pool.status().counters), asdict(baseline.counters)
        return {
            "filesystem_bytes": self._mounts.written_bytes(name),
            "metadata_used_bytes": self._metadata_used() - baseline.metadata_used,
            **{key: None if now[key] is None else now[key] - before[key] for key in now},
        }

    def _made(self, device: ThinDevice) -> dict[str, Any]:
        self._mounts.forget(device.name)
        self._baselines[device.name] = _Baseline(
            device.created, self._pool.status().counters, self._metadata_used()
        )
        return _described(device)

    def _metadata_used(self) -> int:
        status = self._pool.status()
        return status.metadata_bytes - status.metadata_free_bytes

    @contextmanager
    def _unmounted(self, name: str, what: str) -> Iterator[None]:
        with self._mounts.holding(name) as mounted:
            if mounted is not None:
                raise BusyError(
                    f'cannot {what} thin device "{name}": it is mounted at {mounted.target}; unmount it'
                )
            yield


VERBS = frozenset(name for name in vars(PoolService) if not name.startswith("_"))


def mount_namespace() -> int:
    """Return the number of this process's mount namespace."""
    return os.stat("/proc/self/ns/mnt").st_ino
