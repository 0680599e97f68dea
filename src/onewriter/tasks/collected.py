"""What becomes of a block, or a savepoint of one, that no task can leave any more."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

Leave: TypeAlias = Callable[..., Coroutine[Any, Any, object]]


def leave_if_collected(entry: object, leave: Leave, *args: Any) -> weakref.finalize[Any, Any]:
    """If ``entry`` is collected, nobody can leave by it any more: call ``leave`` in a task of this loop.

    Not there and then: the collector may run inside one of our locks. If the loop is closed by then, ``leave`` is run
    up to where it would wait. ``args`` are kept until then: no scope may be among them, which has its task.
    """
    collected = weakref.finalize(entry, _leave_in, asyncio.get_running_loop(), leave, args)
    collected.atexit = False  # a loop may run on until the interpreter ends, and leave its block itself
    return collected


def _leave_in(loop: asyncio.AbstractEventLoop, leave: Leave, args: tuple[Any, ...]) -> None:
    try:
        loop.call_soon_threadsafe(lambda: loop.create_task(leave(*args)))
    except RuntimeError:  # it is closed
        with contextlib.suppress(StopIteration, RuntimeError), contextlib.closing(leave(*args)) as left:
            left.send(None)
