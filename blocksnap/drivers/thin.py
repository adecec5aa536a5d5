"""Docker's devicemapper driver without device-mapper: each layer is a thin device with a file system on it.

    <root>/pool       the pool
    <root>/mnt/ID     where a layer is mounted

A layer is a snapshot of its parent's device, one without a parent of the base device, which is made once and
holds an empty file system. The device's labels say that it is a layer and which one is its parent, so the
pool's catalog is the only truth. All goes through the pool's server: it is started when it is needed, what it
mounts outlives this process, and several processes work on one root.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from .. import archive, mount, pool_client
from ..errors import (
    ArgumentError,
    BlocksnapError,
    BusyError,
    DeviceExistsError,
    DeviceIOError,
    DeviceNotFoundError,
)
from ..file_system import FILE_SYSTEMS, find_program, grow_xfs, may_mount
from ..metadata import DELTA_LEFT_ONLY, check_block_size
from ..pool import Pool
from ..pool_client import PoolClient
from ..remote_device import RemoteDevice
from ..units import Size, format_size, parse_size
from .base import Accounting, Driver, check_id
from .block_diff import changed_ranges, unchanged_inodes
from .directory import backing_filesystem

__all__ = ["ThinDriver"]

_BASE = ".base"  # no layer id begins with a dot
_KINDS = " or ".join(FILE_SYSTEMS)
_PARENT = "parent"
_FILE_SYSTEM = "filesystem"
_UNFINISHED = "unfinished"  # no layer yet: on its way to the size it is limited to
_POOL_SIZE = "10G"
_BLOCK_SIZE = "64K"


class ThinDriver(Driver):
    """Layers as thin devices of a pool that the user engine runs."""

    name: ClassVar[str] = "thin"
    engine: ClassVar[str] = "user"

    def __init__(
        self,
        root: Path,
        *,
        size: Size | None = None,
        block_size: Size | None = None,
        base_size: Size = "10G",
        filesystem: str = "ext4",
        preallocate: bool = False,
    ) -> None:
        """Open the pool in root, or make one of the given size (10G) and block_size (64K).

        base_size is the size of the file system of each layer that is made from now on without a parent.
        preallocate writes the new pool's files full of zeros, so that their file system has nothing left to
        allocate.
        """
        super().__init__(root)
        if filesystem not in FILE_SYSTEMS:
            raise ArgumentError(f'"{filesystem}" is no file system for layers: take {_KINDS}')
        self._pool_path = self.root / "pool"
        self._mounts = self.root / "mnt"
        self._base_size = parse_size(base_size, "base size")
        self._filesystem = filesystem
        self._client: PoolClient | None = None
        self._owner = 0
        with self._home.lock.hold():
            self._mounts.mkdir(mode=0o700, exist_ok=True)
            self._make_pool(size, block_size, preallocate)
            self._unmount_abandoned()

    @classmethod
    def missing(cls, root: Path) -> str | None:  # noqa: ARG003 - the root's file system does not matter
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            return "needs /dev/fuse: modprobe fuse; in a container: --device /dev/fuse"
        if may_mount():
            if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
                return "needs /dev/loop-control: modprobe loop; in a container: --privileged"
            programs = {"mke2fs": "e2fsprogs"}
        else:
            programs = {"mke2fs": "e2fsprogs", "fuse2fs": "fuse2fs", "fusermount3": "fuse3"}
        for program, package in programs.items():
            if find_program(program) is None:
                return f"{program} is not installed: apt install {package}"
        return None

    @classmethod
    def block_sizes(cls, wanted: Sequence[int]) -> Sequence[int | None]:
        for size in wanted:
            check_block_size(size)
        return wanted

    def close(self) -> None:
        """Part from the pool's server, which ends unless a layer is mounted or others use it."""
        client, self._client = self._client, None
        if client is not None and self._owner == os.getpid():
            client.close()

    def cleanup(self) -> None:
        """Unmount everything of this root, but what other living processes hold; part from the server."""
        if self._home.has_references() or self._mounted():  # else no server need be started for it
            super().cleanup()
        self.close()

    # ---- questions

    def exists(self, id: str) -> bool:
        try:
            return _PARENT in self._pool().device(check_id(id)).labels
        except DeviceNotFoundError:
            return False

    def layers(self) -> list[str]:
        return [device.name for device in self._layer_devices()]

    def parent(self, id: str) -> str | None:
        self._check_known(id)
        return self._pool().device(id).labels[_PARENT] or None

    def children(self, id: str) -> list[str]:
        return [device.name for device in self._layer_devices() if device.labels[_PARENT] == id]

    def status(self) -> list[tuple[str, str]]:
        pool = self._pool()
        found = pool.status()
        rows: list[tuple[str, str | int]] = [
            ("Pool Name", str(self._pool_path)),
            ("Pool Blocksize", found.block_size),
            ("Base Device Size", self._base_size),
            ("Backing Filesystem", self._filesystem),
            ("Pool Filesystem", backing_filesystem(self.root)),
            ("Data file", str(self._pool_path / "data")),
            ("Metadata file", str(self._pool_path / "metadata")),
            ("Data Space Used", found.data_bytes - found.data_free_bytes),
            ("Data Space Total", found.data_bytes),
            ("Data Space Available", found.data_free_bytes),
            ("Metadata Space Used", found.metadata_bytes - found.metadata_free_bytes),
            ("Metadata Space Total", found.metadata_bytes),
            ("Metadata Space Available", found.metadata_free_bytes),
            ("Transaction Id", str(found.transaction_id)),
            ("Direct I/O", "yes" if found.direct_io else "no"),
            ("Engine", self.engine),
            ("Server", f"process {pool.server_pid}"),
            ("Layers", str(len(self.layers()))),
        ]
        shown = [(name, value if isinstance(value, str) else format_size(value)) for name, value in rows]
        return shown + [(f"{name} (bytes)", str(value)) for name, value in rows if isinstance(value, int)]

    def metadata(self, id: str) -> dict[str, str]:
        """Return Docker's DeviceId, DeviceSize and DeviceName; if mounted, MountPoint and its device."""
        self._check_known(id)
        pool = self._pool()
        device = pool.device(id)
        found = {"DeviceId": str(device.id), "DeviceSize": str(device.size), "DeviceName": device.name}
        for mounted in pool.mounts():
            if mounted.device == id:
                node = (
                    {"LoopDevice": mounted.loop or ""}
                    if self.engine == "user"
                    else {"Node": mounted.node or ""}
                )
                found |= {"MountPoint": mounted.target, **node}
        return found

    def accounting(self, id: str) -> Accounting:
        """Return what the pool wrote since the layer was made, as far as its server has lived that long.

        filesystem_bytes is of this layer alone; what was written is of the pool, so of all layers that were
        written to meanwhile. allocated_bytes is what the layer does not share with its parent, and the
        metadata blocks that the pool has taken since.
        """
        self._check_known(id)
        pool = self._pool()
        figures = pool.figures(id)
        allocated = self._allocated_bytes(pool, id)
        if figures is None:
            return Accounting(allocated_bytes=allocated)
        return Accounting(
            filesystem_bytes=figures["filesystem_bytes"],
            data_bytes=figures["application_bytes"],
            copy_bytes=figures["copied_bytes"],
            zero_filled_bytes=figures["zero_filled_bytes"] + figures["padding_bytes"],
            metadata_bytes=figures["metadata_bytes"],
            allocated_bytes=allocated + max(figures["metadata_used_bytes"], 0),
        )

    def _allocated_bytes(self, pool: PoolClient, id: str) -> int:
        """Return the bytes of the data blocks that a layer does not share with its parent."""
        delta = pool.delta(self.parent(id) or _BASE, id)
        own = delta["length"][delta["kind"] != DELTA_LEFT_ONLY]
        return int(own.sum()) * pool.status().block_size

    # ---- contents

    def _unchanged(self, id: str, parent: str | None) -> archive.Unchanged | None:
        """Compare the blocks of the two devices, when all of their file systems is in place."""
        if parent is None or not may_mount():
            return None
        try:
            for layer in (id, parent):
                if not os.statvfs(self._mounts / layer).f_flag & os.ST_RDONLY:
                    with mount.frozen(self._mounts / layer):
                        pass  # this has emptied the journal
        except (BusyError, DeviceIOError):  # somebody else freezes it, or it takes too long
            return None
        pool = self._pool()
        pool.commit()
        changed = changed_ranges(pool.delta(parent, id), pool.status().block_size)
        return unchanged_inodes(pool.device(parent).read, pool.device(id).read, changed)

    # ---- layers

    def snapshot(self, id: str, origin: str) -> None:
        """Make a layer with the present state of another, mounted or not, in one step."""
        with self._home.lock.hold():
            self._check_new(id)
            self._check_known(origin)
            self._snapshot(origin, id, self.parent(origin))

    def sync(self) -> None:
        """Make all layers durable."""
        pool = self._pool()
        for mounted in pool.mounts():
            if not mounted.read_only:
                mount.sync_filesystem(mounted.target)
        pool.commit()

    def _create(self, id: str, parent: str | None, *, writable: bool) -> None:  # noqa: ARG002
        if parent is None:
            self._make_base()
        self._snapshot(parent or _BASE, id, parent)

    def _snapshot(self, origin: str, id: str, parent: str | None) -> None:
        device = self._pool().device(origin)
        labels = {_PARENT: parent or ""}
        try:
            device.snapshot(id, labels=labels)
        except DeviceExistsError:
            if not self._delete_unfinished(id):
                raise
            device.snapshot(id, labels=labels)

    def _delete_unfinished(self, id: str) -> bool:
        """Delete what a killed _create_limited left; a device that is nobody's layer may be a user's."""
        with suppress(DeviceNotFoundError):
            device = self._pool().device(id)
            if _UNFINISHED in device.labels:
                device.delete()
                return True
        return False

    def _create_limited(self, id: str, parent: str | None, *, writable: bool, size: int) -> None:  # noqa: ARG002
        """Make a device, grow it and the file system on it; only then does its label make it a layer."""
        if parent is None:
            self._make_base()
        least = self._pool().device(parent or _BASE).size
        if size < least:
            raise ArgumentError(
                f'layer "{id}" begins with {least} bytes and cannot be limited to {size}: take more'
            )
        self._delete_unfinished(id)
        device = self._pool().device(parent or _BASE).snapshot(id, labels={_UNFINISHED: ""})
        try:
            device.resize(size)
            self._grow_file_system(device)
            device.set_labels({_PARENT: parent or ""})
        except BaseException:
            with suppress(BlocksnapError):
                device.delete()
            raise

    def _grow_file_system(self, device: RemoteDevice) -> None:
        pool = self._pool()
        if pool.device(_BASE).labels[_FILE_SYSTEM] != "xfs":
            pool.grow_ext4(device)
            return
        target = self._mounts / device.name
        target.mkdir(mode=0o700, exist_ok=True)
        try:
            pool.mount(device.name, target)
            grow_xfs(target, device.size)
        finally:
            self._unmount(device.name)

    def _remove(self, id: str) -> None:
        self._pool().device(id).delete()
        with suppress(FileNotFoundError):
            (self._mounts / id).rmdir()

    # ---- mounts

    def _mount(self, id: str, mount_label: str, *, read_only: bool, lasting: bool) -> Path:  # noqa: ARG002
        pool = self._pool()
        target = self._mounts / id
        target.mkdir(mode=0o700, exist_ok=True)
        options = f'context="{mount_label}"' if mount_label else ""
        mounted = pool.mount(id, target, read_only=read_only, options=options)
        if mounted.read_only and not read_only:
            pool.umount(id)
            pool.mount(id, target, options=options)
        return target

    def _unmount(self, id: str) -> None:
        target = self._mounts / id
        if not target.exists():
            return
        if mount.is_mounted(target):
            self._pool().umount(id)
        with suppress(FileNotFoundError):
            target.rmdir()

    def _unmount_abandoned(self) -> None:
        """Unmount the layers whose holders died without a put, but what somebody still uses."""
        for id in self._mounted():
            if not self._home.holders(id):
                with suppress(BusyError):
                    self._unmount(id)

    def _mounted(self) -> list[str]:
        """Return the layers that are mounted."""
        targets = [Path(entry.target) for entry in mount.mount_table()]
        return [target.name for target in targets if target.parent == self._mounts]

    # ---- the pool

    def _pool(self) -> PoolClient:
        """Return the connection to the pool's server, a new one if that has ended or we were forked."""
        client = self._client
        if client is None or client.closed or self._owner != os.getpid():
            client = self._client = pool_client.serve(self._pool_path, engine=self.engine)
            self._owner = os.getpid()
        return client

    def _layer_devices(self) -> list[RemoteDevice]:
        return [device for device in self._pool().devices() if _PARENT in device.labels]

    def _make_pool(self, size: Size | None, block_size: Size | None, preallocate: bool) -> None:
        if (
            not (self._pool_path / "catalog.db").exists()
            or (self._pool_path / "catalog.db.creating").exists()
        ):
            Pool.create(
                self._pool_path,
                size=_POOL_SIZE if size is None else size,
                block_size=_BLOCK_SIZE if block_size is None else block_size,
                engine=self.engine,
                preallocate=preallocate,
            ).close()
        elif block_size is not None and (found := self._pool().status().block_size) != parse_size(block_size):
            raise ArgumentError(
                f"the pool in {self.root} has blocks of {format_size(found)}: open it without, or"
                " take another root"
            )

    def _make_base(self) -> None:
        """Make the base device, or a new one in place of one that was never finished."""
        pool = self._pool()
        try:
            base = pool.device(_BASE)
            if _FILE_SYSTEM in base.labels:
                return
            base.delete()
        except DeviceNotFoundError:
            pass
        base = pool.create_device(_BASE, self._base_size)
        try:
            pool.make_file_system(base, self._filesystem)
            base.set_labels({_FILE_SYSTEM: self._filesystem})
        except BaseException:
            with suppress(BlocksnapError):
                base.delete()
            raise
