"""Exceptions, log handlers and streams that misbehave, in every place where one meets the gateway, beside plain writes.

An exception may refuse its attributes, its notes, str or repr, or raise as it is destroyed; a handler may raise, take
its time, or write with the gateway; ``sys.stderr`` may be closed, broken or gone.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
from pathlib import Path

from experiments import HANG, Outcome, child, environment, integrity

STREAMS = ("stderr", "None", "closed", "raises")
HANDLERS = ("none", "raises", "exits", "slow", "enqueues", "runs")
LOAD = """
import faulthandler, io, json, logging, os, random, sqlite3, sys, threading, time
from onewriter import DbWriter, OneWriterError

faulthandler.dump_traceback_later(50, exit=True, file=os.fdopen(os.dup(2), "w"))
path, stream, handler, seconds, seed = *sys.argv[1:4], float(sys.argv[4]), int(sys.argv[5])
findings, there, undone, numbers, lock = [], set(), set(), iter(range(10**9)), threading.Lock()

class Plain(Exception): pass
class NoText(BaseException):
    def __str__(self): raise RuntimeError("str")
    __repr__ = __str__
class NoHash(Exception):
    def __eq__(self, other): raise RuntimeError("eq")
    __hash__ = None
class NoNotes(BaseException):
    def add_note(self, note): raise SystemExit("note")
class BadNotes(Exception):
    @property
    def __notes__(self): raise KeyboardInterrupt
class BadCode(sqlite3.OperationalError):
    @property
    def sqlite_errorcode(self): raise SystemExit
class BadClass(Exception):
    @property
    def __class__(self): raise KeyboardInterrupt
class BadTraceback(Exception):
    @property
    def __traceback__(self): raise KeyboardInterrupt
    def with_traceback(self, traceback): raise SystemExit
class NoAttributes(Exception):
    def __getattribute__(self, name): raise SystemExit(name)
    def __setattr__(self, name, value): raise SystemExit(name)
class BadEnd(Exception):
    def __del__(self): raise RuntimeError("del")
class EndWrites(Exception):
    def __del__(self): db.enqueue("INSERT INTO other VALUES (1)")
class NeedsTwo(Exception):
    def __init__(self, one, two): pass
class BadContext(Exception):
    @property
    def __context__(self): raise KeyboardInterrupt
    @property
    def __cause__(self): raise KeyboardInterrupt
class BadReduce(OneWriterError):
    def __reduce_ex__(self, protocol): raise SystemExit
KINDS = [Plain, NoText, NoHash, NoNotes, BadNotes, BadCode, BadClass, BadTraceback, NoAttributes, BadEnd, EndWrites,
         lambda: NeedsTwo(1, 2), BadContext, BadReduce]

class Handler(logging.Handler):
    def emit(self, record):
        if handler == "raises":
            raise random.choice(KINDS)()
        elif handler == "exits":
            raise SystemExit
        elif handler == "slow":
            time.sleep(0.05)
        elif handler == "enqueues":
            db.enqueue("INSERT INTO other VALUES (2)", timeout=0.1)
        elif handler == "runs":
            db.run("INSERT INTO other VALUES (3)", timeout=0.1)

class Broken(io.StringIO):
    def write(self, text): raise RuntimeError("main thread is not in main loop")
    flush = write

if stream == "None":
    sys.stderr = None
elif stream == "closed":
    sys.stderr.close()
elif stream == "raises":
    sys.stderr = Broken()
if handler != "none":
    logging.raiseExceptions = seed % 2 == 0
    logging.getLogger("onewriter").addHandler(Handler())
sys.unraisablehook = lambda arguments: None
threading.excepthook = lambda arguments: None

def on_error(ticket):
    if seed % 3 == 0:
        raise random.choice(KINDS)()

db = DbWriter(path, readers=2, slow_after=0.01, maxsize=50, on_error=on_error)
db.run_script("CREATE TABLE t (n); CREATE TABLE other (n)")

