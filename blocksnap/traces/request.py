"""One request of a block trace, as arrays hold many: `struct bs_request` of the C core."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["DISCARD", "FLUSH", "READ", "REQUEST", "WRITE", "Requests"]

READ, WRITE, DISCARD, FLUSH = range(4)
"""What `kind` says. Offset and length of a flush mean nothing."""

REQUEST = np.dtype([("time", "u8"), ("offset", "u8"), ("length", "u8"), ("kind", "u4"), ("device", "u4")])
"""time in nanoseconds, offset and length in bytes; `device` tells the address spaces of a trace apart."""

Requests: TypeAlias = npt.NDArray[np.void]
"""An array of REQUEST."""
