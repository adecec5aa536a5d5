"""`blocksnap doctor`: what it finds here, and that it takes away the leftovers of the dead alone."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blocksnap import drivers, mount
from blocksnap.cli.doctor import ABILITIES, Part, as_dict, examine, missing_for, remove_all
from blocksnap.cli.leftovers import Leftover, dead_exports, dead_work_directories

MAIN = [sys.executable, "-c", "from blocksnap.cli import main; main()"]

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK), reason="needs root and loop devices"
)


def places_below(directory: Path) -> list[str]:
    mounts = [entry.target for entry in mount.mount_table() if str(directory) in entry.target]
    return mounts + [
        loop.backing_path for loop in mount.loop_devices() if str(directory) in loop.backing_path
    ]


def leftovers_below(directory: Path) -> list[Leftover]:
    return [found for found in dead_work_directories() if str(directory) in found.description]


def test_every_ability_needs_parts_that_are_examined() -> None:
    names = {part.name for part in examine()}
    for ability in ABILITIES:
        assert set(ability.needs) <= names, ability.name


def test_parts_tell_how_to_get_what_is_missing() -> None:
    for part in examine():
        assert part.detail
        assert part.present or part.get, part.name


def test_root_is_found_as_it_is() -> None:
    root = next(part for part in examine() if part.name == "root")
    assert root.present == (os.geteuid() == 0)


def test_ability_without_one_of_its_parts_is_not_possible() -> None:
    parts = [
        Part("root", present=True, detail="", get=""),
        Part("overlayfs", present=False, detail="", get="modprobe overlay"),
    ]
    overlay = next(ability for ability in ABILITIES if ability.name == "driver overlay")
    assert [part.name for part in missing_for(overlay, parts)] == ["overlayfs"]
    told = as_dict(parts, [], cleaned=False, failures=[])
    assert isinstance(told["abilities"], list)
    row = next(row for row in told["abilities"] if row["name"] == "driver overlay")
    assert row == {"name": "driver overlay", "possible": False, "missing": ["overlayfs"]}


def test_tool_that_is_not_on_the_path_is_missing_with_its_package(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [*MAIN, "doctor", "--json"], env=environment, capture_output=True, text=True, check=True
    )
    parts = {part["name"]: part for part in json.loads(done.stdout)["parts"]}
    assert parts["skopeo"] == {
        "name": "skopeo",
        "present": False,
        "detail": "not installed",
        "get": "apt install skopeo",
    }


def test_json_names_abilities_parts_and_leftovers() -> None:
    done = subprocess.run([*MAIN, "doctor", "--json"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert {"abilities", "parts", "leftovers", "cleaned"} <= told.keys()
    assert told["cleaned"] is False


@pytest.mark.skipif(shutil.which("fuse2fs") is None, reason="needs fuse2fs")
def test_version_is_the_tools_own_and_not_that_of_its_library() -> None:
    done = subprocess.run([*MAIN, "doctor", "--json"], capture_output=True, text=True, check=True)
    parts = {part["name"]: part for part in json.loads(done.stdout)["parts"]}
    assert parts["fuse2fs"]["detail"] == parts["mkfs.ext4"]["detail"]


def test_text_says_yes_or_no_for_every_ability() -> None:
    done = subprocess.run([*MAIN, "doctor"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    for ability in ABILITIES:
        (line,) = (line for line in lines if ability.name in line)
        assert line.split()[0] in ("yes", "no")


def test_leftover_that_cannot_be_removed_does_not_keep_the_others() -> None:
    removed: list[str] = []

    def fail() -> None:
        raise OSError(errno.EBUSY, "busy")

    failures = remove_all([Leftover("first", fail), Leftover("second", lambda: removed.append("second"))])
    assert removed == ["second"]
    assert len(failures) == 1
    assert failures[0].startswith("first: ")


@needs_root
@pytest.mark.parametrize("driver", ["overlay", "thin", "unionfs", "qcow2"])
def test_killed_comparison_is_cleared_away_and_a_living_one_is_not(tmp_path: Path, driver: str) -> None:
    if (reason := dict(drivers.available(tmp_path)).get(driver)) is not None:
        pytest.skip(f"needs the driver {driver}: {reason}")
    started = tmp_path / "started"
    command = ["sh", "-c", f"echo $$ > {started}.new; mv {started}.new {started}; exec sleep 1000"]
    arguments = ["compare", "--drivers", driver, "--work-dir", str(tmp_path), "--", *command]
    process = subprocess.Popen([*MAIN, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert leftovers_below(tmp_path) == []
    process.kill()
    process.wait()
    os.kill(int(started.read_text()), signal.SIGKILL)
    assert places_below(tmp_path) != []
    (leftover,) = leftovers_below(tmp_path)
    assert remove_all([leftover]) == []
    assert places_below(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["started"]


@needs_root
@pytest.mark.skipif(not os.access("/dev/fuse", os.W_OK), reason="needs /dev/fuse")
def test_export_without_a_server_is_found_and_taken_down_with_what_is_mounted_on_it(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "mounted\n", "the server did not start"
    assert exports_below(tmp_path) == []
    server.kill()
    server.wait()
    assert len(places_below(tmp_path)) == 3
    (leftover,) = exports_below(tmp_path)
    assert remove_all([leftover]) == []
    assert places_below(tmp_path) == []


def exports_below(directory: Path) -> list[Leftover]:
    return [found for found in dead_exports() if str(directory) in found.description]


_SERVER = """
import subprocess, sys, time
from pathlib import Path
from blocksnap import Pool, mount
from blocksnap._native import check, ffi, lib

root = Path(sys.argv[1])
(root / "export").mkdir()
(root / "mounted").mkdir()
device = Pool.create(root / "pool", size="64M").create_device("d", size="32M").hold()
export = ffi.new("struct bs_export **")
check(lib.bs_export_start(str(root / "export").encode(), 2, 1, export))
with device.handle() as pointer:
    check(lib.bs_export_add(export[0], b"d", pointer))
loop = mount.LoopDevice.attach(root / "export" / "d")
subprocess.run(["/usr/sbin/mkfs.ext4", "-q", loop.path], check=True)
mount.mount(loop.path, root / "mounted", "ext4")
(root / "mounted" / "dirty").write_bytes(bytes(100000))
print("mounted", flush=True)
time.sleep(1000)
"""
