"""The gunicorn example: a preloaded application whose workers open after the fork; and one whose parent has opened."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx

from helpers import free_port

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
DEADLINE = 30.0
TOO_EARLY = "import os, gunicorn_app\ngunicorn_app.open_database()\napp = gunicorn_app.app\n"


@contextlib.contextmanager
def served(path: Path, app: str, *folders: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--config", str(EXAMPLES / "gunicorn_conf.py"), "--threads", "4"]
    command += ["--pythonpath", ",".join(map(str, (EXAMPLES, *folders))), "--bind", f"127.0.0.1:{port}", app]
    environment = {**os.environ, "APP_DB": str(path), "PYTHONPATH": str(EXAMPLES)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()


def wait_for(address: str) -> None:
    end = time.monotonic() + DEADLINE
    while True:
        try:
            httpx.get(address, timeout=DEADLINE).raise_for_status()
            return
        except httpx.TransportError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_workers_that_open_after_the_fork_lose_nothing(path: Path) -> None:
    with served(path, "gunicorn_app:app") as (address, process):
        wait_for(address)

        def visit(_: int) -> None:
            # Each connects, so that any worker may answer; with nothing shared: a pool of httpx that keeps none closes
            # what another thread was just given.
            with urllib.request.urlopen(urllib.request.Request(address, method="POST"), timeout=DEADLINE) as answer:
                assert answer.status < 300

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(visit, range(300)))
        counts = httpx.get(address, timeout=DEADLINE).json()
        assert sum(counts.values()) == 300
        assert len(counts) > 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM visit").fetchone() == (300,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert os.listdir(path.parent) == [path.name]


def test_workers_of_a_parent_that_has_opened_are_told_what_to_do(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "module"
    folder.mkdir()
    (folder / "too_early.py").write_text(TOO_EARLY)
    with served(path, "too_early:app", folder) as (_, process):
        assert process.wait(DEADLINE) != 0
        assert process.stderr is not None
        output = process.stderr.read()
    assert "ForkedError" in output
    assert "close the gateway before the fork, and open one in the child after it" in output
