"""btrfs: each layer is a subvolume, a snapshot of its parent's.

<root>/btrfs/ID/tree      the layer
<root>/btrfs/ID/parent    its parent's id
<root>/btrfs/ID/size      the most that it may refer to, if that is limited
"""

from pathlib import Path
from typing import ClassVar

from ..file_system import may_mount
from .base import Accounting
from .directory import DirectoryDriver, backing_filesystem, remove_tree
from .extents import own_bytes
from .root import read_number
from .subvolume import (
    create_subvolume,
    destroy_subvolume,
    limit_subvolume,
    snapshot_subvolume,
    subvolume_id,
)

__all__ = ["BtrfsDriver"]


class BtrfsDriver(DirectoryDriver):
    """Subvolumes of the btrfs that holds the root directory."""

    name: ClassVar[str] = "btrfs"
    file_system: ClassVar[str] = "btrfs"

    @classmethod
    def missing(cls, root: Path) -> str | None:
        if not may_mount():
            return "needs root"
        if (kind := backing_filesystem(root)) != "btrfs":
            return f"{root} is on {kind}: take one on btrfs (apt install btrfs-progs; mkfs.btrfs)"
        return None

    def status(self) -> list[tuple[str, str]]:
        limited = [id for id in self.layers() if self._size_file(id).exists()]
        return [
            ("Root", str(self.root)),
            ("Backing Filesystem", backing_filesystem(self.root)),
            ("Layers", str(len(self.layers()))),
            ("Limited Layers", str(len(limited))),
        ]

    def metadata(self, id: str) -> dict[str, str]:
        """Return the subvolume's directory and number, and its limit in bytes if it has one."""
        self._check_known(id)
        found = {"Directory": str(self._tree(id)), "SubvolumeId": str(subvolume_id(self._tree(id)))}
        size = self._size_file(id)
        return found | ({"Size": str(read_number(size))} if size.exists() else {})

    def accounting(self, id: str) -> Accounting:
        """Tell what a layer shares with no other, its own children included.

        Nothing is copied: btrfs writes a changed block of 4 KiB to another place, and so much every file
        system writes of it.
        """
        self._check_known(id)
        return Accounting(copy_bytes=0, allocated_bytes=own_bytes(self._tree(id)))

    # ---- layers ----------------------------------------------------------------------------------

    def snapshot(self, id: str, origin: str) -> None:
        """Make a layer with the present state of another, in use or not, in one step."""
        with self._home.lock.hold():
            self._check_new(id)
            self._check_known(origin)
            self._snapshot(id, origin)

    def _snapshot(self, id: str, origin: str) -> None:
        size = self._size_file(origin)
        limit = read_number(size) if size.exists() else None
        self._make(id, self.parent(origin), source=origin, limit=limit)

    def _create(self, id: str, parent: str | None, *, writable: bool) -> None:  # noqa: ARG002
        self._make(id, parent, source=parent, limit=None)

    def _create_limited(self, id: str, parent: str | None, *, writable: bool, size: int) -> None:  # noqa: ARG002
        self._make(id, parent, source=parent, limit=size)

    def _make(self, id: str, parent: str | None, *, source: str | None, limit: int | None) -> None:
        with self._layers.new(id, parent) as layer:
            if source is None:
                create_subvolume(layer / "tree")
                (layer / "tree").chmod(0o755)
            else:
                snapshot_subvolume(self._tree(source), layer / "tree")
            if limit is not None:
                limit_subvolume(layer / "tree", limit)
                (layer / "size").write_text(str(limit))

    def _remove(self, id: str) -> None:
        self._layers.remove(id)

    def _take_apart(self, layer: Path) -> None:
        destroy_subvolume(layer / "tree")
        remove_tree(layer)

    def _mount(self, id: str, mount_label: str, *, read_only: bool, lasting: bool) -> Path:  # noqa: ARG002
        return self._tree(id)

    def _unmount(self, id: str) -> None:
        pass

    def _tree(self, id: str) -> Path:
        return self._layers.path / id / "tree"

    def _size_file(self, id: str) -> Path:
        return self._layers.path / id / "size"
