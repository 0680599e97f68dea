"""Litestream replicates a file that the gateway writes: run where one is on the PATH, or in $LITESTREAM."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path
from time import monotonic

from onewriter import DbWriter

LITESTREAM = os.environ.get("LITESTREAM") or shutil.which("litestream") or "litestream"
INTERVAL = 0.2  # seconds between two syncs
DEADLINE = 60.0


def test_what_was_acknowledged_two_intervals_before_the_end_is_restored(path: Path) -> None:
    config = path.parent / "litestream.yml"
    replica = path.parent / "replica"
    config.write_text(
        f"dbs:\n  - path: {path}\n    replicas:\n      - type: file\n        path: {replica}\n"
        f"        sync-interval: {int(INTERVAL * 1000)}ms\n"
    )
    acknowledged: list[float] = []
    with DbWriter(path, auto_checkpoint=False) as db:
        db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
        replicating = subprocess.Popen([LITESTREAM, "replicate", "-config", config], stderr=subprocess.DEVNULL)
        try:
            until = monotonic() + DEADLINE
            while not any(replica.rglob("*.wal.lz4")):  # it has begun
                db.run("INSERT INTO t VALUES (?)", (len(acknowledged),))
                acknowledged.append(monotonic())
                assert monotonic() < until
            until = monotonic() + 3.0
            while monotonic() < until:
                db.run("INSERT INTO t VALUES (?)", (len(acknowledged),))
                acknowledged.append(monotonic())
        finally:
            cut = monotonic()
            replicating.kill()
            replicating.wait(DEADLINE)
    restored = path.parent / "restored.db"
    subprocess.run(
        [LITESTREAM, "restore", "-config", config, "-o", restored, path],
        check=True,
        timeout=DEADLINE,
        capture_output=True,
    )
    with contextlib.closing(sqlite3.connect(restored)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        count, last = connection.execute("SELECT count(*), max(n) FROM t").fetchone()
    assert count == last + 1  # a prefix, without a gap
    # One interval to come to a sync, one for a sync that was cut off, and what this machine needs for it.
    due = sum(when < cut - 2 * INTERVAL - 1.0 for when in acknowledged)
    assert 0 < due <= count <= len(acknowledged)
