"""A block that takes the writer's turn itself, in its own thread, and what it leaves to the writer thread."""

from __future__ import annotations

import contextlib
import functools
import gc
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    DEADLINE,
    eventually,
    file_of,
    handling,
    holding_lock,
    in_threads,
    is_clean,
    log_size,
    policy_of,
    pool_of,
    queue_of,
    raising,
    released_when_met,
    rows,
    session_of,
    writer_of,
)
from onewriter import (
    CommitUnknownError,
    DbWriter,
    TransactionAbortedError,
    WriterBrokenError,
    WriterClosedError,
    WriteTimeoutError,
)
from onewriter.write import queue as queue_module
from onewriter.write.block import ThreadBlock

INSERT = "INSERT INTO t VALUES (?)"


class Steps:
    """Which thread has the write connection begin and commit."""

    def __init__(self) -> None:
        self.of_thread: list[tuple[str, int]] = []

    def on_connect(self, connection: sqlite3.Connection, readonly: bool) -> None:
        if not readonly:
            connection.set_trace_callback(self._note)

    def _note(self, sql: str) -> None:
        verb = sql.split()[0]
        if verb in ("BEGIN", "COMMIT", "ROLLBACK"):
            self.of_thread.append((verb, threading.get_ident()))

    def take(self) -> list[tuple[str, bool]]:
        """Since the last time, and whether this thread did it."""
        found, self.of_thread = self.of_thread, []
        return [(verb, thread == threading.get_ident()) for verb, thread in found]


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def db(path: Path, steps: Steps) -> Iterator[DbWriter]:
    with DbWriter(path, on_connect=steps.on_connect) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        settle(db)
        steps.take()
        yield db


def settle(db: DbWriter) -> None:
    """The writer thread sleeps."""
    eventually(lambda: queue_of(db)._asleep)


def test_a_block_begins_and_commits_in_its_thread_where_nothing_is_queued(db: DbWriter, steps: Steps) -> None:
    for n in range(3):
        with db.transaction() as tx:
            tx.execute(INSERT, (n,))
        assert steps.take() == [("BEGIN", True), ("COMMIT", True)]
        assert queue_of(db)._asleep  # no hop between threads
    assert rows(db) == [0, 1, 2]
    assert db.stats().committed == 4


def test_jobs_run_on_the_writer_thread(db: DbWriter, steps: Steps) -> None:
    db.run(INSERT, (1,))
    db.run(lambda tx: tx.execute(INSERT, (2,)))
    assert steps.take() == [("BEGIN", False), ("COMMIT", False)] * 2


def test_what_is_queued_while_a_block_is_open_comes_behind_it_and_before_the_next(db: DbWriter) -> None:
    with db.transaction() as tx:
        ticket = db.enqueue(INSERT, (2,))
        tx.execute(INSERT, (1,))
        assert not ticket.done()
    with db.transaction() as tx:
        assert ticket.done()
        tx.execute(INSERT, (3,))
    assert rows(db) == [1, 2, 3]


def test_a_block_that_fails_is_rolled_back_by_the_writer_thread(db: DbWriter, steps: Steps) -> None:
    with pytest.raises(LookupError), db.transaction() as tx:
        tx.execute(INSERT, (1,))
        raise LookupError
    assert steps.take() == [("BEGIN", True), ("ROLLBACK", False)]
    assert rows(db) == []


def test_a_block_that_meets_a_lock_waits_for_it_and_keeps_its_place(db: DbWriter, path: Path) -> None:
    """It was accepted before what is queued while it waits."""
    with released_when_met(db, path), db.transaction() as tx:
        ticket = db.enqueue(INSERT, (2,))
        tx.execute(INSERT, (1,))
    ticket.result(DEADLINE)
    assert rows(db) == [1, 2]


def test_a_block_whose_lock_is_held_elsewhere_ends_with_its_timeout(db: DbWriter, path: Path) -> None:
    with holding_lock(path), pytest.raises(TimeoutError, match="held elsewhere"), db.transaction(timeout=0.3):
        pass
    assert db.run(INSERT, (1,), timeout=DEADLINE).rowcount == 1


