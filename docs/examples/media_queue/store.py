"""What the application keeps: every write of it goes through one gateway, and this is all the SQL there is.

A video goes: found → claimed → encoding → done; or, when encoding fails, back to found, and after the third time to
failed.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from typing import Any

from onewriter import DbWriter, Ticket, Transaction, Watch

FIRST = """
CREATE TABLE video (
    id       INTEGER PRIMARY KEY,
    path     TEXT NOT NULL UNIQUE,
    bytes    INTEGER NOT NULL DEFAULT 0,
    state    TEXT NOT NULL DEFAULT 'found' CHECK (state IN ('found', 'claimed', 'encoding', 'done', 'failed')),
    worker   TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    saved    INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX video_state ON video (state, id);
CREATE TABLE webhook (delivery TEXT PRIMARY KEY, path TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE error (video INTEGER NOT NULL REFERENCES video (id), reason TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE claim (video INTEGER NOT NULL REFERENCES video (id), attempt INTEGER NOT NULL,
    worker TEXT NOT NULL, PRIMARY KEY (video, attempt));
CREATE TABLE service (name TEXT PRIMARY KEY, url TEXT NOT NULL);
"""
STEPS = (FIRST,)  # of the schema: new ones are appended, and none is ever changed
MOST_ATTEMPTS = 3


class WrongStateError(Exception):
    """Somebody moved the video on in the meantime."""


class Store:
    """Opens the database, and puts back what workers of an earlier process left half done."""

    def __init__(self, path: str) -> None:
        self.db = DbWriter(path, label="media")
        self.db.migrate(STEPS, label="schema")
        undo = "UPDATE video SET state = 'found', worker = NULL WHERE state IN ('claimed', 'encoding')"
        self.recovered = self.db.run(undo, label="recover").rowcount

    def close(self) -> None:
        self.db.close()

    # Nobody waits for these: the sender has its answer before they are committed.

    def webhook(self, delivery: str, path: str, size: int) -> Ticket[None]:
        """A service says that there is a new video. Delivered twice, it counts once."""

        def write(tx: Transaction) -> None:
            new = tx.execute("INSERT OR IGNORE INTO webhook VALUES (?, ?, ?)", (delivery, path, time.time())).rowcount
            if new:
                tx.execute("INSERT INTO video (path, bytes) VALUES (?, ?) ON CONFLICT (path) DO NOTHING", (path, size))

        return self.db.enqueue(write, label="webhook")

    # The rest waits.

    def scanned(self, videos: Iterable[tuple[str, int]]) -> None:
        """What the scanner has found in the folders: it also finds what a lost webhook would have told."""
        upsert = "INSERT INTO video (path, bytes) VALUES (?, ?) ON CONFLICT (path) DO UPDATE SET bytes = excluded.bytes"
        self.db.run_many(upsert, videos, label="scan")

    def claim(self, worker: str) -> tuple[int, str] | None:
        """The next video, for this worker alone: while the function runs nobody else writes."""

        def take(tx: Transaction) -> tuple[int, str] | None:
            row = tx.execute(
                "UPDATE video SET state = 'claimed', worker = ?, attempts = attempts + 1 "
                "WHERE id = (SELECT id FROM video WHERE state = 'found' ORDER BY id LIMIT 1) "
                "RETURNING id, path, attempts",
                (worker,),
            ).fetchone()
            if row is None:
                return None
            video, path, attempt = row
            tx.execute("INSERT INTO claim VALUES (?, ?, ?)", (video, attempt, worker))
            return video, path

        return self.db.run(take, label="claim")

    def begin(self, video: int, worker: str) -> None:
        self._move(video, worker, "claimed", "encoding")

    def finish(self, video: int, worker: str, saved: int) -> None:
        self.db.run(lambda tx: self._step(tx, video, worker, "encoding", "done", saved), label="finish")

    def fail(self, video: int, worker: str, reason: str) -> None:
        """Recorded, and tried again up to three times."""

        def write(tx: Transaction) -> None:
            tx.execute("INSERT INTO error VALUES (?, ?, ?)", (video, reason, time.time()))
            attempts = tx.execute("SELECT attempts FROM video WHERE id = ?", (video,)).fetchone()[0]
            self._step(tx, video, worker, "encoding", "failed" if attempts >= MOST_ATTEMPTS else "found")

        self.db.run(write, label="fail")

    def set_service(self, name: str, url: str) -> None:
        self.db.run("INSERT OR REPLACE INTO service VALUES (?, ?)", (name, url), label="set service")

    def delete_service(self, name: str) -> bool:
        return self.db.run("DELETE FROM service WHERE name = ?", (name,), label="delete service").rowcount == 1

    def _move(self, video: int, worker: str, old: str, new: str) -> None:
        self.db.run(lambda tx: self._step(tx, video, worker, old, new), label=new)

    @staticmethod
    def _step(tx: Transaction, video: int, worker: str, old: str, new: str, saved: int = 0) -> None:
        sql = "UPDATE video SET state = ?, saved = saved + ? WHERE id = ? AND state = ? AND worker = ?"
        if tx.execute(sql, (new, saved, video, old, worker)).rowcount != 1:
            raise WrongStateError(f"video {video} is not {old} by {worker}")

    # Reads never wait for any of them.

    def counts(self) -> dict[str, Any]:
        return self.db.read(_counts, label="counts")

    def watch(self) -> Watch[dict[str, Any]]:
        """The same, now and whenever a commit has changed it."""
        return self.db.watch(_counts, label="page", every=0.2)


def _counts(connection: sqlite3.Connection) -> dict[str, Any]:
    """One moment of everything."""
    states = dict(connection.execute("SELECT state, count(*) FROM video GROUP BY state").fetchall())
    rest = connection.execute(
        "SELECT (SELECT count(*) FROM webhook), (SELECT count(*) FROM error), "
        "(SELECT coalesce(sum(saved), 0) FROM video)"
    ).fetchone()
    services = connection.execute("SELECT name, url FROM service ORDER BY name").fetchall()
    latest = connection.execute(
        "SELECT path, state, worker, attempts FROM video WHERE state <> 'found' ORDER BY id DESC LIMIT 8"
    ).fetchall()
    return {
        "states": {state: states.get(state, 0) for state in ("found", "claimed", "encoding", "done", "failed")},
        "webhooks": rest[0],
        "errors": rest[1],
        "saved": rest[2],
        "services": services,
        "latest": latest,
    }
