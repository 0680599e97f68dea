"""Interleavings: every thread pauses at random between two lines of the gateway, so that hand-overs meet each other.

Submit and close, timeout and start, cancel and start, lend and expire, wake and commit, a full queue and room in it.
"""

from __future__ import annotations

import random
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

import onewriter
from experiments import HANG, Outcome
from onewriter import DbWriter, QueueFullError, Ticket, TransactionClosedError, WriterClosedError, WriteTimeoutError

SOURCE = str(Path(onewriter.__file__).parent)
INSERT = "INSERT INTO t VALUES (?)"
OFTEN = 0.03  # of the lines


class Pauses:
    """Switches threads at random lines of the gateway, for the ``with`` block and the threads made in it."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def _at_call(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        return self._at_line if frame.f_code.co_filename.startswith(SOURCE) else None

    def _at_line(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "line" and self._chance.random() < OFTEN:
            sleep(self._chance.choice((0, 0, 0.0001, 0.0005)))
        return self._at_line

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        threading.settrace(self._at_call)
        sys.settrace(self._at_call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        threading.settrace(None)


def at_once(*functions: Callable[[], object]) -> list[Any]:
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(HANG) for future in [pool.submit(function) for function in functions]]


def rows_of(path: Path) -> set[int]:
    with DbWriter(path) as db:
        return {n for (n,) in db.read("SELECT n FROM t")}


def opened(path: Path, **options: Any) -> DbWriter:
    db = DbWriter(path, slow_after=60, **options)
    db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    return db


def parking(db: DbWriter) -> tuple[threading.Event, Ticket[Any]]:
    entered, release = threading.Event(), threading.Event()

    def park(tx: object) -> None:
        entered.set()
        release.wait(HANG)

    ticket = db.enqueue(park)
    entered.wait(HANG)
    return release, ticket


def submit_and_close(path: Path, chance: random.Random) -> str:
    db = opened(path)
    tickets: list[tuple[int, Ticket[Any]]] = []

    def produce(start: int) -> None:
        with suppress(WriterClosedError):
            for n in range(start, start + 200):
                tickets.append((n, db.enqueue(INSERT, (n,))))

    drain = chance.random() < 0.5
    reports = at_once(
        lambda: produce(0), lambda: produce(1000), lambda: db.close(drain=drain), lambda: db.close(drain=drain)
    )
    found = rows_of(path)
    if not all(ticket.done() for _, ticket in tickets):
        return "an accepted job has no outcome"
    good = {n for n, ticket in tickets if not ticket.cancelled() and ticket.exception() is None}
    if found != good or (drain and len(good) != len(tickets)):
        return f"accepted {len(tickets)}, resolved {len(good)}, written {len(found)}"
    report = db.close()
    if (report.committed, report.cancelled) != (1 + len(good), len(tickets) - len(good)) or reports[-1].unfinished:
        return f"the report says {report}"
    return ""


def timeout_and_start(path: Path, chance: random.Random) -> str:
    db = opened(path)
    release, _ = parking(db)
    tell: dict[int, object] = {}

    def run(n: int) -> None:
        try:
            if n % 2:
                db.run(INSERT, (n,), timeout=chance.random() * 0.01)
            else:
                with db.transaction(timeout=chance.random() * 0.01) as tx:
                    tx.execute(INSERT, (n,))
            tell[n] = True
        except WriteTimeoutError as error:
            tell[n] = error

    def let_go() -> None:
        sleep(chance.random() * 0.01)
        release.set()

    at_once(let_go, *[lambda n=n: run(n) for n in range(8)])
    db.flush()
    wrong = []
    found = {n for (n,) in db.read("SELECT n FROM t")}
    for n, outcome in tell.items():
        there = outcome is True
        if isinstance(outcome, WriteTimeoutError) and outcome.started:
            there = outcome.ticket.exception(HANG) is None
        if there != (n in found):
            wrong.append(n)
    db.close()
    return f"{wrong} of {tell} are not as told" if wrong else ""


def cancel_and_start(path: Path, chance: random.Random) -> str:
    db = opened(path)
    tickets = dict[int, Ticket[Any]]()
    told = dict[int, bool]()

    def produce() -> None:
        for n in range(60):
            tickets[n] = db.enqueue(INSERT, (n,))

    def cancel() -> None:
        for n in range(60):
            while n not in tickets:
                sleep(0)
            told[n] = tickets[n].cancel()

    at_once(produce, cancel)
    db.flush()
    found = {n for (n,) in db.read("SELECT n FROM t")}
    db.close()
    for n, ticket in tickets.items():
        if told[n] == (n in found) or ticket.cancelled() != told[n]:
            return f"cancel() said {told[n]}, and the row is {'there' if n in found else 'not there'}"
        with suppress(CancelledError):
            ticket.result(0)
    return ""


def lend_and_expire(path: Path, chance: random.Random) -> str:
    db = opened(path)
    told = dict[int, bool]()

    def block(n: int) -> None:
        try:
            with db.transaction(max_hold=chance.choice([0.001, 0.004, 0.02])) as tx:
                for part in range(3):
                    tx.execute(INSERT, (10 * n + part,))
                    sleep(chance.random() * 0.004)
            told[n] = True
        except TransactionClosedError:
            told[n] = False

    at_once(*[lambda n=n: block(n) for n in range(8)], lambda: db.run(INSERT, (999,)))
    db.flush()
    found = {n for (n,) in db.read("SELECT n FROM t")}
    db.close()
    expected = {999} | {10 * n + part for n, good in told.items() if good for part in range(3)}
    return "" if found == expected else f"{told}, and there are {sorted(found)}"


def wake_and_commit(path: Path, chance: random.Random) -> str:
    db = opened(path)

    def work(start: int) -> int:
        missing = 0
        for n in range(start, start + 20):
            if chance.random() < 0.5:
                db.run(INSERT, (n,))
                seen = db.read_value("SELECT count(*) FROM t WHERE n = ?", (n,))
            else:
                seen = db.read_value("SELECT count(*) FROM t WHERE n = ?", (n,), after=db.enqueue(INSERT, (n,)))
            missing += seen != 1
        return missing

    missing = sum(at_once(*[lambda start=start: work(start) for start in (0, 100, 200, 300)]))
    db.close()
    return f"{missing} writes were not seen after they were acknowledged" if missing else ""


def full_and_room(path: Path, chance: random.Random) -> str:
    db = opened(path, maxsize=3)
    accepted: list[int] = []

    def produce(start: int) -> None:
        for n in range(start, start + 30):
            with suppress(QueueFullError):
                db.enqueue(INSERT, (n,), timeout=chance.choice([0, 0.0005, 0.005]))
                accepted.append(n)

    at_once(*[lambda start=start: produce(start) for start in (0, 100, 200, 300)])
    db.flush()
    found = {n for (n,) in db.read("SELECT n FROM t")}
    db.close()
    return "" if found == set(accepted) else f"accepted and not written, or the reverse: {found ^ set(accepted)}"


SCENARIOS = (submit_and_close, timeout_and_start, cancel_and_start, lend_and_expire, wake_and_commit, full_and_room)


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` schedules of each hand-over."""
    outcome = Outcome()
    for trial in range(size):
        for scenario in SCENARIOS:
            chance = random.Random(f"{seed} {trial} {scenario.__name__}")
            path = folder / f"{scenario.__name__}-{trial}.db"
            with Pauses(chance.randrange(2**32)):
                found = scenario(path, chance)
            outcome.trials += 1
            if found:
                outcome.find(f"{scenario.__name__} {trial}: {found}")
            path.unlink()
    return outcome
