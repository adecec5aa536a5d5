"""The model of copy-up against what overlayfs does: sizes of files, and every byte that the device wrote."""

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import mount
from blocksnap.amplification.copy_up import CopyUp
from blocksnap.amplification.testbed import Testbed, open_testbed, work_directory
from blocksnap.drivers.extents import extents
from blocksnap.drivers.overlay import OverlayDriver
from tests.block_requests import INNER, ext4_regions, missing, traced_writes, written_by_region

MIB = 1 << 20
SIZES = (0, 1, 4095, 4096, 4097, 70_000, 1 * MIB, 3 * MIB + 11)

lack = OverlayDriver.missing(Path("/var/tmp"))
pytestmark = pytest.mark.skipif(
    lack is not None or not os.access("/dev/loop-control", os.W_OK),
    reason=f"overlay: {lack}; and loop devices",
)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Testbed]:
    with (
        work_directory(tmp_path / "work") as directory,
        open_testbed(directory, "bed", 1024 * MIB, on_loop=True) as bed,
    ):
        yield bed


def make_image(driver: OverlayDriver) -> dict[str, int]:
    sizes = {f"file-{number}": size for number, size in enumerate(SIZES * 3)}
    driver.create("image")
    with driver.mounted("image") as root:
        for name, size in sizes.items():
            (root / name).write_bytes(os.urandom(size))
    return sizes


def change(root: Path, model: CopyUp, seed: int) -> None:
    """Change files at random, and the model alike."""
    choose = random.Random(seed)
    for number in range(60):
        name = choose.choice([*model.lower, *model.upper, f"new-{number}"])
        if choose.random() < 0.2 and name in model.lower:
            (root / name).chmod(choose.choice([0o600, 0o640, 0o755]))
            model.change_attributes(name)
            continue
        flags = os.O_RDWR | os.O_CREAT
        descriptor = os.open(root / name, flags)
        model.open_for_writing(name)
        for _ in range(choose.randrange(4)):
            offset, length = choose.randrange(2 * MIB), choose.choice([1, 100, 4096, 20_000])
            os.pwrite(descriptor, choose.randbytes(length), offset)
            model.write(name, offset, length)
        os.fsync(descriptor)
        model.sync()
        os.close(descriptor)


def file_sizes(upper: Path) -> dict[str, int]:
    found = {entry.name: entry.stat() for entry in os.scandir(upper)}
    return {name: info.st_size for name, info in found.items() if stat.S_ISREG(info.st_mode)}


@pytest.mark.parametrize("seed", range(3))
def test_predicted_bytes_are_the_files_of_the_upper_directory(bed: Testbed, seed: int) -> None:
    driver = OverlayDriver(bed.root / "driver")
    model = CopyUp(make_image(driver))
    driver.create_read_write("container", "image")
    with driver.mounted("container") as root:
        change(root, model, seed)
    upper = Path(driver.metadata("container")["UpperDir"])
    assert file_sizes(upper) == model.upper
    assert sum(file_sizes(upper).values()) == model.upper_bytes
    assert driver.accounting("container").copy_bytes == model.copied_bytes
    assert model.copied_bytes > 4 * MIB


def test_file_that_is_truncated_as_it_is_opened_is_not_copied(bed: Testbed) -> None:
    driver = OverlayDriver(bed.root / "driver")
    model = CopyUp(make_image(driver))
    driver.create_read_write("container", "image")
    name = max(model.lower, key=lambda name: model.lower[name])
    driver.sync()
    bed.settle()
    before = bed.written_bytes() or 0
    with driver.mounted("container") as root, (root / name).open("wb") as file:
        model.open_for_writing(name, truncate=True)
        file.write(b"!")
        model.write(name, 0, 1)
    model.sync()
    bed.settle()
    assert file_sizes(Path(driver.metadata("container")["UpperDir"])) == model.upper == {name: 1}
    assert (model.copied_bytes, model.device_bytes) == (0, 4096)
    assert 4096 < (bed.written_bytes() or 0) - before < MIB


def test_every_byte_that_the_device_wrote_is_predicted_or_has_a_name(bed: Testbed, tmp_path: Path) -> None:
    if reason := missing(tmp_path):
        pytest.skip(reason)
    driver = OverlayDriver(bed.root / "driver")
    model = CopyUp(make_image(driver))
    driver.create_read_write("container", "image")
    device = next(entry.source for entry in mount.mount_table() if entry.target == str(bed.root))
    driver.sync()
    bed.settle()
    before = bed.written_bytes() or 0
    with traced_writes(tmp_path, device) as writes:
        with driver.mounted("container") as root:
            change(root, model, 7)
        bed.settle()
        counted = (bed.written_bytes() or 0) - before
    regions = ext4_regions(device) | places_of(Path(driver.metadata("container")["UpperDir"]), bed.root)
    written = written_by_region(writes, regions, device)
    print({"predicted": model.device_bytes, "counted": counted} | written)
    assert sum(written.values()) == counted
    assert written.pop("contents of files") == model.device_bytes
    assert written.keys() <= {*regions, INNER}
    assert sum(written.values()) < counted // 4


def places_of(upper: Path, root: Path) -> dict[str, list[range]]:
    """Return where the contents of the upper files lie on the device, and those of all directories."""
    found: dict[str, list[range]] = {"contents of files": [], "directories": []}
    for directory, _, names in os.walk(root):
        found["directories"] += places(Path(directory))
        if Path(directory) == upper:
            for name in names:
                found["contents of files"] += places(Path(directory) / name)
    return found


def places(path: Path) -> list[range]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [range(one.physical, one.physical + one.length) for one in extents(descriptor)]
    finally:
        os.close(descriptor)
