"""Scopes: which calls are inside which open job, block or reader. One stack for threads and tasks."""

from __future__ import annotations

import asyncio
import threading
import weakref
from asyncio import _get_running_loop
from collections.abc import Callable
from contextvars import ContextVar
from threading import get_ident
from typing import Any, Generic, TypeAlias, TypeVar

from onewriter.base.call_site import call_of_pool

S = TypeVar("S")


class Scope(Generic[S]):
    """One open job, block, savepoint or reader, as calls inside it see it.

    A call is inside if it is made in the same context, thread and task (any task, if there was none at the entry). All
    three, because other code runs in the same thread meanwhile: tasks of its loop, and what a thread pool runs there
    next, without a context of its own. A copied context has the scope too, so the context alone is not enough.

    Threads: entered by its owner, which keeps it; left by any.
    """

    __slots__ = ("__weakref__", "_call_of_pool", "_number", "_scopes", "_task", "_thread", "is_over", "what", "writes")

    def __init__(self, scopes: Scopes[S], what: S | None, writes: bool) -> None:
        self.what = what  # None: it is not open, or not any more
        self.is_over = False
        self.writes = writes  # or only reads
        self._scopes = scopes
        self._number = 0  # of the thread; the system gives it to another when that has ended
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[Any] | None = None
        self._call_of_pool: Callable[[], object] | None = None

    def is_around(self) -> bool:
        """Whether the caller is inside, given that its context is."""
        return (
            self._number == get_ident()
            and (self._thread is None or self._thread is threading.current_thread())
            and (self._task is None or self._task is running_task())
            and (self._call_of_pool is None or self._call_of_pool() is call_of_pool())
        )


# A scope, and what is around it. Weak: a context may live as long as its thread, and would keep a block from being
# collected that cannot be left any more.
Node: TypeAlias = "tuple[weakref.ref[Scope[Any]], Node] | None"
_innermost: ContextVar[Node] = ContextVar("onewriter_scope", default=None)  # of all gateways: a variable is for ever
enclosing = _innermost.get  # None: the caller is certainly inside none


class Scopes(Generic[S]):
    """The open scopes of one gateway.

    The innermost one that the caller is inside decides what a call acts on. One whose loan was taken back stays the
    innermost until its ``with`` block ends, and its loan says why it is closed. One that was left elsewhere is
    ignored.
    """

    def __init__(self) -> None:
        self.job: Scope[S] = Scope(self, None, writes=True)  # of the job that the writer runs
        self._around_job: Node = None
        self._of_job: Node = weakref.ref(self.job), None

    def enter(self, what: S, *, writes: bool) -> Scope[S]:
        """The scope is open until ``leave``, and as long as there is a reference to what this returns."""
        scope: Scope[S] = Scope(self, None, writes)
        scope._number, scope._thread = get_ident(), threading.current_thread()
        scope._task = running_task()
        call, node = call_of_pool(), _innermost.get()
        if call is not None:
            scope._call_of_pool = _weakly(call)
        _innermost.set((weakref.ref(scope), node and _first_open(node)))
        scope.what = what  # the last step: a call that Ctrl-C ends has entered nothing
        return scope

    def leave(self, scope: Scope[S]) -> None:
        """End it, for all calls. From any thread, task and context, more than once."""
        scope.what, scope.is_over = None, True
        scope._call_of_pool = None
        node = _innermost.get()
        if node is not None and node[0]() is scope:
            _innermost.set(node[1] and _first_open(node[1]))

    def inside(self, what: S, *, writes: bool) -> Inside:
        """For the ``with`` block the caller is inside ``what``."""
        return Inside(self, what, writes)

    def begin_jobs(self) -> Callable[[S], None]:
        """For the writer, which runs one job at a time: until ``end_jobs`` all jobs share one scope, and enter it by
        calling what this returns."""
        self._around_job = _innermost.get()
        self._of_job = weakref.ref(self.job), self._around_job
        self.job._number = get_ident()
        return self.enter_job

    def enter_job(self, what: S) -> None:
        self.job.what = what
        _innermost.set(self._of_job)  # a scope that an earlier job has left open does not count any more

    def leave_job(self) -> None:
        self.job.what = None

    def end_jobs(self) -> None:
        _innermost.set(self._around_job)

    def innermost(self, *, writes: bool = False, counts: Callable[[S], bool] | None = None) -> S | None:
        """The owner of the innermost scope that the caller is inside; ``writes``: of those that write; ``counts``: of
        those whose owner does.
        """
        node = _innermost.get()
        while node is not None:
            scope, node = node[0](), node[1]
            if scope is not None and scope._scopes is self and (scope.writes or not writes):
                what = scope.what  # looked up once: another thread may end it
                if what is not None and scope.is_around() and (counts is None or counts(what)):
                    return what  # type: ignore[no-any-return]
        return None

    def inherited(self, *, own: bool = False) -> list[S]:
        """The scopes of the caller's context, innermost first: its own, and those in which its task was created;
        ``own``: only those that its task, or without one its thread, has entered and is inside."""
        found, node = [], _innermost.get()
        while node is not None:
            scope, node = node[0](), node[1]
            if scope is None or scope._scopes is not self:
                continue
            what = scope.what
            if what is not None and (not own or (scope._task is running_task() and scope.is_around())):
                found.append(what)
        return found


class Inside:
    """A class, where contextlib would make it of a generator: what a signal handler raises in contextlib's functions
    would leave the scope open."""

    __slots__ = ("_scope", "_scopes", "_what", "_writes")

    def __init__(self, scopes: Scopes[Any], what: Any, writes: bool) -> None:
        self._scopes, self._what, self._writes = scopes, what, writes

    def __enter__(self) -> None:
        self._scope = self._scopes.enter(self._what, writes=self._writes)

    def __exit__(self, *_: object) -> None:
        self._scope.what = None  # not by a call, which a signal handler may end as it begins
        self._scopes.leave(self._scope)


def _first_open(node: Node) -> Node:
    """Without those at the front that are over: they were left in another context, so could not be removed here.

    With one that is about to open: this may be a signal handler's or finalizer's, as ``enter`` is at its last step.
    """
    while node is not None:
        scope = node[0]()
        if scope is not None and not scope.is_over:
            return node
        node = node[1]
    return None


def _weakly(call: object) -> Callable[[], object]:
    """A piece of work refers to a block that it has entered; with a reference back, the block would not be collected
    before the garbage collector runs.
    """
    try:
        return weakref.ref(call)
    except TypeError:  # a frame
        return lambda: call


def running_task() -> asyncio.Task[Any] | None:
    loop = _get_running_loop()
    return None if loop is None else asyncio.current_task(loop)
