"""What a result says of the machine it was taken on."""

import platform
import shutil
from pathlib import Path

import pytest

from blocksnap.amplification.machine import describe_machine


def test_machine_says_where_and_on_what_it_was_taken(tmp_path: Path) -> None:
    machine = describe_machine(tmp_path)
    assert machine["kernel"] == platform.release()
    assert machine["work_dir"] == str(tmp_path)
    assert machine["work_dir_file_system"] is not None


@pytest.mark.skipif(shutil.which("mke2fs", path="/usr/sbin:/sbin") is None, reason="needs mke2fs")
def test_versions_of_the_programs_below_drivers_are_numbers(tmp_path: Path) -> None:
    version = describe_machine(tmp_path)["mke2fs"]
    assert isinstance(version, str)
    assert version[0].isdigit()
