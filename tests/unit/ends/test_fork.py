"""A child of fork() never touches what it has inherited, whatever it does, and the parent is not harmed."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import textwrap
from pathlib import Path

import pytest

from helpers import child_code, run_child

PROGRAM = """
import contextlib, multiprocessing, os, sqlite3, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads, which is what this is about
from helpers import pool_of
from onewriter import DbWriter, ForkedError

PATH, MODE, INLINE, PLACE, ACTION = {path!r}, {mode!r}, {inline!r}, {place!r}, {action!r}
ROW = "INSERT INTO t VALUES (?)"
db = DbWriter(PATH, journal_mode=MODE, inline=INLINE, slow_after=60.0)
db.run("CREATE TABLE t (n)")
db.run_many(ROW, [(n,) for n in range(100)])
db.read("SELECT count(*) FROM t")
pending = lent = held = None
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
        for claim in pool_of(db)._lent():
            pool_of(db).end(claim)
        assert lent._loan.reader.connection.in_transaction
        assert len(sqlite3.Cursor.fetchmany(live[0]._LentCursor__raw, 2)) == 2  # nothing was closed
    if held is not None:
        refused(lambda: held.execute("SELECT 1"))
        tx._loan.end()  # as leaving the block would
        assert len(sqlite3.Cursor.fetchmany(live[0]._LentCursor__raw, 2)) == 2
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
        with DbWriter(PATH + "-of-the-child", slow_after=60.0) as own:
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
        held = tx.connection
        live.append(held.execute("SELECT n FROM t"))
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

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
ACTIONS = ["use", "close", "del", "open", "sys.exit", "os._exit", "multiprocessing"]
PLACES = ["idle", "in a block", "from inside a job", "beside a job", "in a reader"]


def run_program(path: Path, **options: object) -> None:
    program = textwrap.dedent(PROGRAM).format(path=str(path), **options)
    done = run_child(program)
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
    with DbWriter({path!r}, inline={inline}, slow_after=60.0) as db:
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
    done = run_child(program)
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
    done = run_child(CLOSED_BEFORE.format(path=str(path)))
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT n, count(*) FROM t GROUP BY n").fetchall() == [(n, 25) for n in range(4)]


ON_THE_STACK = """
import logging, os, sqlite3, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from onewriter import AsyncDbWriter, DbWriter, ForkedError
PATH, PLACE, ENDING = {path!r}, {place!r}, {ending!r}
ROW, parent, children = "INSERT INTO t VALUES (?)", os.getpid(), []

def fork(*_):
    if children or not ready:
        return 0
    pid = os.fork()
    if pid:
        children.append(pid)
        _, status = os.waitpid(pid, 0)  # it ends by itself
        os.write(1, b"child %d\\n" % os.waitstatus_to_exitcode(status))
        return 0
    children.append(0)
    for call in (lambda: db.run(ROW, (-1,)), lambda: db.enqueue(ROW, (-1,)), lambda: db.read("SELECT 1")):
        try:
            call()
        except ForkedError:
            pass
        else:
            os.write(1, b"used in the child\\n")
    if ENDING == "sys.exit":
        sys.exit(0)
    if ENDING == "raise":
        raise LookupError
    return 0

def told(*_):
    os.write(1, b"" if os.getpid() == parent else b"told in the child\\n")

def write(n):
    def job(tx):
        tx.execute(ROW, (n,))
        tx.on_commit(told)
        if os.getpid() != parent:
            os.write(1, b"ran in the child\\n")
    return job

class Handler(logging.Handler):
    def emit(self, record):
        if PLACE == "a handler":
            fork()

def on_connect(connection, readonly):
    if PLACE in ("on_connect", "on_connect of a reader") and readonly == (PLACE != "on_connect"):
        fork()

def on_event(event):
    if PLACE == "on_event" and type(event).__name__ == "BatchEnded":
        fork()

logging.getLogger("onewriter").addHandler(Handler())
logging.getLogger("onewriter").propagate = False
ready = PLACE == "on_connect"
try:
    db = DbWriter(PATH, on_connect=on_connect, on_event=on_event, on_error=fork if PLACE == "on_error" else None,
                  inline={inline!r}, slow_after=60.0)
except NameError:
    sys.exit(0)  # the child of the constructor has no gateway
db.run("CREATE TABLE t (n)")
ready = True

def job(tx):
    if PLACE == "on_commit":
        tx.on_commit(fork)
    if PLACE == "on_rollback":
        tx.on_rollback(fork)
        raise LookupError

def go():
    go_on = threading.Event()
    if not {inline!r}:
        db.enqueue(lambda tx: go_on.wait(20) and None)
    first = db.enqueue("PRAGMA user_version=1" if PLACE == "a done callback" else job)  # alone: the others wait
    if PLACE != "on_error":
        first.add_done_callback(fork if PLACE == "a done callback" else told)
    if PLACE in ("a handler", "on_error"):
        db.enqueue("INSERT INTO nowhere VALUES (1)")
    for n in range(50):
        is_function = n % 2 and ENDING != "return"  # plain statements alone are another path
        db.enqueue(write(n) if is_function else ROW, *([] if is_function else [(n,)]))
    go_on.set()
    db.flush()
    if PLACE == "on_commit of a block":
        with db.transaction() as tx:
            tx.on_commit(fork)
            tx.on_commit(told)
    if PLACE.startswith("progress"):
        target = PATH + ".copy" if PLACE == "progress" else sqlite3.connect(":memory:")
        db.backup(target, pages=1, progress=fork)
    if PLACE == "on_connect of a reader":
        assert db.read("SELECT count(*) FROM t") == [(50,)]

try:
    go()
except ForkedError:
    assert os.getpid() != parent
except (LookupError, RuntimeError):  # RuntimeError: logging cannot go on in a child that a handler has forked
    assert os.getpid() != parent
if os.getpid() != parent:
    sys.exit(0)
db.run(ROW, (50,))
assert db.read_value("SELECT count(*) FROM t") == 51, db.read_value("SELECT count(*) FROM t")
db.close()
os.write(1, b"parent ended\\n")
"""

