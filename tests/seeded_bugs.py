"""Bugs on purpose in the code that writes pools (csrc/seed_bug.h), and which suite of C tests catches each.

    python -m tests.seeded_bugs [NAME...]

builds the C tests once with all bugs in it, runs the suites, the quickest first, on each bug and prints a
table.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUGS", "SUITES", "Bug", "Catch", "build", "catch", "run"]

ROOT = Path(__file__).resolve().parent.parent
SUITES = (
    ("test_block_manager",),
    ("test_thin_rebuild",),
    ("test_thin_metadata",),
    ("test_crash", "1000", "50"),
    ("test_thin_io",),
    ("test_faults", "1"),
)
_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Bug:
    number: int
    name: str
    what: str

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Catch:
    """The suite that failed, what it said last, and the seconds until then."""

    suite: str
    message: str
    seconds: float


def _bugs() -> list[Bug]:
    text = (ROOT / "csrc" / "seed_bug.h").read_text()
    found = re.findall(r"^\tBUG_(?!COUNT)(\w+)(?: = 1)?,\s*(?:/\* (.*) \*/)?$", text, re.MULTILINE)
    return [Bug(number, name, what) for number, (name, what) in enumerate(found, 1)]


BUGS = _bugs()


def build(directory: Path) -> Path:
    """Build the suites with every bug in them, to be chosen by the environment; return the directory."""
    source = str(ROOT / "csrc")
    configure = ["cmake", "-S", source, "-B", str(directory), "-G", "Ninja", "-DBLOCKSNAP_TESTS=ON"]
    options = ["-DBLOCKSNAP_SEED_BUG=environment", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_C_FLAGS=-O1"]
    targets = [suite[0] for suite in SUITES]
    for command in ([*configure, *options], ["cmake", "--build", str(directory), "--target", *targets]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{done.stdout}{done.stderr}")
    return directory


def run(directory: Path, suite: tuple[str, ...], number: int) -> str | None:
    """Run a suite with a bug (0: none); return the last line that it says if it fails, else None."""
    try:
        done = subprocess.run(
            [directory / suite[0], *suite[1:]],
            cwd=directory,  # where one that is killed may leave files
            env={**os.environ, "BLOCKSNAP_SEED_BUG": str(number)},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"it does not end within {_SECONDS} seconds"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]


def catch(directory: Path, bug: Bug) -> Catch | None:
    """Return which suite catches a bug; None if none does."""
    begin = time.monotonic()
    for suite in SUITES:
        message = run(directory, suite, bug.number)
        if message is not None:
            return Catch(" ".join(suite), message, time.monotonic() - begin)
    return None


def main(names: list[str]) -> int:
    chosen = [bug for bug in BUGS if not names or bug.name in names or str(bug) in names]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="blocksnap-seeded-bugs-") as directory:
        build(Path(directory))
        for bug in chosen:
            found = catch(Path(directory), bug)
            missed += found is None
            print(f"{bug.number:3}  {bug!s:34} {found.suite if found else 'NOT CAUGHT':20}", end="")
            print(f" {found.seconds:5.1f} s" if found else "", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} seeded bugs are caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
