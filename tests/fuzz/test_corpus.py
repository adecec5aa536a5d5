"""Inputs that the fuzzers found worth keeping (fuzz.py) go through the Python targets again."""

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).resolve().parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_gives_results_or_our_own_errors(name: str) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs, f"no corpus for {name}"
    for file in inputs:
        TARGETS[name](file.read_bytes())
