"""overlayfs's own form of a whiteout (character device 0/0) and of an opaque directory (an extended
attribute).

Source: Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories".
"""

import os
import stat

from .confined import descriptor_path

__all__ = ["is_whiteout", "make_whiteout", "mark_opaque"]

_OPAQUE_XATTR = "trusted.overlay.opaque"
_DEVICE = os.makedev(0, 0)


def is_whiteout(status: os.stat_result) -> bool:
    """Tell whether a status is a whiteout's."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == _DEVICE


def make_whiteout(directory: int, name: str) -> None:
    """Hide a name of the lower layers."""
    os.mknod(name, stat.S_IFCHR, _DEVICE, dir_fd=directory)


def mark_opaque(directory: int, name: str = "") -> None:
    """Hide all that lower layers have in a directory."""
    os.setxattr(descriptor_path(directory, name), _OPAQUE_XATTR, b"y", follow_symlinks=not name)
