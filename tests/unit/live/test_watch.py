"""Watch: the rows now, and again after each commit that has changed them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import onewriter.live.watch as watch_module
from helpers import (
    DEADLINE,
    child_code,
    core_of,
    drop_session,
    eventually,
    inserting,
    pool_of,
    raising,
    run_child,
    session_of,
    state_of,
)
from onewriter import (
    AsyncDbWriter,
    DbWriter,
    ReadTimeoutError,
    ReentrantWriteError,
    Transaction,
    TransactionClosedError,
    Watch,
    WriterBrokenError,
    WriterClosedError,
)
from onewriter.base.waiting import wait_in_slices
from onewriter.live.query import Answer

N = "SELECT n FROM t ORDER BY n"


@pytest.fixture
def db(table_db: DbWriter) -> DbWriter:
    return table_db


class Looks:
    """``on_connect`` that adds the function ``look()``, which counts the reads, and calls ``before`` in each."""

    def __init__(self) -> None:
        self.count = 0
        self.before: Callable[[], object] = int

    def __call__(self, connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("look", 0, self._look)

    def _look(self) -> int:
        self.count += 1
        before, self.before = self.before, int
        before()
        return 0


LOOK = "SELECT n, look() FROM t WHERE n > 0 UNION ALL SELECT 0, look() LIMIT 5"


@pytest.fixture
def looks() -> Looks:
    return Looks()


@pytest.fixture(params=[False, True], ids=["thread", "inline"])
def counted(path: Path, looks: Looks, request: pytest.FixtureRequest) -> Iterator[DbWriter]:
    """A gateway whose reads of ``SELECT …, look()`` are counted."""
    with DbWriter(path, on_connect=looks, inline=request.param) as gateway:
        gateway.run_script("CREATE TABLE t (n INTEGER); CREATE TABLE other (n INTEGER)")
        yield gateway


def nothing_new(db: DbWriter, live: Watch[Any]) -> bool:
    """Whether there are no new rows, once the writer has told of all that it has done."""
    db.flush()
    try:
        live.next(0)
    except ReadTimeoutError:
        return True
    return False


def settle(db: DbWriter, live: Watch[Any]) -> None:
    """See all that there is to see."""
    while not nothing_new(db, live):
        pass


@contextlib.contextmanager
def looping(live: Watch[Any]) -> Iterator[list[Any]]:
    """What a loop in a thread of its own gets, and at its end "ended"."""
    got: list[Any] = []

    def loop() -> None:
        try:
            got.extend(rows for rows in Appending(live, got))
        except BaseException as error:
            got.append(error)
        else:
            got.append("ended")

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield got
    finally:
        live.close()
        thread.join(DEADLINE)
        assert not thread.is_alive()


class Appending:
    """Iterates, and appends at once."""

    def __init__(self, live: Watch[Any], got: list[Any]) -> None:
        self._live = live
        self._got = got

    def __iter__(self) -> Iterator[Any]:
        for rows in self._live:
            self._got.append(rows)
        return iter(())


def test_it_gives_the_rows_now_and_after_each_commit_that_changed_them(db: DbWriter) -> None:
    with db.watch(N, every=0) as live:
        assert live.next() == []
        for n in range(3):
            db.run("INSERT INTO t VALUES (?)", (n,))
            assert live.next(DEADLINE) == [(i,) for i in range(n + 1)]


def test_a_loop_in_a_thread_gets_what_another_thread_commits(db: DbWriter) -> None:
    with db.watch(N, every=0) as live, looping(live) as got:
        eventually(lambda: got == [[]])
        db.run("INSERT INTO t VALUES (1)")
        eventually(lambda: got == [[], [(1,)]])


def write_in_function(db: DbWriter) -> None:
    db.run(inserting(1))


def write_in_block(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.execute("INSERT INTO t VALUES (1)")


def write_on_the_lent_connection(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.connection.execute("INSERT INTO t VALUES (1)")


def write_many(db: DbWriter) -> None:
    db.run_many("INSERT INTO t VALUES (?)", [(1,), (2,)])


def write_by_script(db: DbWriter) -> None:
    db.run_script("INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)")


def write_by_trigger(db: DbWriter) -> None:
    db.run("INSERT INTO by_trigger VALUES (1)")


def write_through_a_view(db: DbWriter) -> None:
    db.run("INSERT INTO v VALUES (1)")


def write_by_cascade(db: DbWriter) -> None:
    db.run("DELETE FROM parent")


def write_outside_any_transaction(db: DbWriter) -> None:
    db.run_without_transaction("INSERT INTO t VALUES (1)")


def write_later(db: DbWriter) -> None:
    db.enqueue("INSERT INTO t VALUES (1)")


@pytest.mark.parametrize(
    "write",
    [
        write_in_function,
        write_in_block,
        write_on_the_lent_connection,
        write_many,
        write_by_script,
        write_by_trigger,
        write_through_a_view,
        write_by_cascade,
        write_outside_any_transaction,
        write_later,
    ],
)
@pytest.mark.parametrize("times", [1, 2], ids=["new to SQLite", "in the statement cache"])
def test_every_way_to_write_is_seen(any_db: DbWriter, write: Callable[[DbWriter], None], times: int) -> None:
    any_db.run_script(
        "CREATE TABLE t (n); CREATE TABLE by_trigger (n); CREATE VIEW v AS SELECT n FROM t;"
        "CREATE TRIGGER a AFTER INSERT ON by_trigger BEGIN INSERT INTO t VALUES (NEW.n); END;"
        "CREATE TRIGGER b INSTEAD OF INSERT ON v BEGIN INSERT INTO t VALUES (NEW.n); END;"
        "CREATE TABLE parent (id INTEGER PRIMARY KEY);"
        "CREATE TABLE child (id REFERENCES parent ON DELETE CASCADE);"
    )
    count = "SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM child)"
    fill = "INSERT INTO parent VALUES (1); INSERT INTO child VALUES (1)"
    any_db.run_script(fill)
    with any_db.watch(count, every=0) as live:
        for _ in range(times):
            settle(any_db, live)
            before = any_db.read(count)
            write(any_db)
            assert live.next(DEADLINE) != before
            any_db.run_script("DELETE FROM parent;" + fill)


def test_a_function_whose_statements_were_prepared_before_anybody_watched_is_seen(db: DbWriter) -> None:
    def insert(tx: Transaction) -> None:
        tx.execute("INSERT INTO t VALUES (NULL)")

    db.run(insert)
    with db.watch("SELECT count(*) FROM t", every=0) as live:
        assert live.next(DEADLINE) == [(1,)]
        for n in (2, 3, 4):
            db.run(insert)
            assert live.next(DEADLINE) == [(n,)]


def test_what_is_written_into_a_blob_is_seen(any_db: DbWriter) -> None:
    any_db.run_script("CREATE TABLE t (b); INSERT INTO t VALUES (zeroblob(2))")
    with any_db.watch("SELECT b FROM t", every=0) as live:
        settle(any_db, live)
        with any_db.transaction() as tx, tx.connection.blobopen("t", "b", 1) as blob:
            blob.write(b"ab")
        assert live.next(DEADLINE) == [(b"ab",)]


def test_nobody_is_told_before_commit_nor_of_what_is_rolled_back(db: DbWriter) -> None:
    with db.watch(N, every=0) as live:
        settle(db, live)
        with pytest.raises(ZeroDivisionError), db.transaction() as tx:
            tx.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(ReentrantWriteError):
                live.next(0)
            raise ZeroDivisionError
        assert nothing_new(db, live)


def test_the_same_rows_are_not_given_again(db: DbWriter) -> None:
    db.run("INSERT INTO t VALUES (1)")
    with db.watch(N, every=0) as live:
        assert live.next() == [(1,)]
        db.run("UPDATE t SET n = 1")
        assert nothing_new(db, live)
        db.run("DELETE FROM t")
        db.run("INSERT INTO t VALUES (1)")
        assert nothing_new(db, live)


def test_no_rows_are_the_first_rows_too(db: DbWriter) -> None:
    with db.watch(N) as live:
        assert live.next() == []
        assert nothing_new(db, live)


def test_a_slow_consumer_gets_the_newest_rows(db: DbWriter) -> None:
    with db.watch(N, every=0) as live:
        live.next()
        for n in range(5):
            db.run("INSERT INTO t VALUES (?)", (n,))
        assert live.next() == [(n,) for n in range(5)]
        assert nothing_new(db, live)


def test_it_reads_once_in_every_seconds_and_then_gives_the_last_state(counted: DbWriter, looks: Looks) -> None:
    with counted.watch("SELECT n, look() FROM t", every=3600) as live:
        counted.run("INSERT INTO t VALUES (1)")
        live.next()
        before = looks.count
        counted.run("UPDATE t SET n = 2")
        assert nothing_new(counted, live)
        counted.run("UPDATE t SET n = 3")
        assert nothing_new(counted, live)
        assert looks.count == before
        counted.close()
        assert list(live) == [[(3, 0)]]


def test_the_pause_is_no_longer_than_every(db: DbWriter) -> None:
    with db.watch(N, every=0.01) as live:
        live.next()
        db.run("INSERT INTO t VALUES (1)")
        assert live.next(DEADLINE) == [(1,)]


def test_a_commit_elsewhere_costs_no_read(counted: DbWriter, looks: Looks) -> None:
    with counted.watch("SELECT count(*), look() FROM t", every=0) as live:
        settle(counted, live)
        before = looks.count
        for _ in range(3):
            counted.run("INSERT INTO other VALUES (1)")
            counted.run(lambda tx: tx.execute("UPDATE other SET n = n + 1"))
        assert nothing_new(counted, live)
        assert looks.count == before


def test_watches_on_the_same_query_share_its_reads(counted: DbWriter, looks: Looks) -> None:
    query = "SELECT count(*), look() FROM t WHERE n > ?"
    with (
        counted.watch(query, (0,), every=0) as one,
        counted.watch(query, [0], every=0) as two,
        counted.watch(query, (1,), every=0) as other,
    ):
        assert (one.next(), two.next(), looks.count) == ([(0, 0)], [(0, 0)], 1)
        for live in (one, two, other):
            settle(counted, live)
        before = looks.count
        counted.run("INSERT INTO t VALUES (1)")
        counted.flush()
        rows = one.next()
        assert (rows, looks.count) == ([(1, 0)], before + 1)
        rows.clear()  # each loop has a list of its own
        assert (two.next(), looks.count) == ([(1, 0)], before + 1)
        assert nothing_new(counted, other)


def test_one_that_comes_later_sees_what_was_committed_before_it(counted: DbWriter, looks: Looks) -> None:
    query = "SELECT count(*), look() FROM t"
    with counted.watch(query) as first:
        first.next()
        before = looks.count
        with counted.watch(query) as second:
            assert (second.next(), looks.count) == ([(0, 0)], before + 1)


def test_who_waits_for_the_read_of_another_reads_if_that_fails(counted: DbWriter, looks: Looks) -> None:
    query = "SELECT count(*), look() FROM t"
    entered, go = threading.Event(), threading.Event()

    def fail() -> None:
        entered.set()
        go.wait(DEADLINE)
        raise ZeroDivisionError

    looks.before = fail
    with counted.watch(query) as one, counted.watch(query) as two, looping(one) as first:
        assert entered.wait(DEADLINE)
        with looping(two) as second:
            eventually(lambda: two._entered().waiters)
            go.set()
            eventually(lambda: second == [[(0, 0)]])
            eventually(lambda: first)
    assert [type(error) for error in first] == [sqlite3.OperationalError]


def test_ctrl_c_just_before_a_read_keeps_nobody_from_it(new_db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    new_db.run("CREATE TABLE t (n)")
    with new_db.watch(N) as other:
        with new_db.watch(N) as live, monkeypatch.context() as patched:
            patched.setattr(live, "_use_pool", raising(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                live.next()
            patched.undo()
            assert live.next(DEADLINE) == []
        with new_db.watch("SELECT 2") as one, new_db.watch("SELECT 2") as two:
            monkeypatch.setattr(one, "_use_pool", raising(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                one.next()
            with looping(two) as got:
                eventually(lambda: two._entered().waiters)
                one.close()
                eventually(lambda: got == [[(2,)]])
        assert other.next(DEADLINE) == []


# No wake-up is lost ---------------------------------------------------------------------------------------------------


def test_a_commit_during_the_read_is_seen_by_the_next(path: Path, looks: Looks) -> None:
    """The read has its snapshot; the commit comes before it is over."""
    with DbWriter(path, on_connect=looks) as db:
        db.run("CREATE TABLE t (n INTEGER)")

        def commit() -> None:
            thread = threading.Thread(target=db.run, args=["INSERT INTO t VALUES (1)"])
            thread.start()
            thread.join(DEADLINE)
            db.flush()

        with db.watch("SELECT (SELECT count(*) FROM t), look()", every=0) as live:
            settle(db, live)
            looks.before = lambda: in_a_thread(commit)
            db.run("INSERT INTO t VALUES (0)")
            rows = live.next(DEADLINE)
            if rows == [(1, 0)]:
                rows = live.next(DEADLINE)
            assert rows == [(2, 0)]


def in_a_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(DEADLINE)


def test_a_commit_before_the_sleep_ends_it(new_db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    new_db.run("CREATE TABLE t (n)")
    with new_db.watch(N, every=0) as live:
        settle(new_db, live)

        def commit_first(signal: Any, *rest: Any) -> bool:
            monkeypatch.setattr(watch_module, "wait_in_slices", wait_in_slices)
            in_a_thread(lambda: new_db.run("INSERT INTO t VALUES (1)"))
            in_a_thread(new_db.flush)
            assert signal.acquire(blocking=False)
            signal.release()
            return wait_in_slices(signal, *rest)

        monkeypatch.setattr(watch_module, "wait_in_slices", commit_first)
        assert live.next(DEADLINE) == [(1,)]


# Other processes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stranger(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        yield connection


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
@pytest.mark.parametrize("inline", [False, True], ids=["thread", "inline"])
def test_the_commit_of_another_connection_is_seen(path: Path, mode: Any, inline: bool) -> None:
    with DbWriter(path, journal_mode=mode, inline=inline) as db:
        db.run("CREATE TABLE t (n)")
        with db.watch(N, every=0) as live, stranger(path) as other:
            live.next()
            for n in range(3):
                other.execute("INSERT INTO t VALUES (?)", (n,))
                assert live.next(DEADLINE) == [(i,) for i in range(n + 1)]


def test_commits_of_others_are_seen_beside_a_busy_writer(new_db: DbWriter, path: Path) -> None:
    new_db.run_script("CREATE TABLE t (n); CREATE TABLE other (n)")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            new_db.run("INSERT INTO other VALUES (1)")

    thread = threading.Thread(target=write)
    with new_db.watch(N, every=0) as live, stranger(path) as other:
        live.next()
        thread.start()
        try:
            other.execute("INSERT INTO t VALUES (1)")
            assert live.next(DEADLINE) == [(1,)]
        finally:
            stop.set()
            thread.join(DEADLINE)


def test_commits_in_an_attached_database_are_seen(path: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.db"

    def attach(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("ATTACH ? AS second", (str(second),))

    with stranger(second) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE t (n)")
        with DbWriter(path, on_connect=attach) as db, db.watch("SELECT n FROM second.t", every=0) as live:
            assert live.next() == []
            other.execute("INSERT INTO t VALUES (1)")
            assert live.next(DEADLINE) == [(1,)]
            db.run("UPDATE second.t SET n = 2")
            assert live.next(DEADLINE) == [(2,)]


def test_commits_are_seen_after_the_connection_was_opened_anew(new_db: DbWriter, path: Path) -> None:
    new_db.run("CREATE TABLE t (n)")
    with new_db.watch(N, every=0) as live:
        settle(new_db, live)
        drop_session(new_db)
        with stranger(path) as other:
            other.execute("INSERT INTO t VALUES (1)")
        new_db.run("SELECT 1")
        assert live.next(DEADLINE) == [(1,)]
        new_db.run("INSERT INTO t VALUES (2)")
        assert live.next(DEADLINE) == [(1,), (2,)]


# The schema -----------------------------------------------------------------------------------------------------------


def test_a_view_that_is_made_anew_is_watched_as_it_is_then(any_db: DbWriter) -> None:
    any_db.run_script("CREATE TABLE a (n); CREATE TABLE b (n); CREATE VIEW v AS SELECT n FROM a")
    with any_db.watch("SELECT n FROM v", every=0) as live:
        settle(any_db, live)
        any_db.run_script("DROP VIEW v; CREATE VIEW v AS SELECT n FROM b")
        assert nothing_new(any_db, live)
        any_db.run("INSERT INTO b VALUES (1)")
        assert live.next(DEADLINE) == [(1,)]


def test_a_trigger_that_is_made_later_is_known(any_db: DbWriter) -> None:
    any_db.run_script("CREATE TABLE a (n); CREATE TABLE b (n)")
    with any_db.watch("SELECT n FROM b", every=0) as live:
        settle(any_db, live)
        any_db.run("INSERT INTO a VALUES (0)")
        any_db.run("CREATE TRIGGER c AFTER INSERT ON a BEGIN INSERT INTO b VALUES (NEW.n); END")
        settle(any_db, live)
        any_db.run("INSERT INTO a VALUES (1)")
        assert live.next(DEADLINE) == [(1,)]


def test_a_trigger_that_another_process_makes_is_known(any_db: DbWriter, path: Path) -> None:
    any_db.run_script("CREATE TABLE a (n); CREATE TABLE b (n)")
    with any_db.watch("SELECT n FROM b", every=0) as live, any_db.watch("SELECT n FROM a", every=0) as other:
        for _ in range(3):  # so that it is known what this writes
            settle(any_db, live)
            any_db.run("INSERT INTO a VALUES (1)")
        with stranger(path) as connection:
            connection.execute("CREATE TRIGGER c AFTER INSERT ON a BEGIN INSERT INTO b VALUES (NEW.n); END")
            connection.execute("INSERT INTO a VALUES (0)")
        while (0,) not in other.next(DEADLINE):
            pass
        assert live.next(DEADLINE) == [(0,)]
        settle(any_db, live)
        for n in range(3):
            any_db.run("INSERT INTO a VALUES (1)")
            assert live.next(DEADLINE) == [(0,), *[(1,)] * (n + 1)]


def test_what_is_not_known_to_read_a_table_is_read_after_every_commit(any_db: DbWriter) -> None:
    any_db.run_script(
        "CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, x);"
        "CREATE VIRTUAL TABLE f USING fts5 (x, content='t', content_rowid='id');"
        "CREATE VIRTUAL TABLE words USING fts5vocab (f, 'row')"
    )
    with (
        any_db.watch("SELECT seq FROM sqlite_sequence", every=0) as sequence,
        any_db.watch("SELECT x FROM f", every=0) as content,
        any_db.watch("SELECT term FROM words", every=0) as words,
        any_db.watch("PRAGMA user_version", every=0) as version,
    ):
        assert [live.next() for live in (sequence, content, words, version)] == [[], [], [], [(0,)]]
        any_db.run("INSERT INTO t (x) VALUES ('one')")
        assert (sequence.next(DEADLINE), content.next(DEADLINE)) == ([(1,)], [("one",)])
        any_db.run("INSERT INTO f (rowid, x) VALUES (1, 'one')")
        assert words.next(DEADLINE) == [("one",)]
        any_db.run("PRAGMA user_version = 7")
        any_db.run("DELETE FROM t")
        assert version.next(DEADLINE) == [(7,)]


# What the loop gets ---------------------------------------------------------------------------------------------------


def test_rows_are_compared_before_the_row_factory(path: Path) -> None:
    """Whose objects need not be equal."""

    class Row:
        def __init__(self, cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> None:
            self.n = row[0]

    with DbWriter(path, row_factory=Row) as db:
        db.run("CREATE TABLE t (n, m)")
        db.run("INSERT INTO t VALUES (1, 1)")
        with db.watch("SELECT n FROM t", every=0) as live, db.watch("SELECT n FROM t", every=0) as other:
            assert [row.n for row in live.next()] == [1]
            assert [row.n for row in other.next()] == [1]
            db.run("UPDATE t SET m = 2")
            assert nothing_new(db, live)
            db.run("UPDATE t SET n = 2")
            assert [row.n for row in live.next()] == [2]


def test_a_function_is_called_again_after_every_commit(db: DbWriter) -> None:
    def total(connection: sqlite3.Connection) -> int:
        return sum(n for (n,) in connection.execute("SELECT n FROM t"))

    with db.watch(total, every=0) as live:
        assert live.next() == 0
        db.run("INSERT INTO t VALUES (0)")
        assert nothing_new(db, live)
        db.run("INSERT INTO t VALUES (5)")
        assert live.next(DEADLINE) == 5


def test_what_cannot_be_compared_is_new(db: DbWriter) -> None:
    class Frame:
        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

        __hash__ = None  # type: ignore[assignment]

    with db.watch(lambda connection: Frame(), every=0) as live:
        first = live.next()
        db.run("INSERT INTO t VALUES (0)")
        assert live.next(DEADLINE) is not first


def test_an_error_of_the_query_is_raised_in_the_loop_which_can_go_on(db: DbWriter) -> None:
    db.run("INSERT INTO t VALUES (1)")
    with db.watch("SELECT abs(n) FROM t", every=0) as live:
        assert live.next() == [(1,)]
        db.run("UPDATE t SET n = -9223372036854775808")
        db.flush()
        with pytest.raises(sqlite3.OperationalError, match="integer overflow"):
            live.next(DEADLINE)
        db.run("UPDATE t SET n = 2")
        assert live.next(DEADLINE) == [(2,)]


def test_a_query_that_is_wrong_says_so(db: DbWriter) -> None:
    with db.watch("SELECT n FROM nowhere") as live, pytest.raises(sqlite3.OperationalError, match="no such table"):
        next(live)
    with db.watch("INSERT INTO t VALUES (1)") as live, pytest.raises(sqlite3.OperationalError, match="readonly") as e:
        live.next()
    assert "a read cannot write" in "".join(e.value.__notes__)
    with db.watch("SELECT ?", ()) as live, pytest.raises(sqlite3.ProgrammingError, match="bindings"):
        live.next()


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration])
def test_a_query_that_raises_what_ends_loops_ends_none(db: DbWriter, error: type[Exception]) -> None:
    with (
        db.watch(raising(error), every=0) as live,
        pytest.raises(RuntimeError, match=f"the query raised {error.__name__}") as e,
    ):
        list(live)
    assert type(e.value.__cause__) is error


def test_parameters_are_taken_at_the_call(db: DbWriter) -> None:
    params = [1]
    with db.watch("SELECT ?", params) as live:
        params[0] = 2
        assert live.next() == [(1,)]


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (("SELECT 1", "text"), {}, TypeError),
        ((5,), {}, TypeError),
        ((len, (1,)), {}, TypeError),
        (("SELECT 1",), {"every": -1}, ValueError),
        (("SELECT 1",), {"every": math.inf}, ValueError),
        (("SELECT 1",), {"every": "1"}, TypeError),
        (("SELECT 1",), {"label": 1}, TypeError),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(
    db: DbWriter, arguments: Any, options: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        db.watch(*arguments, **options)
    with db.watch("SELECT 1") as live, pytest.raises(ValueError, match="timeout"):
        live.next(timeout=-1)


def test_it_is_entered_once(db: DbWriter) -> None:
    live = db.watch(N)
    with pytest.raises(RuntimeError, match="needs `with`"):
        live.next()
    with live, pytest.raises(RuntimeError, match="entered once"):
        live.__enter__()
    with pytest.raises(RuntimeError, match="entered once"):
        live.__enter__()
    closed = db.watch(N)
    closed.close()
    with pytest.raises(RuntimeError, match="entered once"):
        closed.__enter__()


def test_no_news_in_time_is_a_timeout_that_names_the_query(db: DbWriter) -> None:
    with db.watch(N, label="numbers") as live:
        live.next(0)
        with pytest.raises(TimeoutError, match=r"no commit has changed 'numbers' .* within 0.01 s"):
            live.next(0.01)


# Ends -----------------------------------------------------------------------------------------------------------------


def test_any_thread_ends_it_by_leaving_the_block(new_db: DbWriter) -> None:
    new_db.run("CREATE TABLE t (n)")
    with new_db.watch(N) as live, looping(live) as got:
        eventually(lambda: got == [[]])
        live.__exit__(None, None, None)
        eventually(lambda: got == [[], "ended"])
    assert list(live) == []
    with pytest.raises(RuntimeError, match="has ended"):
        live.next()


def test_it_ends_in_its_pause_too(new_db: DbWriter) -> None:
    new_db.run("CREATE TABLE t (n)")
    with new_db.watch(N, every=3600) as live, looping(live) as got:
        eventually(lambda: got == [[]])
        new_db.run("INSERT INTO t VALUES (1)")
        new_db.flush()
        live.close()
        eventually(lambda: got == [[], "ended"])


def test_close_gives_the_last_state_to_those_who_wait_and_to_those_who_come_later(new_db: DbWriter) -> None:
    new_db.run("CREATE TABLE t (n)")
    with new_db.watch(N) as waiting, new_db.watch(N) as busy, looping(waiting) as got:
        busy.next()
        eventually(lambda: got == [[]])
        for n in range(100):
            new_db.enqueue("INSERT INTO t VALUES (?)", (n,))
        new_db.close()
        last = [(n,) for n in range(100)]
        eventually(lambda: got[-1] == "ended")
        assert got[-2] == last
        assert list(busy) == [last]
        with pytest.raises(WriterClosedError):
            busy.next()


def test_close_of_an_inline_gateway_ends_the_loops_of_other_threads(path: Path) -> None:
    with DbWriter(path, inline=True) as db:
        db.run("CREATE TABLE t (n)")
        with db.watch(N, every=3600) as live, looping(live) as got:
            eventually(lambda: got == [[]])
            db.run("INSERT INTO t VALUES (1)")
            db.close()
            eventually(lambda: got == [[], [(1,)], "ended"])


def test_an_inline_gateway_that_is_closed_in_this_moment_gives_its_last_state(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path, inline=True) as db:
        db.run("CREATE TABLE t (n)")
        with db.watch(N, every=0) as live:
            live.next()

            def closed_meanwhile() -> None:
                monkeypatch.undo()
                db.run("INSERT INTO t VALUES (1)")
                db.close()
                raise WriterClosedError

            monkeypatch.setattr(live._live, "ask", closed_meanwhile)
            assert list(live) == [[(1,)]]


def test_close_gives_the_first_rows_to_one_that_has_had_none(new_db: DbWriter) -> None:
    new_db.run("CREATE TABLE t (n)")
    with new_db.watch(N) as other:
        settle(new_db, other)
        with new_db.watch(N) as late, new_db.watch("SELECT 5") as alone:
            new_db.close()
            assert (list(late), list(alone), list(other)) == ([[]], [[(5,)]], [])


def test_close_reads_nothing_again_that_has_not_changed(counted: DbWriter, looks: Looks) -> None:
    with counted.watch(LOOK) as live:
        settle(counted, live)
        before = looks.count
        counted.close()
        assert list(live) == []
        assert looks.count == before


def test_an_error_of_a_read_that_close_waits_for_is_raised(new_db: DbWriter) -> None:
    reads: list[int] = []
    inside = threading.Event()

    def read(connection: sqlite3.Connection) -> int:
        reads.append(1)
        if len(reads) > 1:  # the last, by the writer
            return 1
        inside.set()
        eventually(lambda: core_of(new_db).live.is_over)
        raise LookupError

    with new_db.watch(read) as live, ThreadPoolExecutor(1) as pool:
        looking = pool.submit(live.next)
        assert inside.wait(DEADLINE)
        new_db.close()
        assert isinstance(looking.exception(DEADLINE), LookupError)


def test_an_error_of_the_last_read_is_raised_too(db: DbWriter) -> None:
    with db.watch("SELECT abs(-9223372036854775808 + count(*)) FROM t") as live:
        db.close()
        for _ in live_errors(live):
            pass
        with pytest.raises(WriterClosedError):
            live.next()


def live_errors(live: Watch[Any]) -> Iterator[None]:
    with pytest.raises(sqlite3.OperationalError, match="integer overflow"):
        live.next()
    yield


def test_what_another_process_wrote_last_is_in_the_last_state(new_db: DbWriter, path: Path) -> None:
    new_db.run("CREATE TABLE t (n)")
    with new_db.watch(N) as live, stranger(path) as other:
        settle(new_db, live)
        other.execute("INSERT INTO t VALUES (1)")
        new_db.close()
        assert list(live) == [[(1,)]]


def test_a_closed_gateway_is_not_watched(db: DbWriter) -> None:
    live = db.watch(N)
    db.close()
    with pytest.raises(WriterClosedError), live:
        pass
    assert state_of(db).live is None


def test_a_closed_gateway_is_not_watched_beside_an_old_watch_either(db: DbWriter) -> None:
    with db.watch(N):
        db.close()
        with pytest.raises(WriterClosedError), db.watch(N):
            pass


def test_a_broken_gateway_raises_its_error_in_the_loop(new_db: DbWriter, path: Path) -> None:
    new_db.run("CREATE TABLE t (n)")
    with new_db.watch(N) as live, looping(live) as got:
        eventually(lambda: got == [[]])
        os.rename(path, f"{path}.moved")
        eventually(lambda: is_broken(new_db))
        eventually(lambda: isinstance(got[-1], WriterBrokenError))
        with pytest.raises(WriterBrokenError), new_db.watch(N):
            pass


def is_broken(db: DbWriter) -> bool:
    try:
        db.run("INSERT INTO t VALUES (1)")
    except WriterBrokenError:
        return True
    return False


def test_a_loop_inside_a_job_gets_the_rows_and_does_not_wait(db: DbWriter) -> None:
    def job(tx: Transaction) -> Any:
        tx.execute("INSERT INTO t VALUES (1)")
        with db.watch(N) as live:
            rows = live.next()
            with pytest.raises(ReentrantWriteError, match="live query"):
                next(live)
            return rows

    assert db.run(job) == []  # what is committed


def test_of_two_threads_the_slow_one_does_not_give_older_rows_after_newer_ones(new_db: DbWriter) -> None:
    with new_db.watch(N) as live:
        newer, older = Answer(6, [(6,)], [(6,)]), Answer(5, [(5,)], [(5,)])
        assert live._is_news(newer)
        assert not live._is_news(older)
        assert not live._is_news(newer)


def test_one_connection_is_enough_beside_a_reader_of_the_same_thread(one: DbWriter) -> None:
    with one.reader() as reader, one.watch(N, every=0) as live:
        live.next()
        one.run("INSERT INTO t VALUES (1)")
        assert live.next(DEADLINE) == [(1,)]
        assert reader.execute(N).fetchall() == []


def test_it_holds_nothing_between_two_reads(one: DbWriter) -> None:
    with one.watch(N) as live:
        live.next()
        assert one.read(N) == []
        assert one.checkpoint().busy is False
        assert one.stats().readers_in_use == 0


def test_one_that_is_dropped_ends(db: DbWriter) -> None:
    live: Watch[Any] | None = db.watch(N)
    assert live is not None
    live.__enter__()
    live.next()
    assert state_of(db).live is not None
    del live
    gc.collect()
    assert state_of(db).live is None


def test_it_keeps_its_gateway(path: Path) -> None:
    with DbWriter(path).watch("SELECT 1") as live:
        gc.collect()
        assert live.next() == [(1,)]
        live._gateway.close()  # type: ignore[attr-defined]


def test_with_none_open_nothing_is_noted(db: DbWriter) -> None:
    assert state_of(db).live is None
    with db.watch(N) as live, db.watch(N) as other:
        settle(db, live)
        assert session_of(db).guard.places is not None
        other.close()
        other.close()
        assert state_of(db).live is not None
    assert state_of(db).live is None
    assert session_of(db).guard.places is None
    db.run("INSERT INTO t VALUES (1)")
    assert session_of(db).guard.places is None


def test_in_a_forked_child_it_raises_and_can_be_left(path: Path) -> None:
    """Whatever another thread of the parent was doing."""
    code = """