STACKS = [
    *("a done callback", "on_commit", "on_rollback", "on_error", "on_event", "a handler", "on_connect"),
    *("on_connect of a reader", "on_commit of a block", "progress", "progress to a connection"),
]  # not a function that SQL calls: in CPython a child cannot return from it


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("ending", ["return", "sys.exit", "raise"])
@pytest.mark.parametrize("place", STACKS)
def test_whatever_forks_on_our_stack_nothing_of_ours_goes_on_in_the_child(
    path: Path, place: str, ending: str, inline: bool
) -> None:
    program = ON_THE_STACK.format(path=str(path), place=place, ending=ending, inline=inline)
    done = run_child(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["child 0", "parent ended"], done.stderr
    left = {name.name for name in path.parent.iterdir()}
    assert left == ({"app.db", "app.db.copy"} if place == "progress" else {"app.db"})
    for name in left:
        with contextlib.closing(sqlite3.connect(path.parent / name)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("SELECT count(DISTINCT n), count(*) FROM t").fetchone() == (
                (50, 50) if name != "app.db" else (51, 51)
            )


IN_TASKS = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from onewriter import AsyncDbWriter, ForkedError
parent, children = os.getpid(), []

def fork(*_):
    if not children:
        children.append(os.fork())
        if children[0]:
            _, status = os.waitpid(children[0], 0)
            os.write(1, b"child %d\\n" % os.waitstatus_to_exitcode(status))
    return 0

async def main():
    async with AsyncDbWriter({path!r}) as db:
        await db.run("CREATE TABLE t (n)")
        if {place!r} == "a block":
            async with db.transaction() as tx:
                await tx.execute("INSERT INTO t VALUES (1)")
                await db.read(fork)
        else:
            await db.read(fork)
            await db.run("INSERT INTO t VALUES (1)")
        assert await db.read("SELECT n FROM t") == [(1,)]

asyncio.run(main())
os.write(1, b"ended\\n")
"""


@pytest.mark.parametrize("place", ["a block", "a read"])
def test_a_child_forked_on_a_thread_that_works_for_tasks_ends(path: Path, place: str) -> None:
    program = IN_TASKS.format(path=str(path), place=place)
    done = run_child(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["child 0", "ended"], done.stderr


OUTLASTING = """
import os, sys, warnings
warnings.simplefilter("ignore")
from onewriter import DbWriter, ForkedError
db = DbWriter(sys.argv[1] if len(sys.argv) > 1 else {path!r})
db.run("CREATE TABLE t (n)")
loan = db.reader()
connection = loan.__enter__()
db.close(0.05)

def is_refused(call):
    try:
        call()
    except ForkedError:
        return True

def child(expected):
    pid = os.fork()
    if pid == 0:
        refused = [is_refused(lambda: connection.execute("SELECT 1")), is_refused(lambda: DbWriter({path!r}))]
        os._exit(0 if refused[expected:] == [True] * (2 - expected) else 9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

child(0)
loan.__exit__(None, None, None)
pid = os.fork()
if pid == 0:
    with DbWriter({path!r}) as own:
        own.run("INSERT INTO t VALUES (1)")
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def test_a_connection_that_outlasts_close_keeps_its_file_guarded_in_a_child_until_it_is_back(path: Path) -> None:
    child = run_child(OUTLASTING.format(path=str(path)))
    assert child.returncode == 0, child.stderr
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT n FROM t").fetchall() == [(1,)]


ATTACHED = """
def attaching(file):
    return lambda connection, readonly: connection.execute("ATTACH ? AS other", (file,))

sqlite3.connect(OTHER).execute("PRAGMA journal_mode = WAL").connection.close()
db = DbWriter(path, on_connect=attaching(OTHER))
db.run("CREATE TABLE other.t (n)")
tries = [
    lambda: DbWriter(OTHER),
    lambda: DbWriter(path + "-2", on_connect=attaching(OTHER)),
    lambda: DbWriter(path + "-2", on_connect=attaching(path)),
    lambda: own.backup(OTHER),
    lambda: own.backup(path),
]
if os.fork() == 0:
    own, refused = DbWriter(path + "-3"), 0
    for attempt in tries:
        try:
            attempt()
        except ForkedError:
            refused += 1
    own.close()
    os._exit(refused)
print(os.waitstatus_to_exitcode(os.wait()[1]))
db.run("INSERT INTO other.t VALUES (1)")
db.close()
"""


def test_a_child_can_neither_open_nor_attach_nor_replace_any_file_of_an_inherited_gateway(path: Path) -> None:
    imports = "import os, sqlite3, warnings\nwarnings.simplefilter('ignore')\nfrom onewriter import ForkedError\n"
    child = run_child(child_code(path, imports + ATTACHED.replace("OTHER", "path + '-other'")))
    assert (child.stdout, child.returncode) == ("5\n", 0), child.stderr
    with contextlib.closing(sqlite3.connect(f"{path}-other")) as connection:
        assert connection.execute("SELECT n FROM t").fetchall() == [(1,)]


READ_ONLY = """
def attaching(connection, readonly):
    connection.execute("ATTACH ? AS other", (f"file:{path}-other?mode=ro&immutable=1",))

sqlite3.connect(path + "-other").execute("CREATE TABLE t (n)").connection.close()
db = DbWriter(path, on_connect=attaching)
if os.fork() == 0:
    with DbWriter(path + "-2", on_connect=attaching) as own:
        os._exit(own.read_value("SELECT count(*) FROM other.t"))
print(os.waitstatus_to_exitcode(os.wait()[1]))
db.close()
"""


def test_a_child_may_read_what_an_inherited_gateway_only_reads(path: Path) -> None:
    imports = "import os, sqlite3, warnings\nwarnings.simplefilter('ignore')\n"
    child = run_child(child_code(path, imports + READ_ONLY))
    assert (child.stdout, child.returncode) == ("0\n", 0), child.stderr


CANCELS = """
import os, sys, threading, warnings
warnings.simplefilter("ignore")
from onewriter import DbWriter, ForkedError
db = DbWriter({path!r})
release = threading.Event()
db.enqueue(lambda tx: release.wait(30) and None)
ticket = db.enqueue("CREATE TABLE t (n)")
pid = os.fork()
if pid == 0:
    try:
        ticket.cancel()
    except ForkedError:
        os._exit(0)
    os._exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
release.set()
ticket.result(30)
db.close()
"""


def test_a_child_cannot_cancel_a_job_of_its_parent(path: Path) -> None:
    child = run_child(CANCELS.format(path=str(path)))
    assert child.returncode == 0, child.stderr


def test_a_child_that_is_forked_while_the_gateway_opens_cannot_open_the_file(path: Path) -> None:
    code = """
def forks(connection, readonly):
    global forks
    forks = lambda connection, readonly: None
    if os.fork() == 0:
        try:
            DbWriter(path)
        except ForkedError:
            os._exit(7)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))

DbWriter(path, on_connect=lambda *connected: forks(*connected)).close()
"""
    child = run_child(child_code(path, "import os\nfrom onewriter import ForkedError" + code))
    assert child.stdout == "7\n", child.stderr
