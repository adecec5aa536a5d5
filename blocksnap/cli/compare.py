"""`blocksnap compare`: what a workload costs on each storage driver."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..amplification.result import Comparison, Target
from ..amplification.testbed import DEFAULT_WORK_DIR
from ..amplification.workload import Workload
from ..amplification.workloads import BUILT_IN, from_command, parse_workload
from ..errors import ArgumentError
from ..units import parse_size
from .console import FAILED, JsonOption, print_json, stderr, stdout

__all__ = ["compare"]

_DEFAULT_WORKLOAD = "sqlite"


def compare(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- COMMAND", help="A workload of yours: {root} in it is the mounted container."
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f'One of {", ".join(BUILT_IN)}; with parameters: "patch:stride=16K".'
        ),
    ] = None,
    drivers: Annotated[str, typer.Option(help="Drivers to measure.")] = "thin,overlay,vfs,volume",
    block_sizes: Annotated[str, typer.Option(help="Block sizes for thin.")] = "4K,16K,64K,256K,1M",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write JSON, CSV, plots and report there.")
    ] = None,
    json: JsonOption = False,
    work_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the testbeds are made: a real disk with some GiB free.")
    ] = DEFAULT_WORK_DIR,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the backing files in the work directory.")
    ] = False,
) -> None:
    """Measure what each storage driver writes to the disk.

    Every driver gets a fresh ext4 on a loop device of its own, the same image and a container; the workload
    runs in it and the device's own counter is read. Without root only drivers that need none run, in a plain
    directory.
    """
    from ..amplification.measure import compare as measure
    from ..amplification.measure import targets_for

    chosen = _workload(workload, tuple(command or ()))
    sizes = [parse_size(size, "block size") for size in _split(block_sizes)]
    targets = targets_for(_split(drivers), sizes)
    with _progress(len(targets)) as show:
        comparison = measure(chosen, targets, work_dir=work_dir, keep=keep, progress=show)
    _report(comparison, out, json)
    if any(row.error for row in comparison.results) or not comparison.results:
        raise typer.Exit(FAILED)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _workload(name: str | None, command: tuple[str, ...]) -> Workload:
    if not command:
        return parse_workload(name or _DEFAULT_WORKLOAD)
    if name is not None:
        raise ArgumentError("--workload and a command exclude each other: give one of them")
    return from_command(command)


class _Show:
    """Shows the target and the phase at work; a step of the bar is a phase."""

    PHASES = ("file system", "base image", "container", "workload", "sync")

    def __init__(self, progress: Progress, targets: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=targets * len(self.PHASES))
        self._targets: list[Target] = []

    def __call__(self, target: Target, phase: str) -> None:
        if target not in self._targets:
            self._targets.append(target)
        done = (len(self._targets) - 1) * len(self.PHASES) + self.PHASES.index(phase)
        self._progress.update(self._task, completed=done, description=f"{target.label}: {phase}")


@contextmanager
def _progress(targets: int) -> Iterator[_Show]:
    columns = (SpinnerColumn(), TextColumn("{task.description:28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        yield _Show(progress, targets)


def _report(comparison: Comparison, out: Path | None, as_json: bool) -> None:
    from ..amplification.report import comparison_table, notes, write_report
    from ..amplification.verdict import verdict

    paths = write_report(comparison, out) if out is not None else []
    if as_json:
        print_json(comparison.as_dict())
    else:
        workload = comparison.workload
        stdout.print(f"workload {workload['name']}: {workload['summary']}\n")
        stdout.print(comparison_table(comparison))
        stdout.print()
        for sentence in (*notes(comparison), verdict(comparison)):
            stdout.print(sentence)
    for path in paths:
        stderr.print(f"wrote {path}", soft_wrap=True)
    if comparison.kept is not None:
        stderr.print(f"kept {comparison.kept}", soft_wrap=True)
