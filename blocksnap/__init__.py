"""Block-level snapshots: thin pools in user space, images on them, honest write amplification.

Drivers and images are imported by their first use: the server of a pool, which starts often, has none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from .pool import Pool
from .pool_report import DeviceUsage, PoolStatus
from .space_policy import (
    ExtendFailed,
    ExtendPolicy,
    PoolEvent,
    PoolExtended,
    PoolPart,
    PoolStopped,
    SpaceLow,
    SpaceOut,
)
from .thin_device import ThinDevice
from .units import format_size, parse_size
from .user_pool import PoolCounters

if TYPE_CHECKING:
    from . import drivers
    from .graph import ImageGraph

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
    "ExtendFailed",
    "ExtendPolicy",
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
    "PoolEvent",
    "PoolExtended",
    "PoolFormatError",
    "PoolPart",
    "PoolStatus",
    "PoolStopped",
    "PrivilegeError",
    "SpaceLow",
    "SpaceOut",
    "ThinDevice",
    "UnsafeLayerError",
    "drivers",
    "format_size",
    "parse_size",
]


def __getattr__(name: str) -> Any:
    if name == "drivers":
        return import_module(".drivers", __name__)
    if name == "ImageGraph":
        return import_module(".graph", __name__).ImageGraph
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
