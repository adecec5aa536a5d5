"""What the tests of layers share: roots to extract into, and a way to be an ordinary user."""

import ctypes
import io
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from blocksnap.archive import apply_layer
from tests.hostile_tars import tar
from tests.images import require_root
from tests.trees import describe_tree

__all__ = ["apply", "as_ordinary_user", "empty", "layer_root", "needs_root", "surroundings", "users_root"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def layer_root(tmp_path: Path) -> Path:
    """An empty root beside files that no layer may touch."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret\n")
    (outside / "kept").mkdir()
    (tmp_path / "secret").write_text("secret\n")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def apply(root: Path, *entries: bytes) -> None:
    apply_layer(io.BytesIO(tar(*entries)), root)


def empty(root: Path) -> None:
    for child in root.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def surroundings(root: Path) -> dict[str, object]:
    """Describe all that lies beside the root, contents included."""
    found = describe_tree(root.parent)
    return {
        name: (about, (root.parent / name).read_bytes() if about["size"] is not None else b"")
        for name, about in found.items()
        if name.split("/")[0] != root.name
    }


def as_ordinary_user(work: Callable[[], None]) -> None:
    """Run something in a child that is nobody; its failure is the test's."""
    require_root()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else /proc/self belongs to root
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def users_root(tmp_path: Path) -> Path:
    """A root that belongs to nobody, in a directory nobody can reach."""
    for directory_above in (tmp_path, *tmp_path.parents):
        if directory_above.stat().st_uid == os.geteuid() and str(directory_above).startswith("/tmp/"):
            directory_above.chmod(directory_above.stat().st_mode | 0o755)
    (tmp_path / "root").mkdir()
    os.chown(tmp_path / "root", 65534, 65534)
    return tmp_path / "root"
