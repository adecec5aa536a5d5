"""Making a pool: its files, the empty metadata and the catalog, whole or not at all."""

from .catalog import Catalog
from .engines import Engine
from .errors import ArgumentError
from .pool_files import (
    PoolFiles,
    Progress,
    backing_size,
    creation,
    grow_file,
    metadata_size_for,
    whole_blocks,
    wipe_superblock,
)
from .udev import check_unused
from .units import Size, parse_size

__all__ = ["make_pool"]


def make_pool(
    kind: type[Engine],
    files: PoolFiles,
    *,
    size: Size | None,
    block_size: Size,
    metadata_size: Size | None,
    preallocate: bool,
    progress: Progress | None,
) -> None:
    """Make what an engine opens. Block devices that are in use or carry something are refused."""
    block_bytes = parse_size(block_size, "block size")
    with creation(files):
        if files.directory is None:
            if preallocate or metadata_size is not None:
                raise ArgumentError("preallocate and metadata_size are for a pool in a directory: drop them")
            for part in (files.metadata, files.data):
                if part.is_block_device():
                    check_unused(str(part))
            data_bytes = backing_size(files.data) if size is None else parse_size(size)
        else:
            data_bytes = whole_blocks(size, block_bytes)
            metadata_bytes = (
                metadata_size_for(data_bytes, block_bytes)
                if metadata_size is None
                else parse_size(metadata_size, "metadata size")
            )
            # Reserved: a commit that finds no space for its metadata could only be taken back.
            grow_file(files.metadata, metadata_bytes, reserve=True, preallocate=preallocate)
            grow_file(files.data, data_bytes, preallocate=preallocate, progress=progress)
        _format(kind, files, data_bytes, block_bytes)


def _format(kind: type[Engine], files: PoolFiles, data_bytes: int, block_size: int) -> None:
    kind.format(files.metadata, files.data, data_bytes=data_bytes, block_size=block_size)
    try:
        Catalog.create(files.catalog, 0).close()
    except BaseException:
        wipe_superblock(files.metadata)
        raise
