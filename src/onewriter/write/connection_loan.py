"""ConnectionLoan: what ``tx.connection`` may do on the write connection."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from typing import Any, Protocol

from onewriter.errors import TransactionClosedError
from onewriter.sqlite.connection import open_image
from onewriter.sqlite.guard import Mode
from onewriter.sqlite.lending import Lending, LoanEndedError
from onewriter.sqlite.lent import lend, retire
from onewriter.sqlite.lent_transaction import NoSavepoints, Savepoints
from onewriter.write.session import WriteSession


class Lender(Protocol):
    """The loan of a transaction, which lends a connection on it."""

    can_write: bool

    @property
    def session(self) -> WriteSession: ...
    @property
    def is_closed(self) -> bool: ...
    @property
    def is_inside(self) -> bool: ...
    def call(self, function: Callable[..., Any], *args: Any, mode: Mode = ...) -> Any: ...
    def call_inside(self, function: Callable[..., Any], *args: Any, mode: Mode) -> Any: ...
    def if_free(self, function: Callable[[], None]) -> None: ...
    def all_parts(self) -> Savepoints: ...
    def closed_error(self) -> Exception: ...


class ConnectionLoan:
    """The transaction as its ``connection`` uses it, with savepoints of its own.

    Locks: created and given back under the session's lock.
    """

    def __init__(self, loan: Lender) -> None:
        session = loan.session
        self._loan = loan
        self._session = session
        self.connection = session.connection
        self.guard = session.guard
        self.guard.note_anything()  # SQLite does not ask about what is written through blobopen
        self.if_free = loan.if_free
        # A read in a transaction has nothing to undo.
        self.savepoints: Savepoints = loan.all_parts() if loan.can_write else NoSavepoints()
        self._factories = self.connection.row_factory, self.connection.text_factory
        self._is_traced = False
        self.lent: Lending | None = lend(self)

    @property
    def lent_connection(self) -> sqlite3.Connection | None:
        """None: it ends in this moment."""
        lent = self.lent
        return None if lent is None else lent.connection

    @property
    def is_over(self) -> bool:
        return self._loan.is_closed

    def ended(self) -> Exception:
        error = self._loan.closed_error()
        return LoanEndedError(*error.args) if isinstance(error, TransactionClosedError) else error

    def call(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        loan = self._loan
        # A SQL function or an adapter may use the connection whose statement has called it.
        call = loan.call_inside if loan.is_inside else loan.call
        try:
            return call(self._run, function, args, options, mode=Mode.LENT)
        except TransactionClosedError as error:
            raise LoanEndedError(*error.args) from error.__cause__

    def call_outside(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        try:
            return self._loan.call(self._run, function, args, options, mode=Mode.LENT)
        except TransactionClosedError as error:
            raise LoanEndedError(*error.args) from error.__cause__

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self._session.executor.forget_rowid()
        return function(*args, **options)

    def interrupt(self) -> None:
        if self.is_over:
            raise self.ended()
        with self._session.interrupting:
            if self.is_over:
                raise self.ended()
            self.connection.interrupt()

    def backup(self, target: sqlite3.Connection, *, name: str = "main", **options: Any) -> None:
        """Through memory: SQLite copies nothing from a connection that is in a transaction which writes."""
        image = self.call(sqlite3.Connection.serialize, self.connection, name=name)
        with contextlib.closing(open_image(image)) as copy:
            copy.backup(target, **options)

    def mark_dirty(self, name: str) -> None:
        """Functions are the user's, and stay; who follows SQL would see that of other jobs."""
        self._is_traced |= name == "set_trace_callback"

    def put_back(self) -> None:
        """End the connection that was lent."""
        with self._session.interrupting:  # so that none comes later, and hits the next job
            retire(self)
        self.connection.row_factory, self.connection.text_factory = self._factories
        if self._is_traced:
            self.connection.set_trace_callback(None)