import threading
held, release = threading.Event(), threading.Event()

def hold(lock):
    with lock:
        held.set()
        release.wait(30)

with DbWriter(path) as db:
    with db.watch("SELECT 1") as live:
        live.next()
        thread = threading.Thread(target=hold, args=[live._live.lock])
        thread.start()
        held.wait(30)
        child = os.fork()
        if child:
            release.set()
        else:
            for use in (live.next, db.watch("SELECT 3").__enter__):
                try:
                    use()
                except Exception as error:
                    print(type(error).__name__, flush=True)
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print("parent", db.run("SELECT 2").rows)
"""
    done = run_child("import warnings; warnings.simplefilter('ignore')\n" + child_code(path, code))
    assert (done.stdout.split("\n")[:3], done.returncode) == (["ForkedError"] * 2 + ["parent [(2,)]"], 0), done.stderr


def test_the_writer_goes_on_if_the_last_read_is_interrupted(db: DbWriter) -> None:
    with db.watch(raising(RuntimeError)) as live:
        db.close()
        with pytest.raises(RuntimeError, match="making"):
            live.next()


@pytest.mark.parametrize("sql", ["SELECT count(*) FROM T", "SELECT 1 FROM t JOIN other USING (n)"])
def test_a_change_of_a_table_whose_columns_sqlite_does_not_tell_is_seen(counted: DbWriter, sql: str) -> None:
    counted.run("INSERT INTO other VALUES (1)")
    with counted.watch(sql, every=0) as live:
        settle(counted, live)
        counted.run("INSERT INTO t VALUES (1)")
        assert live.next(DEADLINE) == [(1,)]


def test_an_update_of_a_column_that_it_does_not_read_wakes_no_watch(counted: DbWriter, looks: Looks) -> None:
    counted.run_script("CREATE TABLE wide (a, b); INSERT INTO wide VALUES (1, 1)")
    with counted.watch("SELECT a, look() FROM wide", every=0) as live:
        settle(counted, live)
        for n in range(2, 5):
            counted.run("UPDATE wide SET b = ?", (n,))
        settle(counted, live)
        before = looks.count
        counted.run("UPDATE wide SET b = 7")
        assert nothing_new(counted, live)
        assert looks.count == before
        counted.run("UPDATE wide SET a = 7")
        assert live.next(DEADLINE)[0][0] == 7


def test_behind_an_error_of_the_query_the_same_rows_are_given_again(table_db: DbWriter) -> None:
    with table_db.watch("SELECT count(*) FROM t") as live:
        assert live.next(DEADLINE) == [(0,)]
        table_db.run("DROP TABLE t")
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            live.next(DEADLINE)
        table_db.run("CREATE TABLE t (n)")
        assert live.next(DEADLINE) == [(0,)]


def test_a_watch_in_a_reader_does_not_wait_for_a_read_that_waits_for_its_connection(path: Path) -> None:
    with DbWriter(path, readers=1) as db, ThreadPoolExecutor() as threads:
        db.run("CREATE TABLE t (n)")
        with db.watch("SELECT n FROM t") as other:
            with db.reader():
                reading = threads.submit(other.next, DEADLINE)
                eventually(lambda: pool_of(db).waiting == 1)
                with db.watch("SELECT n FROM t") as live:
                    assert live.next(DEADLINE) == []
            assert reading.result(DEADLINE) == []


def test_its_timeout_is_for_the_wait_for_a_connection_too(one: DbWriter) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with one.reader(label="held"):
            entered.set()
            leave.wait(DEADLINE)

    async def in_a_task() -> None:
        async with AsyncDbWriter.wrap(one).watch("SELECT * FROM t") as live:
            with pytest.raises(ReadTimeoutError, match="in use, by 'held'"):
                await live.next(timeout=0.01)
            leave.set()
            assert await live.next(timeout=DEADLINE) == []

    with one.watch("SELECT * FROM t") as live, ThreadPoolExecutor() as threads:
        holding = threads.submit(hold)
        assert entered.wait(DEADLINE)
        with pytest.raises(ReadTimeoutError, match="in use, by 'held'"):
            live.next(timeout=0.01)
        asyncio.run(in_a_task())
        holding.result(DEADLINE)
        assert live.next(timeout=DEADLINE) == []


def test_a_read_that_has_begun_is_not_ended_by_its_timeout(one: DbWriter) -> None:
    def deadlines(connection: sqlite3.Connection) -> list[float]:
        return [claim.deadline for claim in pool_of(one)._lent()]

    with one.watch(deadlines) as live:
        assert live.next(timeout=DEADLINE) == [math.inf]


def test_in_a_reader_for_which_a_commit_waits_it_does_not_wait_for_that(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE") as db, db.watch(N, every=0) as live:
        db.run("CREATE TABLE t (n)")
        with db.reader(), pytest.raises(ReentrantWriteError, match=r"inside a reader\(\)"):
            live.next()
        with db.transaction(), db.reader():
            assert live.next(DEADLINE) == []
        db.run("INSERT INTO t VALUES (1)")
        assert live.next(DEADLINE) == [(1,)]


def test_in_a_reader_in_a_block_that_max_hold_has_ended_it_does_not_wait_either(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE") as db, db.watch(N, every=0) as live:
        db.run("CREATE TABLE t (n)")
        with pytest.raises(TransactionClosedError), db.transaction(max_hold=0.01) as tx, db.reader():
            eventually(lambda: tx._loan.is_closed)
            with pytest.raises(ReentrantWriteError, match=r"inside a reader\(\)"):
                live.next()
