"""AsyncTransaction: what a task's ``transaction()`` block gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from onewriter.base.arguments import check_sql
from onewriter.base.strict import Strict
from onewriter.sqlite.parameters import Params, capture, capture_many
from onewriter.sqlite.result import Result
from onewriter.sqlite.statement import check_many
from onewriter.tasks.block import TaskBlock
from onewriter.tasks.coroutine_functions import mark_coroutine_functions
from onewriter.tasks.savepoint import SavepointEntry
from onewriter.write.loan import WriteLoan


@mark_coroutine_functions
class AsyncTransaction(Strict):
    """What ``async with db.transaction()`` returns: a ``Transaction`` whose statements run on the writer thread.

    Calls of several tasks run one at a time.
    """

    def __init__(self, block: TaskBlock, transaction: WriteLoan) -> None:
        self._block = block
        self._transaction = transaction

    @property
    def label(self) -> str:
        """The block's label."""
        return self._transaction.label

    def execute(self, sql: str, params: Params = (), /) -> Coroutine[Any, Any, Result]:
        """As ``Transaction.execute``."""
        return self._block.call(self._transaction.statement, check_sql(sql), capture(sql, params))

    def executemany(self, sql: str, seq_of_params: Iterable[Params], /) -> Coroutine[Any, Any, Result]:
        """As ``Transaction.executemany``."""
        sql = check_sql(sql)
        check_many(sql)
        return self._block.call(self._transaction.statement_many, sql, capture_many(sql, seq_of_params))

    def executescript(self, sql: str, /) -> Coroutine[Any, Any, None]:
        """As ``Transaction.executescript``."""
        return self._block.call(self._transaction.whole_script, check_sql(sql))

    def savepoint(self) -> contextlib.AbstractAsyncContextManager[None]:
        """An ``async with`` block that is a part of the transaction; if it raises, only this part is undone.

        Of tasks that share the transaction, one at a time can be in a savepoint; a task that was created inside a
        savepoint is part of it.
        """
        return SavepointEntry(self._block, self._transaction)

    def rollback(self) -> Coroutine[Any, Any, None]:
        """As ``Transaction.rollback``."""
        return self._block.call(self._transaction.undo)

    def on_commit(self, fn: Callable[[], object], /) -> None:
        """Call ``fn()`` once, on the event loop, after COMMIT; not if the transaction is rolled back."""
        self._block.keep(self._transaction, True, fn)

    def on_rollback(self, fn: Callable[[], object], /) -> None:
        """Call ``fn()`` once, on the event loop, after the transaction, if this part of it was rolled back."""
        self._block.keep(self._transaction, False, fn)
