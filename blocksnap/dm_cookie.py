"""Waiting for udev to be done with a mapped device, where udev runs; nothing at all where it does not.

With a cookie, `/dev/mapper/NAME` and the links below /dev/disk are there once a device was made, and gone
once it was removed.
"""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._native import check, ffi, lib

__all__ = ["Cookie", "left_cookies", "own_left_cookies", "remove_left_cookies", "udev_cookie", "udev_runs"]

_CONTROL = Path("/run/udev/control")
_RULES = ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/local/lib/udev/rules.d", "/usr/lib/udev/rules.d")
_NOTIFY = "95-dm-notify.rules"
_KEY_BASE = 0x0D4D
_OUR_COUNT = 2  # libdevmapper has one
_TIMEOUT_SECONDS = 30.0


def udev_runs() -> bool:
    """Whether a udevd answers for mapped devices: it runs, and has the rule that tells when it is done."""
    return _CONTROL.exists() and any(
        Path(folder, _NOTIFY).exists() for folder in (*_RULES, "/lib/udev/rules.d")
    )


def left_cookies() -> list[int]:
    """Return the keys of the semaphores that nobody waits for any more, ours and other programs'.

    `ipcrm -S KEY` removes one. One whose maker is at work just now is in the list too.
    """
    return [key for key, _, _ in _semaphores()]


def own_left_cookies(older_than: float) -> list[int]:
    """Return the keys of our semaphores that have not changed for some seconds."""
    changed = time.time() - older_than
    return [key for key, count, at in _semaphores() if count == _OUR_COUNT and at <= changed]


def _semaphores() -> Iterator[tuple[int, int, int]]:
    """Yield key, number of semaphores and time of the last change of each set that is for udev."""
    for line in Path("/proc/sysvipc/sem").read_text().splitlines()[1:]:
        key, _, _, count, *_, otime, ctime = map(int, line.split())
        if (key & 0xFFFFFFFF) >> 16 == _KEY_BASE:
            yield key & 0xFFFFFFFF, count, max(otime, ctime)


def remove_left_cookies() -> None:
    """Remove the semaphores that processes of ours had when they were killed."""
    lib.bs_dm_cookies_sweep()


class Cookie:
    """What a call passes on to udev; `sent` is set when the kernel has sent it an event."""

    __slots__ = ("sent", "value")

    def __init__(self, value: int) -> None:
        self.value = value
        self.sent = False


@contextmanager
def udev_cookie(*, private: bool = False) -> Iterator[Cookie]:
    """Give a cookie to one call; at the end wait until udev is done, if it was sent anything.

    The content of a `private` device is not looked at, and no link below /dev/disk leads to it.
    """
    if not udev_runs():
        yield Cookie(0)
        return
    base = ffi.new("uint32_t *")
    check(lib.bs_dm_cookie_create(base))
    try:
        cookie = Cookie(base[0] | _flags(private))
        yield cookie
        if cookie.sent:
            _wait(base[0])
    finally:
        lib.bs_dm_cookie_destroy(base[0])


def _flags(private: bool) -> int:
    flags = lib.BS_DM_UDEV_PRIMARY_SOURCE
    if private:
        flags |= lib.BS_DM_UDEV_NO_SUBSYSTEM_RULES | lib.BS_DM_UDEV_NO_DISK_RULES
        flags |= lib.BS_DM_UDEV_NO_OTHER_RULES
    return int(flags)


def _wait(base: int) -> None:
    """Wait for udev. A udevd that does not answer is no reason to fail: the device is there without it."""
    while (code := lib.bs_dm_cookie_wait(base, int(_TIMEOUT_SECONDS * 1000))) == -errno.EINTR:
        pass  # Python has run the signal's handler, which may have raised
    if code != -errno.ETIMEDOUT:
        check(code)
