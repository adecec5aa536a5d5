"""Docker's graphdriver interface: layers that are made from a parent, mounted, compared and filled from tars.

`Driver` is the public face and does what is the same for every driver: checks of ids and parents, one lock a
root, counted references, diffs by walking two mounted trees. A driver fills in the hooks (`_create`,
`_remove`, `_mount`, `_unmount`) and the questions (`exists`, `layers`, `parent`, `status`, `metadata`,
`accounting`), and overrides what it can do better (`diff`, `changes`, `snapshot`, `sync`).

What a hook may rely on: it runs under the root's lock, ids are well formed, `_create` gets a parent that
exists and an id that does not, `_remove` a layer without children that nobody holds and that was unmounted.
`_mount` and `_unmount` are asked more than once: a layer that is mounted already (by this process, another or
a killed one) is adopted, one that is not mounted is left alone. A `_create` that fails or is killed must
leave a root in which the id does not exist.
"""

import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, ClassVar, Self, cast

from .. import archive, mount
from ..errors import (
    ArgumentError,
    BusyError,
    LayerExistsError,
    LayerNotFoundError,
    NotSupportedError,
    system_errors,
)
from ..units import parse_size
from .root import DriverRoot, Holder

__all__ = ["Accounting", "Driver", "check_id", "is_id"]

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_SPOOL_IN_MEMORY = 8 << 20


def is_id(text: str) -> bool:
    """Tell whether a text can be the id of a layer."""
    return _ID.fullmatch(text) is not None


def check_id(id: str) -> str:
    """Return an id that is fit for a file name: up to 128 of A-Z a-z 0-9 . _ - without a dot in front."""
    if not is_id(id):
        raise ArgumentError(
            f'"{id}" cannot be a layer id: use up to 128 of A-Z a-z 0-9 . _ - and do not start with a dot'
        )
    return id


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """Bytes that a layer cost since it was made; None where the driver cannot know.

    filesystem_bytes   what the layer's own file system wrote to its block device
    data_bytes         of those, what reached data blocks as the file system wrote it
    copy_bytes         read and written again only because of copy-on-write granularity
    zero_filled_bytes  written as zeros around a partial first write
    metadata_bytes     the driver's own metadata
    allocated_bytes    space that the layer takes beyond its parents
    """

    filesystem_bytes: int | None = None
    data_bytes: int | None = None
    copy_bytes: int | None = None
    zero_filled_bytes: int | None = None
    metadata_bytes: int | None = None
    allocated_bytes: int | None = None


def _size_of(storage_opt: Mapping[str, str]) -> int | None:
    """Return the size that the storage options ask for, None when they do not."""
    if unknown := sorted(storage_opt.keys() - {"size"}):
        raise ArgumentError(f'there is no storage option "{unknown[0]}": the one there is is size')
    return parse_size(storage_opt["size"], "layer size") if "size" in storage_opt else None


