"""I/O errors: strace lets system calls of one file fail, once, or from some call on; the disk is full; a limit is met.

Each child writes one row a job, or one into each of two files, and tells, for each, what became of it. A job that
failed with a definite error must not be there, one that was acknowledged must be, ``CommitUnknownError`` may be either;
and everything ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments import HANG, Outcome, child, environment, integrity, strace

JOBS = 25

CODE = f"""
import json, os, sys
from onewriter import CommitUnknownError, DbWriter, WriterBrokenError

other = sys.argv[3]
attach = (lambda connection, readonly: connection.execute("ATTACH ? AS other", (other,))) if other else None
db = DbWriter(sys.argv[1], wal_limit=50_000, slow_after=60, on_connect=attach)
told = {{"acknowledged": [], "failed": {{}}, "unknown": [], "health": ""}}

def write(tx, n):
    for name in ("main", "other") if other else ("main",):
        tx.execute(f"INSERT INTO {{name}}.t VALUES (?, ?)", (n, "x" * 2000))

def attempt(n):
    try:
        if n % 2 and other:
            db.run(lambda tx: write(tx, n))
        elif n % 2:
            db.run("INSERT INTO t VALUES (?, ?)", (n, "x" * 2000))
        else:
            with db.transaction() as tx:
                write(tx, n)
        told["acknowledged"].append(n)
    except CommitUnknownError:
        told["unknown"].append(n)
    except Exception as error:
        told["failed"][n] = type(error).__name__ + ": " + str(getattr(error, "sqlite_errorname", error))

for n in range({JOBS}):
    attempt(n)
    if n % 10 == 9:
        try:
            db.checkpoint()
        except Exception:
            pass
mend = sys.argv[2]
if mend:
    exec(mend)
    for n in range({JOBS}, {JOBS} + 5):
        attempt(n)
told["health"] = db.health
db.close(30)
print(json.dumps(told))
"""
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, resource.RLIM_INFINITY))"
UNLIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))"


@dataclass(frozen=True)
class Fault:
    calls: str
    error: str
    when: str
    suffix: str  # of the file: "", "-wal" or "-shm"
    is_other: bool  # the second of two files

    def __str__(self) -> str:
        file = "other" if self.is_other else "file"
        return f"{self.error} in {self.calls} of the {file}{self.suffix} at {self.when}"


def faults() -> list[Fault]:
    """All combinations, in an order in which any first few differ in everything."""
    found = [
        Fault(calls, error, when, suffix, is_other)
        for when in ("1", "3", "2+", "7", "1+", "12+")
        for suffix in ("-wal", "", "-shm")
        for calls in ("pwrite64", "fdatasync,fsync", "ftruncate")
        for error in ("EIO", "ENOSPC")
        for is_other in (False, True)
    ]
    return found[::7] + [fault for place, fault in enumerate(found) if place % 7]


def run(size: int, seed: int, folder: Path) -> Outcome:
    """The first ``size`` of all faults, and a limit on the file's size."""
    del seed  # there is no chance in it
    outcome, tool = Outcome(), strace()
    assert tool is not None, "needs strace"
    for number, fault in enumerate(faults()[:size]):
        path = _new(folder / f"{number}.db")
        other = _new(folder / f"{number}-other.db") if fault.is_other else None
        prefix = [tool, "-f", "-qq", "-o", os.devnull, "-P", f"{other or path}{fault.suffix}"]
        prefix += ["-e", f"trace={fault.calls}"]
        prefix += ["-e", f"inject={fault.calls}:error={fault.error}:when={fault.when}"]
        command = child(CODE, path, "", other or "", prefix=tuple(prefix))
        _judge(path, command, outcome, str(fault), mends=False, other=other)
    for number, limit in enumerate((20_000, 45_000)):
        path = _new(folder / f"limit-{number}.db")
        code = LIMIT.format(limit) + "\n" + CODE
        _judge(path, child(code, path, UNLIMIT, ""), outcome, f"files of at most {limit} bytes", mends=True)
    return outcome


def run_on_full_disk(folder: Path, outcome: Outcome | None = None) -> Outcome:
    """A file system of 200 kB, which gets room again. Needs leave to mount."""
    outcome = outcome or Outcome()
    with _small_disk(folder) as disk:
        path = _new(disk / "app.db")
        grow = f"import subprocess; subprocess.run(['mount', '-o', 'remount,size=5m', {str(disk)!r}], check=True)"
        _judge(
            path, child(CODE.replace('"x" * 2000', '"x" * 20000'), path, grow, ""), outcome, "a full disk", mends=True
        )
    return outcome


def can_mount(folder: Path) -> bool:
    with contextlib.suppress(OSError, subprocess.CalledProcessError), _small_disk(folder):
        return True
    return False


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)], check=True, capture_output=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _new(path: Path) -> Path:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT)")
    return path


def _judge(
    path: Path, command: list[str], outcome: Outcome, what: str, *, mends: bool, other: Path | None = None
) -> None:
    outcome.trials += 1
    try:
        ended = subprocess.run(command, env=environment(), timeout=HANG, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        outcome.hung += 1
        outcome.find(f"{what}: hung")
        return
    if ended.returncode != 0:
        if "sqlite3" in ended.stderr and ("cannot open" in ended.stderr or "raised by on_connect" in ended.stderr):
            outcome.notes["could not be opened"] += 1
            return
        outcome.find(f"{what}: exit code {ended.returncode}: {ended.stderr[-300:]}")
        return
    told = json.loads(ended.stdout)
    acknowledged, unknown = set(told["acknowledged"]), set(told["unknown"])
    outcome.acknowledged += len(acknowledged)
    outcome.notes["committed"] += len(acknowledged)
    outcome.notes["failed"] += len(told["failed"])
    outcome.notes["unknown"] += len(unknown)
    for file in (path,) if other is None else (path, other):
        if not integrity(file, outcome, what):
            return
        with contextlib.closing(sqlite3.connect(file)) as connection:
            rows = {n for (n,) in connection.execute("SELECT n FROM t")}
        lost = acknowledged - rows
        if lost:
            outcome.lost += len(lost)
            outcome.find(f"{what}: lost {sorted(lost)}")
        there = rows - acknowledged - unknown
        if there:
            outcome.find(f"{what}: {sorted(there)} had failed, and are there")
    if any("rollback" in text for text in told["failed"].values()):
        outcome.find(f"{what}: not the first error: {told['failed']}")
    if unknown and not (
        other or told["health"].startswith("broken")
    ):  # one of several files is no doubt about the disk
        outcome.find(f"{what}: an unknown outcome, and {told['health']}")
    if mends and not acknowledged >= set(range(JOBS, JOBS + 5)):
        outcome.find(f"{what}: it did not recover: {told['failed']}")
