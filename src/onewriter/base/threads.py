"""How a thread is started where a signal handler may raise, and whose threads they are."""

from __future__ import annotations

import threading
from _thread import start_new_thread
from threading import get_ident

from onewriter.base.waiting import Flag


def refuse_replaced_threads() -> None:
    """Some threads here would be the system's, and others gevent's: they would not wake one another."""
    if threading.get_ident is not get_ident:
        raise RuntimeError(
            "threads were replaced after onewriter was imported: call gevent.monkey.patch_all() before any other import"
        )


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
