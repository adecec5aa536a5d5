"""A pool transaction: operations that reach the pool and the catalog together, or not at all.

Between the user engine's begin and end nothing commits, so a crash loses all of it. The kernel engine commits
each message: a creation is written down in the catalog before it is made, so that the next open can take it
back. What adds (creation, snapshot, growth) happens at once and is taken back by an abort; what removes
(deletion, shrinking) cannot be taken back and waits for the end. An intent with a shrinking is written only
then: who finds it finishes it.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

from .catalog import Catalog
from .device_record import MAX_DEVICE_ID, Action, DeviceRecord, Operation
from .engines import Engine, EngineDevice
from .errors import ArgumentError, BlocksnapError, DeviceExistsError, DeviceNotFoundError, NoSpaceError

__all__ = ["DeviceTable", "Transaction"]


class DeviceTable:
    """The devices of an open pool by name and by id; remembers changes until they are kept or taken back."""

    def __init__(self, records: list[DeviceRecord], where: str) -> None:
        self._where = where
        self._condemned = {record.id: record for record in records if record.condemned}
        self._by_id = {record.id: record for record in records if not record.condemned}
        self._by_name = {record.name: record for record in self._by_id.values()}
        self._before: list[tuple[DeviceRecord | None, DeviceRecord | None]] = []
        self._leaving: set[int] = set()
        self._next_id = max((record.id for record in records), default=0) + 1

    def records(self) -> list[DeviceRecord]:
        return sorted(self._by_name.values(), key=lambda record: record.name)

    def condemned(self) -> list[DeviceRecord]:
        """Return the devices that are to be deleted once nobody uses them; nothing else finds them."""
        return list(self._condemned.values())

    def named(self, name: str) -> DeviceRecord:
        record = self._by_name.get(name)
        if record is None:
            raise DeviceNotFoundError(
                f'no thin device "{name}" in {self._where}: see "blocksnap device list"'
            )
        return record

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def find(self, device_id: int) -> DeviceRecord | None:
        return self._by_id.get(device_id)

    def free_id(self) -> int:
        """Return an id that no device has and none that is about to be deleted."""
        for _ in range(MAX_DEVICE_ID + 1):
            candidate, self._next_id = (
                self._next_id,
                self._next_id + 1 if self._next_id < MAX_DEVICE_ID else 0,
            )
            taken = candidate in self._by_id or candidate in self._leaving or candidate in self._condemned
            if candidate <= MAX_DEVICE_ID and not taken:
                return candidate
        raise NoSpaceError(
            f"{self._where} has {MAX_DEVICE_ID + 1} thin devices, the most there can be: delete some"
        )

    def change(self, old: DeviceRecord | None, new: DeviceRecord | None) -> None:
        """Replace a record: None for old adds, None for new removes."""
        self._before.append((old, new))
        self._put(old, new)
        if old is not None and new is None:
            self._leaving.add(old.id)

    def _put(self, old: DeviceRecord | None, new: DeviceRecord | None) -> None:
        if old is not None and old.condemned:
            del self._condemned[old.id]
        elif old is not None:
            del self._by_id[old.id], self._by_name[old.name]
        if new is not None and new.condemned:
            self._condemned[new.id] = new
        elif new is not None:
            self._by_id[new.id] = self._by_name[new.name] = new

    def keep(self) -> None:
        self._before.clear()
        self._leaving.clear()

    def take_back(self) -> None:
        while self._before:
            old, new = self._before.pop()
            self._put(new, old)
        self._leaving.clear()


class Transaction:
    """One transaction of a pool: begin(), the operations, then exactly one of complete() and abort()."""

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        table: DeviceTable,
        transaction_id: int,
        close_handle: Callable[[int], None],
    ) -> None:
        """transaction_id is the pool's; close_handle closes the handle of a device before that is deleted."""
        self._engine = engine
        self._catalog = catalog
        self._table = table
        self._close_handle = close_handle
        self._operations: list[Operation] = []
        self._additions: list[tuple[int, Callable[[], None]]] = []
        self._removals: list[tuple[Operation, Callable[[], None]]] = []
        self._removed: list[Operation] = []
        self._shrinking: dict[int, EngineDevice] = {}
        self._intended = False
        self.ended = False
        self.transaction_id = transaction_id
        self.touched: set[int] = set()

    def begin(self) -> None:
        try:
            self._engine.begin()
        except BaseException:
            # An interrupt may come when the engine has begun already; if it has not, this does nothing.
            with suppress(BlocksnapError):
                self._engine.end(self.transaction_id, self.transaction_id)
            self.ended = True
            raise

    def create(
        self,
        name: str,
        size: int,
        labels: Mapping[str, str],
        origin: DeviceRecord | None = None,
        *,
        external_origin: str | None = None,
    ) -> DeviceRecord:
        """Create a device, empty or a snapshot of its origin, whose external origin it then has too."""
        if name in self._table:
            raise DeviceExistsError(f'a thin device "{name}" exists already: choose another name')
        if origin is not None and origin.id in self._shrinking:
            raise ArgumentError(f'"{origin.name}" shrinks in this transaction: take its snapshot in the next')
        device_id = self._table.free_id()
        origin_id = None if origin is None else origin.id
        below = external_origin if origin is None else origin.external_origin
        record = DeviceRecord(device_id, name, size, time.time_ns(), origin_id, dict(labels), below)
        if self._engine.messages_commit:
            known = [each for each in self._operations if each.action is not Action.SHRINK]
            self._intend([*known, Operation(Action.CREATE, record)])
        if origin is None:
            self._engine.create_device(device_id)
        else:
            self._engine.create_snapshot(device_id, origin.id)
        self._additions.append((device_id, partial(self._delete_now, device_id)))
        self._record(Action.CREATE, None, record)
        return record

    def delete(self, record: DeviceRecord) -> None:
        """Delete a device at the end, at once if this transaction created it."""
        if any(operation.creates(record.id) for operation in self._operations):
            self._delete_now(record.id)
            self._operations = [each for each in self._operations if each.record.id != record.id]
            self._additions = [each for each in self._additions if each[0] != record.id]
            self._removals = [each for each in self._removals if each[0].record.id != record.id]
            self._table.change(record, None)
            return
        operation = self._record(Action.DELETE, record, None)
        self._removals.append((operation, partial(self._delete_now, record.id)))

    def condemn(self, record: DeviceRecord) -> None:
        """Free the name of a device that is to be deleted later."""
        self._record(
            Action.CONDEMN, record, replace(record, name=f"{record.id}/{record.name}", condemned=True)
        )

    def holds(self, device_id: int) -> bool:
        """Whether the transaction itself has a device open."""
        return device_id in self._shrinking

    def resize(self, record: DeviceRecord, size: int) -> None:
        """Grow a device at once, shrink it at the end."""
        resized = replace(record, size=size)
        if size >= record.size and record.id not in self._shrinking:
            self._resize_now(record, size)
            self._additions.append((record.id, partial(self._resize_now, resized, record.size)))
            self._record(Action.RESIZE, record, resized)
            return
        if record.id not in self._shrinking:
            # Held open, so that whoever opens it meanwhile gets the size that is still in force.
            self._shrinking[record.id] = self._open(record)
        action = Action.SHRINK if self._engine.messages_commit else Action.RESIZE
        operation = self._record(action, record, resized)
        self._removals.append((operation, partial(self._shrinking[record.id].resize, size)))

    def relabel(self, record: DeviceRecord, labels: Mapping[str, str]) -> None:
        self._record(Action.RELABEL, record, replace(record, labels=dict(labels)))

    def complete(self) -> None:
        """Commit everything; on failure nothing is added; what was removed by then stays so on both sides.

        If it has not `ended` even so, the pool must be abandoned: opening it again decides what holds.
        """
        try:
            new_id = self._intend(self._operations)
            for operation, remove in self._removals:
                remove()
                self._removed.append(operation)
        except BaseException:
            with suppress(BlocksnapError):
                self.abort()
            raise
        self._end(new_id)

    def abort(self) -> None:
        """Take back what was added and drop what was to be removed."""
        made = [each.record for each in self._operations if each.action is Action.CREATE]
        if self._removals and self._intended:
            self._intend([*(Operation(Action.UNMAKE, each) for each in made), *self._removed])
        self._table.take_back()
        removed = {operation.record.id for operation in self._removed}
        for device_id, take_back in reversed(self._additions):
            if device_id not in removed:
                take_back()
        for operation in self._removed:
            after = None if operation.action is Action.DELETE else operation.record
            self._table.change(self._table.find(operation.record.id), after)
        self._end(self._intend(self._removed))

    def _intend(self, operations: list[Operation]) -> int:
        """Write down what the transaction does, in the place of what it was to do before."""
        if not operations:
            if self._intended:
                self._catalog.undo()
            return self.transaction_id
        new_id = self._catalog.intend(operations, again=self._intended)
        self._intended = True
        return new_id

    def _end(self, new_id: int) -> None:
        for device_id in list(self._shrinking):
            self._let_go(device_id)
        self._engine.end(self.transaction_id, new_id)
        self.ended = True
        self._table.keep()
        if new_id != self.transaction_id:
            self.transaction_id = new_id
            # The operation is whole without this; if it fails, the next intent or the next open does it.
            with suppress(BlocksnapError):
                self._catalog.finish()

    def _record(self, action: Action, before: DeviceRecord | None, after: DeviceRecord | None) -> Operation:
        record = after or before
        assert record is not None
        operation = Operation(action, record)
        self._operations.append(operation)
        self.touched.add(record.id)
        self._table.change(before, after)
        return operation

    def _resize_now(self, record: DeviceRecord, size: int) -> None:
        with self._open(record) as device:
            device.resize(size)

    def _open(self, record: DeviceRecord) -> EngineDevice:
        return self._engine.open_device(record.id, record.size, record.external_origin)

    def _delete_now(self, device_id: int) -> None:
        self._let_go(device_id)
        self._close_handle(device_id)
        self._engine.delete_device(device_id)

    def _let_go(self, device_id: int) -> None:
        device = self._shrinking.pop(device_id, None)
        if device is not None:
            device.close()
