"""Places: which claims have a connection of the pool, which wait for one, and which is next."""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import weakref
from asyncio import _get_running_loop
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import get_ident
from time import monotonic
from typing import Any, Protocol

from onewriter.base import garbage
from onewriter.base.state import State
from onewriter.base.waiting import Flag, is_over, thread_signal, wake
from onewriter.errors import ReadTimeoutError, closed_error
from onewriter.read.claim import NOBODY, Claim
from onewriter.read.clock import GRACE, ReadClock
from onewriter.read.reader import Reader, Snapshot

LONG = 0.2  # seconds; a read that lasts longer will hardly end during a pause


class Idle(list[Reader]):
    """Connections that are not in use. The last one given back is lent first: its page cache is warm."""

    last: Any = property(list.pop)  # taken out, and not by a call: behind one Ctrl-C comes, and what was taken is lost


NONE_IDLE = Idle()


class Threads(Protocol):
    """In which tasks read."""

    def shutdown(self) -> None: ...


class Places:
    """Which claim has which connection of a pool. No SQLite.

    An idle one is taken and given back without the lock, each in one step, after which no Python code, of this thread
    or of another, runs before its claim is noted. A thread that has to wait says so first, and looks then; one that
    gives a connection back looks afterwards. So one of them sees the other.

    Locks:   _lock guards _door, _is_watched, _readers, _opening, _count, _most, _line, _paused_until, _pausing and
             _closed. Nothing blocks while it is held.
    Threads: any.
    """

    clock: ReadClock
    used_by: set[weakref.ref[Threads]]  # they end when all are back in a pool that is closed

    def __init__(self, size: int, state: State) -> None:
        self.size = size
        self._state = state
        state.reads_here = self._reads_here
        self._lock = threading.RLock()  # a finalizer or signal handler may read while its thread is inside
        state.locks = (*state.locks, self._lock)
        self._idle = Idle()
        self._door = self._idle  # where a claim takes one; empty while others wait or none may be lent
        self._is_watched = False  # a thread that gives one back must look for claims that wait
        self._readers: dict[Reader, None] = {}  # open ones, idle or lent
        self._opening: dict[Claim, None] = {}  # those that are about to open one
        self._count = 0  # of both; above _most while threads that have one need another
        self._most = size  # of _count; one more for each that is lent in addition; 0: closed
        self._line: OrderedDict[Claim, None] = OrderedDict()  # in order; any may leave
        self._asking: set[int] = set()  # threads that wait for one, or are about to
        self._closed = False
        self._all_back = Flag()
        self._on_all_back: Callable[[], object] = str  # or what is to be called then
        self.used_by = set()
        self._paused_until = 0.0  # no claim is admitted until then; 0: there is no pause
        self._pausing = -1  # the thread that makes the pause, or made the last one
        self._returned = Flag()  # in a pause: one has come back

    # Who waits --------------------------------------------------------------------------------------------------------

    def ask(self, claim: Claim, new_signal: Callable[[], Any]) -> bool:
        """Admit it, if there is a connection or one may be opened; if not, its signal is set later. Never waits.

        Raises:
            WriterClosedError, WriterBrokenError: the gateway is closed, or out of service.
        """
        try:
            reader = self._door.last
        except IndexError:
            pass
        else:
            reader.claim = claim
            return True
        return self._line_up(claim, new_signal)

    def _line_up(self, claim: Claim, new_signal: Callable[[], Any]) -> bool:
        self.end_lost()
        with self._lock:
            self._refuse_if_closed()
            if claim.is_extra:
                self._most += 1
                self._count += 1
                self._opening[claim] = None
                return True
            self._line[claim] = None
            # In a callback or signal handler of the thread that pauses: that goes on behind it.
            if new_signal is thread_signal and claim.thread == self._pausing:
                self._paused_until = 0.0
            self._end_pause(monotonic())
            self._serve()
            needs_its_own = claim in self._line and self._waits_for_itself(claim, new_signal is thread_signal)
            if needs_its_own and claim in self._line:  # a signal handler may have had it admitted; from here on no call
                del self._line[claim]
                self._count += 1
                self._opening[claim] = None
            signal = new_signal()
            if claim not in self._line:
                return True
            claim.signal = signal
        self.clock.set(monotonic() + garbage.LONG - GRACE)
        return False

    def _waits_for_itself(self, claim: Claim, is_threads: bool) -> bool:
        """Whether its caller has a connection, so that it needs an additional one: for a read in a row factory, say, or
        a reader() in a block in a reader(). In a factory a task never is. As many as are nested, at most: tasks whose
        loop runs inside a reader() of its thread wait as all do.
        """
        if claim.thread == 0:  # it is not the calling thread's
            return False
        if is_threads and (claim.is_nested or self._has_one(claim.thread)):
            return True
        return any(isinstance(here.lends(), Snapshot) for here in self._state.scopes.inherited(own=True))

    def check_admitted(self, claim: Claim) -> None:
        """To be called when the wait for its signal is over; raises the error if it has no connection."""
        if not self.is_out(claim):
            self._refuse_if_closed()
            labels = ", ".join(self.borrowers)
            text = f"no connection for {claim.label} in time: all {self.size} are in use, by {labels}"
            raise ReadTimeoutError(text)

    def _serve(self) -> None:
        """Admit those in line while there are connections. As long as some wait, others cannot take one."""
        self._door, self._is_watched = NONE_IDLE, True  # before the look: who gives one back after it looks here
        while self._line and not self._paused_until:
            first = None
            for first in self._line:  # noqa: B007 - no call, behind which a finalizer or a signal handler could come
                break
            now = monotonic()
            if first is None:  # one was here as the iterator was made
                continue
            if is_over(first.loop):  # its task never goes on
                self._line.pop(first, None)
                continue
            if first not in self._line:  # one was here
                continue
            if self._idle:  # since that look no call, until it has left the line
                reader = self._idle.last
                reader.claim = first
                del self._line[first]
            elif self._count < self._most:
                del self._line[first]
                self._count += 1
                self._opening[first] = None
            else:
                break
            first.since = now
            signal, first.signal = first.signal, None  # a task whose loop is closed now is kept by nothing any more
            if signal is not None:
                try:
                    wake([signal])
                except BaseException:  # Ctrl-C
                    wake([signal])
                    raise
        self._is_watched = bool(self._line or self._paused_until) or self._count > self._most
        if not self._is_watched and self._state.broken is None:
            self._door = self._idle

    def refuse(self) -> None:
        """Stop lending: the gateway is out of service."""
        with self._lock:
            self._serve()

    def _refuse_if_closed(self) -> None:
        self._state.refuse_if_broken()
        if self._closed:
            raise closed_error()

    def end_lost(self) -> None:
        """End those of tasks whose loop is closed: nothing of these runs any more, not even the end of their block."""
        for claim in self._lent():
            if claim.end_lost is not None and is_over(claim.loop):
                claim.end_lost()

    def free_lost(self) -> None:
        """For the writer, whose COMMIT waits for readers: end those that nobody else ends any more."""
        self.end_lost()
        self._look_in_the_garbage()

    def _help_those_that_wait(self) -> None:
        if self._line:
            self._look_in_the_garbage()

    def _look_in_the_garbage(self) -> None:
        """A block in a reference cycle, as that of a generator which a framework has dropped, ends only when the
        garbage collector runs: have it run, for each that is open for long.
        """
        now, is_due = monotonic(), False
        for claim in self._lent():
            if claim.thread == 0 or claim.end_lost is not None:  # no read, which ends by itself
                claim.search = claim.search or garbage.Search(claim.since, garbage.LONG)
                is_due |= claim.search.is_due(now)
        if is_due:
            garbage.collect_soon()

    # Who comes back ---------------------------------------------------------------------------------------------------

    def _leave(self, claim: Claim) -> Reader | None:
        """Leave the line, or give up opening a connection; returns one that it was lent in this moment."""
        with self._lock:
            self._line.pop(claim, None)  # first: from now on it is lent none
            reader = self._lent_to(claim)
            if reader is not None:
                return reader
            if claim in self._opening:
                del self._opening[claim]
                self._count -= 1
                self._most -= claim.is_extra
            if self._is_watched:
                self._serve()
        self._tell_of_return()
        return None

    def _put_back(self, claim: Claim, reader: Reader) -> bool:
        """Give its connection to the first in line, or keep it for the next. False: it must be closed."""
        with self._lock:
            if reader.claim is claim:
                if self._count > self._most or claim.is_extra:
                    return False
                reader.claim = NOBODY
                self._idle.append(reader)  # and no call in between
            if self._is_watched:
                self._serve()
        self._tell_of_return()
        return True

    def _close_place(self, claim: Claim, reader: Reader) -> None:
        """There is no connection to give back: the next in line opens another."""
        with self._lock:
            if reader in self._readers:
                del self._readers[reader]
                reader.claim = NOBODY
                self._count -= 1
                self._most -= claim.is_extra
            if self._is_watched:
                self._serve()
        self._tell_of_return()

    def _tell_of_return(self) -> None:
        if self._paused_until:
            self._returned.set()
        if self._closed:
            self._call_if_all_back()

    def when_all_back(self, function: Callable[[], object]) -> None:
        """Call it when the last connection has come back and is closed; now, if that is so."""
        with self._lock:
            self._on_all_back = function
        self._call_if_all_back()

    def _call_if_all_back(self) -> None:
        if self._closed and not self._count:
            self._all_back.set()
            self.clock.end()
            for known in tuple(self.used_by):
                if (threads := known()) is not None:
                    threads.shutdown()
            with self._lock:
                function, self._on_all_back = self._on_all_back, str
            function()

    # Pauses -----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def pause(self, seconds: float) -> Iterator[None]:
        """Admit no claim during the ``with`` block, so that all connections come back meanwhile; ``seconds`` at most.

        Not if one has been in use for long already: it would not come back in time.
        """
        self.end_lost()
        if seconds <= 0.0 or self.out_for(LONG):
            yield
            return
        self._returned.clear()
        until = monotonic() + seconds
        try:
            with self._lock:
                self._paused_until, self._pausing = until, get_ident()
                self._serve()
            self.clock.set(until - GRACE)
            while self.in_use and (left := until - monotonic()) > 0.0:
                self._returned.wait(left)
                self._returned.clear()
            yield
        finally:
            with self._lock:
                self._paused_until = 0.0
                self._serve()

    def _end_pause(self, now: float) -> float:
        """If it is over, admit claims that came during it; returns when to look again, for any that wait."""
        if self._paused_until and now >= self._paused_until:
            self._paused_until = 0.0
            self._serve()
        until = self._paused_until or math.inf
        return min(until, now + garbage.LONG) if self._line else until

    # Who has one ------------------------------------------------------------------------------------------------------

    @property
    def in_use(self) -> int:
        return self._count - len(self._idle)

    @property
    def waiting(self) -> int:
        """The number of claims that wait for a connection."""
        return len(self._line)

    def _lent(self) -> list[Claim]:
        """The claims that have a connection, or are about to open one."""
        opening = list(self._opening)  # first: what has one is not among these any more
        return opening + [claim for reader in list(self._readers) if (claim := reader.claim) is not NOBODY]

    def _lent_to(self, claim: Claim) -> Reader | None:
        for reader in list(self._readers):
            if reader.claim is claim:
                return reader
        return None

    @property
    def borrowers(self) -> list[str]:
        """The labels of those that have a connection."""
        return [claim.label for claim in self._lent()]

    @property
    def has_mine(self) -> bool:
        """Whether one cannot come back while the calling thread waits, or it is inside a block or job."""
        me, loop = get_ident(), _get_running_loop()
        if self._state.is_inside_open() or self._has_one(me):
            return True
        mine = None if loop is None else weakref.ref(loop)
        claims = (*list(self._line), *self._lent())
        return any(claim.thread == me or (claim.loop is not None and claim.loop == mine) for claim in claims)

    def _reads_here(self) -> bool:
        """Whether the calling thread, and not a task of its loop, has one with a snapshot, as a backup has: what calls
        this, it goes on behind.
        """
        pinned, me = [reader.claim for reader in list(self._readers) if reader.is_pinned], get_ident()
        return any(claim.thread == me and claim.loop is None for claim in pinned)

    def has_mine_for_good(self) -> bool:
        """The same, unless it is that of a generator, say, which nobody can reach: the garbage collector ends that."""
        if self.has_mine and gc.isenabled():
            gc.collect()
        return self.has_mine

    def _has_one(self, thread: int) -> bool:
        return any(thread in (claim.thread, claim.runs_in) for claim in self._lent())

    def out_for(self, seconds: float) -> list[Claim]:
        """Those that have had a connection for longer than that."""
        now = monotonic()
        return [claim for claim in self._lent() if now - claim.since > seconds]

    def is_out(self, claim: Claim) -> bool:
        return claim in self._opening or self._lent_to(claim) is not None

    def after_fork_in_child(self) -> list[object]:
        """In a forked child: lend nothing, take nothing back; returns what must never be closed there."""
        self._lock = self.clock.lock = threading.RLock()
        self._closed, self._door = True, NONE_IDLE
        self._on_all_back = str
        self._paused_until = 0.0
        readers = list(self._readers)
        for reader in readers:
            reader.is_inherited = reader.guard.leaves_traces = True
        return [thing for reader in readers for thing in (reader, reader.connection)]
