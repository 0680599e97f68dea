"""LiveQueries: who is woken for what, and by how many calls."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

from aio_helpers import opened, run, until
from helpers import DEADLINE, core_of, drop_session, eventually, in_threads, raising
from onewriter import DbWriter, ReadTimeoutError, ReentrantWriteError, WriterClosedError
from onewriter.live.query import Caller, Known, Query
from onewriter.read.claim import new_claim
from onewriter.read.read import sql_read


def test_a_commit_wakes_each_loop_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(path) as db, asyncio.TaskGroup() as group:
            seen = [0] * 50

            async def follow(number: int) -> None:
                async with db.watch("SELECT count(*), ? FROM t", (number,), every=0) as live:
                    async for rows in live:
                        seen[number] = rows[0][0]
                        if rows[0][0]:
                            return

            for number in range(50):
                group.create_task(follow(number))
            hub = core_of(db).live
            await until(lambda: len(hub._asleep.get(("t", ""), ())) == 50)
            loop, calls = asyncio.get_running_loop(), []
            soon = loop.call_soon_threadsafe

            def counted(callback: Any, *args: Any, **options: Any) -> Any:
                if len(args) == 1 and isinstance(args[0], list) and len(args[0]) > 1:
                    calls.append(len(args[0]))
                return soon(callback, *args, **options)

            monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
            db.enqueue("INSERT INTO t VALUES (1)")
            await until(lambda: seen == [1] * 50)
            assert calls == [50]

    run(main)


def test_one_that_has_to_look_again_is_not_woken_for_each_commit(new_db: DbWriter) -> None:
    """Ten thousand writes a second cost those nothing that pause between two reads."""
    new_db.run("CREATE TABLE t (n)")
    hub = core_of(new_db).live
    with new_db.watch("SELECT n FROM t", every=3600) as live:
        live.next()
        new_db.flush()
        new_db.run("INSERT INTO t VALUES (1)")
        new_db.flush()
        assert not any(hub._asleep.values())


def test_a_query_is_stale_only_after_a_commit_that_wrote_what_it_reads(new_db: DbWriter) -> None:
    hub = core_of(new_db).live
    query = Query(sql_read("SELECT 1", (), list, None), object())
    assert hub.is_stale(query)  # it was never read
    query.known, query.as_of = Known(frozenset({("a", ""), ("a", "b")})), hub._commits
    hub._touch(frozenset({("a", "c")}))
    assert not hub.is_stale(query)
    hub._touch(frozenset({("a", "b")}))
    assert hub.is_stale(query)
    query.as_of = hub._commits
    hub._touch(None)
    assert hub.is_stale(query)
    query.as_of, query.known = hub._commits, Known()
    assert not hub.is_stale(query)
    hub._touch(frozenset({("a", "c")}))
    assert hub.is_stale(query)


def test_where_there_is_no_connection_everything_may_have_changed(new_db: DbWriter) -> None:
    hub = core_of(new_db).live
    with new_db.watch("SELECT 1") as live:
        live.next()
        query = live._entered()

        def is_fresh() -> bool:
            query.as_of = hub._commits
            return not hub.is_stale(query)

        eventually(is_fresh)  # the writer's first look comes in between, perhaps
        hub.settled(None, [])
        assert hub.is_stale(query)


def test_an_older_read_that_ends_late_takes_nothing_back(new_db: DbWriter) -> None:
    new_db.run("CREATE TABLE t (n)")
    hub = core_of(new_db).live
    with new_db.watch("SELECT n FROM t") as live:
        query = live._entered()
        older = hub.begin(query, Caller())
        found = hub.pool.use(new_claim("test"), older.alone)
        new_db.run("INSERT INTO t VALUES (1)")
        new_db.close()
        hub.finish(older, found)
        assert list(live) == [[(1,)]]


def test_what_nobody_watches_any_more_is_forgotten(new_db: DbWriter) -> None:
    new_db.run("CREATE TABLE t (n)")
    hub = core_of(new_db).live
    with new_db.watch("SELECT n FROM t") as other:
        other.next()
        with new_db.watch("SELECT n + 1 FROM t", every=0) as live:
            while True:
                try:
                    live.next(0.01)
                except TimeoutError:
                    break
            assert len(hub._queries) == 2
        assert len(hub._queries) == 1
        assert not any(hub._asleep.values())


def test_what_ran_outside_any_transaction_may_have_written_any_table(new_db: DbWriter) -> None:
    """A function that had the connection itself did: nobody was asked."""
    hub = core_of(new_db).live
    with new_db.watch("SELECT 1") as live:
        live.next()
        new_db.flush()
        before = hub._all_changed
        new_db.run("SELECT 2")
        new_db.flush()
        assert hub._all_changed == before
        new_db.run_without_transaction("SELECT 3")
        new_db.flush()
        assert hub._all_changed > before


def test_a_watch_that_could_not_be_opened_leaves_nothing(new_db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway was closed in this moment."""
    hub = core_of(new_db).live
    monkeypatch.setattr(hub, "ask", raising(WriterClosedError))
    with pytest.raises(WriterClosedError), new_db.watch("SELECT 1"):
        pass
    assert (hub._queries, hub.state.live) == ({}, None)


