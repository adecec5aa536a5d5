"""The only importer of the compiled module: one check() turns a code of the C core into an exception."""

from typing import Any

from . import _blocksnap
from .errors import error_for

__all__ = ["check", "encode", "ffi", "file", "lib"]

ffi: Any = _blocksnap.ffi
lib: Any = _blocksnap.lib
file: str = _blocksnap.__file__ or ""


def check(code: int) -> int:
    """Return a non-negative code, raise the fitting error with the core's message for a negative one."""
    if code < 0:
        raise error_for(code, ffi.string(lib.bs_last_error()).decode(errors="replace"))
    return code


def encode(path: str | bytes) -> bytes:
    """Return a path as the bytes that the C core takes."""
    return path if isinstance(path, bytes) else path.encode(errors="surrogateescape")
