"""Traces in parquet, with columns named as in CSV; read with polars, the extra `traces`."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import NotSupportedError, TraceError
from .columns import Column, columns_of
from .complaints import Complaints
from .names import Names
from .request import FLUSH, REQUEST, Requests
from .stream import ByteStream

__all__ = ["polars", "read_parquet"]

_ROWS = 1 << 20
_END = (1 << 63) - 1
_LONGEST = (1 << 32) - 1
_UNKNOWN = 255
_SENTENCES = {
    "kind": "its operation is unknown",
    "offset": "its offset is missing, negative or absurd",
    "length": "its length is missing, negative or absurd",
    "end": "its offset is absurd: no device has 2^63 bytes",
    "time": "its time is missing, negative or absurd",
    "order": "its time is before that of the record before: sort the trace (--sort)",
}


def polars(purpose: str) -> Any:
    """Return the module polars; NotSupportedError names the extra that brings it."""
    try:
        import polars as module
    except ImportError:
        raise NotSupportedError(f"{purpose} needs polars: pip install 'blocksnap[traces]'") from None
    return module


def read_parquet(
    stream: ByteStream,
    devices: Names,
    complaints: Complaints,
    *,
    ordered: bool = True,
    names: str | None = None,
) -> Iterator[Requests]:
    """Yield the requests of a parquet file, a million at a time; `names` replaces the columns' names."""
    pl, path = polars("reading parquet"), stream.name
    if stream.size is None or stream.compression is not None:
        raise TraceError(f"{path}: parquet is read from a plain file only: decompress it first")
    try:
        table = pl.scan_parquet(path)
        own_names = table.collect_schema().names()
        rows = table.select(pl.len()).collect().item()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise TraceError(f"{path}: not a whole parquet file: {_first_line(error)}") from None
    columns = columns_of(names.split(",") if names else own_names, path)
    chosen = table.select(_expression(pl, role, columns[role], own_names).alias(role) for role in columns)
    batches = _Batches(path, devices, complaints, ordered=ordered)
    for first in range(0, rows, _ROWS):
        try:
            batch = chosen.slice(first, _ROWS).collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            complaints.end(path, first + 1, f"cannot be read from here on: {_first_line(error)}")
            return
        stream.position = (stream.size * min(rows, first + _ROWS)) // rows
        yield batches.requests(batch, columns, first)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _expression(pl: Any, role: str, column: Column, own_names: list[str]) -> Any:
    """Return integers: times in nanoseconds, kinds by their number; -1 where a value cannot be."""
    value = pl.col(own_names[column.index])
    if role == "kind":
        words = {**column.words, **{word.upper(): kind for word, kind in column.words.items()}}
        plain = value.cast(pl.String).str.to_lowercase()
        return plain.replace_strict(words, default=_UNKNOWN, return_dtype=pl.UInt32).fill_null(_UNKNOWN)
    if role in ("device", "host"):
        return value.cast(pl.String).fill_null("")
    if role == "time":
        return _time(pl, value, column).fill_null(-1)
    return value.cast(pl.Int64, strict=False).fill_null(-1)


def _time(pl: Any, value: Any, column: Column) -> Any:
    """Dates are nanoseconds since 1970, numbers are of the column's unit."""

    def of_series(series: Any) -> Any:
        if series.dtype.is_temporal():
            return series.cast(pl.Datetime("ns")).cast(pl.Int64)
        if series.dtype.is_float():
            return (series * column.unit).round().cast(pl.Int64, strict=False)
        limited = series.cast(pl.Int64, strict=False)
        return limited.set(limited > _END // column.unit, None) * column.unit

    return value.map_batches(of_series, return_dtype=pl.Int64)


class _Batches:
    """Turns tables into requests; keeps what one batch must know of those before."""

    def __init__(self, name: str, devices: Names, complaints: Complaints, *, ordered: bool) -> None:
        self._name = name
        self._complaints = complaints
        self._ordered = ordered
        self._clock = 0
        self._device_names = devices

    def requests(self, batch: Any, columns: Mapping[str, Column], first: int) -> Requests:
        out = np.zeros(batch.height, REQUEST)
        bad: dict[str, npt.NDArray[np.bool_]] = {}
        out["kind"] = batch["kind"].to_numpy()
        bad["kind"] = out["kind"] == _UNKNOWN
        for role in ("offset", "length"):
            values, unit = batch[role].to_numpy(), columns[role].unit
            bad[role] = (values < 0) | (values > _END // unit)
            out[role] = np.where(bad[role], 0, values) * unit
        bad["length"] |= (out["length"] > _LONGEST) & (out["kind"] < 2)
        bad["end"] = out["offset"] + out["length"] > _END
        for role in ("offset", "length", "end"):
            bad[role] &= out["kind"] != FLUSH
        if "time" in columns:
            times = batch["time"].to_numpy()
            bad["time"] = times < 0
            out["time"] = np.where(bad["time"], 0, times)
        if "device" in columns:
            out["device"] = self._devices(batch["device"])
        if "host" in columns:
            out["device"] |= self._devices(batch["host"]) << 16
        return self._good(out, bad, first)

    def _devices(self, column: Any) -> npt.NDArray[np.uint32]:
        """Keep the numbers of devices that have numbers, count the names of others."""
        names, places = np.unique(column.to_numpy().astype(str), return_inverse=True)
        return np.array([self._number(name) for name in names.tolist()], np.uint32)[places]

    def _number(self, name: str) -> int:
        if name.isdecimal() and int(name) < 1 << 32:
            return int(name)
        return self._device_names.number(name or "-")

    def _good(self, out: Requests, bad: dict[str, npt.NDArray[np.bool_]], first: int) -> Requests:
        any_bad = np.logical_or.reduce(list(bad.values()))
        if self._ordered and len(out):
            seen = np.maximum.accumulate(np.where(any_bad, 0, out["time"]))
            bad["order"] = out["time"] < np.maximum(seen, np.uint64(self._clock))
            any_bad |= bad["order"]
            self._clock = max(self._clock, int(seen[-1]))
        if any_bad.any():
            row = int(np.argmax(any_bad))
            reason = next(sentence for role, sentence in _SENTENCES.items() if role in bad and bad[role][row])
            self._complaints.bad_record(self._name, first + row + 1, reason, count=int(any_bad.sum()))
            out = out[~any_bad]
        return out
