"""Layer tars that must be refused, built byte by byte: no library writes such headers."""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = [
    "CHARACTER",
    "END",
    "HARD_LINK",
    "Hostile",
    "directory",
    "file",
    "header",
    "hostile_layers",
    "link",
    "pax",
    "records",
    "sparse_1_0",
    "sparse_old",
    "tar",
]

BLOCK = 512
END = bytes(2 * BLOCK)

FILE, HARD_LINK, SYMLINK, CHARACTER, DEVICE, DIRECTORY = b"0", b"1", b"2", b"3", b"4", b"5"


@dataclass(frozen=True)
class Hostile:
    """A layer that is refused; says is a part of the message."""

    name: str
    data: bytes
    says: str


def header(
    name: bytes,
    kind: bytes = FILE,
    *,
    size: int | bytes = 0,
    link: bytes = b"",
    mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0",
    device: tuple[int, int] = (0, 0),
    tail: bytes = b"",
) -> bytes:
    """Return one ustar header with a right checksum; tail goes where ustar has the prefix."""
    length = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(BLOCK)
    fields = (
        (0, name[:100]),
        (100, mode),
        (108, uid),
        (116, b"0000000\0"),
        (124, length),
        (136, b"14000000000\0"),
        (156, kind),
        (157, link[:100]),
        (257, b"ustar\00000"),
        (329, b"%07o\0" % device[0]),
        (337, b"%07o\0" % device[1]),
        (345, tail),
    )
    for at, value in fields:
        block[at : at + len(value)] = value
    return seal(block)


def seal(block: bytearray) -> bytes:
    """Write the checksum of a header into it."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Return bytes filled up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def file(name: bytes, data: bytes = b"") -> bytes:
    """Return a regular file."""
    return header(name, size=len(data)) + padded(data)


def link(name: bytes, target: bytes, kind: bytes = SYMLINK) -> bytes:
    """Return a symlink or hard link."""
    return header(name, kind, link=target)


def directory(name: bytes) -> bytes:
    """Return a directory."""
    return header(name, DIRECTORY, mode=b"0000755\0")


def records(*pairs: tuple[bytes, bytes]) -> bytes:
    """Return PAX records with right lengths."""
    text = b""
    for key, value in pairs:
        body = b" " + key + b"=" + value + b"\n"
        length = len(body) + 1
        while len(b"%d" % length) + len(body) != length:
            length += 1
        text += b"%d" % length + body
    return text


def pax(text: bytes, kind: bytes = b"x") -> bytes:
    """Return an extended header."""
    return header(b"pax", kind, size=len(text)) + padded(text)


def tar(*entries: bytes) -> bytes:
    """Return an archive."""
    return b"".join(entries) + END


def sparse_1_0(lines: bytes, data: bytes, size: int) -> bytes:
    """Return a sparse file in the form 1.0."""
    about = records(
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", b"s"),
        (b"GNU.sparse.realsize", b"%d" % size),
    )
    return pax(about) + file(b"s", padded(lines) + data)


def sparse_old(segments: list[tuple[int, int]], size: int, stored: bytes) -> bytes:
    """Return a sparse file in GNU's old form."""
    block = bytearray(header(b"s", b"S", size=len(stored)))
    block[257:265] = b"ustar  \0"
    for at, (offset, length) in enumerate(segments):
        block[386 + 24 * at : 410 + 24 * at] = b"%011o\0%011o\0" % (offset, length)
    block[483:495] = b"%011o\0" % size
    return seal(block) + padded(stored)


def hostile_layers(outside: bytes) -> Iterator[Hostile]:
    """Yield layers that try to reach the directory outside (absolute) or break the rules of the format."""
    for part in (_names(), _links(outside), _whiteouts(), _sparse(), _numbers(), _extensions(), _broken()):
        yield from part


def _names() -> Iterator[Hostile]:
    climbs = "climbs above the root"
    yield Hostile("dot-dot", tar(file(b"../escape", b"x")), climbs)
    yield Hostile("dot-dot-later", tar(directory(b"a"), file(b"a/../../escape", b"x")), climbs)
    yield Hostile("dot-dot-absolute", tar(file(b"/../escape", b"x")), climbs)
    yield Hostile("dot-dot-directory", tar(directory(b"../escape")), climbs)
    yield Hostile("dot-dot-symlink", tar(link(b"../escape", b"x")), climbs)
    yield Hostile("dot-dot-device", tar(header(b"../escape", CHARACTER, device=(1, 3))), climbs)
    yield Hostile("dot-dot-in-pax", tar(pax(records((b"path", b"../escape"))), file(b"a", b"x")), climbs)
    yield Hostile("root-is-symlink", tar(link(b".", b"/tmp"), file(b"x")), "must be a directory")
    yield Hostile("root-is-file", tar(file(b"./", b"x")), "must be a directory")
    yield Hostile("root-is-hard-link", tar(link(b"/", b"etc", HARD_LINK)), "must be a directory")
    yield Hostile("root-by-dots", tar(directory(b"a"), link(b"a/..", b"/tmp")), "must be a directory")
    yield Hostile("name-empty", tar(file(b"", b"x")), "empty")
    yield Hostile("name-with-nul", tar(pax(records((b"path", b"a\0b"))), file(b"a")), "NUL")
    yield Hostile("component-too-long", tar(pax(records((b"path", b"x" * 256))), file(b"a")), "255 bytes")
    yield Hostile("name-too-long", tar(pax(records((b"path", b"d/" * 2049))), file(b"a")), "4096 bytes")
    yield Hostile("below-a-file", tar(file(b"a", b"x"), file(b"a/b", b"x")), "not a directory")
    yield Hostile("symlink-loop", tar(link(b"a", b"b"), link(b"b", b"a"), file(b"a/x")), "symbolic links")


