"""Claim: what one read or block has, or waits for, of the pool's connections."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from threading import get_ident
from time import monotonic
from typing import Any

from onewriter.read.reader import Reader


class Claim:
    """The claim of one read or block on a connection of the pool.

    States: waiting, in the line or on its way to it → admitted: it may open a connection → lent: it has ``reader`` →
            over. Never backwards.
    Locks:  the pool's guards all of it.

    Made before anything is asked for, so that, wherever Ctrl-C comes, ``ReaderPool.end`` knows what there is to end.
    """

    is_admitted = False
    is_over = False
    reader: Reader | None = None
    signal: Any = None  # a lock or a future, for the end of its waiting
    is_extra = False  # for a connection beside those of the pool
    is_expired = False  # nobody waits for its statements any more
    is_named = False  # a warning was given
    runs_in = 0  # the thread of a task's call
    loop: AbstractEventLoop | None = None  # in whose thread the block was entered

    def __init__(self, label: str) -> None:
        self.label = label
        self.since = monotonic()  # it waits, and then, that it is admitted
        self.thread = get_ident()  # which gives it back; 0: any may
