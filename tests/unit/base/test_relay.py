"""Threads that wait for jobs of one batch are woken each by the one before."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import pytest

from helpers import DEADLINE, eventually, parked, state_of
from onewriter import DbWriter, gateway
from onewriter.base import waiting
from onewriter.base.relay import Relay
from onewriter.base.state import State
from onewriter.base.waiting import thread_signal, wait_in_slices
from onewriter.write import ticket


@pytest.fixture
def state() -> State:
    return State(slow_after=DEADLINE)


def soon() -> float:
    return monotonic() + DEADLINE


def awake(signals: list[Any]) -> list[bool]:
    return [not signal.locked() for signal in signals]


def test_each_wakes_the_next(state: State) -> None:
    signals = [thread_signal() for _ in range(3)]
    assert state.relay.line_up(signals) == []
    state.relay.pass_on()
    for number, signal in enumerate(signals):
        assert awake(signals) == [number == other for other in range(3)]
        assert wait_in_slices(signal, soon(), state)
    assert not state.relay.line


def test_tasks_are_woken_at_once(state: State) -> None:
    async def main() -> None:
        future, signals = asyncio.get_running_loop().create_future(), [thread_signal(), thread_signal()]
        assert state.relay.line_up([future, future]) == [future, future]
        assert not state.relay.line
        assert state.relay.line_up([signals[0], future, signals[1]]) == [future]
        assert list(state.relay.line) == signals

    asyncio.run(main())


def test_one_that_ceases_to_wait_takes_no_place_in_line(state: State) -> None:
    late, other = thread_signal(), thread_signal()
    state.relay.line.extend([late, other])
    state.relay.leave(late)
    assert list(state.relay.line) == [other]


def test_one_that_ceases_to_wait_after_it_was_woken_wakes_the_next(state: State) -> None:
    late, other = thread_signal(), thread_signal()
    state.relay.line_up([late, other])
    state.relay.pass_on()
    state.relay.leave(late)
    assert awake([late, other]) == [True, True]


def test_one_whose_time_is_over_is_not_in_line_any_more(db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(signal: Any, until: float, state: State) -> bool:
        assert wait_in_slices(signal, soon(), state)
        state.relay.line.append(signal)
        return False

    for module in (gateway, ticket):
        monkeypatch.setattr(module, "wait_in_slices", too_late)
    assert db.run("CREATE TABLE t (n)").rowcount == -1
    assert not state_of(db).relay.line
    with parked(db):
        waiting = db.enqueue("SELECT 1")
    waiting.result(DEADLINE)
    assert not state_of(db).relay.line


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
