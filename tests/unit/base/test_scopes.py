"""What a call acts on: who is inside an open job, block or reader, told by context, thread and task."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, eventually, in_threads, parked
from onewriter import (
    AsyncDbWriter,
    DbWriter,
    ReentrantWriteError,
    Transaction,
    TransactionClosedError,
    WriteTimeoutError,
)
from onewriter.base import scopes

INSERT = "INSERT INTO t VALUES (?)"
COUNT = "SELECT count(*) FROM t"
INSIDE, OUTSIDE, REFUSED, CLOSED = "inside", "outside", "refused", "closed"


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path) as gateway:
        gateway.run("CREATE TABLE t (n)")
        yield gateway


@contextlib.contextmanager
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def outcome(call: Callable[[], object]) -> str:
    """What became of a call while a block holds the writer."""
    try:
        result = call()
    except WriteTimeoutError as error:
        return OUTSIDE if not error.started else "started"
    except ReentrantWriteError:
        return REFUSED
    except TransactionClosedError:
        return CLOSED
    return INSIDE if result != 0 else OUTSIDE


def enter_block(db: DbWriter) -> None:
    with db.transaction(timeout=0.0):
        pass


# Each says whether it is inside a block that has inserted a row: a write by being let in, a read by what it sees.
CALLS: dict[str, Callable[[DbWriter], object]] = {
    "run": lambda db: db.run(INSERT, (2,), timeout=0.0),
    "run a function": lambda db: db.run(lambda tx: tx.execute(INSERT, (2,)), timeout=0.0),
    "run_many": lambda db: db.run_many(INSERT, [(2,)], timeout=0.0),
    "run_script": lambda db: db.run_script("INSERT INTO t VALUES (2)", timeout=0.0),
    "transaction": enter_block,
    "read": lambda db: db.read(COUNT)[0][0],
    "read_one": lambda db: db.read_one(COUNT)[0],
    "read_value": lambda db: db.read_value(COUNT),
    "read a function": lambda db: db.read(lambda connection: connection.execute(COUNT).fetchone()[0]),
}


def here(call: Callable[[], str]) -> str:
    return call()


def in_another_thread(call: Callable[[], str]) -> str:
    return str(in_threads(call)[0])


def in_a_copied_context(call: Callable[[], str]) -> str:
    return contextvars.copy_context().run(call)


def in_a_copied_context_elsewhere(call: Callable[[], str]) -> str:
    context = contextvars.copy_context()
    return in_another_thread(lambda: context.run(call))


def in_an_empty_context(call: Callable[[], str]) -> str:
    return contextvars.Context().run(call)


def in_a_loop(call: Callable[[], str]) -> str:
    async def main() -> str:
        return call()

    return asyncio.run(main())


# A context that was copied in the same thread, as for a callback, is inside; so is a loop that runs inside the block.
PLACES: dict[Callable[[Callable[[], str]], str], str] = {
    here: INSIDE,
    in_another_thread: OUTSIDE,
    in_a_copied_context: INSIDE,
    in_a_copied_context_elsewhere: OUTSIDE,
    in_an_empty_context: OUTSIDE,
    in_a_loop: INSIDE,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("depth", ["block", "nested", "savepoint"])
def test_a_call_belongs_to_a_block_of_its_context_and_thread(
    db: DbWriter, depth: str, place: Callable[[Callable[[], str]], str], call: str
) -> None:
    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
        around: dict[str, Callable[[], Any]] = {
            "block": contextlib.nullcontext,
            "nested": db.transaction,
            "savepoint": tx.savepoint,
        }
        with around[depth]():
            assert place(lambda: outcome(lambda: CALLS[call](db))) == PLACES[place]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_call_belongs_to_a_job_of_its_context_and_thread(
    db: DbWriter, place: Callable[[Callable[[], str]], str], call: str
) -> None:
    def job(tx: Transaction) -> str:
        tx.execute(INSERT, (1,))
        return place(lambda: outcome(lambda: CALLS[call](db)))

    # Nobody can wait for the writer on its own thread.
    expected = REFUSED if place is in_an_empty_context else PLACES[place]
    assert db.run(job) == expected


@pytest.mark.parametrize("call", [name for name in CALLS if name.startswith("read")])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("depth", ["reader", "in a reader", "in a block"])
def test_a_read_belongs_to_a_reader_of_its_context_and_thread(
    db: DbWriter, depth: str, place: Callable[[Callable[[], str]], str], call: str
) -> None:
    """It sees no row; another one that was committed, or that the block around it has written, is seen outside."""
    inside = "sees the reader's state"

    def look() -> str:
        seen = CALLS[call](db)
        return inside if seen == 0 else OUTSIDE

    with contextlib.ExitStack() as stack:
        if depth == "in a block":
            stack.enter_context(db.transaction()).execute(INSERT, (1,))
        stack.enter_context(db.reader())
        if depth == "in a reader":
            stack.enter_context(db.reader())
        if depth != "in a block":
            in_threads(lambda: db.run(INSERT, (1,)))
            assert place(look) == (inside if PLACES[place] == INSIDE else OUTSIDE)
        elif PLACES[place] == INSIDE:
            assert place(look) == inside


def test_the_innermost_of_blocks_and_readers_decides_what_a_read_sees(db: DbWriter) -> None:
    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
        with db.reader():
            assert db.read_value(COUNT) == 0
            with tx.savepoint():
                assert db.read_value(COUNT) == 1
                with db.reader():
                    assert db.read_value(COUNT) == 0
                assert db.read_value(COUNT) == 1
            with db.transaction():
                assert db.read_value(COUNT) == 1
            assert db.read_value(COUNT) == 0
            db.run(INSERT, (2,))  # a write belongs to the block all the same
            assert db.read_value(COUNT) == 0
        assert db.read_value(COUNT) == 2


def test_a_block_that_was_taken_away_decides_until_its_end_and_says_so(db: DbWriter) -> None:
    with pytest.raises(TransactionClosedError, match="max_hold"), db.transaction(max_hold=0.01):
        eventually(lambda: not db.in_writer())
        for call in CALLS.values():
            with pytest.raises(TransactionClosedError, match="max_hold"):
                call(db)
        assert in_another_thread(lambda: outcome(lambda: db.run(INSERT, (1,), timeout=DEADLINE))) == INSIDE  # let in
    assert db.read_value(COUNT) == 1


def dependency(db: DbWriter) -> Generator[Transaction, None, None]:
    with db.transaction() as tx:
        yield tx


@pytest.mark.parametrize("fails", [False, True])
def test_a_pools_next_work_in_a_blocks_thread_is_not_in_the_block(db: DbWriter, fails: bool) -> None:
    """A pool's thread does one piece of work after the other in one context: a framework's requests, say."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        block = dependency(db)
        tx = one.submit(next, block).result(DEADLINE)
        other.submit(tx.execute, INSERT, (1,)).result(DEADLINE)
        stranger = one.submit(db.run, INSERT, (2,), timeout=DEADLINE)
        eventually(lambda: db.stats().queue_depth > 0)  # it waits for its turn
        if fails:
            with pytest.raises(LookupError):
                other.submit(block.throw, LookupError()).result(DEADLINE)
        else:
            with pytest.raises(StopIteration):
                other.submit(next, block).result(DEADLINE)
        stranger.result(DEADLINE)
    assert db.read("SELECT n FROM t ORDER BY n") == ([(2,)] if fails else [(1,), (2,)])


