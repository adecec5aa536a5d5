"""Build csrc/ so that it counts what runs, run the tests that reach it, and print its coverage.

    python -m tests.coverage [--only NAME...] [DIRECTORY]

needs clang with its runtime, llvm-cov and llvm-profdata. NAME is `c` (the C tests and the fuzzers'
corpus), `python` (the tests of what uses the module) or `kernel` (those that need a device-mapper, in the
guest); all by default.
The directory (build/coverage) keeps the builds and what was counted, so that a later run adds to it.

Printed for each file: lines, functions, and edges. An edge is one outcome of one condition, as llvm-cov
counts branches: both sides of every `if`, loop, `?:`, `&&`, `||` and `case`. Nothing of csrc/ is left out,
and processes that are killed count too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.kernel import user_mode

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
PACKAGES = "clang llvm libclang-rt-dev cmake ninja-build"
TOOLS = ("clang", "cmake", "ctest", "ninja", "llvm-cov", "llvm-profdata")
KINDS = ("lines", "functions", "branches")
PYTHON_TESTS = (
    *(
        "tests/test_pool.py",
        "tests/test_metadata.py",
        "tests/test_user_pool.py",
        "tests/test_metadata_damage.py",
    ),
    *("tests/test_pool_repair.py", "tests/test_pool_scrub.py", "tests/test_pool_server.py", "tests/fuzz"),
    *(
        "tests/test_device_mounts.py",
        "tests/test_mount.py",
        "tests/test_cli_pool.py",
        "tests/test_cli_device.py",
    ),
    *("tests/test_model.py", "tests/test_traces_text.py", "tests/test_traces_binary.py"),
)
KERNEL_TESTS = (
    *("test_device_mapper.py", "test_thin_pool.py", "test_kernel_pool.py", "test_kernel_refusals.py"),
    *("test_kernel_devices.py", "test_kernel_leftovers.py", "test_udev.py", "test_dm_snapshot.py"),
    *("test_take_over.py", "test_scrub_errors.py"),
)


class Run:
    """The builds below a directory, and where their profiles go."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.profiles = directory / "profiles"
        self.profiles.mkdir(parents=True, exist_ok=True)
        self.python = directory / "venv" / "bin" / "python"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "CC": "clang", "LLVM_PROFILE_FILE": f"{self.profiles}/%c%m.profraw"}

    def do(self, *command: str | Path) -> None:
        subprocess.run(command, cwd=ROOT, env=self.environment, check=True)

    def c(self) -> None:
        build = self.directory / "c"
        options = ["-DBLOCKSNAP_TESTS=ON", "-DBLOCKSNAP_COVERAGE=ON", "-DCMAKE_BUILD_TYPE=Debug"]
        self.do("cmake", "-S", SOURCES, "-B", build, "-G", "Ninja", *options)
        self.do("cmake", "--build", build)
        self.do("ctest", "--test-dir", build, "--output-on-failure", "--parallel", str(os.cpu_count()))

    def module(self) -> None:
        """Install this tree for a Python of its own."""
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", self.directory / "venv"], check=True)
            self.do(self.python, "-m", "pip", "install", "-q", "cffi", "scikit-build-core", "cmake", "ninja")
        settings = ["build-dir=" + str(self.directory / "module"), "cmake.build-type=Debug"]
        settings.append("cmake.define.BLOCKSNAP_COVERAGE=ON")
        words = [f"-C{setting}" for setting in settings]
        pip: list[str | Path] = [self.python, "-m", "pip", "install", "-q", "--no-build-isolation"]
        self.do(*pip, *words, "-e", f"{ROOT}[test]")

    def python_tests(self) -> None:
        self.module()
        self.do(self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PYTHON_TESTS)

    def kernel_tests(self) -> None:
        if lack := user_mode.missing():
            raise SystemExit(f"coverage: the kernel tests need {lack}")
        self.module()
        tests = [f"tests/kernel/guest/{name}" for name in KERNEL_TESTS]
        pytest = f"{self.python} -m pytest -q --kernel=host -p no:cacheprovider --basetemp=/dev/shm/pytest"
        # Files of the host cannot be mapped to be written.
        script = f"mkdir /dev/shm/counted; {pytest} {' '.join(tests)}; cp /dev/shm/counted/* {self.profiles}/"
        guest = ["-m", "tests.kernel.user_mode", "--timeout", "1800", "--writable", str(self.profiles)]
        counted = "LLVM_PROFILE_FILE=/dev/shm/counted/%cguest-%m.profraw"
        self.do(self.python, *guest, "env", counted, "bash", "-c", script)

    def objects(self) -> Iterator[Path]:
        for path in sorted((self.directory / "c").glob("*")):
            if path.is_file() and path.name.startswith(("test_", "replay_")):
                yield path
        yield from (self.directory / "venv").glob("lib/*/site-packages/blocksnap/_blocksnap*.so")

    def coverage(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return, of each file, how many of each kind there are and how many ran."""
        merged = self.directory / "all.profdata"
        profiles = [path for path in self.profiles.glob("*.profraw") if path.stat().st_size]
        self.do("llvm-profdata", "merge", "-sparse", *profiles, "-o", merged)
        first, *others = self.objects()
        words = [word for path in others for word in ("-object", path)]
        command = ["llvm-cov", "export", "-summary-only", f"-instr-profile={merged}", first, *words, SOURCES]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        return {
            Path(file["filename"]).name: {
                kind: (file["summary"][kind]["count"], file["summary"][kind]["covered"]) for kind in KINDS
            }
            for file in json.loads(done.stdout)["data"][0]["files"]
        }


def print_table(files: dict[str, dict[str, tuple[int, int]]]) -> None:
    def row(name: str, counts: dict[str, tuple[int, int]]) -> str:
        cells = [
            f"{ran:6} of {all_:5} {100 * ran / all_ if all_ else 100:6.1f} %" for all_, ran in counts.values()
        ]
        return f"{name:24}" + "".join(cells)

    print(f"{'':24}{'lines':>24}{'functions':>24}{'edges':>24}")
    for name, counts in sorted(files.items()):
        print(row(name, counts))
    total = {
        kind: (sum(c[kind][0] for c in files.values()), sum(c[kind][1] for c in files.values()))
        for kind in KINDS
    }
    print(row("all of csrc/", total))


def runtime() -> Path:
    """Return where the library is that counts, if it is there."""
    name = f"libclang_rt.profile-{os.uname().machine}.a"
    words = ["clang", f"--print-file-name={name}"]
    return Path(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of csrc/ by the tests.")
    parser.add_argument("--only", action="append", choices=("c", "python", "kernel"), default=[])
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "build" / "coverage")
    options = parser.parse_args()
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        parser.error(f"needs {' '.join(absent)} (apt-get install {PACKAGES})")
    if not runtime().exists():
        parser.error(f"clang lacks its runtime, {runtime()} (apt-get install {PACKAGES})")
    run = Run(options.directory.resolve())
    for name, part in (("c", run.c), ("python", run.python_tests), ("kernel", run.kernel_tests)):
        if not options.only or name in options.only:
            part()
    print_table(run.coverage())


if __name__ == "__main__":
    main()
