"""Operations on a pool of the kernel engine whose disk is logged: python -m tests.kernel.log_load SEED STEPS

On /dev/ubda lie, in this order, metadata, data and a file system with the catalog (log_states.py made them);
all that is written to it is logged on /dev/ubdb by the target log-writes. The marks of the operations are in
the log, too, by their numbers; their text goes to the output, which is outside before the number is logged.
"""

import os
import sys
import time
from pathlib import Path

from blocksnap.device_mapper import Control, Device, DeviceNumber, LinearTarget, OtherTarget
from blocksnap.mount import mount
from blocksnap.pool import Pool
from tests.crash.catalog_workload import Workload
from tests.kernel.devices import read_at
from tests.kernel.log_states import CATALOG, DATA, DISK, FIRST_DATA, METADATA, PIECE
from tests.kernel.log_writes import Region, nr_entries

LOG = "/dev/ubdb"
DIRECTORY = Path("/catalog")


class LoggedDisk:
    """The disk below the log, its parts as devices."""

    def __init__(self, control: Control) -> None:
        self._control = control
        disk = OtherTarget(DISK, "log-writes", f"{DeviceNumber.of('/dev/ubda')} {DeviceNumber.of(LOG)}")
        self._disk = Device.create(control, "logged", [disk])
        self._marks = 0
        self.metadata = self._part("metadata", METADATA)
        self.data = self._part("data", Region(DATA.begin, DATA.begin + FIRST_DATA))
        self.catalog = self._part("catalog", CATALOG)

    def _target(self, region: Region) -> LinearTarget:
        return LinearTarget(region.end - region.begin, self._disk.number, region.begin)

    def _part(self, name: str, region: Region) -> Device:
        return Device.create(self._control, name, [self._target(region)])

    def grow_data(self, size: int) -> None:
        self.data.replace([self._target(Region(DATA.begin, DATA.begin + size))])

    def mark(self, text: bytes) -> None:
        os.write(1, text + b"\n")
        self._disk.message(f"mark {self._marks}")
        self._marks += 1

    def close(self) -> None:
        """Wait until the log is on its device: it is written behind the back of who writes."""
        before = -1
        while (now := nr_entries(read_at(LOG, 0, 4096))) != before:
            before = now
            time.sleep(0.5)


class KernelWorkload(Workload):
    """Operations, of which extending means a larger device."""

    disk: LoggedDisk

    def extend(self, size: int) -> None:
        if size <= DATA.end - DATA.begin:
            self.disk.grow_data(size)
            self._pool.extend()


def main(seed: str, steps: str) -> None:
    with Control.open() as control:
        disk = LoggedDisk(control)
        DIRECTORY.mkdir()
        mount(disk.catalog.path, DIRECTORY, "ext4")
        pool = Pool.open(
            metadata=disk.metadata.path,
            data=disk.data.path,
            catalog=DIRECTORY / "catalog.db",
            engine="kernel",
            passdown=int(seed) % 2 == 0,
        )
        workload = KernelWorkload(pool, int(seed), disk.mark, piece=PIECE)
        workload.disk = disk
        workload.run(int(steps))
        disk.close()
    # As a power cut: no close.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
