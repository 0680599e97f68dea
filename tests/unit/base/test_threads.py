"""Threads are started where no signal handler can raise, and are of one kind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from helpers import DEADLINE, raising
from onewriter import DbWriter
from onewriter.base import threads
from onewriter.base.threads import start
from onewriter.base.waiting import Flag


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


def test_one_whose_starting_is_interrupted_has_been_started_when_that_comes_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class SlowThread(threading.Thread):
        def start(self) -> None:
            interrupted.wait(DEADLINE)
            super().start()

    def interrupt(flag: Flag, timeout: float | None = None) -> bool:
        monkeypatch.undo()
        interrupted.set()
        raise KeyboardInterrupt

    interrupted, has_run = threading.Event(), threading.Event()
    thread = SlowThread(target=has_run.set)
    monkeypatch.setattr(Flag, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(thread)
    assert thread.ident is not None
    thread.join(DEADLINE)
    assert has_run.is_set()


def test_one_whose_starting_is_interrupted_before_it_has_begun_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thread = threading.Thread(target=print)
    monkeypatch.setattr(threads, "start_new_thread", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start(thread)
    assert thread.ident is None


def test_threads_that_were_replaced_behind_the_import_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading, "get_ident", lambda: 1)
        with pytest.raises(RuntimeError, match="before any other import"):
            DbWriter(path)
    DbWriter(path).close()