def _links(outside: bytes) -> Iterator[Hostile]:
    def hard(name: bytes, target: bytes) -> bytes:
        return link(name, target, HARD_LINK)

    yield Hostile("hard-link-dot-dot", tar(hard(b"h", b"../secret")), "climbs above the root")
    yield Hostile("hard-link-absolute", tar(hard(b"h", outside + b"/secret")), "not there")
    yield Hostile("hard-link-missing", tar(hard(b"h", b"nothing")), "not there")
    yield Hostile("hard-link-forward", tar(hard(b"h", b"later"), file(b"later")), "not there")
    yield Hostile("hard-link-to-directory", tar(directory(b"d"), hard(b"h", b"d")), "the directory")
    yield Hostile("hard-link-to-root", tar(hard(b"h", b".")), "to the root")
    yield Hostile("hard-link-to-itself", tar(file(b"h", b"x"), hard(b"h", b"h")), "to itself")
    through = tar(link(b"l", outside), hard(b"h", b"l/secret"))
    yield Hostile("hard-link-through-symlink", through, "not there")
    relative = tar(link(b"l", b"../" * 30 + outside.lstrip(b"/")), hard(b"h", b"l/secret"))
    yield Hostile("hard-link-through-dots", relative, "not there")
    inside = tar(directory(b"d"), file(b"d/f", b"x"), hard(b"d", b"d/f"))
    yield Hostile("hard-link-replaces-its-target", inside, "not there")
    yield Hostile("symlink-to-nothing", tar(link(b"l", b"")), "target of the symlink")
    nul = tar(pax(records((b"linkpath", b"a\0b"))), link(b"l", b"x"))
    yield Hostile("symlink-with-nul", nul, "target of the symlink")
    long = tar(pax(records((b"linkpath", b"x" * 5000))), link(b"l", b"x"))
    yield Hostile("symlink-too-long", long, "name too long")


def _whiteouts() -> Iterator[Hostile]:
    for name in (b".wh.", b".wh..", b".wh...", b"d/.wh..", b".wh..wh.x"):
        yield Hostile(f"whiteout {name.decode()}", tar(directory(b"d"), file(name)), "whiteout of nothing")
    rule = "must be an empty regular file"
    yield Hostile("whiteout-with-content", tar(file(b".wh.x", b"content")), rule)
    yield Hostile("whiteout-directory", tar(directory(b".wh.x")), rule)
    yield Hostile("whiteout-symlink", tar(link(b".wh.x", b"/etc")), rule)
    yield Hostile("whiteout-hard-link", tar(file(b"a"), link(b".wh.x", b"a", HARD_LINK)), rule)
    yield Hostile("opaque-directory", tar(directory(b".wh..wh..opq")), rule)
    yield Hostile("whiteout-outside", tar(file(b"../.wh.secret")), "climbs above the root")
    yield Hostile("opaque-outside", tar(file(b"../.wh..wh..opq")), "climbs above the root")
    yield Hostile("below-a-whiteout", tar(file(b".wh.d/x", b"x")), "reserved for whiteouts")
    overlay = tar(header(b"gone", CHARACTER, device=(0, 0)))
    yield Hostile("whiteout-of-overlay", overlay, "whiteout")


