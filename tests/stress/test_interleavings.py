"""The hand-overs of the gateway in each order that a few switches of threads make. ``python tests/lab.py``: more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import interleavings
from experiments.interleavings import SCENARIOS, Explored, Play, Scenario, explore
from experiments.scheduler import Event, Lock, RLock, Scheduler
from onewriter import OneWriterError
from onewriter.base import waiting
from onewriter.write.queue import JobQueue
from onewriter.write.ticket import CANCELLED, Job, Ticket

SIZE = 6  # schedules of each hand-over


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_hand_over_keeps_its_promises_in_each_schedule(tmp_path: Path, scenario: Scenario) -> None:
    explored = interleavings.explore_scenario(scenario, 1, SIZE, 1, tmp_path)
    assert not explored.finding
    assert sum(explored.played) == SIZE or not any(explored.left)


# That it finds what is wrong ------------------------------------------------------------------------------------------


def found(function: Callable[[Scheduler], object], bound: int = 1) -> Explored:
    """Explore what needs no gateway."""

    def run(schedule: Any) -> Scheduler:
        scheduler = Scheduler(schedule, near=0.2)
        scheduler.run(lambda: function(scheduler))
        return scheduler

    return explore(run, bound, 1000)


@pytest.mark.parametrize("announces_first", [False, True])
def test_a_consumer_that_looks_before_it_announces_its_sleep_is_found(announces_first: bool) -> None:
    def hand_over(scheduler: Scheduler) -> None:
        mutex, token = Lock(scheduler), Lock(scheduler)
        token.acquire()
        items: list[int] = []
        asleep: list[bool] = []

        def take() -> None:
            if announces_first:
                asleep.append(True)
            with mutex:
                is_empty = not items
            if is_empty:
                asleep.append(True)
                token.acquire()

        def put() -> None:
            with mutex:
                items.append(1)
            if asleep:
                token.release()

        scheduler.at_once(take, put)

    explored = found(hand_over)
    assert ("deadlock" in explored.finding) is not announces_first
    assert announces_first or "schedule {" in explored.finding


@pytest.mark.parametrize("is_one_step", [False, True])
def test_two_threads_that_look_and_then_take_are_found(is_one_step: bool) -> None:
    def take_turns(scheduler: Scheduler) -> None:
        lock, free, taken = RLock(scheduler), [True], []

        def take() -> None:
            with lock:
                is_free = free[0]
                if is_free and is_one_step:
                    free[0] = False
            if is_free:
                with lock:
                    free[0] = False
                    taken.append(1)

        scheduler.at_once(take, take)
        if len(taken) != 1:
            scheduler.find("both have it")

    assert ("both have it" in found(take_turns).finding) is not is_one_step


def test_two_locks_in_both_orders_are_found() -> None:
    def nest(scheduler: Scheduler) -> None:
        one, other = Lock(scheduler), Lock(scheduler)

        def take(first: Lock, second: Lock) -> None:
            with first, second:
                pass

        scheduler.at_once(lambda: take(one, other), lambda: take(other, one))

    explored = found(nest)
    assert "deadlock" in explored.finding
    assert explored.played[1]  # it needs a switch


def test_a_wait_ends_by_its_time_or_by_what_it_waits_for() -> None:
    seen = set()

    def wait(scheduler: Scheduler) -> None:
        event, other = Event(scheduler), Event(scheduler)

        def look() -> None:
            seen.add((event.wait(0.1), other.is_set()))

        def set_both() -> None:
            event.set()
            other.set()

        scheduler.at_once(look, set_both)

    explored = found(wait)
    assert not explored.finding
    assert seen == {(True, True), (True, False), (False, False)}


def test_all_schedules_are_played_once() -> None:
    """Two threads with two steps each, of which each order is one of six."""
    seen = []

    def step(scheduler: Scheduler) -> None:
        order: list[str] = []

        def steps(name: str) -> None:
            for _ in range(2):
                order.append(name)
                scheduler.point()

        scheduler.at_once(lambda: steps("a"), lambda: steps("b"))
        seen.append("".join(order))

    found(step, bound=9)
    assert set(seen) == {"aabb", "abab", "abba", "baab", "baba", "bbaa"}
    assert len(seen) > len(set(seen))  # behind the last step, a switch makes no difference


def test_a_thread_that_waits_for_what_the_scheduler_does_not_see_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.scheduler.REAL", 0.1)
    real = threading.Event()
    explored = found(lambda scheduler: scheduler.at_once(lambda: real.wait(10)))
    real.set()
    assert "waits for what is not seen here" in explored.finding


# ... in the gateway itself: each of these was so once, or could be


def explored_with(tmp_path: Path, scenario: Callable[[Play], None], bound: int = 1, most: int = 400) -> str:
    return interleavings.explore_scenario(Scenario(scenario), bound, most, 1, tmp_path).finding


def test_a_writer_that_announces_its_sleep_too_late_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: JobQueue, limit: int, timeout: float = -1) -> list[Job[Any]] | None:
        with self.mutex:
            is_empty = not self.queue and self._refusal is None
        if is_empty:
            with self.mutex:
                self._asleep = True
            self._token.acquire(timeout=timeout)
        with self.mutex:
            self._asleep = False
            if self.guest is not None:
                return None
            jobs = self._pop(limit)
        return jobs or (None if self._refusal is None or self.queue else [])

    monkeypatch.setattr(JobQueue, "take", take)
    assert "waits that nobody ended in time" in explored_with(tmp_path, interleavings.put_and_sleep)


def test_a_wait_that_looks_at_the_outcome_outside_the_lock_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(self: Ticket[Any], timeout: float | None) -> bool:
        if self._stage >= CANCELLED:
            return True
        signal = waiting.thread_signal()
        with self._state.lock:
            self._waiters = [*(self._waiters or ()), signal]
        return waiting.wait_in_slices(signal, 10_000.0, self._state)

    monkeypatch.setattr(Ticket, "wait", wait)
    assert "it has no end" in explored_with(tmp_path, interleavings.outcome_and_wait)


def put_and_close(play: Play) -> None:
    db = play.open()
    play.scheduler.at_once(lambda: play.put(db, 1), db.close)
    play.end(db)


def test_a_queue_that_looks_whether_it_is_closed_outside_the_lock_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(self: JobQueue, item: Job[Any], timeout: float | None = None) -> None:
        self.check_open()
        with self.mutex:
            item._is_queued = True
            self.queue.append(item)
            if self._asleep:
                self._wake()

    monkeypatch.setattr(JobQueue, "put", put)
    assert explored_with(tmp_path, put_and_close)


def put_and_fork(play: Play) -> None:
    db = play.open()

    def child() -> None:
        interleavings.become_child(play, db, None)
        play.scheduler.stop()

    play.scheduler.at_once(lambda: play.put(db, 1), child)


def test_a_lock_that_a_fork_leaves_taken_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def after_fork_in_child(self: JobQueue, error: OneWriterError) -> None:
        self._refusal = error

    monkeypatch.setattr(JobQueue, "after_fork_in_child", after_fork_in_child)
    scenario = Scenario(put_and_fork, fine=("write/queue.py",))
    assert "deadlock" in interleavings.explore_scenario(scenario, 1, 400, 1, tmp_path).finding
