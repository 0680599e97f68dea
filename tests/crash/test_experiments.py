"""The experiments that cut processes off, with small, fixed sizes. ``python tests/lab.py`` runs them larger."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from experiments import Outcome, files, forks, handlers, iofaults, load, migrations, powerloss, sigkill, signals, strace


@pytest.fixture
def traced() -> None:
    if strace() is None:
        pytest.skip("needs strace, leave to ptrace, and a SQLite that writes by pwrite")


def assert_good(outcome: Outcome, trials: int) -> None:
    assert outcome.good, outcome
    assert outcome.trials >= trials
    assert outcome.acknowledged > 0


def test_kills_at_random_moments(tmp_path: Path) -> None:
    assert_good(sigkill.run(3, 1, tmp_path), 3)


def test_migrations_that_are_killed(tmp_path: Path) -> None:
    outcome = migrations.run(2, 1, tmp_path)
    assert_good(outcome, 16)
    assert outcome.notes["killed"] > 0


@pytest.mark.usefixtures("traced")
def test_kills_at_write_calls(tmp_path: Path) -> None:
    assert_good(sigkill.run_by_calls(60, tmp_path), 3)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("synchronous", "mode"), [("FULL", "WAL"), ("NORMAL", "WAL"), ("FULL", "DELETE")])
def test_power_cuts(tmp_path: Path, synchronous: str, mode: str) -> None:
    assert_good(powerloss.run(80, 1, tmp_path, synchronous=synchronous, mode=mode), 80)


@pytest.mark.usefixtures("traced")
def test_the_power_cuts_find_what_is_not_synced(tmp_path: Path) -> None:
    """An experiment that finds nothing where there is something proves nothing."""
    outcome = powerloss.run(80, 1, tmp_path, synchronous="OFF", mode="DELETE")
    assert outcome.corrupt > 0


@pytest.mark.usefixtures("traced")
def test_system_calls_that_fail(tmp_path: Path) -> None:
    outcome = iofaults.run(6, 1, tmp_path)
    assert_good(outcome, 8)
    assert outcome.notes["failed"] > 0


def test_signals_at_random_moments(tmp_path: Path) -> None:
    assert_good(signals.run(6, 1, tmp_path), 6)


def test_signal_handlers_that_write_and_close_at_random_moments(tmp_path: Path) -> None:
    assert_good(handlers.run(len(handlers.WAYS), 1, tmp_path, rounds=40), len(handlers.WAYS))


def test_forks_wherever_the_users_code_runs(tmp_path: Path) -> None:
    assert_good(forks.run(2, 1, tmp_path), 2)


def test_files_that_are_damaged_while_they_are_in_use(tmp_path: Path) -> None:
    assert_good(files.run(3, 3, tmp_path), 3)


def test_what_the_judge_finds(tmp_path: Path) -> None:
    """A file that lost a job, one with half a job, and one with a gap."""
    import contextlib
    import sqlite3

    def made(name: str, a: list[int], b: list[int]) -> Path:
        path = tmp_path / name
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.executescript(load.SCHEMA.replace("CREATE TRIGGER", "-- \n").split("-- ")[0])
            connection.executemany("INSERT INTO a VALUES (0, ?, '')", [(n,) for n in a])
            connection.executemany("INSERT INTO b VALUES (0, ?)", [(n,) for n in b])
        return path

    told = ["S 0 3", "A 0 3"]
    files = [("good", [1, 2, 3], [1, 2, 3], 0), ("lost", [1, 2], [1, 2], 1), ("half", [1, 2, 3], [1, 3], 0)]
    files += [("gap", [1, 3], [1, 3], 1), ("new", [1, 2, 3, 4], [1, 2, 3, 4], 0)]
    for name, a, b, lost in files:
        outcome = Outcome()
        load.judge(made(name, a, b), told, outcome, name)
        assert outcome.good is (name == "good")
        assert outcome.lost == lost


def test_a_torn_write_keeps_its_first_sectors(tmp_path: Path) -> None:
    calls = [
        powerloss.Call("write", f"{tmp_path}/f", 0, b"a" * 1024),
        powerloss.Call("sync", f"{tmp_path}/f"),
        powerloss.Call("write", f"{tmp_path}/f", 0, b"b" * 1024),
    ]
    seen = set()
    for seed in range(60):
        files, _ = powerloss.after_cut(calls, 3, random.Random(seed), tmp_path)
        seen.add(bytes(files[f"{tmp_path}/f"]))
    assert seen == {b"a" * 1024, b"b" * 1024, b"b" * 512 + b"a" * 512}
