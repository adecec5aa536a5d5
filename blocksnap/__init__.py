"""Block-level snapshots: thin pools in user space, images on them, honest write amplification."""

from . import drivers
from .errors import (
    ArgumentError,
    BlocksnapError,
    BusyError,
    DamagedMetadataError,
    DeviceExistsError,
    DeviceIOError,
    DeviceNotFoundError,
    DigestError,
    ImageError,
    LayerExistsError,
    LayerNotFoundError,
    MediaTypeError,
    MissingParentError,
    NeedsCheckError,
    NoSpaceError,
    NotSupportedError,
    PoolFormatError,
    PrivilegeError,
    UnsafeLayerError,
)
from .graph import ImageGraph
from .pool import Pool
from .pool_report import DeviceUsage, PoolStatus
from .thin_device import ThinDevice
from .units import format_size, parse_size
from .user_pool import PoolCounters

__all__ = [
    "ArgumentError",
    "BlocksnapError",
    "BusyError",
    "DamagedMetadataError",
    "DeviceExistsError",
    "DeviceIOError",
    "DeviceNotFoundError",
    "DeviceUsage",
    "DigestError",
    "ImageError",
    "ImageGraph",
    "LayerExistsError",
    "LayerNotFoundError",
    "MediaTypeError",
    "MissingParentError",
    "NeedsCheckError",
    "NoSpaceError",
    "NotSupportedError",
    "Pool",
    "PoolCounters",
    "PoolFormatError",
    "PoolStatus",
    "PrivilegeError",
    "ThinDevice",
    "UnsafeLayerError",
    "drivers",
    "format_size",
    "parse_size",
]
