"""Writer: take jobs → one transaction → settle."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
from collections.abc import Callable
from time import monotonic
from typing import Any

from onewriter.base.log import call_safely, report, text_of
from onewriter.base.state import State, broken_error
from onewriter.base.tally import Times
from onewriter.base.waiting import Flag
from onewriter.errors import WriterClosedError, forked_error
from onewriter.events import Hook, WriterBroken, publish
from onewriter.sqlite.file import DatabaseFile, FileMovedError
from onewriter.sqlite.retry import LockPolicy, is_busy
from onewriter.sqlite.settings import Settings
from onewriter.write.batch import Again, Batch, Means, Verdict
from onewriter.write.block import Block
from onewriter.write.checkpoint import Checkpoint, Checkpointer, Readers
from onewriter.write.connection import WriteConnection
from onewriter.write.jobs import BareStatementJob, ConnectionJob, ControlJob
from onewriter.write.lock import WriteLock
from onewriter.write.outcomes import Outcomes, unknown_outcome
from onewriter.write.own_turn import OwnTurn
from onewriter.write.queue import JobQueue
from onewriter.write.ticket import RUNNING, Job, Ticket, call_back_withdrawn

MOST_TAKEN = 2048  # jobs
LOOK = 0.05  # seconds without jobs after which it looks for commits of others, if something is watched
IDLE = 0.5  # seconds without jobs after which the log is emptied


class Writer:
    """What the writer does, whichever thread is the writer: a driver calls it. It obeys what a batch has decided.

    States:  open → drained → ended; ``state.broken`` says if it ended because it is out of service.
    Locks:   none of its own. ``queue.taken`` (the jobs of this turn, some of which have their outcome) is replaced as a
             whole, by the writer only.
    Threads: abandon, is_on and unfinished may be called from any thread; the rest belongs to the writer.
    Assumes: nothing here holds the DbWriter, so that one that was dropped can be collected.
    """

    def __init__(
        self,
        settings: Settings,
        label: str,
        state: State,
        queue: JobQueue,
        file: DatabaseFile,
        readers: Readers,
        max_hold: float,
        on_error: Callable[[Ticket[Any]], object] | None,
        on_event: Hook | None,
        on_end: Callable[[Writer], object],
    ) -> None:
        self.label = label
        self.lock_timeout = settings.lock_timeout
        self.state = state
        self.queue = queue
        self.file = file
        self.readers = readers
        self.on_event = on_event
        self.drained = Flag()  # every accepted job has its outcome, and no other comes
        self.leaving = False  # set at exit: a lock that cannot be acquired ends the drain
        self.withdrawn: list[str] = []  # labels of what the writer itself withdrew
        self._on_end = on_end
        self._stop = Flag()  # ends the wait for SQLite's lock; what has not started does not start
        policy = LockPolicy(settings.lock_timeout, self._stop)
        self._checkpointer = Checkpointer(settings, label, file, readers, state, on_event)
        self._connection = WriteConnection(settings, label, policy, state, file, self._checkpointer)
        self._lock = WriteLock(policy, settings.path, state, file, readers, self._connection.tell_waiting)
        self._outcomes = outcomes = Outcomes(state, self._connection, self._lock, on_error, on_event)
        self._means = means = Means(self._connection, self._lock, state, max_hold, outcomes.fail)
        self.own_turn = OwnTurn(means, queue, file, outcomes, self._checkpointer, readers, on_event)
        self._again: dict[Job[Any], Again] = {}  # of jobs whose transaction was undone
        self._standing: Batch | None = None  # in which the one that stands has run
        self._block: Batch | None = None  # of a block that runs in the thread that is the writer

    def abandon(self) -> None:
        """Withdraw what has not started, and end a wait for SQLite's lock. The queue must refuse already."""
        self._stop.set()
        # They stay in the queue, and what is not withdrawn here is by the writer thread, which looks at _stop.
        jobs = [job for job in (*self.queue.waiting_jobs(), *self.queue.taken) if not job.done()]
        try:
            self._withdraw_all(jobs)
        except BaseException:  # Ctrl-C
            self._withdraw_all(jobs)
            raise

    def _withdraw_all(self, jobs: list[Job[Any]]) -> None:
        """First all, then their callbacks, since one may wait for another job. Again, it goes on with the rest."""
        if sum(map(withdraw, jobs)):
            dropped = sum(job.cancelled() for job in jobs)
            report(self.state, logging.WARNING, "%s: close withdrew %d queued jobs", self.label, dropped)
        call_back_withdrawn(iter(jobs))

    def end_block_at_exit(self) -> None:
        job = self.state.job
        if job is not None and job.end_at_exit():
            self.queue.hand_over(job)

    def after_fork_in_child(self) -> list[object]:
        """In a forked child: refuse everything; returns what must never be closed there."""
        error = forked_error()
        self.state.after_fork_in_child(error)
        self.queue.after_fork_in_child(error)
        kept: list[object] = self.readers.after_fork_in_child()
        return [*self._connection.after_fork_in_child(), *kept]

    @property
    def health(self) -> str:
        """``"ok"``, ``"degraded: why"``, ``"broken: why"`` or ``"closed"``."""
        state, now = self.state, monotonic()
        if state.broken is None and self.queue.refusing:
            return "closed"
        if state.health != "ok":
            return state.health
        why = [self.file.exposed, self._checkpointer.starved]
        if self.queue.is_nearly_full:
            why.append(f"the queue is nearly full: {self.queue.fill}")
        if state.is_slow(now):
            why.append(state.describe())
        text = "; ".join(filter(None, why))
        return f"degraded: {text}" if text else "ok"

    def is_on(self, file: os.stat_result) -> bool:
        """Whether ``file`` is this writer's database, or attached to it."""
        return (file.st_dev, file.st_ino) in self.file.identities

    # From here on, only the thread that is the writer calls ----------------------------------------------------------

    def write(self, jobs: list[Job[Any]]) -> None:
        """Bring ``jobs`` to their outcome."""
        todo = jobs.copy()
        while todo:
            self._write_next(todo)
        self.queue.taken = []  # an idle writer keeps nothing of its last jobs alive

    def begin_block(self, block: Block) -> None:
        """Begin a block that runs in the thread that is the writer; it is lent, or has its outcome."""
        todo: list[Job[Any]] = [block]
        self.queue.taken = todo
        now = monotonic()
        if now >= self.file.look_again_at and self._is_moved(now):
            return
        batch = self._begin(todo, now, mark=True)
        loan = None if batch is None else batch.begin_block(block)
        if loan is None:
            self.queue.taken = []
        else:
            self._block = batch
            block.lend(loan)

    def end_block(self, block: Block) -> None:
        batch, self._block = self._block, None
        assert batch is not None
        assert block.transaction is not None
        self._obey(batch, batch.end_block(block.failure_at_end(block.transaction)), [])
        self.queue.taken = []
        self._connection.restore()

    def broke(self, error: BaseException) -> None:
        """The writer met an error of its own making: answer everything that waits."""
        if self.state.forked:
            return
        self._go_out_of_service(error)  # before anything else that could fail, too
        report(self.state, logging.CRITICAL, "%s: the writer thread died", self.label, error=error)
        self._break(error)

    @property
    def idle_after(self) -> float:
        """Seconds without jobs after which ``idle`` is to be called; -1: it need not be."""
        if self.state.live is not None:
            return LOOK
        return IDLE if self._checkpointer.has_work else -1

    def _end_guest(self) -> None:
        """Wait while a block has the turn in its own thread, and end what that leaves."""
        guest = self.queue.wait_for_turn()
        if guest is None:
            return
        self._obey(*self.own_turn.finish(guest), [])
        if self._connection.guard.settings_touched:
            self._connection.restore()
        self.queue.give_turn()

    def idle(self) -> None:
        """Do what is to be done while nothing is queued."""
        if self.queue.guest is not None:
            self._end_guest()
            return
        if self.state.live is not None:
            call_safely(self.state, self.state.live.look, self._connection.session)
        now = monotonic()
        # Of a log that was lost meanwhile, it would write over what others have written since.
        if self._checkpointer.has_work and now - self._lock.released_at >= IDLE and not self._is_moved(now):
            self._checkpointer.attempt(self._checkpointer.empty, self._connection.session)

    def end(self, patience: float | None = None) -> None:
        """Close all connections, after the last job; those lent for longer than ``patience`` seconds when they end."""
        if self.state.forked:
            return
        self.drained.set()
        if self.state.live is not None:
            call_safely(self.state, self.state.live.end, self._connection.session)
        # The readers before the writer: the last to close tidies up, if it may write.
        call_safely(self.state, self.readers.close, patience)
        call_safely(self.state, self._end_session)
        if self.state.reporter is not None:
            self.state.reporter.close()
        call_safely(self.state, self.readers.when_all_back, functools.partial(self._on_end, self))

    def _end_session(self) -> None:
        try:
            self._connection.roll_back()
            if self.state.broken is None and not self._is_moved(monotonic()):
                self._checkpointer.at_end(self._connection.session)
        finally:
            self._connection.drop()

    @property
    def lock_attempts(self) -> int:
        """How often BEGIN and COMMIT were tried."""
        return self._lock.attempts

    @property
    def lock_wait(self) -> float:
        """Seconds that it has waited for SQLite's lock, in all."""
        return self._lock.waited

    @property
    def last_checkpoint(self) -> tuple[Checkpoint, float] | None:
        """And when it ended, by ``monotonic``."""
        return self._checkpointer.last

    def checkpoint(self, mode: str) -> Checkpoint:
        """For ``ControlJob``."""
        return self._checkpointer.ask_for(self._connection.session or self._connection.open(), mode)

    def open(self) -> None:
        """Open the write connection, or raise why that cannot be."""
        self._connection.open()

    def _write_next(self, todo: list[Job[Any]]) -> None:
        """Bring the first job, or as many as may share one transaction, nearer to their outcome.

        The only place that knows the kinds of jobs.
        """
        first, now = todo[0], monotonic()
        if first._stage > RUNNING:
            self._again.pop(todo.pop(0), None)
        elif self._again and self._again.get(first) is Again.STANDS:
            self._settle_in_turn(todo.pop(0))
        elif now >= self.file.look_again_at and self._is_moved(now):
            return
        elif self._stop.is_set and not first.running():
            self._withdraw_itself(first)
        elif first.in_transaction and first.in_stats:
            batch = self._begin(todo, now)
            if batch is not None:
                self._obey(batch, batch.run(todo, self._again), todo)
        elif isinstance(first, ControlJob):
            del todo[0]
            self._control(first)
        elif isinstance(first, BareStatementJob | ConnectionJob):
            del todo[0]
            self._write_bare(first)
        if self._connection.guard.settings_touched:
            self._connection.restore()

    def _begin(self, todo: list[Job[Any]], now: float, mark: bool = False) -> Batch | None:
        """A transaction for the first job and those behind it; None if it was refused: all that wait fail."""
        batch = Batch(self._means)
        try:
            batch.begin(todo[0], now, mark)
            return batch
        except BaseException as error:  # without a thread of its own, Ctrl-C too
            self._refused(error, batch.times, todo)
            return None

    def _refused(self, error: BaseException, times: Times, todo: list[Job[Any]]) -> None:
        """No transaction: all that waits for one fails together, since each has waited long enough by now."""
        self._connection.roll_back()
        if self.leaving and is_busy(error):
            self._stop.set()
        ended = self._stop.is_set and is_busy(error)  # by close: what has not started is withdrawn, not failed
        waiting = [
            job
            for job in todo
            if not (job.done() or isinstance(job, BareStatementJob | ConnectionJob | ControlJob))
            and not (ended and not job.running())
            and self._again.get(job) is not Again.STANDS
        ]
        self._outcomes.refuse(waiting, error, times)

    def _obey(self, batch: Batch, verdict: Verdict, todo: list[Job[Any]]) -> None:
        """Settle what is decided, have run again what is to, and checkpoint; or go out of service."""
        settled, commits, again, unknown, moved = verdict
        if again:
            self._run_again(batch, verdict, todo)
        elif unknown is not None:
            self._commit_unknown(batch, settled, unknown)
        elif moved is not None:
            self._moved(moved)  # which answers all jobs
            for loan in batch.loans:
                self._outcomes.call_back(loan, committed=False)
        else:
            self._outcomes.settle(settled, batch.times, batch.loans, commits)
            session = self._connection.session
            if (commits or self.state.lacks_room) and session is not None:
                self._checkpointer.after_batch(session)
            if self.readers.in_use:
                self.readers.warn_if_slow()

    def _run_again(self, batch: Batch, verdict: Verdict, todo: list[Job[Any]]) -> None:
        """The transaction is undone: tell those that stand, and put the others in front."""
        again = dict(verdict.again)
        settled = [loan for loan in batch.loans if loan.job not in again]
        self._outcomes.settle(verdict.settled, batch.times, settled)
        for loan in batch.loans:
            if again.get(loan.job, Again.STANDS) is not Again.STANDS:
                self._outcomes.call_back(loan, committed=False)
        if Again.STANDS in again.values():
            self._standing = batch
        with self.state.lock:
            self.state.tally.run_twice += sum(how is not Again.STANDS for how in again.values())
        self._again |= again
        todo[:0] = again

    def _settle_in_turn(self, job: Job[Any]) -> None:
        """It has undone those before it, which have run again by now."""
        del self._again[job]
        self._connection.last_rowid.take_turn()
        batch, self._standing = self._standing, None
        assert batch is not None
        self._outcomes.settle([job], batch.times, [loan for loan in batch.loans if loan.job is job])

    def _commit_unknown(self, batch: Batch, jobs: list[Job[Any]], error: BaseException) -> None:
        for job in jobs:
            if job.failed_with is None:
                self._outcomes.fail(job, unknown_outcome(job, error))
        report(self.state, logging.CRITICAL, "%s: out of service: COMMIT failed: %s", self.label, text_of(error))
        self._go_out_of_service(error)  # before anybody hears, and asks
        self._outcomes.settle(jobs, batch.times, batch.loans)
        self._break(error)

    def _control(self, job: ControlJob[Any]) -> None:
        if not job.start(monotonic()):
            return
        self.state.enter(job, None)
        try:
            job.set_outcome(job.call(), None)
        except BaseException as error:
            self._outcomes.fail(job, error)
        job.ended_at = self.state.leave()
        self._outcomes.settle([job], Times())

    def _write_bare(self, job: BareStatementJob | ConnectionJob[Any]) -> None:
        """Run what is in no transaction of ours."""
        if not job.start(monotonic()):
            return
        batch = Batch(self._means)
        try:
            batch.open()
        except BaseException as error:
            self._outcomes.fail(job, error)
            job.ended_at = monotonic()
            self._outcomes.settle([job], batch.times)
            return
        self._obey(batch, batch.run_whole(job) if isinstance(job, ConnectionJob) else batch.run_bare(job), [])

    def _withdraw_itself(self, job: Job[Any]) -> None:
        if withdraw(job):
            self.withdrawn.append(job.label)
            job.run_callbacks()

    def _is_moved(self, now: float) -> bool:
        """Look whether the file is still there; if not, the gateway is out of service."""
        try:
            self._connection.check_file(now)
        except FileMovedError as error:
            self._moved(error)
            return True
        return False

    def _moved(self, error: FileMovedError) -> None:
        report(self.state, logging.CRITICAL, "%s: %s", self.label, error)
        self._break(error)

    def _break(self, cause: BaseException) -> None:
        """Out of service: everything that waits, and everything later, fails at once."""
        self._go_out_of_service(cause)
        stranded = [job for job in (*self.queue.taken, *self.queue.waiting_jobs()) if not job.done()]
        for job in stranded:
            is_unknown = self._lock.was_committing and job.running() and job.failed_with is None
            job.set_outcome(None, unknown_outcome(job, cause) if is_unknown else broken_error(cause))
            job.ended_at = monotonic()
            self.queue.forget(job)
        self._standing = None
        self._outcomes.settle(stranded, Times())
        if self.on_event is not None:
            publish(self.state, self.on_event, WriterBroken(cause))

    def _go_out_of_service(self, cause: BaseException) -> None:
        self.state.health = f"broken: {text_of(cause)}"
        self.state.broken = cause
        self.readers.refuse()
        self.queue.refuse(broken_error(cause))


def withdraw(job: Job[Any]) -> bool:
    """Whether it had not started, and never will. Its callbacks are still to be called."""
    return job.withdraw_quietly(WithdrawnError(f"closed before job {job.describe()} started"))


class WithdrawnError(WriterClosedError, concurrent.futures.CancelledError):
    """What the result of a job is that close withdrew: its ticket says ``cancelled()``. Not committed."""
