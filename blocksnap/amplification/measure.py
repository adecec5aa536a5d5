"""Measuring: each driver gets a fresh testbed, the base image, a container, the workload; counters are read
around it.

The window begins before the container's layer is created, because that is where a driver that copies whole
trees pays, and ends when everything is synced and the container is unmounted. What one driver does wrong is a
row with an error; the others go on. Signals are looked at between steps (interrupts.py), so that every step
is either undone or never begun.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from pathlib import Path

from .. import mount
from ..drivers import Driver
from ..errors import BlocksnapError, NotSupportedError
from .base_image import BaseImage
from .interrupts import deferred_interrupts
from .machine import describe_machine
from .phases import BASE, Counters, Phase, epoch_of, latency_over, sum_of, summed_parts
from .repeats import combined
from .result import BASELINE, Comparison, Measurement, Skipped, Target
from .targets import setting_of, targets_for
from .testbed import DEFAULT_WORK_DIR, Testbed, check_space, open_testbed, work_directory
from .volume import Volume
from .workload import Workload

__all__ = ["InterruptedComparisonError", "compare", "targets_for"]

_log = logging.getLogger(__name__)

_MIB = 1 << 20
_CONTAINER = "container"

Progress = Callable[[Target, str], None]


def compare(
    workload: Workload,
    targets: Sequence[Target],
    *,
    repeats: int = 1,
    snapshots: int = 0,
    work_dir: Path = DEFAULT_WORK_DIR,
    keep: bool = False,
    progress: Progress = lambda target, phase: None,  # noqa: ARG005
) -> Comparison:
    """Measure a workload on every target and return the figures.

    Every target is measured once, then every one again, `repeats` times, so that a slow change of the machine
    meets all alike. The workload runs once more after each of the snapshots. Needs root for loop devices;
    without it only drivers that need none run, in a plain directory. On Ctrl-C nothing stays mounted, and
    KeyboardInterrupt is raised: InterruptedComparisonError if a run was complete. With keep the backing files
    stay in the work directory.
    """
    start, when = time.monotonic(), datetime.now().astimezone()
    runs: dict[Target, list[Measurement]] = {target: [] for target in targets}
    skipped: dict[str, str] = {}

    def made() -> Comparison:
        return Comparison(
            machine,
            described,
            [combined(done) for done in runs.values() if done],
            [Skipped(driver, reason) for driver, reason in skipped.items()],
            time.monotonic() - start,
            str(directory) if keep else None,
            repeats,
            snapshots,
            when.isoformat(timespec="minutes"),
        )

    try:
        with deferred_interrupts() as interrupts, work_directory(work_dir, keep=keep) as directory:
            machine = describe_machine(work_dir)
            staged = _staged(workload, directory, interrupts.check)
            described = staged.describe()
            for number, target in product(range(repeats), targets):
                if target.driver in skipped or any(run.error for run in runs[target]):
                    continue
                run = _Run(staged, target, directory, number, snapshots + 1, keep, interrupts.check, progress)
                interrupts.check()
                try:
                    runs[target].append(run.measure())
                except _CannotRunError as reason:
                    skipped[target.driver] = str(reason)
                except Exception as error:  # noqa: BLE001 - a driver of a third party may raise anything
                    _log.debug("%s failed", target.label, exc_info=True)
                    runs[target].append(Measurement(target=target, error=_sentence(error)))
    except KeyboardInterrupt:
        if not any(runs.values()):
            raise
        left = [target for target, done in runs.items() if not done and target.driver not in skipped]
        skipped |= {target.label: "interrupted before it" for target in left}
        raise InterruptedComparisonError(made()) from None
    return made()


class InterruptedComparisonError(KeyboardInterrupt):
    """Ctrl-C came after the first run: `comparison` has the runs that were complete, and skips the others."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.comparison = comparison


def _staged(workload: Workload, directory: Path, check: Callable[[], None]) -> Workload:
    material = directory / "material"
    material.mkdir()
    return workload.stage(material, check=check)


class _CannotRunError(BlocksnapError):
    """This machine cannot run a driver: not a failure."""


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, BlocksnapError | OSError) else f"{type(error).__name__}: {error}"


def _may_use_loop() -> bool:
    return os.geteuid() == 0 and os.access("/dev/loop-control", os.R_OK | os.W_OK)


