"""FunctionLoan: what a job's function may do on the write connection."""

from __future__ import annotations

import sqlite3
from threading import get_ident
from typing import Any

from onewriter.sqlite.guard import Mode
from onewriter.sqlite.result import Result
from onewriter.sqlite.statement import Parameters
from onewriter.write.loan import ENDED, WriteLoan
from onewriter.write.session import WriteSession
from onewriter.write.ticket import Job

JOB, GATEWAY = Mode.JOB, Mode.GATEWAY


class FunctionLoan(WriteLoan):
    """That of a function, which runs on the writer's thread: a comparison does in place of the session's lock.

    Unless a connection was lent: the collector may end its cursors in any thread.
    """

    def __init__(self, session: WriteSession, job: Job[Any]) -> None:
        self.job = job
        self.session = session
        self._root = self
        self.thread = self._free_for = get_ident()  # 0: it takes more than a comparison

    def execute(self, sql: str, parameters: Parameters) -> Result:
        session, me = self.session, get_ident()
        if self._free_for != me or self._inside or not session.connection.in_transaction:
            return super().execute(sql, parameters)
        guard = session.guard
        self._inside = me
        guard.refusal, guard.mode = None, JOB
        try:
            result = session.executor.insert(sql, parameters)
            return Result([], 1, result, None) if type(result) is int else result  # type: ignore[return-value]
        except sqlite3.Error as error:
            self._explain(error)
            raise
        finally:
            guard.mode, self._inside = GATEWAY, 0

    def end(self) -> None:
        self._closed, self._free_for = self._closed or ENDED, 0
        if self._lending or self._ends_readonly or self._time_limit is not None:
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
