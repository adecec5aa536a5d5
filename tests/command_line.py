"""Run the command line in this process, as `blocksnap ...` does."""

import json
from typing import Any

import pytest

from blocksnap.cli import main

__all__ = ["CommandLine", "command_line"]


class CommandLine:
    """Runs verbs; what they print on the two streams is kept for the test."""

    def __init__(self, capture: pytest.CaptureFixture[bytes]) -> None:
        self._capture = capture
        self.out = b""
        self.err = ""

    def __call__(self, *words: object) -> int:
        """Run one verb and return its exit status."""
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        captured = self._capture.readouterr()
        self.out, self.err = captured.out, captured.err.decode()
        assert "Traceback" not in self.err
        return int(ended.value.code or 0)

    def text(self, *words: object) -> str:
        """Run a verb that must succeed and return what it prints."""
        assert self(*words) == 0, self.err
        return self.out.decode()

    def json(self, *words: object) -> Any:
        return json.loads(self.text(*words, "--json"))

    def fails(self, status: int, *words: object) -> str:
        """Run a verb that must fail with a status; return its one line."""
        assert self(*words) == status
        assert len(self.err.splitlines()) == 1, self.err
        return self.err


@pytest.fixture
def command_line(capfdbinary: pytest.CaptureFixture[bytes]) -> CommandLine:
    return CommandLine(capfdbinary)
