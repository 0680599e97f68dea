"""Signal handlers that use the gateway at random moments in every kind of call, and in the end close it there."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
from pathlib import Path

from experiments import HANG, Outcome, child, environment, integrity

WAYS = ("run", "block", "lent", "function", "enqueue", "withdraw", "read", "reader", "watch", "callback")
ROUNDS = 150
LOAD = """
import faulthandler, json, os, random, signal, sys
from onewriter import DbWriter, OneWriterError

path, way, rounds, seed, first = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
faulthandler.dump_traceback_later(50, exit=True)
chance, findings = random.Random(seed), []
numbers = iter(range(first, first + 100_000))
there, undone, with_call = set(), set(), set()  # the last: acknowledged as a part of what it came in
armed, ending, handled = False, False, 0
db = DbWriter(path, readers=2, maxsize=20, slow_after=60, on_error=lambda ticket: None)
db.run("CREATE TABLE IF NOT EXISTS t (n)")
INSERT = "INSERT INTO t VALUES (?)"

def act(n):
    kind = chance.randrange(6)
    if ending:
        db.close(chance.choice([None, 0.5]))
    elif kind == 0:
        db.enqueue(INSERT, (n,))
        there.add(n)
    elif kind == 1:
        db.run(INSERT, (n,), timeout=5)
        with_call.add(n)
    elif kind == 2:
        with db.transaction(timeout=5) as tx:
            tx.execute(INSERT, (n,))
        with_call.add(n)
    elif kind == 3:
        db.flush(5)
    elif kind == 4:
        db.read("SELECT count(*) FROM t", timeout=5)
        db.stats(), db.health
    else:
        with db.reader(timeout=5) as connection:
            connection.execute("SELECT count(*) FROM t").fetchone()

def handler(*_):
    global armed, handled
    if not armed:
        return
    armed = False
    n = next(numbers)
    try:
        act(n)
        handled += 1
    except OneWriterError as error:
        if not getattr(error, "started", False) and n not in there | with_call:
            undone.add(n)
    except Exception as error:
        # A lent connection is inside its block, which may be at any of its statements.
        findings.append(f"handler: {error!r}")

def call(n):
    if way == "run":
        db.run(INSERT, (n,))
    elif way == "block":
        with db.transaction() as tx:
            tx.execute(INSERT, (n,))
    elif way == "lent":
        with db.transaction() as tx:
            tx.connection.execute(INSERT, (n,)).fetchall()
            tx.connection.commit()
    elif way == "function":
        db.run(lambda tx: tx.execute(INSERT, (n,)).rowcount)
    elif way == "enqueue":
        db.enqueue(INSERT, (n,), timeout=20)
    elif way == "withdraw":
        if db.enqueue(INSERT, (n,)).cancel():
            undone.add(n)
            return
    elif way == "read":
        db.read("SELECT count(*) FROM (SELECT n FROM t LIMIT 50)")
        return
    elif way == "reader":
        with db.reader() as connection:
            connection.execute("SELECT n FROM t LIMIT 50").fetchall()
        return
    elif way == "watch":
        with db.watch("SELECT count(*) FROM t", every=0) as live:
            live.next(5)
        db.run(INSERT, (n,))
    else:
        with db.transaction() as tx:
            tx.on_commit(lambda: [None for _ in range(2000)])
            tx.execute(INSERT, (n,))
    there.add(n)

signal.signal(signal.SIGALRM, handler)
for number in range(rounds):
    ending = number == rounds - 1
    n = next(numbers)
    with_call.clear()
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 4e-4))
        while armed and ending:
            call(n)
            n = next(numbers)
        if not ending:
            call(n)
        there |= with_call
    except OneWriterError as error:
        if not ending:
            findings.append(f"round {number}: {error!r}")
    except Exception as error:
        findings.append(f"round {number}: {error!r}")
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
if not db.closed:
    try:
        db.run("UPDATE t SET n = n WHERE n = -1", timeout=10)
    except BaseException as error:
        findings.append(f"at the end: {error!r}")
report = db.close(10)
print(json.dumps([handled, report.unfinished, sorted(there), sorted(undone), findings]))
sys.stdout.flush()
"""


def run(size: int, seed: int, folder: Path, rounds: int = ROUNDS) -> Outcome:
    """``size`` processes, which make ``rounds`` calls each."""
    outcome, path = Outcome(), folder / "app.db"
    there, undone = set[int](), set[int]()
    for trial in range(size):
        way = WAYS[trial % len(WAYS)]
        command = child(LOAD, path, way, rounds, seed * 1000 + trial, trial * 100_000)
        ran = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG, check=False)
        outcome.trials += 1
        if ran.returncode or not ran.stdout:
            outcome.hung += "Timeout" in ran.stderr
            outcome.find(f"{way}, process {trial}: exit code {ran.returncode}: {ran.stderr[-1500:]}")
            continue
        handled, unfinished, its_there, its_undone, findings = json.loads(ran.stdout)
        outcome.notes[way] += handled
        outcome.hung += unfinished
        outcome.findings += [f"{way}, process {trial}: {finding}" for finding in findings]
        there.update(its_there)
        undone.update(its_undone)
    integrity(path, outcome, "handlers")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = [n for (n,) in connection.execute("SELECT n FROM t")]
    found = set(rows)
    outcome.acknowledged, outcome.lost = len(there), len(there - found)
    if there - found or undone & found or len(rows) != len(found):
        outcome.find(f"lost {sorted(there - found)[:9]}, not undone {sorted(undone & found)[:9]}, or twice")
    return outcome
