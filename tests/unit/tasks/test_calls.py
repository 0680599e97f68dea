"""How tasks wait: each loop has time limits of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import pytest

from aio_helpers import run
from helpers import DEADLINE, handling, parked
from onewriter import AsyncDbWriter, DbWriter, WriteTimeoutError
from onewriter.tasks import calls


def test_each_loop_has_its_own_timeouts(path: Path) -> None:
    with DbWriter(path) as inner:
        shared = AsyncDbWriter.wrap(inner)

        async def leave() -> None:
            await shared.run("SELECT 1")  # the loop ends before the look at its timeouts

        async def wait() -> None:
            with parked(inner), pytest.raises(WriteTimeoutError):
                await shared.run("SELECT 1", timeout=1.0)

        run(leave)
        run(wait)


def test_flush_waits_until_what_the_writer_reports_is_logged(path: Path) -> None:
    logged, free = [], threading.Event()

    def emit(record: logging.LogRecord) -> None:
        free.wait(DEADLINE)
        logged.append(record.getMessage())

    async def main() -> None:
        with handling(emit), DbWriter(path) as inner:
            shared = AsyncDbWriter.wrap(inner)
            shared.enqueue("INSERT INTO missing VALUES (1)")
            asyncio.get_running_loop().call_later(0.1, free.set)
            await shared.flush()
            assert len(logged) == 1

    run(main)


def test_a_short_timeout_does_not_wait_for_the_tick_of_the_long_ones(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "TICK", 10 * DEADLINE)

    async def main() -> None:
        with DbWriter(path) as inner, parked(inner):
            async with asyncio.timeout(DEADLINE):
                with pytest.raises(WriteTimeoutError):
                    await AsyncDbWriter.wrap(inner).run("SELECT 1", timeout=0.05)

    run(main)
