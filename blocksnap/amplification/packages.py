"""Workloads of many small files: a tar that is unpacked, and packages that dpkg installs over older versions.

The files are real ones, the sources of the running Python's standard library, so that the workloads need
nothing from a network; they are packed without times and owners, so that two runs on one machine get the same
bytes.
"""

import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from ..errors import BlocksnapError
from . import operations
from .child_process import WorkloadError
from .workload import Check, Counted, OperationWorkload

__all__ = ["PackageWorkload", "UntarWorkload"]

_PLACE = "usr/lib/blocksnap-workload"
_UPGRADE = b"# the newer version\n"


@dataclass(frozen=True, slots=True)
class UntarWorkload(OperationWorkload):
    """Unpacks one tar."""

    def stage(self, directory: Path, *, check: Check = lambda: None) -> Self:  # noqa: ARG002
        archive = directory / "files.tar"
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as members:
            for name, path in _sources(self.number("files")):
                member = tarfile.TarInfo(name)
                member.size, member.mode = path.stat().st_size, 0o644
                members.addfile(member, io.BytesIO(path.read_bytes()))
        return replace(self, material={"archive": str(archive)})

    def versions(self) -> dict[str, str]:
        return {"files": _origin()}


@dataclass(frozen=True, slots=True)
class PackageWorkload(OperationWorkload):
    """Upgrades packages whose older versions are in the image."""

    COUNTED: ClassVar[Counted] = Counted(
        "what dpkg and its children handed to write calls (wchar of /proc/self/io), less what they handed "
        "each other",
        "files, and dpkg's database, which is written anew for each package",
        "the packages' passage through pipes, whose size is known; names",
    )

    def missing(self) -> str | None:
        gone = [name for name in ("dpkg", "dpkg-deb") if shutil.which(name) is None]
        if gone:
            return f"{gone[0]} is not installed: this workload needs Debian's dpkg"
        return None if os.geteuid() == 0 else "dpkg installs packages for root alone"

    def stage(self, directory: Path, *, check: Check = lambda: None) -> Self:
        tree, debs = directory / "tree", directory / "debs"
        debs.mkdir()
        _make_database(tree)
        staged = []
        for name, files in self._packages():
            check()
            _install(tree, _build(debs, name, "1", files, b""))
            newer = _build(debs, name, "2", files, _UPGRADE)
            staged.append((str(newer), _piped_bytes(newer)))
        return replace(self, base=replace(self.base, tree=tree), material={"debs": staged})

    def versions(self) -> dict[str, str]:
        said = subprocess.run(["dpkg", "--version"], capture_output=True, text=True, check=True).stdout
        return {"files": _origin(), "dpkg": said.split("version ", 1)[-1].split()[0]}

    def _packages(self) -> Iterator[tuple[str, Sequence[tuple[str, Path]]]]:
        """Yield the name and the files of each package; neighbours of one directory come together."""
        files, count = list(_sources(self.number("files"))), self.number("packages")
        for number in range(count):
            share = files[number * len(files) // count : (number + 1) * len(files) // count]
            yield f"blocksnap-workload-{number}", share


def _origin() -> str:
    return f"standard library of Python {sys.version.split()[0]}"


def _sources(limit: int) -> Iterator[tuple[str, Path]]:
    """Yield the first `limit` sources of the standard library, in order: the name below it and the path."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), 0
    for place, directories, names in os.walk(library):
        directories[:] = sorted(set(directories) - {"__pycache__", "site-packages", "dist-packages"})
        for name in sorted(name for name in names if name.endswith(".py")):
            if found == limit:
                return
            found += 1
            path = Path(place) / name
            yield str(path.relative_to(library)), path


def _make_database(tree: Path) -> None:
    """Make a root directory in which dpkg knows of no packages."""
    for name in ("info", "updates", "triggers"):
        (tree / "var/lib/dpkg" / name).mkdir(parents=True)
    (tree / "var/lib/dpkg/status").touch()


def _install(tree: Path, deb: Path) -> None:
    try:
        operations.install_package(str(tree), str(deb))
    except OSError as error:
        raise WorkloadError(str(error)) from None


def _build(debs: Path, name: str, version: str, files: Sequence[tuple[str, Path]], more: bytes) -> Path:
    """Build a package of files, each with some more bytes at its end."""
    root, deb = debs / "root", debs / f"{name}_{version}.deb"
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: nobody <nobody@localhost>"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(control + "\nDescription: files of a workload\n")
    for inside, path in files:
        target = root / _PLACE / name / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() + more)
        target.chmod(0o644)
    command = ["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(root), str(deb)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1558396800"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BlocksnapError(f"dpkg-deb on {deb.name}: {done.stderr.strip()}")
    shutil.rmtree(root)
    return deb


def _piped_bytes(deb: Path) -> int:
    """Return what dpkg's processes hand each other to install a package: its two tars, packed and not."""
    unpacked = 0
    for part in ("--fsys-tarfile", "--ctrl-tarfile"):
        unpacked += len(subprocess.run(["dpkg-deb", part, str(deb)], capture_output=True, check=True).stdout)
    return deb.stat().st_size + unpacked
