"""A child of fork() never touches what it has inherited, whatever it does, and the parent is not harmed."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

PROGRAM = """
import contextlib, multiprocessing, os, sqlite3, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads, which is what this is about
from onewriter import DbWriter, ForkedError

PATH, MODE, INLINE, PLACE, ACTION = {path!r}, {mode!r}, {inline!r}, {place!r}, {action!r}
ROW = "INSERT INTO t VALUES (?)"
db = DbWriter(PATH, journal_mode=MODE, inline=INLINE)
db.run("CREATE TABLE t (n)")
db.run_many(ROW, [(n,) for n in range(100)])
db.read("SELECT count(*) FROM t")
pending = lent = None
live = []

def refused(call):
    try:
        call()
    except ForkedError as error:
        assert "before the fork" in str(error)
    else:
        raise AssertionError("not refused")

def use(tx):
    refused(lambda: db.run(ROW, (-1,)))
    refused(lambda: db.run_many(ROW, [(-1,)]))
    refused(lambda: db.enqueue(ROW, (-1,)))
    refused(lambda: db.transaction().__enter__())
    refused(lambda: db.read("SELECT 1"))
    refused(lambda: db.reader().__enter__())
    refused(lambda: db.flush())
    refused(lambda: db.checkpoint())
    refused(lambda: db.backup(PATH + ".copy"))
    refused(lambda: db.run_without_transaction("VACUUM"))
    if tx is not None:
        refused(lambda: tx.execute(ROW, (-1,)))
        refused(lambda: tx.connection)
        refused(lambda: tx.on_commit(print))
    if lent is not None:
        refused(lambda: lent.execute("SELECT 1"))
        lent._loan.end()  # as leaving the block would
        for borrowing in db._readers._lent:
            db._readers.end(borrowing)
        assert lent._loan.reader.connection.in_transaction
        assert len(sqlite3.Cursor.fetchmany(live[0]._LentCursor__raw, 2)) == 2  # nothing was closed
    if pending is not None and not pending.done():
        refused(pending.result)
    assert db.closed and not db.in_writer() and db.stats().failed == 0 and db.health.startswith("broken: ")

def child(tx=None):
    global db
    if ACTION == "use":
        use(tx)
    elif ACTION == "close":
        db.close()
        db.close(drain=False)
    elif ACTION == "del":
        del db
    elif ACTION == "open":
        refused(lambda: DbWriter(PATH))
        with DbWriter(PATH + "-of-the-child") as own:
            own.run("CREATE TABLE t (n)")
    elif ACTION == "sys.exit":
        sys.exit(0)
    if ACTION != "return":
        os._exit(0)

def fork(tx=None):
    if ACTION == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=use, args=(tx,))
        process.start()
        process.join(20)
        assert process.exitcode == 0, process.exitcode
        return
    pid = os.fork()
    if pid == 0:
        child(tx)
        return
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status

if PLACE == "idle":
    fork()
elif PLACE == "in a block":
    with db.transaction() as tx:
        tx.execute(ROW, (100,))
        fork(tx)
        tx.execute(ROW, (101,))
elif PLACE == "from inside a job":
    def job(tx):
        tx.execute(ROW, (100,))
        fork(tx)
        tx.execute(ROW, (101,))
    db.run(job)
elif PLACE == "beside a job":
    entered, release = threading.Event(), threading.Event()
    def job(tx):
        tx.execute(ROW, (100,))
        entered.set()
        release.wait(20)
        tx.execute(ROW, (101,))
    pending = db.enqueue(job)
    entered.wait(20)
    fork()
    release.set()
    pending.result(20)
elif PLACE == "in a reader":
    with db.reader() as lent:
        cursor = lent.execute("SELECT n FROM t")
        live.append(cursor)
        fork()
        assert len(cursor.fetchall()) == 100
db.run_many(ROW, [(n,) for n in range(1000, 1100)])
assert db.read_value("SELECT count(*) FROM t") == (200 if PLACE in ("idle", "in a reader") else 202)
db.close()
print("parent ended")
"""
ACTIONS = ["use", "close", "del", "open", "sys.exit", "os._exit", "multiprocessing"]
PLACES = ["idle", "in a block", "from inside a job", "beside a job", "in a reader"]


def run_program(path: Path, **options: object) -> None:
    program = textwrap.dedent(PROGRAM).format(path=str(path), **options)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parent ended") == 1, done.stderr
    assert done.stderr == ""
    assert sorted(path.parent.glob("app.db*")) in ([path], [path, Path(f"{path}-of-the-child")])
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = 200 if options["place"] in ("idle", "in a reader") else 202
        assert connection.execute("SELECT count(*), min(n) FROM t").fetchone() == (rows, 0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("action", ACTIONS)
def test_with_a_log(path: Path, place: str, action: str) -> None:
    run_program(path, mode="WAL", inline=False, place=place, action=action)


@pytest.mark.parametrize("place", PLACES[:3])
@pytest.mark.parametrize("action", ["close", "sys.exit", "use"])
@pytest.mark.parametrize(("mode", "inline"), [("DELETE", False), ("WAL", True), ("DELETE", True)])
def test_without_a_log_or_a_thread(path: Path, place: str, action: str, mode: str, inline: bool) -> None:
    run_program(path, mode=mode, inline=inline, place=place, action=action)


def test_a_job_that_forks_and_returns_in_the_child_ends_the_child(path: Path) -> None:
    run_program(path, mode="WAL", inline=False, place="from inside a job", action="return")


LEAVING = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from onewriter import DbWriter, ForkedError
pids = []
try:
    with DbWriter({path!r}, inline={inline}) as db:
        db.run("CREATE TABLE t (n)")
        with db.transaction() as tx:
            tx.execute("INSERT INTO t VALUES (1)")
            pids.append(os.fork())
            if pids[0]:
                os.waitpid(pids[0], 0)
except ForkedError:
    assert pids == [0]
    print("told", flush=True)
    sys.exit(0)
assert pids[0] > 0
print("committed")
"""


@pytest.mark.parametrize("inline", [False, True])
def test_leaving_the_with_blocks_in_the_child_does_nothing_and_does_not_look_like_a_commit(
    path: Path, inline: bool
) -> None:
    program = LEAVING.format(path=str(path), inline=inline)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["told", "committed"], done.stderr
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT n FROM t").fetchall() == [(1,)]


CLOSED_BEFORE = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from onewriter import DbWriter
with DbWriter({path!r}) as db:
    db.run("CREATE TABLE t (n)")
for n in range(4):
    if os.fork() == 0:
        with DbWriter({path!r}) as db:
            for _ in range(25):
                db.run("INSERT INTO t VALUES (?)", (n,))
        os._exit(0)
for _ in range(4):
    assert os.wait()[1] == 0
"""


def test_children_that_open_after_the_parent_has_closed_write_as_any_process(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_BEFORE.format(path=str(path))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT n, count(*) FROM t GROUP BY n").fetchall() == [(n, 25) for n in range(4)]
