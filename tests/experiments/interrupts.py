"""A signal handler that raises, at random moments in every kind of call, in a process that goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from experiments import HANG, Outcome, child, environment, integrity

WAYS = ("run", "block", "nested", "enqueue", "read", "function", "reader")
LOAD = """
import json, os, random, signal, sys
from onewriter import DbWriter

class SignalError(Exception):
    pass

armed = False

def handler(*_):
    if armed:  # the system may deliver one, to another thread, after the timer was stopped
        raise SignalError

path, way, rounds, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
chance, findings, interrupts, done = random.Random(seed), [], 0, 0
db = DbWriter(path, readers=2, slow_after=60, on_error=lambda ticket: None)
db.run("CREATE TABLE IF NOT EXISTS t (n)")
before = db.read_value("SELECT count(*) FROM t")
INSERT = "INSERT INTO t VALUES (1)"

def nested(tx):
    with db.transaction() as inner:
        inner.execute(INSERT)

def call():
    if way == "run":
        db.run(INSERT)
    elif way == "block":
        with db.transaction() as tx:
            tx.execute(INSERT)
    elif way == "nested":
        with db.transaction() as tx:
            db.run(nested)
    elif way == "enqueue":
        db.enqueue(INSERT)
    elif way == "read":
        db.read("SELECT count(*) FROM (SELECT n FROM t LIMIT 50)")
    elif way == "function":
        db.read(lambda connection: connection.execute("SELECT 1").fetchall())
    else:
        with db.reader() as connection:
            connection.execute("SELECT 1").fetchall()

signal.signal(signal.SIGALRM, handler)
longest = 1e-3 if way in ("run", "block", "nested") else 1e-4
for n in range(rounds):
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, longest))
            call()
            done += 1
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (SignalError, KeyboardInterrupt):
        interrupts += 1
    except BaseException as error:
        findings.append(repr(error))
    if way in ("read", "function", "reader") and db.stats().readers_in_use:
        findings.append(f"a connection was lost in round {n}")
        break
    if n % 50 == 0:
        try:
            db.run("UPDATE t SET n = 1 WHERE n = 2", timeout=10)
        except BaseException as error:
            findings.append(f"round {n}: {error!r}")
            break
report = db.close(10)
with DbWriter(path) as db:
    rows = db.read_value("SELECT count(*) FROM t") - before
if way in ("run", "block", "nested", "enqueue") and not done <= rows <= rounds:
    findings.append(f"{rows} rows, {done} acknowledged")
print(json.dumps([interrupts, done, report.unfinished, findings]))
sys.stdout.flush()
os._exit(0)
"""


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` calls of each kind, most of them interrupted or nearly so."""
    outcome, path = Outcome(), folder / "app.db"
    for way in WAYS:
        command = child(LOAD, path, way, size, seed)
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, env=environment(), timeout=HANG + size * 0.01, check=False
            )
        except subprocess.TimeoutExpired:
            outcome.hung += 1
            outcome.find(f"{way}: hangs")
            continue
        if ran.returncode or not ran.stdout:
            outcome.find(f"{way}: {ran.stderr[-500:]}")
            continue
        interrupts, done, unfinished, findings = json.loads(ran.stdout)
        outcome.trials += interrupts
        outcome.acknowledged += done
        outcome.hung += unfinished
        outcome.notes[way] = interrupts
        outcome.findings += [f"{way}: {finding}" for finding in findings]
    integrity(path, outcome, "interrupts")
    return outcome
