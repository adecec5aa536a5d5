"""The registered drivers as parameters of tests; those that the kernel runs are kernel tests."""

from collections.abc import Collection

import pytest
from _pytest.mark import ParameterSet

from blocksnap import drivers

__all__ = ["driver_params", "host_drivers"]

_OF_THE_KERNEL = ("devicemapper", "dm-snapshot")


def host_drivers() -> list[str]:
    """Return the drivers that are no kernel tests."""
    return [name for name, _ in drivers.available() if name not in _OF_THE_KERNEL]


def driver_params(without: Collection[str] = ()) -> list[str | ParameterSet]:
    names = [name for name, _ in drivers.available() if name not in without]
    return [
        pytest.param(name, marks=pytest.mark.kernel) if name in _OF_THE_KERNEL else name for name in names
    ]
