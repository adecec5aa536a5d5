"""Names of archive entries: cleaned as Docker cleans them, refused where no file system or reader agrees on
them.

These are rules of the format, not the confinement: that is the kernel's (confined.py).
"""

from ..errors import UnsafeLayerError

__all__ = ["OPAQUE", "WHITEOUT", "Parts", "is_aufs_metadata", "shown", "split_name", "whiteout_target"]

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
MAX_NAME = 4096
MAX_COMPONENT = 255

# What aufs keeps for itself; engines have always left it out of layers.
_AUFS_METADATA = (".wh..wh.aufs", ".wh..wh.orph", ".wh..wh.plnk")

Parts = tuple[str, ...]


def shown(name: str) -> str:
    """Return a name as it is printed in one line of text."""
    printable = name.encode("utf-8", "backslashreplace").decode()
    return repr(printable if len(printable) <= 200 else printable[:200] + "...")


def split_name(name: str) -> Parts:
    """Return the components below the root; () is the root itself.

    Absolute names start at the root, "." and ".." are taken out of the text. A name that climbs above the
    root, is empty, too long or holds NUL is refused.
    """
    if not name or "\0" in name:
        raise UnsafeLayerError("its name is empty or holds a NUL byte")
    if _length(name) > MAX_NAME:
        raise UnsafeLayerError(f"its name is longer than {MAX_NAME} bytes")
    parts: list[str] = []
    for component in name.split("/"):
        _step(parts, component)
    return tuple(parts)


def _step(parts: list[str], component: str) -> None:
    if component == "..":
        if not parts:
            raise UnsafeLayerError("its name climbs above the root")
        parts.pop()
    elif component not in ("", "."):
        if _length(component) > MAX_COMPONENT:
            raise UnsafeLayerError(f"a component of its name is longer than {MAX_COMPONENT} bytes")
        parts.append(component)


def _length(name: str) -> int:
    return len(name.encode("utf-8", "surrogateescape"))


def is_aufs_metadata(parts: Parts) -> bool:
    """Tell whether an entry is (in) one of the places that aufs keeps for itself."""
    return bool(parts) and parts[0] in _AUFS_METADATA


def whiteout_target(parts: Parts) -> str | None:
    """Return the name that a whiteout takes away (OPAQUE: everything beside it), None for any other entry."""
    if any(part.startswith(WHITEOUT) for part in parts[:-1]):
        raise UnsafeLayerError("it lies below a name that is reserved for whiteouts")
    if not parts or not parts[-1].startswith(WHITEOUT):
        return None
    if parts[-1] == OPAQUE:
        return OPAQUE
    target = parts[-1].removeprefix(WHITEOUT)
    if target in ("", ".", "..") or target.startswith(WHITEOUT):
        raise UnsafeLayerError("it is a whiteout of nothing")
    return target
