"""The FastAPI example, served by uvicorn, with a real client."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import httpx

from helpers import free_port

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
DEADLINE = 30.0


async def use(address: str) -> list[int]:
    async with httpx.AsyncClient(base_url=address, timeout=DEADLINE) as client:
        async with asyncio.timeout(DEADLINE):
            while True:
                try:
                    assert (await client.get("/notes/1")).status_code == 404
                    break
                except httpx.ConnectError:  # it is starting
                    await asyncio.sleep(0.05)
        answers = await asyncio.gather(*[client.post("/notes", json={"text": f"note {n}"}) for n in range(64)])
        ids = [answer.raise_for_status().json()["id"] for answer in answers]
        reads = await asyncio.gather(*[client.get(f"/notes/{note}") for note in ids])
        assert [read.json()["text"] for read in reads] == [f"note {n}" for n in range(64)]
        return ids


def test_64_posts_at_once_are_all_written(path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "fastapi_app:app", "--port", str(port), "--log-level", "warning"]
    environment = os.environ | {"NOTES_DB": str(path)}
    with subprocess.Popen(command, cwd=EXAMPLES, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            ids = asyncio.run(use(f"http://127.0.0.1:{port}"))
        finally:
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=DEADLINE)
    assert "Error" not in errors
    assert sorted(ids) == list(range(1, 65))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM note").fetchone() == (64,)
        assert connection.execute("SELECT count(*) FROM visit").fetchone() == (65,)
    assert os.listdir(path.parent) == [path.name]
