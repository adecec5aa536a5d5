"""Measuring: each driver gets a fresh testbed, the base image, a container, the workload; counters are read
around it.

The window begins before the container's layer is created, because that is where a driver that copies whole
trees pays, and ends when everything is synced and the container is unmounted. What one driver does wrong is a
row with an error; the others go on. Signals are looked at between steps (interrupts.py), so that every step
is either undone or never begun.
"""

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .. import drivers, mount
from ..drivers import Accounting, Driver
from ..errors import ArgumentError, BlocksnapError, NotSupportedError
from .base_image import BaseImage
from .interrupts import deferred_interrupts
from .latency import latency_of
from .machine import describe_machine
from .result import BASELINE, Comparison, Measurement, Skipped, Target
from .testbed import DEFAULT_WORK_DIR, Testbed, check_space, open_testbed, work_directory
from .volume import Volume
from .workload import Outcome, Workload

__all__ = ["DEFAULT_BLOCK_SIZES", "DEFAULT_DRIVERS", "compare", "targets_for"]

DEFAULT_DRIVERS = ("thin", "overlay", "vfs", BASELINE)
DEFAULT_BLOCK_SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)

_log = logging.getLogger(__name__)

_MIB = 1 << 20
_CONTAINER = "container"

Progress = Callable[[Target, str], None]


def targets_for(names: Sequence[str], block_sizes: Sequence[int]) -> list[Target]:
    """Return what to measure: one target a driver, one a block size for drivers that have block sizes.

    Raises ArgumentError for a driver that is not registered, and when nothing is left to measure.
    """
    targets: list[Target] = []
    for name in dict.fromkeys(names):
        targets += [Target(name, size) for size in dict.fromkeys(_block_sizes(name, block_sizes))]
    if not targets:
        raise ArgumentError("nothing to compare: name at least one driver and one block size")
    return targets


def compare(
    workload: Workload,
    targets: Sequence[Target],
    *,
    work_dir: Path = DEFAULT_WORK_DIR,
    keep: bool = False,
    progress: Progress = lambda target, phase: None,  # noqa: ARG005
) -> Comparison:
    """Measure a workload on every target and return the figures.

    Needs root for loop devices; without it only drivers that need none run, in a plain directory. On Ctrl-C
    nothing stays mounted, and KeyboardInterrupt is raised. With keep the backing files stay in the work
    directory.
    """
    start = time.monotonic()
    results: list[Measurement] = []
    skipped: dict[str, str] = {}
    with deferred_interrupts() as interrupts, work_directory(work_dir, keep=keep) as directory:
        machine = describe_machine(work_dir)
        workload = _staged(workload, directory, interrupts.check)
        for target in targets:
            run = _Run(workload, target, directory, keep, interrupts.check, progress)
            if target.driver in skipped:
                continue
            interrupts.check()
            try:
                results.append(run.measure())
            except _CannotRunError as reason:
                skipped[target.driver] = str(reason)
            except Exception as error:  # noqa: BLE001 - a driver of a third party may raise anything
                _log.debug("%s failed", target.label, exc_info=True)
                results.append(Measurement(target=target, error=_sentence(error)))
    left_out = [Skipped(driver, reason) for driver, reason in skipped.items()]
    kept = str(directory) if keep else None
    return Comparison(machine, workload.describe(), results, left_out, time.monotonic() - start, kept)


def _staged(workload: Workload, directory: Path, check: Callable[[], None]) -> Workload:
    material = directory / "material"
    material.mkdir()
    return workload.stage(material, check=check)


class _CannotRunError(BlocksnapError):
    """This machine cannot run a driver: not a failure."""


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, BlocksnapError | OSError) else f"{type(error).__name__}: {error}"


def _block_sizes(name: str, wanted: Sequence[int]) -> Sequence[int | None]:
    if name == BASELINE:
        return (None,)
    try:
        return drivers.driver_class(name).block_sizes(wanted)
    except NotSupportedError:
        return (None,)


def _may_use_loop() -> bool:
    return os.geteuid() == 0 and os.access("/dev/loop-control", os.R_OK | os.W_OK)


@dataclass(frozen=True, slots=True)
class _Counters:
    backing: int | None
    used: int | None


