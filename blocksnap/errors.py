"""Errors of blocksnap: one tree, each leaf also the fitting builtin.

    BlocksnapError
    ├── NoSpaceError            OSError ENOSPC: pool, metadata or backing file system is full
    ├── BusyError               OSError EBUSY: in use by another process, mounted, open, or having children
    ├── DeviceExistsError       FileExistsError
    ├── DeviceNotFoundError     FileNotFoundError
    ├── PoolFormatError         ValueError: not a thin pool, or one this engine cannot run
    ├── DamagedMetadataError    OSError EILSEQ: checksum or structure of the metadata is wrong
    ├── NeedsCheckError         OSError EUCLEAN: the pool is read-only until it was checked
    ├── PrivilegeError          PermissionError
    ├── NotSupportedError       OSError EOPNOTSUPP: this machine, file system or engine cannot do it
    ├── ArgumentError           ValueError: a size, name or option that cannot be
    ├── DeviceIOError           OSError with the kernel's own errno
    ├── LayerExistsError        FileExistsError: image graph and drivers
    ├── LayerNotFoundError      FileNotFoundError
    ├── TraceError              ValueError: a block trace that cannot be read; names file, record and reason
    └── ImageError              ValueError: an image that cannot be taken
        ├── DigestError         content does not have its digest
        ├── MediaTypeError      an unknown media type
        ├── MissingParentError  a layer or manifest that is referred to but not there
        └── UnsafeLayerError    a layer that escapes its root or breaks the rules of the format

The message is one line that names the thing and the mend.
"""

import errno as _errno
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "ArgumentError",
    "BlocksnapError",
    "BusyError",
    "DamagedMetadataError",
    "DeviceExistsError",
    "DeviceIOError",
    "DeviceNotFoundError",
    "DigestError",
    "ImageError",
    "LayerExistsError",
    "LayerNotFoundError",
    "MediaTypeError",
    "MissingParentError",
    "NeedsCheckError",
    "NoSpaceError",
    "NotSupportedError",
    "PoolFormatError",
    "PrivilegeError",
    "TraceError",
    "UnsafeLayerError",
    "error_for",
    "system_errors",
]


class BlocksnapError(Exception):
    """Base of all errors that blocksnap raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class _SystemError(BlocksnapError, OSError):
    """An error with an errno; subclasses name their own."""

    code = _errno.EIO

    def __init__(self, message: str, code: int | None = None) -> None:
        OSError.__init__(self, code if code is not None else self.code, message)
        self.message = message


class NoSpaceError(_SystemError):
    code = _errno.ENOSPC


class BusyError(_SystemError):
    code = _errno.EBUSY


class DeviceExistsError(_SystemError, FileExistsError):
    code = _errno.EEXIST


class DeviceNotFoundError(_SystemError, FileNotFoundError):
    code = _errno.ENOENT


class PoolFormatError(BlocksnapError, ValueError):
    pass


class DamagedMetadataError(_SystemError):
    code = _errno.EILSEQ


class NeedsCheckError(_SystemError):
    code = _errno.EUCLEAN


class PrivilegeError(_SystemError, PermissionError):
    code = _errno.EPERM


class NotSupportedError(_SystemError):
    code = _errno.EOPNOTSUPP


class ArgumentError(BlocksnapError, ValueError):
    pass


class DeviceIOError(_SystemError):
    pass


class LayerExistsError(_SystemError, FileExistsError):
    code = _errno.EEXIST


class LayerNotFoundError(_SystemError, FileNotFoundError):
    code = _errno.ENOENT


class TraceError(BlocksnapError, ValueError):
    pass


class ImageError(BlocksnapError, ValueError):
    pass


class DigestError(ImageError):
    pass


class MediaTypeError(ImageError):
    pass


class MissingParentError(ImageError):
    pass


class UnsafeLayerError(ImageError):
    pass


_BY_ERRNO: dict[int, type[BlocksnapError]] = {
    _errno.ENOSPC: NoSpaceError,
    _errno.EDQUOT: NoSpaceError,
    _errno.EBUSY: BusyError,
    _errno.EEXIST: DeviceExistsError,
    _errno.ENODATA: DeviceNotFoundError,
    _errno.ENOENT: DeviceNotFoundError,
    _errno.EILSEQ: DamagedMetadataError,
    _errno.ENOTBLK: DamagedMetadataError,
    _errno.EUCLEAN: NeedsCheckError,
    _errno.EPERM: PrivilegeError,
    _errno.EACCES: PrivilegeError,
    _errno.EOPNOTSUPP: NotSupportedError,
    _errno.EMEDIUMTYPE: PoolFormatError,
    _errno.EINVAL: ArgumentError,
}


def error_for(code: int, message: str) -> BlocksnapError:
    """Return the exception for a negative errno of the C core and its message."""
    kind = _BY_ERRNO.get(-code, DeviceIOError)
    if kind is DeviceIOError:
        return DeviceIOError(message, -code)
    return kind(message)


@contextmanager
def system_errors(name: str) -> Iterator[None]:
    """Turn an OSError of the body into the fitting error, naming `name` or the file that the kernel named."""
    try:
        yield
    except (BlocksnapError, BrokenPipeError):
        raise
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else name
        raise error_for(-(error.errno or _errno.EIO), f"{named}: {error.strerror or error}") from error
