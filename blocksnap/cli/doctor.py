"""`blocksnap doctor`: what this machine can run, what is missing for the rest, and how to get it."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..amplification.workloads import BUILT_IN
from ..errors import BlocksnapError
from .console import FAILED, JsonOption, print_json, stderr, stdout
from .leftovers import Leftover, find_leftovers, silent_servers

__all__ = ["doctor"]


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that a machine has or lacks: `detail` is its version or why it cannot be used, `get` the
    mend.
    """

    name: str
    present: bool
    detail: str
    get: str


@dataclass(frozen=True, slots=True)
class Ability:
    """Something blocksnap does and the parts it needs for that."""

    name: str
    needs: tuple[str, ...]


_MOUNTING = ("compiled core", "root", "/dev/fuse", "loop devices")
_QEMU = ("qemu-storage-daemon", "qemu-img")
_REFLINK = ("root", "loop devices", "mkfs.xfs", "xfs")
_BTRFS = ("root", "loop devices", "mkfs.btrfs", "btrfs")
_MAPPING = ("compiled core", "root", "loop devices", "mkfs.ext4", "ext4")

ABILITIES = (
    Ability("user engine: pools, snapshots, check, dump, delta", ("compiled core",)),
    Ability("mount thin devices, driver thin", (*_MOUNTING, "mkfs.ext4", "ext4")),
    Ability("thin devices with xfs", (*_MOUNTING, "mkfs.xfs", "xfs")),
    Ability(
        "driver thin without root", ("compiled core", "/dev/fuse", "fusermount3", "fuse2fs", "mkfs.ext4")
    ),
    Ability("driver overlay", ("root", "overlayfs")),
    Ability("driver unionfs, with and without root", ("/dev/fuse", "fuse-overlayfs", "fusermount3")),
    Ability("driver aufs", ("root", "aufs")),
    Ability("driver btrfs", ("root", "btrfs")),
    Ability("driver vfs", ()),
    Ability("driver qcow2", (*_MOUNTING, *_QEMU, "mkfs.ext4", "ext4")),
    Ability(
        "compare: every driver, the disk's own counter",
        (*_MOUNTING, "mkfs.ext4", "ext4", "overlayfs", "fuse-overlayfs", *_BTRFS, *_REFLINK, *_QEMU),
    ),
    Ability("workloads pgbench, postgres-load", ("PostgreSQL",)),
    Ability("workload fio", ("fio",)),
    Ability("workload package", ("root", "dpkg")),
    Ability("tests of pools", ("e2fsck", "thin_check", "thin_dump", "thin_delta")),
    Ability("tests of images", ("root", "skopeo", "umoci", "mmdebstrap")),
    Ability("kernel engine", ("root", "thin-pool target", "loop devices")),
    Ability("driver devicemapper", (*_MAPPING, "thin-pool target")),
    Ability("driver dm-snapshot", (*_MAPPING, "snapshot target")),
)

_FILE_SYSTEMS = (("overlayfs", "overlay"), ("ext4", "ext4"), ("xfs", "xfs"), ("btrfs", "btrfs"))

# The program, the argument that makes it print its version, the Debian package.
_TOOLS = (
    ("mkfs.ext4", "-V", "e2fsprogs"),
    ("e2fsck", "-V", "e2fsprogs"),
    ("mkfs.xfs", "-V", "xfsprogs"),
    ("mkfs.btrfs", "-V", "btrfs-progs"),
    ("fuse2fs", "-V", "fuse2fs"),
    ("fuse-overlayfs", "--version", "fuse-overlayfs"),
    ("qemu-storage-daemon", "--version", "qemu-system-common"),
    ("qemu-img", "--version", "qemu-utils"),
    ("fusermount3", "--version", "fuse3"),
    ("fio", "--version", "fio"),
    ("dpkg", "--version", "dpkg"),
    ("thin_check", "--version", "thin-provisioning-tools"),
    ("thin_dump", "--version", "thin-provisioning-tools"),
    ("thin_delta", "--version", "thin-provisioning-tools"),
    ("skopeo", "--version", "skopeo"),
    ("umoci", "--version", "umoci"),
    ("mmdebstrap", "--version", "mmdebstrap"),
)


def doctor(
    json: JsonOption = False,
    clean: Annotated[
        bool,
        typer.Option(
            "--clean", help="Remove the mounts, loop devices and directories of processes that died."
        ),
    ] = False,
) -> None:
    """Show what this machine can run, what is missing for the rest, and how to get it."""
    parts = examine()
    leftovers = find_leftovers()
    silent = silent_servers()
    failures = remove_all(leftovers) if clean else []
    if json:
        print_json(as_dict(parts, leftovers, silent, cleaned=clean, failures=failures))
    else:
        _print_tables(parts)
        _print_leftovers(leftovers, cleaned=clean)
        for line in silent:
            stdout.print(f"\n{line}", soft_wrap=True)
    for failure in failures:
        stderr.print(f"blocksnap: {failure}", soft_wrap=True)
    if failures:
        raise typer.Exit(FAILED)


