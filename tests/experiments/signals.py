"""The ends of a process: SIGINT and SIGTERM at random moments in every kind of call; exits of every kind."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

from experiments import HANG, Outcome, child, environment, load

ENDS_WITHIN = 10.0  # seconds
LOAD = f"""
import os, signal, sys, threading
from onewriter import DbWriter

path, way, handler = sys.argv[1:4]
if handler == "handler":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(3))
signal.signal(signal.SIGINT, signal.default_int_handler)
db = DbWriter(path, slow_after=60)
db.run_script('''{load.SCHEMA}''')

closed = []

def both(tx, n):
    tx.execute("INSERT INTO a VALUES (0, ?, '')", (n,))
    if n % 3:
        tx.execute("INSERT INTO b VALUES (0, ?)", (n,))

def acknowledge(n):
    os.write(1, f"A 0 {{n}}\\n".encode())

def work():
    global db
    n = db.read_value("SELECT coalesce(max(n), 0) FROM a")
    os.write(1, b"ready\\n")
    while True:
        n += 1
        if way == "run":
            db.run(lambda tx: both(tx, n))
        elif way == "block":
            with db.transaction() as tx:
                both(tx, n)
        elif way == "read":
            db.run(lambda tx: both(tx, n))
            acknowledge(n)
            for _ in range(50):
                db.read("SELECT count(*) FROM a, (SELECT n FROM a LIMIT 20)")
            continue
        elif way == "enqueue":
            db.enqueue(lambda tx, n=n: both(tx, n)).add_done_callback(
                lambda ticket, n=n: acknowledge(n) if ticket.exception() is None else None)
            if n % 20 == 0:
                db.flush()
            continue
        else:
            db.run(lambda tx: both(tx, n))
            db.close()
            closed.append(db)  # what a handler raises in a finalizer Python discards
            db = DbWriter(path, slow_after=60)
        acknowledge(n)

if way == "daemon":
    way = "run"
    threading.Thread(target=work, daemon=True).start()
    threading.Event().wait()
work()
"""
WAYS = ("run", "block", "read", "close", "enqueue", "daemon")


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` processes, each ended by a signal at a random moment."""
    chance, outcome = random.Random(seed), Outcome()
    for trial in range(size):
        way = WAYS[trial % len(WAYS)]
        number, handler = (
            (signal.SIGINT, "none") if trial % 4 else (signal.SIGTERM, chance.choice(["handler", "default"]))
        )
        path = folder / f"{way}.db"
        what = f"{number.name} ({handler}) in {way}"
        command = child(LOAD, path, way, handler)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as process:
            assert process.stdout is not None
            ready = process.stdout.readline()
            time.sleep(chance.random() * 0.1)
            process.send_signal(number)
            try:
                output, errors = process.communicate(timeout=ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                outcome.hung += 1
                outcome.find(f"{what}: it goes on after {ENDS_WITHIN} s")
                process.kill()
                output, errors = process.communicate(timeout=HANG)
        outcome.trials += 1
        expected = {signal.SIGINT: (1, 130, -signal.SIGINT)}.get(
            number, (3,) if handler == "handler" else (-signal.SIGTERM,)
        )
        if process.returncode not in expected:
            outcome.find(f"{what}: exit code {process.returncode}: {errors[-300:]}")
        if "Fatal Python error" in errors or ready != "ready\n":
            outcome.find(f"{what}: {ready!r} {errors[-300:]}")
        load.judge(path, output.splitlines(), outcome, what)
    return outcome
