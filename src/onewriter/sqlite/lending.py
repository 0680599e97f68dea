"""Lending: what was created through one loan of a connection, and ends with it.

What a library gets are shells: SQLite's own connection, cursors and blobs stay inside, and every call on a shell asks
the loan, which has a lock. The methods of ``sqlite3``'s own classes, called on a shell
(``sqlite3.Cursor.execute(cursor, …)``), find a base without a database, and raise ``sqlite3.ProgrammingError``.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, Self

from onewriter.errors import TransactionClosedError
from onewriter.sqlite.connection import seal
from onewriter.sqlite.lent_transaction import Asked, LentTransaction, NoSavepoints, Savepoints


class LoanEndedError(TransactionClosedError, sqlite3.ProgrammingError):
    """A lent connection was used after its end; to libraries it looks like a closed one."""


class Loan(Protocol):
    """The lender's side: runs one call at a time, and none after the loan has ended."""

    connection: sqlite3.Connection
    savepoints: Savepoints

    @property
    def guard(self) -> Asked: ...
    @property
    def is_over(self) -> bool:
        """It has ended, or belongs to the parent process: nothing of it may be used."""

    def call(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any: ...
    def call_outside(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """The same, but refused in a function that SQLite calls."""

    def if_free(self, function: Callable[[], None]) -> None:
        """Call it under the lock, if that is free; do not wait."""

    def ended(self) -> Exception:
        """What a use after the end raises."""

    def interrupt(self) -> None: ...
    def backup(self, target: sqlite3.Connection, **options: Any) -> None: ...
    def mark_dirty(self, name: str) -> None: ...


class Lender(Protocol):
    """Lends the connection, and clears what was lent at the end."""

    lent: Lending | None


class Lending:
    """The connection that was lent, and the cursors and blobs created through it, which end with the loan.

    Not kept in the shell: a second call of sqlite3.Connection.__init__ would clear that.

    Locks: everything but ``drop`` is called under the loan's. ``live`` keeps cursors and blobs alive until they are
           closed under it: the garbage collector may finalize a shell in any thread, while another is inside SQLite.
    """

    changes = 0  # that the connection counted before it was lent

    def __init__(self, loan: Loan, connection: LentShell | None, transaction: LentTransaction) -> None:
        self.loan = loan
        self.connection = connection
        self.transaction = transaction
        self.live: dict[sqlite3.Cursor | sqlite3.Blob, None] = {}
        self._dropped: list[sqlite3.Cursor | sqlite3.Blob] = []  # their shells were collected

    def drop(self, thing: sqlite3.Cursor | sqlite3.Blob) -> None:
        """Its shell was collected: close it as soon as the lock is free, at the latest when the loan ends."""
        if thing in self.live:
            self._dropped.append(thing)
            self.loan.if_free(self.sweep)

    def sweep(self) -> None:
        while self._dropped:
            thing = self._dropped.pop()
            thing.close()  # explicitly: a call that waits for the lock may hold a reference
            self.live.pop(thing, None)

    def close_live(self) -> None:
        """A pending statement would make COMMIT fail, and keep the snapshot open."""
        live, self.live = self.live, {}
        for thing in live:
            with contextlib.suppress(sqlite3.ProgrammingError):  # its connection is closed
                thing.close()
        self._dropped.clear()


class _NoLoan:
    """The loan of a shell that a second sqlite3.Connection.__init__ has cleared."""

    is_over = True

    def __getattr__(self, name: str) -> NoReturn:
        raise sqlite3.ProgrammingError("this connection is no longer lent: its job or block has ended")


class LentShell(sqlite3.Connection):
    """What cursors and blobs know of the connection that made them; ``LentConnection`` has the methods."""

    _loan: Loan = _NoLoan()  # type: ignore[assignment]
    _lending: Lending = Lending(_loan, None, LentTransaction(None, NoSavepoints(), None))
    row_factory: Any = None

    def __new__(cls, *_: Any, **__: Any) -> Self:
        self = super().__new__(cls)
        seal(self)  # sqlite3.Cursor(connection) crashes with a base that was never initialized
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        raise sqlite3.NotSupportedError("this connection is lent: it cannot be opened again")
