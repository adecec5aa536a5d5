"""Owner, mode, times and extended attributes: which of them belong to an image, how they are read and set."""

import errno
import os
import stat

from ..errors import NotSupportedError, UnsafeLayerError
from .confined import descriptor_path, open_entry

__all__ = [
    "belongs_to_image",
    "is_whiteout",
    "read_xattrs",
    "set_mode",
    "set_owner",
    "set_times",
    "set_xattrs",
]

# Host labels (SELinux, IMA), trusted.* and overlay's own marks say something about a host, never about an
# image, and a layer that could set overlay's marks could point into other layers.
_IMAGE_XATTRS = ("security.capability", "system.posix_acl_access", "system.posix_acl_default")
_FOREIGN_USER_XATTRS = ("user.overlay.",)


def is_whiteout(status: os.stat_result) -> bool:
    """Tell whether a status is that of overlayfs's own mark of a removed name, which no image holds."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(0, 0)


def belongs_to_image(xattr: str) -> bool:
    """Tell whether an extended attribute is part of an image."""
    if xattr.startswith("user."):
        return not xattr.startswith(_FOREIGN_USER_XATTRS)
    return xattr in _IMAGE_XATTRS


def read_xattrs(directory: int, name: str) -> dict[str, bytes]:
    """Return the image's extended attributes of a name in an open directory ("" is the directory itself)."""
    path = descriptor_path(directory, name)
    follow = not name
    try:
        names = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return {}
        raise
    return {
        xattr: os.getxattr(path, xattr, follow_symlinks=follow)
        for xattr in sorted(names)
        if belongs_to_image(xattr)
    }


def set_xattrs(directory: int, name: str, mode: int, xattrs: dict[str, bytes]) -> None:
    """Make the image's extended attributes of a name exactly these.

    What the kernel does not keep on this kind of file is left out. Call it after
    set_owner, which drops capabilities.
    """
    wanted = {key: value for key, value in xattrs.items() if belongs_to_image(key) and _possible(key, mode)}
    path = descriptor_path(directory, name)
    for xattr in read_xattrs(directory, name) if stat.S_ISDIR(mode) else ():
        if xattr not in wanted:
            os.removexattr(path, xattr, follow_symlinks=not name)
    for xattr, value in wanted.items():
        try:
            os.setxattr(path, xattr, value, follow_symlinks=not name)
        except OSError as error:
            if not (xattr == "security.capability" and error.errno == errno.EPERM and _ordinary_user()):
                raise _refusal(xattr, error) from None


def _refusal(xattr: str, error: OSError) -> Exception:
    if error.errno in (errno.EINVAL, errno.ERANGE, errno.E2BIG):
        return UnsafeLayerError(f"its attribute {xattr[:100]!r} is none that the kernel takes")
    if error.errno == errno.EOPNOTSUPP:
        return NotSupportedError(
            f"the file system keeps no attribute {xattr[:100]!r}: use ext4, xfs or btrfs"
        )
    return error


def _possible(xattr: str, mode: int) -> bool:
    """Tell whether the kernel keeps an attribute on what has this mode."""
    if xattr.startswith("user."):
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return not stat.S_ISLNK(mode)


def set_owner(directory: int, name: str, uid: int, gid: int) -> None:
    """Change the owner of the name itself; an ordinary user keeps what they make."""
    try:
        if name:
            os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
        else:
            os.chown(descriptor_path(directory), uid, gid)
    except OSError as error:
        # EINVAL: the user namespace has no such id
        if error.errno not in (errno.EPERM, errno.EINVAL) or not _ordinary_user():
            raise


def set_mode(directory: int, name: str, mode: int) -> None:
    """Change the mode of a name that is no symlink."""
    with open_entry(directory, name, os.O_PATH) as descriptor:
        os.chmod(descriptor_path(descriptor), stat.S_IMODE(mode))


def set_times(directory: int, name: str, mtime_ns: int) -> None:
    """Set the times of the name itself."""
    os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=directory, follow_symlinks=False)


def _ordinary_user() -> bool:
    return os.geteuid() != 0
