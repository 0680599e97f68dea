"""LentBlob: a blob of a lent connection."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import Any, NoReturn, Self

from onewriter.errors import TransactionAbortedError
from onewriter.sqlite.lending import LentShell


def _of_blob(name: str) -> Any:
    method = getattr(sqlite3.Blob, name)

    def call(self: LentBlob, *args: Any, **options: Any) -> Any:
        return self._lent._loan.call(method, self._raw, *args, **options)

    call.__name__ = name
    return call


class LentBlob:
    """A blob of a lent connection: a shell around the real one. ``sqlite3.Blob`` cannot be a base class."""

    __slots__ = ("__weakref__", "_lent", "_raw")
    __class__ = property(lambda self: sqlite3.Blob)  # for isinstance

    _lent: LentShell
    _raw: sqlite3.Blob

    def __init__(self) -> None:
        raise TypeError("a lent connection's blobs are made by its blobopen()")

    def __del__(self) -> None:
        try:
            self._lent._lending.drop(self._raw)
        except AttributeError:  # it was never opened
            pass

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise TypeError("cannot pickle a blob")

    def __enter__(self) -> Self:
        self._lent._loan.call(sqlite3.Blob.__enter__, self._raw)
        return self

    def close(self) -> None:
        """Close it. Allowed after the loan has ended, where there is nothing left to do."""
        loan = self._lent._loan
        if not loan.is_over:
            with contextlib.suppress(TransactionAbortedError):  # it would hide why SQLite has rolled back
                loan.call(sqlite3.Blob.close, self._raw)

    read = _of_blob("read")
    write = _of_blob("write")
    seek = _of_blob("seek")
    tell = _of_blob("tell")
    __exit__ = _of_blob("__exit__")
    __len__ = _of_blob("__len__")
    __getitem__ = _of_blob("__getitem__")
    __setitem__ = _of_blob("__setitem__")
    __delitem__ = _of_blob("__delitem__")
    __iter__ = None  # as of sqlite3.Blob: Python would call __getitem__ again and again