def odd(tx, n, kind):
    tx.execute("INSERT INTO t VALUES (?)", (n,))
    raise kind()

def callback(*_):
    raise random.choice(KINDS)()

def work(number):
    chance = random.Random(seed * 100 + number)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with lock:
            n, m = next(numbers), next(numbers)
        kind, way = chance.choice(KINDS), chance.randrange(7)
        try:
            if way == 0:
                db.run(lambda tx: odd(tx, n, kind), timeout=20)
            elif way == 1:
                db.enqueue(lambda tx: odd(tx, n, kind), timeout=20)
            elif way == 2:
                with db.transaction(timeout=20) as tx:
                    odd(tx, n, kind)
            elif way == 3:
                db.read(lambda connection: callback(), timeout=20)
            elif way == 4:
                with db.reader(timeout=20) as connection:
                    callback()
            elif way == 5:
                def well(tx):
                    tx.on_commit(callback)
                    tx.execute("INSERT INTO t VALUES (?)", (n,))
                ticket = db.enqueue(well, timeout=20)
                ticket.add_done_callback(callback)
                ticket.result(20)
                there.add(n)
            else:
                with db.transaction(timeout=20) as tx:
                    tx.execute("INSERT INTO t VALUES (?)", (n,))
                    tx.on_commit(callback)
                there.add(n)
        except BaseException as error:
            if issubclass(type(error), (TimeoutError, OneWriterError)) and type(error) is not BadReduce:
                findings.append(f"way {way}: {type(error).__name__} {error}"[:300])
            del error
        else:
            if way < 1 or way in (2, 3, 4):
                findings.append(f"way {way}: nothing was raised")
        if way < 3:
            undone.add(n)
        try:
            db.run("INSERT INTO t VALUES (?)", (m,), timeout=20)
            there.add(m)
        except BaseException as error:
            findings.append(f"a plain write: {type(error).__name__} {error}"[:300])

threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(40)
    if thread.is_alive():
        findings.append("a thread hangs")
if db.health.startswith("broken"):
    findings.append(db.health)
report = db.close(20)
sys.stdout.write('\\n' + json.dumps([report.unfinished, sorted(there), sorted(undone), findings]))
sys.stdout.flush()
os._exit(0)
"""


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` processes of a second each."""
    outcome = Outcome()
    for trial in range(size):
        path = folder / f"{trial}.db"
        stream, handler = STREAMS[trial % len(STREAMS)], HANDLERS[(trial + trial // len(HANDLERS)) % len(HANDLERS)]
        what = f"stderr {stream}, handler {handler}"
        command = child(LOAD, path, stream, handler, 1.0, seed * 1000 + trial)
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, env=environment(), timeout=2 * HANG, check=False
            )
        except subprocess.TimeoutExpired:
            outcome.hung += 1
            outcome.find(f"{what}: hangs")
            continue
        outcome.trials += 1
        if ran.returncode or not ran.stdout:
            outcome.hung += "Timeout" in ran.stderr
            outcome.find(f"{what}: exit code {ran.returncode}: {ran.stderr[-1500:]}")
            continue
        printed, _, result = ran.stdout.rpartition("\n")
        if printed:
            outcome.find(f"{what}: it printed {printed[:300]}")
        unfinished, there, undone, findings = json.loads(result)
        outcome.hung += unfinished
        outcome.findings += [f"{what}: {finding}" for finding in dict.fromkeys(findings)]
        _judge(path, set(there), set(undone), outcome, what)
    return outcome


def _judge(path: Path, there: set[int], undone: set[int], outcome: Outcome, what: str) -> None:
    integrity(path, outcome, what)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = [n for (n,) in connection.execute("SELECT n FROM t")]
    outcome.acknowledged += len(there)
    outcome.lost += len(there - set(rows))
    if there - set(rows) or undone & set(rows) or len(rows) != len(set(rows)):
        lost, kept = sorted(there - set(rows)), sorted(undone & set(rows))
        outcome.find(f"{what}: lost {lost[:9]}, not undone {kept[:9]}, or twice")
