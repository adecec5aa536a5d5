"""`blocksnap crossover`: where block-level copy-on-write writes less than file-level."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..amplification.crossover import Crossover, Sweep, make_crossover
from ..amplification.testbed import DEFAULT_WORK_DIR
from ..errors import ArgumentError
from ..units import format_size
from .compare import PHASES, PHASES_OF_EPOCH, WorkDirOption, parse_sizes, show_progress
from .console import FAILED, JsonOption, print_json, stderr, stdout

__all__ = ["crossover"]

_DEFAULT = Sweep()


def _sizes(sizes: tuple[int, ...]) -> str:
    return ",".join(map(format_size, sizes))


def crossover(
    write_sizes: Annotated[str, typer.Option(help="Sizes of a write, from 4K on.")] = _sizes(
        tuple(_DEFAULT.write_sizes)
    ),
    block_sizes: Annotated[str, typer.Option(help="Block sizes of the pool.")] = _sizes(
        tuple(_DEFAULT.block_sizes)
    ),
    largest: Annotated[str, typer.Option(metavar="SIZE", help="The largest file of the map.")] = "1G",
    sync_every: Annotated[
        int, typer.Option(metavar="N", min=1, help="Writes between two syncs.")
    ] = _DEFAULT.sync_every,
    measure: Annotated[
        bool, typer.Option(help="Measure a chosen subset on overlay and thin, beside the model.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write JSON, CSV, the map and a page there.")
    ] = None,
    json: JsonOption = False,
    work_dir: WorkDirOption = DEFAULT_WORK_DIR,
) -> None:
    """Map where block-level copy-on-write writes less than file-level.

    A sweep over file size, share of the file touched, write size and block size: modelled in full, and in
    part measured on overlay and on thin.
    """
    from ..amplification.crossover_report import write_crossover
    from ..amplification.crossover_rule import rule

    sweep = _sweep(write_sizes, block_sizes, largest, sync_every)
    targets = len(list(sweep.measured_works())) * (1 + len(sweep.block_sizes)) if measure else 0
    with show_progress(targets * (PHASES + PHASES_OF_EPOCH)) as show:
        made = make_crossover(sweep, measuring=measure, work_dir=work_dir, progress=show)
    paths = write_crossover(made, out) if out is not None else []
    if json:
        print_json(made.as_dict() | {"rule": rule(made)})
    else:
        _print(made)
    for path in paths:
        stderr.print(f"wrote {path}", soft_wrap=True)
    if measure and not made.points:
        raise typer.Exit(FAILED)


def _sweep(write_sizes: str, block_sizes: str, largest: str, sync_every: int) -> Sweep:
    writes, blocks = parse_sizes(write_sizes, "write size"), parse_sizes(block_sizes)
    (size,) = parse_sizes(largest, "largest file")
    if not writes or not blocks:
        raise ArgumentError("nothing to map: give at least one write size and one block size")
    for each in (*writes, *blocks, size):
        if each < 4096 or each & (each - 1):
            raise ArgumentError(f"{format_size(each)} cannot be in the map: take powers of two from 4K on")
    return replace(
        _DEFAULT,
        file_sizes=[each for each in _DEFAULT.file_sizes if each <= size],
        write_sizes=writes,
        block_sizes=blocks,
        measured_file_sizes=[each for each in _DEFAULT.measured_file_sizes if each <= size],
        sync_every=sync_every,
    )


def _print(made: Crossover) -> None:
    from ..amplification.crossover_report import POINT_COLUMNS
    from ..amplification.crossover_rule import deviation_sentence, overhead_sentence, rule

    if made.points:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in POINT_COLUMNS:
            table.add_column(column.head.replace(" ", "\n"), justify="right", no_wrap=True)
        for point in made.points:
            table.add_row(*(column.text(point) for column in POINT_COLUMNS))
        stdout.print(table)
        stdout.print()
    for sentence in (*rule(made), deviation_sentence(made), overhead_sentence(made), *made.failures):
        if sentence:
            stdout.print(sentence)