def test_a_commit_that_readers_hold_up_is_tried_again(path: Path, steps: Steps) -> None:
    with DbWriter(path, journal_mode="DELETE", on_connect=steps.on_connect) as db:
        db.run("CREATE TABLE t (n)")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as reader:
            settle(db)
            policy = policy_of(db)
            sleep = policy.sleep

            def let_go(seconds: float) -> None:
                if reader.in_transaction:
                    reader.execute("ROLLBACK").close()
                sleep(seconds)

            policy.sleep = let_go
            steps.take()
            with db.transaction() as tx:
                tx.execute(INSERT, (1,))
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM t").fetchall()
            assert steps.take()[:2] == [("BEGIN", True), ("COMMIT", True)]
        assert rows(db) == [1]


class Failing:
    """COMMIT raises, after or in place of what SQLite does."""

    def __init__(self, commit: Callable[[], object], code: int, commits: bool) -> None:
        self._commit, self._code, self._commits = commit, code, commits

    def __call__(self) -> None:
        if self._commits:
            self._commit()
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = self._code
        raise error


def test_a_commit_with_an_unknown_outcome_takes_the_gateway_out_of_service(path: Path) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        settle(db)
        session: Any = session_of(db)
        with pytest.raises(CommitUnknownError), db.transaction() as tx:
            tx.execute(INSERT, (1,))
            session.control["COMMIT"] = Failing(session.control["COMMIT"], sqlite3.SQLITE_IOERR_FSYNC, commits=True)
        with pytest.raises(WriterBrokenError), db.transaction():
            pass


def test_a_commit_that_fails_for_certain_rolls_back_and_the_next_one_works(db: DbWriter) -> None:
    session: Any = session_of(db)
    told: list[str] = []
    with pytest.raises(sqlite3.OperationalError) as caught, db.transaction(label="full") as tx:
        tx.on_rollback(lambda: told.append("rolled back"))
        tx.execute(INSERT, (1,))
        session.control["COMMIT"] = Failing(session.control["COMMIT"], sqlite3.SQLITE_FULL, commits=False)
    del session.control["COMMIT"]
    assert (told, rows(db)) == (["rolled back"], [])
    assert "job 'full'" in "".join(caught.value.__notes__)
    with db.transaction() as tx:
        tx.execute(INSERT, (2,))
    assert rows(db) == [2]


def test_a_checkpoint_that_is_due_is_left_to_the_writer_thread(path: Path) -> None:
    with DbWriter(path, synchronous="OFF", wal_limit=64 * 1024) as db:
        db.run("CREATE TABLE t (n)")
        settle(db)
        for _ in range(20):
            with db.transaction() as tx:
                tx.execute("INSERT INTO t VALUES (zeroblob(20000))")
        eventually(lambda: db.stats().last_checkpoint)


def test_the_log_is_emptied_when_nothing_comes_behind_a_block(db: DbWriter, path: Path) -> None:
    db.checkpoint()
    for n in range(2):
        settle(db)
        with db.transaction() as tx:
            tx.execute(INSERT, (n,))
        eventually(lambda: log_size(path) == 0)


