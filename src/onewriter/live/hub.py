"""LiveQueries: what has changed since each query was read, and who is to be woken for that."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable
from time import monotonic
from typing import Any

from onewriter.base.log import call_safely
from onewriter.base.state import State
from onewriter.base.waiting import Signal, wake
from onewriter.live.places import Places, Written
from onewriter.live.query import Answer, Caller, Found, Query, Reading, same
from onewriter.read.pool import ReaderPool
from onewriter.read.read import Read
from onewriter.read.reader import Reader
from onewriter.sqlite.guard import ANYTHING, Guard, Place
from onewriter.write.session import WriteSession
from onewriter.write.ticket import Job
from onewriter.write.writer import LOOK


class LiveQueries:
    """What is watched. It costs something while at least one watch is open, and only then ``state.live``.

    Commits are counted; each place has the number of the last one that may have written it, and each query that of the
    last one that was there before it was read. ``PRAGMA data_version`` on the write connection tells of the commits of
    all others, and only of those. While the writer holds SQLite's lock there are none, and when it is idle it looks.

    Locks:   ``lock`` guards all of it, the queries, and what is left of each watch. Re-entrant, since a finalizer may
             end a watch. Neither SQLite nor a callback runs while it is held.
    Threads: ``settled``, ``look`` and ``end`` are the writer's; the rest is for any.
    """

    def __init__(
        self, state: State, pool: ReaderPool, check_open: Callable[[], object], ask: Callable[[], object], polls: bool
    ) -> None:
        self.state = state
        self.pool = pool
        self.check_open = check_open
        self.ask = ask  # has the writer settle nothing
        self.polls = polls  # nobody is the writer unless somebody asks
        self.is_over = False  # and the last answer of each query is there
        self.lock = threading.RLock()
        self._queries: dict[object, Query] = {}
        self._commits = 0
        self._changed: dict[Place, int] = {}
        self._all_changed = 0  # the last commit that may have written anything, or the schema
        self._asleep: dict[Place, set[Query]] = {}  # who waits there has seen all that there is
        self._written = Written()
        self._guard: Guard | None = None
        self._session: WriteSession | None = None
        self._versions: list[Any] = []
        self._look_at = 0.0

    # Watches ----------------------------------------------------------------------------------------------------------

    def open(self, read: Read[Any], key: object) -> Query:
        """The query for one more watch; whoever has the same ``key`` shares it."""
        self.check_open()
        state = self.state
        with self.lock:
            if self.lock not in state.locks:  # each write asks for all of them
                state.locks = (*state.locks, self.lock)
            query = self._queries.get(key) or Query(read, key)
            self._queries[key] = query
            query.watches += 1
            is_first, state.live = state.live is None, self
        if is_first:
            try:
                self.ask()
            except BaseException:
                self.close(query)
                raise
        return query

    def close(self, query: Query, reader: Caller | None = None) -> None:
        """The watch that had it is over. If Ctrl-C has kept ``reader``, which ends it, from reading, others may."""
        with self.lock:
            query.watches -= 1
            if reader is not None and query.read_by == reader:
                query.read_by = None
            if not query.watches:
                self._queries.pop(query.key, None)
                self._is_awake(query)
            if not self._queries:
                self.state.live = None
                if self._guard is not None:
                    self._guard.places = None
            wake(_waiters_of([query]))

    # Reads, under the lock --------------------------------------------------------------------------------------------

    def is_stale(self, query: Query) -> bool:
        if query.places is None:
            return self._commits > query.as_of
        return max((self._changed.get(place, 0) for place in query.places), default=0) > query.as_of or (
            self._all_changed > query.as_of
        )

    def begin(self, query: Query, reader: Caller) -> Reading:
        query.read_by = reader
        query.begun += 1
        return Reading(query, query.begun, self._commits, query.as_of < self._all_changed)

    def sleep(self, query: Query) -> None:
        """Who waits for it is to be woken by the next commit that touches it."""
        for place in _places(query):
            self._asleep.setdefault(place, set()).add(query)

    def _is_awake(self, query: Query) -> None:
        for place in _places(query):
            self._asleep.get(place, set()).discard(query)

    # ------------------------------------------------------------------------------------------------------------------

    def finish(self, reading: Reading, found: Found | None, error: BaseException | None = None) -> None:
        """The end of a read, with what it has found; None: it failed, and who waits for it tries."""
        query = reading.query
        before = query.answer
        if found is not None and before is not None and same(before.raw, found.raw):
            found = found._replace(raw=before.raw, rows=before.rows)  # so that the others see it at a glance
        with self.lock:
            if reading.number >= query.begun:  # or else another one reads it now
                query.read_by = None
            # One that has ended meanwhile may have begun its snapshot later.
            is_late = reading.answers != query.answers and reading.number != math.inf
            if not is_late and (query.answer is None or reading.number > query.answer.number):
                self._keep(query, reading, found, error)
            signals = _waiters_of([query])
        wake(signals)

    def _keep(self, query: Query, reading: Reading, found: Found | None, error: BaseException | None) -> None:
        if found is not None:
            query.known, query.as_of = found.known, reading.as_of
            query.answer, query.answers = Answer(reading.number, found.raw, found.rows), query.answers + 1
        elif error is not None:
            query.answer = Answer(reading.number, None, None, error)

    def read(self, reading: Reading, reader: Reader) -> Found:
        """Read with one of the pool's, and tell in the thread that does: the task that waits may never go on."""
        try:
            found = reading.alone(reader)
        except BaseException:
            self.finish(reading, None)
            raise
        self.finish(reading, found)
        return found

    def read_beside(self, reading: Reading) -> Found:
        """Read with a connection beside those of the pool, so that nobody has to give one back."""
        return self.pool.use_beside(reading.label, reading.alone)

    def forget(self, query: Query, signal: Signal) -> None:
        """Nobody waits for it any more."""
        with self.lock:
            query.waiters.discard(signal)

    # The writer -------------------------------------------------------------------------------------------------------

    def settled(self, session: WriteSession | None, jobs: Collection[Job[Any]]) -> None:
        """A batch is over, and what it has committed can be read; or the gateway is out of service."""
        if session is None or self.state.broken is not None:
            self._touch(None)
            return
        self._guard = session.guard
        places = self._written.take(session, jobs)
        if not all(job.in_transaction for job in jobs):  # nobody is asked what a function does there
            places = None
        if places != frozenset():
            self._touch(places)
        if monotonic() >= self._look_at:
            self.look(session)

    def look(self, session: WriteSession | None) -> None:
        """Whether others have committed."""
        self._look_at = monotonic() + LOOK
        if session is None:  # whom nobody can ask, until the next write opens one
            self._touch(None)
            return
        try:
            versions = [session.internal(f'PRAGMA "{name}".data_version') for name in session.databases]
        except sqlite3.Error:
            return  # a lock is in the way: next time
        if session is not self._session or versions != self._versions:
            self._session, self._versions = session, versions
            self._written.forget()
            self._touch(None)

    def _touch(self, places: Places) -> None:
        """These were written: wake who has to look again, with one call for each of their loops."""
        with self.lock:
            self._commits += 1
            signals = _waiters_of(self._woken(places))
        wake(signals)

    def _woken(self, places: Places) -> set[Query]:
        if places is None:
            self._all_changed = self._commits
            woken = set[Query]().union(*self._asleep.values())
            self._asleep.clear()
        else:
            self._changed.update(dict.fromkeys(places, self._commits))
            woken = set[Query]().union(*(self._asleep.get(place, ()) for place in (ANYTHING, *places)))
            for query in woken:
                self._is_awake(query)
        return woken

    def end(self, session: WriteSession | None) -> None:
        """The last commit was made, and the readers are about to be closed: keep the last state of each query."""
        try:
            if self.state.broken is None:
                self.look(session)
                for reading in self._last_readings():
                    call_safely(self.state, self._read_last, reading)
        finally:
            with self.lock:
                self.is_over = True
                signals = _waiters_of(self._queries.values())
            wake(signals)

    def _last_readings(self) -> list[Reading]:
        """What is still to be read; other answers are the last by now, also for a watch that has had none."""
        with self.lock:
            return self._make_last_readings()

    def _make_last_readings(self) -> list[Reading]:
        last = []
        for query in self._queries.values():
            if query.answer is None or self.is_stale(query):
                last.append(Reading(query, math.inf, self._commits, True))
            else:
                query.answer = query.answer._replace(number=math.inf)
        return last

    def _read_last(self, reading: Reading) -> None:
        found = failure = None
        try:
            found = self.read_beside(reading)
        except Exception as error:
            failure = error
        self.finish(reading, found, failure)


def _places(query: Query) -> Iterable[Place]:
    return (ANYTHING,) if query.places is None else query.places


def _waiters_of(queries: Iterable[Query]) -> list[Signal]:
    """Those who wait for them, and do so no longer."""
    signals: list[Signal] = []
    for query in queries:
        waiters, query.waiters = query.waiters, set()
        signals += waiters
    return signals