def test_only_the_first_watch_asks_the_writer_and_adds_a_lock(
    new_db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write asks for all locks of the gateway."""
    hub = core_of(new_db).live
    asked: list[None] = []
    monkeypatch.setattr(hub, "ask", lambda: asked.append(None))
    with new_db.watch("SELECT 1"), new_db.watch("SELECT 2"):
        assert len(asked) == 1
    with new_db.watch("SELECT 1"):
        assert len(asked) == 2
    assert hub.state.locks.count(hub.lock) == 1


def test_equal_rows_are_kept_as_they_were_so_that_nobody_compares_them_again(new_db: DbWriter) -> None:
    new_db.run("CREATE TABLE t (n)")
    new_db.run("INSERT INTO t VALUES (1)")
    with new_db.watch("SELECT n FROM t", every=0) as live:
        live.next()
        query = live._entered()
        before = query.answer
        new_db.run("UPDATE t SET n = n")
        new_db.flush()
        with pytest.raises(ReadTimeoutError):
            live.next(0)
        assert before is not None
        assert query.answer is not None
        assert query.answer.number > before.number
        assert query.answer.raw is before.raw


def test_who_leaves_takes_no_read_from_another(new_db: DbWriter) -> None:
    hub = core_of(new_db).live
    with new_db.watch("SELECT 1") as live:
        query = live._entered()
        another = in_threads(Caller)[0]
        assert isinstance(another, Caller)
        with new_db.watch("SELECT 1"), hub.lock:
            reading = hub.begin(query, another)
        assert query.read_by == another
        with hub.lock:
            hub.begin(query, another)
        hub.finish(reading, None)  # of one that was given up, late
        assert query.read_by == another
        hub.close(query, another)
        assert query.read_by is None
        query.watches += 1


def test_a_lock_in_the_way_of_the_look_is_no_news(new_db: DbWriter) -> None:
    """It looks again in a moment."""

    class Locked:
        databases = ("main",)

        def internal(self, sql: str) -> NoReturn:
            raise sqlite3.OperationalError("database is locked")

    hub = core_of(new_db).live
    before = hub._commits
    hub.look(Locked())  # type: ignore[arg-type]
    assert hub._commits == before


def test_a_finalizer_or_signal_handler_that_finds_its_lock_held_does_not_wait(new_db: DbWriter) -> None:
    """The writer may need the lock, which only the interrupted thread gives back."""
    hub = core_of(new_db).live
    with new_db.watch("SELECT 1"):
        assert not hub.state.is_inside()
        with hub.lock:
            assert hub.state.is_inside()
            with pytest.raises(ReentrantWriteError):
                new_db.run("SELECT 2")


def test_of_two_reads_at_the_same_time_the_rows_of_the_one_that_ends_first_stand(new_db: DbWriter) -> None:
    """The other's snapshot may be the older one, whichever has begun first."""
    new_db.run("CREATE TABLE t (n)")
    hub = core_of(new_db).live
    with new_db.watch("SELECT n FROM t") as live:
        query = live._entered()
        with hub.lock:
            first, second = hub.begin(query, Caller()), hub.begin(query, Caller())
        older = hub.pool.use(new_claim("test"), second.alone)
        new_db.run("INSERT INTO t VALUES (1)")
        hub.finish(first, hub.pool.use(new_claim("test"), first.alone))
        hub.finish(second, older)
        assert live.next(DEADLINE) == [(1,)]


@pytest.mark.parametrize("closes", [False, True], ids=["open", "at close"])
def test_while_the_writer_has_no_connection_commits_of_others_are_seen_too(path: Path, closes: bool) -> None:
    """As after a statement outside any transaction that has changed the journal mode of an attached file."""
    other = sqlite3.connect(path, isolation_level=None)
    with DbWriter(path) as db, contextlib.closing(other), ThreadPoolExecutor(1) as pool:
        db.run("CREATE TABLE t (n)")
        with db.watch("SELECT count(*) FROM t", every=0) as live:
            assert live.next(DEADLINE) == [(0,)]
            following = pool.submit(live.next, DEADLINE)
            eventually(lambda: core_of(db).live._asleep)
            drop_session(db)
            other.execute("INSERT INTO t VALUES (1)")
            if closes:
                db.close()
            assert following.result() == [(1,)]
