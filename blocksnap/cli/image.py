"""blocksnap image: import, list, tree, remove, export."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.tree import Tree

from ..graph import Image, LayerNode
from ..oci import Compression
from ..units import format_size, parse_size
from .console import JsonOption, print_json, stdout
from .graphs import DriverOption, DriverOptions, RootOption, layer_progress, open_graph, short_id

__all__ = ["app"]

app = typer.Typer(help="Images: take in, look at, give out.", no_args_is_help=True)

ReferenceArgument = Annotated[
    str, typer.Argument(metavar="IMAGE", help="A name, a tag or the beginning of an id.", show_default=False)
]


def _described(image: Image) -> dict[str, Any]:
    layers = [
        {
            "chain_id": layer.chain_id,
            "diff_id": layer.diff_id,
            "size": layer.size,
            "driver_id": layer.driver_id,
        }
        for layer in image.layers
    ]
    return {"id": image.id, "names": list(image.names), "size": _size(image), "layers": layers}


def _size(image: Image) -> int:
    return sum(layer.size for layer in image.layers)


@app.command(name="import")
def import_image(
    root: RootOption,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DIR",
            help="An OCI layout (folder or tar) or an archive of docker save.",
            show_default=False,
        ),
    ],
    driver: DriverOption = None,
    options: DriverOptions = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="NAME", help="Which image, if there are several in it."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Its name here, instead of the one it brings."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the name away from the image that has it.")
    ] = False,
    max_layer_size: Annotated[
        str | None,
        typer.Option(
            "--max-layer-size",
            metavar="SIZE",
            help="Refuse a layer that inflates to more; by default 200 times its blob, of which 1 GiB may "
            "always be.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Take an image in; layers that are there already are shared."""
    with open_graph(root, driver, options=options, make=True) as graph, layer_progress() as progress:
        image = graph.import_image(
            source,
            reference,
            progress,
            name=name,
            replace=replace,
            max_layer_bytes=None if max_layer_size is None else parse_size(max_layer_size),
        )
    if as_json:
        print_json(_described(image))
    else:
        typer.echo(f"{short_id(image.id)} {' '.join(image.names)}".rstrip())


@app.command(name="list")
def list_images(root: RootOption, driver: DriverOption = None, as_json: JsonOption = False) -> None:
    """List the images; size is that of the files in their layers."""
    with open_graph(root, driver) as graph:
        images = graph.images()
    if as_json:
        print_json([_described(image) for image in images])
        return
    table = Table("name", "id", "layers", "size")
    for image in images:
        names = "\n".join(image.names) or "-"
        table.add_row(names, short_id(image.id), str(len(image.layers)), format_size(_size(image)))
    stdout.print(table)


@app.command()
def tree(root: RootOption, driver: DriverOption = None, as_json: JsonOption = False) -> None:
    """Show the layers as a tree, and which images end where."""
    with open_graph(root, driver) as graph:
        nodes = graph.tree()
    if as_json:
        print_json([_node(node) for node in nodes])
        return
    shown = Tree(str(root), hide_root=True)
    for node in nodes:
        _grow(shown, node)
    stdout.print(shown)


def _node(node: LayerNode) -> dict[str, Any]:
    return {
        "chain_id": node.layer.chain_id,
        "diff_id": node.layer.diff_id,
        "size": node.layer.size,
        "driver_id": node.layer.driver_id,
        "images": node.images,
        "children": [_node(child) for child in node.children],
    }


def _grow(tree: Tree, node: LayerNode) -> None:
    """Hang a layer and what is on top of it into a tree; a line of single children stays one line."""
    while True:
        text = f"{short_id(node.layer.chain_id)} {format_size(node.layer.size)} {' '.join(node.images)}"
        branch = tree.add(text.rstrip(), highlight=False)
        if len(node.children) != 1:
            break
        node = node.children[0]
    for child in node.children:
        _grow(branch, child)


@app.command()
def remove(
    root: RootOption,
    image: ReferenceArgument,
    driver: DriverOption = None,
    force: Annotated[bool, typer.Option("--force", help="Remove its containers too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove an image and the layers that nothing else needs; of several names, only the one given."""
    with open_graph(root, driver) as graph:
        layers = graph.remove_image(image, force=force)
    if as_json:
        print_json([{"chain_id": layer.chain_id, "size": layer.size} for layer in layers])


@app.command()
def export(
    root: RootOption,
    image: ReferenceArgument,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DIR", help="A new OCI layout: a tar if it ends with .tar.", show_default=False
        ),
    ],
    driver: DriverOption = None,
    compression: Annotated[
        Compression, typer.Option("--compression", help="How the layers are compressed.")
    ] = "gzip",
    as_json: JsonOption = False,
) -> None:
    """Write an image as an OCI layout."""
    with open_graph(root, driver) as graph:
        digest = graph.export_image(image, target, compression=compression)
    if as_json:
        print_json({"path": target, "digest": digest})
    else:
        typer.echo(digest)
