"""Scheduler: runs threads one at a time, and switches between them where a schedule says.

The gateway's locks, events, queues, threads and clock are put in the place of real ones. A thread can be switched off
at each of them, and, in files that are looked at finely, wherever CPython may switch: after a call, at a jump back, at
the beginning of a function. What is chosen there is a schedule; the same schedule gives the same run.

A wait with a time limit that is near may also end because its time is over. Otherwise the clock stands still, and
goes on only if nothing else can: ``Scheduler.jumps`` says whose waits that ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dis
import functools
import math
import queue
import selectors
import sys
import threading
import time
import types
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from threading import get_ident
from typing import Any, NamedTuple

import onewriter.base.state
import onewriter.base.threads
import onewriter.base.waiting

MOST = 100_000  # switch points, after which a run has no end
FAR = 1000.0  # seconds of its clock, too
TICK = 1e-6  # seconds by which a wait ends late
ALWAYS = sys.version_info >= (3, 12)  # switching the tracing of steps off and on has crashed 3.12.1
REAL = 30.0  # seconds of the real clock: who waits longer waits for something that is not seen here

Schedule = Mapping[int, int]  # at which of the choices not the first, but which


class AbandonedError(BaseException):
    """The run is over: there is a finding."""


class Option(NamedTuple):
    """Who may run next; ``cost`` counts towards the bound."""

    thread: Controlled
    is_late: bool
    cost: int


class Choice(NamedTuple):
    """What was chosen where there were several: which, and what each of them would have cost."""

    chosen: int
    costs: tuple[int, ...]


class Scheduler:
    """One run.

    Threads: one of them runs, and only that touches anything here.
    """

    def __init__(self, schedule: Schedule, near: float = 0.0, fine: Collection[str] = ()) -> None:
        """``near``: seconds that a wait lasts at most if it may end by its time; ``fine``: ends of file names."""
        self.choices: list[Choice] = []
        self.finding = ""
        self.jumps: list[str] = []  # whose waits have ended since nothing else could run, and where
        self.log: list[str] | None = None
        self.now = 1000.0
        self.is_exploring = False
        self.is_over = False
        self.ended = threading.Event()
        self._fine = _Fine(self, tuple(fine)) if fine else None
        self._schedule = schedule
        self._near = near
        self._steps = 0
        self.threads: list[Controlled] = []
        self.current: Controlled | None = None

    @property
    def runs_here(self) -> bool:
        return self.current is not None and self.current.ident == get_ident()

    def run(self, function: Callable[[], object]) -> None:
        """In a thread that is not one of the scheduler's; returns when all are over."""
        root = Controlled(self, function, name="main")
        self.current = root
        root.baton.release()
        root.launch()
        if not self.ended.wait(REAL):
            where = [f"{thread.name}: {_place(sys._current_frames()[thread.ident or 0])}" for thread in self._alive()]
            self.find(f"a thread waits for what is not seen here: {where}")

    def find(self, text: str) -> None:
        self.finding = self.finding or text
        self.is_over = True

    def _alive(self) -> list[Controlled]:
        return [thread for thread in self.threads if not thread.is_over]

    def at_once(self, *functions: Callable[[], object]) -> None:
        """Call each in a thread of its own. There are choices from here to their end, and only there."""
        threads = [Controlled(self, function, name=f"caller {n}") for n, function in enumerate(functions, 1)]
        for thread in threads:
            thread.start()
        self.is_exploring = True
        try:
            self.wait(lambda: all(thread.is_over for thread in threads), None)
        finally:
            self.is_exploring = False
            self.look_finely()

    def fork(self) -> None:
        """From here on only the running thread runs, as in the child of a fork, and ``stop`` ends it all."""
        for thread in self.threads:
            thread.is_frozen, thread.until = thread is not self.current, math.inf

    def stop(self) -> None:
        self.is_over = True

    def look_finely(self) -> None:
        """Have the running thread look at each step, or no longer."""
        if self._fine is not None and (sys.gettrace() is not None) is not (self.is_exploring or ALWAYS):
            self._fine.trace(self.is_exploring or ALWAYS)

    # Switch points ----------------------------------------------------------------------------------------------------

    def point(self) -> None:
        """The running thread may be switched off here."""
        if not self.is_exploring or not self.runs_here or self.is_over:
            return
        self._count()
        me = self.current
        assert me is not None
        options = [Option(me, False, 0)]
        options += [Option(thread, False, 1) for thread in self.threads if thread is not me and thread.can_run()]
        self._switch(self._choose(options + self._late()))

    def wait(self, ready: Callable[[], object], timeout: float | None) -> bool:
        """The running thread waits; False: until its time was over."""
        if ready():
            return True
        if not self.runs_here:
            raise RuntimeError("a thread that is not scheduled waits")
        if self.is_over:
            raise AbandonedError
        self._count()
        me = self.current
        assert me is not None
        me.ready, me.until = ready, math.inf if timeout is None or timeout < 0 else self.now + timeout
        self._switch(self._next())
        me.ready, me.until, is_late, me.is_late = None, math.inf, me.is_late, False
        if self.is_over:
            raise AbandonedError
        return not is_late

    def end_thread(self) -> None:
        """The running thread is over."""
        if not self._alive():
            self.ended.set()
            return
        if self.threads[0].is_over and not self.is_over and not any(thread.can_run() for thread in self._alive()):
            self.find(f"threads are left: {', '.join(thread.name for thread in self._alive())}")
        self._give(Option(self._alive()[0], False, 0) if self.is_over else self._next())

    def _count(self) -> None:
        self._steps += 1
        if self._steps > MOST or self.now > FAR + 1000.0:
            self.find("it has no end")

    def _late(self) -> list[Option]:
        if not self._near or not self.is_exploring:
            return []
        near = self.now + self._near
        return [Option(thread, True, 1) for thread in self.threads if thread.until <= near and not thread.can_run()]

    def _next(self) -> Option:
        """Who runs while the running thread cannot."""
        if self.is_over:
            return Option(self._alive()[0], False, 0)
        options = [Option(thread, False, 0) for thread in self.threads if thread.can_run()]
        if options:
            return self._choose(options + self._late()) if self.is_exploring else options[0]
        first = min(self._alive(), key=lambda thread: thread.until)
        if first.until == math.inf:
            self.find("deadlock: " + "; ".join(f"{thread.name} in {thread.where()}" for thread in self._alive()))
            return Option(first, False, 0)
        if first.until > self.now:  # or its time is over, since another's wait until then has ended by that
            self.jumps.append(f"{first.name} in {first.where()}")
        return Option(first, True, 0)

    def _choose(self, options: list[Option]) -> Option:
        if len(options) == 1:
            return options[0]
        chosen = self._schedule.get(len(self.choices), 0)
        if chosen >= len(options):
            self.find(f"choice {len(self.choices)} is not there again: the run depends on something else")
            return options[0]
        self.choices.append(Choice(chosen, tuple(option.cost for option in options)))
        if self.log is not None and self.current is not None:
            others = ", ".join(option.thread.name + " (late)" * option.is_late for option in options)
            where = self.current.where()
            self.log.append(f"{len(self.choices) - 1}: {self.current.name} in {where}: {chosen} of {others}")
        return options[chosen]

    def _switch(self, option: Option) -> None:
        me = self.current
        assert me is not None
        self._give(option)
        if option.thread is not me:
            me.baton.acquire()
            self.look_finely()

    def _give(self, option: Option) -> None:
        thread, is_late, _ = option
        if is_late:
            thread.is_late = True
            self.now = max(self.now, thread.until + TICK)
        if thread is not self.current:
            self.current = thread
            thread.baton.release()