def examine() -> list[Part]:
    """Look at everything that some ability needs."""
    return [
        _compiled_core(),
        _root(),
        _device("/dev/fuse", "/dev/fuse", "modprobe fuse; in a container: --device /dev/fuse"),
        _device("loop devices", "/dev/loop-control", "modprobe loop; in a container: --privileged"),
        *(_file_system(*names) for names in _FILE_SYSTEMS),
        _file_system("aufs", "aufs", get="a kernel built with it; overlay is its mainline successor"),
        _device(
            "device-mapper", "/dev/mapper/control", "modprobe dm-thin-pool (CONFIG_DM_THIN_PROVISIONING)"
        ),
        _target("thin-pool", "dm-thin-pool"),
        _target("snapshot", "dm-snapshot"),
        *(_tool(*tool) for tool in _TOOLS),
        _postgres(),
    ]


def missing_for(ability: Ability, parts: Sequence[Part]) -> list[Part]:
    """Return the parts that an ability needs and the machine lacks."""
    return [part for part in parts if part.name in ability.needs and not part.present]


def remove_all(leftovers: Sequence[Leftover]) -> list[str]:
    """Remove leftovers, each on its own; return a sentence for each that could not be removed."""
    failures = []
    for leftover in leftovers:
        try:
            leftover.remove()
        except (BlocksnapError, OSError) as error:
            failures.append(f"{leftover.description}: {error}")
    return failures


def as_dict(
    parts: Sequence[Part],
    leftovers: Sequence[Leftover],
    silent: Sequence[str] = (),
    *,
    cleaned: bool,
    failures: Sequence[str],
) -> dict[str, object]:
    """Return the JSON result."""
    abilities = [
        {
            "name": a.name,
            "possible": not missing_for(a, parts),
            "missing": [p.name for p in missing_for(a, parts)],
        }
        for a in ABILITIES
    ]
    return {
        "kernel": platform.release(),
        "abilities": abilities,
        "parts": [asdict(part) for part in parts],
        "leftovers": [leftover.description for leftover in leftovers],
        "silent": list(silent),
        "cleaned": cleaned,
        "failures": list(failures),
    }


def _compiled_core() -> Part:
    try:
        from .. import _native
    except ImportError as error:
        return Part("compiled core", present=False, detail=str(error), get="pip install .")
    return Part("compiled core", present=True, detail=Path(_native.file).name, get="")


def _root() -> Part:
    user = os.geteuid()
    return Part("root", user == 0, f"user id {user}", "run as root (sudo)")


def _device(name: str, path: str, get: str) -> Part:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Part(name, present=False, detail=f"{path}: {error.strerror}", get=get)
    return Part(name, present=True, detail=path, get=get)


def _target(kind: str, module: str) -> Part:
    name, get = f"{kind} target", f"modprobe {module}"
    try:
        from ..device_mapper import Control

        with Control.open() as control:
            version = ".".join(map(str, control.target_version(kind)))
    except (ImportError, BlocksnapError) as error:
        return Part(name, present=False, detail=str(error), get=get)
    return Part(name, present=True, detail=version, get=get)


def _file_system(name: str, kernel_name: str, *, get: str | None = None) -> Part:
    get = get or f"modprobe {kernel_name}"
    if kernel_name in Path("/proc/filesystems").read_text().split():
        return Part(name, present=True, detail="in /proc/filesystems", get=get)
    module = _output(["modprobe", "-n", "-v", kernel_name])
    if module is not None and "insmod" in module:
        return Part(name, present=True, detail="a module, loaded when needed", get=get)
    return Part(name, present=False, detail="not in /proc/filesystems", get=get)


def _tool(name: str, version: str, package: str) -> Part:
    get = f"apt install {package}"
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        return Part(name, present=False, detail="not installed", get=get)
    said, number = _output([path, version]) or "", r"(\d+\.\d[\w.+~-]*)"
    found = re.search(rf"{re.escape(name)}\D*{number}", said) or re.search(number, said)
    return Part(name, present=True, detail=found[1] if found else path, get=get)


def _postgres() -> Part:
    workload, get = BUILT_IN["pgbench"], "apt install postgresql"
    if (lacks := workload.missing()) is not None:
        return Part("PostgreSQL", present=False, detail=lacks.partition(":")[0], get=get)
    return Part("PostgreSQL", present=True, detail=workload.versions()["postgresql"], get=get)


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def _print_tables(parts: Sequence[Part]) -> None:
    able = Table("can", "what", "missing", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for ability in ABILITIES:
        missing = missing_for(ability, parts)
        able.add_row("no" if missing else "yes", ability.name, ", ".join(part.name for part in missing))
    stdout.print(able)
    found = Table("part", "found", "how to get it", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for part in parts:
        found.add_row(part.name, part.detail, "" if part.present else part.get)
    stdout.print()
    stdout.print(found)


def _print_leftovers(leftovers: Sequence[Leftover], *, cleaned: bool) -> None:
    if not leftovers:
        return
    stdout.print("\nremoved:" if cleaned else "\nleftovers of processes that died (--clean removes them):")
    for leftover in leftovers:
        stdout.print(f"  {leftover.description}", soft_wrap=True)
