"""AsyncReader: a task's ``reader()`` block."""

from __future__ import annotations

import asyncio
import functools
import math
import sqlite3
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from onewriter.base.arguments import check_sql
from onewriter.base.waiting import seconds_until
from onewriter.errors import ReadTimeoutError
from onewriter.read.pool import Borrowing, ReaderPool
from onewriter.read.reader import Snapshot, ended_error
from onewriter.sqlite.parameters import capture
from onewriter.sqlite.result import Result, refuse_live
from onewriter.sqlite.statement import Parameters

T = TypeVar("T")


class AsyncReader:
    """What ``async with db.reader()`` gives: SELECTs on one state of the database."""

    def __init__(self, owner: Any, snapshot: Snapshot, borrowing: Borrowing) -> None:
        self._owner = owner
        self._snapshot = snapshot
        self._borrowing = borrowing
        self._turn = asyncio.Lock()

    def execute(self, sql: str, params: Any = (), /) -> Coroutine[Any, Any, Result]:
        """Run one SELECT and return all its rows."""
        return self._call(math.inf, fetch_result, check_sql(sql), capture(sql, params))

    async def _call(self, deadline: float, function: Callable[..., T], *args: Any) -> T:
        try:
            async with asyncio.timeout(seconds_until(deadline)):
                await self._turn.acquire()
        except TimeoutError:
            text = f"{self._borrowing.label} is used by another task: the read did not begin in time"
            raise ReadTimeoutError(text) from None
        try:
            if self._snapshot.is_left:  # the connection may be somebody else's
                raise ended_error()
            # Not in the thread, where it could come after a cancellation has hurried the statement.
            self._snapshot.reader.limit(deadline)
            call = functools.partial(function, self._snapshot, *args)
            try:
                outcome: T = await self._owner._in_pool(call, self._borrowing)
                return outcome
            finally:
                self._snapshot.reader.limit(math.inf)
        finally:
            self._turn.release()

    def lends(self) -> Snapshot:
        """Where the blocking reads of its task go."""
        return self._snapshot

    def _expire(self) -> None:
        core = self._owner._opened  # which may be closed by now
        self._snapshot.is_left = True
        core.pool.expire(self._borrowing)

    async def _end(self) -> None:
        """Wait for what another task still runs here; a cancellation hurries that, and is raised after its end."""
        cancelled = None
        while True:
            try:
                async with self._turn:
                    self._snapshot.end()
                    break
            except asyncio.CancelledError as error:
                cancelled = error
                self._expire()
        if cancelled is not None:
            raise cancelled


def read_snapshot(snapshot: Snapshot, readers: ReaderPool, function: Callable[[sqlite3.Connection], T], name: str) -> T:
    with readers.inside(snapshot):
        return refuse_live(snapshot.reader.attempt(name, function, snapshot.to_lend))


def fetch_result(snapshot: Snapshot, sql: str, parameters: Parameters) -> Result:
    cursor = snapshot.to_lend.execute(sql, parameters)
    try:
        return Result(cursor.fetchall(), cursor.rowcount, None, cursor.description)
    finally:
        cursor.close()
