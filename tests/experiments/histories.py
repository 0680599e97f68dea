"""Linearizability: histories of concurrent writes and reads, checked against a register (Wing and Gong's search).

A call takes effect at one moment between its begin and its end. One whose outcome is unknown may have taken effect at
any moment after its begin, or never.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import subprocess
import threading
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Any

from experiments import HANG, Outcome, child, environment
from onewriter import DbWriter, WriteTimeoutError

KEYS = 3
THREADS = 8
CALLS = 12  # of each thread
TABLE = "CREATE TABLE IF NOT EXISTS kv (k INTEGER PRIMARY KEY, v INTEGER)"
OTHER = """
import json, sys
from experiments.histories import calls_of
from onewriter import DbWriter

with DbWriter(sys.argv[1]) as db:
    sys.stdin.readline()
    print(json.dumps([vars(call) for call in calls_of(db, int(sys.argv[2]), int(sys.argv[3]))]))
"""


@dataclass(frozen=True)
class Call:
    """``kind``: "write" of ``value``, "read" of ``value``, or "add" 1, which gave ``value``."""

    key: int
    kind: str
    value: int
    begin: float
    end: float  # infinite: the outcome is unknown


def linearizable(calls: list[Call], value: int = 0) -> bool:
    """Whether some order of the calls explains what they gave."""
    calls = sorted(calls, key=lambda call: call.begin)
    known = sum(1 << place for place, call in enumerate(calls) if call.end < math.inf)
    stack, seen = [(0, value)], set[tuple[int, int]]()
    while stack:
        done, value = stack.pop()
        if done & known == known:
            return True
        if (done, value) in seen:
            continue
        seen.add((done, value))
        waiting = [place for place in range(len(calls)) if not done >> place & 1]
        first_end = min(calls[place].end for place in waiting)
        for place in waiting:
            call = calls[place]
            if call.begin > first_end:
                break
            after = done | 1 << place
            if call.kind == "read" and call.value == value:
                stack.append((after, value))
            elif call.kind == "write":
                stack.append((after, call.value))
            elif call.kind == "add" and (call.end == math.inf or call.value == value + 1):
                stack.append((after, value + 1))
    return False


def calls_of(db: DbWriter, seed: int, count: int) -> list[Call]:
    """Calls of one thread, by every way there is."""
    chance, calls = random.Random(seed), list[Call]()
    for number in range(count):
        key, begin = chance.randrange(KEYS), monotonic_ns()
        kind, value = "read", 0
        end: float = 0.0
        way = chance.choice(["run", "block", "add", "enqueue", "read", "reader", "after", "short"])
        new = seed * 1000 + number + 1
        try:
            if way == "read":
                value = db.read_value("SELECT v FROM kv WHERE k = ?", (key,))
            elif way == "reader":
                with db.reader() as connection:
                    value = connection.execute("SELECT v FROM kv WHERE k = ?", (key,)).fetchone()[0]
            elif way == "run":
                kind, value = "write", new
                db.run("UPDATE kv SET v = ? WHERE k = ?", (new, key))
            elif way == "enqueue":
                kind, value = "write", new
                db.enqueue("UPDATE kv SET v = ? WHERE k = ?", (new, key)).result(HANG)
            elif way == "after":  # sees its own write or a later one: the write ended before this read begins
                ticket = db.enqueue("UPDATE kv SET v = ? WHERE k = ?", (new, key))
                value = db.read_value("SELECT v FROM kv WHERE k = ?", (key,), after=ticket)
                middle = begin
                calls.append(Call(key, "write", new, begin, monotonic_ns()))
                begin = middle
            elif way == "block":
                kind = "add"
                with db.transaction() as tx:
                    value = tx.execute("SELECT v FROM kv WHERE k = ?", (key,)).rows[0][0] + 1
                    tx.execute("UPDATE kv SET v = ? WHERE k = ?", (value, key))
            elif way == "add":
                kind = "add"
                value = db.run("UPDATE kv SET v = v + 1 WHERE k = ? RETURNING v", (key,)).rows[0][0]
            else:
                kind, value = "write", new
                db.run("UPDATE kv SET v = ? WHERE k = ?", (new, key), timeout=0.0002)
        except WriteTimeoutError as error:
            if not error.started:
                continue  # it never runs, and the checker would see it if it did
            end = math.inf
        calls.append(Call(key, kind, value, begin, end or monotonic_ns()))
    return calls


def record(folder: Path, seed: int, others: int) -> list[Call]:
    """A history of eight threads, and ``others`` processes."""
    path, calls, lock = folder / "app.db", list[Call](), threading.Lock()
    errors: list[BaseException] = []
    with DbWriter(path) as db:
        db.run(TABLE)
        db.run_many("INSERT INTO kv VALUES (?, 0)", [(key,) for key in range(KEYS)])

        def work(number: int) -> None:
            try:
                mine = calls_of(db, seed * 100 + number, CALLS)
            except BaseException as error:
                errors.append(error)
                return
            with lock:
                calls.extend(mine)

        with contextlib.ExitStack() as stack:
            running = []
            for number in range(others):
                command = child(OTHER, path, seed * 100 + 50 + number, CALLS)
                options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                running.append(stack.enter_context(subprocess.Popen(command, env=environment(), **options)))
            threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
            for process in running:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for process in running:
                calls += [Call(**found) for found in json.loads(process.communicate(timeout=HANG)[0])]
    if errors:
        raise errors[0]
    return calls


def run(size: int, seed: int, folder: Path, others: int = 2) -> Outcome:
    """``size`` histories; every fifth one with two more processes."""
    outcome = Outcome()
    for number in range(size):
        place = folder / str(number)
        place.mkdir()
        calls = record(place, seed + number, others if number % 5 == 4 else 0)
        outcome.trials += 1
        outcome.acknowledged += sum(call.end < math.inf for call in calls)
        outcome.notes["unknown outcome"] += sum(call.end == math.inf for call in calls)
        by_key: dict[int, list[Call]] = defaultdict(list)
        for call in calls:
            by_key[call.key].append(call)
        for key, mine in by_key.items():
            if not linearizable(mine):
                outcome.find(f"history {number}, key {key}: no order explains it")
    return outcome
