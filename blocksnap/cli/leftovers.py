"""What killed processes leave behind: finding it, and taking it away without touching what a living one uses.

Each kind of leftover has one finder in FINDERS; the order is the order of removal, because a work directory
may hold the mount of an export that died.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import dead_mounts, drivers, mount, pool_client
from ..amplification.testbed import DEFAULT_WORK_DIR, PREFIX, clear_below, owner_is_alive
from ..dm_cookie import own_left_cookies, remove_left_cookies
from ..drivers.root import DriverRoot, read_note
from ..errors import BlocksnapError
from ..kernel_leftovers import left_pools, remove_leftovers

__all__ = ["FINDERS", "Leftover", "find_leftovers", "silent_servers"]

_LAYER_PLACES = (("overlay", "merged"), ("unionfs", "merged"), ("aufs", "merged"), ("qcow2", "mounted"))
_COOKIE_SECONDS = 60.0
_DEVICE_DRIVERS: tuple[str, ...] = ("thin", "devicemapper", "dm-snapshot")


@dataclass(frozen=True, slots=True)
class Leftover:
    """One thing that may be removed: what it is, in words, and how."""

    description: str
    remove: Callable[[], object]


def find_leftovers() -> list[Leftover]:
    """Return everything that no living process of blocksnap uses, in the order in which it can be removed."""
    return [leftover for finder in FINDERS for leftover in finder()]


def dead_exports() -> Iterator[Leftover]:
    """Yield FUSE exports of blocksnap whose server is gone, with the loop devices and mounts above them."""
    for target in dead_mounts.dead_exports():
        yield Leftover(
            f"FUSE export without a server at {target}", partial(dead_mounts.end_dead_export, target)
        )


def silent_servers() -> list[str]:
    """Return a line for each living server of an export that does not answer: the process and the mend."""
    return [_silence(target) for target in dead_mounts.silent_exports()]


def _silence(target: str) -> str:
    server = None
    with suppress(BlocksnapError, OSError):
        server = pool_client.server_of(Path(target).parent)
    who = f"{server}: {server.mend}" if server else "a process: see who has /dev/fuse open"
    return f"FUSE export at {target} does not answer; its server is {who}"


def abandoned_layers() -> Iterator[Leftover]:
    """Yield the layers of containers and images that are mounted for a process that died."""
    for entry in mount.mount_table():
        place = _layer_at(Path(entry.target))
        if place is None:
            continue
        driver, root, id = place
        if not DriverRoot(root, driver).holders(id):
            what = f"layer {id} of {root}, mounted for a process that died"
            yield Leftover(what, partial(_end_layer, driver, root, id))


def _layer_at(target: Path) -> tuple[str, Path, str] | None:
    """Return driver, root and id of the layer whose place a path is, None when it is no such place."""
    if target.parent.name == "mnt":
        known, root, id = _DEVICE_DRIVERS, target.parents[1], target.name
    elif len(target.parts) > 4 and (target.parents[1].name, target.name) in _LAYER_PLACES:
        known, root, id = (target.parents[1].name,), target.parents[2], target.parent.name
    else:
        return None
    marker = root / "driver"
    if not ((root / "references").is_dir() and marker.is_file()):
        return None
    with suppress(BlocksnapError):
        if (driver := read_note(marker)) in known:
            return driver, root, id
    return None


def _end_layer(driver: str, root: Path, id: str) -> None:
    with drivers.open(driver, root) as opened, opened.mounted(id):
        pass  # taken over and given back


def dead_work_directories() -> Iterator[Leftover]:
    """Yield the work directories of `compare` whose process is gone."""
    for directory in sorted(_work_directories()):
        if not owner_is_alive(directory):
            yield Leftover(f"work directory of compare at {directory}", partial(_remove_directory, directory))


def _work_directories() -> set[Path]:
    """Find them by name where they are made by default, and by what is mounted or attached from elsewhere."""
    found = {
        path
        for parent in {DEFAULT_WORK_DIR, Path(tempfile.gettempdir())}
        for path in parent.glob(f"{PREFIX}*")
    }
    places = [*(entry.target for entry in mount.mount_table()), *mount.loop_files().values()]
    for place in map(Path, places):
        found |= {path for path in (place, *place.parents) if path.name.startswith(PREFIX)}
    return {path for path in found if path.is_dir()}


def _remove_directory(directory: Path) -> None:
    clear_below(directory)
    shutil.rmtree(directory)


def dead_pools() -> Iterator[Leftover]:
    """Yield the pools that the kernel runs for a process that died, with their devices, suspended or not."""
    for metadata in left_pools():
        what = f"pool of {metadata}, live in the kernel for a process that died"
        yield Leftover(what, partial(remove_leftovers, metadata))


def dead_cookies(older_than: float = _COOKIE_SECONDS) -> Iterator[Leftover]:
    """Yield the semaphores by which udev was to tell processes that died that it is done."""
    if keys := own_left_cookies(older_than):
        what = f"semaphores for udev that nobody waits for ({', '.join(f'{key:#x}' for key in keys)})"
        yield Leftover(what, remove_left_cookies)


FINDERS: tuple[Callable[[], Iterator[Leftover]], ...] = (
    dead_exports,
    abandoned_layers,
    dead_work_directories,
    dead_pools,
    dead_cookies,
)
