"""The transactions of an open pool, one after the other, and what they leave to be deleted later."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .catalog import Catalog
from .engines import Engine
from .errors import ArgumentError, BlocksnapError, BusyError, NeedsCheckError, PrivilegeError
from .pool_transaction import DeviceTable, Transaction

__all__ = ["PoolChanges"]


class PoolChanges:
    """Whoever changes a pool does it in a transaction of this."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        catalog: Catalog,
        table: DeviceTable,
        close_handle: Callable[[int], None],
        forget: Callable[[int], None],
    ) -> None:
        """close_handle is called with the id of a device before it is deleted, forget after."""
        self.lock = threading.RLock()
        """Held while a transaction is under way."""
        self._name = name
        self._engine = engine
        self._catalog = catalog
        self._table = table
        self._close_handle = close_handle
        self._forget = forget
        self._transaction: Transaction | None = None
        self._thread = 0
        status = engine.status()
        self._transaction_id = status.transaction_id
        self.read_only = status.read_only
        self._needs_check = status.needs_check
        self.failed = False
        """Whether a transaction could be neither completed nor taken back."""

    @contextmanager
    def several(self) -> Iterator[None]:
        """Make the changes of the block one transaction."""
        with self.lock:
            if self._transaction is not None:
                raise ArgumentError("a transaction is under way already: they do not nest")
            with self.one():
                yield

    @contextmanager
    def one(self) -> Iterator[Transaction]:
        """Give the transaction under way, or one that ends with the block."""
        with self.lock:
            if self._transaction is not None:
                yield self._transaction
                return
            self.require_writable()
            with self._transact() as transaction:
                yield transaction
            with suppress(BlocksnapError):  # the next transaction tries again
                self.delete_condemned()

    @contextmanager
    def _transact(self) -> Iterator[Transaction]:
        transaction = Transaction(
            self._engine, self._catalog, self._table, self._transaction_id, self._close_handle
        )
        transaction.begin()
        self._transaction, self._thread = transaction, threading.get_ident()
        try:
            yield transaction
        except BaseException:
            with suppress(BlocksnapError):
                transaction.abort()
            raise
        else:
            transaction.complete()
        finally:
            self._transaction = None
            self._transaction_id = transaction.transaction_id
            self.failed = self.failed or not transaction.ended
            for device_id in transaction.touched:
                if self._table.find(device_id) is None:
                    self._forget(device_id)

    def delete_condemned(self) -> None:
        """Delete the condemned devices that nobody uses; have the kernel let the others go once it is so."""
        with self.lock:
            unused = []
            for record in self._table.condemned():
                if self._engine.users_of(record.id):
                    self._engine.remove_when_unused(record.id)
                else:
                    unused.append(record)
            if unused:
                with self._transact() as transaction:
                    for record in unused:
                        transaction.delete(record)

    def refuse_inside(self, what: str) -> None:
        """Raise BusyError within a transaction of the same thread."""
        if self._transaction is not None and self._thread == threading.get_ident():
            raise BusyError(f"cannot {what} inside a transaction of the same thread: do it before or after")

    def require_writable(self) -> None:
        if self.failed:
            raise NeedsCheckError(
                f"{self._name} could not complete a transaction: close and open it, which repairs it"
            )
        if self._needs_check:
            raise NeedsCheckError(
                f'{self._name} is read-only until it was checked: "blocksnap pool check --clear-needs-check"'
            )
        if self.read_only:
            raise PrivilegeError(f"{self._name} is open read-only: open it for writing")