def test_a_pools_next_work_in_a_readers_thread_is_not_in_the_reader(db: DbWriter) -> None:
    def snapshot() -> Generator[Any, None, None]:
        with db.reader() as connection:
            yield connection

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other, ThreadPool(1) as old:
        firsts: list[Callable[..., Any]] = [
            lambda fn, *args: one.submit(fn, *args).result(DEADLINE),
            lambda fn, *args: old.apply(fn, args),
        ]
        for first in firsts:
            db.run("DELETE FROM t")
            reader = snapshot()
            connection = first(next, reader)
            first(db.run, INSERT, (1,))
            assert first(db.read_value, COUNT) == 1
            assert other.submit(lambda c: c.execute(COUNT).fetchone(), connection).result(DEADLINE) == (0,)
            other.submit(reader.close).result(DEADLINE)
    assert db.stats().readers_in_use == 0


def test_a_block_or_reader_that_a_pools_work_has_entered_ends_as_soon_as_nobody_can_leave_it(db: DbWriter) -> None:
    """Not only when the garbage collector runs: all may be waiting for the block by then."""

    def enter(lends: Callable[[], contextlib.AbstractContextManager[object]]) -> Iterator[None]:
        with lends():
            yield

    with no_garbage_collector():
        for lends in (db.transaction, db.reader):
            with ThreadPoolExecutor(1) as pool:
                entered = enter(lends)
                pool.submit(next, entered).result(DEADLINE)
                del entered
        db.run(INSERT, (1,), timeout=DEADLINE)
        assert db.stats().readers_in_use == 0


