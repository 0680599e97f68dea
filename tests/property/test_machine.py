"""A gateway under everything at once equals a set of numbers: timeouts, cancels, locks, limits, closing, reopening."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from helpers import DEADLINE
from onewriter import DbWriter, QueueFullError, Ticket, TransactionClosedError, WriteTimeoutError

INSERT = "INSERT INTO t VALUES (?)"
MAXSIZE = 4
NUMBERS = st.integers(0, 30)


class Machine(RuleBasedStateMachine):
    """``rows`` is what must be in the table once all that waits has its outcome.

    While the writer is parked nothing starts, so what happens to each job is known beforehand. Those that wait are
    in ``waiting``, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="onewriter-machine-")
        self.path = Path(self.folder.name) / "app.db"
        self.rows: set[int] = set()
        self.waiting: list[tuple[int, Ticket[Any]]] = []
        self.release: threading.Event | None = None
        self.parking: Ticket[Any] | None = None
        self.other: sqlite3.Connection | None = None

    @initialize(journal_mode=st.sampled_from(["WAL", "DELETE"]))
    def begin(self, journal_mode: Any) -> None:
        self.mode = journal_mode
        self.db = self.opened()
        self.db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")

    def opened(self) -> DbWriter:
        options: dict[str, Any] = {"maxsize": MAXSIZE, "lock_timeout": 0.01, "slow_after": 60}
        return DbWriter(self.path, journal_mode=self.mode, on_error=lambda ticket: None, **options)

    def expect(self, n: int, outcome: BaseException | None) -> None:
        """One insert of ``n`` ran when the rows were as they are."""
        if n in self.rows:
            assert isinstance(outcome, sqlite3.IntegrityError)
        else:
            assert outcome is None
            self.rows.add(n)

    def settle(self) -> None:
        """What waited has run, in order."""
        for n, ticket in self.waiting:
            if ticket.cancelled():
                continue
            self.expect(n, ticket.exception(DEADLINE))
        self.waiting.clear()

    def queued(self) -> int:
        """A cancelled job makes room at once."""
        return sum(not ticket.cancelled() for _, ticket in self.waiting)

    # The writer is free -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.release is None and self.other is None)
    @rule(n=NUMBERS, by_function=st.booleans())
    def run(self, n: int, by_function: bool) -> None:
        try:
            self.db.run(lambda tx: tx.execute(INSERT, (n,))) if by_function else self.db.run(INSERT, (n,))
        except sqlite3.IntegrityError as error:
            self.expect(n, error)
        else:
            self.expect(n, None)

    @precondition(lambda self: self.release is None and self.other is None)
    @rule(numbers=st.lists(NUMBERS, max_size=4), fails=st.booleans())
    def block(self, numbers: list[int], fails: bool) -> None:
        before = set(self.rows)
        try:
            with self.db.transaction() as tx:
                for n in numbers:
                    with contextlib.suppress(sqlite3.IntegrityError), tx.savepoint():
                        tx.execute(INSERT, (n,))
                assert {n for (n,) in self.db.read("SELECT n FROM t")} == before | set(numbers)
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        else:
            self.rows |= set(numbers)

    @precondition(lambda self: self.release is None and self.other is None)
    @rule(n=NUMBERS)
    def block_that_holds_too_long(self, n: int) -> None:
        with pytest.raises(TransactionClosedError), self.db.transaction(max_hold=0.001) as tx:
            with contextlib.suppress(sqlite3.IntegrityError):
                tx.execute(INSERT, (n,))
            while True:
                tx.execute("SELECT 1")

    @precondition(lambda self: self.release is None and self.other is None)
    @rule()
    def park(self) -> None:
        entered, release = threading.Event(), threading.Event()

        def park(tx: object) -> None:
            entered.set()
            release.wait(DEADLINE)

        self.release, self.parking = release, self.db.enqueue(park)
        assert entered.wait(DEADLINE)

    @precondition(lambda self: self.release is None and self.other is None)
    @rule()
    def somebody_takes_the_lock(self) -> None:
        self.other = sqlite3.connect(self.path, isolation_level=None)
        self.other.execute("BEGIN IMMEDIATE")

    # Somebody else has SQLite's lock ----------------------------------------------------------------------------------

    @precondition(lambda self: self.other is not None)
    @rule(n=NUMBERS, way=st.sampled_from(["run", "block", "enqueue"]))
    def write_without_the_lock(self, n: int, way: str) -> None:
        with pytest.raises(sqlite3.OperationalError) as caught:
            if way == "run":
                self.db.run(INSERT, (n,))
            elif way == "block":
                with self.db.transaction() as tx:
                    tx.execute(INSERT, (n,))
            else:
                self.db.enqueue(INSERT, (n,)).result(DEADLINE)
        assert caught.value.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY

    @precondition(lambda self: self.other is not None)
    @rule(n=NUMBERS)
    def somebody_writes_and_lets_go(self, n: int) -> None:
        assert self.other is not None
        self.other.execute("INSERT OR IGNORE INTO t VALUES (?)", (n,))
        self.other.execute("COMMIT")
        self.other.close()
        self.other = None
        self.rows.add(n)

    # The writer is parked ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.release is not None)
    @rule(n=NUMBERS, by_function=st.booleans())
    def enqueue(self, n: int, by_function: bool) -> None:
        try:
            what: Any = (lambda tx: tx.execute(INSERT, (n,))) if by_function else INSERT
            ticket = self.db.enqueue(what, timeout=0) if by_function else self.db.enqueue(what, (n,), timeout=0)
        except QueueFullError:
            assert self.queued() == MAXSIZE
        else:
            assert self.queued() < MAXSIZE
            self.waiting.append((n, ticket))

    @precondition(lambda self: self.release is not None)
    @rule(n=NUMBERS, as_block=st.booleans())
    def give_up(self, n: int, as_block: bool) -> None:
        with pytest.raises(WriteTimeoutError) as caught:
            if as_block:
                with self.db.transaction(timeout=0) as tx:
                    tx.execute(INSERT, (n,))
            else:
                self.db.run(INSERT, (n,), timeout=0)
        assert not caught.value.started
        assert caught.value.ticket.cancelled()

    @precondition(lambda self: self.release is not None and self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        _, ticket = data.draw(st.sampled_from(self.waiting))
        assert ticket.cancel()
        assert ticket.cancelled()

    @precondition(lambda self: self.release is not None)
    @rule()
    def read_beside(self) -> None:
        assert {n for (n,) in self.db.read("SELECT n FROM t")} == self.rows

    @precondition(lambda self: self.release is not None)
    @rule()
    def let_go(self) -> None:
        assert self.release is not None
        self.release.set()
        self.release = None
        self.db.flush(DEADLINE)
        self.settle()

    # Any time ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.other is None)
    @rule(drain=st.booleans())
    def close_and_reopen(self, drain: bool) -> None:
        if self.release is not None:
            closing = threading.Thread(target=self.db.close, kwargs={"drain": drain})
            closing.start()
            while not self.db.closed or (not drain and not all(ticket.done() for _, ticket in self.waiting)):
                pass
            self.release.set()
            self.release = None
            closing.join(DEADLINE)
            assert not closing.is_alive()
        report = self.db.close()
        assert report.unfinished == 0
        if not drain:
            assert all(ticket.cancelled() for _, ticket in self.waiting)
        self.settle()
        self.db = self.opened()
        assert {n for (n,) in self.db.read("SELECT n FROM t")} == self.rows

    def teardown(self) -> None:
        if self.release is not None:
            self.release.set()
        if self.other is not None:
            self.other.close()
        if hasattr(self, "db"):
            self.db.flush(DEADLINE)
            if self.other is None:
                self.settle()
                assert {n for (n,) in self.db.read("SELECT n FROM t")} == self.rows
            self.db.close()
        self.folder.cleanup()


def test_whatever_happens_the_rows_are_those_of_the_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "onewriter")
    health = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=health)
    )
