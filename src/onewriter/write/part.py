"""Part: a savepoint of a job or block, for a ``with`` block."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import types
import weakref
from typing import Any

from onewriter.base.scopes import Scope
from onewriter.errors import OneWriterError, TransactionAbortedError, TransactionClosedError
from onewriter.write.loan import WriteLoan
from onewriter.write.parts import Mark, Parts


class Part:
    """If it raises, it is undone, and the transaction goes on.

    A class, where contextlib would make it of a generator: what a signal handler raises comes behind a call, or as one
    begins, and with contextlib's own there is none of ours that could undo the part. Its stores come before any call.
    If it is collected while it is open, it cannot be left any more, and is undone.

    States:  new → open, with ``_mark`` → ended.
    Threads: any, as its transaction.
    """

    _is_new = True
    _mark: Mark | None = None  # as long as it is open
    _scope: Scope[Any] | None = None  # of who is inside
    _inner: WriteLoan | None = None  # a loan that ends with it

    def __init__(self, loan: WriteLoan) -> None:
        self._loan = loan

    def __enter__(self) -> Any:
        if not self._is_new:
            raise RuntimeError("a savepoint is entered once: call savepoint() again for another one")
        self._is_new = False
        self._parts: Parts = self._loan.all_parts()
        self._mark = self._loan.call(self._parts.begin)
        try:
            inside = self._begin()
            # Not ``__del__``, which runs at each end, too: what a signal handler raises in it is lost.
            self._mark.kept_by = weakref.ref(self, functools.partial(_collected, self._loan, self._mark, self._inner))
            return inside
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _begin(self) -> Any:
        """What else begins with it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        mark, scope, loan = self._mark, self._scope, self._loan
        if mark is None:  # it has ended
            return
        if scope is not None:
            scope.what = None
        if kind is not None and (loan._around or loan)._closed is None:
            self._parts.has_failed = mark.has_failed = True  # if a signal handler ends this, the next call undoes it
        has_failed = True
        try:
            if scope is not None:
                loan.job._state.scopes.leave(scope)
            if self._inner is not None:
                self._inner.end()
            if kind is None:
                has_failed = False
                end(loan, mark)
            else:
                undo(loan, mark, GeneratorExit() if error is None else error, has_failed)
        except BaseException as failure:
            if kind is None:
                undo(loan, mark, failure, has_failed)
            raise
        finally:
            self._mark = mark.kept_by = None


class Savepoint(Part):
    """Inside a reader() inside its transaction, reads see the transaction again from here on."""

    def _begin(self) -> None:
        loan = self._loan
        scopes = loan.job._state.scopes
        here, block = scopes.innermost(), scopes.innermost(writes=True)
        if here is not block and isinstance(block, WriteLoan) and block._root is loan._root:
            self._scope = scopes.enter(loan, writes=True)


def _collected(loan: WriteLoan, mark: Mark, inner: WriteLoan | None, _: object) -> None:
    with contextlib.suppress(OneWriterError):
        if inner is not None:
            inner.end()
        undo(loan, mark, GeneratorExit(), has_failed=True)


def end(loan: WriteLoan, mark: Mark) -> None:
    """Keep what it has done. By the whole transaction's loan: a nested block's may be over, and still wait for this."""
    loan._root.call(loan.all_parts().end, mark)


def undo(loan: WriteLoan, mark: Mark, error: BaseException, has_failed: bool) -> None:
    """``error`` goes out of it: undo it, or say that it could not be. ``has_failed``: it came before its end."""
    parts, whole = loan.all_parts(), loan._root
    if not whole.is_closed:
        parts.has_failed = mark.has_failed = True  # if that fails, the next call does it
    try:
        whole.call(parts.undo, mark)
    except TransactionClosedError as late:
        if mark.ended_with_outer or loan.ended_well:
            tell_kept(error, late, has_failed)
        elif whole.is_closed:
            parts.forget(mark)
    except TransactionAbortedError:
        parts.forget(mark)
    except (OneWriterError, sqlite3.Error):
        pass  # a function of SQL calls this, or interrupt() was called: the next call does it


def tell_kept(error: BaseException, late: TransactionClosedError, has_failed: bool) -> None:
    """A part cannot be undone any more: ``error`` alone would say that it was. If it has not failed by itself, that is
    a signal handler's, just behind its end."""
    if isinstance(error, TransactionClosedError):
        return
    if has_failed and isinstance(error, Exception):
        raise late from error
    with contextlib.suppress(BaseException):  # as from a frozen dataclass, which refuses notes
        BaseException.add_note(error, f"onewriter: what failed was not undone: {late}")
