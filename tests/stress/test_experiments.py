"""The experiments with threads, tasks and bad input, with small, fixed sizes. ``python tests/lab.py``: larger."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest

from experiments import (
    badinput,
    hands,
    histories,
    interrupts,
    oddities,
    programs,
    recipes,
    schedules,
    soak,
    tasks,
    watches,
)
from experiments.histories import Call, linearizable
from onewriter import DbWriter


def test_histories_have_an_order_that_explains_them(tmp_path: Path) -> None:
    outcome = histories.run(8, 1, tmp_path)
    assert outcome.good, outcome
    assert outcome.acknowledged > 200


@pytest.mark.parametrize(
    ("calls", "explained"),
    [
        ([("write", 5, 0, 1), ("read", 5, 2, 3)], True),
        ([("write", 5, 0, 1), ("read", 0, 2, 3)], False),  # a stale read
        ([("write", 5, 0, 9), ("read", 0, 2, 3)], True),  # still under way
        ([("write", 5, 0, 9), ("read", 5, 2, 3), ("read", 0, 4, 5)], False),  # there and away again
        ([("add", 1, 0, 5), ("add", 1, 1, 6)], False),  # a lost update
        ([("add", 1, 0, 5), ("add", 2, 1, 6)], True),
        ([("write", 5, 0, math.inf), ("read", 0, 2, 3), ("read", 5, 4, 5)], True),  # unknown: may come late
        ([("write", 5, 0, math.inf), ("read", 0, 2, 3)], True),  # or never
        ([("write", 5, 4, math.inf), ("read", 5, 2, 3)], False),  # but not before it began
        ([("read", 7, 0, 1)], False),  # out of nowhere
    ],
)
def test_the_checker_tells_broken_histories(calls: list[tuple[str, int, float, float]], explained: bool) -> None:
    found = [Call(0, kind, value, begin, end) for kind, value, begin, end in calls]
    assert linearizable(found) is explained


def test_hand_overs_in_forced_schedules(tmp_path: Path) -> None:
    outcome = schedules.run(2, 1, tmp_path)
    assert outcome.good, outcome
    assert outcome.trials == 2 * len(schedules.SCENARIOS)


@pytest.mark.parametrize("call", badinput.CALLS)
def test_bad_input_gets_a_documented_error_and_the_next_job_is_served(tmp_path: Path, call: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # coroutines that nobody awaits are a part of it
        outcome = badinput.run(30, 1, tmp_path, (call,))
    assert outcome.good, outcome
    assert outcome.notes[call] > 5


def test_interrupts_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    outcome = interrupts.run(200, 1, tmp_path)
    assert outcome.good, outcome
    assert outcome.trials > 50


def test_tasks_that_are_cancelled_or_have_no_time_lose_nothing(tmp_path: Path) -> None:
    outcome = tasks.run(1500, 1, tmp_path)
    assert outcome.good, outcome
    assert outcome.acknowledged > 10


def test_programs_of_tasks_end_as_their_tasks_were_told(tmp_path: Path) -> None:
    outcome = programs.run(12, 1, tmp_path)
    assert outcome.good, outcome
    assert outcome.acknowledged > 20
    assert min(outcome.notes[ending] for ending in ("committed", "rolled back")) > 5


def test_programs_of_tasks_find_failed_savepoints_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onewriter.tasks.savepoint.SentPart.undo", lambda part, error: None)
    found = "\n".join(programs.run(12, 1, tmp_path).findings)
    assert "rolled back or withdrawn, and there" in found
    assert "not called" in found


def test_blocks_and_readers_that_go_from_hand_to_hand_keep_what_they_promise(tmp_path: Path) -> None:
    outcome = hands.run(50, 1, tmp_path)
    assert outcome.good, outcome
    assert outcome.acknowledged > 200


def test_live_queries_give_no_older_state_after_a_newer_one_and_always_the_last(tmp_path: Path) -> None:
    outcome = watches.run(8, 1, tmp_path)
    assert outcome.good, outcome
    assert min(outcome.notes.values()) > 5


def test_exceptions_handlers_and_streams_that_misbehave_keep_nobody_from_writing(tmp_path: Path) -> None:
    outcome = oddities.run(2, 1, tmp_path)
    assert outcome.good, outcome
    assert outcome.acknowledged > 10


def test_recipes_of_others_faults_mixed_in_threads_have_no_effect_on_one_another(tmp_path: Path) -> None:
    outcome = recipes.run(2.0, 1, tmp_path)
    assert outcome.good, outcome
    assert outcome.trials >= recipes.THREADS


@pytest.mark.parametrize("made", recipes.RECIPES, ids=lambda made: made.__name__)
def test_each_recipe_comes_to_what_it_says(tmp_path: Path, made: recipes.Recipe) -> None:
    with DbWriter(tmp_path / "app.db") as db:
        db.run_script(recipes.SCHEMA)
        made(recipes.Kitchen(db, 1, 1))


def test_a_short_soak(tmp_path: Path) -> None:
    outcome = soak.run(2.0, 1, tmp_path)
    assert outcome.good, outcome
    assert outcome.acknowledged > 1000
