"""Core: one open database, which both faces share."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import get_ident
from time import monotonic
from typing import Any, TypeAlias, TypeVar

from onewriter.base.arguments import (
    NOT_PLAIN,
    check_choice,
    check_foreign_keys,
    check_job,
    check_label,
    check_seconds,
    check_sql,
    check_timeout,
    exact,
    name_of,
)
from onewriter.base.log import call_safely, report
from onewriter.base.state import State, Work
from onewriter.base.tally import CheckpointResult, CloseReport, Running, Stats
from onewriter.base.threads import refuse_replaced_threads
from onewriter.ends import exit as at_exit
from onewriter.ends.backup import copy
from onewriter.errors import ReadTimeoutError, ReentrantWriteError, WriteTimeoutError, closed_error
from onewriter.events import BackupEnded, Hook, Submit, announce
from onewriter.live.hub import LiveQueries
from onewriter.options import Options
from onewriter.read.pool import ReaderPool
from onewriter.read.read import FunctionRead, Read, read_of
from onewriter.read.reader import Snapshot
from onewriter.read.recovery import Recovery
from onewriter.sqlite.file import DatabaseFile
from onewriter.sqlite.parameters import capture, capture_many
from onewriter.sqlite.path_checks import absolute, cannot_open, check
from onewriter.sqlite.result import Result
from onewriter.sqlite.settings import refuse_old_sqlite, refuse_unsafe_sqlite
from onewriter.sqlite.statement import check_many, inside_of_dump
from onewriter.write.checkpoint import Checkpoint
from onewriter.write.driver import Driver, InlineDriver, ThreadDriver
from onewriter.write.jobs import (
    BareStatementJob,
    ConnectionJob,
    ControlJob,
    FunctionJob,
    LoanJob,
    RebuildJob,
    StatementJob,
)
from onewriter.write.migrate import Migration, Step
from onewriter.write.queue import JobQueue
from onewriter.write.ticket import Job, Ticket
from onewriter.write.transaction import Transaction
from onewriter.write.writer import Writer

T = TypeVar("T")
Function: TypeAlias = Callable[[Transaction], T]
Label: TypeAlias = str | None
Seconds: TypeAlias = float | None  # None: for ever
After: TypeAlias = Ticket[Any] | None
Steps: TypeAlias = Sequence[Step]
VERSION = "PRAGMA user_version"  # of the steps of migrate that have run

OWN_READER = "close waits for all readers, and this thread or task has one: end that read or block first"
GRACE = 0.25  # seconds that close leaves a writer whose wait for SQLite's lock it has just ended
CHECKPOINTS = ("PASSIVE", "FULL", "RESTART", "TRUNCATE")


class Core:
    """One open database: its queue, its writer, its readers, and what drives the writer.

    Nothing here holds a face, so that a ``DbWriter`` that was dropped can be collected. All of it may be used from any
    thread; each part has its own locks.
    """

    def __init__(self, path: object, options: Options) -> None:
        refuse_old_sqlite()
        refuse_unsafe_sqlite()
        refuse_replaced_threads()
        self.options = options
        self.path, self._folder = _resolve(path)
        with self._removed_on_error():
            check(self.path)
            self._build()

    @contextlib.contextmanager
    def _removed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            _remove(self._folder)
            raise

    def _build(self) -> None:
        options, settings = self.options, self.options.settings(self.path)
        self.label = label = options.label or os.path.basename(self.path)
        self.state = state = State(options.slow_after)
        state.readers_block_commits = options.journal_mode != "WAL"
        self.queue = JobQueue(options.maxsize, state)
        self.file = DatabaseFile(self.path)
        self.pool = ReaderPool(settings, options.readers, state, self.file)
        self.writer = writer = Writer(
            settings,
            label,
            state,
            self.queue,
            self.file,
            self.pool,
            options.max_hold,
            options.on_error,
            options.on_event,
            functools.partial(_forget, self._folder),
        )
        self.driver: Driver = InlineDriver(writer, self.pool.clock) if options.inline else ThreadDriver(writer)
        self.live = LiveQueries(state, self.pool, self.queue.check_open, self._settle_nothing, options.inline)
        submit, hook = self.driver.submit, options.on_event
        self.pool.clock.ask_writer = Recovery(state, submit).ask
        self.submit: Submit = submit if hook is None else functools.partial(_announce_and_submit, submit, state, hook)

    def open(self) -> None:
        """Open the database. Apart: the face has it by now, and if Ctrl-C comes behind this, is collected with it."""
        with self._removed_on_error():
            try:
                file, writer = self.file, self.writer
                shared = at_exit.check_files([self.path], writer)
                file.check_attached = lambda: shared.extend(at_exit.check_files(file.attached, writer, file.read_only))
                at_exit.drain_at_exit(writer, self.driver)  # from now on it may be inherited
                self.driver.start()
            except BaseException:
                self.queue.refuse(closed_error())
                self.driver.give_up()
                raise
        for path in shared:
            text = "%s: %s is open in another DbWriter of this process: they wait for each other as two processes do"
            report(self.state, logging.WARNING, text, self.label, path)

    # Jobs, made of checked arguments ----------------------------------------------------------------------------------

    def job(
        self,
        what: Any,
        params: Any,
        label: Label,
        foreign_keys: bool | None,
        frame: types.FrameType,
        bounded: bool = False,
    ) -> StatementJob | FunctionJob[Any]:
        """A statement or a function; ``frame`` is the caller's."""
        if (
            type(what) is types.FunctionType
            and not what.__code__.co_flags & NOT_PLAIN
            and type(params) is tuple
            and not params
            and label is None
            and foreign_keys is None
        ):  # as nearly every function
            return FunctionJob(self.state, what, what.__qualname__, frame, bounded)
        if label is not None:
            label = check_label(label)
        if type(what) is str:
            if foreign_keys is not None:
                raise TypeError("foreign_keys goes with a function or run_script, not with one statement")
            return StatementJob(self.state, what, capture(what, params), label, frame, bounded)
        if isinstance(what, str):
            return self.job(exact(what), params, label, foreign_keys, frame, bounded)
        check_job(what, params)
        check_foreign_keys(foreign_keys)
        label = label or name_of(what)
        if foreign_keys is not None:
            return RebuildJob(self.state, what, label, frame, foreign_keys)
        return FunctionJob(self.state, what, label, frame, bounded)

    def many(
        self, sql: str, rows: Iterable[Any], label: Label, frame: types.FrameType, bounded: bool = False
    ) -> Job[Result]:
        sql, label = check_sql(sql), check_label(label)
        check_many(sql)
        captured = capture_many(sql, rows)
        return LoanJob(self.state, lambda loan: loan.statement_many(sql, captured), label, frame, sql, bounded=bounded)

    def script(self, sql: str, label: Label, foreign_keys: bool | None, frame: types.FrameType) -> Job[None]:
        sql, label = check_sql(sql), check_label(label)
        check_foreign_keys(foreign_keys)
        name = sql or "script"
        inside, turns_keys_off = inside_of_dump(sql)
        if turns_keys_off and foreign_keys is None:
            foreign_keys = False  # in the transaction its PRAGMA would have no effect
        return LoanJob(self.state, lambda loan: loan.script(inside), label, frame, name, foreign_keys)

    def bare(self, what: Any, params: Any, label: Label, frame: types.FrameType) -> Job[Any]:
        label = check_label(label)
        if isinstance(what, str):
            what = exact(what)
            return BareStatementJob(self.state, what, capture(what, params), label, frame, False)
        check_job(what, params)
        return ConnectionJob(self.state, what, label or name_of(what), frame, False)

    def migration(self, steps: Iterable[Step], label: Label, frame: types.FrameType) -> Migration:
        return Migration(self.state, steps, label, frame, self.options.foreign_keys)

    def flush(self, frame: types.FrameType) -> Job[None]:
        return ControlJob(self.state, "flush", frame, None)

    def watched(self, what: Any, params: Any, label: Label) -> tuple[Read[Any], object]:
        """The read that a watch repeats, and the key by which watches share it."""
        read = read_of(what, params, label)
        if isinstance(read, FunctionRead) or self.options.row_factory is not None:
            return read, object()  # what these give is not to be shared
        return read, (read.sql, repr(read.parameters), read.label)

    def _settle_nothing(self) -> None:
        """Have the writer look for what is watched."""
        self.driver.submit(ControlJob(self.state, "watch", sys._getframe(), None), 0.0)

    def checkpoint(self, mode: str, frame: types.FrameType) -> Job[Checkpoint]:
        mode = check_choice("mode", mode, CHECKPOINTS)
        return ControlJob(self.state, "checkpoint", frame, functools.partial(self.writer.checkpoint, mode))

    def accept(self, job: Job[Any], timeout: Seconds) -> None:
        """Queue a job that no caller waits for."""
        if get_ident() in self.state.reporting:
            job.add_done_callback(_say_nothing)  # a log handler's own job: telling its failure would call it again
        self.submit(job, timeout)

    # Checks that both faces make --------------------------------------------------------------------------------------

    def check_block(self, label: Label, timeout: Seconds, max_hold: float | None) -> float:
        """Returns how long the block may hold the writer."""
        if label is not None:
            check_label(label)
        if timeout != 30.0:
            check_timeout(timeout)
        if max_hold is not None:
            check_seconds("max_hold", max_hold)
        return self.options.max_hold if max_hold is None else max_hold

    def check_after(self, after: Ticket[Any], here: Any) -> None:
        """``here``: the block, job or reader that the read is inside."""
        if not isinstance(after, Ticket):
            raise TypeError(f"after must be a Ticket, not {type(after).__name__}")
        if not after.belongs_to(self.state):
            raise ValueError(f"after: {after!r} is of another DbWriter")
        snapshot = None if here is None else here.lends()
        if isinstance(snapshot, Snapshot):
            snapshot.refuse_later(after)

    def committed_late(self, after: Ticket[Any], timeout: Seconds) -> ReadTimeoutError:
        return ReadTimeoutError(f"{after.describe()} was not committed within {timeout} s: {self.state.describe()}")

    def give_up(self, job: Job[Any], timeout: Seconds) -> None:
        """Stop waiting for ``job``: raises WriteTimeoutError, unless it has its outcome by now."""
        held_by = self.state.describe()
        if job.cancel():
            self.state.count_timeout()
            text = f"job {job.describe()} did not start within {timeout} s and is withdrawn: {held_by}"
            raise WriteTimeoutError(text, ticket=job, started=False)
        if job.stop_waiting_for():
            self.state.count_timeout()
            text = f"job {job.describe()} did not finish within {timeout} s; it goes on: {held_by}"
            raise WriteTimeoutError(text, ticket=job, started=True)

    # Operations -------------------------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether new work is refused."""
        return self.queue.refusing

    def back_up(self, target: Any, progress: Callable[[int, int, int], object] | None, pages: int, place: str) -> None:
        began, hook = monotonic(), self.options.on_event
        self.pool.backup(f"backup() in {place}", lambda source: copy(source, target, progress, pages))
        self.state.tally.last_backup = monotonic()
        if hook is not None:
            call_safely(self.state, hook, BackupEnded(monotonic() - began))

    def close(self, timeout: Seconds, drain: bool) -> CloseReport:
        """Blocks; see ``DbWriter.close``."""
        check_timeout(timeout)
        if not isinstance(drain, bool):
            raise TypeError(f"drain must be a bool, not {type(drain).__name__}")
        state = self.state
        if state.forked:
            return CloseReport(0, 0, 0, 0, ())
        self.pool.end_lost()
        is_inside = self.pool.has_mine_for_good()
        state.refuse_endless_wait("close", commits=False)
        if timeout is None and is_inside:
            raise ReentrantWriteError(OWN_READER)
        self.queue.refuse(closed_error())
        if not drain:
            self.writer.abandon()
        if not self.driver.join(timeout):
            self.writer.abandon()
            self.pool.stop_waiting()
            self.driver.join(GRACE)
        return self.report()

    def drop(self, face: object) -> None:
        """The face was collected: unless it was closed before, warn, and have the writer drain and end."""
        if self.queue.refuse(closed_error()):
            self.pool.stop_waiting()
            self.driver.dropped()
            warnings.warn(f"unclosed {self.label} ({self.path})", ResourceWarning, source=face, stacklevel=3)

    def report(self) -> CloseReport:
        """The outcomes of all jobs so far."""
        unfinished = self.queue.unfinished()
        with self.state.lock:
            tally = self.state.tally
            return CloseReport(
                tally.committed, tally.failed, tally.cancelled, len(unfinished), (*tally.labels, *unfinished)
            )

    def stats(self) -> Stats:
        """Everything at one moment: between two batches, or before or after the outcome of one."""
        state, tally, pool, writer = self.state, self.state.tally, self.pool, self.writer
        wal_bytes = self.file.wal_bytes()
        with state.lock:
            tally.count()
            now = monotonic()
            waiting, checkpoint, backup = state.waiting, writer.last_checkpoint, tally.last_backup
            return Stats(
                queue_depth=self.queue.depth,
                oldest_age=self.queue.oldest_age(now),
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
                lock_attempts=writer.lock_attempts,
                lock_wait=writer.lock_wait,
                queue_wait=tally.queue_wait.latency(),
                run=tally.run.latency(),
                commit=tally.commit.latency(),
                readers_in_use=pool.in_use,
                readers_waiting=pool.waiting,
                wal_bytes=wal_bytes,
                last_checkpoint=None if checkpoint is None else CheckpointResult(*checkpoint[0], now - checkpoint[1]),
                last_backup_ago=None if backup is None else now - backup,
            )

    def describe(self, name: str) -> str:
        """For the ``repr`` of a face."""
        stats, state = self.stats(), "closed" if self.is_closed else self.writer.health
        return f"<{name} {self.path!r} {state} queue_depth={stats.queue_depth} committed={stats.committed}>"


def _running(job: Work | None, now: float, since: float) -> Running | None:
    return None if job is None else Running(job.label, job.called_from, max(0.0, now - since))


def _announce_and_submit(submit: Submit, state: State, hook: Hook, job: Job[Any], timeout: float | None) -> None:
    announce(state, hook, job, waits=job._waiters is not None)
    submit(job, timeout)


def _forget(folder: str | None, writer: Writer) -> None:
    """The writer has ended, and all connections are closed."""
    at_exit.forget(writer)
    _remove(folder)


def _remove(folder: str | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _resolve(path: object) -> tuple[str, str | None]:
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
    if os.path.basename(name) in ("", os.curdir, os.pardir):  # abspath would leave that out
        raise cannot_open(name, "it is the path of a folder")
    return absolute(name), None


def _say_nothing(ticket: Ticket[Any]) -> None:
    pass


def deadline_of(timeout: Seconds) -> float:
    """The time at which ``timeout`` seconds from now are over."""
    return math.inf if timeout is None else monotonic() + timeout


def core_of(db: object) -> Core | None:
    """The core of a ``DbWriter``; None: it is not one."""
    core = getattr(db, "_core", None)
    return core if isinstance(core, Core) else None
