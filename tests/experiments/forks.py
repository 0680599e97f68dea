"""Forks at random moments in every place where the user's code runs: in callbacks, jobs, blocks, readers and handlers.

The child finds that nothing of the parent's is its own, runs nothing of it, and ends; the parent loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

from experiments import HANG, Outcome, child, environment, integrity

LOAD = """
import faulthandler, json, logging, os, random, sys, threading, warnings
from onewriter import DbWriter, ForkedError, OneWriterError

warnings.simplefilter("ignore")
logging.disable()
faulthandler.enable()  # not a timer: its thread is not in the child, whose end would wait for it
path, rounds, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance, findings, there, numbers = random.Random(seed), [], set(), iter(range(10**9))
INSERT = "INSERT INTO t VALUES (?)"
MINE = -1  # only a child would write it
db = DbWriter(path, readers=2, slow_after=60)
db.run("CREATE TABLE t (n)")
main, children = os.getpid(), []

def in_child(tx=None, connection=None):
    def fails(call):
        try:
            call()
        except ForkedError:
            return
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\\n".encode())
        os._exit(9)
    fails(lambda: db.run(INSERT, (MINE,)))
    fails(lambda: db.enqueue(INSERT, (MINE,)))
    fails(lambda: db.read("SELECT 1"))
    fails(lambda: db.flush())
    fails(lambda: db.transaction().__enter__())
    fails(lambda: DbWriter(path))
    if tx is not None:
        fails(lambda: tx.execute(INSERT, (MINE,)))
    if connection is not None:
        try:
            connection.execute("SELECT 1").fetchall()
            os._exit(8)
        except Exception:
            pass
    db.close()

def fork(*arguments, inside=False, **given):  # inside SQLite a child cannot go on: CPython waits for ever there
    pid = os.fork()
    if pid:
        children.append(pid)
        return None
    in_child(**given)
    way = chance.randrange(4)
    if way == 0 or inside:
        os._exit(7)
    if way == 1:
        sys.exit(7)
    if way == 2:
        raise SystemExit(7)
    return None  # it goes on, with whatever is on its stack

def job(tx, n):
    tx.execute(INSERT, (n,))
    fork(tx=tx)

def one(way, n):
    if way == "job":
        db.run(lambda tx: job(tx, n))
    elif way == "job in company":
        tickets = [db.enqueue(INSERT, (next(numbers),)) for _ in range(20)]
        db.enqueue(lambda tx: job(tx, n)).result(30)
    elif way == "block":
        with db.transaction() as tx:
            job(tx, n)
    elif way == "lent":
        with db.transaction() as tx:
            tx.connection.execute(INSERT, (n,))
            fork(tx=tx, connection=tx.connection)
    elif way == "on_commit":
        with db.transaction() as tx:
            tx.execute(INSERT, (n,))
            tx.on_commit(fork)
    elif way == "done":
        ticket = db.enqueue(INSERT, (n,))
        ticket.add_done_callback(fork)
        ticket.result(30)
        db.flush(30)
    elif way == "reader":
        with db.reader() as connection:
            connection.execute("SELECT 1").fetchall()
            fork(connection=connection)
        db.run(INSERT, (n,))
    elif way == "read":
        db.read(lambda connection: fork(connection=connection))
        db.run(INSERT, (n,))
    elif way == "function of SQL":
        def job_(tx):
            tx.connection.create_function("forks", 0, lambda: fork(inside=True))
            tx.connection.execute("SELECT forks()").fetchall()
            tx.execute(INSERT, (n,))
        db.run(job_)
    elif way == "watch":
        with db.watch("SELECT count(*) FROM t") as live:
            live.next(30)
            fork()
        db.run(INSERT, (n,))
    else:
        db.backup(path + ".copy", progress=lambda *_: fork(), pages=1)
        db.run(INSERT, (n,))

WAYS = ["job", "job in company", "block", "lent", "on_commit", "done", "reader", "read", "function of SQL", "watch"]
WAYS += ["backup"]
stop = threading.Event()

def beside():
    n = 10**9
    while not stop.is_set():
        n += 1
        try:
            db.run(INSERT, (n,), timeout=30)
        except Exception as error:
            findings.append(f"beside: {error!r}")
            return
        there.add(n)

thread = threading.Thread(target=beside, daemon=True)
thread.start()
for number in range(rounds):
    way, n = chance.choice(WAYS), next(numbers)
    try:
        one(way, n)
    except ForkedError as error:
        if os.getpid() == main:
            findings.append(f"{way}: in the parent: {error!r}")
    except BaseException as error:
        if os.getpid() == main:
            findings.append(f"{way}: {error!r}")
    if os.getpid() != main:
        in_child()
        sys.exit(7)
    there.add(n)
    while children:
        _, status = os.waitpid(pid := children.pop(), 0)
        if os.waitstatus_to_exitcode(status) not in (7, 0):  # 0: the thread that is left in it was the writer's
            findings.append(f"{way}: a child ended with {os.waitstatus_to_exitcode(status)}")
stop.set()
thread.join(30)
report = db.close(30)
print(json.dumps([report.unfinished, sorted(there), findings]))
"""


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` processes, each of which forks ten times or more."""
    outcome = Outcome()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    for trial in range(size):
        path, what = folder / f"{trial}.db", f"process {trial}"
        command = child(LOAD, path, 10, seed * 1000 + trial)
        with subprocess.Popen(command, start_new_session=True, **pipes) as process:
            try:
                printed, errors = process.communicate(timeout=HANG)
            except subprocess.TimeoutExpired:
                outcome.hung += 1
                os.killpg(process.pid, signal.SIGABRT)  # which prints the stacks
                printed, errors = process.communicate()
        outcome.trials += 1
        lines = printed.splitlines()
        if process.returncode or len(lines) != 1:
            outcome.find(f"{what}: exit code {process.returncode}, {len(lines)} lines: {errors[-1500:]}")
            continue
        unfinished, there, findings = json.loads(lines[0])
        outcome.hung += unfinished
        outcome.findings += [f"{what}: {finding} {errors[-300:]}" for finding in dict.fromkeys(findings)]
        outcome.acknowledged += len(there)
        integrity(path, outcome, what)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            rows = [n for (n,) in connection.execute("SELECT n FROM t")]
        outcome.lost += len(set(there) - set(rows))
        if set(there) - set(rows) or -1 in rows or len(rows) != len(set(rows)):
            outcome.find(f"{what}: lost {sorted(set(there) - set(rows))[:9]}, of a child {rows.count(-1)}, or twice")
    return outcome
