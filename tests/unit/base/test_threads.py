"""Threads are started where no signal handler can raise."""

from __future__ import annotations

import threading

import pytest

from helpers import DEADLINE
from onewriter.base.threads import start


class NotedThread(threading.Thread):
    started_by = 0

    def start(self) -> None:
        self.started_by = threading.get_ident()
        super().start()


def test_a_thread_is_started_in_another_than_the_callers_in_which_handlers_run() -> None:
    has_run = threading.Event()
    thread = NotedThread(target=has_run.set)
    start(thread)
    assert thread.started_by not in (0, threading.get_ident())
    assert has_run.wait(DEADLINE)
    thread.join(DEADLINE)


def test_why_a_thread_cannot_be_started_is_raised() -> None:
    thread = threading.Thread(target=print)
    thread.start()
    thread.join(DEADLINE)
    with pytest.raises(RuntimeError, match="threads can only be started once"):
        start(thread)
