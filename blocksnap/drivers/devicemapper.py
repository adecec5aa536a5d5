"""Docker's devicemapper driver as it was: the driver thin on a pool that the kernel runs.

Layers are mounted from the kernel's own thin devices. Their mounts live on when the pool's server is killed.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from ..device_mapper import Control, ThinPoolTarget
from ..errors import NotSupportedError, PrivilegeError
from ..file_system import find_program, may_mount
from ..kernel_backing import require_block_size
from .thin import ThinDriver

__all__ = ["DeviceMapperDriver", "missing_device_mapper"]


def missing_device_mapper(*targets: str) -> str | None:
    """Return why this process cannot make file systems on mapped devices over files, None when it can."""
    if not may_mount():
        return "needs root: device-mapper, loop devices and mounts"
    if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
        return "needs /dev/loop-control: modprobe loop; in a container: --privileged"
    if find_program("mke2fs") is None:
        return "mke2fs is not installed: apt install e2fsprogs"
    try:
        with Control.open() as control:
            for target in targets:
                control.target_version(target)
    except (NotSupportedError, PrivilegeError) as error:
        return error.message
    return None


class DeviceMapperDriver(ThinDriver):
    """Layers as thin devices of a pool that the kernel engine runs."""

    name: ClassVar[str] = "devicemapper"
    engine: ClassVar[str] = "kernel"

    @classmethod
    def missing(cls, root: Path) -> str | None:  # noqa: ARG003 - the root's file system does not matter
        return missing_device_mapper(ThinPoolTarget.type)

    @classmethod
    def block_sizes(cls, wanted: Sequence[int]) -> Sequence[int | None]:
        super().block_sizes(wanted)  # which refuses what no pool can have
        return [size for size in wanted if _kernel_takes(size)]


def _kernel_takes(block_size: int) -> bool:
    with suppress(NotSupportedError):
        require_block_size(block_size)
        return True
    return False
