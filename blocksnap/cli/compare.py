"""`blocksnap compare`: what a workload costs on each storage driver."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..amplification.result import DEFAULT_BLOCK_SIZES, DEFAULT_DRIVERS, Comparison, Target
from ..amplification.testbed import DEFAULT_WORK_DIR
from ..amplification.workload import Workload
from ..amplification.workloads import BUILT_IN, from_command, parse_workload
from ..errors import ArgumentError
from ..units import format_size, parse_size
from .console import FAILED, JsonOption, print_json, stderr, stdout

__all__ = [
    "PHASES",
    "PHASES_OF_EPOCH",
    "WorkDirOption",
    "compare",
    "parse_sizes",
    "show_progress",
    "split_names",
]

_DEFAULT_WORKLOAD = "sqlite"
PHASES = 2  # file system and base image
PHASES_OF_EPOCH = 3  # container, workload, sync

WorkDirOption = Annotated[
    Path, typer.Option(metavar="DIR", help="Where the testbeds are made: a real disk with some GiB free.")
]


def compare(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- COMMAND", help="A workload of yours: {root} in it is the mounted container."
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f'One of {", ".join(BUILT_IN)}; with parameters: "patch:stride=16K", "fio:job=PATH". '
            "Given more than once, all go into one report.",
        ),
    ] = None,
    drivers: Annotated[str, typer.Option(help="Drivers to measure.")] = ",".join(DEFAULT_DRIVERS),
    block_sizes: Annotated[str, typer.Option(help="Block sizes for drivers that have them.")] = ",".join(
        map(format_size, DEFAULT_BLOCK_SIZES)
    ),
    repeat: Annotated[
        int, typer.Option(metavar="N", min=1, help="Measure N times: median and spread are told.")
    ] = 1,
    snapshots: Annotated[
        int,
        typer.Option(metavar="K", min=0, help="Take K snapshots; the workload runs again after each."),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the report, its plots and the raw data there."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with the results.json of an earlier run, side by side."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take this results.json instead of measuring.")
    ] = None,
    json: JsonOption = False,
    work_dir: WorkDirOption = DEFAULT_WORK_DIR,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the backing files in the work directory.")
    ] = False,
) -> None:
    """Measure what each storage driver writes to the disk.

    Every driver gets a fresh file system on a loop device of its own, the same image and a container; the
    workload runs in it and the device's own counter is read. Without root only drivers that need none run, in
    a plain directory.
    """
    from ..amplification.measure import InterruptedComparisonError, targets_for
    from ..amplification.measure import compare as measure
    from ..amplification.study import read_study

    before = read_study(baseline) if baseline is not None else None
    if results is not None:
        if workload or command:
            raise ArgumentError("--results and a workload exclude each other: give one of them")
        study = read_study(results)
    else:
        chosen = _workloads(workload or [], tuple(command or ()))
        targets = targets_for(split_names(drivers), parse_sizes(block_sizes))
        phases = len(chosen) * len(targets) * repeat * (PHASES + (snapshots + 1) * PHASES_OF_EPOCH)
        study = []
        try:
            with show_progress(phases) as show:
                for each in chosen:
                    made = measure(
                        each,
                        targets,
                        repeats=repeat,
                        snapshots=snapshots,
                        work_dir=work_dir,
                        keep=keep,
                        progress=show,
                    )
                    study.append(made)
        except KeyboardInterrupt as stopped:
            if isinstance(stopped, InterruptedComparisonError):
                study.append(stopped.comparison)
            if study:
                _report(study, before, out, json)
            raise
    _report(study, before, out, json)
    if any(row.error for made in study for row in made.results) or not all(made.results for made in study):
        raise typer.Exit(FAILED)


def split_names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_sizes(text: str, what: str = "block size") -> list[int]:
    return [parse_size(size, what) for size in split_names(text)]


def _workloads(names: Sequence[str], command: tuple[str, ...]) -> list[Workload]:
    if command and names:
        raise ArgumentError("--workload and a command exclude each other: give one of them")
    if command:
        return [from_command(command)]
    chosen = [parse_workload(name) for name in names or [_DEFAULT_WORKLOAD]]
    if len({each.name for each in chosen}) < len(chosen):
        raise ArgumentError("a workload is given twice: one report has each once")
    return chosen


class Show:
    """Shows the target and the phase at work; a step of the bar is a phase."""

    def __init__(self, progress: Progress, phases: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=phases)
        self._done = -1

    def __call__(self, target: Target, phase: str) -> None:
        self._done += 1
        self._progress.update(self._task, completed=self._done, description=f"{target.label}: {phase}")


@contextmanager
def show_progress(phases: int) -> Iterator[Show]:
    """Show a bar of that many phases on the terminal, if stderr is one."""
    columns = (SpinnerColumn(), TextColumn("{task.description:28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        yield Show(progress, phases)


def _report(
    study: Sequence[Comparison], before: Sequence[Comparison] | None, out: Path | None, as_json: bool
) -> None:
    from ..amplification.report import write_report
    from ..amplification.study import study_as_dict

    paths = write_report(study, out, baseline=before) if out is not None else []
    if as_json:
        print_json(study_as_dict(study))
    else:
        for made in study:
            _print_comparison(made)
        if before is not None:
            _print_changes(before, study)
    for path in paths:
        stderr.print(f"wrote {path}", soft_wrap=True)
    for kept in filter(None, (made.kept for made in study)):
        stderr.print(f"kept {kept}", soft_wrap=True)


def _print_comparison(made: Comparison) -> None:
    from ..amplification.tables import comparison_table, notes
    from ..amplification.verdict import verdict

    stdout.print(f"workload {made.name}: {made.workload['summary']}\n")
    stdout.print(comparison_table(made))
    stdout.print()
    for sentence in (*notes(made), verdict(made)):
        stdout.print(sentence)
    stdout.print()


def _print_changes(before: Sequence[Comparison], after: Sequence[Comparison]) -> None:
    from ..amplification.baseline import differences
    from ..amplification.tables import changes_table

    stdout.print("against the baseline (* beyond the spread of the runs, of single runs beyond 5 %)\n")
    stdout.print(changes_table(before, after))
    for sentence in differences(before, after):
        stdout.print(sentence)
