"""How a thread is started where a signal handler may raise."""

from __future__ import annotations

import threading
from _thread import start_new_thread

from onewriter.base.waiting import Flag


def start(thread: threading.Thread) -> None:
    """``thread.start()``, in a thread of its own.

    That waits for the new thread in Python code. What a signal handler raises there, in the main thread, can leave the
    new thread waiting for ever before it has begun, or come out as a RuntimeError of a lock.

    Raises RuntimeError: the system has no thread left, or the interpreter ends.
    """
    is_over, failures, begun = Flag(), list[BaseException](), list[int]()

    def start_it() -> None:
        try:
            thread.start()
        except BaseException as error:
            failures.append(error)
        finally:
            is_over.set()

    try:
        begun.extend(map(start_new_thread, [start_it], [()]))  # in one step: what a handler raises comes behind it
        is_over.wait()
    except BaseException:
        if begun:
            is_over.wait()  # so that ``thread.ident`` tells whether it was started
        raise
    if failures:
        raise failures.pop()