class Controlled(threading.Thread):
    """A thread of the scheduler's; for the gateway, ``threading.Thread``."""

    def __init__(
        self,
        scheduler: Scheduler,
        target: Callable[..., object],
        args: Collection[Any] = (),
        name: str | None = None,
        daemon: bool | None = None,
    ) -> None:
        super().__init__(name=name or f"thread {len(scheduler.threads)}", daemon=True)
        self.scheduler = scheduler
        self.baton = allocate_lock()
        self.baton.acquire()
        self.ready: Callable[[], object] | None = None
        self.until = math.inf
        self.is_late = self.is_over = self.is_frozen = False
        self._function, self._arguments = target, args

    def can_run(self) -> bool:
        return not (self.is_over or self.is_frozen) and (self.ready is None or bool(self.ready()))

    def launch(self) -> None:
        self.scheduler.threads.append(self)
        super().start()

    def start(self) -> None:
        self.launch()
        self.scheduler.point()

    def join(self, timeout: float | None = None) -> None:
        if self.scheduler.runs_here:
            self.scheduler.wait(lambda: self.is_over, timeout)

    def is_alive(self) -> bool:
        return not self.is_over

    def run(self) -> None:
        self.baton.acquire()
        self.scheduler.look_finely()
        try:
            self._function(*self._arguments)
        except AbandonedError:
            pass
        except BaseException as error:
            if not self.scheduler.is_over:
                self.scheduler.find(f"{self.name} ended with {error!r}")
        finally:
            sys.settrace(None)
            self.is_over = True
            self.scheduler.end_thread()

    def where(self) -> str:
        frame = sys._current_frames().get(self.ident or 0)
        return "" if frame is None else _place(frame)


def _place(frame: types.FrameType | None) -> str:
    """Where the gateway is, or else the test: who waits, not by what."""
    by = (__file__, threading.__file__, onewriter.base.waiting.__file__)
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename in by:
        frame = frame.f_back
    assert frame is not None
    file = "/".join(frame.f_code.co_filename.split("/")[-2:])
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


