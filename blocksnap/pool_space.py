"""The thread that watches the space of an open pool, lets it grow by its policy and tells what happens.

It takes none of the pool's locks: a thread that waits for space may hold them.
"""

import threading
from collections.abc import Callable
from contextlib import suppress

from .engines import Engine
from .errors import BlocksnapError, NoSpaceError
from .pool_files import PoolFiles, backing_size, grow_file
from .space_policy import (
    DEFAULT_THRESHOLD,
    ExtendFailed,
    ExtendPolicy,
    PoolEvent,
    PoolExtended,
    PoolPart,
    PoolStopped,
    SpaceLow,
    SpaceOut,
)
from .units import format_size
from .user_pool import EngineStatus

__all__ = ["OnEvent", "SpaceKeeper"]

OnEvent = Callable[[PoolEvent], object]
"""Called with each event, on a thread of its own, outside the pool's locks."""

_METADATA_BLOCK_SIZE = 4096
_MAX_METADATA_SIZE = 255 * 16320 * _METADATA_BLOCK_SIZE
_LOOK_SECONDS = 5.0
"""A look without an event: the kernel's mark fires once until the next change of the table."""


class SpaceKeeper:
    """Watches one pool until `end`; a full pool has its writers wait as long as it can grow."""

    def __init__(
        self,
        files: PoolFiles,
        engine: Engine,
        extending: threading.Lock,
        policy: ExtendPolicy | None,
        on_event: OnEvent | None,
    ) -> None:
        """`extending` is held by whoever extends the pool."""
        self._files = files
        self._engine = engine
        self._extending = extending
        self._policy = policy or ExtendPolicy(DEFAULT_THRESHOLD)
        self._grows = policy is not None
        self._on_event = on_event
        self._told: set[object] = set()
        self._stuck = False
        self._ending = False
        self._watch = engine.watch()
        self._thread = threading.Thread(target=self._run, name=f"space of {files}", daemon=True)
        self._arm(engine.status())
        self._thread.start()

    def end(self) -> None:
        """Stop; the caller holds no lock that an event's receiver may want."""
        self._ending = True
        self._watch.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._watch.close()

    def _run(self) -> None:
        while not self._ending and not self._engine.closed:
            with suppress(BlocksnapError):  # closed, or failed: the pool itself tells so
                while self._look():
                    pass
            self._watch.wait(_LOOK_SECONDS)

    def _look(self) -> bool:
        """Tell what is new, grow what is low; return whether something has grown."""
        status = self._engine.status()
        self._tell_state(status)
        self._stuck = False
        grown = [self._look_at(part, status) for part in PoolPart]
        self._arm(self._engine.status())
        return any(grown)

    def _arm(self, status: EngineStatus) -> None:
        size, _ = _space(PoolPart.DATA, status)
        self._watch.arm(self._policy.low_water(size), wait_when_full=self._grows and not self._stuck)

    # ---- growing

    def _look_at(self, part: PoolPart, status: EngineStatus) -> bool:
        size, free = _space(part, status)
        low = free <= self._policy.low_water(size) if part is PoolPart.DATA else status.metadata_low
        if not low:
            self._told -= {each for each in self._told if isinstance(each, tuple) and each[0] is part}
            return False
        self._tell_once((part, SpaceLow), SpaceLow(part, free, size))
        if not self._grows:
            return False
        try:
            with self._extending:
                self._extend(part, size, free)
        except BlocksnapError as error:
            self._stuck = True
            self._tell_once((part, ExtendFailed, str(error)), ExtendFailed(part, error))
            return False
        self._tell(PoolExtended(part, size, _space(part, self._engine.status())[0]))
        return True

    def _extend(self, part: PoolPart, size: int, free: int) -> None:
        """Grow one part, or raise why it cannot."""
        file = self._files.data if part is PoolPart.DATA else self._files.metadata
        wanted = self._policy.grown(size, free) if part is PoolPart.DATA else _grown_metadata(size)
        if wanted <= size:
            raise NoSpaceError(
                f"the {part} of pool {self._files} have {format_size(size)}, the most that they may:"
                " delete devices, or allow more"
            )
        if self._files.directory is not None:
            grow_file(file, wanted, reserve=True, preallocate=self._policy.preallocate)
        elif backing_size(file) <= size:
            raise NoSpaceError(f"{file} is used whole: enlarge it, or delete devices")
        status = self._engine.status()
        data_bytes = status.data_blocks * status.block_size
        self._engine.extend(min(wanted, backing_size(file)) if part is PoolPart.DATA else data_bytes)

    # ---- telling

    def _tell_state(self, status: EngineStatus) -> None:
        stopped = PoolStopped(needs_check=status.needs_check, failed=status.failed)
        if stopped.needs_check or stopped.failed:
            self._tell_once(stopped, stopped)
        for part in PoolPart:
            if _space(part, status)[1] == 0:
                self._tell_once((part, SpaceOut), SpaceOut(part))

    def _tell_once(self, key: object, event: PoolEvent) -> None:
        """Tell an event, unless it was told since its part last had space."""
        if key not in self._told:
            self._told.add(key)
            self._tell(event)

    def _tell(self, event: PoolEvent) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception as error:  # noqa: BLE001 - the receiver's own affair: the pool goes on
            threading.excepthook(
                threading.ExceptHookArgs((type(error), error, error.__traceback__, self._thread))
            )


def _space(part: PoolPart, status: EngineStatus) -> tuple[int, int]:
    """Return size and free bytes of a part."""
    if part is PoolPart.DATA:
        return status.data_blocks * status.block_size, status.data_blocks_free * status.block_size
    return (
        status.metadata_blocks * _METADATA_BLOCK_SIZE,
        status.metadata_blocks_free * _METADATA_BLOCK_SIZE,
    )


def _grown_metadata(size: int) -> int:
    half = size // 2 // _METADATA_BLOCK_SIZE * _METADATA_BLOCK_SIZE
    return min(size + max(half, 16 * _METADATA_BLOCK_SIZE), _MAX_METADATA_SIZE)
