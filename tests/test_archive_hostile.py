"""Layers that must be refused or kept inside: nothing outside the root ever changes."""

import contextlib
import ctypes
import io
import multiprocessing
import os
import random
from pathlib import Path

import pytest

from blocksnap.archive import Limits, apply_layer
from blocksnap.errors import BlocksnapError, DigestError, PrivilegeError, UnsafeLayerError
from tests.hostile_tars import (
    HARD_LINK,
    Hostile,
    directory,
    file,
    header,
    hostile_layers,
    link,
    pax,
    records,
    sparse_1_0,
    sparse_old,
    tar,
)
from tests.layer_roots import apply, as_ordinary_user, empty, needs_root, surroundings

HOSTILE = list(hostile_layers(b"@OUTSIDE@"))


def test_the_hostile_corpus_is_large_enough() -> None:
    assert len({each.name for each in HOSTILE}) == len(HOSTILE) >= 70


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda each: each.name)
def test_a_hostile_layer_is_refused_in_one_line_and_touches_nothing_outside(
    hostile: Hostile, layer_root: Path
) -> None:
    names = {each.name: each for each in hostile_layers(os.fsencode(layer_root.parent / "outside"))}
    before = surroundings(layer_root)
    with pytest.raises(UnsafeLayerError) as caught:
        apply_layer(io.BytesIO(names[hostile.name].data), layer_root)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert hostile.says.lower() in message.lower()
    assert surroundings(layer_root) == before


def test_entries_that_lead_out_through_symlinks_land_inside(layer_root: Path) -> None:
    outside = os.fsencode(layer_root.parent / "outside")
    before = surroundings(layer_root)
    apply(
        layer_root,
        link(b"absolute", outside), file(b"absolute/secret", b"harmless"),
        link(b"dots", b"../outside"), file(b"dots/secret", b"harmless"),
        link(b"chain", b"absolute"), directory(b"chain/kept"), file(b"chain/kept/.wh..wh..opq"),
        file(b"absolute/.wh.secret"), file(b"dots/.wh.kept"),
        link(b"self", b"/proc/self/root"), file(b"self/escape", b"harmless"),
        link(b"absolute/link", b"x"), link(b"dots/hard", b"dots/secret", HARD_LINK),
    )  # fmt: skip
    assert surroundings(layer_root) == before
    assert (layer_root / os.fsdecode(outside).lstrip("/") / "secret").read_bytes() == b"harmless"
    assert (layer_root / "outside/secret").read_bytes() == b"harmless"
    assert (layer_root / "proc/self/root/escape").read_bytes() == b"harmless"


def test_a_layer_with_too_many_entries_is_refused(layer_root: Path) -> None:
    data = tar(*[file(b"%d" % at) for at in range(11)])
    with pytest.raises(UnsafeLayerError, match="more than 10 entries"):
        apply_layer(io.BytesIO(data), layer_root, limits=Limits(max_entries=10))


