"""Write and damage metadata images: nodes shared between devices as the kernel shares them, exact counts.

thin_restore gives every device a tree of its own; a pool with real snapshots shares nodes. Here a node with
the same content is written once, so devices split at the same thin blocks share all leaves in which they do
not differ.
"""

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.thin_xml import U64, Device, Pool

__all__ = ["SALTS", "Image", "build", "checksum", "seal_file"]

BLOCK = 4096
SALTS = {"superblock": 160774, "node": 121107, "bitmap": 240779, "index": 160478}
ENTRIES_PER_BITMAP = 16320
INTERNAL, LEAF = 1, 2


def _crc_table() -> npt.NDArray[np.uint32]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return np.array(table, dtype=np.uint32)


_TABLE = _crc_table()


def checksums(blocks: npt.NDArray[np.uint8], salts: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return the checksum of each row, all rows side by side."""
    columns = np.ascontiguousarray(blocks.T)
    crc = np.full(len(blocks), 0xFFFFFFFF, dtype=np.uint32)
    for column in columns[4:]:
        crc = crc >> np.uint32(8) ^ _TABLE[(crc ^ column) & np.uint32(0xFF)]
    return crc ^ salts


_PLAIN_TABLE: list[int] = [int(entry) for entry in _TABLE]


def checksum(block: bytes, kind: str) -> int:
    """Return the checksum of one block: for few blocks faster than `checksums`."""
    crc, table = 0xFFFFFFFF, _PLAIN_TABLE
    for byte in block[4:]:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ SALTS[kind]


def max_entries(value_size: int) -> int:
    """Return how many entries a node of such values holds."""
    return (BLOCK - 32) // (8 + value_size) // 3 * 3


@dataclass(slots=True)
class Image:
    """Metadata blocks in memory, and which kind each is (the salts are sealed on save)."""

    blocks: npt.NDArray[np.uint8]
    kinds: dict[int, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, kinds: dict[int, str]) -> "Image":
        """Read a file whose blocks in use are of the given kinds."""
        return cls(np.fromfile(path, dtype=np.uint8).reshape(-1, BLOCK), kinds)

    def get(self, block: int, offset: int, form: str) -> int:
        """Return the integer of a struct format ("<Q") at an offset of a block."""
        return int(struct.unpack_from("<" + form, self.blocks[block].tobytes(), offset)[0])

    def put(self, block: int, offset: int, form: str, value: int) -> None:
        """Set an integer; the checksum follows when the image is saved."""
        raw = struct.pack("<" + form, value)
        self.blocks[block, offset : offset + len(raw)] = np.frombuffer(raw, dtype=np.uint8)

    def seal(self) -> None:
        """Make every checksum right."""
        numbers = sorted(self.kinds)
        salts = np.array([SALTS[self.kinds[n]] for n in numbers], dtype=np.uint32)
        sums = checksums(self.blocks[numbers], salts)
        self.blocks[numbers, :4] = sums.astype("<u4").view(np.uint8).reshape(-1, 4)

    def save(self, path: Path, *, seal: bool = True) -> Path:
        """Write the image to a file, sealed unless told otherwise."""
        if seal:
            self.seal()
        self.blocks.tofile(path)
        return path

    # ---- nodes

    def children(self, block: int) -> list[int]:
        """Return the 64-bit values of a node."""
        count, limit = self.get(block, 16, "I"), self.get(block, 20, "I")
        return [self.get(block, 32 + 8 * limit + 8 * i, "Q") for i in range(count)]

    def value_offset(self, block: int, index: int, value_size: int = 8) -> int:
        """Return where in the block a value lies."""
        return 32 + 8 * self.get(block, 20, "I") + value_size * index

    def device_root(self, index: int = 0) -> int:
        """Return the mapping tree's root of the index-th device."""
        return self.children(self.get(0, 320, "Q"))[index]

    def leaves(self, block: int) -> list[int]:
        """Return the leaves below a node, ascending."""
        if self.get(block, 4, "I") == LEAF:
            return [block]
        return [leaf for child in self.children(block) for leaf in self.leaves(child)]


def seal_file(path: Path, block: int, kind: str) -> None:
    """Make the checksum of one block of a file right."""
    data = np.fromfile(path, dtype=np.uint8, count=BLOCK, offset=block * BLOCK).reshape(1, BLOCK)
    crc = checksums(data, np.array([SALTS[kind]], dtype=np.uint32))
    with path.open("r+b") as file:
        file.seek(block * BLOCK)
        file.write(crc.astype("<u4").tobytes())


class _Writer:
    """Allocates blocks one after the other and counts every pointer."""

    def __init__(self) -> None:
        self.rows: list[bytes] = [bytes(BLOCK)]
        self.kinds: dict[int, str] = {0: "superblock"}
        self.counts: Counter[int] = Counter({0: 1})
        self.data_counts: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.known: dict[bytes, int] = {}

    def add(self, body: bytes, kind: str, head: int = 0) -> int:
        """Append a block: 4 bytes checksum, head, number, body."""
        number = len(self.rows)
        row = struct.pack("<IIQ", 0, head, number) + body
        self.rows.append(row.ljust(BLOCK, b"\0"))
        self.kinds[number] = kind
        return number

    def node(self, flags: int, keys: U64, values: bytes, value_size: int) -> tuple[int, bool]:
        """Return the block of a node with this content, and whether it is new."""
        limit = max_entries(value_size)
        packed = keys.astype("<u8").tobytes().ljust(8 * limit, b"\0")
        body = struct.pack("<IIII", len(keys), limit, value_size, 0) + packed + values
        found = self.known.get(body)
        if found is not None:
            return found, False
        self.known[body] = self.add(body, "node", flags)
        return self.known[body], True

    def internal_levels(self, firsts: list[int], children: list[int]) -> int:
        """Return the root above a row of nodes."""
        while len(children) > 1:
            upper_firsts, upper = [], []
            for begin, end in _cuts(len(children), 252):
                keys = np.array(firsts[begin:end], dtype=np.uint64)
                values = np.array(children[begin:end], dtype="<u8").tobytes()
                number, new = self.node(INTERNAL, keys, values, 8)
                if new:
                    self.counts.update(children[begin:end])
                upper_firsts.append(firsts[begin])
                upper.append(number)
            firsts, children = upper_firsts, upper
        return children[0]

    def tree(self, keys: U64, values: npt.NDArray[np.uint8]) -> int:
        """Return the root of a tree of rows of bytes that nothing else shares."""
        value_size = values.shape[1]
        firsts, leaves = [], []
        for begin, end in _cuts(len(keys), max_entries(value_size)):
            number, _ = self.node(LEAF, keys[begin:end], values[begin:end].tobytes(), value_size)
            firsts.append(int(keys[begin]) if len(keys) else 0)
            leaves.append(number)
            self.known.clear()  # equal empty leaves of two trees are two blocks
        return self.internal_levels(firsts, leaves)

    def mapping_tree(self, keys: U64, packed: U64, starts: U64) -> int:
        """Return the root of a device's tree, its leaves cut at the given thin blocks."""
        cuts = np.unique(np.searchsorted(keys, starts)).tolist() if len(keys) else [0]
        if cuts[0] != 0:
            cuts.insert(0, 0)
        cuts = [c for c in cuts if c < len(keys)] or [0]
        firsts, leaves = [], []
        for begin, end in zip(cuts, [*cuts[1:], len(keys)], strict=True):
            number, new = self.node(LEAF, keys[begin:end], packed[begin:end].astype("<u8").tobytes(), 8)
            if new:
                np.add.at(self.data_counts, (packed[begin:end] >> np.uint64(24)).astype(np.int64), 1)
            firsts.append(int(keys[begin]) if len(keys) else 0)
            leaves.append(number)
        return self.internal_levels(firsts, leaves)


def _cuts(count: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield even parts of at most limit."""
    parts = max(1, -(-count // limit))
    edges = [count * i // parts for i in range(parts + 1)]
    return pairwise(edges)


def _bitmap(counts: npt.NDArray[np.int64]) -> bytes:
    """Return the 4080 bytes of two-bit entries for up to 16320 counts."""
    full = np.zeros(ENTRIES_PER_BITMAP, dtype=np.uint8)
    full[: len(counts)] = np.array([0, 2, 1, 3], dtype=np.uint8)[np.minimum(counts, 3)]
    quads = full.reshape(-1, 4)
    return (quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6).astype(np.uint8).tobytes()


def _index_entries(counts: npt.NDArray[np.int64], places: Sequence[int]) -> bytes:
    entries = b""
    for i, place in enumerate(places):
        part = counts[i * ENTRIES_PER_BITMAP : (i + 1) * ENTRIES_PER_BITMAP]
        full = np.zeros(ENTRIES_PER_BITMAP, dtype=np.int64)
        full[: len(part)] = part
        free = np.flatnonzero(full == 0)
        first_free = int(free[0]) if len(free) else ENTRIES_PER_BITMAP
        entries += struct.pack("<QII", place, len(free), first_free)
    return entries


def _parts(counts: npt.NDArray[np.int64]) -> Iterable[npt.NDArray[np.int64]]:
    return (counts[i : i + ENTRIES_PER_BITMAP] for i in range(0, len(counts), ENTRIES_PER_BITMAP))


def _overflow(counts: npt.NDArray[np.int64]) -> tuple[U64, npt.NDArray[np.uint8]]:
    keys = np.flatnonzero(counts >= 3)
    return keys.astype(np.uint64), counts[keys].astype("<u4").view(np.uint8).reshape(-1, 4)


def _sm_root(nr: int, counts: npt.NDArray[np.int64], bitmaps: int, overflow: int) -> bytes:
    return struct.pack("<QQQQ", nr, int(np.count_nonzero(counts)), bitmaps, overflow).ljust(128, b"\0")


def _mapping_trees(writer: _Writer, pool: Pool, leaf_fill: int) -> list[int]:
    """Write the mapping trees of all devices; return their roots."""
    origin = pool.origin_blocks
    starts = origin[:: max(1, leaf_fill)]
    if len(starts) > 1 and len(origin) % leaf_fill < 84:
        starts = starts[:-1]
    return [
        writer.mapping_tree(device.thin_blocks, device.data_blocks << np.uint64(24) | device.times, starts)
        for device in pool.devices
    ]


def _details(device: Device) -> bytes:
    times = device.creation_time, device.snapshotted_time
    return struct.pack("<QQII", len(device.thin_blocks), device.transaction_id, *times)


def _id_trees(writer: _Writer, pool: Pool, roots: list[int]) -> tuple[int, int]:
    """Write the top-level tree and the details; return both roots."""
    writer.known.clear()
    writer.counts.update(roots)
    ids = np.array([d.id for d in pool.devices], dtype=np.uint64)
    top = writer.tree(ids, np.array(roots, dtype="<u8").view(np.uint8).reshape(-1, 8))
    raw = np.frombuffer(b"".join(map(_details, pool.devices)), dtype=np.uint8).reshape(-1, 24)
    found = top, writer.tree(ids, raw)
    writer.counts.update(found)
    return found


def _hold(writer: _Writer, held: Pool, roots: list[int]) -> int:
    """Write a metadata snapshot of an earlier state; return its block."""
    top, details = _id_trees(writer, held, roots)
    body = _superblock(held, 0, bytes(256), top, details, 0)
    copy = writer.add(body[16:], "superblock")
    writer.counts.update([copy])
    return copy


def build(pool: Pool, *, metadata_blocks: int = 0, leaf_fill: int = 168, held: Pool | None = None) -> Image:
    """Return an image of the pool in which equal leaves are shared.

    leaf_fill is how many mappings of the first device a leaf gets: 84 to 168, so that a short tail fits. held
    is an earlier state of the same history that a metadata snapshot keeps.
    """
    writer = _Writer()
    writer.data_counts = np.zeros(pool.nr_data_blocks, dtype=np.int64)
    roots = _mapping_trees(writer, pool, leaf_fill)
    held_roots = _mapping_trees(writer, held, leaf_fill) if held else []
    mapping_root, details_root = _id_trees(writer, pool, roots)
    held_root = _hold(writer, held, held_roots) if held else 0
    data_bitmaps = [writer.add(_bitmap(part), "bitmap") for part in _parts(writer.data_counts)]
    entries = _index_entries(writer.data_counts, data_bitmaps)
    index_rows = np.frombuffer(entries, dtype=np.uint8).reshape(-1, 16)
    data_index = writer.tree(np.arange(len(data_bitmaps), dtype=np.uint64), index_rows)
    data_overflow = writer.tree(*_overflow(writer.data_counts))
    writer.counts.update([data_index, data_overflow, *data_bitmaps])
    data_map = _sm_root(pool.nr_data_blocks, writer.data_counts, data_index, data_overflow)
    total, metadata_map = _metadata_map(writer, metadata_blocks)
    writer.rows[0] = _superblock(pool, held_root, data_map + metadata_map, mapping_root, details_root, total)
    return _image(writer, total)


def _superblock(
    pool: Pool, held: int, maps: bytes, mapping_root: int, details_root: int, total: int
) -> bytes:
    head = struct.pack("<QIIQQ", 27022010, 2, pool.time, pool.transaction_id, held)
    tail = struct.pack("<QQIIQIII", mapping_root, details_root, pool.data_block_size, 8, total, 0, 0, 0)
    return (bytes(32) + head + maps + tail).ljust(BLOCK, b"\0")


def _metadata_map(writer: _Writer, total: int) -> tuple[int, bytes]:
    """Write the metadata space map, which counts itself; return the number of blocks and the map's root."""
    shared = sum(1 for count in writer.counts.values() if count >= 3)
    overflow_nodes = max(1, -(-shared // 168)) * 2 + 2
    total = total or (len(writer.rows) + overflow_nodes + 300) * 5 // 4
    counts = np.zeros(total, dtype=np.int64)
    counts[list(writer.counts)] = list(writer.counts.values())
    overflow = writer.tree(*_overflow(counts))
    bitmaps = [len(writer.rows) + i for i in range(-(-total // ENTRIES_PER_BITMAP))]
    index = bitmaps[-1] + 1
    writer.counts.update([overflow, index, *bitmaps])
    counts[list(writer.counts)] = list(writer.counts.values())
    for part in _parts(counts):
        writer.add(_bitmap(part), "bitmap")
    writer.add(_index_entries(counts, bitmaps), "index")
    return total, _sm_root(total, counts, index, overflow)


def _image(writer: _Writer, total: int) -> Image:
    raw = np.frombuffer(b"".join(writer.rows), dtype=np.uint8).reshape(-1, BLOCK)
    blocks = np.zeros((total, BLOCK), dtype=np.uint8)
    blocks[: len(raw)] = raw
    image = Image(blocks, writer.kinds)
    image.seal()
    return image