def test_one_piece_of_a_pools_work_is_inside_its_own_block(db: DbWriter) -> None:
    def work() -> int:
        with contextlib.ExitStack() as stack:
            stack.enter_context(db.transaction())
            db.run(INSERT, (1,), timeout=0.0)
            return int(db.read_value(COUNT))

    with ThreadPoolExecutor(1) as pool, ThreadPool(1) as old:
        assert (pool.submit(work).result(DEADLINE), old.apply(work)) == (1, 2)


def test_a_block_left_in_another_thread_is_around_nobody(db: DbWriter) -> None:
    block = db.transaction()
    block.__enter__().execute(INSERT, (1,))
    in_threads(lambda: block.__exit__(None, None, None))
    assert not db.in_writer()
    db.run(INSERT, (2,), timeout=DEADLINE)
    with pytest.raises(ZeroDivisionError), db.transaction():
        db.run(INSERT, (3,))
        raise ZeroDivisionError
    assert db.read("SELECT n FROM t") == [(1,), (2,)]


def test_what_a_job_leaves_open_is_around_no_other_job(db: DbWriter) -> None:
    kept: list[Any] = []

    def leave_open(tx: Transaction) -> None:
        kept.append(db.reader())
        kept[0].__enter__()

    db.run(leave_open)
    assert db.run(lambda tx: [tx.execute(INSERT, (1,)), db.read_value(COUNT)])[1] == 1
    kept.pop().__exit__(None, None, None)


async def outcome_of(call: Awaitable[Any]) -> str:
    try:
        result = await call
    except WriteTimeoutError as error:
        return OUTSIDE if not error.started else "started"
    except ReentrantWriteError:
        return REFUSED
    except TransactionClosedError:
        return CLOSED
    return INSIDE if result != 0 else OUTSIDE


async def enter_tasks_block(db: AsyncDbWriter) -> None:
    async with db.transaction(timeout=0.0):
        pass


AWAITED: dict[str, Callable[[AsyncDbWriter], Awaitable[Any]]] = {
    "run": lambda db: db.run(INSERT, (2,), timeout=0.0),
    "run a function": lambda db: db.run(lambda tx: tx.execute(INSERT, (2,)), timeout=0.0),
    "run_many": lambda db: db.run_many(INSERT, [(2,)], timeout=0.0),
    "run_script": lambda db: db.run_script("INSERT INTO t VALUES (2)", timeout=0.0),
    "transaction": enter_tasks_block,
    "read_one": lambda db: db.read_value(COUNT),
    "read a function": lambda db: db.read(lambda connection: connection.execute(COUNT).fetchone()[0]),
}


@contextlib.asynccontextmanager
async def both(db: DbWriter) -> AsyncIterator[AsyncDbWriter]:
    shared = AsyncDbWriter.wrap(db)
    try:
        yield shared
    finally:
        await shared.close()


async def in_another_task(call: Callable[[], Awaitable[str]]) -> str:
    async def task() -> str:
        return await call()

    return await asyncio.create_task(task())


