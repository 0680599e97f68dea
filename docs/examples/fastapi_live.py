"""A page that shows notes as they are written, by any process: server-sent events, and a WebSocket.

``uvicorn --app-dir docs/examples --timeout-graceful-shutdown 1 fastapi_live:app`` starts it. Without that option
it does not stop while a page is open.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse, StreamingResponse

from onewriter import AsyncDbWriter, AsyncWatch

LATEST = "SELECT id, text FROM note ORDER BY id DESC LIMIT 10"
PAGE = """<!doctype html><meta charset="utf-8"><title>notes</title><ul id="notes"></ul><script>
new EventSource("/notes/events").onmessage = event => {
    const items = JSON.parse(event.data).map(([id, text]) =>
        Object.assign(document.createElement("li"), {textContent: text}));
    document.getElementById("notes").replaceChildren(...items);
};
</script>"""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncDbWriter(os.environ.get("NOTES_DB", "notes.db")) as db:
        await db.run("CREATE TABLE IF NOT EXISTS note (id INTEGER PRIMARY KEY, text TEXT NOT NULL)")
        app.state.db = db
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


@app.post("/notes")
async def add_note(request: Request) -> dict[str, Any]:
    db: AsyncDbWriter = request.app.state.db
    result = await db.run("INSERT INTO note (text) VALUES (?)", ((await request.json())["text"],))
    return {"id": result.lastrowid}


@app.get("/notes/events")
async def notes_events(request: Request) -> StreamingResponse:
    """Until the page is closed: then the task is cancelled, which ends the watch."""
    headers = {"Cache-Control": "no-store"}
    return StreamingResponse(events(request.app.state.db), media_type="text/event-stream", headers=headers)


async def events(db: AsyncDbWriter) -> AsyncIterator[str]:
    async with db.watch(LATEST) as live:
        async for rows in live:
            yield f"data: {json.dumps(rows)}\n\n"


@app.websocket("/notes/socket")
async def notes_socket(socket: WebSocket) -> None:
    db: AsyncDbWriter = socket.app.state.db
    await socket.accept()
    async with db.watch(LATEST) as live:
        listening = asyncio.create_task(close_when_gone(socket, live))
        try:
            async for rows in live:
                await socket.send_json(rows)
        finally:
            listening.cancel()


async def close_when_gone(socket: WebSocket, live: AsyncWatch[Any]) -> None:
    """Nothing is sent while nothing changes, so only this finds out that the other side is gone."""
    with suppress(WebSocketDisconnect):
        while True:
            await socket.receive_text()
    live.close()
