"""Threads that wait for jobs of one batch are woken each by the one before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import pytest

from helpers import DEADLINE, eventually, parked, state_of
from onewriter import DbWriter
from onewriter.base import waiting
from onewriter.base.relay import Relay
from onewriter.base.state import State
from onewriter.base.waiting import thread_signal, wait_in_slices, wake


@pytest.fixture
def state() -> State:
    return State(slow_after=DEADLINE)


def soon() -> float:
    return monotonic() + DEADLINE


def awake(signals: list[Any]) -> list[bool]:
    return [not signal.locked() for signal in signals]


def test_each_wakes_the_next(state: State) -> None:
    signals = [thread_signal() for _ in range(3)]
    wake(signals, state.relay)
    for number, signal in enumerate(signals):
        assert awake(signals) == [number == other for other in range(3)]
        assert wait_in_slices(signal, soon(), state)
    assert not state.relay.line


def test_one_that_gives_up_takes_no_place_in_line_and_wakes_the_next(state: State) -> None:
    late, other = thread_signal(), thread_signal()
    state.relay.line.extend([late, other])
    assert not wait_in_slices(late, monotonic(), state)
    assert awake([late, other]) == [False, True]
    assert not state.relay.line


def test_one_that_is_interrupted_wakes_the_next(state: State) -> None:
    class Interrupted:
        def acquire(self, *, timeout: float) -> bool:
            raise KeyboardInterrupt

    other = thread_signal()
    state.relay.line.append(other)
    with pytest.raises(KeyboardInterrupt):
        wait_in_slices(Interrupted(), soon(), state)
    assert awake([other]) == [True]


def test_who_waits_does_not_depend_on_others(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SLICE", 0.001)
    gone, mine = thread_signal(), thread_signal()
    state.relay.line.extend([gone, mine])  # nobody is awake
    assert wait_in_slices(mine, soon(), state)


def test_passing_on_where_nobody_waits_does_nothing() -> None:
    Relay().pass_on()


def test_all_that_wait_for_one_batch_get_their_results(db: DbWriter) -> None:
    db.run("CREATE TABLE t (n)")
    with parked(db) as release, ThreadPoolExecutor(32) as pool:
        futures = [pool.submit(db.run, "INSERT INTO t (n) VALUES (?)", (n,)) for n in range(32)]
        eventually(lambda: db.stats().queue_depth == 32)
        release.set()
        assert sorted(future.result(DEADLINE).lastrowid or 0 for future in futures) == list(range(1, 33))
    assert not state_of(db).relay.line