@dataclass(frozen=True, slots=True)
class _Run:
    """One target from the empty file system to its figures."""

    workload: Workload
    target: Target
    directory: Path
    keep: bool
    check: Callable[[], None]
    progress: Progress

    @property
    def _pool_size(self) -> int:
        """Room for the image, a copy of it, and what the workload adds, which is unknown of a command."""
        return 3 * self.workload.base.total_bytes + self.workload.ROOM

    @property
    def _file_system_size(self) -> int:
        """The same for the testbed and for a file system on a thin device, so that mkfs chooses the same."""
        return max(2048 * _MIB, 2 * self._pool_size)

    def measure(self) -> Measurement:
        check_space(self.directory, self._pool_size)
        self._step("file system")
        name = self.target.label.replace(" ", "-")
        size = self._file_system_size
        testbed = open_testbed(self.directory, name, size, on_loop=_may_use_loop(), keep=self.keep)
        with testbed as bed, self._open_driver(bed) as driver:
            self._step("base image")
            parent = self._prepare(driver)
            return self._window(bed, driver, parent)

    def _step(self, phase: str) -> None:
        self.check()
        self.progress(self.target, phase)

    @contextmanager
    def _open_driver(self, bed: Testbed) -> Iterator[Driver | Volume]:
        driver = self._open(bed)
        try:
            yield driver
        finally:
            try:
                driver.cleanup()
            finally:
                driver.close()

    def _open(self, bed: Testbed) -> Driver | Volume:
        if self.target.driver == BASELINE:
            if os.geteuid() != 0:
                raise _CannotRunError("needs root to bind-mount a directory")
            return Volume(bed.root)
        options = {
            "block_size": self.target.block_size,
            "size": self._pool_size,
            "base_size": self._file_system_size,
            "preallocate": True,
        }
        try:
            known = inspect.signature(drivers.driver_class(self.target.driver)).parameters
            options = {name: value for name, value in options.items() if name in known}
            return drivers.open(self.target.driver, bed.root / "driver", **options)
        except NotSupportedError as error:
            prefix = f'driver "{self.target.driver}" cannot run here: '
            raise _CannotRunError(error.message.removeprefix(prefix)) from error

    def _prepare(self, driver: Driver | Volume) -> str:
        """Write the layers of the base image through the driver; return the id of the uppermost."""
        parent = None
        for layer in range(BaseImage.LAYERS):
            self.check()
            id = f"layer-{layer}"
            driver.create(id, parent)
            root = driver.get(id)
            try:
                self.workload.prepare(root, layer)
                mount.sync_filesystem(root)
            finally:
                driver.put(id)
            parent = id
        assert parent is not None
        return parent

    def _window(self, bed: Testbed, driver: Driver | Volume, parent: str) -> Measurement:
        driver.sync()
        bed.settle()
        before = _Counters(bed.written_bytes(), bed.used_bytes())
        self._step("container")
        start = time.perf_counter()
        driver.create_read_write(_CONTAINER, parent)
        root = driver.get(_CONTAINER)
        create_seconds = time.perf_counter() - start
        try:
            self._step("workload")
            outcome = self.workload.run(root, check=self.check)
            self.progress(self.target, "sync")
            start = time.perf_counter()
            mount.sync_filesystem(root)
        finally:
            driver.put(_CONTAINER)
        driver.sync()
        sync_seconds = time.perf_counter() - start
        accounting = driver.accounting(_CONTAINER)
        bed.settle()
        after = _Counters(bed.written_bytes(), bed.used_bytes())
        row = self._row(outcome, accounting, before, after)
        engine = getattr(driver, "engine", None)
        return replace(row, engine=engine, create_seconds=create_seconds, sync_seconds=sync_seconds)

    def _row(
        self, outcome: Outcome, accounting: Accounting, before: _Counters, after: _Counters
    ) -> Measurement:
        backing = _difference(before.backing, after.backing)
        changed = self.workload.changed_bytes
        used = _difference(before.used, after.used)
        by_driver = accounting.allocated_bytes is not None
        parts = _parts(accounting, backing)
        return Measurement(
            target=self.target,
            application_bytes=outcome.application_bytes,
            changed_bytes=outcome.application_bytes if changed is None else changed,
            changed_bytes_source="application_bytes" if changed is None else "workload",
            filesystem_bytes=accounting.filesystem_bytes,
            backing_bytes=backing,
            copy_bytes=accounting.copy_bytes,
            metadata_bytes=accounting.metadata_bytes,
            allocated_bytes=accounting.allocated_bytes if by_driver else used,
            allocated_bytes_source="driver" if by_driver else None if used is None else "statvfs",
            write_amplification_source=_source(backing, parts),
            parts=parts,
            seconds=outcome.seconds,
            operations=outcome.operations,
            latency=latency_of([outcome.samples] if outcome.samples else []),
        )


def _source(backing: int | None, parts: dict[str, int] | None) -> str | None:
    if backing is not None:
        return "loop device"
    return None if parts is None else "pool counters"


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _parts(accounting: Accounting, backing: int | None) -> dict[str, int] | None:
    """Split what reached the backing device; `outside` is what nobody above the device's own counter has
    counted.
    """
    counted = {
        "data": accounting.data_bytes,
        "copied": accounting.copy_bytes,
        "zero_filled": accounting.zero_filled_bytes,
        "pool_metadata": accounting.metadata_bytes,
    }
    known = {name: value for name, value in counted.items() if value is not None}
    if len(known) < len(counted):
        return None
    if backing is not None:
        known["outside"] = backing - sum(known.values())
    return known
