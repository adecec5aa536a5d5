"""blocksnap device: create, snapshot, list, remove, resize, read, write, mount, umount."""

import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from rich.table import Table

from ..errors import system_errors
from ..file_system import FILE_SYSTEMS
from ..remote_device import RemoteDevice
from ..thin_device import ThinDevice
from ..units import format_size
from .console import JsonOption, parse_size_option, print_json, stdout
from .pool_verbs import pool_verb
from .pools import Location, open_pool, serve_pool

__all__ = ["app"]

app = typer.Typer(help="Thin devices of a pool.", no_args_is_help=True)

_CHUNK = 4 << 20

SizeOption = Annotated[
    int,
    typer.Option("--size", metavar="SIZE", parser=parse_size_option, help='Size of the device, like "1G".'),
]
OffsetOption = Annotated[
    int, typer.Option("--offset", metavar="BYTES", parser=parse_size_option, help="Where to begin.")
]


def _described(device: ThinDevice | RemoteDevice) -> dict[str, object]:
    created = datetime.fromtimestamp(device.created / 1e9, UTC)
    return {
        "name": device.name,
        "id": device.id,
        "size": device.size,
        "origin": device.origin,
        "created": created.isoformat(timespec="seconds"),
        "labels": dict(device.labels),
    }


@pool_verb(app, "NAME")
def create(location: Location, device_name: str, size: SizeOption, as_json: JsonOption = False) -> None:
    """Create a thin device; it reads as zeros and takes no space yet."""
    with open_pool(location) as pool:
        described = _described(pool.create_device(device_name, size))
    if as_json:
        print_json(described)


@pool_verb(app, "NAME", "NEW")
def snapshot(location: Location, device_name: str, new_name: str, as_json: JsonOption = False) -> None:
    """Create a thin device NEW that shares every block with NAME."""
    with open_pool(location) as pool:
        described = _described(pool.device(device_name).snapshot(new_name))
    if as_json:
        print_json(described)


@pool_verb(app, command="list")
def list_devices(location: Location, as_json: JsonOption = False) -> None:
    """List the thin devices by name."""
    with open_pool(location, read_only=True) as pool:
        described = [_described(device) for device in pool.devices()]
    if as_json:
        print_json(described)
        return
    table = Table("name", "id", "size", "origin", "created")
    for one in described:
        size = format_size(int(str(one["size"])))
        table.add_row(str(one["name"]), str(one["id"]), size, str(one["origin"] or ""), str(one["created"]))
    stdout.print(table)


@pool_verb(app, "NAME")
def remove(location: Location, device_name: str) -> None:
    """Delete a thin device; snapshots of it live on."""
    with open_pool(location) as pool:
        pool.device(device_name).delete()


@pool_verb(app, "NAME")
def resize(location: Location, device_name: str, size: SizeOption) -> None:
    """Change the size of a thin device; shrinking frees what lies behind the new end."""
    with open_pool(location) as pool:
        pool.device(device_name).resize(size)


@pool_verb(app, "NAME")
def read(
    location: Location,
    device_name: str,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write to FILE instead of stdout.")
    ] = None,
    offset: OffsetOption = "0",  # type: ignore[assignment]
    length: Annotated[
        int | None,
        typer.Option(
            "--length", metavar="BYTES", parser=parse_size_option, help="How much; else to the end."
        ),
    ] = None,
) -> None:
    """Copy the content of a thin device to stdout or a file."""
    with open_pool(location, read_only=True) as pool, system_errors(str(output or "stdout")):
        device = pool.device(device_name)
        end = device.size if length is None else offset + length
        buffer = memoryview(bytearray(_CHUNK))
        with output.open("wb") if output is not None else nullcontext(sys.stdout.buffer) as target:
            while offset < end:
                part = buffer[: min(_CHUNK, end - offset)]
                offset += device.read_into(offset, part)
                _write_all(target, part)


def _write_all(target: BinaryIO, part: memoryview) -> None:
    """Write all of part: stdout may be unbuffered (PYTHONUNBUFFERED) and then takes a piece at a time."""
    while part:
        part = part[target.write(part) :]


@pool_verb(app, "NAME")
def write(
    location: Location,
    device_name: str,
    source: Annotated[
        Path | None, typer.Option("--input", metavar="FILE", help="Read from FILE instead of stdin.")
    ] = None,
    offset: OffsetOption = "0",  # type: ignore[assignment]
) -> None:
    """Copy stdin or a file into a thin device; done means durable."""
    with open_pool(location) as pool, system_errors(str(source or "stdin")):
        device = pool.device(device_name)
        with source.open("rb") if source is not None else nullcontext(sys.stdin.buffer) as origin:
            while chunk := origin.read(_CHUNK):
                offset += device.write(offset, chunk)
        device.flush()


@pool_verb(app, "NAME", "DIR")
def mount(
    location: Location,
    device_name: str,
    directory: str,
    read_only: Annotated[bool, typer.Option("--read-only", help="Mount it read-only.")] = False,
    options: Annotated[
        str, typer.Option("--options", metavar="OPTIONS", help="Options for the file system.")
    ] = "",
    mkfs: Annotated[
        str | None,
        typer.Option(
            "--mkfs",
            metavar="TYPE",
            help=f"Make a file system first ({' or '.join(FILE_SYSTEMS)}); what is on the device is lost.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Mount the file system on a thin device; the pool is served by a process of its own until `umount`."""
    with serve_pool(location) as pool:
        if mkfs is not None:
            pool.make_file_system(device_name, mkfs)
        mounted = pool.mount(device_name, directory, read_only=read_only, options=options)
    if as_json:
        print_json(mounted)


@pool_verb(app, "NAME")
def umount(location: Location, device_name: str) -> None:
    """Unmount a thin device; done means that everything is written."""
    with serve_pool(location) as pool:
        pool.umount(device_name)
