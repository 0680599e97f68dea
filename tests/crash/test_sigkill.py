"""A process killed at any moment loses nothing that it was told is committed, and leaves nothing half done."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

KILLS = 10
GROUP = 7  # rows of a run_many
MANY = "many"

# Writes a line to stdout only once the write is acknowledged. A line is one write(2), so none is cut in two.
LOAD = f"""
import os, sys, threading
from collections import deque
from onewriter import DbWriter

path, round = sys.argv[1], int(sys.argv[2])
db = DbWriter(path, label="load")
db.run_script("CREATE TABLE IF NOT EXISTS t (source TEXT, round INTEGER, n INTEGER, PRIMARY KEY (source, round, n))")
INSERT = "INSERT INTO t VALUES (?, ?, ?)"

def acknowledge(source, n):
    os.write(1, f"A {{source}} {{n}}\\n".encode())

def run(source):
    n = 0
    while True:
        n += 1
        if n % 2:
            db.run(INSERT, (source, round, n))
        else:
            db.run(lambda tx: tx.execute(INSERT, (source, round, n)))
        acknowledge(source, n)

def enqueue(source):
    n, waiting = 0, deque()
    while True:
        while len(waiting) < 50:
            n += 1
            waiting.append((n, db.enqueue(INSERT, (source, round, n))))
        first, ticket = waiting.popleft()
        ticket.result(timeout=30)
        acknowledge(source, first)

def run_many(source):
    group = 0
    while True:
        group += 1
        db.run_many(INSERT, [(source, round, group * {GROUP} + i) for i in range({GROUP})])
        acknowledge(source, group)

threads = [threading.Thread(target=work, args=(name,)) for work, name in
           [(run, "run-1"), (run, "run-2"), (enqueue, "enqueue-1"), (enqueue, "enqueue-2"), (run_many, "{MANY}")]]
for thread in threads:
    thread.start()
"""


def acknowledged_until_killed(path: Path, round_: int, lines: int) -> list[tuple[str, int]]:
    """Put the load on ``path`` in a child, kill it after ``lines`` acknowledgements, and return all it told."""
    command = [sys.executable, "-c", LOAD, str(path), str(round_)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        told = [line for _, line in zip(range(lines), child.stdout, strict=False)]
        child.kill()
        told += child.stdout
        errors = child.stderr.read()
    assert len(told) >= lines, errors
    return [(source, int(n)) for _, source, n in (line.split() for line in told)]


def test_what_was_acknowledged_before_a_kill_is_there_and_nothing_is_half_done(path: Path) -> None:
    """Ten kills of the same file, so that each child opens what the one before it left behind."""
    chance = random.Random(20)
    acknowledged: list[tuple[str, int, int]] = []
    for round_ in range(KILLS):
        told = acknowledged_until_killed(path, round_, chance.randrange(1, 400))
        acknowledged += [(source, round_, n) for source, n in told]

        with contextlib.closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            found = connection.execute("SELECT source, round, n FROM t ORDER BY source, round, n").fetchall()
        single = {row for row in found if row[0] != MANY}
        groups = Counter((source, round_, n // GROUP) for source, round_, n in found if source == MANY)
        assert set(acknowledged) <= single | set(groups)
        assert set(groups.values()) <= {GROUP}
        # Jobs commit in order: no write of a source is there without those it made before.
        assert all(n == 1 or (source, round_, n - 1) in single for source, round_, n in single)
    assert {source for source, _, _ in acknowledged} == {"run-1", "run-2", "enqueue-1", "enqueue-2", MANY}
