"""Verbs on a pool: each takes "PATH NAME...", or two devices and the names, before what it has of its own."""

import inspect
from collections.abc import Callable, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..engines import ENGINES
from .pools import Location

__all__ = ["pool_verb"]

_Run = TypeVar("_Run", bound=Callable[..., int | None])

_PATH = "Directory of the pool; left out with --metadata and --data."
_NAMES = {
    "NAME": "Name of the thin device.",
    "NEW": "Name of the new thin device.",
    "DIR": "Where to mount it.",
    "NAME1": "Name of a thin device.",
    "NAME2": "Name of the one it is compared with.",
}
_DEVICES = {
    "metadata": ("DEV", "Metadata device of a pool on two devices, instead of PATH."),
    "data": ("DEV", "Data device of a pool on two devices, instead of PATH."),
    "catalog": ("FILE", "Catalog of a pool on two devices, if not in its usual place."),
}
_ENGINE = f"What runs the pool, {' or '.join(ENGINES)}; by default who serves it, else user."


def pool_verb(
    app: typer.Typer, *names: str, command: str | None = None, engine: bool = True
) -> Callable[[_Run], _Run]:
    """Make a function a verb of `app`: it is given the Location, the named arguments, and its own options."""

    def register(run: _Run) -> _Run:
        own = list(inspect.signature(run, eval_str=True).parameters.values())[1 + len(names) :]

        def verb(**given: Any) -> int | None:
            words = [given.pop(name.lower()) for name in ("PATH", *names)]
            devices = [given.pop(name) for name in _DEVICES]
            location, found = _locate(words, names, devices, given.pop("engine", None))
            return run(location, *found, **given)

        verb.__doc__ = run.__doc__
        places = [_argument("PATH", _PATH), *(_argument(name, _NAMES[name]) for name in names)]
        options = [_option(name, *about, Path) for name, about in _DEVICES.items()]
        if engine:
            options.append(_option("engine", "ENGINE", _ENGINE, str))
        own = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]
        verb.__signature__ = inspect.Signature([*places, *own, *options])  # type: ignore[attr-defined]
        app.command(name=command or run.__name__)(verb)
        return run

    return register


def _argument(name: str, about: str) -> Parameter:
    kind = Annotated[str | None, typer.Argument(metavar=name, help=about, show_default=False)]
    return Parameter(name.lower(), Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _option(name: str, metavar: str, about: str, kind: type) -> Parameter:
    option = typer.Option(f"--{name}", metavar=metavar, help=about, show_default=False)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _locate(
    words: Sequence[str | None],
    names: Sequence[str],
    devices: Sequence[Path | None],
    engine: str | None,
) -> tuple[Location, list[str]]:
    """Split the words "PATH NAME..." into the pool and the named rest; with two devices there is no PATH."""
    arguments = [word for word in words if word is not None]
    on_devices = any(device is not None for device in devices)
    wanted = [*names] if on_devices else ["PATH", *names]
    if len(arguments) != len(wanted):
        instead = " (with --metadata and --data, no PATH)" if on_devices else ""
        raise typer.BadParameter(
            f"give {' '.join(wanted) or 'no argument'}{instead}, not {len(arguments)} arguments"
        )
    if on_devices:
        return Location(None, devices[0], devices[1], devices[2], engine), arguments
    return Location(Path(arguments[0]), None, None, None, engine), arguments[1:]
