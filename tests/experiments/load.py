"""The load of the crash experiments, and what must be true of the file after it was cut off at any moment.

Each producer numbers its jobs 1, 2, 3 … and each job writes its number into two tables. ``A producer n`` is told once
job n is acknowledged, ``S producer n`` before it is handed in.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from experiments import Outcome, integrity

SCHEMA = """
CREATE TABLE IF NOT EXISTS a (producer INTEGER, n INTEGER, text TEXT, PRIMARY KEY (producer, n));
CREATE TABLE IF NOT EXISTS b (producer INTEGER, n INTEGER, PRIMARY KEY (producer, n));
CREATE TRIGGER IF NOT EXISTS both AFTER INSERT ON a WHEN NEW.n % 3 = 0 BEGIN
    INSERT INTO b VALUES (NEW.producer, NEW.n);
END;
"""

# Arguments: path, producers, jobs for each (0: for ever), synchronous, journal mode, file for the lines (or "-").
CODE = f"""
import os, sys, threading, traceback
from onewriter import DbWriter

def failed(arguments):  # an error of a producer is a finding
    traceback.print_exception(arguments.exc_value)
    os._exit(9)

threading.excepthook = failed
path, producers, jobs, synchronous, mode, told = sys.argv[1:7]
fd = 1 if told == "-" else os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
db = DbWriter(path, synchronous=synchronous, journal_mode=mode, wal_limit=100_000)
db.run_script('''{SCHEMA}''')
A, B = "INSERT INTO a VALUES (?, ?, ?)", "INSERT INTO b VALUES (?, ?)"

def tell(kind, producer, n):
    os.write(fd, f"{{kind}} {{producer}} {{n}}\\n".encode())

def both(tx, producer, n):
    tx.execute(A, (producer, n, "x" * 300))
    if n % 3:
        tx.execute(B, (producer, n))

def acknowledge(producer, n):
    def done(ticket):
        if ticket.exception() is None:
            tell("A", producer, n)
    return done

def produce(producer):
    n = db.read_value("SELECT coalesce(max(n), 0) FROM a WHERE producer = ?", (producer,))
    last = n + int(jobs) if int(jobs) else float("inf")
    while n < last:
        n += 1
        tell("S", producer, n)
        if n % 3 == 0 and n % 2:  # one statement, whose trigger writes the other row
            db.enqueue(A, (producer, n, "x" * 300)).add_done_callback(acknowledge(producer, n))
        elif n % 5 == 1:
            db.run(lambda tx: both(tx, producer, n))
            tell("A", producer, n)
        elif n % 5 == 2:
            with db.transaction() as tx:
                both(tx, producer, n)
            tell("A", producer, n)
        else:
            db.enqueue(lambda tx, n=n: both(tx, producer, n)).add_done_callback(acknowledge(producer, n))
        if n % 50 == 0:
            db.flush()
        if n % 70 == 7 and producer == 0:
            db.checkpoint()
            db.backup(path + ".copy")

threads = [threading.Thread(target=produce, args=(number,)) for number in range(int(producers))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
db.flush()
os._exit(0)  # the file is as it is
"""


def judge(path: Path, told: Iterable[str], outcome: Outcome, what: str, *, may_lose: bool = False) -> None:
    """Look into the file that was left: nothing acknowledged is missing, nothing is half there, nothing is damaged."""
    acknowledged: dict[int, int] = {}
    started: dict[int, int] = {}
    for line in told:
        words = line.split()
        if len(words) == 3:
            kind, producer, n = words[0], int(words[1]), int(words[2])
            numbers = acknowledged if kind == "A" else started
            numbers[producer] = max(numbers.get(producer, 0), n)
    if not path.exists() or not integrity(path, outcome, what):
        if acknowledged and not may_lose:
            outcome.lost += sum(acknowledged.values())
        return
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not {"a", "b"} <= tables:
            outcome.lost += 0 if may_lose else sum(acknowledged.values())
            return
        rows = dict[int, list[int]]()
        for producer, n in connection.execute("SELECT producer, n FROM a ORDER BY producer, n"):
            rows.setdefault(producer, []).append(n)
        halves = connection.execute(
            "SELECT count(*) FROM (SELECT producer, n FROM a EXCEPT SELECT producer, n FROM b) "
            "UNION ALL SELECT count(*) FROM (SELECT producer, n FROM b EXCEPT SELECT producer, n FROM a)"
        ).fetchall()
    if halves != [(0,), (0,)]:
        outcome.find(f"{what}: half a job is there: {halves}")
    for producer, there in rows.items():
        if there != list(range(1, len(there) + 1)):
            outcome.find(f"{what}: producer {producer} has a gap")
        if started and there[-1] > started.get(producer, 0):
            outcome.find(f"{what}: producer {producer} has job {there[-1]}, which nobody has handed in")
    for producer, last in acknowledged.items():
        outcome.acknowledged += last
        missing = last - len(rows.get(producer, []))
        if missing > 0 and not may_lose:
            outcome.lost += missing
            outcome.find(f"{what}: producer {producer} has lost {missing} acknowledged jobs")
