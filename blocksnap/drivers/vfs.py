"""The driver of last resort: each layer is a copy of its parent in a directory. Needs no privilege.

<root>/vfs/ID/tree      the layer
<root>/vfs/ID/parent    its parent's id
<root>/vfs/ID/copied    bytes of file contents that making it copied
"""

from pathlib import Path
from typing import ClassVar

from ..mount import sync_filesystem
from .base import Accounting
from .directory import DirectoryDriver, backing_filesystem
from .extents import own_bytes
from .root import read_number
from .tree_copy import copy_tree

__all__ = ["VfsDriver"]


class VfsDriver(DirectoryDriver):
    """Copies whose files share their blocks where the file system can (XFS, btrfs); full ones elsewhere."""

    name: ClassVar[str] = "vfs"

    def __init__(self, root: Path, *, reflink: bool = True) -> None:
        """Open the root; with reflink=False all that is copied from now on is copied in full."""
        super().__init__(root)
        self._reflink = reflink

    def status(self) -> list[tuple[str, str]]:
        return [
            ("Root", str(self.root)),
            ("Backing Filesystem", backing_filesystem(self.root)),
            ("Layers", str(len(self.layers()))),
            ("Copies", "reflink where possible" if self._reflink else "full"),
        ]

    def metadata(self, id: str) -> dict[str, str]:
        self._check_known(id)
        return {"Directory": str(self._tree(id))}

    def accounting(self, id: str) -> Accounting:
        """Tell what making the layer copied, and what it shares with no other, its own copies included."""
        self._check_known(id)
        copied = read_number(self._layers.path / id / "copied")
        return Accounting(copy_bytes=copied, allocated_bytes=own_bytes(self._tree(id)))

    def _snapshot(self, id: str, origin: str) -> None:
        self._copy(id, self.parent(origin), source=origin)

    def _create(self, id: str, parent: str | None, *, writable: bool) -> None:  # noqa: ARG002
        self._copy(id, parent, source=parent)

    def _copy(self, id: str, parent: str | None, *, source: str | None) -> None:
        with self._layers.new(id, parent) as staging:
            tree = staging / "tree"
            tree.mkdir(mode=0o755)
            tree.chmod(0o755)
            copied = copy_tree(self._tree(source), tree, reflink=self._reflink) if source else 0
            sync_filesystem(staging)
            (staging / "copied").write_text(f"{copied}\n")

    def _remove(self, id: str) -> None:
        self._layers.remove(id)

    def _mount(self, id: str, mount_label: str, *, read_only: bool, lasting: bool) -> Path:  # noqa: ARG002
        return self._tree(id)

    def _unmount(self, id: str) -> None:
        pass

    def _tree(self, id: str) -> Path:
        return self._layers.path / id / "tree"
