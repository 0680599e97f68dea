"""A task's ``transaction()`` block: granted, cancelled, shared with other tasks, nested, and taken back."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import sqlite3
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aio_helpers import Gate, beats, left_in_a_closed_loop, opened, rows, run, until, writer_parked
from helpers import DEADLINE, UnhelpfulError, eventually, notes_of, raising, state_of
from onewriter import (
    AsyncDbWriter,
    AsyncTransaction,
    DbWriter,
    ReadTimeoutError,
    ReentrantWriteError,
    Transaction,
    TransactionAbortedError,
    TransactionClosedError,
    WriteTimeoutError,
)
from onewriter.tasks import block as taskblock
from onewriter.tasks.savepoint import SentPart
from onewriter.write.connection import WriteConnection
from onewriter.write.loan import WriteLoan
from onewriter.write.parts import Parts

INSERT = "INSERT INTO t VALUES (?)"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
ENDLESS_WRITE = "INSERT INTO t WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
Hesitant = tuple[list[taskblock.TaskBlock], threading.Event]


@pytest.fixture
def hesitant(monkeypatch: pytest.MonkeyPatch) -> Hesitant:
    """The writer has started a block, and hesitates to grant it: the blocks it has come to, and its leave to go on."""
    blocks: list[taskblock.TaskBlock] = []
    go_on = threading.Event()
    perform = taskblock.TaskBlock.perform

    def hesitate(block: taskblock.TaskBlock, tx: WriteLoan) -> None:
        blocks.append(block)
        go_on.wait(DEADLINE)
        perform(block, tx)

    monkeypatch.setattr(taskblock.TaskBlock, "perform", hesitate)
    return blocks, go_on


def test_a_timeout_in_the_moment_a_block_starts_frees_the_writer(path: Path, hesitant: Hesitant) -> None:
    blocks, go_on = hesitant

    async def main() -> None:
        async with opened(path) as db:

            async def enter() -> None:
                async with db.transaction(timeout=0.05):
                    pytest.fail("entered")

            entering = asyncio.create_task(enter())
            await until(lambda: bool(blocks) and blocks[0].granted().done())  # its time has run out
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # and it has heard of that
            go_on.set()
            with pytest.raises(WriteTimeoutError) as caught:
                await entering
            assert caught.value.started is False
            await db.run(INSERT, (1,))
            assert await rows(db) == [1]

    run(main)


def test_a_cancellation_in_the_moment_a_block_starts_frees_the_writer(path: Path, hesitant: Hesitant) -> None:
    blocks, go_on = hesitant

    async def main() -> None:
        async with opened(path) as db:

            async def enter() -> None:
                async with db.transaction():
                    pytest.fail("entered")

            entering = asyncio.create_task(enter())
            await until(lambda: bool(blocks))
            entering.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # it waits for the end of the block now
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await entering
            await db.run(INSERT, (1,))
            assert await rows(db) == [1]

    run(main)


def test_savepoints_of_tasks_come_one_after_the_other(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, leave = asyncio.Event(), asyncio.Event()

            async def first(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    entered.set()
                    await leave.wait()

            async def second(tx: AsyncTransaction) -> None:
                await entered.wait()
                asyncio.get_running_loop().call_soon(leave.set)
                async with tx.savepoint():
                    await tx.execute(INSERT, (2,))
                    raise LookupError

            async with db.transaction() as tx:
                outcomes = await asyncio.gather(first(tx), second(tx), return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [type(None), LookupError]
            assert await rows(db) == [1]

    run(main)


def test_savepoints_of_tasks_made_in_a_savepoint_are_inside_it(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:

            async def part(tx: AsyncTransaction, n: int) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (n,))
                    async with tx.savepoint():
                        await tx.execute(INSERT, (10 * n,))
                    if n == 2:
                        raise LookupError

            async with db.transaction() as tx:
                with pytest.raises(ZeroDivisionError):
                    async with tx.savepoint():
                        await asyncio.gather(*[part(tx, n) for n in (1, 2, 3)], return_exceptions=True)
                        raise ZeroDivisionError
                assert (await tx.execute("SELECT count(*) FROM t")).fetchone() == (0,)
                await asyncio.gather(*[part(tx, n) for n in (1, 2, 3)], return_exceptions=True)
            assert await rows(db) == [1, 3, 10, 30]

    run(main)


def test_savepoints_of_two_gateways_and_of_tasks_that_outlive_theirs_do_not_meet(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, opened(path.with_name("other.db")) as other:
            ended = asyncio.Event()

            async def later(tx: AsyncTransaction) -> None:
                await ended.wait()
                async with tx.savepoint():
                    await tx.execute(INSERT, (3,))

            async def elsewhere() -> None:
                await ended.wait()
                async with other.transaction() as tx, tx.savepoint():
                    await tx.execute(INSERT, (4,))

            async with db.transaction() as tx:
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    async with other.transaction() as tx2, tx2.savepoint():
                        await tx2.execute(INSERT, (2,))
                    tasks = [asyncio.create_task(later(tx)), asyncio.create_task(elsewhere())]
                ended.set()
                await asyncio.gather(*tasks)
            assert await rows(db) == [1, 3]
            assert await rows(other) == [2, 4]

    run(main)


def test_a_savepoint_that_fails_undoes_those_inside_it_that_are_still_open(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, leave = asyncio.Event(), asyncio.Event()

            async def inside(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (2,))
                    entered.set()
                    await leave.wait()

            async with db.transaction() as tx:
                with pytest.raises(LookupError):
                    async with tx.savepoint():
                        task = asyncio.create_task(inside(tx))
                        await entered.wait()
                        raise LookupError
                leave.set()
                with pytest.raises(TransactionClosedError, match="ended with the one around it") as caught:
                    await task
                assert not notes_of(caught.value), "a note that repeats it"
                async with tx.savepoint():
                    await tx.execute(INSERT, (3,))
            assert await rows(db) == [3]

    run(main)


@pytest.mark.parametrize("outer_fails", [False, True])
@pytest.mark.parametrize("between", [0, 1])
def test_a_savepoint_that_fails_behind_the_one_around_it_says_that_it_is_not_undone(
    path: Path, outer_fails: bool, between: int
) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:

                async def inside() -> AsyncIterator[None]:
                    async with contextlib.AsyncExitStack() as stack:
                        for _ in range(between):
                            await stack.enter_async_context(tx.savepoint())
                        async with tx.savepoint():
                            await tx.execute(INSERT, (2,))
                            yield
                            await tx.execute(INSERT, (3,))
                            raise ZeroDivisionError

                generator = inside()
                with contextlib.suppress(LookupError):
                    async with tx.savepoint():
                        await tx.execute(INSERT, (1,))
                        await anext(generator)
                        if outer_fails:
                            raise LookupError
                with pytest.raises(TransactionClosedError, match="ended with the one around it") as caught:
                    await anext(generator)
                assert isinstance(caught.value.__cause__, ZeroDivisionError)
                assert not notes_of(caught.value), "a note that repeats it"
            assert await rows(db) == ([3] if outer_fails else [1, 2, 3])

    run(main)


def test_a_savepoint_that_fails_inside_one_of_a_block_that_is_over_gives_its_error(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:

            async def inside(tx: AsyncTransaction) -> AsyncIterator[None]:
                async with tx.savepoint():
                    yield
                    raise ZeroDivisionError

            with pytest.raises(LookupError):
                async with db.transaction() as tx, tx.savepoint():
                    generator = inside(tx)
                    await anext(generator)
                    raise LookupError
            with pytest.raises(ZeroDivisionError):  # all of it is undone
                await anext(generator)

    run(main)


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_savepoint_of_another_task_that_fails_says_whether_it_ended_with_the_outermost(
    path: Path, has_begun: bool
) -> None:
    async def main() -> None:
        async with opened(path) as db:
            outcomes: list[str] = []

            async def inside(tx: AsyncTransaction, entered: asyncio.Event, leave: asyncio.Event) -> None:
                async with tx.savepoint():
                    if not has_begun:
                        entered.set()
                        await leave.wait()
                    try:
                        async with tx.savepoint():
                            await tx.execute(INSERT, (1,))
                            if has_begun:
                                entered.set()
                                await leave.wait()
                            await tx.execute(INSERT, (2,))
                            raise ZeroDivisionError
                    except (ZeroDivisionError, TransactionClosedError) as error:
                        outcomes.append(type(error).__name__)

            async with db.transaction() as tx:
                entered, leave = asyncio.Event(), asyncio.Event()
                with pytest.raises(LookupError):
                    async with tx.savepoint():
                        task = asyncio.create_task(inside(tx, entered, leave))
                        await entered.wait()
                        raise LookupError
                leave.set()
                with pytest.raises(TransactionClosedError):
                    await task
            assert outcomes == ["TransactionClosedError" if has_begun else "ZeroDivisionError"]
            assert await rows(db) == ([2] if has_begun else [])

    run(main)


def test_a_savepoint_that_is_cancelled_behind_the_one_around_it_says_so_once(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.transaction() as tx:

            async def inside() -> AsyncIterator[None]:
                async with tx.savepoint():
                    yield
                    raise asyncio.CancelledError

            generator = inside()
            async with tx.savepoint():
                await anext(generator)
            with pytest.raises(asyncio.CancelledError) as caught:
                await anext(generator)
            await tx.execute("SELECT 1")  # behind its end
            assert notes_of(caught.value).count("was not undone") == 1

    run(main)


def test_a_savepoint_that_fails_does_not_wait_until_it_is_undone(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.transaction() as tx:
            gate = threading.Event()
            with pytest.raises(LookupError):
                async with tx.savepoint():
                    tx._block.send(gate.wait, DEADLINE)
                    timer = asyncio.get_running_loop().call_later(1, gate.set)
                    raise LookupError
            assert not gate.is_set()
            timer.cancel()
            gate.set()

    run(main)


def test_a_task_that_waits_for_its_savepoint_is_told_when_the_block_ends(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            waiting: list[asyncio.Task[None]] = []

            async def late(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    pytest.fail("entered")

            with pytest.raises(LookupError):
                async with db.transaction() as tx:
                    waiting += [asyncio.create_task(late(tx)) for _ in range(2)]
                    async with tx.savepoint():
                        await until(lambda: len(tx._block._changes) == 2)
                        raise LookupError
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [TransactionClosedError] * 2
            await db.run(INSERT, (1,))
            assert await rows(db) == [1]

    run(main)


def test_a_savepoint_whose_task_is_cancelled_at_its_end_is_undone_or_kept_as_a_whole(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            called: list[str] = []
            gate = threading.Event()

            async def part(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (2,))
                    tx.on_commit(lambda: called.append("part"))
                    tx._block.send(gate.wait, DEADLINE)  # so that the end has to wait

            async with db.transaction() as tx:
                tx.on_commit(lambda: called.append("outer"))
                await tx.execute(INSERT, (1,))
                working = asyncio.create_task(part(tx))
                await until(lambda: tx._block._requests.qsize() > 0)
                working.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await working
                gate.set()
                await tx.execute(INSERT, (3,))
            assert await rows(db) == [1, 3]
            assert called == ["outer"]

    run(main)


def test_a_callback_for_a_block_that_ends_is_refused_and_does_no_harm(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                await tx.execute(INSERT, (1,))
                ending = tx._block
            with pytest.raises(TransactionClosedError):
                tx.on_commit(print)
            assert ending.failed_with is None

            gate = threading.Event()
            async with db.transaction() as tx:
                tx._block.send(gate.wait, DEADLINE)
                tx._block.give_back(failed=False)
                with pytest.raises(TransactionClosedError):
                    tx.on_commit(print)
                gate.set()
            assert await rows(db) == [1]

    run(main)


def test_a_nested_block_that_is_over_is_dead_though_the_outer_one_lives(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.transaction() as outer:
            async with db.transaction() as inner:
                await inner.execute(INSERT, (1,))
            with pytest.raises(TransactionClosedError, match="has ended"):
                await inner.execute(INSERT, (2,))
            await outer.execute(INSERT, (3,))

    run(main)


def test_an_error_in_a_block_that_was_dealt_with_is_gone_at_once(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.transaction() as tx:
            try:
                await tx.execute("SELECT * FROM nowhere")
            except sqlite3.OperationalError as error:
                gone = weakref.ref(error)
            await tx.execute("SELECT 1")  # the writer has let it go
            assert gone() is None

    gc.collect()
    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


def test_a_block_that_is_cancelled_is_rolled_back_and_its_statement_ends(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            undone: list[str] = []
            for statement in (ENDLESS, ENDLESS_WRITE):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05), db.transaction() as tx:
                        tx.on_rollback(lambda: undone.append("undone"))
                        await tx.execute(INSERT, (1,))
                        await tx.execute(statement)
                await db.run(INSERT, (2,))
            assert await rows(db) == [2, 2]
            assert undone == ["undone", "undone"]
            with pytest.raises(TransactionClosedError):
                await tx.execute("SELECT 1")

    run(main)


def test_a_cancellation_during_commit_comes_after_it_and_says_what_became_of_it(path: Path) -> None:
    async def main() -> None:
        async with opened(path, journal_mode="DELETE") as db:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:

                async def block() -> None:
                    async with db.transaction() as tx:
                        await tx.execute(INSERT, (1,))
                        other.execute("BEGIN")
                        other.execute("SELECT * FROM t").fetchall()  # COMMIT waits for this reader

                task = await beats(20, block())
                while db.stats().waiting_for_lock is None:  # COMMIT has met the reader
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.sleep(0.005)
                assert not task.done()
                other.execute("ROLLBACK")
                with pytest.raises(asyncio.CancelledError) as caught:
                    await task
                assert any("was committed" in note for note in getattr(caught.value, "__notes__", []))
            assert await rows(db) == [1]

    run(main)


def test_calls_written_in_a_block_belong_to_it_wherever_they_are_awaited(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:

            async def other() -> list[Any]:
                return await rows(db)

            with pytest.raises(LookupError):
                async with db.transaction() as tx:
                    assert isinstance(tx, AsyncTransaction)
                    await tx.execute(INSERT, (1,))
                    await asyncio.gather(db.run(INSERT, (2,)), db.run_many(INSERT, [(3,)]))
                    await asyncio.wait_for(db.run(INSERT, (4,)), DEADLINE)
                    await asyncio.create_task(db.run_script("INSERT INTO t VALUES (5)"))
                    assert await asyncio.wait_for(db.read_value("SELECT count(*) FROM t"), DEADLINE) == 5
                    assert await rows(db) == [1, 2, 3, 4, 5]
                    assert await asyncio.create_task(other()) == []  # a child's own calls do not
                    assert db.in_writer()
                    later = db.enqueue(INSERT, (6,))
                    raise LookupError
            await later
            assert not db.in_writer()
            assert await rows(db) == [6]

    run(main)


def test_blocks_nest_as_savepoints(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            called: list[str] = []
            async with db.transaction() as outer:
                outer.on_commit(lambda: called.append("outer"))
                await outer.execute(INSERT, (1,))
                with pytest.raises(LookupError):
                    async with db.transaction() as inner:
                        inner.on_commit(lambda: called.append("inner"))
                        inner.on_rollback(lambda: called.append("inner undone"))
                        await inner.execute(INSERT, (2,))
                        async with inner.savepoint():
                            await inner.executemany(INSERT, [(3,)])
                        raise LookupError
                async with outer.savepoint():
                    await outer.executescript("INSERT INTO t VALUES (4); INSERT INTO t VALUES (5);")
                with pytest.raises(sqlite3.OperationalError):
                    await db.run("INSERT INTO nowhere VALUES (1)")
                assert outer.label == "transaction"
                with pytest.raises(TypeError):
                    outer.on_commit(1)  # type: ignore[arg-type]
                assert called == []
            assert called == ["inner undone", "outer"]
            assert await rows(db) == [1, 4, 5]

    run(main)


def test_a_block_whose_transaction_is_lost_says_so_at_its_end(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            await db.run("CREATE UNIQUE INDEX i ON t (n)")
            await db.run(INSERT, (1,))
            with pytest.raises(TransactionAbortedError):
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (2,))
                    with pytest.raises(sqlite3.IntegrityError):
                        await tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
            assert await rows(db) == [1]

    run(main)


def test_tasks_that_share_a_transaction_are_served_one_after_the_other(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                await asyncio.gather(*[asyncio.create_task(tx.execute(INSERT, (n,))) for n in range(50)])
            assert await rows(db) == list(range(50))

    run(main)


def test_waits_that_a_block_makes_endless_raise_at_once(path: Path) -> None:
    async def main() -> None:
        async with opened(path):
            pass
        with DbWriter(path) as inner:
            db = AsyncDbWriter.wrap(inner)
            async with db.transaction() as tx:
                ticket = db.enqueue(INSERT, (1,))
                for call in (
                    lambda: db.flush(),
                    lambda: db.close(),
                    lambda: db.checkpoint(),
                    lambda: db.backup(path.parent / "copy.db"),
                    lambda: db.run_without_transaction("VACUUM"),
                    lambda: db.read("SELECT 1", after=ticket),
                    lambda: db.run(lambda tx: None, foreign_keys=False),
                    lambda: ticket,
                ):
                    with pytest.raises(ReentrantWriteError):
                        await call()
                for blocking in (lambda: inner.run(INSERT, (2,)), inner.flush, inner.close, ticket.result):
                    with pytest.raises(ReentrantWriteError):
                        blocking()
                await tx.execute(INSERT, (3,))
            await ticket
            assert await rows(db) == [1, 3]

    run(main)


def test_in_a_block_nothing_waits_for_room(path: Path) -> None:
    async def main() -> None:
        async with opened(path, maxsize=1) as db:
            async with db.transaction():
                tickets = [db.enqueue(INSERT, (n,)) for n in range(3)]
                tickets += [await db.enqueue_wait(INSERT, (n,)) for n in range(3, 6)]
            await asyncio.gather(*tickets)
            assert await rows(db) == [0, 1, 2, 3, 4, 5]

    run(main)


def test_a_block_that_holds_too_long_is_taken_back(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            for statement in (None, ENDLESS, ENDLESS_WRITE):
                with pytest.raises(TransactionClosedError, match="max_hold"):
                    async with db.transaction(max_hold=0.05) as tx:
                        await tx.execute(INSERT, (1,))
                        if statement:
                            await tx.execute(statement)
                        else:
                            await db.enqueue_wait(INSERT, (2,))
                            until = asyncio.get_running_loop().time() + DEADLINE
                            while not tx._block.done() and asyncio.get_running_loop().time() < until:
                                await asyncio.sleep(0.005)
            assert await rows(db) == [2]

    run(main)


def test_a_block_whose_task_has_ended_is_used_and_left_by_another_or_collected(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            left: list[Any] = []

            async def leave_open(n: int) -> None:
                block = db.transaction()
                left.append((block, await block.__aenter__()))
                await left[-1][1].execute(INSERT, (n,))

            await asyncio.create_task(leave_open(1))
            waits = asyncio.create_task(db.run(INSERT, (3,)))
            block, tx = left.pop()
            await tx.execute(INSERT, (2,))
            assert not waits.done()
            await block.__aexit__(None, None, None)
            await waits
            assert await rows(db) == [1, 2, 3]

            await asyncio.create_task(leave_open(4))
            left.clear()  # nobody can leave it any more
            await db.run(INSERT, (5,))
            assert await rows(db) == [1, 2, 3, 5]

    run(main)


@pytest.mark.parametrize("statement", [False, True])
def test_a_callback_of_a_block_that_fails_at_once_is_called(path: Path, statement: bool) -> None:
    async def main() -> None:
        async with opened(path) as db:
            for _ in range(20):
                called: list[str] = []
                with pytest.raises(LookupError):
                    async with db.transaction() as tx:
                        if statement:
                            await tx.execute(INSERT, (1,))
                        tx.on_rollback(lambda called=called: called.append("rollback"))  # type: ignore[misc]
                        tx.on_commit(lambda called=called: called.append("commit"))  # type: ignore[misc]
                        raise LookupError
                assert called == ["rollback"]
            with pytest.raises(TransactionClosedError):
                tx.on_rollback(print)

    run(main)


def test_a_statement_that_was_cancelled_before_its_turn_does_not_run(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, release = threading.Event(), threading.Event()

            def hold(tx: Transaction) -> None:
                entered.set()
                release.wait(DEADLINE)

            async with db.transaction() as tx:
                first = asyncio.create_task(db.run(hold))
                await asyncio.to_thread(entered.wait, DEADLINE)
                second = asyncio.create_task(tx.execute(INSERT, (1,)))
                await asyncio.sleep(0)
                second.cancel()
                await asyncio.wait([second])
                release.set()
                await first
            assert await rows(db) == []

    run(main)


def test_a_cancellation_in_the_moment_of_the_grant_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taskblock, "LOOK", 3600.0)  # the writer does not notice by itself
    may_end, roll_back = threading.Event(), WriteConnection.roll_back

    def late(connection: WriteConnection) -> None:
        may_end.wait(DEADLINE)
        roll_back(connection)

    async def main() -> None:
        async with opened(path) as db:
            monkeypatch.setattr(WriteConnection, "roll_back", late)

            async def block() -> None:
                async with db.transaction():
                    pytest.fail("entered")

            async with writer_parked(db) as release:
                task = asyncio.create_task(block())
                await asyncio.sleep(0)
                release.set()
                while getattr(state_of(db).job, "transaction", None) is None:  # granted: the loop does not know
                    pass
                task.cancel()
                asyncio.get_running_loop().call_later(0.05, may_end.set)
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert may_end.is_set()  # it has waited until the writer is free
            await db.run(INSERT, (1,))
            assert await rows(db) == [1]

    run(main)


def test_a_cancellation_while_a_failed_block_is_rolled_back_is_not_lost(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, release = threading.Event(), threading.Event()

            def hold(tx: Transaction) -> None:
                entered.set()
                release.wait(DEADLINE)

            async def block() -> None:
                async with db.transaction():
                    holding.append(asyncio.create_task(db.run(hold)))
                    await asyncio.to_thread(entered.wait, DEADLINE)
                    raise LookupError

            holding: list[asyncio.Task[None]] = []
            task = asyncio.create_task(block())
            await asyncio.to_thread(entered.wait, DEADLINE)
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.sleep(0.01)
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait(holding)
            await db.run(INSERT, (1,))

    run(main)


def test_what_is_sent_while_the_block_is_taken_back_is_answered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    async def main() -> None:
        async with opened(path) as db:
            closed_error = WriteLoan.closed_error

            def send_one_more(loan: WriteLoan) -> Any:
                if not answered.is_set() and threading.get_ident() == state_of(db).writer_thread:
                    tx._block.send(answered.set)
                return closed_error(loan)

            with pytest.raises(TransactionClosedError):
                async with db.transaction(max_hold=0.02) as tx:
                    monkeypatch.setattr(WriteLoan, "closed_error", send_one_more)
                    await asyncio.to_thread(answered.wait, DEADLINE)
            assert answered.is_set()

    run(main)


def test_a_block_whose_task_thinks_for_long_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskblock, "LOOK", 0.001)

    async def main() -> None:
        async with opened(path) as db:
            looks = asyncio.Semaphore(0)
            loop, holder = asyncio.get_running_loop(), state_of(db)
            monkeypatch.setattr(holder, "warn_if_slow", lambda now: loop.call_soon_threadsafe(looks.release))
            async with db.transaction() as tx:
                for _ in range(5):
                    await looks.acquire()
                await tx.execute(INSERT, (1,))
            assert await rows(db) == [1]

    run(main)


def test_what_a_block_refuses_is_named(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.transaction():
            with pytest.raises(ReentrantWriteError, match=r"^foreign_keys="):
                await db.run(lambda tx: None, foreign_keys=False)
            with pytest.raises(ReentrantWriteError, match=r"^flush"):
                await db.flush()
            with pytest.raises(ReentrantWriteError, match=r"^checkpoint"):
                await db.checkpoint()

    run(main)


def test_a_nested_call_that_fails_is_undone_alone(path: Path) -> None:
    def write_and_fail(tx: Transaction) -> None:
        tx.execute(INSERT, (2,))
        raise LookupError

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                await tx.execute(INSERT, (1,))
                with pytest.raises(LookupError):
                    await db.run(write_and_fail)
            assert await rows(db) == [1]

    run(main)


def test_a_thread_waits_for_the_block_of_a_task_unless_it_is_the_thread_of_its_loop(path: Path) -> None:
    with DbWriter(path) as inner:
        shared, entered, free = AsyncDbWriter.wrap(inner), threading.Event(), threading.Event()

        async def hold() -> None:
            async with shared.transaction():
                entered.set()
                while not free.is_set():
                    await asyncio.sleep(0.01)

        async def write() -> None:
            with pytest.raises(WriteTimeoutError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it blocks the loop
                inner.run("SELECT 1", timeout=0.01)

        with ThreadPoolExecutor(1) as pool:
            holding = pool.submit(asyncio.run, hold())
            assert entered.wait(DEADLINE)
            try:
                asyncio.run(write())
            finally:
                free.set()
            holding.result(DEADLINE)


def test_a_block_that_was_left_by_an_error_says_so_afterwards(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            with pytest.raises(LookupError):
                async with db.transaction() as tx:
                    raise LookupError
            with pytest.raises(TransactionClosedError, match="was left by an error"):
                await tx.execute("SELECT 1")
            async with db.transaction() as tx:
                pass
            with pytest.raises(TransactionClosedError, match="has ended"):
                await tx.execute("SELECT 1")

    run(main)


@pytest.mark.parametrize("block", [AsyncDbWriter.reader, AsyncDbWriter.transaction])
def test_a_read_in_a_block_that_another_task_uses_is_given_up_in_time_and_never_runs(
    path: Path, block: Callable[[AsyncDbWriter], Any]
) -> None:
    gate = Gate()
    called: list[str] = []

    async def main() -> None:
        async with opened(path, on_connect=gate.on_connect) as db, block(db) as shared:
            other = asyncio.create_task(shared.execute("SELECT gate()"))
            await until(gate.entered.is_set)
            with pytest.raises(ReadTimeoutError, match="used by another task"):
                await db.read(lambda connection: called.append("late"), timeout=0.01)
            gate.open.set()
            assert (await other).fetchall() == [(1,)]
            await db.read(lambda connection: called.append("in time"), timeout=DEADLINE)
            await db.read(lambda connection: called.append("whenever"), timeout=None)
            assert called == ["in time", "whenever"]

    run(main)


@pytest.mark.parametrize("call", ["run", "read", "transaction"])
def test_inside_a_tasks_block_that_max_hold_has_ended_the_gateways_calls_raise_too(path: Path, call: str) -> None:
    async def main() -> list[Any]:
        async with AsyncDbWriter(path) as db:
            await db.run("CREATE TABLE t (n)")

            async def other() -> None:
                await db.run(INSERT, (4,))

            async def enter() -> None:
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (2,))

            calls: dict[str, Callable[[], Any]] = {
                "run": lambda: db.run(INSERT, (2,)),
                "read": lambda: db.read("SELECT * FROM t"),
                "transaction": enter,
            }
            with pytest.raises(TransactionClosedError, match="max_hold"):
                async with db.transaction(max_hold=0.01):
                    while db.in_writer():
                        await asyncio.sleep(0.001)
                    with pytest.raises(TransactionClosedError, match="max_hold"):
                        await calls[call]()
                    ticket = db.enqueue(INSERT, (3,))  # no part of the block
                    await asyncio.create_task(other())  # nor is another task
            await db.run(INSERT, (5,))
            assert ticket.done()
            return await db.read("SELECT n FROM t")

    assert asyncio.run(main()) == [(3,), (4,), (5,)]


def test_rollback_undoes_what_a_task_has_done_so_far(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            await db.run("CREATE TABLE t (n)")
            async with db.transaction() as tx:
                await tx.execute(INSERT, (1,))
                await tx.rollback()
                await tx.execute(INSERT, (2,))
                async with tx.savepoint():
                    await tx.execute(INSERT, (3,))
                    await tx.rollback()
            assert await db.read("SELECT n FROM t") == [(2,)]
            with pytest.raises(TransactionClosedError):
                await tx.rollback()

    asyncio.run(main())


@pytest.mark.parametrize("is_inside_another", [False, True])
def test_a_cancellation_behind_the_end_of_a_savepoint_says_that_it_is_kept(path: Path, is_inside_another: bool) -> None:
    gate = Gate()

    async def main() -> None:
        async with opened(path, on_connect=gate.on_connect) as db:

            async def part(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    tx._block.send(gate._wait)  # so that its end waits
                    await until(gate.entered.is_set)
                    tx._block.send(lambda: loop.call_soon_threadsafe(task.cancel))

            async def outer(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await part(tx)

            loop = asyncio.get_running_loop()
            async with db.transaction() as tx:
                task = asyncio.create_task(outer(tx) if is_inside_another else part(tx))
                await until(gate.entered.is_set)
                await until(lambda: tx._block._requests.qsize() == 2)
                with ThreadPoolExecutor(1) as threads:  # opens it while the loop stands still: the end comes before
                    threads.submit(gate.open.set)
                    await_done = threads.submit(eventually, lambda: not tx._block._requests.qsize())
                    await_done.result(DEADLINE)
                with pytest.raises(asyncio.CancelledError) as cancelled:
                    await task
            notes = notes_of(cancelled.value)
            assert "what it has done stays in its transaction" in notes
            assert ("does no more" in notes) is is_inside_another
            assert await rows(db) == ([] if is_inside_another else [1])

    run(main)


def test_a_savepoint_that_cannot_be_kept_is_undone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parts, "end", raising(LookupError))

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                await tx.execute(INSERT, (1,))
                with pytest.raises(LookupError):
                    async with tx.savepoint():
                        await tx.execute(INSERT, (2,))
            assert await rows(db) == [1]

    run(main)


def test_a_cancellation_while_a_savepoint_cannot_be_kept_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def keep(part: object) -> None:
        begun.set()
        go_on.wait(DEADLINE)
        raise LookupError("no room")

    monkeypatch.setattr(SentPart, "keep", keep)

    async def main() -> None:
        async with opened(path) as db:

            async def part(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    pass

            async with db.transaction() as tx:
                task = asyncio.create_task(part(tx))
                await until(begun.is_set)
                task.cancel()
                await asyncio.sleep(0)
                go_on.set()
                with pytest.raises(asyncio.CancelledError) as cancelled:
                    await task
            assert "the savepoint could not be kept: LookupError('no room')" in notes_of(cancelled.value)

    run(main)


@pytest.mark.parametrize("error", [None, LookupError(), asyncio.CancelledError()], ids=["well", "failed", "cancelled"])
def test_who_is_in_a_savepoint_as_its_block_is_left_is_told_that_it_is_kept(
    path: Path, error: BaseException | None
) -> None:
    async def main() -> None:
        async with opened(path) as db:
            entered, leave = asyncio.Event(), asyncio.Event()

            async def part(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    entered.set()
                    await leave.wait()
                    if error is not None:
                        raise error

            async with db.transaction() as tx:
                task = asyncio.create_task(part(tx))
                await entered.wait()
            leave.set()
            expected = asyncio.CancelledError if isinstance(error, asyncio.CancelledError) else TransactionClosedError
            with pytest.raises(expected) as told:
                await task
            assert isinstance(error, asyncio.CancelledError) is ("was not undone" in notes_of(told.value))
            assert await rows(db) == [1]

    run(main)


def test_who_is_in_a_savepoint_as_its_block_fails_gets_the_error_alone(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            await db.run("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
            await db.run("CREATE TABLE child (id REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
            entered, leave = asyncio.Event(), asyncio.Event()

            async def part(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute("INSERT INTO child VALUES (1)")
                    entered.set()
                    await leave.wait()
                    raise LookupError

            with pytest.raises(sqlite3.IntegrityError):
                async with db.transaction() as tx:
                    task = asyncio.create_task(part(tx))
                    await entered.wait()
            leave.set()
            with pytest.raises(LookupError):
                await task

    run(main)


def test_a_savepoint_that_fails_as_its_block_is_left_while_the_writer_is_busy_says_that_it_is_kept(path: Path) -> None:
    gate = Gate()

    async def main() -> None:
        async with opened(path, on_connect=gate.on_connect) as db:
            leave = asyncio.Event()

            async def part(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    tasks.append(asyncio.create_task(tx.execute("SELECT gate()")))
                    await leave.wait()
                    raise LookupError

            async def block() -> None:
                async with db.transaction() as tx:
                    blocks.append(tx._block)
                    tasks.append(asyncio.create_task(part(tx)))
                    await until(gate.entered.is_set)

            tasks: list[asyncio.Task[Any]] = []
            blocks: list[taskblock.TaskBlock] = []
            leaving = asyncio.create_task(block())
            await until(lambda: bool(blocks) and blocks[0].is_given_back)
            with pytest.raises(TransactionClosedError, match="has ended"):
                await blocks[0].call(int)
            leave.set()
            with pytest.raises(TransactionClosedError):
                await tasks[0]
            gate.open.set()
            await leaving
            await asyncio.gather(tasks[1], return_exceptions=True)
            assert await rows(db) == [1]

    run(main)


def test_a_block_that_is_cancelled_as_it_is_left_ends_the_statement_of_another_task(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            tasks: list[asyncio.Task[Any]] = []

            async def leave() -> None:
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (1,))
                    tasks.append(asyncio.create_task(tx.execute(ENDLESS)))
                    await until(lambda: tx._block.transaction is not None and bool(tx._block.transaction._inside))

            leaving = await beats(20, leave())
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            with pytest.raises(TransactionClosedError):
                await tasks[0]
            assert await rows(db) == []

    run(main)


def test_a_savepoint_whose_task_is_collected_with_its_closed_loop_keeps_no_other_from_its_own(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db, db.transaction() as tx:
            entered = threading.Event()

            async def part() -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    entered.set()
                    await asyncio.Event().wait()

            await asyncio.to_thread(lambda: left_in_a_closed_loop(part(), entered.is_set) and None)  # nobody keeps it
            gc.collect()
            async with tx.savepoint():
                await tx.execute(INSERT, (2,))
            assert (await tx.execute("SELECT n FROM t")).rows == [(2,)]

    run(main)


def test_a_savepoint_that_a_task_of_another_loop_opens_in_the_same_moment_comes_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[taskblock.TaskSavepoint] = []
    until_innermost = taskblock.TaskBlock.until_innermost

    async def too_late(self: taskblock.TaskBlock, outer: taskblock.TaskSavepoint | None) -> None:
        await until_innermost(self, outer)
        if not others:
            self.innermost = other = taskblock.TaskSavepoint(self)
            other._task = None  # not this one's
            others.append(other)
            asyncio.get_running_loop().call_later(0.01, self.leave, other)

    async def main() -> None:
        async with opened(path) as db, db.transaction() as tx:
            monkeypatch.setattr(taskblock.TaskBlock, "until_innermost", too_late)
            async with tx.savepoint():
                assert [other.is_open for other in others] == [False]

    run(main)


def test_a_savepoint_whose_loop_is_closed_as_its_statement_runs_keeps_no_other_from_its_own(path: Path) -> None:
    gate = Gate()

    async def main() -> None:
        async with opened(path, on_connect=gate.on_connect) as db, db.transaction() as tx:

            async def part() -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    await tx.execute("SELECT gate()")

            await asyncio.to_thread(lambda: left_in_a_closed_loop(part(), gate.entered.is_set) and None)
            gate.open.set()
            loan = tx._block.lends()
            await until(lambda: not loan._inside)
            gc.collect()
            async with tx.savepoint():
                await tx.execute(INSERT, (2,))
            assert (await tx.execute("SELECT n FROM t")).rows == [(2,)]

    run(main)


def test_a_callback_behind_a_savepoint_that_has_failed_is_not_in_it(db: DbWriter) -> None:
    """The task goes on before the writer thread has undone it."""
    told: list[str] = []

    async def main() -> None:
        db.run("CREATE TABLE t (n)")
        async with AsyncDbWriter.wrap(db) as tasks_db, tasks_db.transaction() as tx:
            for part in (tx.savepoint, tasks_db.transaction):
                with contextlib.suppress(LookupError):
                    async with part():
                        await tx.execute(INSERT, (1,))
                        tx.on_commit(lambda: told.append("of the part"))
                        raise LookupError
                tx.on_commit(lambda: told.append("behind it"))

    run(main)
    assert told == ["behind it"] * 2
    assert db.read("SELECT * FROM t") == []


def test_a_savepoint_that_is_cancelled_while_a_function_runs_in_it_is_undone_with_all_of_that(path: Path) -> None:
    """Not at once: what the function writes next would be in no savepoint."""
    told: list[str] = []
    entered, go_on = threading.Event(), threading.Event()

    def function(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        entered.set()
        go_on.wait(DEADLINE)
        tx.on_commit(lambda: told.append("of the function"))
        tx.execute(INSERT, (2,))

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                await tx.execute(INSERT, (0,))

                async def part() -> None:
                    async with tx.savepoint():
                        await db.run(function)

                running = asyncio.create_task(part())
                await until(entered.is_set)
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
                tx.on_commit(lambda: told.append("behind it"))
                go_on.set()
                await tx.execute(INSERT, (3,))
            assert await rows(db) == [0, 3]

    run(main)
    assert told == ["behind it"]


def test_callbacks_of_a_block_that_fails_at_once_are_called(db: DbWriter) -> None:
    told: list[str] = []

    async def main() -> None:
        with contextlib.suppress(LookupError):
            async with AsyncDbWriter.wrap(db) as tasks_db, tasks_db.transaction() as tx:
                tx.on_commit(lambda: told.append("committed"))
                tx.on_rollback(lambda: told.append("rolled back"))
                raise LookupError

    run(main)
    assert told == ["rolled back"]


def test_a_savepoint_of_a_nested_block_that_another_task_has_left_is_kept(path: Path) -> None:
    """The block's end waits for it."""

    async def main() -> None:
        async with opened(path) as db, db.transaction():
            nested, go_on = asyncio.Event(), asyncio.Event()

            async def use(tx: AsyncTransaction) -> None:
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    nested.set()
                    await go_on.wait()

            async with db.transaction() as inner:
                using = asyncio.create_task(use(inner))
                await nested.wait()
                asyncio.get_running_loop().call_later(0.01, go_on.set)
            await using
        async with AsyncDbWriter(path) as db:
            assert await rows(db) == [1]

    run(main)


