"""The live FastAPI example: events from uvicorn, and a WebSocket."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers import free_port, state_of

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
DEADLINE = 30.0


async def use(address: str) -> None:
    async with httpx.AsyncClient(base_url=address, timeout=DEADLINE) as client, asyncio.timeout(DEADLINE):
        while True:
            try:
                assert "EventSource" in (await client.get("/")).text
                break
            except httpx.ConnectError:  # it is starting
                await asyncio.sleep(0.05)
        async with client.stream("GET", "/notes/events") as events:
            lines = events.aiter_lines()
            assert await data(lines) == []
            for number in range(1, 4):
                await client.post("/notes", json={"text": f"note {number}"})
                assert await data(lines) == [[n, f"note {n}"] for n in range(number, 0, -1)]


async def data(lines: Any) -> Any:
    async for line in lines:
        if line:
            return json.loads(line.removeprefix("data: "))


async def open_page(address: str, process: subprocess.Popen[str]) -> None:
    """Leave it open while the server ends."""
    async with httpx.AsyncClient(base_url=address, timeout=DEADLINE) as client:
        try:
            async with client.stream("GET", "/notes/events") as events:
                lines = events.aiter_lines()
                assert len(await data(lines)) == 3
                process.send_signal(signal.SIGTERM)
                async for _ in lines:
                    pass
        except httpx.RemoteProtocolError:  # the stream was cut off
            pass


def test_a_page_gets_each_change_and_an_open_one_keeps_nothing_from_ending(path: Path) -> None:
    port = free_port()
    options = ["--port", str(port), "--log-level", "critical", "--timeout-graceful-shutdown", "1"]
    command = [sys.executable, "-m", "uvicorn", "fastapi_live:app", *options]
    environment = os.environ | {"NOTES_DB": str(path)}
    with subprocess.Popen(command, cwd=EXAMPLES, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            asyncio.run(use(f"http://127.0.0.1:{port}"))
            asyncio.run(open_page(f"http://127.0.0.1:{port}", server))
        finally:
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=DEADLINE)
    assert "Traceback" not in errors
    assert os.listdir(path.parent) == [path.name]


def test_a_socket_gets_each_change_and_its_watch_ends_with_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTES_DB", str(path))
    monkeypatch.syspath_prepend(EXAMPLES)
    app = importlib.import_module("fastapi_live").app
    scope = {"type": "websocket", "path": "/notes/socket", "query_string": b"", "headers": [], "subprotocols": []}

    async def main() -> None:
        sent: asyncio.Queue[Any] = asyncio.Queue()
        received: asyncio.Queue[Any] = asyncio.Queue()
        async with asyncio.timeout(DEADLINE), app.router.lifespan_context(app):
            serving = asyncio.create_task(app(scope, sent.get, received.put))
            await sent.put({"type": "websocket.connect"})
            assert (await received.get())["type"] == "websocket.accept"
            assert json.loads((await received.get())["text"]) == []
            await app.state.db.run("INSERT INTO note (text) VALUES ('one')")
            assert json.loads((await received.get())["text"]) == [[1, "one"]]
            await sent.put({"type": "websocket.disconnect", "code": 1001})
            await serving
            assert state_of(app.state.db).live is None

    asyncio.run(main())
