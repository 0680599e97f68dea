"""Call: what a task and the thread that works for it agree on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from aio_helpers import run, until
from helpers import DEADLINE, raising
from onewriter.read.claim import new_claim
from onewriter.tasks.call import Call


def in_a_thread(call: Call[Any]) -> threading.Thread:
    thread = threading.Thread(target=call.run)
    thread.start()
    return thread


def test_the_task_gets_what_the_function_returns_or_raises() -> None:
    async def main() -> None:
        calls = Call(None, max, 1, 2), Call(None, raising(LookupError))
        for call in calls:
            in_a_thread(call).join(DEADLINE)
        assert await calls[0] == 2
        with pytest.raises(LookupError):
            await calls[1]

    run(main)


def test_what_was_withdrawn_never_begins_and_what_has_begun_is_not_withdrawn() -> None:
    async def main() -> None:
        early, late = Call(None, began.append, 1), Call(None, began.append, 2)
        assert early.withdraw()
        early.run()
        late.run()
        assert not late.withdraw()
        late.run()
        assert began == [2]

    began: list[int] = []
    run(main)


def test_what_its_task_was_cancelled_for_does_not_begin_before_the_task_knows() -> None:
    async def main() -> None:
        call = Call(None, began.append, 1)

        async def wait() -> None:
            await call

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        call.run()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert began == []
        assert call.withdraw()

    began: list[int] = []
    run(main)


def test_only_what_has_not_begun_expires() -> None:
    async def main() -> None:
        early, late = Call(None, began.append, 1), Call(None, began.append, 2)
        early.expire(TimeoutError("too late"))
        late.run()
        late.expire(TimeoutError("too late"))
        early.run()
        with pytest.raises(TimeoutError, match="too late"):
            await early
        await late
        assert began == [2]

    began: list[int] = []
    run(main)


def test_its_end_is_waited_for_through_cancellations_which_come_out_behind_it() -> None:
    async def main() -> None:
        call = Call(None, gate.wait, DEADLINE)
        thread = in_a_thread(call)
        waiting = asyncio.create_task(call.ended())
        for _ in range(2):
            await asyncio.sleep(0)
            waiting.cancel("stop")
        await asyncio.sleep(0)
        assert not waiting.done()
        gate.set()
        cancelled = await waiting
        assert isinstance(cancelled, asyncio.CancelledError)
        assert cancelled.args == ("stop",)
        assert call.is_done
        assert await call.ended() is None
        thread.join(DEADLINE)

    gate = threading.Event()
    run(main)


def test_who_waits_for_its_end_sees_one_that_comes_just_before(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        create, call = loop.create_future, Call(None, int)

        def late() -> asyncio.Future[Any]:
            call.run()
            return create()

        monkeypatch.setattr(loop, "create_future", late)
        assert await call.ended() is None

    run(main)


def test_what_is_waited_for_in_any_case_begins_although_the_task_was_cancelled_before() -> None:
    async def main() -> None:
        call = Call(None, began.append, 1)
        waiting = asyncio.create_task(call.ended())
        await asyncio.sleep(0)
        waiting.cancel()
        call.run()
        assert isinstance(await waiting, asyncio.CancelledError)
        assert began == [1]

    began: list[int] = []
    run(main)


def test_its_claim_is_said_to_be_in_the_thread_while_that_is_so() -> None:
    async def main() -> None:
        claim = new_claim("read")
        for function in (look, fail):
            call = Call(claim, function, lambda: claim.runs_in)
            thread = in_a_thread(call)
            await call.ended()
            assert claim.runs_in == 0
            thread.join(DEADLINE)
            assert seen.pop() == thread.ident

    def look(runs_in: Callable[[], int]) -> None:
        seen.append(runs_in())

    def fail(runs_in: Callable[[], int]) -> None:
        look(runs_in)
        raise LookupError

    seen: list[int] = []
    run(main)


def test_an_error_that_was_raised_keeps_nothing_of_the_call() -> None:
    class Thing:
        pass

    async def main() -> None:
        thing = Thing()
        known = weakref.ref(thing)
        call = Call(None, raising(LookupError), thing)
        call.run()
        with contextlib.suppress(LookupError):
            await call
        del thing, call
        assert known() is None

    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


def test_what_comes_then_is_called_in_its_thread() -> None:
    async def main() -> None:
        call = Call(None, int)
        call.then = lambda: threads.append(threading.get_ident())
        thread = in_a_thread(call)
        await until(lambda: call.is_done)
        thread.join(DEADLINE)
        assert threads == [thread.ident]

    threads: list[int] = []
    run(main)