@dataclass(frozen=True, slots=True)
class _Run:
    """One target from the empty file system to its figures."""

    workload: Workload
    target: Target
    directory: Path
    number: int
    epochs: int
    keep: bool
    check: Callable[[], None]
    progress: Progress

    @property
    def _pool_size(self) -> int:
        """Room for the image, a copy of it in each epoch, and what the workload adds."""
        return (2 + self.epochs) * self.workload.base.total_bytes + self.epochs * self.workload.ROOM

    @property
    def _file_system_size(self) -> int:
        """The same for the testbed and for a file system on a thin device, so that mkfs chooses the same."""
        return max(2048 * _MIB, 2 * self._pool_size)

    def measure(self) -> Measurement:
        check_space(self.directory, self._pool_size)
        self._step("file system")
        name = self.target.label.replace(" ", "-") + (f"-{self.number + 1}" if self.number else "")
        size = self._file_system_size
        with self._testbed(name, size) as bed, self._open_driver(bed) as driver:
            self._step("base image")
            base, parent = self._base(bed, driver)
            epochs = []
            for epoch in range(self.epochs):
                epochs.append(self._epoch(bed, driver, parent, epoch))
                parent = _container(epoch)
            return self._row(base, epochs, getattr(driver, "engine", None))

    def _step(self, phase: str) -> None:
        self.check()
        self.progress(self.target, phase)

    def _testbed(self, name: str, size: int) -> AbstractContextManager[Testbed]:
        setting, on_loop = setting_of(self.target.driver), _may_use_loop()
        if (reason := setting.missing(on_loop=on_loop)) is not None:
            raise _CannotRunError(reason)
        kind = setting.file_system
        return open_testbed(self.directory, name, size, on_loop=on_loop, keep=self.keep, file_system=kind)

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
        setting = setting_of(self.target.driver)
        if setting.driver == BASELINE:
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
            return setting.open(bed.root / "driver", options)
        except NotSupportedError as error:
            prefix = f'driver "{setting.driver}" cannot run here: '
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

    def _base(self, bed: Testbed, driver: Driver | Volume) -> tuple[Phase, str]:
        before, start = Counters.of(bed), time.perf_counter()
        parent = self._prepare(driver)
        driver.sync()
        seconds = time.perf_counter() - start
        counted = Counters.of(bed).since(before)
        phase = Phase(name=BASE, backing_bytes=counted.backing, allocated_bytes=counted.used)
        return replace(phase, seconds=seconds), parent

    def _epoch(self, bed: Testbed, driver: Driver | Volume, parent: str, epoch: int) -> Phase:
        before, id = Counters.of(bed), _container(epoch)
        self._step("container")
        start = time.perf_counter()
        driver.create_read_write(id, parent)
        root = driver.get(id)
        create_seconds = time.perf_counter() - start
        try:
            self._step("workload")
            outcome = self.workload.run(root, epoch=epoch, check=self.check)
            self.progress(self.target, "sync")
            start = time.perf_counter()
            mount.sync_filesystem(root)
        finally:
            driver.put(id)
        driver.sync()
        sync_seconds = time.perf_counter() - start
        accounting = driver.accounting(id)
        phase = epoch_of(epoch, outcome, accounting, Counters.of(bed).since(before))
        return replace(phase, create_seconds=create_seconds, sync_seconds=sync_seconds)

    def _row(self, base: Phase, epochs: Sequence[Phase], engine: str | None) -> Measurement:
        changed = self.workload.changed_bytes
        written = sum_of(epoch.application_bytes for epoch in epochs)
        backing, parts = sum_of(epoch.backing_bytes for epoch in epochs), summed_parts(epochs)
        return Measurement(
            target=self.target,
            engine=engine,
            application_bytes=written,
            changed_bytes=written if changed is None else changed * len(epochs),
            changed_bytes_source="application_bytes" if changed is None else "workload",
            filesystem_bytes=sum_of(epoch.filesystem_bytes for epoch in epochs),
            backing_bytes=backing,
            copy_bytes=sum_of(epoch.copy_bytes for epoch in epochs),
            metadata_bytes=sum_of(epoch.metadata_bytes for epoch in epochs),
            allocated_bytes=sum_of(epoch.allocated_bytes for epoch in epochs),
            allocated_bytes_source=epochs[0].allocated_bytes_source,
            write_amplification_source=_source(backing, parts),
            parts=parts,
            create_seconds=sum_of(epoch.create_seconds for epoch in epochs),
            seconds=sum_of(epoch.seconds for epoch in epochs),
            sync_seconds=sum_of(epoch.sync_seconds for epoch in epochs),
            operations=sum_of(epoch.operations for epoch in epochs),
            latency=latency_over(epochs),
            phases=(base, *epochs),
        )


def _source(backing: int | None, parts: Mapping[str, int] | None) -> str | None:
    if backing is not None:
        return "loop device"
    return None if parts is None else "pool counters"


def _container(epoch: int) -> str:
    return f"container-{epoch}"
