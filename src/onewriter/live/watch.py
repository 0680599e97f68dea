"""Watch: the rows of a query now, and again whenever a commit has changed them."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Iterator
from time import monotonic
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from onewriter.base.arguments import check_seconds, check_timeout
from onewriter.base.log import warn_of_blocking
from onewriter.base.strict import Strict
from onewriter.base.waiting import Signal, thread_signal, wait_in_slices
from onewriter.errors import ReadTimeoutError, WriterClosedError, closed_error
from onewriter.live.hub import LiveQueries
from onewriter.live.query import Answer, Caller, Query, Reading, same
from onewriter.read.claim import new_claim
from onewriter.read.read import Read
from onewriter.write.outcomes import copy_of
from onewriter.write.writer import LOOK

T = TypeVar("T")
WAIT = "waiting for a live query"
NOT_ENTERED = "a watch needs `with`: `with db.watch(…) as live:`, or `async with` where it is a task's"


class Step(NamedTuple):
    """What a loop has to do next, one of four things; none: it is over.

    Attributes:
        answer: look whether these rows are new.
        reading: read.
        signal: wait for it, or until ``until``.
    """

    answer: Answer | None = None
    reading: Reading | None = None
    signal: Signal = None
    until: float = math.inf


class Watching(Generic[T]):
    """What threads and tasks share: when to read, what is new, and when it is over.

    States: made → open, with a query → left. Never backwards.
    Locks:  that of ``LiveQueries`` guards _query, _last and _looked_at.
    """

    def __init__(self, live: LiveQueries, read: Read[T], key: object, every: float, gateway: object) -> None:
        check_seconds("every", every)
        if every == math.inf:
            raise ValueError("every must be a finite number of seconds")
        self._live = live
        self._read = read
        self._key = key
        self._every = every
        self._gateway: object = gateway  # a DbWriter that nobody else has would close when it is collected
        self._query: Query | None = None
        self._is_left = False
        self._number: float = 0  # of the last read that it knows of
        self._last: Answer | None = None
        self._looked_at = -math.inf

    def _open(self) -> None:
        if self._query is not None or self._is_left:
            raise RuntimeError("a watch is entered once: call watch() again")
        query = self._live.open(self._read, self._key)
        with self._live.lock:
            self._query, self._number = query, query.begun

    def _leave(self) -> None:
        """End it, for everybody who waits; from any thread, and again."""
        live = self._live
        if live.state.forked:
            return
        with live.lock:
            query, was_left, self._is_left = self._query, self._is_left, True
        if query is not None and not was_left:
            live.close(query, Caller())

    def __del__(self) -> None:
        if getattr(self, "_query", None) is not None:
            self._leave()

    def _next_step(self, new_signal: Any) -> Step:
        live, query = self._live, self._entered()
        live.state.refuse_if_broken()
        me = Caller()
        with live.lock:
            must_read = self._last is None or live.is_stale(query)
            answer = query.answer  # behind that look: a signal handler's watch may have read it meanwhile
            is_new = answer is not None and answer.number > self._number
            if self._is_left or (live.is_over and not is_new):
                return Step()
            due = self._looked_at + self._every
            if live.is_over or ((is_new or must_read) and due <= monotonic()):
                if is_new:
                    return Step(answer=answer)
                if self._may_read(query.read_by, me):
                    return Step(reading=live.begin(query, me))
                due = monotonic() + LOOK  # the end of that read wakes it; unless its task is lost
            elif not (is_new or must_read):
                live.sleep(query)
                due = math.inf
            signal = new_signal()
            query.waiters.add(signal)
            return Step(signal=signal, until=due)

    def _may_read(self, other: Caller | None, me: Caller) -> bool:
        """Whether nobody reads, or who does cannot be waited for: in a reader() it may wait for that connection."""
        # After Ctrl-C it may be this one, which does not read now.
        return other is None or other == me or other.is_lost or self._live.state.scopes.innermost() is not None

    def _is_news(self, answer: Answer) -> bool:
        """Whether the loop has not got these rows last; they are the last from now on."""
        last = self._last
        is_new = last is None or answer.error is not None or not same(last.raw, answer.raw)
        with self._live.lock:
            if self._last is not last or answer.number <= self._number:  # another thread has taken it, or a later one
                return False
            self._number, self._looked_at = answer.number, monotonic()
            self._last = answer if answer.error is None else None  # behind an error even the same rows are news
        if answer.error is not None:
            raise copy_of(answer.error)
        return is_new

    def _rows(self, answer: Answer) -> T:
        rows: T = self._entered().rows_of(answer)
        return rows

    def _entered(self) -> Query:
        if self._query is None:
            raise RuntimeError(NOT_ENTERED)
        return self._query

    def _refuse_in_reader(self, *, awaits: bool = False) -> None:
        """Where a COMMIT waits for readers, and so for the reader() that the caller is in, a second connection waits
        for that COMMIT. There is none while the caller is inside a job or block that has the writer."""
        state = self._live.state
        if state.readers_block_commits and not state.is_in_writer():
            state.refuse_endless_wait(WAIT, awaits=awaits)

    def _forget(self, step: Step) -> None:
        self._live.forget(self._entered(), step.signal)

    def _failed(self, reading: Reading, error: BaseException) -> None:
        """Raises ``error``, unless the pool was closed meanwhile: then the last rows are there."""
        with self._live.lock:
            self._looked_at = monotonic()
            if isinstance(error, sqlite3.Error):
                self._last = None
        self._live.finish(reading, None)
        if not (isinstance(error, WriterClosedError) and self._live.is_over):
            raise error

    def _late(self, timeout: float | None) -> ReadTimeoutError:
        return ReadTimeoutError(f"no commit has changed {self._read.label} within {timeout} s")

    def _ended(self) -> Exception:
        return RuntimeError(f"the watch of {self._read.label} has ended") if self._is_left else closed_error()


class Watch(Strict, Watching[T]):
    """What ``db.watch`` gives: a context manager, and in it an iterator over the states of a query's rows.

    ``with db.watch(sql) as live: for rows in live: …`` gives the rows as they are, and again after each commit that has
    changed them, of this gateway or of any other process: the newest rows, never the same twice in a row. It holds
    nothing between two reads. The loop ends when the gateway is closed, after the last state, and when the ``with``
    block is left, by any thread. Any thread may iterate; of several, each change is given to one.
    """

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def close(self) -> None:
        """End it before the block does."""
        self._leave()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        answer = self._wait(None)
        if answer is None:
            raise StopIteration
        return self._rows(answer)

    def next(self, timeout: float | None = None) -> T:
        """Wait for the next rows, and return them; the first call returns them as they are.

        Args:
            timeout: seconds to wait for a commit that changes them, and for a connection to read them; a read that is
                under way is not ended by it. None: for ever.

        Raises:
            ReadTimeoutError: there was none in time.
            WriterClosedError: the gateway is closed, and this has given its last state.
            RuntimeError: the block was left.
            ReentrantWriteError: called inside a job or block, which keeps the writer from committing anything.
            sqlite3.Error: what the query raised; a statement that writes is refused.
        """
        check_timeout(timeout)
        answer = self._wait(timeout)
        if answer is None:
            raise self._ended()
        return self._rows(answer)

    def _wait(self, timeout: float | None) -> Answer | None:
        warn_of_blocking()
        until = math.inf if timeout is None else monotonic() + timeout
        while True:
            step = self._next_step(thread_signal)
            if step.answer is not None:
                if self._is_news(step.answer):
                    return step.answer
            elif step.reading is not None:
                self._use_pool(step.reading, until)
            elif step.signal is None:
                return None
            elif not self._sleep(step, until):
                raise self._late(timeout)

    def _use_pool(self, reading: Reading, until: float) -> None:
        live = self._live
        try:
            if live.state.scopes.innermost() is None:
                found = live.pool.use(new_claim(reading.label, until), reading.alone)
            else:  # this thread may have the last connection, in a reader() block
                self._refuse_in_reader()
                found = live.read_beside(reading)
        except BaseException as error:
            self._failed(reading, error)
        else:
            live.finish(reading, found)

    def _sleep(self, step: Step, until: float) -> bool:
        """Wait for the signal of ``step``; False: not before ``until``."""
        live = self._live
        try:
            live.state.refuse_endless_wait(WAIT)
            if live.polls:
                with contextlib.suppress(WriterClosedError):  # in this moment: the last state is on its way
                    live.ask()
            end = min(until, step.until, monotonic() + LOOK if live.polls else math.inf)
            return wait_in_slices(step.signal, end, live.state, lambda: self._is_left) or monotonic() < until
        finally:
            self._forget(step)
