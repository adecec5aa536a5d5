"""Fuzz a Python target with libFuzzer (pip install atheris).

python -m tests.fuzz.fuzz TARGET [libFuzzer's options] [CORPUS...]
"""

import sys

import atheris

from blocksnap.traces import order, vscsi
from tests.fuzz.targets import TARGETS

# What a traced comparison returns is never freed (atheris 3.0.0). That is nothing for a bool, but these
# compare arrays: traced, they take 0.2 MB more each thousand inputs.
UNTRACED = (order._is_sorted, vscsi._fits)

if __name__ == "__main__":
    name = sys.argv.pop(1)
    codes = [function.__code__ for function in UNTRACED]
    atheris.instrument_all()
    for function, code in zip(UNTRACED, codes, strict=True):
        function.__code__ = code
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
