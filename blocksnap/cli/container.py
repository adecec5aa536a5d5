"""blocksnap container: create, list, mount, umount, diff, commit, snapshot, remove."""

from typing import Annotated

import typer
from rich.table import Table

from ..graph import Container
from .console import JsonOption, print_json, stdout
from .graphs import DriverOption, RootOption, open_graph, short_id

__all__ = ["app"]

app = typer.Typer(help="Containers: writable layers on images.", no_args_is_help=True)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the container.", show_default=False)
]


def _described(container: Container) -> dict[str, object]:
    return {
        "name": container.name,
        "image": container.image,
        "driver_id": container.id,
        "holders": list(container.holders),
    }


@app.command()
def create(
    root: RootOption,
    name: NameArgument,
    image: Annotated[str, typer.Option("--image", metavar="REF", help="The image to start from.")],
    size: Annotated[
        str | None, typer.Option("--size", help="The most it may hold (thin, btrfs, qcow2): 10G.")
    ] = None,
    driver: DriverOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a container, a writable layer on top of an image."""
    with open_graph(root, driver) as graph:
        made = graph.create_container(name, image, size=size)
    if as_json:
        print_json(_described(made))


@app.command(name="list")
def list_containers(root: RootOption, driver: DriverOption = None, as_json: JsonOption = False) -> None:
    """List the containers and who has them mounted."""
    with open_graph(root, driver) as graph:
        containers = graph.containers()
        names = {image.id: " ".join(image.names) for image in graph.images()}
    if as_json:
        print_json([_described(container) for container in containers])
        return
    table = Table("name", "image", "mounted by")
    for one in containers:
        table.add_row(one.name, names.get(one.image) or short_id(one.image), ", ".join(one.holders))
    stdout.print(table)


@app.command()
def mount(
    root: RootOption, name: NameArgument, driver: DriverOption = None, as_json: JsonOption = False
) -> None:
    """Mount a container until `umount` and print where."""
    with open_graph(root, driver) as graph:
        path = graph.mount(name)
    if as_json:
        print_json({"name": name, "path": path})
    else:
        typer.echo(path)


@app.command()
def umount(root: RootOption, name: NameArgument, driver: DriverOption = None) -> None:
    """Unmount a container; done means that everything is written."""
    with open_graph(root, driver) as graph:
        graph.umount(name)


@app.command()
def diff(
    root: RootOption, name: NameArgument, driver: DriverOption = None, as_json: JsonOption = False
) -> None:
    """Print what a container added (A), changed (C) and deleted (D) against its image."""
    with open_graph(root, driver) as graph:
        changes = graph.diff_container(name)
    if as_json:
        print_json([change._asdict() for change in changes])
        return
    for change in changes:
        typer.echo(f"{change.kind} {change.path}")


@app.command()
def commit(
    root: RootOption,
    name: NameArgument,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Name of the new image.", show_default=False)],
    driver: DriverOption = None,
    comment: Annotated[str, typer.Option("--comment", metavar="TEXT", help="For the image's history.")] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the name away from the image that has it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make an image of a container's present state."""
    with open_graph(root, driver) as graph:
        made = graph.commit(name, image, comment=comment, replace=replace)
    if as_json:
        print_json({"id": made.id, "names": list(made.names)})
    else:
        typer.echo(short_id(made.id))


@app.command()
def snapshot(
    root: RootOption,
    name: NameArgument,
    new: Annotated[str, typer.Argument(metavar="NEW", help="Name of the new container.", show_default=False)],
    driver: DriverOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a container NEW that starts as NAME is now; one that is mounted goes on after a moment."""
    with open_graph(root, driver) as graph:
        made = graph.snapshot(name, new)
    if as_json:
        print_json(_described(made))


@app.command()
def remove(root: RootOption, name: NameArgument, driver: DriverOption = None) -> None:
    """Remove a container; one that is mounted is left alone."""
    with open_graph(root, driver) as graph:
        graph.remove_container(name)
