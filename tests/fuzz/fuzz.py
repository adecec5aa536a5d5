"""Fuzz a Python target with libFuzzer (pip install atheris).

python -m tests.fuzz.fuzz TARGET [libFuzzer's options] [CORPUS...]
"""

import sys

import atheris

from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.instrument_all()
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
