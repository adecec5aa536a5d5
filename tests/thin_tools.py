"""The kernel's thin tools as witnesses: what they print, and whether they and our check find a pool sound."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from blocksnap import metadata

__all__ = ["assert_sound", "needs_thin_tools", "our_text", "restore", "thin_tool"]

needs_thin_tools = pytest.mark.skipif(
    shutil.which("thin_check") is None, reason="needs thin_check, thin_dump, ... of thin-provisioning-tools"
)


def thin_tool(name: str, *arguments: object) -> str:
    """Run a tool and return what it prints; it must succeed."""
    command = [name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def our_text(path: Path, left: int | None = None, right: int | None = None) -> str:
    """Return our dump of a metadata file, or our delta of two devices."""
    with tempfile.TemporaryFile("w+b") as output:
        if left is None or right is None:
            metadata.dump(path, output.fileno())
        else:
            metadata.write_delta(path, left, right, output.fileno())
        output.seek(0)
        return output.read().decode()


def assert_sound(path: Path) -> None:
    """Assert that thin_check and our own check find nothing in a metadata file that nobody has open."""
    assert metadata.check(path).findings == ()
    thin_tool("thin_check", "-q", path)


def restore(xml: str, path: Path, size: int = 4 << 20) -> None:
    """Write metadata with thin_restore."""
    source = path.with_suffix(".xml")
    source.write_text(xml)
    with path.open("wb") as target:
        target.truncate(size)
    thin_tool("thin_restore", "-i", source, "-o", path)
