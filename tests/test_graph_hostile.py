"""Hostile images brought to a graph: each is refused in one line, nothing in or beside the store changes."""

import gzip
import hashlib
import io
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import zstandard

from blocksnap import drivers
from blocksnap.errors import BlocksnapError, DigestError, UnsafeLayerError
from blocksnap.graph import ImageGraph
from tests.hostile_tars import HARD_LINK, Hostile, directory, file, hostile_layers, link, pax, records, tar
from tests.layouts import LAYER, Layout, damaged_at
from tests.test_oci_refused import REFUSED
from tests.trees import describe_tree

HOSTILE = list(hostile_layers(b"/outside"))
MIB = 1 << 20


class Store:
    """A graph that holds one good image, beside files that are none of its business."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "beside").mkdir()
        (home / "beside" / "secret").write_text("secret\n")
        self._driver = drivers.open("vfs", home / "root")
        self.graph = ImageGraph(self._driver)
        good = Layout(home / "good")
        self.graph.import_image(good.write(good.manifest()), name="good")

    def contents(self) -> dict[str, object]:
        """Return all that is known of every name, hashes of the contents, and the rows of the database."""
        found: dict[str, object] = {}
        for name, about in describe_tree(self.home).items():
            path = self.home / name
            if path.name.startswith("graph.db"):
                continue
            content = path.read_bytes() if about["size"] is not None else b""
            times = {} if about["size"] is not None else {"mtime_ns": None}  # of directories that were busy
            found[name] = ({**about, **times}, hashlib.sha256(content).hexdigest())
        with sqlite3.connect(self.home / "root" / "graph.db") as database:
            found["rows"] = list(database.iterdump())
        return found

    def close(self) -> None:
        self.graph.close()
        self._driver.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store that a test may change."""
    (tmp_path / "home").mkdir()
    opened = Store(tmp_path / "home")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store for all that it refuses: nothing changes it."""
    opened = Store(tmp_path_factory.mktemp("home"))
    yield opened
    opened.close()


@pytest.fixture
def evil(layout: Layout) -> Layout:
    """A layout that shares only its last layer with what is stored."""
    layout.layers[0] = tar(directory(b"d"), file(b"d/a", b"evil"))
    return layout


def assert_refused(
    store: Store, path: Path, kind: type[BlocksnapError] = BlocksnapError, **options: Any
) -> str:
    before = store.contents()
    with pytest.raises(kind) as caught:
        store.graph.import_image(path, name="evil", **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert len(message) < 500
    assert store.contents() == before
    return message


def with_layer(layout: Layout, *layers: bytes) -> Path:
    layout.layers = [*layout.layers, *layers]
    return layout.write(layout.manifest())


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda each: each.name)
def test_an_image_with_a_hostile_layer_leaves_the_store_as_it_was(
    hostile: Hostile, kept: Store, evil: Layout
) -> None:
    assert_refused(kept, with_layer(evil, hostile.data), UnsafeLayerError)


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_layout_leaves_the_store_as_it_was(name: str, kept: Store, evil: Layout) -> None:
    spoil, kind, says = REFUSED[name]
    assert says in assert_refused(kept, spoil(evil), kind)


@pytest.mark.parametrize("at", [3, 40, -20])
def test_a_layer_without_its_digest_leaves_the_store_as_it_was(at: int, kept: Store, evil: Layout) -> None:
    manifest = evil.manifest()
    blob = evil.blob_file(manifest["layers"][1]["digest"])
    path = evil.write(manifest)
    blob.write_bytes(damaged_at(blob.read_bytes(), at % blob.stat().st_size))
    assert_refused(kept, path, DigestError)


def test_layers_in_another_order_than_their_diff_ids_leave_the_store_as_it_was(
    kept: Store, evil: Layout
) -> None:
    manifest = evil.manifest()
    manifest["layers"].reverse()
    assert_refused(kept, evil.write(manifest), DigestError)


# ---- bombs


def bomb(layout: Layout, suffix: str, compress: Callable[[BinaryIO], None]) -> Path:
    """Write a layer of 1280 MiB as a blob of a few MiB, without holding it in memory."""
    packed = io.BytesIO()
    compress(packed)
    blob = layout.describe(LAYER + suffix, packed.getvalue())
    manifest = layout.manifest(layers=[blob])
    config = layout.config(rootfs={"type": "layers", "diff_ids": ["sha256:" + "0" * 64]})
    return layout.write({**layout.manifest(config), "layers": manifest["layers"]})


def gzip_zeros(out: BinaryIO) -> None:
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as packed:
        packed.write(tar(file(b"a", b"x")))
        for _ in range(1280):
            packed.write(bytes(MIB))


def zstd_zeros(out: BinaryIO) -> None:
    with zstandard.ZstdCompressor(level=1).stream_writer(out, closefd=False) as packed:
        packed.write(tar(file(b"a", b"x")))
        for _ in range(1280):
            packed.write(bytes(MIB))


@pytest.mark.parametrize(("suffix", "compress"), [("+gzip", gzip_zeros), ("+zstd", zstd_zeros)])
def test_a_bomb_is_refused_at_a_multiple_of_its_blob(
    suffix: str, compress: Callable[[BinaryIO], None], kept: Store, evil: Layout
) -> None:
    message = assert_refused(kept, bomb(evil, suffix, compress), UnsafeLayerError)
    assert "inflates to more than" in message


def test_the_limit_of_a_layer_can_be_set(store: Store, layout: Layout) -> None:
    path = with_layer(layout, tar(file(b"big", bytes(4 * MIB))))
    assert "more than 2M" in assert_refused(store, path, UnsafeLayerError, max_layer_bytes=2 * MIB)
    image = store.graph.import_image(path, name="big", max_layer_bytes=8 * MIB)
    with store.graph.container("c", image) as root:
        assert (root / "big").stat().st_size == 4 * MIB


def test_a_sparse_file_of_many_terabytes_takes_no_space(store: Store, layout: Layout) -> None:
    about = records(
        *((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"huge")),
        (b"GNU.sparse.realsize", b"%d" % (8 << 40)),
    )
    data = b"0\n".ljust(512, b"\0")
    path = with_layer(layout, tar(pax(about) + file(b"huge", data)))
    image = store.graph.import_image(path, name="sparse")
    with store.graph.container("c", image) as root:
        assert (root / "huge").stat().st_blocks * 512 < MIB


# ---- what is odd but not evil


def test_the_last_of_two_entries_of_a_name_counts_and_nothing_is_followed(
    store: Store, layout: Layout
) -> None:
    secret = store.home / "beside" / "secret"
    before = store.contents()
    path = with_layer(
        layout,
        tar(
            *(link(b"f", os.fsencode(secret)), file(b"f", b"second"), file(b"g", b"first")),
            *(link(b"h", b"g", HARD_LINK), file(b"g", b"second"), directory(b"x"), file(b"x", b"file")),
        ),
    )
    with store.graph.container("c", store.graph.import_image(path, name="twice")) as root:
        assert [(root / name).read_text() for name in "fghx"] == ["second", "second", "first", "file"]
    after = store.contents()
    assert after["beside/secret"] == before["beside/secret"]
