"""Transaction: what a job's function and a ``with`` block get."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable

from onewriter.base.arguments import check_sql
from onewriter.base.strict import CONNECTIONS_OWN, Elsewhere
from onewriter.sqlite.parameters import Params, capture_many
from onewriter.sqlite.result import Result
from onewriter.sqlite.statement import check_many
from onewriter.write.loan import WriteLoan


class Transaction:
    """What a job's function and a ``with`` block get: statements of one transaction, committed or undone as a whole.

    After the function or block every use raises ``TransactionClosedError``. That of a block may be used by any thread
    that has it, one call at a time; that of a function in this function only, and not by other threads.
    """

    __slots__ = ("__weakref__", "_loan")  # what is set on one by mistake is not lost without a word
    row_factory, text_factory, isolation_level, autocommit = map(Elsewhere, CONNECTIONS_OWN)

    def __init__(self, loan: WriteLoan) -> None:
        self._loan = loan

    @property
    def label(self) -> str:
        """The job's label."""
        return self._loan.job.label

    @property
    def connection(self) -> sqlite3.Connection:
        """A ``sqlite3.Connection`` on this transaction, for libraries that want one.

        Its own transaction is a part of this one: ``commit`` keeps, ``rollback`` goes back to that, texts and
        attributes mean what they mean in ``sqlite3``; ``close`` ends nothing. After the end every use raises
        ``sqlite3.ProgrammingError``.
        """
        return self._loan.connection

    def execute(self, sql: str, params: Params = (), /) -> Result:
        """Run one statement and return all its rows.

        Raises:
            sqlite3.Error: what SQLite raised; unless it is caught, the transaction is rolled back.
            TransactionAbortedError: SQLite rolled back by itself earlier on. Rolled back.
            TransactionClosedError: the transaction has ended, or is that of a function, and this is another thread.
        """
        return self._loan.execute(sql, params)

    def executemany(self, sql: str, seq_of_params: Iterable[Params], /) -> Result:
        """Run one statement for each row of parameters; ``rowcount`` is that of all. RETURNING is refused."""
        check_many(check_sql(sql))
        return self._loan.statement_many(sql, capture_many(sql, seq_of_params))

    def executescript(self, sql: str, /) -> None:
        """Run many statements, all or none of them, and without a hidden COMMIT."""
        self._loan.whole_script(check_sql(sql))

    def savepoint(self) -> contextlib.AbstractContextManager[None]:
        """A part of the transaction that is undone alone if the ``with`` block raises."""
        return self._loan.savepoint()

    def rollback(self) -> None:
        """Undo what this job or block, or the ``savepoint()`` it is in, has done so far; it goes on."""
        self._loan.undo()

    def on_commit(self, fn: Callable[[], object], /) -> None:
        """Call ``fn()`` once, after COMMIT, when the lock is free. Not if the transaction is rolled back."""
        self._loan.keep(True, fn)

    def on_rollback(self, fn: Callable[[], object], /) -> None:
        """Call ``fn()`` once, after the transaction, if this part of it was rolled back."""
        self._loan.keep(False, fn)
