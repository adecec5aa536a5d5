"""Deliberate damage, each kind at twenty places with the verdict it must get from check and from repair."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import tests.thin_damage_devices
import tests.thin_damage_maps
import tests.thin_damage_superblock
import tests.thin_damage_trees  # noqa: F401 - all four fill KINDS
from blocksnap import metadata, metadata_repair
from blocksnap.errors import (
    ArgumentError,
    BlocksnapError,
    DamagedMetadataError,
    NotSupportedError,
    PoolFormatError,
)
from blocksnap.kernel_backing import require_undamaged
from tests.thin_damage import BASES, KINDS, Damage, Place, Verdict, base, place, sound_image
from tests.thin_image import Image

SEEDS = range(20)
Mappings = dict[int, NDArray[np.void]]


@contextmanager
def memory_file(content: NDArray[np.uint8], *, empty: bool = False) -> Iterator[Path]:
    """Give the path of a file in memory, or of an empty one of that size: thousands need no disk."""
    descriptor = os.memfd_create("metadata")
    try:
        if empty:
            os.ftruncate(descriptor, content.nbytes)
        else:
            os.write(descriptor, content.tobytes())
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def accepted_by_thin_check(path: Path) -> bool:
    descriptor = int(path.name)
    done = subprocess.run(
        ["thin_check", "-q", path], capture_output=True, check=False, timeout=60, pass_fds=[descriptor]
    )
    return done.returncode == 0


def matches(finding: metadata.Finding, expected: str) -> bool:
    severity, _, text = expected.partition(": ")
    return finding.severity == severity and re.search(text, finding.text) is not None


def message_of(walk: Callable[[], object]) -> str | None:
    """Return the message of the error that a walk raises, if it raises one."""
    try:
        walk()
    except BlocksnapError as error:
        return str(error)
    return None


# ---- check


def judge_check(kind: Damage, path: Path) -> None:
    if kind.finding.startswith("error: "):
        with pytest.raises(PoolFormatError, match=kind.finding.removeprefix("error: ")):
            metadata.check(path)
        return
    report = metadata.check(path)
    grave = [finding for finding in report.findings if finding.severity != "warning"]
    if kind.verdict is Verdict.LEGAL:
        assert report.findings == ()
        return
    assert any(matches(finding, kind.finding) for finding in report.findings), report.findings
    if kind.verdict is Verdict.WARN:
        assert grave == []
    elif kind.alone:
        assert [finding for finding in grave if not matches(finding, kind.finding)] == []
    assert report.damaged == (kind.verdict is not Verdict.WARN)


# ---- repair


def mappings_of(path: Path) -> Mappings:
    return {
        device.id: np.concatenate([np.empty(0, metadata.MAPPING), *metadata.mappings(path, device.id)])
        for device in metadata.devices(path)
    }


def sound_mappings(name: str) -> Mappings:
    with memory_file(base(name).image.blocks) as path:
        return mappings_of(path)


SOUND = {name: sound_mappings(name) for name in BASES}


def name_of(found: Place) -> str:
    return next(name for name in BASES if base(name) is found.base)


def repair(found: Place, path: Path, output: Path) -> metadata_repair.RepairReport:
    pool = found.base.pool
    return metadata_repair.repair(
        path, output, block_size=found.block_size, data_bytes=pool.nr_data_blocks * pool.data_block_size * 512
    )


def is_told(report: metadata_repair.RepairReport, device_id: int, blocks: NDArray[np.uint64]) -> bool:
    """Return whether the report names every one of these thin blocks as lost."""
    told = np.zeros(len(blocks), np.bool_)
    for lost in report.lost_blocks:
        if lost.device_id == device_id:
            told |= (blocks >= lost.first) & (blocks <= lost.last)
        elif lost.device_id is None and lost.first <= device_id <= lost.last:
            told[:] = True
    return bool(told.all())


def judge_saved(
    kind: Damage, before: Mappings, after: Mappings, report: metadata_repair.RepairReport, forged: set[int]
) -> None:
    gone = {lost.id for lost in report.lost_devices}
    for device_id, mappings in before.items():
        if device_id in forged:
            continue
        assert (
            device_id in after or device_id in gone or is_told(report, device_id, mappings["thin_block"][:1])
        )
        if device_id not in after:
            continue
        left = after[device_id]
        if np.array_equal(mappings[["thin_block", "data_block"]], left[["thin_block", "data_block"]]):
            continue
        missing = ~np.isin(mappings["thin_block"], left["thin_block"])
        kept = mappings[~missing]
        assert np.array_equal(kept["data_block"], left["data_block"])
        assert is_told(report, device_id, mappings["thin_block"][missing])
    lossy = kind.verdict is Verdict.LOSS
    assert report.complete != lossy, report


def judge_repair(kind: Damage, found: Place, path: Path, output: Path) -> None:
    report = repair(found, path, output)
    assert not metadata.check(output).damaged
    ids = sorted(SOUND[name_of(found)])
    forged = {ids[index] for index in found.forged}
    judge_saved(kind, SOUND[name_of(found)], mappings_of(output), report, forged)


def judge_refused(found: Place, path: Path, output: Path) -> None:
    with pytest.raises((NotSupportedError, DamagedMetadataError, ArgumentError)):
        repair(found, path, output)
    assert not np.fromfile(output, np.uint8).any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_damage_gets_its_verdict_from_check_and_repair(kind: Damage) -> None:
    for seed in SEEDS:
        found = place(kind, seed)
        before = found.image.blocks.tobytes()
        with memory_file(found.image.blocks) as path, memory_file(found.image.blocks, empty=True) as output:
            judge_check(kind, path)
            if kind.verdict is Verdict.REFUSE:
                judge_refused(found, path, output)
            else:
                judge_repair(kind, found, path, output)
            assert path.read_bytes() == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.verdict is not Verdict.REFUSE], ids=str)
def test_thin_check_accepts_what_repair_makes(kind: Damage) -> None:
    if shutil.which("thin_check") is None:
        pytest.skip("needs thin_check of thin-provisioning-tools")
    for seed in range(2):
        found = place(kind, seed)
        with memory_file(found.image.blocks) as path, memory_file(found.image.blocks, empty=True) as output:
            repair(found, path, output)
            assert accepted_by_thin_check(output)


# ---- the rest


def test_there_are_at_least_120_kinds() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 120


@pytest.mark.parametrize("name", BASES)
def test_the_undamaged_images_are_clean(name: str) -> None:
    with memory_file(base(name).image.blocks) as path:
        assert metadata.check(path).findings == ()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_only_undamaged_metadata_reach_the_kernel(kind: Damage) -> None:
    with memory_file(place(kind, 0).image.blocks) as path:
        if kind.verdict in (Verdict.LEGAL, Verdict.WARN) or kind.finding.startswith("leak"):
            require_undamaged(path)
        else:
            with pytest.raises((DamagedMetadataError, PoolFormatError)):
                require_undamaged(path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.accepted is not None], ids=str)
def test_thin_check_accepts_or_refuses_as_known(kind: Damage) -> None:
    if shutil.which("thin_check") is None:
        pytest.skip("needs thin_check of thin-provisioning-tools")
    with memory_file(place(kind, 0).image.blocks) as path:
        assert accepted_by_thin_check(path) == kind.accepted


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_other_walks_end_in_a_result_or_one_clear_error(kind: Damage) -> None:
    with memory_file(place(kind, 0).image.blocks) as path, Path(os.devnull).open("wb") as out:
        for walk in (
            lambda: metadata.dump(path, out),
            lambda: metadata.write_delta(path, 1, 6, out),
            lambda: metadata.delta_ranges(path, 6, 1),
            lambda: metadata.usage(path),
        ):
            message = message_of(walk)
            assert message is None or re.fullmatch(f"{re.escape(str(path))}: .+", message)


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_under_right_checksums_are_survived(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sound = sound_image()
    used = np.array(sorted(sound.kinds))
    for _ in range(50):
        image = Image(sound.blocks.copy(), dict(sound.kinds))
        for block in rng.choice(used, 3):
            offset = int(rng.integers(4, 4096) if rng.random() < 0.3 else rng.integers(4, 80))
            image.blocks[block, offset] ^= np.uint8(1 << int(rng.integers(0, 8)))
        image.seal()
        with memory_file(image.blocks) as path, Path(os.devnull).open("wb") as out:
            metadata.check(path)
            try:
                metadata.dump(path, out)
                metadata.usage(path)
                metadata.delta_ranges(path, 2, 5)
            except BlocksnapError:
                pass
