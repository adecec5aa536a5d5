"""qcow2 as a peer: each layer is an image that is backed by its parent's, with an ext4 on it.

<root>/base.qcow2            an empty ext4, what layers without a parent are backed by
<root>/qcow2/ID/layer.qcow2  the layer; names its parent's image by a relative path
<root>/qcow2/ID/export       the image as a file: the mount point of qemu-storage-daemon's FUSE export
<root>/qcow2/ID/mounted      where the layer is mounted
<root>/qcow2/ID/grow         there while the image has grown and the ext4 on it has not
<root>/qcow2/ID/parent       the parent's id

One daemon serves each mounted layer; a loop device with direct I/O stands on the export. Two defects of the
export in qemu 7.2 corrupt an ext4 above it; it is kept from both. A hole to be punched, which is how the loop
device has zeros written, is taken for a discard, which leaves old contents in what is no whole cluster: a
filter answers that holes cannot be punched, so that the kernel writes zeros. A write that comes while another
one waits overwrites its data: the kernel is made to send one at a time.
"""

import errno
import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from .. import mount
from ..errors import ArgumentError, BlocksnapError, BusyError
from ..file_system import find_program, grow_ext4, make_file_system, may_mount
from ..units import Size, format_size, parse_size
from .base import Accounting
from .directory import DirectoryDriver, backing_filesystem
from .loop_counter import LoopCounter
from .mount_server import MountServer
from .root import fsync_directory
from .tree_copy import copy_contents

__all__ = ["DAEMON", "Qcow2Driver"]

DAEMON = "qemu-storage-daemon"
_PACKAGES = {DAEMON: "qemu-system-common", "qemu-img": "qemu-utils", "mke2fs": "e2fsprogs"}
_CLUSTER = 64 << 10
_MIN_CLUSTER, _MAX_CLUSTER, _MIN_EXTENDED = 512, 2 << 20, 16 << 10
_DETACH_SECONDS = 5.0


