"""What every verb shares: the two streams, JSON, options that mean the same everywhere, and how a verb ends.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 failed, 2 wrong usage, 3 damage
found.
"""

import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import ArgumentError, BlocksnapError
from ..units import parse_size

__all__ = [
    "DAMAGE_FOUND",
    "FAILED",
    "WRONG_USAGE",
    "JsonOption",
    "parse_size_option",
    "print_json",
    "run",
    "stderr",
    "stdout",
]

FAILED = 1
WRONG_USAGE = 2
DAMAGE_FOUND = 3

# Into a file or pipe, tables are as wide as they need to be.
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120

stdout = Console(highlight=False, width=_WIDTH)
stderr = Console(stderr=True, highlight=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]

# The common base of all that typer says about a command line: older versions import click for it, newer ones
# carry it inside, neither gives it a public name.
_CommandLineError: type[Exception] = typer.BadParameter.__bases__[0].__bases__[0]


def parse_size_option(text: str) -> int:
    """Return the bytes of an option like "64K": the `parser=` of every size on the command line."""
    try:
        return parse_size(text)
    except ArgumentError as error:
        raise typer.BadParameter(error.message) from None


def print_json(value: object) -> None:
    """Print dataclasses, mappings, sequences, paths and numbers as JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=_plain) + "\n")
    sys.stdout.flush()


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def run(command: Callable[[], Any], *, debug: Callable[[], bool]) -> int:
    """Run a verb and return the exit status; every failure becomes one line on stderr.

    `debug` says whether --debug was given, which is known only once the command line was read.
    """
    with _signals_interrupt() as received:
        try:
            status = command()
            sys.stdout.flush()
            return _interrupted(received) if received else status if isinstance(status, int) else 0
        except (KeyboardInterrupt, typer.Abort):
            return _interrupted(received)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except Exception as error:  # noqa: BLE001 - the last line of defence: a person sees one line, not a traceback
            if debug():
                traceback.print_exc()
            sentence, status = _describe(error)
            sys.stderr.write(f"blocksnap: {sentence}\n")
            return status


def _interrupted(received: list[int]) -> int:
    return 128 + (received[0] if received else signal.SIGINT)


def _describe(error: Exception) -> tuple[str, int]:
    """Return the line that a person reads and the exit status."""
    if isinstance(error, _CommandLineError):
        return _describe_usage(error)
    if isinstance(error, BlocksnapError):
        return str(error), WRONG_USAGE if isinstance(error, ArgumentError) else FAILED
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, FAILED
    return f"internal error: {type(error).__name__}: {error} (--debug shows where)", FAILED


def _describe_usage(error: Exception) -> tuple[str, int]:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    hint = f' (see "{context.command_path} --help")' if context is not None else ""
    return " ".join(message.split()).rstrip(".") + hint, getattr(error, "exit_code", WRONG_USAGE)


@contextmanager
def _signals_interrupt() -> Iterator[list[int]]:
    """Make SIGTERM and SIGHUP end a verb as Ctrl-C does, so that what it mounted is unmounted."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a handler
        received.append(number)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