def test_a_callback_is_refused_after_sqlite_has_rolled_back_by_itself(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            await db.run("CREATE UNIQUE INDEX i ON t (n)")
            with pytest.raises(TransactionAbortedError):
                async with db.transaction() as tx:
                    await tx.execute(INSERT, (1,))
                    with pytest.raises(sqlite3.IntegrityError):
                        await tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
                    for keep in (tx.on_commit, tx.on_rollback):
                        with pytest.raises(TransactionAbortedError):
                            keep(list)

    run(main)


def test_a_callback_that_a_function_keeps_by_the_tasks_transaction_is_its_own(db: DbWriter) -> None:
    told: list[str] = []

    async def main() -> None:
        async with AsyncDbWriter.wrap(db) as tasks_db, tasks_db.transaction() as tx:

            def fail(inner: Transaction) -> None:
                tx.on_commit(lambda: told.append("of what failed"))
                raise LookupError

            with pytest.raises(LookupError):
                await tasks_db.run(fail)
            tx.on_commit(lambda: told.append("of the task"))

    run(main)
    assert told == ["of the task"]


def test_of_a_block_that_fails_inside_a_savepoint_the_callbacks_of_that_come_first(path: Path) -> None:
    told: list[str] = []
    gate = Gate()

    async def main() -> None:
        async with opened(path, on_connect=gate.on_connect) as db:
            with contextlib.suppress(LookupError):
                async with db.transaction() as tx:
                    tx.on_rollback(lambda: told.append("outer"))
                    async with tx.savepoint():
                        tx.on_rollback(lambda: told.append("inner"))
                        busy = asyncio.create_task(tx.execute("SELECT gate()"))
                        await until(gate.entered.is_set)
                        asyncio.get_running_loop().call_later(0.01, gate.open.set)
                        raise LookupError  # the block has failed before the writer comes to the savepoint
            with contextlib.suppress(sqlite3.OperationalError, TransactionClosedError):
                await busy

    run(main)
    assert told == ["inner", "outer"]


def test_a_block_whose_savepoint_could_not_be_undone_since_max_hold_was_over_is_rolled_back(path: Path) -> None:
    """The savepoint is left in time, and the writer thread comes to it late."""

    async def main() -> None:
        async with opened(path) as db:
            with pytest.raises(TransactionClosedError, match="longer than max_hold"):
                async with db.transaction(max_hold=DEADLINE) as tx:
                    with contextlib.suppress(LookupError):
                        async with tx.savepoint():
                            await tx.execute(INSERT, (1,))
                            tx._transaction._until = 0.0
                            raise LookupError
            assert await rows(db) == []

    run(main)


def test_a_block_in_which_a_refusal_for_max_hold_was_caught_is_rolled_back(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            with pytest.raises(TransactionClosedError, match="longer than max_hold"):
                async with db.transaction(max_hold=DEADLINE) as tx:
                    await tx.execute(INSERT, (1,))
                    tx._transaction._until = 0.0
                    with contextlib.suppress(TransactionClosedError):
                        await tx.execute(INSERT, (2,))
            assert await rows(db) == []

    run(main)


@pytest.mark.parametrize("is_nested", [True, False], ids=["block", "savepoint"])
def test_an_unhelpful_exception_comes_out_of_a_savepoint_as_it_is(path: Path, is_nested: bool) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                try:  # not pytest.raises: pytest cannot show one that has this in its context
                    async with db.transaction() if is_nested else tx.savepoint():
                        await tx.execute(INSERT, (1,))
                        raise UnhelpfulError
                except Exception as error:
                    came = type(error)
                await tx.execute(INSERT, (2,))
            assert (came, await rows(db)) == (UnhelpfulError, [2])

    run(main)


def test_who_waits_for_the_innermost_savepoint_looks_again_under_the_lock(path: Path) -> None:
    class Block(SimpleNamespace):
        """As whose end comes just before the lock is acquired."""

        def __enter__(self) -> None:
            self._accepts = False

        def __exit__(self, *_: object) -> None:
            pass

    async def main() -> None:
        innermost = SimpleNamespace(outer=None, is_mine=lambda: False, is_open=True)
        block = Block(innermost=innermost, _accepts=True, _changes=[])
        is_turn_of: Any = taskblock.TaskBlock._is_turn_of
        block._lock, block._is_turn_of = block, functools.partial(is_turn_of, block)
        async with asyncio.timeout(DEADLINE):
            await taskblock.TaskBlock.until_innermost(block, None)  # type: ignore[arg-type]
        assert block._changes == []

    run(main)
