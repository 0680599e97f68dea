"""enqueue may be called where Python runs code of its own accord: finalizers and signal handlers, in any thread."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

from helpers import run_child

EXPECTED = {"del": 2000, "finalize": 2000, "main": 1000, "producer": 8000, "signal": 5000, "writer": 2000}

CODE = """
import faulthandler, gc, itertools, json, signal, sys, threading, weakref
from onewriter import DbWriter

# A deadlock ends with the stack of every thread.
faulthandler.dump_traceback_later(30, exit=True)
expected = json.loads({expected!r})
failed = []
db = DbWriter({path!r}, maxsize=20, synchronous="OFF", on_error=failed.append)
db.run("CREATE TABLE t (source TEXT, n INTEGER, PRIMARY KEY (source, n))")
# Collections at a great many places, the gateway's own lines among them.
gc.set_threshold(50)
numbers = {{source: itertools.count() for source in expected}}

def add(source):
    db.enqueue("INSERT INTO t VALUES (?, ?)", (source, next(numbers[source])), timeout=60)


class Cycle:
    def __init__(self):
        self.me = self


class WithDel(Cycle):
    def __del__(self):
        add("del")


fired = depth = 0

def on_signal(number, frame):
    global fired, depth
    # Signals come faster than a loaded machine handles them, so a handler may be interrupted by the next one.
    if fired < expected["signal"] and depth < 10:
        fired += 1
        depth += 1
        add("signal")
        depth -= 1


def make_garbage(tx):
    for _ in range(10):
        weakref.finalize(Cycle(), add, "writer")


def make_jobs():
    for _ in range(expected["writer"] // 10):
        db.enqueue(make_garbage, timeout=60)


def produce():
    for _ in range(expected["producer"] // 4):
        add("producer")


signal.signal(signal.SIGALRM, on_signal)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
threads = [threading.Thread(target=produce) for _ in range(4)] + [threading.Thread(target=make_jobs)]
for thread in threads:
    thread.start()
for _ in range(1000):
    WithDel(), WithDel()
    weakref.finalize(Cycle(), add, "finalize")
    weakref.finalize(Cycle(), add, "finalize")
    add("main")
for thread in threads:
    thread.join(60)
while fired < expected["signal"]:
    signal.pause()
signal.setitimer(signal.ITIMER_REAL, 0)
db.flush(timeout=60)
gc.collect()
report = db.close(timeout=60)
print(json.dumps({{"failed": len(failed), "unfinished": report.unfinished}}))
"""


def test_enqueue_from_finalizers_and_signal_handlers_neither_deadlocks_nor_loses_a_row(path: Path) -> None:
    """A full queue, finalizers in the writer thread too, and 5,000 signals a second."""
    child = run_child(CODE.format(expected=json.dumps(EXPECTED), path=str(path)))
    assert child.returncode == 0, child.stderr
    assert "Exception ignored" not in child.stderr, child.stderr
    assert json.loads(child.stdout) == {"failed": 0, "unfinished": 0}
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = dict(connection.execute("SELECT source, count(*) FROM t GROUP BY source").fetchall())
    assert found == EXPECTED
