"""blocksnap pool: create, status, check, repair, scrub, dump, delta, rmap, usage, extend, adopt."""

import re
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import pool_repair, pool_scrub
from ..engines import DEFAULT_ENGINE
from ..metadata import DELTA_KINDS
from ..pool import Pool
from ..pool_client import PoolClient
from ..pool_report import PoolStatus
from ..units import format_size
from ..user_pool import UserPool
from .console import DAMAGE_FOUND, JsonOption, parse_size_option, print_json, stdout
from .pool_verbs import pool_verb
from .pools import Location, open_image, open_pool, progress_bar, refuse_served

__all__ = ["app"]

app = typer.Typer(help="Thin pools: make, look into, check, grow.", no_args_is_help=True)

SizeOption = Annotated[
    int | None,
    typer.Option("--size", metavar="SIZE", parser=parse_size_option, help='Size of the data, like "10G".'),
]
MetadataSizeOption = Annotated[
    int | None,
    typer.Option("--metadata-size", metavar="SIZE", parser=parse_size_option, help="Size of the metadata."),
]
PreallocateOption = Annotated[
    bool,
    typer.Option("--preallocate", help="Write the data file full of zeros, so that it never grows later."),
]


@pool_verb(app)
def create(
    location: Location,
    size: SizeOption = None,
    block_size: Annotated[
        int, typer.Option("--block-size", metavar="SIZE", parser=parse_size_option, help="4K to 1G.")
    ] = "64K",  # type: ignore[assignment]
    metadata_size: MetadataSizeOption = None,
    preallocate: PreallocateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a pool in a new directory, or on two devices."""
    with (
        progress_bar("preallocating") if preallocate else nullcontext() as progress,
        Pool.create(
            location.path,
            engine=location.engine or DEFAULT_ENGINE,
            size=size,
            block_size=block_size,
            metadata_size=metadata_size,
            preallocate=preallocate,
            progress=progress,
            metadata=location.metadata,
            data=location.data,
            catalog=location.catalog,
        ) as pool,
    ):
        status = pool.status()
    if as_json:
        print_json(status)


@pool_verb(app)
def status(location: Location, as_json: JsonOption = False) -> None:
    """Show sizes, space and state."""
    with open_pool(location, read_only=True) as pool:
        found = pool.status()
        server = _server(pool)
    # This verb chose to open it read-only; what is told is whether others can write.
    found = replace(found, read_only=found.needs_check or found.failed)
    if as_json:
        print_json({**asdict(found), "server": server})
        return
    table = _status_table(found)
    if server is not None:
        table.add_row("served by", f"process {server['pid']}")
        for mounted in server["mounts"]:
            table.add_row("mounted", f"{mounted['device']} at {mounted['target']}")
    stdout.print(table)


def _server(pool: Pool | PoolClient) -> dict[str, Any] | None:
    """Return who serves the pool and what it has mounted, None when nobody does."""
    if isinstance(pool, Pool):
        return None
    return {"pid": pool.server_pid, "mounts": [asdict(one) for one in pool.mounts()]}


def _status_table(found: PoolStatus) -> Table:
    table = Table(show_header=False)
    used = found.data_bytes - found.data_free_bytes
    metadata_used = found.metadata_bytes - found.metadata_free_bytes
    table.add_row("pool", found.path)
    table.add_row("engine", found.engine)
    table.add_row("block size", format_size(found.block_size))
    table.add_row("data", f"{format_size(used)} of {format_size(found.data_bytes)} used")
    table.add_row("metadata", f"{format_size(metadata_used)} of {format_size(found.metadata_bytes)} used")
    later = f", {found.condemned_devices} of them to be deleted" if found.condemned_devices else ""
    table.add_row("thin devices", f"{found.devices}{later}")
    table.add_row("transaction id", str(found.transaction_id))
    table.add_row("state", _state(found))
    return table


def _state(found: PoolStatus) -> str:
    words = {
        "failed": found.failed,
        "needs check": found.needs_check,
        "out of space": found.out_of_space,
        "metadata snapshot held": found.held_root != 0,
    }
    return ", ".join(word for word, present in words.items() if present) or "fine"


@pool_verb(app, engine=False)
def check(
    location: Location,
    clear_needs_check: Annotated[
        bool, typer.Option("--clear-needs-check", help="Let the pool be written to again if it is undamaged.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Check all metadata; print each finding; exit 3 on damage."""
    with open_image(location) as image:
        report = image.check()
    if clear_needs_check and not report.damaged:
        UserPool.clear_needs_check(location.files.metadata)
    if as_json:
        print_json({**asdict(report), "findings": [one._asdict() for one in report.findings]})
        return DAMAGE_FOUND if report.damaged else 0
    for finding in report.findings:
        typer.echo(finding)
    damage = f"{report.fatal} fatal findings, {report.leaks} leaked blocks" if report.damaged else "no damage"
    typer.echo(f"{report.devices} thin devices, {report.mappings} mappings: {damage}")
    return DAMAGE_FOUND if report.damaged else 0


@pool_verb(app, engine=False)
def repair(
    location: Location,
    swap: Annotated[
        bool, typer.Option("--swap", help="Put the new metadata in the place of the old, which are kept.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DEV", help="Where to put the new metadata: a device or a file."),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size", metavar="SIZE", parser=parse_size_option, help="Needed if the superblock is lost."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Build new metadata from what can be read of damaged ones; exit 3 if something is lost."""
    if location.path is not None:
        refuse_served(location)
    found = pool_repair.repair(
        location.path,
        metadata=location.metadata,
        data=location.data,
        catalog=location.catalog,
        output=output,
        swap=swap,
        block_size=block_size,
    )
    if as_json:
        print_json({**asdict(found), "complete": found.complete})
    else:
        _print_repair(found)
    return 0 if found.complete else DAMAGE_FOUND


def _print_repair(found: pool_repair.PoolRepair) -> None:
    for change in found.changes:
        typer.echo(f"changed: {change}")
    if not found.complete:
        table = Table("lost", "offset", "length", "reason")
        for device in found.lost_devices:
            table.add_row(device.name or f"id {device.id}", "0", "all", device.reason)
        for lost in found.lost_ranges:
            length = "to the end" if lost.length is None else format_size(lost.length)
            table.add_row(lost.name or f"id {lost.id}", format_size(lost.offset), length, lost.reason)
        stdout.print(table)
    mapped = sum(device.mapped_bytes for device in found.devices)
    typer.echo(f"saved: {len(found.devices)} thin devices with {format_size(mapped)} mapped")
    typer.echo(f"new metadata: {found.metadata}")
    typer.echo(f"damaged metadata: {found.damaged}")


@pool_verb(app)
def scrub(location: Location, as_json: JsonOption = False) -> int:
    """Read all mapped data; tell what cannot be read by thin device and offset; exit 3 if anything."""
    with progress_bar("reading") as progress:
        found = pool_scrub.scrub(lambda: open_pool(location, read_only=True), location.files.data, progress)
    if as_json:
        print_json(found)
    else:
        _print_scrub(found)
    return DAMAGE_FOUND if found.unreadable else 0


def _print_scrub(found: pool_scrub.Scrub) -> None:
    if found.unreadable:
        table = Table("device", "offset", "length", "at byte of the data")
        for one in found.unreadable:
            place = ("-", "-") if one.device is None else (one.device, str(one.offset))
            table.add_row(*place, str(one.length), str(one.data_offset))
        stdout.print(table)
    damage = f"{format_size(found.unreadable_bytes)} cannot be read" if found.unreadable else "no damage"
    typer.echo(f"{format_size(found.read_bytes)} read: {damage}")


@pool_verb(app, engine=False)
def dump(location: Location) -> None:
    """Print the metadata as thin_dump does."""
    sys.stdout.flush()
    with open_image(location) as image:
        image.dump(sys.stdout.fileno())


@pool_verb(app, "NAME1", "NAME2")
def delta(location: Location, left: str, right: str, as_json: JsonOption = False) -> None:
    """Print where two thin devices differ, as thin_delta does; as JSON without what is the same."""
    with open_pool(location, read_only=True) as pool:
        if not as_json:
            sys.stdout.flush()
            pool.write_delta(left, right, sys.stdout.fileno())
            return
        block_size = pool.status().block_size
        ranges = [
            {"thin_begin": int(begin), "length": int(length), "kind": DELTA_KINDS[int(kind)]}
            for begin, length, kind in pool.delta(left, right)
        ]
    print_json({"left": left, "right": right, "block_size": block_size, "ranges": ranges})


@pool_verb(app)
def rmap(
    location: Location,
    region: Annotated[
        str, typer.Option("--region", metavar="A..B", help="Only the data blocks from A to before B.")
    ] = "0..",
    as_json: JsonOption = False,
) -> None:
    """Print which thin devices use the data blocks, as thin_rmap does."""
    match = re.fullmatch(r"(\d+)\.\.(\d*)", region)
    if match is None:
        raise typer.BadParameter(f'"{region}" is no region: give it like 10..20')
    begin, end = int(match[1]), int(match[2]) if match[2] else None
    with open_pool(location, read_only=True) as pool:
        runs = pool.reverse_mappings(begin, end)
    names = runs.dtype.names or ()
    if as_json:
        print_json([dict(zip(names, map(int, run), strict=True)) for run in runs])
        return
    for data_begin, length, device_id, thin_begin in runs:
        thin = f"thin({device_id}) {thin_begin}..{thin_begin + length}"
        typer.echo(f"data {data_begin}..{data_begin + length} -> {thin}")


@pool_verb(app)
def usage(location: Location, as_json: JsonOption = False) -> None:
    """Show the mapped, exclusive and shared bytes of each thin device."""
    with open_pool(location, read_only=True) as pool:
        found = pool.usage()
    if as_json:
        print_json(found)
        return
    table = Table("device", *("mapped", "exclusive", "shared"))
    for column in table.columns[1:]:
        column.justify = "right"
    for one in found:
        sizes = one.mapped_bytes, one.exclusive_bytes, one.shared_bytes
        table.add_row(one.name, *map(format_size, sizes))
    stdout.print(table)


@pool_verb(app)
def extend(
    location: Location,
    size: SizeOption = None,
    metadata_size: MetadataSizeOption = None,
    preallocate: PreallocateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Grow a pool; on two devices, to the sizes that they have now."""
    if location.path is not None and size is None and metadata_size is None:
        raise typer.BadParameter("give --size, --metadata-size or both")
    with (
        progress_bar("preallocating") if preallocate else nullcontext() as progress,
        open_pool(location) as pool,
    ):
        pool.extend(size=size, metadata_size=metadata_size, preallocate=preallocate, progress=progress)
        found = pool.status()
    if as_json:
        print_json(found)


@pool_verb(app)
def adopt(location: Location, as_json: JsonOption = False) -> None:
    """Take over a pool that its catalog does not describe: devices without a name are called thin-<id>."""
    with open_pool(location, adopt=True) as pool:
        names = [device.name for device in pool.devices()]
    if as_json:
        print_json({"path": str(location.files), "devices": names})
    else:
        typer.echo(f"{location.files}: {len(names)} thin devices: {', '.join(names)}")
