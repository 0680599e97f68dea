"""OwnTurn: a block that takes the writer's turn itself: it begins and commits in its own thread."""

from __future__ import annotations

import math
import sqlite3
from time import monotonic
from typing import Any

from onewriter.base.state import State
from onewriter.base.waiting import thread_signal
from onewriter.events import Hook
from onewriter.sqlite.file import DatabaseFile, FileMovedError
from onewriter.sqlite.retry import Failure, is_busy
from onewriter.write.batch import Batch, Means, Verdict
from onewriter.write.block import ThreadBlock
from onewriter.write.checkpoint import Checkpointer, Readers
from onewriter.write.outcomes import Outcomes
from onewriter.write.queue import JobQueue
from onewriter.write.session import WriteSession


class OwnTurn:
    """What a block does in its own thread while it has the turn, which the queue gives it.

    Only what is plain: one try at BEGIN, one at COMMIT, the telling of its outcome. Before anything else (a lock that
    is held elsewhere, a failure, a call that is under way, a checkpoint that is due) it lets the writer thread do it,
    or finish it: by looking at how far it came, since Ctrl-C may have ended it at any step.

    Threads: ``begin`` and ``end`` are called by the block's; ``finish`` by the writer's, after it was handed over.
    """

    def __init__(
        self,
        means: Means,
        queue: JobQueue,
        file: DatabaseFile,
        outcomes: Outcomes,
        checkpointer: Checkpointer,
        readers: Readers,
        on_event: Hook | None,
    ) -> None:
        self._means = means
        self._connection, self._lock = means.connection, means.lock
        self._state: State = means.state
        self._queue = queue
        self._file = file
        self._outcomes = outcomes
        self._checkpointer = checkpointer
        self._readers = readers
        self._is_heard = on_event is not None  # on the writer thread
        self._batch: Batch | None = None
        self._is_committing = False
        self._failure: Failure | None = None  # of COMMIT

    def begin(self, block: ThreadBlock) -> bool:
        """Begin it, as it has the turn; or let the writer thread do that next, as soon as it can, and return False."""
        session, state, now = self._connection.session, self._state, monotonic()
        if (
            session is None
            or (now >= self._file.look_again_at and self._is_moved(now))
            or self._connection.last_rowid.wanted is not None
            or self._is_heard
            or block.max_hold != math.inf  # which the writer thread sees to
            or state.live is not None
        ):
            return self._give_way(block)
        self._is_committing, self._failure = False, None
        batch = Batch(self._means)
        loan = batch.loan_for(block, session)
        self._batch = batch
        try:
            error = self._lock.try_begin(session, now)
            if error is None:
                session.set_mark()
        except sqlite3.Error as refused:
            error = refused
        if error is not None:
            session.guard.explain(error)  # which raises what a signal handler did, while SQLite asked
            self._connection.roll_back()
            return self._give_way(block)
        if not block.start(monotonic()):  # close has withdrawn it
            self._queue.hand_over(block)
            return True
        state.enter(block, loan)
        self._readers.look_at_block(block.started_at)
        block.lend(loan)
        return True

    def _is_moved(self, now: float) -> bool:
        try:
            self._connection.check_file(now)
        except FileMovedError:
            self._file.look_again_at = now  # the writer thread finds it, and answers all that waits
            return True
        return False

    def _give_way(self, block: ThreadBlock) -> bool:
        self._batch = None
        block.line_up(thread_signal())
        self._queue.give_way(block)
        return False

    def end(self, block: ThreadBlock) -> bool:
        """Commit it, as it is given back, and tell; False if the writer thread is to end it."""
        batch, session, loan, state = self._batch, self._connection.session, block.transaction, self._state
        if (
            batch is None
            or session is None
            or loan is None
            or block.failed
            or (loan.parts is not None and loan.parts.has_failed)
            or not loan.is_at_rest()
            or not session.connection.in_transaction
            or session.guard.settings_touched
            or ((now := monotonic()) >= self._file.look_again_at and self._is_moved(now))
            or now > state.slow_at  # a handler of the log may want a lock whose owner waits for the writer
            or state.live is not None
        ):
            return False
        block.ended_at = state.leave()
        self._is_committing = True
        self._failure = self._lock.try_commit(session)
        if self._failure is not None:
            session.guard.explain(self._failure)  # as in ``begin``
            return False
        return self._tell(batch, block, session, now)

    def _tell(self, batch: Batch, block: ThreadBlock, session: WriteSession, since: float) -> bool:
        """It is committed; False if the writer thread has a checkpoint to run."""
        batch.times.commit = monotonic() - since
        self._lock.released()
        self._outcomes.settle([block], batch.times, commits=1)  # its own thread calls its callbacks
        self._batch = None  # nothing of it stays alive
        had_work = self._checkpointer.has_work  # or else the writer thread sleeps for ever, not until it is idle
        if self._checkpointer.is_due(session) or self._checkpointer.has_work is not had_work:
            return False
        self._queue.give_turn()
        return True

    def finish(self, block: Any) -> tuple[Batch, Verdict]:
        """End what was handed over."""
        batch, self._batch = self._batch, None
        failure, self._failure = self._failure, None
        if batch is None or block.done():
            self._connection.roll_back()  # what was begun for one that was withdrawn
            return Batch(self._means), Verdict([], 1)  # perhaps it is committed, and a checkpoint is due
        if self._is_committing and failure is None and not self._connection.in_transaction:
            self._lock.released()
            return batch, Verdict([block], 1)
        if failure is not None and not is_busy(failure):
            self._lock.released()
            return batch, batch.commit_failed(failure)
        return batch, batch.end_block(block.failure_at_end(batch.loans[0]))
