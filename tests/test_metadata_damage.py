"""Deliberate damage, each kind with the verdict it must get; nothing hangs or crashes on any of it."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tests.thin_damage_maps
import tests.thin_damage_trees  # noqa: F401 - both fill KINDS
from blocksnap import metadata
from blocksnap.errors import BlocksnapError
from tests.thin_damage import CLEAN, KINDS, Damage, sound_image
from tests.thin_image import Image

SOUND = sound_image()


def damaged(kind: Damage, path: Path) -> Path:
    image = Image(SOUND.blocks.copy(), dict(SOUND.kinds))
    kind.apply(image)
    return image.save(path, seal=kind.sealed)


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


def name_of(kind: Damage) -> str:
    return kind.name


def test_the_undamaged_image_is_clean(tmp_path: Path) -> None:
    assert metadata.check(SOUND.save(tmp_path / "metadata")).findings == ()


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_damage_gets_its_verdict(kind: Damage, tmp_path: Path) -> None:
    report = metadata.check(damaged(kind, tmp_path / "metadata"))
    if kind.finding == CLEAN:
        assert report.findings == ()
        return
    assert any(matches(finding, kind.finding) for finding in report.findings), report.findings
    if kind.alone:
        grave = [finding for finding in report.findings if finding.severity != "warning"]
        assert [finding for finding in grave if not matches(finding, kind.finding)] == []
    assert report.damaged == (not kind.finding.startswith("warning"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.accepted is not None], ids=name_of)
def test_thin_check_accepts_or_refuses_as_known(kind: Damage, tmp_path: Path) -> None:
    if shutil.which("thin_check") is None:
        pytest.skip("needs thin_check of thin-provisioning-tools")
    path = damaged(kind, tmp_path / "metadata")
    done = subprocess.run(["thin_check", "-q", path], capture_output=True, check=False, timeout=60)
    assert (done.returncode == 0) == kind.accepted, done.stderr


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_other_walks_end_in_a_result_or_one_clear_error(kind: Damage, tmp_path: Path) -> None:
    path = damaged(kind, tmp_path / "metadata")
    with Path(os.devnull).open("wb") as out:
        for walk in (
            lambda: metadata.dump(path, out),
            lambda: metadata.write_delta(path, 1, 6, out),
            lambda: metadata.delta_ranges(path, 6, 1),
            lambda: metadata.usage(path),
        ):
            message = message_of(walk)
            assert message is None or re.fullmatch(f"{re.escape(str(path))}: .+", message)


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_under_right_checksums_are_survived(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    used = np.array(sorted(SOUND.kinds))
    for _ in range(50):
        image = Image(SOUND.blocks.copy(), dict(SOUND.kinds))
        for block in rng.choice(used, 3):
            offset = int(rng.integers(4, 4096) if rng.random() < 0.3 else rng.integers(4, 80))
            image.blocks[block, offset] ^= np.uint8(1 << int(rng.integers(0, 8)))
        path = image.save(tmp_path / "metadata")
        metadata.check(path)
        with Path(os.devnull).open("wb") as out:
            try:
                metadata.dump(path, out)
                metadata.usage(path)
                metadata.delta_ranges(path, 2, 5)
            except BlocksnapError:
                pass