class Qcow2Driver(DirectoryDriver):
    """A chain of qcow2 images, run by qemu-storage-daemon."""

    name: ClassVar[str] = "qcow2"

    def __init__(
        self,
        root: Path,
        *,
        block_size: Size = _CLUSTER,
        extended_l2: bool = False,
        base_size: Size = "10G",
    ) -> None:
        """Open the root.

        block_size is the cluster size of layers made from now on, a power of two from 512 to 2M;
        extended_l2 divides each cluster into 32 that are copied one by one. base_size is the size of the
        file system of a new root's layers.
        """
        super().__init__(root)
        self._cluster = parse_size(block_size, "cluster size")
        self._extended = extended_l2
        least = _MIN_EXTENDED if extended_l2 else _MIN_CLUSTER
        if not least <= self._cluster <= _MAX_CLUSTER or self._cluster & (self._cluster - 1):
            raise ArgumentError(
                f"clusters of {self._cluster} bytes: take a power of two from {format_size(least)} to 2M"
            )
        self._base = self.root / "base.qcow2"
        with self._home.lock.hold():
            if not self._base.exists():
                _make_base(self._base, parse_size(base_size, "base size"))
            self._unmount_abandoned()

    @classmethod
    def missing(cls, root: Path) -> str | None:  # noqa: ARG003 - the root's file system does not matter
        if not may_mount():
            return "needs root"
        for device, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
            if not os.access(device, os.R_OK | os.W_OK):
                return f"needs {device}: modprobe {module}; in a container: --privileged"
        for program, package in _PACKAGES.items():
            if find_program(program) is None:
                return f"{program} is not installed: apt install {package}"
        return None

    @classmethod
    def block_sizes(cls, wanted: Sequence[int]) -> Sequence[int | None]:  # noqa: ARG003 - the peer as it is used
        return (_CLUSTER,)

    # ---- questions -------------------------------------------------------------------------------

    def status(self) -> list[tuple[str, str]]:
        return [
            ("Root", str(self.root)),
            ("Backing Filesystem", backing_filesystem(self.root)),
            ("Layers", str(len(self.layers()))),
            ("Cluster Size", str(self._cluster)),
            ("Extended L2", "yes" if self._extended else "no"),
            ("Direct I/O", "yes" if self._direct_io() else "no"),
        ]

    def metadata(self, id: str) -> dict[str, str]:
        """Return the image, its virtual size, what backs it; if mounted, MountPoint and LoopDevice."""
        self._check_known(id)
        parent = self.parent(id)
        found = {
            "File": str(self._image(id)),
            "DeviceSize": str(_virtual_size(self._image(id))),
            "BackingFile": str(self._image(parent) if parent else self._base),
        }
        for loop in mount.loop_devices(below=self._export(id)):
            found |= {"MountPoint": str(self._mounted(id)), "LoopDevice": loop.path}
        return found

    def accounting(self, id: str) -> Accounting:
        """Tell what the layer's file system wrote, and the space of the image.

        What qemu copies it does not count, nor the tables it writes.
        """
        self._check_known(id)
        written = self._counter(id).total()
        allocated = self._image(id).stat().st_blocks * 512
        return Accounting(filesystem_bytes=written, data_bytes=written, allocated_bytes=allocated)

    # ---- layers ----------------------------------------------------------------------------------

    def _snapshot(self, id: str, origin: str) -> None:
        with self._layers.new(id, self.parent(origin)) as layer:
            _prepare(layer)
            with self._image(origin).open("rb") as old, (layer / "layer.qcow2").open("wb") as new:
                copy_contents(old.fileno(), new.fileno(), reflink=True)

    def _create(self, id: str, parent: str | None, *, writable: bool) -> None:  # noqa: ARG002
        self._make(id, parent, None)

    def _create_limited(self, id: str, parent: str | None, *, writable: bool, size: int) -> None:  # noqa: ARG002
        least = _virtual_size(self._image(parent) if parent else self._base)
        if size < least or size % 4096:
            raise ArgumentError(
                f'layer "{id}" begins with {least} bytes and cannot be limited to {size}: take more, in steps'
                " of 4096"
            )
        self._make(id, parent, size)
        self._mount(id, "", read_only=False, lasting=False)
        self._unmount(id)

    def _make(self, id: str, parent: str | None, size: int | None) -> None:
        if parent is not None:
            self._settle_parent(parent, id, self._mounted(parent))
        backing = f"../{parent}/layer.qcow2" if parent else "../../base.qcow2"
        options = f"cluster_size={self._cluster},extended_l2={'on' if self._extended else 'off'}"
        with self._layers.new(id, parent) as layer:
            _prepare(layer)
            sizes = [] if size is None else [str(size)]
            command = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, "-o", options]
            _qemu_img([*command, "layer.qcow2", *sizes], layer)
            if size is not None:
                (layer / "grow").touch()

    def _remove(self, id: str) -> None:
        self._layers.remove(id)

    # ---- mounts ----------------------------------------------------------------------------------

    def _mount(self, id: str, mount_label: str, *, read_only: bool, lasting: bool) -> Path:  # noqa: ARG002
        mounted = self._mounted(id)
        if mount.is_mounted(mounted) and self._server(id).is_running():
            return mounted
        self._unmount(id)
        try:
            self._start(id, read_only=read_only)
            self._mount_export(id, mount_label, read_only=read_only)
        except BaseException:
            self._unmount(id)
            raise
        return mounted

    def _start(self, id: str, *, read_only: bool) -> None:
        """Let a daemon show the image as a file."""
        common = {"cache": {"direct": self._direct_io()}, "read-only": read_only}
        file = {"driver": "file", "node-name": "file", "filename": "layer.qcow2", **common}
        image = {"driver": "qcow2", "node-name": "image", "file": "file", **common}
        no_holes = {"event": "none", "iotype": "discard", "errno": errno.ENOSYS}
        layer = {"driver": "blkdebug", "node-name": "layer", "image": "image", "inject-error": [no_holes]}
        command = [find_program(DAEMON) or DAEMON]
        for block in (file, image, {**layer, "discard": "unmap", **common}):
            command += ["--blockdev", json.dumps(block)]
        export = {"type": "fuse", "id": "layer", "node-name": "layer", "mountpoint": self._export(id).name}
        command += ["--export", json.dumps({**export, "writable": not read_only, "growable": False})]
        server = self._server(id)
        server.start([*command, "--pidfile", self._pid_file(id)], cwd=self._layers.path / id)
        server.take_one_at_a_time()

    def _mount_export(self, id: str, mount_label: str, *, read_only: bool) -> None:
        options = [f'context="{mount_label}"'] if mount_label else []
        if read_only:
            options.append("noload")
        loop = mount.LoopDevice.attach(self._export(id), read_only=read_only, direct_io=True, autoclear=True)
        try:
            if not read_only and (grow := self._layers.path / id / "grow").exists():
                grow_ext4(loop.path)
                grow.unlink()
            self._counter(id).begin(loop)
            mount.mount(loop.path, self._mounted(id), "ext4", read_only=read_only, options=",".join(options))
        finally:
            # It is the mount's from now on: it goes with it, or now if there is none.
            with suppress(BusyError):
                loop.detach(0)

    def _unmount(self, id: str) -> None:
        if not self._server(id).is_running():
            self._end_dead(id)
            return
        loops = mount.loop_devices(below=self._export(id))
        with self._counter(id).ending(loops):
            if mount.is_mounted(self._mounted(id)):
                mount.unmount(self._mounted(id))
        for loop in loops:
            loop.detach(_DETACH_SECONDS)
        self._server(id).terminate()

    def _end_dead(self, id: str) -> None:
        """Take down what stands on an export that nobody serves any more."""
        server = self._server(id)
        if server.is_mounted():
            server.abort()
        if mount.is_mounted(self._mounted(id)):
            mount.unmount(self._mounted(id), lazy=True)
        for loop in mount.loop_devices(below=self._export(id)):
            with suppress(BusyError):
                loop.detach(_DETACH_SECONDS)
        server.unmount_dead()
        self._counter(id).lose()

    def _server(self, id: str) -> MountServer:
        return MountServer(DAEMON, self._export(id), self._pid_file(id))

    def _direct_io(self) -> bool:
        """Say whether the file system of the root takes direct I/O."""
        try:
            os.close(os.open(self._base, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
        except OSError:
            return False
        return True

    # ---- names -----------------------------------------------------------------------------------

    def _image(self, id: str) -> Path:
        return self._layers.path / id / "layer.qcow2"

    def _export(self, id: str) -> Path:
        return self._layers.path / id / "export"

    def _pid_file(self, id: str) -> str:
        return str(self._layers.path / id / "pid")

    def _mounted(self, id: str) -> Path:
        return self._layers.path / id / "mounted"

    def _counter(self, id: str) -> LoopCounter:
        return LoopCounter(self._layers.path / id / "written")


def _prepare(layer: Path) -> None:
    (layer / "export").touch(mode=0o600)
    (layer / "mounted").mkdir(mode=0o700)


def _make_base(path: Path, size: int) -> None:
    """Make the image with the empty file system, or nothing."""
    raw, fresh = path.with_name(".base.raw"), path.with_name(".base.new")
    with raw.open("wb") as file:
        file.truncate(size)
    try:
        make_file_system(raw, "ext4")
        _qemu_img(["convert", "-f", "raw", "-O", "qcow2", raw.name, fresh.name], path.parent)
        with fresh.open("rb") as image:
            os.fsync(image.fileno())
        fresh.rename(path)
        fsync_directory(path.parent)
    finally:
        raw.unlink()


def _qemu_img(arguments: list[str], directory: Path) -> str:
    command = [find_program("qemu-img") or "qemu-img", *arguments]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        raise BlocksnapError(
            f"qemu-img {arguments[0]} failed in {directory}: {' '.join(done.stderr.split())}"
        )
    return done.stdout


def _virtual_size(image: Path) -> int:
    said = _qemu_img(["info", "-U", "--output=json", image.name], image.parent)
    return int(json.loads(said)["virtual-size"])