class _Fine:
    """Switches where CPython may, in some files: after a call, after a jump back, and as a function begins."""

    def __init__(self, scheduler: Scheduler, files: tuple[str, ...]) -> None:
        self._scheduler = scheduler
        self._files = files

    def trace(self, begins: bool) -> None:
        """In the calling thread, the calls that are under way too."""
        sys.settrace(self._at_call if begins else None)
        frame = sys._getframe() if begins else None
        while frame is not None:
            if frame.f_code.co_filename.endswith(self._files):
                self._look_at(frame)
            frame = frame.f_back

    def _look_at(self, frame: types.FrameType) -> None:
        frame.f_trace_lines, frame.f_trace_opcodes, frame.f_trace = False, True, self._at_opcode

    def _at_call(self, frame: types.FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(self._files):
            return None
        self._look_at(frame)
        self._scheduler.point()
        return self._at_opcode

    def _at_opcode(self, frame: types.FrameType, event: str, argument: object) -> Any:
        if event == "opcode" and frame.f_lasti in _switches(frame.f_code):
            self._scheduler.point()
        return self._at_opcode


@functools.cache
def _switches(code: types.CodeType) -> frozenset[int]:
    found, was_call = set(), False
    for instruction in dis.get_instructions(code):
        if was_call:
            found.add(instruction.offset)
        was_call = instruction.opname.startswith("CALL")
        if instruction.opname == "JUMP_BACKWARD":
            found.add(instruction.argval)
    return frozenset(found)


# What the gateway gets in place of threading, queue and time ----------------------------------------------------------


class Lock:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_taken = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self._scheduler.point()
        if self._is_taken and not (blocking and timeout and self._scheduler.wait(self._is_free, timeout)):
            return False
        self._is_taken = True
        return True

    def _is_free(self) -> bool:
        return not self._is_taken

    def release(self) -> None:
        if not self._is_taken:
            raise RuntimeError("release unlocked lock")
        self._is_taken = False
        self._scheduler.point()

    def locked(self) -> bool:
        return self._is_taken

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RLock(Lock):
    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self._owner = self._count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._owner != get_ident():
            if not super().acquire(blocking, timeout):
                return False
            self._owner = get_ident()
        self._count += 1
        return True

    def release(self) -> None:
        # No switch: what another thread may do from here on, it may do as well before this one's next step.
        self._count -= 1
        if not self._count:
            self._owner, self._is_taken = 0, False

    def _is_owned(self) -> bool:
        return self._owner == get_ident()


class Event:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._scheduler.point()
        self._is_set = True
        self._scheduler.point()

    def clear(self) -> None:
        self._scheduler.point()
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        self._scheduler.point()
        return self._scheduler.wait(self.is_set, timeout)


class SimpleQueue:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._items: deque[Any] = deque()

    def put(self, item: object) -> None:
        self._scheduler.point()
        self._items.append(item)
        self._scheduler.point()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self._scheduler.point()
        if block:
            self._scheduler.wait(self._items.__len__, timeout)
        if not self._items:
            raise queue.Empty
        return self._items.popleft()

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def empty(self) -> bool:
        return not self._items


class Loop(asyncio.SelectorEventLoop):
    """An event loop in one of the scheduler's threads, which sleeps and is woken as that says."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._wakeup = Event(scheduler)
        super().__init__(_Sleep(scheduler, self._wakeup))

    def time(self) -> float:
        return self._scheduler.now

    def _write_to_self(self) -> None:
        self._wakeup.set()


class _Sleep(selectors.SelectSelector):
    def __init__(self, scheduler: Scheduler, wakeup: Event) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._wakeup = wakeup

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._wakeup.wait(timeout)
        self._wakeup.clear()  # whoever sets it after this has its call in the loop's next round
        return []


class _Module(types.ModuleType):
    """A module of which some names mean others, to the scheduler's threads."""

    def __init__(self, real: types.ModuleType, others: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self._real = real
        self._others = others

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        other = self._others.get(name)
        if other is None:
            return real

        def make(*args: Any, **options: Any) -> Any:
            scheduler = _running()
            return real(*args, **options) if scheduler is None else other(scheduler, *args, **options)

        return make


def _running() -> Scheduler | None:
    thread = threading.current_thread()
    return thread.scheduler if isinstance(thread, Controlled) else None


def monotonic() -> float:
    scheduler = _running()
    return time.monotonic() if scheduler is None else scheduler.now


def _start(thread: threading.Thread) -> None:
    """No handler raises here, and the scheduler sees the threads that it starts."""
    thread.start()


def _is_owned(lock: Any) -> bool:
    return bool(lock._is_owned())


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """For the ``with`` block the gateways that the scheduler's threads make are in its hands."""
    places = {
        "threading": _Module(threading, {"Lock": Lock, "RLock": RLock, "Event": Event, "Thread": Controlled}),
        "queue": _Module(queue, {"SimpleQueue": SimpleQueue}),
        "monotonic": monotonic,
        "is_owned": _is_owned,
        "start": _start,
    }
    reals = {
        "threading": threading,
        "queue": queue,
        "monotonic": time.monotonic,
        "is_owned": onewriter.base.state.is_owned,
        "start": onewriter.base.threads.start,
    }
    modules = [module for name, module in sys.modules.items() if name.startswith("onewriter.")]
    replaced = [(module, name) for module in modules for name in reals if vars(module).get(name) is reals[name]]
    for module, name in replaced:
        setattr(module, name, places[name])
    try:
        yield
    finally:
        for module, name in replaced:
            setattr(module, name, reals[name])