class Driver(ABC):
    """Layers in one root directory. Several processes may open a root, each change takes its lock."""

    name: ClassVar[str]
    file_system: ClassVar[str] = "ext4"
    """What the root is put on where the driver is measured and tested."""
    deepest: ClassVar[int | None] = None
    """How many layers a chain may have; a further one is NotSupportedError."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).resolve()
        self._home = DriverRoot(self.root, self.name)

    def __str__(self) -> str:
        return self.name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - most drivers hold nothing open
        """Let go of what the driver holds open; layers stay mounted."""

    @classmethod
    def missing(cls, root: Path) -> str | None:  # noqa: ARG003 - the general driver needs nothing
        """Return why this driver cannot run at root on this machine, None when it can."""
        return None

    @classmethod
    def block_sizes(cls, wanted: Sequence[int]) -> Sequence[int | None]:  # noqa: ARG003 - the general driver has none
        """Return at which of the wanted block sizes the driver can be compared; one None if it has none.

        Raises ArgumentError for a size that its blocks cannot have anywhere.
        """
        return (None,)

    # ---- layers ----------------------------------------------------------------------------------

    def create(
        self, id: str, parent: str | None = None, *, storage_opt: Mapping[str, str] | None = None
    ) -> None:
        """Make a layer, empty or like its parent, to be filled by apply_diff and then to be a parent.

        The one storage option is Docker's {"size": "10G"}: no more than that shall fit into the layer, all
        that it shows of its parents included. Raises NotSupportedError where the driver cannot see to that.
        """
        self._new(id, parent, writable=False, storage_opt=storage_opt)

    def create_read_write(
        self, id: str, parent: str | None = None, *, storage_opt: Mapping[str, str] | None = None
    ) -> None:
        """Make a layer for a container to write to; storage options are those of `create`."""
        self._new(id, parent, writable=True, storage_opt=storage_opt)

    def snapshot(self, id: str, origin: str) -> None:
        """Make a layer with the parent and the present state of another, which goes on independently.

        Raises BusyError where a driver cannot do that while the origin is mounted.
        """
        self._check_new(id)
        self._check_known(origin)
        self._check_not_held(origin, "snapshot")
        parent = self.parent(origin)
        self.create_read_write(id, parent)
        try:
            with self.diff(origin, parent) as stream:
                self.apply_diff(id, parent, stream)
        except BaseException:
            self.remove(id)
            raise

    def remove(self, id: str) -> None:
        """Remove a layer; an unknown id is no error. Raises BusyError when it has children or is held."""
        check_id(id)
        with self._home.lock.hold(), system_errors(f"layer {id}"):
            if not self.exists(id):
                return
            if children := self.children(id):
                raise BusyError(f'layer "{id}" has the child "{children[0]}": remove that first')
            self._check_not_held(id, "remove")
            self._unmount(id)
            self._remove(id)
            self._home.drop_references(id)

    @abstractmethod
    def exists(self, id: str) -> bool:
        """Say whether a layer is there."""

    @abstractmethod
    def layers(self) -> list[str]:
        """Return the ids of all layers."""

    @abstractmethod
    def parent(self, id: str) -> str | None:
        """Return the id of a layer's parent."""

    def children(self, id: str) -> list[str]:
        return [layer for layer in self.layers() if self.parent(layer) == id]

    # ---- mounts ----------------------------------------------------------------------------------

    def get(self, id: str, mount_label: str = "", *, lasting: bool = False) -> Path:
        """Return the layer's root directory, mounted; each get wants its put.

        A layer that has children is mounted read-only where the driver can. The reference belongs to this
        process and ends with it, or, when lasting, to nobody: there is at most one such, and it stays until
        somebody puts it.
        """
        with self._home.lock.hold(), system_errors(f"layer {id}"):
            self._check_known(id)
            path = self._mount(id, mount_label, read_only=bool(self.children(id)), lasting=lasting)
            self._home.add_reference(id, lasting=lasting)
            return path

    def put(self, id: str) -> None:
        """Give back one get (of this process, else a lasting one); the last one unmounts."""
        check_id(id)
        with self._home.lock.hold(), system_errors(f"layer {id}"):
            if not self._home.drop_reference(id) and self.exists(id):
                self._unmount(id)

    @contextmanager
    def mounted(self, id: str) -> Iterator[Path]:
        """Get a layer for the length of a `with`."""
        path = self.get(id)
        try:
            yield path
        finally:
            self.put(id)

    def holders(self, id: str) -> list[str]:
        """Return who holds a layer mounted, in words."""
        return [str(holder) for holder in self._home.holders(check_id(id))]

    def is_lasting(self, id: str) -> bool:
        """Say whether a layer has a lasting reference."""
        return Holder.lasting() in self._home.holders(check_id(id))

    def cleanup(self) -> None:
        """Unmount everything of this root, but what another living process holds."""
        with self._home.lock.hold(), system_errors(str(self.root)):
            for id in self.layers():
                if not self._home.drop_references(id):
                    self._unmount(id)

    # ---- questions -------------------------------------------------------------------------------

    @abstractmethod
    def status(self) -> list[tuple[str, str]]:
        """Return what people should see of the driver, as rows of name and value."""

    @abstractmethod
    def metadata(self, id: str) -> dict[str, str]:
        """Return what is known about one layer: directories, devices."""

    @abstractmethod
    def accounting(self, id: str) -> Accounting:
        """Return what a layer cost so far."""

    # ---- contents --------------------------------------------------------------------------------

    def diff(self, id: str, parent: str | None = None) -> BinaryIO:
        """Return a layer's changes against a parent as an uncompressed tar, in a temporary file."""
        spool = cast(BinaryIO, tempfile.SpooledTemporaryFile(_SPOOL_IN_MEMORY, dir=str(self.root)))  # noqa: SIM115
        try:
            with self._pair(id, parent) as (old, new):
                archive.pack_diff(old, new, spool, unchanged=self._unchanged(id, parent))
            spool.seek(0)
        except BaseException:
            spool.close()
            raise
        return spool

    def changes(self, id: str, parent: str | None = None) -> list[archive.Change]:
        """Return the paths that were added, modified and deleted against a parent."""
        with self._pair(id, parent) as (old, new):
            return archive.changes(old, new, unchanged=self._unchanged(id, parent))

    def diff_size(self, id: str, parent: str | None = None) -> int:
        """Return how many bytes of file contents `diff` would hold."""
        with self._pair(id, parent) as (old, new):
            return archive.diff_size(old, new, unchanged=self._unchanged(id, parent))

    def apply_diff(self, id: str, parent: str | None, stream: BinaryIO) -> int:
        """Apply an uncompressed layer tar to a layer; return the bytes of file contents it brought.

        Applied to the mounted tree, so that names in the tar resolve through symbolic links and hard links of
        parents just as they will for a process in the container. After a failure the layer is half filled:
        remove it.
        """
        self._check_parent(id, parent)
        if children := self.children(id):
            raise BusyError(
                f'layer "{id}" has the child "{children[0]}" and cannot change: apply to a new layer'
            )
        with self.mounted(id) as path:
            return archive.apply_layer(stream, path).bytes

    def sync(self) -> None:
        """Make all layers durable."""
        with system_errors(str(self.root)):
            mount.sync_filesystem(self.root)

    # ---- hooks -----------------------------------------------------------------------------------

    @abstractmethod
    def _create(self, id: str, parent: str | None, *, writable: bool) -> None: ...

    def _unchanged(self, id: str, parent: str | None) -> archive.Unchanged | None:  # noqa: ARG002
        """Tell which inodes a mounted layer and a mounted parent have the same, None where nothing tells."""
        return None

    def _create_limited(self, id: str, parent: str | None, *, writable: bool, size: int) -> None:  # noqa: ARG002
        """Make a layer of limited size; for drivers that can."""
        raise NotSupportedError(
            f'driver "{self.name}" cannot limit layer "{id}" to a size: leave the size out, '
            "or take thin, btrfs or qcow2"
        )

    @abstractmethod
    def _remove(self, id: str) -> None: ...

    @abstractmethod
    def _mount(self, id: str, mount_label: str, *, read_only: bool, lasting: bool) -> Path: ...

    @abstractmethod
    def _unmount(self, id: str) -> None: ...

    # ---- checks ----------------------------------------------------------------------------------

    def _new(
        self, id: str, parent: str | None, *, writable: bool, storage_opt: Mapping[str, str] | None
    ) -> None:
        size = _size_of(storage_opt or {})
        with self._home.lock.hold(), system_errors(f"layer {id}"):
            self._check_new(id)
            if parent is not None and not self.exists(check_id(parent)):
                raise LayerNotFoundError(
                    f'layer "{id}" wants the parent "{parent}", which is not in {self.root}'
                )
            if size is None:
                self._create(id, parent, writable=writable)
            else:
                self._create_limited(id, parent, writable=writable, size=size)

    def _check_new(self, id: str) -> None:
        if self.exists(check_id(id)):
            raise LayerExistsError(
                f'layer "{id}" exists already in {self.root}: choose another id or remove it'
            )

    def _check_known(self, id: str) -> None:
        if not self.exists(check_id(id)):
            raise LayerNotFoundError(f'layer "{id}" is not in {self.root}')

    def _check_parent(self, id: str, parent: str | None) -> None:
        self._check_known(id)
        if parent != self.parent(id):
            raise ArgumentError(f'layer "{id}" has the parent {self.parent(id)!r}, not {parent!r}')

    def _check_not_held(self, id: str, verb: str) -> None:
        if holders := self._home.holders(id):
            raise BusyError(f'cannot {verb} layer "{id}": it is in use by {holders[0]}; unmount it first')

    @contextmanager
    def _pair(self, id: str, parent: str | None) -> Iterator[tuple[Path | None, Path]]:
        """Mount a parent, if there is one, and a layer."""
        if parent is None:
            with self.mounted(id) as new:
                yield None, new
            return
        with self.mounted(parent) as old, self.mounted(id) as new:
            yield old, new