async def in_the_task(call: Callable[[], Awaitable[str]]) -> str:
    return await call()


@pytest.mark.parametrize("call", AWAITED)
@pytest.mark.parametrize("place", [in_the_task, in_another_task], ids=lambda place: place.__name__)
@pytest.mark.parametrize("depth", ["block", "nested", "savepoint"])
def test_an_awaited_call_belongs_to_a_block_of_its_task(
    db: DbWriter, depth: str, place: Callable[[Callable[[], Awaitable[str]]], Awaitable[str]], call: str
) -> None:
    async def main() -> None:
        async with both(db) as shared, shared.transaction() as tx:
            await tx.execute(INSERT, (1,))
            around: dict[str, Callable[[], Any]] = {
                "block": contextlib.nullcontext,
                "nested": shared.transaction,
                "savepoint": tx.savepoint,
            }
            async with around[depth]():
                found = await place(lambda: outcome_of(AWAITED[call](shared)))
                assert found == (INSIDE if place is in_the_task else OUTSIDE)

    asyncio.run(main())


@pytest.mark.parametrize("call", AWAITED)
@pytest.mark.parametrize("place", [in_the_task, in_another_task], ids=lambda place: place.__name__)
def test_beside_a_blocking_block_of_a_task_its_other_tasks_wait_and_are_not_in_it(
    db: DbWriter, place: Callable[[Callable[[], Awaitable[str]]], Awaitable[str]], call: str
) -> None:
    """In it, an awaited write could not end; an awaited read sees what it has written."""

    async def main() -> None:
        async with both(db) as shared:
            with db.transaction() as tx:
                tx.execute(INSERT, (1,))
                found = await place(lambda: outcome_of(AWAITED[call](shared)))
            expected = INSIDE if call.startswith("read") else REFUSED
            assert found == (expected if place is in_the_task else OUTSIDE)

    asyncio.run(main())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("blocking", [False, True], ids=["a task's block", "a blocking block"])
@pytest.mark.parametrize("state", ["held", "awaited"])
def test_a_blocking_write_in_a_loop_whose_task_has_or_awaits_a_block_is_refused(
    db: DbWriter, state: str, blocking: bool, call: str
) -> None:
    if state == "awaited" and blocking:
        return  # it blocks the loop itself

    async def main() -> None:
        async with both(db) as shared:
            entered, leave = asyncio.Event(), asyncio.Event()

            async def hold() -> None:
                if blocking:
                    with db.transaction():
                        entered.set()
                        await leave.wait()
                else:
                    async with shared.transaction():
                        entered.set()
                        await leave.wait()

            release = threading.Event()
            if state == "awaited":
                db.enqueue(lambda tx: release.wait(DEADLINE) and None)
            task = asyncio.create_task(hold())
            if state == "awaited":
                await asyncio.sleep(0)
            else:
                await entered.wait()
            found = outcome(lambda: CALLS[call](db))
            assert found == (OUTSIDE if call.startswith("read") else REFUSED)
            release.set()
            leave.set()
            await task

    asyncio.run(main())


def test_a_blocking_read_in_a_tasks_block_or_reader_belongs_to_it(db: DbWriter) -> None:
    async def main() -> None:
        async with both(db) as shared:
            async with shared.transaction() as tx:
                await tx.execute(INSERT, (1,))
                assert db.read_value(COUNT) == 1
                assert db.read(lambda connection: connection.execute(COUNT).fetchone()[0]) == 1
                with pytest.raises(ReentrantWriteError):
                    db.run(INSERT, (2,))
            async with shared.reader():
                await shared.run("DELETE FROM t")
                assert db.read_value(COUNT) == 1
            with db.reader():
                await shared.run(INSERT, (3,))
                assert await shared.read_value(COUNT) == 0

    asyncio.run(main())


