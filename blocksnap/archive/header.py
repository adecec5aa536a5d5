"""The entries of a layer tar: ustar, GNU and PAX headers read strictly.

The standard library parses the 512 bytes of a header; its TarFile is not used, because it takes a damaged
header in the middle for the end of the archive, trusts the lengths of PAX records and reads extension
headers of any size.
"""

import enum
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UnsafeLayerError
from .names import shown
from .pax import Records, parse_records, parse_seconds
from .sparse import SparseMap, old_gnu_map, pax_map
from .stream import TarStream

__all__ = ["Entry", "Kind", "read_entries"]

MAX_EXTENSION = 1 << 20  # bytes of one PAX or long-name header: Go's archive/tar takes no more
MAX_EXTENSIONS = 32  # in front of one entry
_MAX_ID = 2**32 - 2  # 2**32 - 1 means "leave it" to chown
_MAX_SECONDS = 2**62
_GNU_MAGIC = b"ustar  \0"
_ENCODING = ("utf-8", "surrogateescape")


class Kind(enum.Enum):
    """What an entry makes."""

    FILE = "file"
    HARD_LINK = "hard link"
    SYMLINK = "symlink"
    CHARACTER = "character device"
    BLOCK_DEVICE = "block device"
    DIRECTORY = "directory"
    FIFO = "fifo"


_KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.AREGTYPE: Kind.FILE,
    tarfile.CONTTYPE: Kind.FILE,
    tarfile.GNUTYPE_SPARSE: Kind.FILE,
    tarfile.LNKTYPE: Kind.HARD_LINK,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.CHRTYPE: Kind.CHARACTER,
    tarfile.BLKTYPE: Kind.BLOCK_DEVICE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.FIFOTYPE: Kind.FIFO,
}


@dataclass(slots=True)
class Entry:
    """One entry, its name and link as the archive spells them; stored bytes of payload begin at offset."""

    name: str
    kind: Kind
    link: str
    size: int
    stored: int
    offset: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    device: tuple[int, int]
    xattrs: dict[str, bytes]
    sparse: SparseMap | None


def read_entries(stream: TarStream, max_entries: int) -> Iterator[Entry]:
    """Yield the entries of a tar; the caller takes or skips the payload of each before the next.

    The stream is read to its end. An end mark is not asked for, since builders exist that write none (umoci
    insert): that nothing is missing behind the last entry is for digests to tell. Raises UnsafeLayerError
    for anything that is not a whole, sound archive.
    """
    count = 0
    while (entry := _next_entry(stream)) is not None:
        count += 1
        if count > max_entries:
            raise UnsafeLayerError(
                f"the layer has more than {max_entries} entries: raise the limit if it is meant"
            )
        yield entry
        _skip_payload(stream, entry)
    stream.drain()


def _skip_payload(stream: TarStream, entry: Entry) -> None:
    stream.skip(entry.offset + entry.stored - stream.position, shown(entry.name))
    stream.skip_padding()


def _next_entry(stream: TarStream) -> Entry | None:
    extensions = _Extensions()
    for _ in range(MAX_EXTENSIONS):
        block = stream.read_block("a header")
        if not block and not stream.position:
            raise UnsafeLayerError("the archive is empty: not even an end mark is there")
        if not block.strip(b"\0"):
            extensions.expect_none()
            return None
        header = _parse(block)
        if not extensions.take(header, stream):
            return _entry(header, block, extensions, stream)
    raise UnsafeLayerError(f"more than {MAX_EXTENSIONS} extension headers in a row")


def _parse(block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, *_ENCODING)
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        raise UnsafeLayerError(f"the archive has a damaged header ({error})") from None
    name = _text(block[:100])
    # In GNU's own format times are where ustar keeps a prefix; and a directory "/" must not lose its slash.
    if block[257:265] == _GNU_MAGIC or not name.strip("/"):
        header.name = name
    return header


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(*_ENCODING)


