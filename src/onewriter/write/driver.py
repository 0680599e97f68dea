"""Who runs the Writer: a thread of its own, or, for tests, the calling thread."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, Protocol

from onewriter.base.log import Reporter
from onewriter.base.stack import need_stack
from onewriter.base.threads import start
from onewriter.base.waiting import SLICE, Flag, thread_signal, wait_in_slices
from onewriter.errors import QueueFullError, ReentrantWriteError, forked_error
from onewriter.write.block import ThreadBlock, not_entered
from onewriter.write.loan import WriteLoan
from onewriter.write.ticket import Job
from onewriter.write.writer import MOST_TAKEN, Writer

STACK = 100  # more calls in calls than the writer's own code ever makes


class Driver(Protocol):
    def start(self) -> None:
        """Open the write connection, or raise what opening it raised."""

    def give_up(self) -> None:
        """After a start that has raised, or was not come to: end what there is. The queue must refuse already."""

    @property
    def submit(self) -> Callable[[Job[Any], float | None], None]:
        """Accepts a job, given with the seconds to wait for room, if it is bounded."""

    def enter(self, job: ThreadBlock, timeout: float | None) -> WriteLoan:
        """Wait for the block's turn and return its transaction."""

    def leave(self, job: ThreadBlock) -> None:
        """End a block that was given back, or have it ended: the outcome may come later."""

    def hand_over(self, job: ThreadBlock) -> None:
        """Have it ended, if it is not, without waiting."""

    def dropped(self) -> None:
        """The gateway was collected without close."""

    def forget(self) -> None:
        """This is a forked child of the process that the writer belongs to."""

    def join(self, timeout: float | None) -> bool:
        """Wait until all is written and closed; the queue must refuse already. False: not within ``timeout``."""


class ThreadDriver:
    """One daemon thread is the writer, from the opening of its connection to its closing."""

    _has_begun = False

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.submit = writer.queue.put
        self._ready = Flag()
        self._ended = Flag()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name=f"{writer.label}-writer", daemon=True)
        self._to_run = [self._run]  # taken out in one step by who calls it, or sees to it that nobody does
        writer.state.reporter = Reporter(writer.state, f"{writer.label}-log")

    def start(self) -> None:
        start(self._thread)
        self._ready.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            self._thread.join()
            try:
                raise failure
            finally:
                del failure

    def give_up(self) -> None:
        try:
            self._to_run.pop()
        except IndexError:
            self._writer.abandon()
            return
        try:
            self._writer.end()
        finally:
            self._ended.set()

    def enter(self, job: ThreadBlock, timeout: float | None) -> WriteLoan:
        queue, until = self._writer.queue, math.inf if timeout is None else monotonic() + timeout
        if not queue.take_turn(job):
            job.line_up(thread_signal())
            queue.put(job)
        elif self._writer.own_turn.begin(job):
            return job.entered()
        with queue.waiting():
            in_time = wait_in_slices(job.granted, until, self._writer.state)
        if not in_time and job.cancel():
            raise not_entered(job, timeout, self._writer.state)
        # Granted, or refused, in the same moment; or the writer has died in the midst of that.
        while not (in_time or job.done()):
            in_time = job.granted.acquire(timeout=SLICE)
        return job.entered()

    def leave(self, job: ThreadBlock) -> None:
        queue, has_ended, me = self._writer.queue, False, threading.get_ident()
        try:
            has_ended = not queue.begins_end(job) or self._writer.own_turn.end(job)
        finally:
            if queue.ender == me:  # without a call: there may be no room for one
                queue.ender = 0
        if not has_ended:
            queue.hand_over(job)

    def hand_over(self, job: ThreadBlock) -> None:
        self._writer.queue.hand_over(job)

    def dropped(self) -> None:
        pass  # the thread drains the queue, and ends

    def forget(self) -> None:
        pass  # the thread is not there

    def join(self, timeout: float | None) -> bool:
        # Before 3.13, a join that Ctrl-C ends says of the thread that it has ended.
        if not self._ended.wait(timeout):
            return False
        if self._has_begun:
            self._thread.join()  # which is about to end
        return True

    def _main(self) -> None:
        try:
            run = self._to_run.pop()
        except IndexError:  # it was given up before it has begun
            return
        self._has_begun = True
        run()

    def _run(self) -> None:
        writer = self._writer
        writer.state.writer_thread = threading.get_ident()
        try:
            if self._opens():
                self._write_all()
        finally:
            writer.state.writer_thread = 0  # the system gives the number to other threads
            self._ended.set()

    def _opens(self) -> bool:
        try:
            self._writer.open()
            return True
        except BaseException as error:
            self._failure = error
            self._writer.end()
            return False
        finally:
            self._ready.set()

    def _write_all(self) -> None:
        try:
            while self._work():
                pass
        except BaseException as error:
            self._writer.broke(error)
        finally:
            self._writer.end()

    def _work(self) -> bool:
        """Write what waits, or wait for it; False at the end. Keeps nothing of the last jobs alive while it waits."""
        jobs = self._writer.queue.take(MOST_TAKEN, self._writer.idle_after)
        self._writer.idle() if jobs is None else self._writer.write(jobs)
        return jobs != []


