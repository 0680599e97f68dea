"""Claim: the connection of the pool that one read or block has or waits for."""

from __future__ import annotations

import math
import sqlite3
import types
from collections.abc import Callable
from threading import get_ident
from time import monotonic
from types import SimpleNamespace
from typing import Any, Protocol

from onewriter.base.arguments import check_label
from onewriter.base.call_site import place_of
from onewriter.base.garbage import Search
from onewriter.base.waiting import KnownLoop


class Limit(Protocol):
    """The loan of a function's job, which has a time limit."""

    @property
    def held_until(self) -> float: ...
    def refuse_late(self, error: sqlite3.Error) -> None: ...


class Claim(SimpleNamespace):
    """The claim of one read or block on a connection of the pool.

    States: waiting: it is in the line of the pool → admitted: among those that may open a connection → lent: it is the
            ``claim`` of a reader → over: nowhere. Never backwards.

    Created before a connection is asked for, so that, wherever Ctrl-C comes, ``ReaderPool.end`` knows what to end; and
    by a constructor in C, since every read creates one.
    """

    label: str
    since: float  # it waits, and then, that it is admitted
    deadline: float  # of its wait and of its statements
    thread: int  # which gives it back; 0: any may
    signal: Any = None  # a lock or a future, as long as it waits
    is_extra = False  # for a connection in addition to the pool's
    is_nested = False  # a signal handler's or finalizer's, whose thread waits for a connection, and behind it goes on
    is_named = False  # a warning was given
    search: Search | None = None  # in the garbage, for what is inside it, while others wait
    runs_in = 0  # the thread of a task's call
    ends_in: int  # the thread that ends it; others leave it to that one
    loop: KnownLoop | None = None  # of its task, or in whose thread the block was entered
    job: Limit | None = None  # of the function that the block is in, and its statements end with
    end_lost: Callable[[], object] | None = None  # of a task's block: to be called once its loop is closed

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]


NOBODY = Claim(label="", since=0.0, deadline=math.inf, thread=0)  # has what is idle


def reader_label(label: str | None, frame: types.FrameType) -> str:
    """The name of a ``reader()`` block, called from ``frame``, in messages and figures."""
    label = check_label(label)
    return repr(label) if label else f"reader() in {place_of(frame.f_code, frame.f_lasti)}"


def new_claim(label: str, deadline: float = math.inf) -> Claim:
    """A claim of the calling thread."""
    return Claim(label=label, since=monotonic(), deadline=deadline, thread=get_ident())
