"""The database, its log and its index are renamed, deleted, overwritten, linked or closed to access at a random moment,
while another process reads and writes too.

What was acknowledged is found by an independent process; or the gateway has said that it may not be. If apsw can be
imported, it uses some of the files in the gateway's process, which no process may do: the gateway still comes to its
end, though rows may be lost.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import HANG, Outcome, child, environment

WINDOW = 0.3  # seconds after the damage; what is acknowledged later than that, without a word, must be there
LONGEST = 50.0  # seconds; then every thread's stack is printed
MAKE = """
import contextlib, sqlite3, sys
with contextlib.closing(sqlite3.connect(sys.argv[1])) as connection:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (n INTEGER)")
    connection.commit()
    with contextlib.closing(sqlite3.connect(sys.argv[1].replace("app.db", "backup.db"))) as backup:
        connection.backup(backup)
"""
# Arguments: path, seed. One line for each row: "A n seconds", then "said …" and "end".
GATEWAY = f"""
import faulthandler, importlib, logging, os, random, sys, threading, time
from onewriter import CommitUnknownError, DbWriter, OneWriterError, WriterBrokenError

faulthandler.dump_traceback_later({LONGEST}, exit=True)
path, chance = sys.argv[1], random.Random(int(sys.argv[2]))
said = []

class Listener(logging.Handler):
    def emit(self, record):
        if record.levelno == logging.CRITICAL:
            said.append(record.levelname)

logger = logging.getLogger("onewriter")
logger.addHandler(Listener())
logger.propagate = False
db = DbWriter(path, readers=2, slow_after=60, lock_timeout=5)
stop = threading.Event()

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def own(first):
    n = first
    while not stop.is_set():
        n += 1
        try:
            if n % 3:
                db.run("INSERT INTO t VALUES (?)", (n,), timeout=10)
            else:
                with db.transaction(timeout=10) as tx:
                    tx.execute("INSERT INTO t VALUES (?)", (n,))
            tell("A", n, time.monotonic())
        except Exception as error:
            if isinstance(error, (CommitUnknownError, WriterBrokenError)):
                said.append(type(error).__name__)
                return
            time.sleep(0.01)

def look():
    while not stop.is_set():
        try:
            db.read("SELECT count(*) FROM t", timeout=5)
        except Exception:
            time.sleep(0.01)

def second():
    apsw = importlib.import_module("apsw")
    n = 5_000_000
    while not stop.is_set():
        n += 1
        try:
            connection = apsw.Connection(path)
            connection.setbusytimeout(2000)
            list(connection.execute("SELECT count(*) FROM t"))
            connection.execute("INSERT INTO t VALUES (?)", (n,))
            connection.close()
            tell("B", n, time.monotonic())
        except Exception:
            time.sleep(0.01)

work = [(own, 1_000_000), (own, 2_000_000), (look,)]
if len(sys.argv) > 3:
    work.append((second,))
threads = [threading.Thread(target=one, args=arguments, daemon=True) for one, *arguments in work]
tell("ready")
for thread in threads:
    thread.start()
sys.stdin.readline()
stop.set()
for thread in threads:
    thread.join(20)
    if thread.is_alive():
        tell("hung")
if db.health != "ok":
    said.append(db.health)
db.close(20)
tell("said", *said[:3])
tell("end")
"""
OTHER = """
import sqlite3, sys, threading, time
path, n, stop = sys.argv[1], 9_000_000, threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
while not stop.is_set():
    n += 1
    try:
        connection = sqlite3.connect(path, isolation_level=None, timeout=2)
        connection.execute("INSERT INTO t VALUES (?)", (n,))
        connection.execute("SELECT count(*) FROM t").fetchall()
        if n % 2:
            connection.close()
    except sqlite3.Error:
        pass
    time.sleep(0.005)
"""
INDEPENDENT = """
import json, sqlite3, sys
try:
    rows = sqlite3.connect(sys.argv[1]).execute("SELECT n FROM t").fetchall()
