"""What can be compared: a driver's own name, NAME@FILE_SYSTEM for another file system below it, and names for
the pairs of driver and file system that people ask for.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import drivers
from ..drivers import Driver
from ..errors import ArgumentError, NotSupportedError
from ..units import format_size
from .result import BASELINE, Target
from .testbed import KINDS, missing_for

__all__ = ["Setting", "setting_of", "targets_for"]


@dataclass(frozen=True, slots=True)
class Setting:
    """How a name is measured: the registered driver, its testbed's file system, options of the driver."""

    driver: str
    file_system: str
    options: Mapping[str, object] = field(default_factory=dict)

    def missing(self, *, on_loop: bool) -> str | None:
        """Return why its testbed cannot be made here, None when it can; without loop devices: a directory."""
        if on_loop:
            return missing_for(self.file_system)
        own = self.file_system == _own_file_system(self.driver)
        return None if own else f"needs root and loop devices, for {self.file_system} of its own"

    def open(self, root: Path, wanted: Mapping[str, object]) -> Driver:
        """Open the driver with its own options and those of the wanted that it has."""
        known = inspect.signature(drivers.driver_class(self.driver)).parameters
        fitting = {name: value for name, value in wanted.items() if name in known}
        return drivers.open(self.driver, root, **fitting, **self.options)


_NAMED = {
    "vfs": Setting("vfs", "ext4", {"reflink": False}),
    "xfs-reflink": Setting("vfs", "xfs", {"reflink": True}),
}


def setting_of(name: str) -> Setting:
    """Return how a name is measured. Raises ArgumentError for an unknown driver or file system."""
    if name in _NAMED:
        return _NAMED[name]
    driver, at, file_system = name.partition("@")
    if at and file_system not in KINDS:
        raise ArgumentError(f'{name}: there is no testbed on "{file_system}": take {", ".join(KINDS)}')
    own = _own_file_system(driver)
    return Setting(driver, file_system or own)


def _own_file_system(driver: str) -> str:
    if driver == BASELINE:
        return "ext4"
    try:
        return drivers.driver_class(driver).file_system
    except ArgumentError as error:
        others = (*(name for name in _NAMED if name != "vfs"), BASELINE)
        raise ArgumentError(f"{error}; beside them there are {' and '.join(others)}") from None


def targets_for(names: Sequence[str], block_sizes: Sequence[int]) -> list[Target]:
    """Return what to measure: one target a name, one a block size for drivers that have block sizes.

    Raises ArgumentError for a driver that is not registered, and when nothing is left to measure.
    """
    targets: list[Target] = []
    for name in dict.fromkeys(names):
        targets += [Target(name, size) for size in dict.fromkeys(_block_sizes(name, block_sizes))]
    if not targets and names and block_sizes:
        sizes = ", ".join(map(format_size, block_sizes))
        raise ArgumentError(f"{' and '.join(names)} cannot have blocks of {sizes}: leave --block-sizes out")
    if not targets:
        raise ArgumentError("nothing to compare: name at least one driver and one block size")
    return targets


def _block_sizes(name: str, wanted: Sequence[int]) -> Sequence[int | None]:
    driver = setting_of(name).driver
    if driver == BASELINE:
        return (None,)
    try:
        return drivers.driver_class(driver).block_sizes(wanted)
    except NotSupportedError:
        return (None,)
