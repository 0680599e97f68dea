"""Notes over HTTP: one gateway for the life of the application.

``uvicorn --app-dir docs/examples fastapi_app:app`` starts it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request

from onewriter import AsyncDbWriter


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open when a worker starts, close when it stops: what was accepted is committed before that."""
    async with AsyncDbWriter(os.environ.get("NOTES_DB", "notes.db")) as db:
        await db.run("CREATE TABLE IF NOT EXISTS note (id INTEGER PRIMARY KEY, text TEXT NOT NULL)")
        await db.run("CREATE TABLE IF NOT EXISTS visit (path TEXT NOT NULL)")
        app.state.db = db
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/notes")
async def add_note(request: Request) -> dict[str, Any]:
    """Committed before the response is sent."""
    db: AsyncDbWriter = request.app.state.db
    result = await db.run("INSERT INTO note (text) VALUES (?)", ((await request.json())["text"],))
    return {"id": result.lastrowid}


@app.get("/notes/{note}")
async def get_note(note: int, request: Request) -> dict[str, Any]:
    """A read, and a count that nobody waits for."""
    db: AsyncDbWriter = request.app.state.db
    db.enqueue("INSERT INTO visit VALUES (?)", (request.url.path,), label="visit")
    row = await db.read_one("SELECT id, text FROM note WHERE id = ?", (note,))
    if row is None:
        raise HTTPException(404)
    return {"id": row[0], "text": row[1]}