def test_a_ticket_of_before_a_waiting_block_may_be_waited_for_in_the_loop(db: DbWriter) -> None:
    async def main() -> None:
        async with both(db) as shared:
            release = threading.Event()
            before = db.enqueue(lambda tx: release.wait(DEADLINE) and None)

            async def enter() -> None:
                async with shared.transaction():
                    pass

            task = asyncio.create_task(enter())
            await asyncio.sleep(0)
            behind = db.enqueue(INSERT, (1,))
            with pytest.raises(ReentrantWriteError):
                behind.result()
            release.set()
            before.result(DEADLINE)
            await task
            await behind

    asyncio.run(main())


@pytest.mark.parametrize("is_inside", [True, False])
def test_a_full_queue_never_makes_a_task_wait_whose_loop_has_a_block(path: Path, is_inside: bool) -> None:
    async def main() -> None:
        with DbWriter(path, maxsize=2) as db:
            db.run("CREATE TABLE t (n)")

            async def enqueue() -> list[Any]:
                return [db.enqueue(INSERT, (n,)) for n in range(5)]

            async with both(db) as shared:
                outside = contextvars.copy_context()
                async with shared.transaction():
                    other = asyncio.create_task(enqueue(), context=None if is_inside else outside)
                    tickets = await other
                await asyncio.gather(*tickets)
            assert db.read_value(COUNT) == 5

    asyncio.run(main())


def test_a_block_of_one_loop_is_used_and_left_by_another(db: DbWriter) -> None:
    """A fixture's parts may run in loops of their own."""
    shared = AsyncDbWriter.wrap(db)
    with asyncio.Runner() as first, asyncio.Runner() as second:
        block = shared.transaction()
        tx = first.run(block.__aenter__())

        async def use() -> None:
            async with tx.savepoint():
                await tx.execute(INSERT, (1,))
            await block.__aexit__(None, None, None)

        second.run(use())
        assert second.run(shared.read_value(COUNT)) == 1
        second.run(shared.close())


def test_a_block_whose_loop_is_closed_is_rolled_back(db: DbWriter) -> None:
    shared = AsyncDbWriter.wrap(db)
    block = shared.transaction()
    with asyncio.Runner() as runner:
        tx = runner.run(block.__aenter__())
        runner.run(tx.execute(INSERT, (1,)))
        runner.get_loop().shutdown_asyncgens = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
    db.run(INSERT, (2,), timeout=DEADLINE)
    assert db.read("SELECT n FROM t") == [(2,)]
    with pytest.raises(TransactionClosedError, match="loop was closed"), asyncio.Runner() as runner:
        runner.run(block.__aexit__(None, None, None))


def test_threads_that_share_a_block_are_served_one_after_the_other(db: DbWriter) -> None:
    with db.transaction() as tx:
        in_threads(*[lambda: [tx.execute(INSERT, (n,)) for n in range(200)] for _ in range(4)])
        assert tx.execute(COUNT).rows == [(800,)]
    assert db.read_value(COUNT) == 800


def test_a_block_is_left_while_another_thread_is_inside_sqlite(db: DbWriter) -> None:
    """Who fails does not wait for what still runs; who ends well does."""
    for error in (None, LookupError()):
        for _ in range(20):
            before = db.read_value(COUNT)
            block = db.transaction()
            tx = block.__enter__()

            def use(tx: Transaction = tx) -> int:
                done = 0
                with contextlib.suppress(TransactionClosedError):
                    while True:
                        with tx.savepoint():
                            tx.execute(INSERT, (1,))
                        done += 1
                return done

            def leave(block: Any = block, error: Any = error) -> None:
                block.__exit__(type(error) if error else None, error, None)

            with ThreadPoolExecutor() as pool:
                using = pool.submit(use)
                while not tx.execute("SELECT total_changes()").rows[0][0]:
                    pass
                with contextlib.suppress(LookupError):
                    pool.submit(leave).result(DEADLINE)
                done = using.result(DEADLINE)
            kept = db.read_value(COUNT) - before
            assert (kept == 0) if error else (done <= kept <= done + 1)


def test_a_statement_that_still_runs_is_interrupted_when_its_block_fails(db: DbWriter) -> None:
    endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c"
    block = db.transaction()
    tx = block.__enter__()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(tx.execute, endless)
        eventually(lambda: bool(tx._loan._inside))
        with pytest.raises(LookupError):
            raise_through(block, LookupError())
        with pytest.raises(TransactionClosedError):
            running.result(DEADLINE)
    db.run(INSERT, (1,), timeout=DEADLINE)