except sqlite3.Error as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([n for (n,) in rows]))
"""


def _rename(path: Path) -> None:
    path.rename(f"{path}.old")


def _rename_and_back(path: Path) -> None:
    path.rename(f"{path}.old")
    time.sleep(0.02)
    if not path.exists():
        Path(f"{path}.old").rename(path)


def _copy_over(path: Path) -> None:
    """As ``cp``: the same inode."""
    backup = path.with_name("backup.db")
    with open(path, "r+b") as file:
        file.write(backup.read_bytes() if path.suffix == ".db" else b"")
        file.truncate()


def _replace(path: Path) -> None:
    backup, new = path.with_name("backup.db"), path.with_name("new")
    new.write_bytes(backup.read_bytes() if path.suffix == ".db" else b"")
    new.replace(path)


def _link(path: Path) -> None:
    os.link(path, f"{path}.link")


def _close_and_open(path: Path) -> None:
    path.chmod(0)
    time.sleep(0.05)
    path.chmod(0o644)


ACTS: dict[str, Callable[[Path], None]] = {
    "renamed": _rename,
    "renamed, and back": _rename_and_back,
    "deleted": Path.unlink,
    "overwritten": _copy_over,
    "emptied": lambda path: os.truncate(path, 0),
    "replaced": _replace,
    "given a second name": _link,
    "closed to access": _close_and_open,
    "left alone": lambda path: None,
}
HARMLESS = ("given a second name", "closed to access", "left alone")
SUFFIXES = ("", "-wal", "-shm")
# The system ends every process that uses a page of a mapped file behind its new end, with SQLite alone too.
DEADLY = {("-shm", "overwritten"), ("-shm", "emptied")}


def has_second_sqlite() -> bool:
    with contextlib.suppress(ImportError):
        importlib.import_module("apsw")
        return True
    return False


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` files, each damaged once."""
    outcome, chance = Outcome(), random.Random(seed)
    cases = [(suffix, act) for suffix in SUFFIXES for act in ACTS if (suffix, act) not in DEADLY]
    chance.shuffle(cases)
    if not has_second_sqlite():
        outcome.notes["without apsw"] = 1
    for trial in range(size):
        place = folder / str(trial)
        place.mkdir()
        _damage(place / "app.db", *cases[trial % len(cases)], chance, outcome)
        outcome.trials += 1
    return outcome


def _damage(path: Path, suffix: str, act: str, chance: random.Random, outcome: Outcome) -> None:
    what = f"app.db{suffix} {act}"
    subprocess.run(child(MAKE, path), env=environment(), check=True, timeout=HANG)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment()}
    second = ["second"] if has_second_sqlite() and chance.random() < 0.5 else []
    command = child(GATEWAY, path, chance.randrange(2**30), *second)
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, **pipes) as gateway,
        subprocess.Popen(child(OTHER, path), **pipes) as other,
    ):
        assert gateway.stdout is not None
        gateway.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.3))
        with contextlib.suppress(FileNotFoundError):
            ACTS[act](Path(f"{path}{suffix}"))
        at = time.monotonic()
        time.sleep(0.8)
        try:
            told, errors = gateway.communicate("\n", timeout=HANG)
        except subprocess.TimeoutExpired:
            gateway.kill()
            told, errors = gateway.communicate()
        other.communicate("\n", timeout=HANG)
    ran = subprocess.run(child(INDEPENDENT, path), capture_output=True, text=True, timeout=HANG, check=False)
    found = json.loads(ran.stdout) if path.exists() else "it is not there"
    if second:  # by which any row can be lost without a word, and the index be cut off under its users
        outcome.notes["with apsw"] += 1
        outcome.notes["bus errors, with apsw"] += gateway.returncode == -signal.SIGBUS
        if gateway.returncode != -signal.SIGBUS:
            _judge_life(what, told, f"exit code {gateway.returncode} {errors}", outcome)
        return
    if _judge_life(what, told, f"exit code {gateway.returncode} {errors}", outcome):
        _judge(what, told, found, at, act in HARMLESS, outcome)


def _judge_life(what: str, told: str, errors: str, outcome: Outcome) -> bool:
    """Whether it came to its end."""
    if "hung" not in told.split() and told.endswith("end\n"):
        return True
    outcome.hung += 1
    outcome.find(f"{what}: it hangs or crashes: {errors[-1500:]}")
    return False


def _judge(what: str, told: str, found: Any, at: float, harmless: bool, outcome: Outcome) -> None:
    """Whether what it has acknowledged is there."""
    lines = [line.split() for line in told.splitlines()]
    said = next(words[1:] for words in lines if words[0] == "said")
    rows = {int(words[1]): float(words[2]) for words in lines if words[0] == "A"}
    there = set(found) if isinstance(found, list) else set[int]()
    missing = sorted(rows.keys() - there)
    outcome.acknowledged += len(rows)
    outcome.notes["said"] += bool(said)
    outcome.notes["missing, and said"] += len(missing) * bool(said)
    late = [n for n in missing if rows[n] > at + WINDOW]
    if (missing and not said) or late or (missing and harmless):
        outcome.lost += len(missing)
        text = f"{len(missing)} of {len(rows)} are missing, {len(late)} of them late; {found if not there else ''}"
        outcome.find(f"{what}: {text}; said {said}")
