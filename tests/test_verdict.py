"""Which drivers the verdict sets against each other when there are many of them."""

from blocksnap.amplification.result import Comparison, Measurement, Target
from blocksnap.amplification.verdict import verdict


def row(driver: str, amplification: int, block_size: int | None = None) -> Measurement:
    return Measurement(
        target=Target(driver, block_size), application_bytes=1, changed_bytes=1, backing_bytes=amplification
    )


def said(*rows: Measurement) -> str:
    return verdict(Comparison({}, {"name": "touch-byte"}, rows))


def test_block_level_is_set_against_what_copies_whole_files() -> None:
    text = said(row("thin", 5, 4096), row("thin", 9, 65536), row("xfs-reflink", 7), row("overlay", 20))
    assert "Block-level copy-on-write writes less than overlay at every block size measured." in text


def test_driver_with_one_block_size_says_nothing_about_block_sizes() -> None:
    text = said(row("thin", 5, 4096), row("thin", 9, 65536), row("qcow2", 30, 65536), row("overlay", 20))
    assert "Block-level copy-on-write writes less than overlay at every block size measured." in text


def test_each_block_level_driver_has_its_sentence() -> None:
    rows = [row(driver, size >> 12, size) for driver in ("thin", "devicemapper") for size in (4096, 65536)]
    text = said(*rows, row("unionfs", 4))
    for driver in ("thin", "devicemapper"):
        assert f"by {driver} writes less than unionfs at 4K and more than unionfs at 64K." in text


def test_volumes_on_other_file_systems_are_told_apart_and_cannot_win() -> None:
    text = said(row("xfs-reflink", 3), row("overlay", 20), row("volume", 4), row("volume@xfs", 2))
    assert text.startswith("xfs-reflink wins: 3.00 bytes")
    assert "a volume, without any copy-on-write, writes 4.00 (2.00 on xfs)." in text


def test_nothing_is_said_of_block_sizes_without_a_driver_that_copies_whole_files() -> None:
    assert "Block-level" not in said(row("thin", 5, 4096), row("btrfs", 4))