class _Extensions:
    """What headers of the types x, g, L and K say about the entry behind them."""

    def __init__(self) -> None:
        self.records = Records()
        self.name: str | None = None
        self.link: str | None = None
        self._seen = False

    def take(self, header: tarfile.TarInfo, stream: TarStream) -> bool:
        """Read an extension header; False for any other."""
        match header.type:
            case tarfile.XHDTYPE | tarfile.SOLARIS_XHDTYPE:
                self.records.update(parse_records(_payload(header, stream)))
            case (
                tarfile.XGLTYPE
            ):  # global defaults: comments in practice, and no engine applies them to layers
                parse_records(_payload(header, stream))
                return True
            case tarfile.GNUTYPE_LONGNAME:
                self.name = _payload(header, stream).rstrip(b"\0").decode(*_ENCODING)
            case tarfile.GNUTYPE_LONGLINK:
                self.link = _payload(header, stream).rstrip(b"\0").decode(*_ENCODING)
            case _:
                return False
        self._seen = True
        return True

    def expect_none(self) -> None:
        """Refuse an archive that ends between an extension header and its entry."""
        if self._seen:
            raise UnsafeLayerError("the archive is truncated behind an extension header: fetch it again")


def _payload(header: tarfile.TarInfo, stream: TarStream) -> bytes:
    if not 0 <= header.size <= MAX_EXTENSION:
        raise UnsafeLayerError(
            f"an extension header of {header.size} bytes; at most {MAX_EXTENSION} are taken"
        )
    data = stream.read(header.size, "an extension header")
    stream.skip_padding()
    return data


def _entry(header: tarfile.TarInfo, block: bytes, extensions: _Extensions, stream: TarStream) -> Entry:
    records = extensions.records
    name = records.text("GNU.sparse.name") or records.text("path") or extensions.name or header.name
    try:
        return _described(name, header, block, extensions, stream)
    except UnsafeLayerError as error:
        raise UnsafeLayerError(f"layer entry {shown(name)}: {error}") from None


def _described(
    name: str, header: tarfile.TarInfo, block: bytes, extensions: _Extensions, stream: TarStream
) -> Entry:
    records = extensions.records
    kind = _KINDS.get(header.type)
    if kind is None:
        raise UnsafeLayerError(f"its type {header.type.decode('latin-1')!r} is unknown")
    size = _checked("size", _override(records.number("size"), header.size), 2**63 - 1)
    stored = size if kind is Kind.FILE else 0  # other kinds have no payload, whatever their header says
    sparse = _sparse(header, block, records, stream, stored)
    if sparse is not None:
        stored -= sparse.consumed
        sparse.check(stored)
    return Entry(
        name=name,
        kind=kind,
        link=records.text("linkpath") or extensions.link or header.linkname,
        size=_checked("size", sparse.size, 2**63 - 1) if sparse else stored,
        stored=stored,
        offset=stream.position,
        mode=header.mode & 0o7777,
        uid=_checked("owner", _override(records.number("uid"), header.uid), _MAX_ID),
        gid=_checked("group", _override(records.number("gid"), header.gid), _MAX_ID),
        mtime_ns=_mtime(records, header),
        device=(header.devmajor, header.devminor),
        xattrs=records.xattrs(),
        sparse=sparse,
    )


def _sparse(
    header: tarfile.TarInfo, block: bytes, records: Records, stream: TarStream, stored: int
) -> SparseMap | None:
    if header.type == tarfile.GNUTYPE_SPARSE:
        return old_gnu_map(block, stream)
    if _KINDS[header.type] is Kind.FILE:
        return pax_map(records, stream, stored)
    return None


def _override(value: int | None, default: int) -> int:
    return default if value is None else value


def _checked(what: str, value: int, highest: int) -> int:
    if 0 <= value <= highest:
        return value
    raise UnsafeLayerError(f"its {what} {value} is out of range")


def _mtime(records: Records, header: tarfile.TarInfo) -> int:
    text = records.text("mtime")
    nanoseconds = int(header.mtime) * 1_000_000_000 if text is None else parse_seconds(text)
    if abs(nanoseconds) > _MAX_SECONDS * 1_000_000_000:
        raise UnsafeLayerError("its mtime is out of range")
    return nanoseconds