class InlineDriver:
    """The calling thread is the writer, while it calls.

    Locks: _turn is held by who is the writer now; through a block, from its begin to its end, which may be in another
           thread.
    """

    def __init__(self, writer: Writer, clock: Any) -> None:
        self._writer = writer
        self._turn = threading.Lock()
        self._inside: set[int] = set()  # the threads that use it, or are about to have it
        self._ended = False
        clock.turn_off()

    def start(self) -> None:
        self._writer.open()

    def give_up(self) -> None:
        self._writer.end()

    def submit(self, job: Job[Any], timeout: float | None) -> None:
        if self._writer.state.is_mine():  # the thread that is the writer runs it next
            self._writer.queue.put(job)
            return
        # A signal handler's or finalizer's: the thread that it has interrupted runs it.
        if self._writer.state.is_inside() or (job.bounded and threading.get_ident() in self._inside):
            self._writer.queue.put_unbounded(job)
            return
        if not self._take_turn(timeout):
            if job.bounded:
                raise QueueFullError(f"job {job.describe()} could not run in time: {self._writer.state.describe()}")
            return  # the wait for it finds it not started
        try:
            self._writer.queue.put(job)
            self._drive()
        finally:
            self._give_turn()

    def enter(self, job: ThreadBlock, timeout: float | None) -> WriteLoan:
        if not self._take_turn(timeout):
            job.cancel()
            raise not_entered(job, timeout, self._writer.state)
        try:
            self._writer.queue.check_open()
            with self._as_writer():
                self._writer.begin_block(job)
            transaction = job.entered()
            self._inside.discard(threading.get_ident())
            return transaction
        except BaseException:
            try:
                self._drive()  # what came meanwhile
            finally:
                self._give_turn()
            raise

    def leave(self, job: ThreadBlock) -> None:
        self._inside.add(threading.get_ident())
        try:
            with self._as_writer():
                self._writer.end_block(job)
            self._writer.state.entering.discard(threading.get_ident())  # the block is over: jobs may write and wait
            self._drive()
        finally:
            self._give_turn()

    def hand_over(self, job: ThreadBlock) -> None:
        pass  # this thread, or one that comes, is the writer

    def dropped(self) -> None:
        with contextlib.suppress(ReentrantWriteError):  # this thread has left a block open
            self.join(0.0)

    def forget(self) -> None:
        self._turn = threading.Lock()  # another thread of the parent may have had it

    def join(self, timeout: float | None) -> bool:
        if not self._take_turn(timeout):
            return False
        try:
            self._drive()
            if not self._ended:
                self._ended = True
                with self._as_writer():
                    self._writer.end(timeout)
            return True
        finally:
            self._give_turn()

    def _take_turn(self, timeout: float | None) -> bool:
        if self._writer.state.forked:
            raise forked_error()
        me = threading.get_ident()
        if me in self._inside:
            raise ReentrantWriteError("a callback or signal handler cannot wait for the write that it interrupts")
        need_stack(STACK)
        has_it = False
        self._inside.add(me)
        try:
            has_it = self._turn.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        finally:
            if not has_it:
                self._inside.discard(me)
        return has_it

    def _give_turn(self) -> None:
        if not self._writer.state.forked:
            state = self._writer.state
            interrupt, state.interrupt = state.interrupt, None
            self._turn.release()
            self._inside.discard(threading.get_ident())
            if self._writer.queue.queue and self._take_turn(0.0):  # what a signal handler has put in this moment
                try:
                    self._drive()
                finally:
                    self._give_turn()
            if interrupt is not None:
                raise interrupt

    def _drive(self) -> None:
        """Write what is queued, and what that queues."""
        writer = self._writer
        with self._as_writer():
            try:
                while jobs := writer.queue.take_now(MOST_TAKEN):
                    writer.write(jobs)
            except BaseException as error:
                writer.broke(error)
                raise

    @contextlib.contextmanager
    def _as_writer(self) -> Iterator[None]:
        self._writer.state.writer_thread = threading.get_ident()
        try:
            yield
        finally:
            self._writer.state.writer_thread = 0
