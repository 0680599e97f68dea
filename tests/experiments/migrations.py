"""Migrations: eight processes start at once on one file, and most of them are killed at random moments."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import sqlite3
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from experiments import HANG, Outcome, child, environment, integrity

PROCESSES = 8
STEPS = 60  # of one file; a new one follows when all have run
CODE = """
import logging, os, sys
from onewriter import DbWriter

logging.disable()
path, last = sys.argv[1], int(sys.argv[2])


def step(n):
    def run(tx):
        tx.execute("INSERT INTO ran VALUES (?, ?)", (n, os.getpid()))
        print("step", n, flush=True)
    return run


steps = ["CREATE TABLE ran (n INTEGER, process INTEGER)", *map(step, range(2, last + 1))]
with DbWriter(path, lock_timeout=60.0) as db:
    print("reached", db.migrate(steps, timeout=None), flush=True)
"""


class Ended(NamedTuple):
    """What became of one process: the version that it said is reached, and its exit code."""

    reached: int
    code: int
    hung: bool


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` rounds of eight starts."""
    chance, outcome = random.Random(seed), Outcome()
    with ThreadPoolExecutor(PROCESSES) as pool:
        for trial in range(size):
            path = folder / f"{outcome.notes['files']}.db"
            # After so many lines it is killed; one in eight is left alone.
            moments = [chance.choice([*range(7), None]) for _ in range(PROCESSES)]
            ended = [*pool.map(_start, [path] * PROCESSES, moments)]
            for one in ended:
                outcome.hung += one.hung
                outcome.acknowledged += one.reached > 0
                outcome.notes["killed"] += one.code == -signal.SIGKILL
                if one.code not in (0, -signal.SIGKILL):
                    outcome.find(f"round {trial}: exit code {one.code}")
            outcome.trials += PROCESSES
            _judge(path, max(one.reached for one in ended), outcome, f"round {trial}")
    return outcome


def _start(path: Path, moment: int | None) -> Ended:
    """Start one, and kill it after so many lines."""
    with subprocess.Popen(child(CODE, path, STEPS), stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(HANG, process.kill)
        watchdog.start()
        lines = [*itertools.islice(process.stdout, moment)]
        if moment is not None:
            process.kill()
        lines += process.stdout
    hung = not watchdog.is_alive()
    watchdog.cancel()
    reached = [int(line.split()[1]) for line in lines if line.startswith("reached") and line.endswith("\n")]
    return Ended(max(reached, default=0), process.returncode, hung)


def _judge(path: Path, told: int, outcome: Outcome, what: str) -> None:
    """Whether each step up to the version has run once, and no further one."""
    if not path.exists() or not integrity(path, outcome, what):
        return
    with contextlib.closing(sqlite3.connect(path)) as connection:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        ran = connection.execute("SELECT n FROM ran ORDER BY rowid").fetchall() if version else []
    if ran != [(n,) for n in range(2, version + 1)]:
        outcome.find(f"{what}: at version {version} there have run {ran}")
    if version < told:
        outcome.lost += 1
    if version == STEPS:
        outcome.notes["files"] += 1