def test_what_a_block_has_set_is_put_back(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.connection.row_factory = sqlite3.Row
    assert type(db.run("SELECT 1").rows[0]) is tuple


def test_what_a_block_has_made_in_the_temp_schema_goes_with_it(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.execute("CREATE TEMP TABLE kept (n)")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        db.run("SELECT * FROM kept")


def test_a_cursor_that_a_block_has_left_open_is_closed_before_its_commit(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.executemany(INSERT, [(1,), (2,)])
        cursor = tx.connection.execute("SELECT n FROM t")
        assert next(cursor) == (1,)
    assert is_clean(db)


def test_a_block_whose_transaction_sqlite_has_rolled_back_fails_alone(db: DbWriter) -> None:
    with pytest.raises(TransactionAbortedError), db.transaction() as tx:
        tx.execute(INSERT, (1,))
        with contextlib.suppress(sqlite3.IntegrityError):
            tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
    with db.transaction() as tx:
        tx.execute(INSERT, (2,))
    assert rows(db) == [2]


def test_a_block_that_is_late_is_named_by_another_thread(path: Path) -> None:
    """A handler of the log may want a lock whose owner waits for the writer."""
    named_by: list[int] = []
    with handling(lambda record: named_by.append(threading.get_ident())), DbWriter(path, slow_after=0.0) as db:
        pool_of(db).clock.turn_off()  # as if it came too late
        settle(db)
        with db.transaction():
            pass
        db.close()
        assert named_by
        assert threading.get_ident() not in named_by


def test_a_second_block_waits_for_the_first_and_one_that_gives_up_does_not_end_it(db: DbWriter, steps: Steps) -> None:
    def give_up() -> None:
        with pytest.raises(WriteTimeoutError), db.transaction(timeout=0.01):
            pytest.fail("entered")

    with db.transaction() as tx:
        settle(db)
        in_threads(give_up)
        tx.execute(INSERT, (1,))
    assert steps.take() == [("BEGIN", True), ("COMMIT", True)]
    assert rows(db) == [1]


def test_a_block_comes_behind_what_was_accepted_although_the_writer_was_not_woken_for_it(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(queue_of(db), "_wake", raising(LookupError))
        with pytest.raises(LookupError):
            db.enqueue(INSERT, (1,))
    with db.transaction() as tx:
        assert tx.execute("SELECT n FROM t").rows == [(1,)]


def test_no_block_is_accepted_after_a_close_that_did_not_come_to_wake_the_writer(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(queue_of(db), "_wake", raising(LookupError))
        with pytest.raises(LookupError):
            db.close()
    with pytest.raises(WriterClosedError), db.transaction():
        pytest.fail("entered")
    queue_of(db)._wake()


def test_a_watch_that_is_opened_inside_sees_what_the_block_commits(db: DbWriter, steps: Steps) -> None:
    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
        live = in_threads(lambda: db.watch("SELECT n FROM t").__enter__())[0]
        assert live.next(DEADLINE) == []  # type: ignore[attr-defined]
        steps.take()
    assert steps.take() == [("COMMIT", False)]
    assert live.next(DEADLINE) == [(1,)]  # type: ignore[attr-defined]
    with db.transaction() as tx:
        tx.execute(INSERT, (2,))
    assert steps.take() == [("BEGIN", False), ("COMMIT", False)]


def test_with_an_event_hook_the_writer_thread_begins_and_commits(path: Path, steps: Steps) -> None:
    """What the hook is called with comes from one thread."""
    threads: set[int] = set()

    def hook(event: object) -> None:
        if type(event).__name__ == "BatchEnded":
            threads.add(threading.get_ident())

    with DbWriter(path, on_event=hook, on_connect=steps.on_connect) as db:
        settle(db)
        with db.transaction() as tx:
            tx.execute("CREATE TABLE t (n)")
        assert ("BEGIN", True) not in steps.take()
    assert threads.isdisjoint({threading.get_ident()})


def test_close_while_a_block_has_the_turn_waits_for_its_end(db: DbWriter) -> None:
    with db.transaction() as tx:
        closing = threading.Thread(target=db.close)
        closing.start()
        eventually(lambda: queue_of(db).refusing)
        tx.execute(INSERT, (1,))
    closing.join(DEADLINE)
    assert db.closed
    with pytest.raises(WriterClosedError), db.transaction():
        pass


def test_close_without_drain_as_a_block_has_just_taken_the_turn_withdraws_it(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_turn = writer_of(db).own_turn
    begin = own_turn.begin

    def after_close(block: Any) -> bool:
        in_threads(lambda: db.close(0.01, drain=False))
        return begin(block)

    monkeypatch.setattr(own_turn, "begin", after_close)
    with pytest.raises(WriterClosedError), db.transaction():
        pytest.fail("entered")
    assert db.close(DEADLINE).committed == 1


def test_a_file_that_is_gone_as_a_block_begins_takes_the_gateway_out_of_service(db: DbWriter, path: Path) -> None:
    path.rename(path.with_name("elsewhere.db"))
    eventually(lambda: not path.exists())
    with pytest.raises(WriterBrokenError):
        for _ in range(10_000):  # the look comes every tenth of a second
            with db.transaction() as tx:
                tx.execute("SELECT 1")


def test_a_file_that_is_gone_is_seen_before_a_block_is_entered(db: DbWriter, path: Path) -> None:
    path.rename(path.with_name("elsewhere.db"))
    file_of(db).look_again_at = 0.0
    with pytest.raises(WriterBrokenError), db.transaction():
        pytest.fail("entered")
    assert db.health.startswith("broken: ")
    assert queue_of(db).guest is None


def test_nothing_of_a_block_that_has_met_a_lock_stays_alive(db: DbWriter, path: Path) -> None:
    with released_when_met(db, path), db.transaction() as tx:
        block = weakref.ref(tx._loan.job)
    del tx
    settle(db)
    gc.collect()
    assert block() is None


def test_nothing_of_the_last_block_stays_alive(db: DbWriter) -> None:
    class Kept:
        def __call__(self) -> None:
            pass

    kept = Kept()
    gone = weakref.ref(kept)
    with db.transaction() as tx:
        tx.on_commit(kept)
    del kept, tx
    gc.collect()
    assert gone() is None


def test_a_block_whose_savepoint_is_refused_is_begun_anew_by_the_writer_thread(db: DbWriter, steps: Steps) -> None:
    session: Any = session_of(db)
    set_mark = session.set_mark

    def refuse() -> None:
        session.set_mark = set_mark
        raise sqlite3.OperationalError("out of memory")

    session.set_mark = refuse
    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
    assert steps.take() == [("BEGIN", True), ("ROLLBACK", True), ("BEGIN", False), ("COMMIT", False)]
    assert rows(db) == [1]


class SignalError(Exception):
    """What a signal handler raises."""


def test_what_a_signal_handler_raises_while_sqlite_asks_about_begin_comes_out(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = session_of(db)
    decide = session.guard.decide

    def interrupted(*_: object) -> int:
        monkeypatch.setattr(session.guard, "decide", decide)
        raise SignalError

    monkeypatch.setattr(session.guard, "decide", interrupted)
    session.guard.install(session.connection)  # BEGIN is asked about again
    with pytest.raises(SignalError), db.transaction():
        pytest.fail("entered")
    db.run(INSERT, (1,))
    assert rows(db) == [1]


def test_what_a_signal_handler_raises_before_the_guard_can_answer_about_commit_comes_out(db: DbWriter) -> None:
    """Only a KeyboardInterrupt: the exception itself cannot be caught there, and SQLite says "not authorized"."""
    session: Any = session_of(db)
    guard, came = session.guard, list[bool]()

    def ask(action: int, verb: str | None, *rest: Any) -> int:
        if (action, verb) == (sqlite3.SQLITE_TRANSACTION, "COMMIT") and not came:
            came.append(True)
            raise SignalError
        answer: int = guard._ask(action, verb, *rest)
        return answer

    with pytest.raises(KeyboardInterrupt), db.transaction() as tx:
        tx.execute(INSERT, (1,))
        guard._answers, guard.authorizer = 0, functools.lru_cache(maxsize=0)(ask)
        session.connection.set_authorizer(guard.authorizer)  # COMMIT is asked about again
    db.run(INSERT, (2,))
    assert (came, rows(db)) == ([True], [2])


def test_a_block_that_was_interrupted_behind_its_begin_leaves_no_transaction_to_the_job_behind_it(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ThreadBlock, "start", raising(SignalError))
        with pytest.raises(SignalError), db.transaction():
            pytest.fail("entered")
    db.run(INSERT, (1,))
    assert rows(db) == [1]


def test_what_a_block_takes_back_is_undone_and_the_rest_is_committed(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
        tx.rollback()
        tx.execute(INSERT, (2,))
    assert rows(db) == [2]


def test_a_block_looks_itself_at_whether_the_file_is_there(db: DbWriter, steps: Steps) -> None:
    file_of(db).look_again_at = 0.0
    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
        file_of(db).look_again_at = 0.0
    assert steps.take() == [("BEGIN", True), ("COMMIT", True)]
    assert file_of(db).look_again_at > 0.0


@pytest.mark.parametrize("moment", ["before it", "in it"])
def test_that_the_file_was_moved_is_known_as_soon_as_a_block_has_found_it(path: Path, moment: str) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        block = db.transaction()
        if moment == "in it":
            block.__enter__()
        path.rename(path.with_name("elsewhere.db"))
        file_of(db).look_again_at = 0.0  # a tenth of a second ago
        with pytest.raises(WriterBrokenError, match="moved"):
            block.__exit__(None, None, None) if moment == "in it" else block.__enter__()
        assert db.health.startswith("broken")
        assert db.close().failed == 1


def test_a_block_that_others_wait_for_stays_open_although_the_writer_looks_whether_it_is_lost(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []
    end_if_lost = ThreadBlock.end_if_lost

    def look(block: ThreadBlock) -> bool:
        looks.append(end_if_lost(block))
        return looks[-1]

    monkeypatch.setattr(queue_module, "SLICE", 0.001)
    monkeypatch.setattr(ThreadBlock, "end_if_lost", look)
    with db.transaction() as tx:
        ticket = db.enqueue(INSERT, (2,))
        eventually(lambda: len(looks) > 2)
        tx.execute(INSERT, (1,))
        assert not ticket.done()
    ticket.result(DEADLINE)
    assert (rows(db), set(looks)) == ([1, 2], {False})
