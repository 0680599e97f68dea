"""TaskEntry: what ``db.transaction()`` of an AsyncDbWriter gives, by which a task enters and leaves a block."""

from __future__ import annotations

import asyncio
import types
import weakref
from typing import Any

from onewriter.base.scopes import Scope
from onewriter.base.task_waits import within
from onewriter.errors import OneWriterError
from onewriter.events import Submit
from onewriter.tasks.block import TaskBlock, TaskSavepoint
from onewriter.tasks.collected import leave_if_collected
from onewriter.tasks.savepoint import SavepointEntry
from onewriter.tasks.transaction import AsyncTransaction
from onewriter.write.block import BlockFailedError, not_entered
from onewriter.write.loan import WriteLoan


class TaskEntry:
    """Inside another block it is a savepoint of that.

    A class, where contextlib would make it of a generator: when a loop ends, asyncio closes all asynchronous generators
    at the same time, so that a user's own, which leaves its block as it is closed, would find the block's running.

    States:  new → open → left.
    Threads: entered by one task, left by any of its loop.
    """

    _is_new = True
    _scope: Scope[Any] | None = None  # as long as it is open
    _part: SavepointEntry | None = None

    def __init__(self, block: TaskBlock, timeout: float | None, submit: Submit) -> None:
        self._block = block
        self._timeout = timeout
        self._submit = submit

    async def __aenter__(self) -> AsyncTransaction:
        block, state = self._block, self._block._state
        if not self._is_new:
            raise RuntimeError("a block is entered once: call transaction() again for another one")
        self._is_new = False
        here = state.scopes.innermost(writes=True)
        if isinstance(here, TaskBlock | TaskSavepoint):
            outer = here.lends()
            inner = outer.nested(block)
            self._part = SavepointEntry(here.block, outer, inner)
            await self._part.__aenter__()
            return AsyncTransaction(here.block, inner)
        state.refuse_endless_wait("transaction()", awaits=True)
        granted = block.come()
        try:
            loan = await self._wait_for(granted)
            self._scope = state.scopes.enter(block, writes=True)
            self._collected = leave_if_collected(self, _leave, block, True)
            block.entry = weakref.ref(self)
            return AsyncTransaction(block, loan)
        except BaseException as error:
            if not isinstance(error, OneWriterError):  # Ctrl-C, say: nobody leaves it
                block.abandon()
            if isinstance(error, asyncio.CancelledError):
                await block.ended()  # the writer is free again
            if self._scope is not None:
                state.scopes.leave(self._scope)
            state.forget_block(block)
            raise

    async def _wait_for(self, granted: asyncio.Future[None]) -> WriteLoan:
        block, state = self._block, self._block._state
        self._submit(block, None)
        with within(granted, self._timeout):
            await granted
        if block.transaction is None and not block.done():
            if block.cancel():
                raise not_entered(block, self._timeout, state)
            block.give_back(failed=True)  # it has started in the same moment, unless it was refused
            cancelled = await block.ended()
            if cancelled is not None:
                raise cancelled
            if isinstance(block.failed_with, BlockFailedError):
                raise not_entered(block, self._timeout, state)
        return block.entered()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        if self._part is not None:
            await self._part.__aexit__(kind, error, traceback)
            return
        block, scope, self._scope = self._block, self._scope, None
        if scope is None:
            raise RuntimeError("a block that was not entered cannot be left: use `async with`")
        try:
            block._state.scopes.leave(scope)
            if self._collected.detach() is None:  # it was left by that
                return
            cancelled = await _leave(block, kind is not None)
        except BaseException:  # Ctrl-C, perhaps before it was given back
            block.abandon()
            raise
        if kind is not None:
            if cancelled is not None:
                raise cancelled from error
            return
        if cancelled is not None:
            if block.failed:
                raise cancelled
            outcome = "was committed" if block.failed_with is None else f"ended with {block.failed_with!r}"
            cancelled.add_note(f"onewriter: the transaction of {block.describe()} {outcome}")
            raise cancelled
        block.outcome()


async def _leave(block: TaskBlock, failed: bool) -> asyncio.CancelledError | None:
    try:
        block.give_back(failed)
        cancelled = await block.ended()
        try:
            block.call_back()
        except BaseException:  # Ctrl-C, perhaps as that began
            block.call_back()
            raise
        return cancelled
    finally:
        block._state.forget_block(block)
