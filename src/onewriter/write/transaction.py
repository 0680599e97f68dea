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
from onewriter.write.part import Savepoint


class Transaction:
    """What a job's function and a ``with`` block get: runs statements in one transaction.

    After the function or block every use raises ``TransactionClosedError``. That of a block may be used by any thread,
    one call at a time; that of a function only inside that function, in its own thread.
    """

    __slots__ = ("__weakref__", "_loan")  # what is set on one by mistake is not lost without a word
    row_factory, text_factory, isolation_level, autocommit = map(Elsewhere, CONNECTIONS_OWN)

    def __init__(self, loan: WriteLoan) -> None:
        self._loan = loan

    @property
    def label(self) -> str:
        """The label of the job or block."""
        return self._loan.label

    @property
    def connection(self) -> sqlite3.Connection:
        """A ``sqlite3.Connection`` on this transaction, for libraries that need one.

        Its own transaction is a part of this one: ``commit`` keeps what was done so far, ``rollback`` undoes what was
        done since, ``close`` has no effect; all else is as in ``sqlite3``. After the end every use raises
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
        """Run one statement for each row of parameters; ``rowcount`` is that of all. RETURNING is refused.

        If one fails and the error is caught, the rows before it stay, as in ``sqlite3``; in a ``savepoint()`` none do.
        """
        sql = check_sql(sql)
        check_many(sql)
        return self._loan.statement_many(sql, capture_many(sql, seq_of_params))

    def executescript(self, sql: str, /) -> None:
        """Run many statements, all or none of them, and without a hidden COMMIT."""
        self._loan.whole_script(check_sql(sql))

    def savepoint(self) -> contextlib.AbstractContextManager[None]:
        """A ``with`` block that is a part of the transaction; if it raises, only this part is undone."""
        return Savepoint(self._loan)

    def rollback(self) -> None:
        """Undo what this job or block, or the ``savepoint()`` it is in, has done so far; the transaction goes on."""
        self._loan.undo()

    def on_commit(self, fn: Callable[[], object], /) -> None:
        """Call ``fn()`` once, after COMMIT, when SQLite's lock is released; not if the transaction is rolled back."""
        self._loan.keep(True, fn)

    def on_rollback(self, fn: Callable[[], object], /) -> None:
        """Call ``fn()`` once, after the transaction, if this part of it was rolled back."""
        self._loan.keep(False, fn)
