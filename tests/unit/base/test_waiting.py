"""Wake-ups: none is lost to a signal handler that raises in that moment."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from asyncio.futures import _PyFuture  # type: ignore[attr-defined]
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aio_helpers import run, until
from helpers import DEADLINE, core_of, eventually, parked, pool_of, queue_of
from onewriter import DbWriter, Ticket
from onewriter.base.log import call_all_safely
from onewriter.base.waiting import is_over, is_there, thread_signal, wake
from onewriter.live import hub
from onewriter.read import places
from onewriter.write import queue, ticket

Interrupt = Callable[[ModuleType], None]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """This thread's next call of ``wake`` in that module is interrupted by Ctrl-C as it begins."""

    me = threading.get_ident()

    def interrupt(module: ModuleType) -> None:
        def interrupted(waiters: Iterable[Any]) -> None:
            if threading.get_ident() != me:  # the writer's look for commits of others, say
                wake(waiters)
                return
            monkeypatch.setattr(module, "wake", wake)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "wake", interrupted)

    return interrupt


@pytest.fixture
def db(path: Path) -> Iterable[DbWriter]:
    with DbWriter(path, readers=1, maxsize=1) as gateway:
        gateway.run("CREATE TABLE t (n)")
        yield gateway


def test_of_who_waits_for_a_connection(db: DbWriter, interrupt: Interrupt) -> None:
    with ThreadPoolExecutor(1) as pool:
        block = db.reader()
        block.__enter__()
        waiting = pool.submit(db.read_value, "SELECT 1", timeout=None)
        eventually(lambda: pool_of(db).waiting)
        interrupt(places)
        with pytest.raises(KeyboardInterrupt):
            block.__exit__(None, None, None)
        assert waiting.result(DEADLINE) == 1


def test_of_who_waits_for_room(db: DbWriter, interrupt: Interrupt) -> None:
    with ThreadPoolExecutor(1) as pool:
        with parked(db):
            first = db.enqueue("INSERT INTO t VALUES (1)")
            waiting = pool.submit(lambda: db.enqueue("INSERT INTO t VALUES (2)", timeout=None))
            eventually(lambda: queue_of(db)._room)
            interrupt(queue)
            with pytest.raises(KeyboardInterrupt):
                first.cancel()
        assert waiting.result(DEADLINE).result(DEADLINE).rowcount == 1
    assert (first.cancelled(), db.read("SELECT n FROM t")) == (True, [(2,)])


def test_of_a_task_that_waits_for_what_another_withdraws(db: DbWriter, interrupt: Interrupt) -> None:
    async def wait_for(job: Ticket[Any]) -> Any:
        return await job

    async def main() -> None:
        job = db.enqueue("INSERT INTO t VALUES (1)")
        waiting = asyncio.create_task(wait_for(job))
        await until(lambda: bool(job._waiters))
        interrupt(ticket)
        with pytest.raises(KeyboardInterrupt):
            job.cancel()
        async with asyncio.timeout(DEADLINE):
            with pytest.raises(CancelledError):
                await waiting

    with parked(db):
        run(main)


def test_of_a_thread_that_follows_a_watch_which_another_leaves(db: DbWriter, interrupt: Interrupt) -> None:
    with ThreadPoolExecutor(1) as pool:
        live = db.watch("SELECT n FROM t")
        with live:
            assert live.next() == []
            following = pool.submit(live.next)
            eventually(lambda: core_of(db).live._asleep)
            interrupt(hub)
            with pytest.raises(KeyboardInterrupt):
                live.__exit__(None, None, None)
            with pytest.raises(RuntimeError, match="has ended"):
                following.result(DEADLINE)


def test_who_was_woken_may_be_woken_again() -> None:
    signal = thread_signal()
    wake([signal, signal])
    assert signal.acquire(blocking=False)
    assert not signal.acquire(blocking=False)


@pytest.mark.parametrize("name", ["_tell_withdrawn", "run_callbacks"])
def test_a_withdrawal_that_is_interrupted_is_told_and_calls_its_callbacks(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def interrupted(self: Ticket[Any], *_: object) -> None:
        patch.undo()
        raise KeyboardInterrupt

    told: list[Ticket[Any]] = []
    with parked(db), monkeypatch.context() as patch:
        job = db.enqueue("INSERT INTO t VALUES (1)")
        job.add_done_callback(told.append)
        patch.setattr(Ticket, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            job.cancel()
        assert told == [job]
        db.enqueue("INSERT INTO t VALUES (2)", timeout=0).add_done_callback(told.append)  # there is room for one
    db.flush(DEADLINE)
    assert (len(told), db.stats().cancelled, db.read("SELECT n FROM t")) == (2, 1, [(2,)])


def test_callbacks_whose_calls_are_interrupted_as_they_begin_are_called(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[Ticket[Any]]()

    def interrupted(*_: object) -> None:
        monkeypatch.setattr(ticket, "call_all_safely", call_all_safely)
        raise KeyboardInterrupt

    with parked(db):
        job = db.enqueue("INSERT INTO t VALUES (1)")
        job.add_done_callback(told.append)
        monkeypatch.setattr(ticket, "call_all_safely", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job.cancel()
        assert told == [job]


class Loop(asyncio.SelectorEventLoop):
    """In which a signal handler raises as it is called for the first time."""

    was_called = False

    def call_soon_threadsafe(self, *args: Any, **options: Any) -> asyncio.Handle:  # type: ignore[override]
        if not self.was_called:
            self.was_called = True
            raise LookupError
        return super().call_soon_threadsafe(*args, **options)


def test_what_a_signal_handler_raises_as_a_task_is_woken_comes_out_and_the_task_is_woken() -> None:
    with contextlib.closing(Loop()) as loop:
        future = loop.create_future()
        with pytest.raises(LookupError):
            wake([weakref.ref(future)])
        loop.run_until_complete(future)


def test_of_the_other_tasks_of_a_loop_as_one_is_woken() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        class Interrupted(asyncio.Future[None]):
            was_asked = False

            def done(self) -> bool:
                if not self.was_asked:
                    self.was_asked = True
                    raise LookupError
                return super().done()

        told: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: told.append(context))
        futures = [loop.create_future(), Interrupted(loop=loop), loop.create_future()]
        wake(map(weakref.ref, futures))
        async with asyncio.timeout(DEADLINE):
            for future in futures:
                await future
        assert isinstance(told[0]["exception"], LookupError)

    run(main)


def test_a_loop_that_is_closed_or_gone_is_over_and_nobody_waits_there() -> None:
    loop = asyncio.new_event_loop()
    known, future = weakref.ref(loop), _PyFuture(loop=loop)
    waiter = weakref.ref(future)
    assert not is_over(None)
    assert not is_over(known)
    assert is_there(waiter)
    loop.close()
    assert is_over(known)
    assert not is_there(waiter)
    del loop, future
    gc.collect()
    assert known() is None
    assert is_over(known)
    assert not is_there(waiter)
    wake([waiter])
