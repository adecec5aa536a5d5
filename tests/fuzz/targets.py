"""What Python reads from outside: each target takes any bytes and lets nothing out but our own errors."""

import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from blocksnap import archive, oci
from blocksnap.archive.pax import parse_records
from blocksnap.catalog import Catalog
from blocksnap.device_record import is_name
from blocksnap.dm_target import parse_status, parse_target
from blocksnap.errors import BlocksnapError
from blocksnap.graph_store import GraphStore
from blocksnap.traces import Trace

__all__ = ["TARGETS"]

_PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # nothing that is made here lasts
_BLOCK = 512
_LIMITS = archive.Limits(max_bytes=1 << 20, max_entries=200)
_PART = b"\n--\n"
_REFERENCE = re.compile(rb"@([DS])([0-9])")


def dm_lines(data: bytes) -> None:
    """Read a status line and a table line, as the kernel's answers are given to Python."""
    line = data.decode("utf-8", "surrogateescape")
    for parse in (parse_status, parse_target):
        with suppress(BlocksnapError):
            parse(line)


def trace(data: bytes) -> None:
    """Read a trace of an unknown format; what comes out lies below the end of all devices."""
    with (
        _file(data) as path,
        suppress(BlocksnapError),
        Trace([path], keep_going=bool(len(data) % 2)) as opened,
    ):
        for requests in opened:
            assert len(requests) == 0 or int((requests["offset"] + requests["length"]).max()) < 1 << 63


def image(data: bytes) -> None:
    """Read an image: the files of a layout, separated; @D1 and @S1 stand for digest and size of file 1."""
    files = data.split(_PART)[:8]
    for number in reversed(range(len(files))):
        files[number] = _REFERENCE.sub(lambda found: _about(files, found), files[number])
    docker = files[0].lstrip()[:1] == b"["
    names = ["manifest.json" if docker else "index.json"]
    names += [f"{n}" if docker else f"blobs/sha256/{_digest(files[n])}" for n in range(1, len(files))]
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as writer:
        for name, content in [
            *zip(names, files, strict=True),
            ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
        ]:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            writer.addfile(entry, io.BytesIO(content))
    with _file(tar.getvalue()) as path, suppress(BlocksnapError), oci.open_image(path) as opened:
        for layer in opened.layers:
            with suppress(BlocksnapError), layer.open() as stream:
                while stream.read(1 << 16):
                    pass


def layer_tar(data: bytes) -> None:
    """Apply a layer, its headers sealed first: what lies beside its root stays as it is."""
    home = Path(tempfile.mkdtemp(prefix="blocksnap-fuzz-", dir=_PLACE))
    try:
        (home / "root").mkdir()
        (home / "beside").write_bytes(b"untouched")
        with suppress(BlocksnapError):
            archive.apply_layer(io.BytesIO(_sealed(data)), home / "root", limits=_LIMITS)
        assert sorted(os.listdir(home)) == ["beside", "root"]
        assert (home / "beside").read_bytes() == b"untouched"
        assert (home / "beside").stat().st_nlink == 1
    finally:
        shutil.rmtree(home, ignore_errors=True)


def pax_records(data: bytes) -> None:
    """Read the records of a pax header."""
    with suppress(BlocksnapError):
        parse_records(data)


def database(data: bytes) -> None:
    """Open a database as a catalog, or as an image graph if the first byte is odd; then change it."""
    home = Path(tempfile.mkdtemp(prefix="blocksnap-fuzz-", dir=_PLACE))
    try:
        (home / "database").write_bytes(data[1:])
        with suppress(BlocksnapError):
            (_use_graph if data[:1] and data[0] % 2 else _use_catalog)(home / "database")
        assert all(entry.startswith("database") for entry in os.listdir(home))
    finally:
        shutil.rmtree(home)


def _use_catalog(path: Path) -> None:
    with closing(Catalog.open(path)) as catalog:
        number, before = catalog.transaction_id, catalog.records()
        assert all(is_name(record.name) for record in before if not record.condemned)
        catalog.recover(number + bool(catalog.intent()))
        assert catalog.intent() == []
        catalog.adopt(catalog.records(), number)
        assert catalog.transaction_id == number


def _use_graph(path: Path) -> None:
    with closing(GraphStore(path)) as store:
        for image in store.images():
            assert all(layer.state == "ready" for layer in store.chain(image.layer))
            store.delete_image(image.id)
            store.release_layers(image.layer)
        for row in store.unfinished_layers():
            store.delete_layer(row.id)


def _sealed(data: bytes) -> bytes:
    """Return a tar with right checksums in what looks like a header."""
    tar = bytearray(data)
    for begin in range(0, len(tar) - _BLOCK + 1, _BLOCK):
        header = tar[begin : begin + _BLOCK]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            tar[begin + 148 : begin + 156] = b"%06o\0 " % sum(header)
    return bytes(tar)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _about(files: list[bytes], found: re.Match[bytes]) -> bytes:
    content = files[min(int(found[2]), len(files) - 1)]
    return b"sha256:" + _digest(content).encode() if found[1] == b"D" else str(len(content)).encode()


@contextmanager
def _file(content: bytes) -> Iterator[Path]:
    descriptor = os.memfd_create("input")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (dm_lines, trace, image, layer_tar, pax_records, database)
}
