"""Images made by umoci, skopeo and mmdebstrap, once a session: fixtures for whoever needs a real image.

debian_oci_layout, debian_docker_archive, debian_unpacked; small_oci_layout, small_docker_archive,
small_oci_archive, small_unpacked. The unpacked ones are what `umoci unpack` makes of the image: the truth
to compare with.
"""

import fcntl
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = [
    "debian_docker_archive",
    "debian_oci_layout",
    "debian_unpacked",
    "image_cache",
    "small_docker_archive",
    "small_oci_archive",
    "small_oci_layout",
    "small_unpacked",
]

_TAR = ("tar", "--format=pax", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--sort=name")


def require_root() -> None:
    """Skip a test that needs root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


def require_tools(*names: str) -> None:
    """Skip a test that needs programs which are not there."""
    if missing := [name for name in names if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")


def run(*command: str | Path) -> None:
    """Run a program; what it printed is in the error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"


def umoci(verb: str, layout: Path, *arguments: str | Path) -> None:
    """Run an umoci verb on the image "latest" of a layout."""
    run("umoci", *verb.split(), "--image", f"{layout}:latest", *arguments)


@pytest.fixture(scope="session")
def image_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that lives as long as the session and is shared by all its processes."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "images"
    cache.mkdir(exist_ok=True)
    return cache


def cached(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return the path of something that make makes; done once, whichever process comes first."""
    target, part = cache / name, cache / f"{name}.part"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(target)
    return target


# ---- a small image with every kind of file -----------------------------------------------------------------


@pytest.fixture(scope="session")
def small_oci_layout(image_cache: Path) -> Path:
    """An OCI layout "latest" of five small layers: every kind of file, of change and of builder."""
    require_root()
    require_tools("umoci", "tar", "setcap")
    return cached(image_cache, "small.oci", make_small_layout)


@pytest.fixture(scope="session")
def small_unpacked(small_oci_layout: Path, image_cache: Path) -> Path:
    """The root file system that umoci unpacks from the small image."""
    return cached(image_cache, "small", lambda part: umoci("unpack", small_oci_layout, part)) / "rootfs"


@pytest.fixture(scope="session")
def small_docker_archive(small_oci_layout: Path, image_cache: Path) -> Path:
    """The small image as skopeo writes it for docker load, named example.org/small:latest."""
    return cached(
        image_cache, "small.docker.tar", lambda part: _docker_archive(small_oci_layout, part, "small")
    )


@pytest.fixture(scope="session")
def small_oci_archive(small_oci_layout: Path, image_cache: Path) -> Path:
    """The small image as a tar of an OCI layout."""
    require_tools("skopeo")
    source = f"oci:{small_oci_layout}:latest"
    return cached(
        image_cache,
        "small.oci.tar",
        lambda part: run("skopeo", "copy", "-q", source, f"oci-archive:{part}:latest"),
    )


def make_small_layout(layout: Path) -> None:
    """Make an image of five layers in a new layout."""
    work = layout.with_name("small.work")
    shutil.rmtree(work, ignore_errors=True)
    bundle = work / "bundle"
    (work / "tree").mkdir(parents=True)
    run("umoci", "init", "--layout", layout)
    umoci("new", layout)
    make_odd_tree(work / "tree")
    _add_tree(layout, work / "tree", work / "layer.tar")
    umoci("unpack", layout, bundle)
    change_odd_tree(bundle / "rootfs")
    umoci("repack", layout, "--refresh-bundle", bundle)
    (work / "new").mkdir()
    (work / "new" / "inside").write_text("all else is hidden\n")
    umoci("insert", layout, "--opaque", work / "new", "/opaque")
    umoci("insert", layout, "--whiteout", "/usr/share/doomed")
    _add_hand_made_layer(layout, work)
    shutil.rmtree(work)


def _add_tree(layout: Path, tree: Path, tar: Path) -> None:
    run(*_TAR, "-C", tree, "-cf", tar, ".")
    umoci("raw add-layer", layout, tar)


def make_odd_tree(root: Path) -> None:
    """Fill a directory with files of every kind, odd names, modes, owners, times and attributes."""
    for name in (
        "usr/bin",
        "usr/share/doomed",
        "etc",
        "dev",
        "opaque/deep",
        "tmp",
        "var/log",
        "closed",
        "swap/in",
    ):
        (root / name).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "usr/bin/tool").write_bytes(b"\x7fELF" + bytes(9000))
    (root / "usr/bin/tool").chmod(0o4755)
    os.link(root / "usr/bin/tool", root / "usr/bin/same-tool")
    run("setcap", "cap_net_raw+ep", root / "usr/bin/tool")
    (root / "usr/share/doomed/file").write_text("gone in the third layer\n")
    for name in ("one", "two", "deep/three"):
        (root / "opaque" / name).write_text(f"{name}\n")
    (root / "etc/absolute").symlink_to("/etc/passwd")
    (root / "etc/dangling").symlink_to("nowhere/at/all")
    os.link(root / "etc/absolute", root / "etc/absolute-again", follow_symlinks=False)
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (root / "etc/empty").touch()
    os.mkfifo(root / "dev/pipe", 0o620)
    os.mknod(root / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "dev/disk", stat.S_IFBLK | 0o660, os.makedev(259, 300))
    (root / "tmp").chmod(0o1777)
    (root / "closed/secret").write_text("no one may read this\n")
    (root / "closed/secret").chmod(0)
    (root / "closed").chmod(0)
    (root / "swap/in/file").write_text("a directory turns into a file\n")
    (root / "swap/file").write_text("a file turns into a directory\n")
    (root / "swap/link").symlink_to("in")
    _odd_names(root)
    _odd_metadata(root)


def _odd_names(root: Path) -> None:
    (root / ("long-" * 40)).write_text("a name of 200 bytes\n")
    (root / "deep").mkdir()
    directory = root / "deep"
    for _ in range(12):
        directory = directory / ("component-" * 4)
        directory.mkdir()
    (directory / "leaf").symlink_to("x" * 300)
    (root / "naïve \u2603\n\\").write_text("utf-8, a line feed\n")
    Path(os.fsdecode(os.fsencode(root) + b"/latin-\xe9")).write_text("not utf-8\n")


def _odd_metadata(root: Path) -> None:
    with (root / "var/log/sparse").open("wb") as file:
        for at in (0, 3 << 20, 40 << 20):
            file.seek(at)
            file.write(b"data" * 1024)
        file.truncate(64 << 20)
    os.setxattr(root / "etc/passwd", "user.text", b"value")
    os.setxattr(root / "etc/passwd", "user.binary", bytes(range(256)))
    os.setxattr(root / "etc", "user.directory", b"on a directory")
    os.chown(root / "etc/passwd", 1234, 70000)
    os.chown(root / "etc/dangling", 99, 98, follow_symlinks=False)
    os.chown(root / "var", 65534, 65534)
    (root / "var").chmod(0o2775)
    os.utime(root / "etc/empty", ns=(0, 0))
    os.utime(root / "etc/passwd", ns=(0, 1_700_000_000_123_456_789))
    os.utime(root / "etc/dangling", ns=(0, 1_600_000_000_999_999_999), follow_symlinks=False)
    os.utime(root / "usr/bin/tool", ns=(0, 4_000_000_000_000_000_001))
    os.utime(root / "dev/null", ns=(0, -1_000_000_000))
    os.utime(root / "etc", ns=(0, 1_500_000_000_000_000_007))
    os.utime(root, ns=(0, 1_400_000_000_000_000_005))


def change_odd_tree(root: Path) -> None:
    """Change a tree that make_odd_tree made in every way that a layer can tell."""
    (root / "etc/empty").unlink()
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\n")
    (root / "etc/new").write_text("new\n")
    os.link(root / "etc/new", root / "etc/new-again")
    (root / "var/log").chmod(0o700)
    os.setxattr(root / "etc", "user.directory", b"changed")
    os.unlink(root / "dev/pipe")
    os.mknod(root / "dev/pipe", stat.S_IFCHR | 0o600, os.makedev(5, 1))
    shutil.rmtree(root / "deep")
    shutil.rmtree(root / "swap/in")
    (root / "swap/in").write_text("a file now\n")
    (root / "swap/file").unlink()
    (root / "swap/file").mkdir(mode=0o750)
    (root / "swap/file/inside").write_text("inside\n")
    (root / "swap/link").unlink()
    (root / "swap/link").mkdir()
    (root / "etc/dangling").unlink()
    (root / "etc/dangling").symlink_to("/elsewhere")


def _add_hand_made_layer(layout: Path, work: Path) -> None:
    """A layer as other builders make them: through a symlink of a lower layer, one name twice."""
    tree, tar = work / "hand", work / "hand.tar"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/late").write_text("lands in usr/bin\n")
    run(*_TAR, "-C", tree, "-cf", tar, "bin/late")
    (tree / "bin/late").write_text("the last entry of a name wins\n")
    run(*_TAR, "-C", tree, "-P", "--transform=s,^,/,", "-rf", tar, "bin/late")
    umoci("raw add-layer", layout, tar)


def _docker_archive(layout: Path, target: Path, name: str) -> None:
    require_tools("skopeo")
    destination = f"docker-archive:{target}:example.org/{name}:latest"
    run("skopeo", "copy", "-q", f"oci:{layout}:latest", destination)


# ---- Debian ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def debian_oci_layout(image_cache: Path) -> Path:
    """An OCI layout "latest" of a Debian root file system and two layers of changes on it."""
    require_root()
    require_tools("mmdebstrap", "umoci", "tar", "setcap")
    return cached(image_cache, "debian.oci", make_debian_layout)


@pytest.fixture(scope="session")
def debian_docker_archive(debian_oci_layout: Path, image_cache: Path) -> Path:
    """The Debian image as skopeo writes it for docker load, named example.org/debian:latest."""
    return cached(
        image_cache, "debian.docker.tar", lambda part: _docker_archive(debian_oci_layout, part, "debian")
    )


@pytest.fixture(scope="session")
def debian_unpacked(debian_oci_layout: Path, image_cache: Path) -> Path:
    """The root file system that umoci unpacks from the Debian image."""
    return cached(image_cache, "debian", lambda part: umoci("unpack", debian_oci_layout, part)) / "rootfs"


def make_debian_layout(layout: Path) -> None:
    """Make a Debian image of three layers in a new layout; skip where no Debian mirror answers."""
    work = layout.with_name("debian.work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    command = ("mmdebstrap", "--quiet", "--variant=essential", "bookworm", str(work / "base.tar"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs a Debian mirror: {done.stderr.strip().splitlines()[-1:]}")
    run("umoci", "init", "--layout", layout)
    umoci("new", layout)
    umoci("raw add-layer", layout, work / "base.tar")
    bundle = work / "bundle"
    umoci("unpack", layout, bundle)
    _install(bundle / "rootfs")
    umoci("repack", layout, "--refresh-bundle", bundle)
    _trim(bundle / "rootfs")
    umoci("repack", layout, "--refresh-bundle", bundle)
    shutil.rmtree(work)


def _install(root: Path) -> None:
    (root / "srv/database").mkdir()
    (root / "srv/database/rows").write_bytes(os.urandom(1 << 20))
    (root / "usr/local/bin/server").write_bytes((root / "usr/bin/env").read_bytes())
    run("setcap", "cap_net_bind_service+ep", root / "usr/local/bin/server")
    os.link(root / "usr/local/bin/server", root / "usr/local/bin/server-admin")
    os.setxattr(root / "srv/database", "user.owner", b"server")
    os.chown(root / "srv/database", 999, 999)
    os.mknod(root / "dev/loop-control", stat.S_IFCHR | 0o660, os.makedev(10, 237))
    os.mkfifo(root / "run/initctl", 0o600)
    (root / "etc/server.conf").symlink_to("/srv/database/rows")


def _trim(root: Path) -> None:
    shutil.rmtree(root / "usr/share/doc")
    shutil.rmtree(root / "usr/share/locale", ignore_errors=True)
    (root / "etc/issue").unlink()
    (root / "etc/motd").unlink(missing_ok=True)
    shutil.rmtree(root / "opt")
    (root / "opt").symlink_to("srv")
    (root / "etc/hostname").write_text(f"{socket.AF_UNIX}\n")
    (root / "usr/bin/env").chmod(0o2755)
