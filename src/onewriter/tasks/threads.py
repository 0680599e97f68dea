"""ReadingThreads: a few threads in which the reads of tasks run."""

from __future__ import annotations

import queue
import threading
from typing import Any

from onewriter.base.state import State
from onewriter.base.threads import start
from onewriter.tasks.call import Call


class ReadingThreads:
    """As many threads as the pool has connections, started when they are needed.

    Not a ThreadPoolExecutor: that refuses all work once the main thread has ended, where other threads go on.

    Threads: ``submit`` and ``shutdown`` are called by any. Theirs do not refer to this, so that it can be collected,
             and are daemon threads: who waits for what one does keeps the interpreter.
    """

    def __init__(self, size: int, name: str, state: State) -> None:
        self._size = size
        self._name = name
        self._state = state
        self._line = _Line(state)

    def submit(self, call: Call[Any]) -> None:
        """Have one of them run it. RuntimeError: no thread can be started, and it never begins."""
        line = self._line
        with line.lock:
            if not line.is_over:
                self._put(line, call)
                return
        self.submit(call)  # another one has taken its place in this moment

    def _put(self, line: _Line, call: Call[Any]) -> None:
        line.calls.put(call)
        if line.idle:
            line.idle -= 1
        elif line.threads < self._size:
            name = f"{self._name}_{line.threads}"
            thread = threading.Thread(target=line.work, name=name, daemon=True)
            line.threads += 1  # first: a signal handler may raise when it has started
            try:
                start(thread)
            except RuntimeError:
                line.threads -= 1
                if not line.threads and call.withdraw():
                    raise  # or else one that is there comes to it
            except BaseException:  # a signal handler's
                line.threads -= thread.ident is None
                raise

    def shutdown(self) -> None:
        """Have them end, each after its call. Does not wait. What comes later starts others."""
        line, self._line = self._line, _Line(self._state)
        line.end()

    def __del__(self) -> None:
        self.shutdown()


class _Line:
    """The calls that wait for a thread, and what the threads know.

    Locks: lock guards threads, idle, is_over and the putting of calls. Re-entrant: the collector may run under it, and
           with it the end of the ``ReadingThreads``.
    """

    def __init__(self, state: State) -> None:
        self.lock = threading.RLock()
        self.calls: queue.SimpleQueue[Call[Any] | None] = queue.SimpleQueue()  # None: for one thread, to end
        self.threads = 0
        self.idle = 0  # of them wait for a call, and none was put for them
        self.is_over = False  # no more calls are put
        self._state = state

    def end(self) -> None:
        if self._state.forked:  # they are not there, and one may have had the lock
            return
        with self.lock:
            self._end_all()

    def _end_all(self) -> None:
        self.is_over = True
        for _ in range(self.threads):
            self.calls.put(None)

    def work(self) -> None:
        """In each thread."""
        while (call := self.calls.get()) is not None:
            call.run()
            del call
            if self._state.forked:  # by the call, and this is the child
                return
            with self.lock:
                if self.calls.empty():
                    self.idle += 1
