"""Images, layers and containers: a chain of driver layers for an image, a writable layer for a container.

A layer is stored once for all images that have it in the same place: its key is the OCI chain id, which names
the contents of the layer and of everything below it. The driver knows layers by random ids, so that one that
is still being filled is never mistaken for one that was verified.

Locks, files in the driver's root, taken in this order:
    graph-layers.lock       who makes or removes layers: import, commit, removal of images
    graph-containers.lock   who makes or removes containers, or removes an image that they might use
"""

import contextlib
import hashlib
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from . import archive, oci
from .drivers import Driver
from .drivers.root import FileLock
from .errors import ArgumentError, BlocksnapError, BusyError, LayerExistsError, LayerNotFoundError
from .graph_layers import LayerBuild, Layers, Progress, new_id
from .graph_names import check_container_name, check_image_name, find_image
from .graph_store import ContainerRow, GraphStore, ImageRow, LayerRow
from .oci.layer import Compression
from .units import Size

__all__ = ["Container", "Image", "ImageGraph", "Layer", "LayerNode", "Progress"]

_READ = 1 << 20


@dataclass(frozen=True, slots=True)
class Layer:
    """A stored layer; size counts the file contents in its tar, driver_id is the driver's id of it."""

    chain_id: str
    diff_id: str
    size: int
    driver_id: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image: id is the digest of its config, layers run from the base up."""

    id: str
    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    config_bytes: bytes

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self.config_bytes)
        return config

    @property
    def top(self) -> str | None:
        """The driver's id of the uppermost layer."""
        return self.layers[-1].driver_id if self.layers else None


@dataclass(frozen=True, slots=True)
class Container:
    """A container: id is the driver's, image an image id, holders says in words who has it mounted."""

    name: str
    id: str
    image: str
    holders: tuple[str, ...]


@dataclass(slots=True)
class LayerNode:
    """A layer, the names (or ids) of the images that end in it, the layers on top of it."""

    layer: Layer
    images: list[str] = field(default_factory=list)
    children: "list[LayerNode]" = field(default_factory=list)


