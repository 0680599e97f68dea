"""gevent, whose greenlets take the place of threads, if it replaces those before onewriter is imported."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import children

PROGRAM = """
import sys
from gevent import monkey
monkey.patch_all()
import gevent, gevent.event
from onewriter import DbWriter, ReadTimeoutError, WriteTimeoutError

INSERT = "INSERT INTO t VALUES (?)"
COUNT = "SELECT count(*) FROM t"
db = DbWriter(sys.argv[1], readers=2)
db.run("CREATE TABLE t (n)")

def work(n):
    with db.transaction() as tx:
        tx.execute(INSERT, (n,))
        gevent.sleep(0.001)
        tx.execute(INSERT, (n,))
    db.run(lambda tx: tx.execute(INSERT, (n,)))
    with db.reader() as connection:
        before = connection.execute(COUNT).fetchone()
        gevent.sleep(0.001)
        assert connection.execute(COUNT).fetchone() == before
    db.run(INSERT, (n,))

def told(error, call):
    try:
        call()
    except error:
        return
    raise AssertionError("not told")

def hold():
    with db.transaction() as tx:
        tx.execute(INSERT, (-1,))
        entered.set()
        release.wait()

gevent.joinall([gevent.spawn(work, n) for n in range(50)], raise_error=True)
entered, release = gevent.event.Event(), gevent.event.Event()
holder = gevent.spawn(hold)
entered.wait()
told(WriteTimeoutError, lambda: db.run(INSERT, (-2,), timeout=0.01))
ticket = db.enqueue(INSERT, (-3,))
told(ReadTimeoutError, lambda: db.read(COUNT, after=ticket, timeout=0.01))
assert db.read_value(COUNT) == 200
release.set()
holder.get()
assert db.read_value(COUNT, after=ticket) == 202
with db.watch(COUNT) as live:
    assert live.next() == [(202,)]
    gevent.spawn(db.run, INSERT, (-4,))
    assert live.next(timeout=30) == [(203,)]
for n in range(1000):
    db.enqueue(INSERT, (n,))
"""


def test_greenlets_write_and_read_as_threads_do_and_what_was_accepted_is_written_at_exit(path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=children.environment())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (1203,)