def raise_through(block: Any, error: Exception) -> None:
    with contextlib.suppress(StopIteration):
        if not block.__exit__(type(error), error, None):
            raise error


def test_savepoints_of_threads_that_cross_are_told_and_lose_nothing_in_silence(db: DbWriter) -> None:
    with db.transaction() as tx:
        first, second = tx.savepoint(), tx.savepoint()
        first.__enter__()
        tx.execute(INSERT, (1,))
        in_threads(second.__enter__)
        tx.execute(INSERT, (2,))
        first.__exit__(None, None, None)
        with pytest.raises(TransactionClosedError, match="ended with the one around it"):
            in_threads(lambda: second.__exit__(None, None, None))
    assert db.read("SELECT n FROM t") == [(1,), (2,)]


def test_a_savepoint_that_fails_after_its_block_was_rolled_back_has_nothing_more_to_say(db: DbWriter) -> None:
    block = db.transaction()
    part = block.__enter__().savepoint()
    in_threads(part.__enter__)
    with pytest.raises(KeyError):
        raise_through(block, KeyError())
    in_threads(lambda: part.__exit__(LookupError, LookupError(), None))


@pytest.mark.parametrize("ends_with", ["the block", "another savepoint", "one that fails"])
def test_a_savepoint_that_fails_after_what_is_around_it_has_ended_says_so(db: DbWriter, ends_with: str) -> None:
    """Its own error alone would say that it was undone."""
    block = db.transaction()
    tx = block.__enter__()
    around: Any = block if ends_with == "the block" else tx.savepoint()
    if around is not block:
        around.__enter__()
    part = tx.savepoint()
    in_threads(part.__enter__)
    tx.execute(INSERT, (1,))
    if ends_with == "one that fails":
        with pytest.raises(KeyError):
            raise_through(around, KeyError())
        tx.execute(INSERT, (1,))
    else:
        around.__exit__(None, None, None)
    error = LookupError()
    with pytest.raises(TransactionClosedError) as told:
        in_threads(lambda: part.__exit__(LookupError, error, None))
    assert told.value.__cause__ is error
    if around is not block:
        block.__exit__(None, None, None)
    assert db.read("SELECT n FROM t") == [(1,)]


@pytest.mark.parametrize(("mode", "text"), [("WAL", "inside a job, block or callback"), ("DELETE", "inside a reader")])
def test_a_refused_wait_says_what_it_is_inside(path: Path, mode: Any, text: str) -> None:
    with (
        DbWriter(path, journal_mode=mode) as db,
        db.transaction() if mode == "WAL" else db.reader(),
        pytest.raises(ReentrantWriteError, match=text),
    ):
        db.flush()


def test_of_a_block_and_a_reader_that_cross_each_is_left_by_itself(db: DbWriter) -> None:
    """As two generators of one thread may have them."""
    block, reader = db.transaction(), db.reader()
    tx = block.__enter__()
    reader.__enter__()
    tx.execute(INSERT, (1,))
    block.__exit__(None, None, None)
    assert db.read_value(COUNT) == 0
    reader.__exit__(None, None, None)
    assert db.read_value(COUNT) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_savepoint_that_fails_after_its_function_says_so_if_that_is_committed(db: DbWriter, fails: bool) -> None:
    parts: list[contextlib.AbstractContextManager[None]] = []

    def leave_open(tx: Transaction) -> None:
        parts.append(tx.savepoint())
        parts[0].__enter__()
        tx.execute(INSERT, (1,))
        if fails:
            raise KeyError

    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        db.run(leave_open)
    error = LookupError()
    with contextlib.nullcontext() if fails else pytest.raises(TransactionClosedError):
        parts[0].__exit__(LookupError, error, None)
    assert db.read_value(COUNT) == (0 if fails else 1)


