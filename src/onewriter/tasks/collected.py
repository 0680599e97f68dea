"""What becomes of a block, or a savepoint of one, that no task can leave any more."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from onewriter.base.state import State
from onewriter.base.waiting import KnownLoop, this_loop

STEPS = 10  # of a loop, more than it takes to begin the end of a generator

Leave: TypeAlias = Callable[..., Coroutine[Any, Any, object]]


async def wait_for_collected(state: State) -> None:
    """If the caller is inside something, give its loop the steps in which that ends, if it is a dropped generator's;
    the last of them behind a collection.
    """
    for step in range(STEPS):
        if state.scopes.innermost() is None:
            return
        if step == STEPS // 2 and gc.isenabled():
            gc.collect()
        await asyncio.sleep(0)


def leave_if_collected(entry: object, leave: Leave, *args: Any) -> weakref.finalize[Any, Any]:
    """If ``entry`` is collected, nobody can leave by it any more: call ``leave`` in a task of this loop.

    Not there and then: the collector may run inside one of our locks. If the loop is closed by then, ``leave`` is run
    up to where it would wait. ``args`` are kept until then: no scope may be among them, which has its task.
    """
    collected = weakref.finalize(entry, _leave_in, this_loop(), leave, args)
    collected.atexit = False  # a loop may run on until the interpreter ends, and leave its block itself
    return collected


def _leave_in(known: KnownLoop, leave: Leave, args: tuple[Any, ...]) -> None:
    loop = known()
    try:
        if loop is None:
            raise RuntimeError("it was dropped")
        loop.call_soon_threadsafe(lambda: loop.create_task(leave(*args)))
    except RuntimeError:  # it is closed
        with contextlib.suppress(StopIteration, RuntimeError), contextlib.closing(leave(*args)) as left:
            left.send(None)