class ImageGraph:
    """The images and containers of one driver, which stays the caller's: close() leaves it open."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._store = GraphStore(driver.root / "graph.db")
        self._layers = Layers(driver, self._store)
        self._layer_lock = FileLock(driver.root / "graph-layers.lock")
        self._container_lock = FileLock(driver.root / "graph-containers.lock")
        self._recover()

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- images ----------------------------------------------------------------------------------

    def import_image(
        self,
        path: str | Path,
        reference: str | None = None,
        progress: Progress | None = None,
        *,
        name: str | None = None,
        replace: bool = False,
        max_layer_bytes: int | None = None,
    ) -> Image:
        """Take an image in from an OCI layout (folder or tar) or a `docker save` archive.

        reference chooses among several images in there; name takes the place of the names it has there. A
        name that another image has is refused (LayerExistsError) unless replace says to move it. Nothing is
        to be seen of the image before all of its layers were verified, and after an error nothing is left of
        it. A layer that inflates to more than max_layer_bytes (by default a multiple of its blob, see
        LayerSource.open) is refused (UnsafeLayerError).
        """
        with oci.open_image(Path(path), reference) as source:
            names = [check_image_name(n) for n in ([name] if name is not None else source.names)]
            with self._layer_lock.hold():
                self._layers.recover()
                self._check_names_free(names, source.config_digest, replace=replace)
                if self._store.image(source.config_digest) is not None:
                    self._name(source.config_digest, names)
                else:
                    with self._layers.building() as build:
                        for layer in source.layers:
                            build.add(layer.diff_id, partial(layer.open, max_bytes=max_layer_bytes), progress)
                        self._keep(build, source.config_digest, source.config_bytes, names)
            return self.image(source.config_digest)

    def images(self) -> list[Image]:
        with self._store.transaction():  # what others remove meanwhile is there as a whole or not
            names = self._store.names()
            return [self._image(row, names) for row in self._store.images()]

    def image(self, reference: str) -> Image:
        """Find an image by name, by tag or by the beginning of its id; ArgumentError when several fit."""
        with self._store.transaction():
            names = self._store.names()
            rows = {row.id: row for row in self._store.images()}
            return self._image(rows[find_image(reference, names, rows)], names)

    def layers(self) -> list[Layer]:
        """Return every stored layer once, parents before their children."""
        return [_layer(row) for row in self._store.ready_layers()]

    def tree(self) -> list[LayerNode]:
        """Return the base layers, each with what is built on it."""
        with self._store.transaction():
            rows, images = self._store.ready_layers(), self.images()
        nodes = {row.id: LayerNode(_layer(row)) for row in rows}
        for image in images:
            if image.top is not None:
                nodes[image.top].images += image.names or [image.id]
        for row in rows:
            if row.parent is not None:
                nodes[row.parent].children.append(nodes[row.id])
        return [nodes[row.id] for row in rows if row.parent is None]

    def remove_image(self, reference: str, *, force: bool = False) -> list[Layer]:
        """Remove an image and the layers that nothing else needs, which are returned.

        A name of an image that has others takes just that name away. An image that containers use is a
        BusyError; with force they are removed too.
        """
        with self._layer_lock.hold(), self._container_lock.hold():
            self._recover()
            image = self.image(reference)
            if reference in image.names and len(image.names) > 1:
                self._store.delete_name(reference)
                return []
            for container in self._store.containers_of(image.id):
                if not force:
                    raise BusyError(
                        f'image "{reference}" has the container "{container.name}": remove that first'
                    )
                self.remove_container(container.name)
            return self._remove_image(image)

    def export_image(self, reference: str, path: str | Path, *, compression: Compression = "gzip") -> str:
        """Write an image as an OCI layout, a tar when path ends with .tar; return the manifest's digest.

        Layers are packed anew from what the driver holds, so their digests, and the image's id, can differ
        from those that were imported.
        """
        image = self.image(reference)
        name = reference if reference in image.names else next(iter(image.names), "latest")
        tars = self._tars(image)
        with contextlib.closing(tars):
            return oci.write_layout(path, image.config, tars, reference=name, compression=compression)

    # ---- containers ------------------------------------------------------------------------------

    @contextmanager
    def container(self, name: str, image: Image | str | None = None) -> Iterator[Path]:
        """Mount a container for the length of a `with`; it is created from image when it is not there yet.

        Raises LayerExistsError when there is one of another image.
        """
        row = self._store.container(name)
        if row is None and image is not None:
            id = self.create_container(name, image).id
        else:
            id = self._container(name).id
            if image is not None and self._resolve(image).id != self._container(name).image:
                raise LayerExistsError(f'container "{name}" is of another image: choose another name')
        with self.driver.mounted(id) as root:
            yield root

    def create_container(self, name: str, image: Image | str, *, size: Size | None = None) -> Container:
        """Make a container, a writable layer on top of an image, of a limited size if one is given.

        Raises NotSupportedError where the driver cannot limit a layer.
        """
        options = {} if size is None else {"size": str(size)}
        with self._new_container(name, self._resolve(image)) as (id, parent):
            self.driver.create_read_write(id, parent, storage_opt=options)
        return self.get_container(name)

    def snapshot(self, container: str, new_name: str) -> Container:
        """Make a container that starts with the present state of another and goes its own way from there."""
        origin = self._container(container)
        with self._new_container(new_name, self.image(origin.image)) as (id, _):
            self.driver.snapshot(id, origin.id)
        return self.get_container(new_name)

    def containers(self) -> list[Container]:
        return [self._shown(row) for row in self._store.containers()]

    def get_container(self, name: str) -> Container:
        return self._shown(self._container(name))

    def mount(self, name: str) -> Path:
        """Mount a container until umount, beyond the end of this process; a mounted one stays as it is."""
        return self.driver.get(self._container(name).id, lasting=True)

    def umount(self, name: str) -> None:
        """End a mount made by `mount`."""
        id = self._container(name).id
        if not self.driver.is_lasting(id):
            raise ArgumentError(f'container "{name}" is not mounted')
        self.driver.put(id)

    def remove_container(self, name: str) -> None:
        """Remove a container; BusyError while it is mounted."""
        with self._container_lock.hold():
            row = self._container(name)
            if holders := self.driver.holders(row.id):
                raise BusyError(f'container "{name}" is in use by {holders[0]}: unmount it first')
            self._store.set_container_state(row.id, "removing")
            self._drop_container(row)

    def diff_container(self, name: str) -> list[archive.Change]:
        """Return what a container changed against its image."""
        row = self._container(name)
        return self.driver.changes(row.id, self.image(row.image).top)

    def commit(self, container: str, name: str, *, comment: str = "", replace: bool = False) -> Image:
        """Make an image of a container's present state: its own image and a layer with the changes on top."""
        row = self._container(container)
        base = self.image(row.image)
        names = [check_image_name(name)]
        with self._layer_lock.hold():
            self._layers.recover()
            with self.driver.diff(row.id, base.top) as tar:
                diff_id = _digest(tar)
                config = _committed(base.config, diff_id, f"blocksnap commit {container}", comment)
                id = "sha256:" + hashlib.sha256(config).hexdigest()
                self._check_names_free(names, id, replace=replace)
                with self._layers.building(self._store.layer(base.top) if base.top else None) as build:
                    build.add(diff_id, lambda: tar)
                    self._keep(build, id, config, names)
        return self.image(id)

    # ---- how -------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Undo what a crash interrupted; what another living process is at is left to it."""
        with self._container_lock.try_hold() as free:
            if free:
                self._recover_containers()
        with self._layer_lock.try_hold() as free:
            if free:
                self._layers.recover()

    def _recover_containers(self) -> None:
        for row in self._store.unfinished_containers():
            try:
                self._drop_container(row)
            except BlocksnapError:
                continue

    def _drop_container(self, row: ContainerRow) -> None:
        self.driver.remove(row.id)
        self._store.delete_container(row.id)

    @contextmanager
    def _new_container(self, name: str, image: Image) -> Iterator[tuple[str, str | None]]:
        """Give the driver's ids of a new container's layer and of its parent; the block makes the layer."""
        check_container_name(name)
        with self._container_lock.hold():
            self._recover_containers()
            if self._store.container(name) is not None:
                raise LayerExistsError(f'container "{name}" exists already: choose another name or remove it')
            if self._store.image(image.id) is None:
                raise LayerNotFoundError(f"image {image.id} was removed: import it again")
            id = new_id()
            self._store.add_container(id, name, image.id)
            try:
                yield id, image.top
                self._store.set_container_state(id, "ready")
            except BaseException:
                self._recover_containers()
                raise

    def _keep(self, build: LayerBuild, id: str, config: bytes, names: list[str]) -> None:
        """Show an image whose layers were all verified, once they are on disk."""
        self.driver.sync()
        with self._store.transaction():
            build.finish()
            self._store.add_image(id, config, build.top)
            self._name(id, names)

    def _name(self, id: str, names: list[str]) -> None:
        with self._store.transaction():
            for name in names:
                self._store.set_name(name, id)

    def _check_names_free(self, names: list[str], id: str, *, replace: bool) -> None:
        for name, image in self._store.names().items():
            if name in names and image != id and not replace:
                raise LayerExistsError(
                    f'the name "{name}" is taken by image {image}: remove that or replace it'
                )

    def _remove_image(self, image: Image) -> list[Layer]:
        with self._store.transaction():
            self._store.delete_image(image.id)
            released = self._store.release_layers(image.top)
            for row in released:
                if holders := self.driver.holders(row.id):
                    raise BusyError(
                        f"a layer of image {image.id} is in use by {holders[0]}: unmount it first"
                    )
        self._layers.remove(released)
        return [_layer(row) for row in released]

    def _tars(self, image: Image) -> Generator[BinaryIO, None, None]:
        """Yield the tar of each layer, packed anew."""
        parent = None
        for layer in image.layers:
            with self.driver.diff(layer.driver_id, parent) as tar:
                yield tar
            parent = layer.driver_id

    def _container(self, name: str) -> ContainerRow:
        row = self._store.container(name)
        if row is None or row.state != "ready":
            raise LayerNotFoundError(
                f'there is no container "{name}": create it, or see the list of containers'
            )
        return row

    def _resolve(self, image: Image | str) -> Image:
        return image if isinstance(image, Image) else self.image(image)

    def _image(self, row: ImageRow, names: dict[str, str]) -> Image:
        layers = tuple(_layer(layer) for layer in self._store.chain(row.layer))
        return Image(row.id, tuple(name for name, id in names.items() if id == row.id), layers, row.config)

    def _shown(self, row: ContainerRow) -> Container:
        return Container(row.name, row.id, row.image, tuple(self.driver.holders(row.id)))


def _layer(row: LayerRow) -> Layer:
    return Layer(row.chain_id, row.diff_id, row.size, row.id)


def _digest(stream: BinaryIO) -> str:
    """Return the digest of a stream and leave it at its start."""
    found = hashlib.sha256()
    while piece := stream.read(_READ):
        found.update(piece)
    stream.seek(0)
    return f"sha256:{found.hexdigest()}"


def _committed(config: dict[str, Any], diff_id: str, created_by: str, comment: str) -> bytes:
    """Return the config of an image with one more layer (OCI image spec, config.md)."""
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    step = {"created": now, "created_by": created_by} | ({"comment": comment} if comment else {})
    diff_ids = config["rootfs"].get("diff_ids") or []
    history = config.get("history") or []
    # Readers refuse a history with fewer steps than layers.
    untold = len(diff_ids) - sum(1 for step in history if not step.get("empty_layer"))
    changed = {
        "created": now,
        "history": [*history, *[{"created_by": "unknown"}] * untold, step],
        "rootfs": {"type": "layers", "diff_ids": [*diff_ids, diff_id]},
    }
    return json.dumps({**config, **changed}, separators=(",", ":")).encode()
