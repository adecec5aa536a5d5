"""The registered drivers as parameters of tests; those that the kernel runs are kernel tests."""

import pytest
from _pytest.mark import ParameterSet

from blocksnap import drivers

__all__ = ["driver_params"]

_OF_THE_KERNEL = ("devicemapper", "dm-snapshot")


def driver_params() -> list[str | ParameterSet]:
    names = [name for name, _ in drivers.available()]
    return [
        pytest.param(name, marks=pytest.mark.kernel) if name in _OF_THE_KERNEL else name for name in names
    ]