def _sparse() -> Iterator[Hostile]:
    data = bytes(BLOCK)
    overlap = sparse_1_0(b"2\n0\n300\n200\n212\n", data, 4096)
    yield Hostile("sparse-overlap", tar(overlap), "overlaps")
    backwards = sparse_1_0(b"2\n1000\n256\n0\n256\n", data, 4096)
    yield Hostile("sparse-backwards", tar(backwards), "backwards")
    yield Hostile("sparse-beyond-size", tar(sparse_1_0(b"1\n4000\n512\n", data, 4096)), "past its size")
    yield Hostile("sparse-too-little-data", tar(sparse_1_0(b"1\n0\n600\n", data, 4096)), "are stored")
    yield Hostile("sparse-endless", tar(sparse_1_0(b"9" * 20 + b"\n", data, 4096)), "segments")
    yield Hostile("sparse-no-end", tar(sparse_1_0(b"500\n0\n", data, 4096)), "sparse map")
    yield Hostile("sparse-not-decimal", tar(sparse_1_0(b"1\n-1\n5\n", data, 4096)), "not decimal")
    odd = records((b"GNU.sparse.size", b"4096"), (b"GNU.sparse.map", b"0,512,600"))
    yield Hostile("sparse-0.1-odd", tar(pax(odd) + file(b"s", data)), "without a length")
    beyond = records((b"GNU.sparse.size", b"100"), (b"GNU.sparse.map", b"0,512"))
    yield Hostile("sparse-0.1-beyond", tar(pax(beyond) + file(b"s", data)), "past its size")
    version = records((b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0"))
    yield Hostile("sparse-unknown", tar(pax(version) + file(b"s", data)), "unknown")
    old = sparse_old([(0, 300), (200, 212)], 4096, data)
    yield Hostile("sparse-old-overlap", tar(old), "overlaps")
    yield Hostile("sparse-old-beyond", tar(sparse_old([(4000, 512)], 4096, data)), "past its size")


def _numbers() -> Iterator[Hostile]:
    negative = b"\xff" * 12
    huge = b"\x80" + b"\x7f" * 11
    yield Hostile("size-negative", tar(header(b"a", size=negative)), "size")
    yield Hostile("size-huge", tar(header(b"a", size=huge)), "size")
    yield Hostile(
        "size-of-a-terabyte", tar(header(b"a", size=b"\x80" + (1 << 40).to_bytes(11, "big"))), "truncated"
    )
    yield Hostile("pax-size-negative", tar(pax(records((b"size", b"-1"))), file(b"a", b"x")), "size")
    yield Hostile("owner-negative", tar(header(b"a", uid=b"\xff" * 8)), "owner")
    yield Hostile("owner-huge", tar(pax(records((b"uid", b"4294967295"))), file(b"a")), "owner")
    yield Hostile("group-not-a-number", tar(pax(records((b"gid", b"wheel"))), file(b"a")), "gid")
    yield Hostile("time-not-a-number", tar(pax(records((b"mtime", b"1e9"))), file(b"a")), "mtime")
    yield Hostile("time-huge", tar(pax(records((b"mtime", b"9" * 20))), file(b"a")), "mtime")
    yield Hostile("device-huge", tar(header(b"a", DEVICE, device=(9999, 0))), "device number")


def _extensions() -> Iterator[Hostile]:
    yield Hostile("pax-length-too-long", tar(pax(b"99 path=a\n"), file(b"a")), "wrong length")
    yield Hostile("pax-length-too-short", tar(pax(b"5 path=a\n"), file(b"a")), "wrong length")
    yield Hostile("pax-length-zero", tar(pax(b"0 path=a\n"), file(b"a")), "wrong length")
    yield Hostile("pax-length-missing", tar(pax(b"path=a\n"), file(b"a")), "without a length")
    yield Hostile("pax-length-of-digits", tar(pax(b"9" * 100_000), file(b"a")), "without a length")
    yield Hostile("pax-no-keyword", tar(pax(b"5 =a\n"), file(b"a")), "keyword")
    yield Hostile("pax-huge", tar(header(b"x", b"x", size=1 << 32)), "extension header")
    yield Hostile("name-huge", tar(header(b"x", b"L", size=1 << 32)), "extension header")
    yield Hostile("global-endless", tar(*[pax(b"", b"g")] * 1000), "in a row")
    yield Hostile("pax-at-the-end", tar(pax(records((b"path", b"a")))), "truncated")
    yield Hostile(
        "capability-garbage", tar(pax(_xattr(b"security.capability", b"\xff" * 7)), file(b"a")), "kernel"
    )


def _xattr(name: bytes, value: bytes) -> bytes:
    return records((b"SCHILY.xattr." + name, value))


def _broken() -> Iterator[Hostile]:
    whole = tar(file(b"a", b"content"), file(b"b", bytes(2000)))
    yield Hostile("empty", b"", "empty")
    yield Hostile("truncated-header", whole[:300], "truncated")
    yield Hostile("truncated-content", whole[:515], "truncated")
    yield Hostile("truncated-later", whole[:2000], "truncated")
    damaged = bytearray(whole)
    damaged[1024 + 5] ^= 1
    yield Hostile("checksum", bytes(damaged), "damaged header")
    yield Hostile("text", b"this is not a tar archive, but a text of some length\n" * 20, "damaged header")
    yield Hostile("unknown-type", tar(header(b"a", b"Z")), "unknown")
    yield Hostile("volume", tar(header(b"a", b"M")), "unknown")
