"""Which block size a trace speaks for at given prices, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from ..units import format_size
from .figures import format_bytes, format_ratio

__all__ = ["KERNEL_BLOCK_SIZE", "Advice", "Costs", "Prices", "advise"]

KERNEL_BLOCK_SIZE = 64 << 10
"""The kernel's dm-thin takes no smaller blocks."""

_KINDS = ("copy", "space", "metadata")
_RESAMPLINGS = 2000
_SURE, _LIKELY = 0.95, 0.75
_MARGIN = 0.01

Costs = npt.NDArray[np.float64]
"""Bytes copied, taken in space and written as metadata: the last axis; the one before is the block size."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a byte copied, a byte of space and a byte of metadata written cost, in one unit."""

    copy: float = 1.0
    space: float = 1.0
    metadata: float = 1.0

    def __post_init__(self) -> None:
        values = self.as_tuple()
        if any(not 0 <= value < float("inf") for value in values) or not any(values):
            raise ArgumentError(f'prices "{self}" are not numbers from 0 on, one of them above 0')

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the prices of "COPY:SPACE:METADATA"."""
        try:
            copy, space, metadata = map(float, text.split(":"))
        except ValueError:
            raise ArgumentError(f'prices "{text}" are not three numbers like "1:1:1"') from None
        return cls(copy, space, metadata)

    def as_tuple(self) -> tuple[float, float, float]:
        return self.copy, self.space, self.metadata

    def __str__(self) -> str:
        return ":".join(f"{value:g}" for value in self.as_tuple())


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The block size of the least total cost; a cost is a sum of bytes times their prices.

    margin: how much dearer the runner-up is, as a share of the least cost. confidence: in which share of
    random resamplings of the trace's parts the same size wins. halves: the size that wins in each half.
    kernel_block_size: the best of those that the kernel takes.
    """

    block_size: int
    bytes: tuple[int, int, int]
    costs: dict[int, float]
    prices: Prices
    runner_up: int | None
    margin: float | None
    confidence: float
    parts: int
    halves: tuple[int, int]
    kernel_block_size: int | None

    @property
    def certainty(self) -> str:
        """How sure it is, in a word."""
        near = self.margin is not None and self.margin < _MARGIN
        if self.confidence >= _SURE and self.agreed and not near:
            return "sure"
        return "likely" if self.confidence >= _LIKELY and not near else "too near to call"

    @property
    def agreed(self) -> bool:
        """Say whether both halves of the trace give the same advice."""
        return set(self.halves) == {self.block_size}

    def as_dict(self) -> dict[str, object]:
        return {
            "block_size": self.block_size,
            "certainty": self.certainty,
            "confidence": self.confidence,
            "margin": self.margin,
            "runner_up": self.runner_up,
            "halves": list(self.halves),
            "parts": self.parts,
            "kernel_block_size": self.kernel_block_size,
            "prices": dict(zip(_KINDS, self.prices.as_tuple(), strict=True)),
            "bytes": dict(zip(_KINDS, self.bytes, strict=True)),
            "costs": [{"block_size": size, "cost": cost} for size, cost in self.costs.items()],
        }

    def sentences(self) -> list[str]:
        """Return the advice in words: the size and why, how sure that is, what else a person should know."""
        copied, space, metadata = (format_bytes(value) for value in self.bytes)
        said = [
            f"{format_size(self.block_size)} blocks cost least: {copied} copied, {space} of space, "
            f"{metadata} of metadata written, at prices of {self.prices}.",
            self._how_sure(),
        ]
        kernel = self.kernel_block_size
        if kernel is not None and kernel != self.block_size:
            more = format_ratio(100 * (self.costs[kernel] / self.costs[self.block_size] - 1))
            size = format_size(kernel)
            said.append(f"The kernel takes blocks from 64K on: of those {size} costs least, {more} % more.")
        return said

    def _how_sure(self) -> str:
        if self.runner_up is None or self.margin is None:
            return "There is no other block size to compare with."
        own, other, more = format_size(self.block_size), format_size(self.runner_up), 100 * self.margin
        halves = " and ".join(dict.fromkeys(map(format_size, self.halves)))
        return (
            f"{self.certainty.capitalize()}: {other} costs {format_ratio(more)} % more; {own} wins in "
            f"{100 * self.confidence:.0f} % of {_RESAMPLINGS:,} resamplings of {self.parts} parts of the "
            "trace" + (" and in both halves of it." if self.agreed else f", but its halves say {halves}.")
        )


def advise(parts: Costs, block_sizes: Sequence[int], prices: Prices | None = None) -> Advice | None:
    """Return the advice from the costs of the parts of a trace; None if nothing was written."""
    prices = prices or Prices()
    by_part = parts @ np.array(prices.as_tuple())
    total = by_part.sum(axis=0)
    if not total.any():
        return None
    order = [int(index) for index in np.argsort(total, kind="stable")]
    best, *others = order
    return Advice(
        block_size=block_sizes[best],
        bytes=_three(parts[:, best].sum(axis=0)),
        costs={size: float(cost) for size, cost in zip(block_sizes, total, strict=True)},
        prices=prices,
        runner_up=block_sizes[others[0]] if others else None,
        margin=float(total[others[0]] / total[best] - 1) if others and total[best] else None,
        confidence=_confidence(by_part, best),
        parts=len(by_part),
        halves=_halves(by_part, block_sizes),
        kernel_block_size=next((block_sizes[i] for i in order if block_sizes[i] >= KERNEL_BLOCK_SIZE), None),
    )


def _three(values: npt.NDArray[np.float64]) -> tuple[int, int, int]:
    copied, space, metadata = (int(value) for value in values)
    return copied, space, metadata


def _halves(by_part: npt.NDArray[np.float64], block_sizes: Sequence[int]) -> tuple[int, int]:
    middle = len(by_part) // 2
    first, second = (int(half.sum(axis=0).argmin()) for half in (by_part[:middle], by_part[middle:]))
    return block_sizes[first], block_sizes[second]


def _confidence(by_part: npt.NDArray[np.float64], best: int) -> float:
    """Draw as many parts as there are, with replacement, again and again; return how often `best` is best."""
    count = len(by_part)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_RESAMPLINGS)
    return float(np.mean((draws @ by_part).argmin(axis=1) == best))
