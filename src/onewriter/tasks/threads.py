"""ReadingThreads: a few threads in which the reads of tasks run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from onewriter.base.state import State
from onewriter.tasks.call import Call


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

    def submit(self, call: Call[Any]) -> None:
        """Have one of them run it. RuntimeError: no thread can be started, and it never begins."""
        with self._lock:  # or else the close of another loop may shut it down just before
            if self._executor is None:  # or no longer: a block may still be open when the gateway is closed
                self._executor = ThreadPoolExecutor(self._size, self._name)
            try:
                self._executor.submit(self._run, self._executor, call)
            except RuntimeError:
                if call.withdraw():  # the executor keeps what it has refused for its next thread
                    raise  # or else another thread has begun it in this moment

    def shutdown(self) -> None:
        """Have them end, each after its call. Does not wait."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)

    def _run(self, executor: ThreadPoolExecutor, call: Call[Any]) -> None:
        call.run()
        if self._state.forked:  # by the call: in the child nothing else would end this thread
            executor.shutdown(wait=False)
