"""ReadingThreads: a few threads in which the reads of tasks run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from onewriter.base.state import State

T = TypeVar("T")


class ReadingThreads:
    """As many threads as the pool has connections, started when they are needed.

    Locks:   _lock guards _executor. Nothing waits while it is held.
    Threads: ``submit`` and ``shutdown`` are called by any.
    """

    def __init__(self, size: int, name: str, state: State) -> None:
        self._size = size
        self._name = name
        self._state = state
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Have one of them call it. RuntimeError: no thread can be started, and it is never called."""
        future: Future[T] = Future()  # not the executor's, which keeps what it has refused for its next thread
        with self._lock:  # or else the close of another loop may shut it down just before
            if self._executor is None:  # or no longer: a block may still be open when the gateway is closed
                self._executor = ThreadPoolExecutor(self._size, self._name)
            try:
                self._executor.submit(self._call, self._executor, [future], function, args)
            except RuntimeError:
                if future.cancel():
                    raise  # or else another thread has taken it in this moment
        return future

    def shutdown(self) -> None:
        """Have them end, each after its call. Does not wait."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)

    def _call(
        self, executor: ThreadPoolExecutor, given: list[Future[T]], function: Callable[..., T], args: tuple[Any, ...]
    ) -> None:
        future = given.pop()  # an error's traceback holds this frame, and the executor's, which has our arguments
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        finally:
            del future
            if self._state.forked:  # by the call: in the child nothing else would end this thread
                executor.shutdown(wait=False)
