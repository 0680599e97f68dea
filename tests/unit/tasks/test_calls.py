"""How tasks wait: each loop has time limits of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aio_helpers import run
from helpers import DEADLINE, parked
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