class Endless(io.RawIOBase):
    """What a small bomb inflates to: an archive whose padding never ends."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data

    def read(self, size: int = -1, /) -> bytes:
        piece, self._data = self._data[:size], self._data[size:]
        return piece or bytes(size)


@pytest.mark.parametrize("data", [tar(file(b"a")), header(b"a", size=1 << 33)], ids=["padding", "content"])
def test_a_layer_that_inflates_without_end_is_refused(data: bytes, layer_root: Path) -> None:
    with pytest.raises(UnsafeLayerError, match="inflates to more than 8M"):
        apply_layer(Endless(data), layer_root, limits=Limits(max_bytes=8 << 20))  # type: ignore[arg-type]


def test_a_stream_that_proves_damaged_is_called_damaged_not_unsafe(layer_root: Path) -> None:
    class Verified(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            if not data:
                raise DigestError("layer 0123 does not have its digest")
            return data

    with pytest.raises(DigestError):
        apply_layer(Verified(tar(file(b"../escape"))), layer_root)


def test_mutated_layers_only_ever_raise_our_errors(layer_root: Path) -> None:
    """Bit flips with right checksums, since a checksum is no protection."""
    chance = random.Random(20)
    whole = tar(
        directory(b"d"), file(b"d/a", b"x" * 700), link(b"d/l", b"../outside"), link(b"h", b"d/a", HARD_LINK),
        pax(records((b"path", b"d/long"), (b"mtime", b"1.5"), (b"SCHILY.xattr.user.a", b"b"))),
        file(b"p", b"y"),
        sparse_1_0(b"1\n0\n512\n", bytes(512), 4096), sparse_old([(512, 512)], 4096, bytes(512)),
        file(b"d/.wh.a"), header(b"f", b"6"), file(b"d/l/secret", b"harmless"),
    )  # fmt: skip
    before = surroundings(layer_root)
    outcomes: set[str] = set()
    messages: list[str] = []
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice(
                (0, 0x2E, 0x2F, 0x37, 0xFF, chance.randrange(256))
            )
        for at in range(0, len(data), 512):
            if data[at + 257 : at + 262] == b"ustar":
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        empty(layer_root)
        try:
            apply_layer(io.BytesIO(bytes(data)), layer_root, limits=Limits(max_bytes=1 << 20))
            outcomes.add("applied")
        except BlocksnapError as error:
            outcomes.add(type(error).__name__)
            messages.append(str(error))
        assert surroundings(layer_root) == before
    assert {"applied", "UnsafeLayerError"} <= outcomes
    assert not [message for message in messages if "\n" in message]


# ---- a race ------------------------------------------------------------------------------------------------


def _exchange_for_ever(directory: Path, symlink: Path) -> None:
    renameat2 = ctypes.CDLL(None).renameat2
    left, right = os.fsencode(directory), os.fsencode(symlink)
    while True:
        renameat2(-100, left, -100, right, 2)  # AT_FDCWD, RENAME_EXCHANGE


def test_a_process_that_swaps_a_directory_for_a_symlink_gains_nothing(layer_root: Path) -> None:
    outside = layer_root.parent / "outside"
    for name in ("a", "b", "c", "sub/a"):
        (outside / name).parent.mkdir(exist_ok=True)
        (outside / name).write_text("untouched\n")
    (layer_root / "d").mkdir()
    (layer_root / "trap").symlink_to(outside)
    before = surroundings(layer_root)
    attacker = multiprocessing.get_context("fork").Process(
        target=_exchange_for_ever, args=(layer_root / "d", layer_root / "trap"), daemon=True
    )
    attacker.start()
    layer = tar(
        file(b"d/a", b"evil"), link(b"d/b", b"x"), link(b"d/h", b"d/a", HARD_LINK), header(b"d/c", b"6"),
        directory(b"d/sub"), file(b"d/sub/a", b"evil"), file(b"d/new/deep", b"evil"), file(b"d/.wh.secret"),
        file(b"d/.wh.kept"), file(b"d/sub/.wh..wh..opq"), file(b"d/.wh..wh..opq"),
    )  # fmt: skip
    try:
        for _ in range(300):
            with contextlib.suppress(BlocksnapError):
                apply_layer(io.BytesIO(layer), layer_root)
    finally:
        attacker.kill()
        attacker.join()
    assert surroundings(layer_root) == before
    landed = layer_root / os.fspath(outside).lstrip("/")
    assert landed.is_dir(), "no entry ever met the symlink, so nothing was shown"


@needs_root
@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda each: each.name)
def test_a_hostile_layer_is_refused_for_an_ordinary_user_too(hostile: Hostile, users_root: Path) -> None:
    def work() -> None:
        with pytest.raises((UnsafeLayerError, PrivilegeError)):
            apply_layer(io.BytesIO(hostile.data), users_root)

    if hostile.name != "capability-garbage":  # nobody may not set one, so it is left out
        as_ordinary_user(work)
