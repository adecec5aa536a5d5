"""The advice on a block size: least cost, how sure, what the kernel takes."""

import numpy as np
import pytest

from blocksnap.amplification.advice import Advice, Prices, advise
from blocksnap.errors import ArgumentError

SIZES = [4096, 65536, 1 << 20]


def advised(parts: list[list[tuple[int, int, int]]], prices: str = "1:1:1") -> Advice:
    advice = advise(np.array(parts, float), SIZES, Prices.parse(prices))
    assert advice is not None
    return advice


def test_least_total_cost_at_the_given_prices_wins() -> None:
    parts = [[(0, 10, 100), (40, 20, 10), (200, 200, 1)]] * 20
    assert advised(parts).block_size == 65536
    assert advised(parts, "1:1:0").block_size == 4096
    assert advised(parts, "0:0:1").block_size == 1 << 20
    assert advised(parts).costs == {4096: 2200.0, 65536: 1400.0, 1 << 20: 8020.0}


def test_trace_whose_parts_agree_makes_sure() -> None:
    advice = advised([[(0, 10, 100), (40, 20, 10), (200, 200, 1)]] * 20)
    assert advice.certainty == "sure"
    assert advice.confidence == 1.0
    assert advice.runner_up == 4096
    assert advice.margin == pytest.approx(110 / 70 - 1)
    assert "wins in 100 % of" in " ".join(advice.sentences())


def test_one_part_that_decides_alone_makes_unsure() -> None:
    parts = [[(0, 10, 0), (0, 11, 0), (0, 99, 0)]] * 40 + [[(0, 90, 0), (0, 49, 0), (0, 99, 0)]]
    advice = advised(parts)
    assert advice.block_size == 65536
    assert advice.certainty == "too near to call"
    assert advice.halves == (4096, 65536)


def test_near_runner_up_is_too_near_to_call_however_steady() -> None:
    assert advised([[(0, 1000, 0), (0, 1001, 0), (0, 2000, 0)]] * 50).certainty == "too near to call"


def test_best_size_of_the_kernel_is_named_beside_a_smaller_one() -> None:
    advice = advised([[(0, 10, 0), (0, 15, 0), (0, 30, 0)]] * 20)
    assert advice.kernel_block_size == 65536
    assert "The kernel takes blocks from 64K on: of those 64K costs least, 50.0 % more." in advice.sentences()


def test_nothing_written_gives_no_advice() -> None:
    assert advise(np.zeros((1, 3, 3)), SIZES) is None


@pytest.mark.parametrize("text", ["", "1:2", "a:b:c", "-1:1:1", "0:0:0", "inf:1:1"])
def test_prices_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="prices"):
        Prices.parse(text)
