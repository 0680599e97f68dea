"""FunctionLoan: what a job's function may do on the write connection."""

from __future__ import annotations

import sqlite3
from threading import get_ident
from typing import Any

from onewriter.sqlite.guard import Mode
from onewriter.sqlite.parameters import PLAIN_TYPES, Params, capture
from onewriter.sqlite.result import Result
from onewriter.write.loan import ENDED, WriteLoan
from onewriter.write.session import WriteSession
from onewriter.write.ticket import Job


class FunctionLoan(WriteLoan):
    """That of a function, which runs on the writer's thread: a comparison does in place of the session's lock.

    Unless a connection was lent: the collector may end its cursors in any thread.
    """

    mode = Mode.JOB  # nothing else acts on the connection while the function runs

    def __init__(self, session: WriteSession, job: Job[Any]) -> None:
        self.job = job
        self.session = session
        self.thread = self._free_for = get_ident()  # 0: it takes more than a comparison

    def execute(self, sql: str, params: Params) -> Result:
        # Hot path: what is decided once for a job, or once for a text, is not looked at here. Whether there still is a
        # transaction, is: SQLite may have ended it in a call that came another way; this one would commit by itself.
        if (
            self._free_for != get_ident()
            or self._inside
            or not self.session.connection.in_transaction
            or (self.parts is not None and self.parts.has_failed)
        ):
            return super().execute(sql, params)
        if type(params) is not tuple or not PLAIN_TYPES.issuperset(map(type, params)):
            params = capture(sql, params)
        self._inside = self.thread
        try:
            result = self.session.executor.insert(sql, params)
        except sqlite3.Error as error:
            self._explain(error)
            raise
        finally:
            self._inside = 0
        return Result([], 1, result, None) if type(result) is int else result  # type: ignore[return-value]

    def end(self) -> None:
        if self._free_for and not self._ends_readonly:
            self._closed, self._free_for = ENDED, 0
        else:
            super().end()

    def set_time_limit(self) -> None:
        self._free_for = 0
        super().set_time_limit()

    def close(self, why: str) -> None:
        self._free_for = 0
        super().close(why)

    def _lend_to(self, part: WriteLoan) -> None:
        self._free_for = 0
        super()._lend_to(part)
