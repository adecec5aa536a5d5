"""When a pool grows by itself and how far, and what it tells of its space."""

from dataclasses import dataclass
from enum import StrEnum

from .errors import ArgumentError, BlocksnapError
from .units import Size, format_size, parse_size

__all__ = [
    "DEFAULT_THRESHOLD",
    "ExtendFailed",
    "ExtendPolicy",
    "PoolEvent",
    "PoolExtended",
    "PoolPart",
    "PoolStopped",
    "SpaceLow",
    "SpaceOut",
]

DEFAULT_THRESHOLD = 0.8


@dataclass(frozen=True, slots=True)
class ExtendPolicy:
    """Grow the data of a pool by steps once they are used up to a threshold, at most to a maximum.

    threshold is a fraction (0.8: when 80 % are used), or the bytes that are to stay free. A write that finds
    the pool full waits until it has grown; it fails only if the pool cannot grow. A step is reserved in the
    file system of the data file, with preallocate written full of zeros; a pool on devices grows into the
    rest of its data device. Metadata that run low grow by half.
    """

    threshold: float | Size = DEFAULT_THRESHOLD
    step: Size = "1G"
    maximum: Size | None = None
    preallocate: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.threshold, float) and not 0 < self.threshold < 1:
            raise ArgumentError(
                f"threshold {self.threshold}: give the part that may be used, like 0.8, or the free bytes"
            )
        self.low_water(0)
        if parse_size(self.step, "step") == 0:
            raise ArgumentError("a step of 0 bytes: a pool cannot grow by nothing")
        if self.maximum is not None:
            parse_size(self.maximum, "maximum")

    def low_water(self, size: int) -> int:
        """Return the free bytes at which data of a size are to grow."""
        if isinstance(self.threshold, float):
            return int(size * (1 - self.threshold))
        return parse_size(self.threshold, "threshold")

    def grown(self, size: int, free: int) -> int:
        """Return the size that data should have: the present one if they have their maximum, or enough."""
        grown, step = size, parse_size(self.step)
        limit = None if self.maximum is None else parse_size(self.maximum)
        while free + grown - size <= self.low_water(grown) and (limit is None or grown < limit):
            grown = grown + step if limit is None else min(grown + step, limit)
        return grown


# ---- events


class PoolPart(StrEnum):
    DATA = "data"
    METADATA = "metadata"


@dataclass(frozen=True, slots=True)
class SpaceLow:
    """Free data have fallen to the low water mark (of the policy, 20 % without one), or metadata are low."""

    part: PoolPart
    free_bytes: int
    size: int

    def __str__(self) -> str:
        return f"{format_size(self.free_bytes)} of {format_size(self.size)} of {self.part} are free"


@dataclass(frozen=True, slots=True)
class SpaceOut:
    """Nothing is free: writes to new blocks wait for the pool to grow, or fail."""

    part: PoolPart

    def __str__(self) -> str:
        return f"no {self.part} are free"


@dataclass(frozen=True, slots=True)
class PoolExtended:
    """The pool has grown by its policy."""

    part: PoolPart
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.part} have grown from {format_size(self.before)} to {format_size(self.after)}"


@dataclass(frozen=True, slots=True)
class ExtendFailed:
    """The pool could not grow; a full one fails writes at once until it can."""

    part: PoolPart
    error: BlocksnapError

    def __str__(self) -> str:
        return f"{self.part} cannot grow: {self.error}"


@dataclass(frozen=True, slots=True)
class PoolStopped:
    """The pool does not take writes any more."""

    needs_check: bool
    failed: bool

    def __str__(self) -> str:
        return "the pool has failed" if self.failed else "the pool is read-only until it was checked"


PoolEvent = SpaceLow | SpaceOut | PoolExtended | ExtendFailed | PoolStopped