def test_a_thread_with_the_number_of_an_ended_one_is_not_inside_though_it_has_the_context(db: DbWriter) -> None:
    context, block, numbers = contextvars.copy_context(), db.transaction(), []

    def enter() -> None:
        numbers.append(threading.get_ident())
        block.__enter__()

    def write() -> None:
        numbers.append(threading.get_ident())
        found.append(outcome(lambda: db.run(INSERT, (1,), timeout=0.0)))

    found: list[str] = []
    for target in (enter, write):
        thread = threading.Thread(target=context.run, args=(target,))
        thread.start()
        thread.join(DEADLINE)
    context.run(block.__exit__, None, None, None)
    assert found == [OUTSIDE]
    assert len(numbers) == 2  # nearly always the same


def test_writes_that_a_collected_block_takes_with_it_are_told(db: DbWriter, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever leaves a generator in the midst of its block is still inside, until the block is collected."""
    generator = dependency(db)
    next(generator)
    db.run(INSERT, (1,))
    del generator
    assert db.read_value(COUNT) == 0
    assert "1 writes that were made inside 'transaction'" in caplog.text


def test_a_thread_with_the_number_of_an_ended_one_is_not_inside_its_block(db: DbWriter) -> None:
    """The system gives the numbers of ended threads to new ones."""
    inside, blocks = [], []

    def leave_open() -> None:
        open_block = db.transaction()
        open_block.__enter__()
        blocks.append(open_block)

    for target in (leave_open, lambda: inside.append(db.in_writer())):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert inside == [False]
    blocks.pop().__exit__(None, None, None)


def test_a_task_waits_while_another_task_of_its_loop_holds_a_block_of_its_thread(path: Path) -> None:
    async def main() -> list[Any]:
        with DbWriter(path) as db:
            db.run("CREATE TABLE t (n)")
            shared = AsyncDbWriter.wrap(db)
            with db.transaction() as tx:
                other = asyncio.create_task(write(shared))
                await asyncio.sleep(0)
                tx.execute(INSERT, (1,))
                with pytest.raises(ReentrantWriteError):
                    await shared.run(INSERT, (3,))
            await other
            return db.read("SELECT n FROM t")

    async def write(db: AsyncDbWriter) -> None:
        await db.run(INSERT, (2,))

    assert asyncio.run(main()) == [(1,), (2,)]


def test_scopes_that_were_left_elsewhere_are_not_kept_by_a_context_that_enters_ever_more() -> None:
    def main() -> None:
        known = scopes.Scopes[str]()
        for _ in range(5):
            scope = known.enter("block", writes=True)
            contextvars.copy_context().run(known.leave, scope)
        last = known.enter("block", writes=True)
        node = scopes.enclosing()
        assert node is not None
        assert (node[0](), node[1]) == (last, None)

    contextvars.Context().run(main)


def test_a_scope_that_was_left_elsewhere_is_gone_when_the_one_inside_it_is_left() -> None:
    def main() -> None:
        known = scopes.Scopes[str]()
        outer, inner = known.enter("outer", writes=True), known.enter("inner", writes=True)
        contextvars.copy_context().run(known.leave, outer)
        known.leave(inner)
        assert scopes.enclosing() is None

    contextvars.Context().run(main)


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_a_refused_wait_names_the_job_or_block_that_it_is_in_rather_than_the_journal_mode(
    path: Path, mode: Any
) -> None:
    refused = pytest.raises(ReentrantWriteError, match="inside a job, block or callback waits for the writer")
    with DbWriter(path, journal_mode=mode) as db:
        db.run("CREATE TABLE t (n)")

        heard = []

        def wait(*_: object) -> None:
            with refused:
                db.flush()
            heard.append(mode)

        db.run(lambda tx: tx.on_commit(wait))
        with parked(db):
            db.enqueue("SELECT 1").add_done_callback(wait)
        db.flush(DEADLINE)
        with db.transaction():
            wait()
        if mode == "WAL":
            with db.transaction(), db.reader():
                wait()
        assert len(heard) == (4 if mode == "WAL" else 3)
