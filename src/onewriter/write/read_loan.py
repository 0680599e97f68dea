"""ReadLoan: reads in an open job or block, which see what it has written."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeVar

from onewriter.base.state import IN_STATEMENT
from onewriter.errors import ReadTimeoutError, ReentrantWriteError
from onewriter.sqlite.guard import Mode, explain_readonly
from onewriter.sqlite.result import refuse_live
from onewriter.sqlite.retry import is_interrupted
from onewriter.sqlite.statement import Parameters
from onewriter.write.loan import WriteLoan
from onewriter.write.ticket import Job

T = TypeVar("T")


class ReadLoan(WriteLoan):
    """A transaction as a read in it sees it: no call can write, and each ends at the time ``until``.

    SQLite is told so for each call: between two of them another thread may write.
    """

    can_write = False
    until = math.inf

    def __init__(self, outer: WriteLoan, until: float) -> None:
        super().__init__(outer.session, outer.job, outer)
        self.until = min(until, outer.until) if isinstance(outer, ReadLoan) else until

    def nested(self, job: Job[Any]) -> WriteLoan:
        inner = ReadLoan(self, self.until)
        inner._named = job
        return inner

    def call(self, function: Callable[..., T], *args: Any, mode: Mode = Mode.JOB) -> T:
        result: T = super().call(self._read, function, args, mode=mode)
        return result

    def call_inside(self, function: Callable[..., T], *args: Any, mode: Mode) -> T:
        if not self._root._ends_readonly:  # the statement around it is not one of this read
            raise ReentrantWriteError(IN_STATEMENT)
        return super().call_inside(function, *args, mode=mode)

    def _explain(self, error: sqlite3.Error) -> None:
        super()._explain(error)
        explain_readonly(error)
        if is_interrupted(error) and monotonic() > self.until:
            raise ReadTimeoutError(f"a read in job {self.job.describe()} did not finish in time") from error

    def _read(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        root, session = self._root, self.session
        if self.until != math.inf:
            root.set_time_limit()
        root._ends_readonly, root._read_until = True, self.until  # first: Ctrl-C comes behind the call that makes it so
        try:
            session.internal("PRAGMA query_only=1")
            return function(*args)
        finally:
            root._read_until = None
            try:
                session.internal("PRAGMA query_only=0")
                root._ends_readonly = False
            except sqlite3.Error as error:  # as where its time is over: then ``end`` does it
                session.guard.explain(error)


def query(loan: WriteLoan, sql: str, parameters: Parameters, fetch: Callable[[sqlite3.Cursor], T], until: float) -> T:
    """Run a statement that must not write, and see what the transaction has written."""
    with _reading(loan, until) as view:
        rows: T = view.call(_query, view, sql, parameters, fetch)
        return rows


def read_with(loan: WriteLoan, function: Callable[[sqlite3.Connection], T], until: float) -> T:
    """Call a function of the user's that must not write; what it calls is inside too."""
    with _reading(loan, until) as view, loan.job._state.scopes.inside(view, writes=True):
        return refuse_live(function(view.connection))


def _query(view: ReadLoan, sql: str, parameters: Parameters, fetch: Callable[[sqlite3.Cursor], T]) -> T:
    with contextlib.closing(sqlite3.Connection.execute(view.session.connection, sql, parameters)) as cursor:
        return fetch(cursor)


@contextlib.contextmanager
def _reading(loan: WriteLoan, until: float) -> Iterator[ReadLoan]:
    """For the ``with`` block a view of the transaction that cannot write, and whose statements end at ``until``."""
    view = ReadLoan(loan, until)
    try:
        yield view
    finally:
        view.end()
