"""Core"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from time import monotonic
from typing import Any

from onewriter.base.state import State, Work
from onewriter.base.tally import CheckpointResult, Running, Stats
from onewriter.ends import exit as at_exit
from onewriter.errors import WriteTimeoutError
from onewriter.events import Hook, Submit, announce
from onewriter.write.ticket import Job, Ticket
from onewriter.write.writer import Writer


def stats_of(loop: Writer) -> Stats:
    """Everything at one moment: between two batches, or before or after the outcome of one."""
    state, tally, readers = loop.state, loop.state.tally, loop.readers
    with state.lock:
        now = monotonic()
        waiting, checkpoint = state.waiting, loop.last_checkpoint
        return Stats(
            queue_depth=loop.queue.depth,
            oldest_age=loop.oldest_age(now),
            running=_running(state.job, now, getattr(state.job, "started_at", now)),
            waiting_for_lock=None if waiting is None else _running(waiting[0], now, waiting[1]),
            committed=tally.committed,
            failed=tally.failed,
            cancelled=tally.cancelled,
            timed_out=tally.timed_out,
            retried=tally.retried,
            run_twice=tally.run_twice,
            commits=tally.commits,
            jobs_per_commit=tally.committed / tally.commits if tally.commits else 0.0,
            lock_attempts=tally.lock_attempts,
            lock_wait=tally.lock_wait,
            queue_wait=tally.queue_wait.latency(),
            run=tally.run.latency(),
            commit=tally.commit.latency(),
            readers_in_use=readers.in_use,
            readers_waiting=readers.waiting,
            wal_bytes=loop.file.wal_bytes(),
            last_checkpoint=None if checkpoint is None else CheckpointResult(*checkpoint[0], now - checkpoint[1]),
            last_backup_ago=None if tally.last_backup is None else now - tally.last_backup,
        )


def _running(job: Work | None, now: float, since: float) -> Running | None:
    return None if job is None else Running(job.label, job.called_from, max(0.0, now - since))


def ended(folder: str | None) -> Callable[[Writer], None]:
    """What is left to do when a writer has ended; holds no gateway, so that a dropped one can be collected."""

    def ended(loop: Writer) -> None:
        at_exit.forget(loop)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    return ended


def resolve_path(path: object) -> tuple[str, str | None]:
    """The absolute path, and the folder to remove at close if the database is a temporary one."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"path must be str, bytes or os.PathLike, not {type(path).__name__}")
    name = os.fsdecode(path)
    if name in (":memory:", ""):
        # A real file, since several connections have to see it; SQLite's own shared memory databases know no WAL.
        folder = tempfile.mkdtemp(prefix="onewriter-")
        return os.path.join(folder, "memory.db"), folder
    if name.startswith("file:"):
        raise ValueError(f"path {name!r} is a URI: give a plain path, or ':memory:' for a private temporary database")
    if "\0" in name:
        raise ValueError(f"path {name!r} has a null character")
    return os.path.abspath(name), None


def give_up(job: Job[Any], timeout: float | None, state: State) -> None:
    """Wait for ``job`` no longer: raises WriteTimeoutError, unless its outcome has come in this moment."""
    held_by = state.describe()
    if job.cancel():
        state.count_timeout()
        text = f"job {job.describe()} did not start within {timeout} s and is withdrawn: {held_by}"
        raise WriteTimeoutError(text, ticket=job, started=False)
    if job.stop_waiting_for():
        state.count_timeout()
        text = f"job {job.describe()} did not finish within {timeout} s; it goes on: {held_by}"
        raise WriteTimeoutError(text, ticket=job, started=True)


def announcing(submit: Submit, state: State, hook: Hook) -> Submit:
    def submit_and_tell(job: Job[Any], timeout: float | None) -> None:
        announce(state, hook, job, waits=job._waiters is not None)
        submit(job, timeout)

    return submit_and_tell


def say_nothing(ticket: Ticket[Any]) -> None:
    pass
