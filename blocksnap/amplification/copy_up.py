"""The model of copy-up: what overlayfs copies and writes when files of an image are changed.

The first change to a file, be it an open for writing or a change of owner or mode, copies the whole file into
the upper directory and syncs it; one that is truncated as it is opened is not copied. What is written then
goes to the copy alone. Semantics: Documentation/filesystems/overlayfs.rst of the kernel.

After its sync the copy's size is set, for which ext4 zeroes the rest of the last page: that page, if it is
not full, goes to the device once more, with the next sync or the next copy (seen with Linux 6.18).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["CopyUp"]


@dataclass(slots=True)
class CopyUp:
    """The files of an image and of a container on it, by name; sizes in bytes, pages of the page cache.

    copied_bytes    what was copied up
    device_bytes    what the file system below wrote to its device as contents of files: whole pages, each
                    once for every sync that finds it changed
    """

    lower: Mapping[str, int]
    page: int = 4096
    upper: dict[str, int] = field(default_factory=dict)
    copied_bytes: int = 0
    device_bytes: int = 0
    _changed: dict[str, set[int]] = field(default_factory=dict)
    _ends: dict[str, int] = field(default_factory=dict)

    @property
    def upper_bytes(self) -> int:
        """The sum of the sizes of the files in the upper directory."""
        return sum(self.upper.values())

    def open_for_writing(self, name: str, *, truncate: bool = False) -> None:
        """Open a file, or make one that is not there."""
        if truncate:
            self.upper[name] = 0
            self._changed.pop(name, None)
        elif name in self.lower:
            self.change_attributes(name)
        else:
            self.upper.setdefault(name, 0)

    def change_attributes(self, name: str) -> None:
        """Change the owner, the mode or the times of a file."""
        if name in self.upper:
            return
        size = self.upper[name] = self.lower[name]
        self.copied_bytes += size
        self.device_bytes += (-(-size // self.page) + len(self._ends)) * self.page
        self._ends = {name: size // self.page} if size % self.page else {}

    def write(self, name: str, offset: int, length: int) -> None:
        """Write to a file that was opened for it."""
        end = self.upper[name]
        changed = self._changed.setdefault(name, set())
        changed.update(range(offset // self.page, -(-(offset + length) // self.page)))
        if offset > end and end % self.page:
            changed.add(end // self.page)  # zeros from the former end to the end of its page
        self.upper[name] = max(end, offset + length)

    def sync(self) -> None:
        """Write the changed pages of all files to the device."""
        for name, page in self._ends.items():
            self._changed.setdefault(name, set()).add(page)
        self._ends.clear()
        self.device_bytes += sum(len(pages) for pages in self._changed.values()) * self.page
        self._changed.clear()
