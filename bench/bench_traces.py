"""How fast traces are read: bytes of the file, uncompressed, per second of one core.

    python -m bench.bench_traces [--requests 2000000] [--directory /dev/shm]

Each file is read three times, the best counts. Beside them, on the same files: summing a memory-mapped file
as 64-bit words (what memory gives), and polars reading the CSV on one thread.
"""

import argparse
import gzip
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zstandard

from bench.trace_stream import pieces
from blocksnap.traces import REQUEST, Requests, Trace

REPEATS = 3


def requests_of(count: int) -> Requests:
    def arrays() -> Iterator[Requests]:
        for piece in pieces(count):
            out = np.zeros(len(piece), REQUEST)
            out["time"] = piece["time"] * 1000
            out["offset"] = piece["sector"] * 512
            out["length"] = piece["length"]
            out["kind"] = piece["command"] == 0x2A
            yield out

    return np.concatenate(list(arrays()))


def blktrace(requests: Requests) -> bytes:
    names = ["magic", "sequence", "time", "sector", "bytes", "action", "pid", "device", "cpu"]
    out = np.zeros(
        len(requests),
        [(name, "<u8" if name in ("time", "sector") else "<u4") for name in names] + [("rest", "<u4")],
    )
    out["magic"] = 0x65617407
    out["time"], out["sector"], out["bytes"] = requests["time"], requests["offset"] // 512, requests["length"]
    out["action"] = np.where(requests["kind"] == 1, 1 << 17, 1 << 16) | 1
    return out.tobytes()


def lines(form: str, header: str = "") -> Callable[[Requests], bytes]:
    """Return a writer of lines; the form names what of a request it takes."""

    def line(time: int, offset: int, length: int, kind: int) -> str:
        return form.format(
            ticks=time // 100 + 10**17,
            us=time // 1000,
            seconds=f"{time // 10**9}.{time % 10**9:09d}",
            offset=offset,
            sector=offset // 512,
            length=length,
            sectors=length // 512,
            word=("Read", "Write")[kind],
            letter="RW"[kind],
            flag=1 - kind,
        )

    def write(requests: Requests) -> bytes:
        columns = (requests[name].tolist() for name in ("time", "offset", "length", "kind"))
        return "\n".join([*([header] if header else []), *map(line, *columns), ""]).encode()

    return write


ALIBABA = lines("3,{letter},{offset},{length},{us}")
WRITERS: dict[str, Callable[[Requests], bytes]] = {
    "alibaba": ALIBABA,
    "msr": lines("{ticks},hm,1,{word},{offset},{length},1331"),
    "csv": lines("{seconds},{letter},{offset},{length},3", "time,op,offset,length,device"),
    "iolog3": lines("{us} /dev/sda {word} {offset} {length}", "fio version 3 iolog"),
    "disksim": lines("{seconds} 0 {sector} {sectors} {flag}"),
    "blkparse": lines("  8,0    1     1234 {seconds}  4711  Q  {letter}S {sector} + {sectors} [kworker/1:2]"),
    "alibaba.gz": lambda requests: gzip.compress(ALIBABA(requests), 6),
    "alibaba.zst": lambda requests: zstandard.ZstdCompressor(level=3).compress(ALIBABA(requests)),
    "vscsi": lambda requests: b"".join(piece.tobytes() for piece in pieces(len(requests))),
    "blktrace": blktrace,
}


def best(action: Callable[[Path], object], path: Path) -> float:
    """Return the least CPU time of some runs."""
    seconds = float("inf")
    for _ in range(REPEATS):
        begin = time.process_time()
        action(path)
        seconds = min(seconds, time.process_time() - begin)
    return seconds


def read(path: Path) -> int:
    with Trace([path]) as trace:
        return sum(map(len, trace))


def sum_mapped(path: Path) -> int:
    return int(np.memmap(path, "<u8").sum())


def show(name: str, size: int, seconds: float, requests: int) -> None:
    speed, rate = size / seconds / 1e6, requests / seconds / 1e6
    print(f"{name:28} {size / 1e6:8.1f} MB {speed:9.0f} MB/s {rate:8.1f} M requests/s")


def bench(name: str, requests: Requests, path: Path) -> None:
    path.write_bytes(WRITERS[name](requests))
    size = len(ALIBABA(requests)) if name.startswith("alibaba.") else path.stat().st_size
    assert read(path) == len(requests), name
    show(name, size, best(read, path), len(requests))
    if name in ("vscsi", "blktrace"):
        show("  memory-mapped, summed", size, best(sum_mapped, path), len(requests))
    if name == "csv":
        bench_polars(path, size, len(requests))
    path.unlink()


def bench_polars(path: Path, size: int, count: int) -> None:
    os.environ.setdefault("POLARS_MAX_THREADS", "1")
    try:
        import polars
    except ImportError:
        return
    show("  polars.read_csv alone", size, best(polars.read_csv, path), count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2_000_000)
    parser.add_argument("--directory", default="/dev/shm")
    arguments = parser.parse_args()
    requests = requests_of(arguments.requests)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="blocksnap-traces-") as directory:
        for name in WRITERS:
            bench(name, requests, Path(directory) / name)


if __name__ == "__main__":
    main()
