"""Docker's graphdriver interface; drivers are found through the entry-point group `blocksnap.drivers`."""

import inspect
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, NotSupportedError
from .base import Accounting, Driver

__all__ = ["Accounting", "Driver", "available", "driver_class", "open"]

_GROUP = "blocksnap.drivers"


def open(name: str, root: str | Path, **options: Any) -> Driver:
    """Open a driver by its registered name on a root directory, which is made when it is not there.

    Options are those of the driver's class. Raises ArgumentError for an unknown driver or option and for a
    root of another driver, NotSupportedError when this machine lacks what the driver needs.
    """
    kind = driver_class(name)
    try:
        inspect.signature(kind).bind(Path(root), **options)
    except TypeError as error:
        known = [option for option in inspect.signature(kind).parameters if option != "root"]
        raise ArgumentError(f"driver {name}: {error}; its options are {', '.join(known) or 'none'}") from None
    if (reason := kind.missing(Path(root))) is not None:
        raise NotSupportedError(f'driver "{name}" cannot run here: {reason}')
    return kind(Path(root), **options)


def driver_class(name: str) -> type[Driver]:
    """Return the class registered under a name."""
    registered = _registered()
    if name not in registered:
        raise ArgumentError(f'there is no driver "{name}": the registered ones are {", ".join(registered)}')
    try:
        kind = registered[name].load()
    except (ImportError, AttributeError) as error:
        raise NotSupportedError(f'driver "{name}" cannot be loaded: {error}') from error
    if not (isinstance(kind, type) and issubclass(kind, Driver)):
        raise ArgumentError(
            f'driver "{name}" is registered as {registered[name].value}, which is not a Driver class'
        )
    return kind


def available(root: str | Path = ".") -> list[tuple[str, str | None]]:
    """Return each registered driver's name and why it cannot run at root, None when it can."""
    return [(name, _missing(name, Path(root))) for name in _registered()]


def _missing(name: str, root: Path) -> str | None:
    try:
        return driver_class(name).missing(root)
    except (NotSupportedError, ArgumentError) as error:
        return error.message


def _registered() -> dict[str, EntryPoint]:
    found = {entry.name: entry for entry in entry_points(group=_GROUP)}
    return dict(sorted(found.items()))
