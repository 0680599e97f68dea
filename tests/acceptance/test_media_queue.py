"""The worked example under load, over real HTTP; and killed in the middle."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from helpers import DEADLINE, HEARS_INTERRUPTS, eventually, free_port

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "media_queue"
CHROMIUM = shutil.which("chromium")
SECONDS = float(os.environ.get("MEDIA_QUEUE_SECONDS", "2"))


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def drive() -> Any:
    return module("drive")


@contextlib.contextmanager
def served(path: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(EXAMPLE), "serve", "--db", str(path), "--port", str(port)]
    code = f"import runpy, sys; sys.argv = {command[1:]!r}; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    command = [sys.executable, "-c", HEARS_INTERRUPTS + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        if str(port) not in first:
            process.kill()
            assert process.stderr is not None
            raise AssertionError(first + process.stderr.read())
        try:
            yield process
        finally:
            process.kill()


def look_into(path: Path, accepted: list[str], known: list[str]) -> set[str]:
    """The deliveries that are written; what must be true in any case is checked."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        deliveries = {delivery for (delivery,) in connection.execute("SELECT delivery FROM webhook")}
        videos = dict(connection.execute("SELECT path, state FROM video"))
        # Each claim has a number of its own, so two workers that got the same video would have met here.
        claims = connection.execute("SELECT count(*), count(DISTINCT video || '-' || attempt) FROM claim").fetchone()
        done = connection.execute(
            "SELECT count(*) FROM video WHERE state = 'done' AND NOT EXISTS (SELECT 1 FROM claim WHERE video = id)"
        ).fetchone()
    assert set(known) <= deliveries
    assert all(f"/media/hook-{delivery}.mkv" in videos for delivery in deliveries)
    assert claims[0] == claims[1] > 0
    assert done == (0,)
    return deliveries & set(accepted)


def test_nothing_is_locked_or_lost_or_claimed_twice(path: Path, drive: Any) -> None:
    port = free_port()
    with served(path, port) as process:
        traffic = drive.Traffic(f"http://127.0.0.1:{port}", clients=8, dashboards=2)
        drive.ask(f"{traffic.address}/services/radarr", "PUT", "http://radarr.local")
        assert drive.ask(f"{traffic.address}/counts")["services"] == [["radarr", "http://radarr.local"]]
        assert drive.ask(f"{traffic.address}/services/radarr", "DELETE") == {"deleted": True}
        traffic.start()
        time.sleep(SECONDS)
        traffic.stop()
        page = drive.ask(f"{traffic.address}/")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (0, "")
    assert traffic.errors == []
    assert traffic.looks > 0
    assert re.search(r"<b>[\d,]+</b>webhooks", page)
    assert "finishing what was accepted" in output
    assert look_into(path, traffic.accepted, traffic.known) == set(traffic.accepted)
    assert len(traffic.accepted) > 50
    assert sorted(os.listdir(path.parent)) == [path.name]


def test_the_page_is_told_of_each_change_and_an_open_one_keeps_nothing_from_ending(path: Path, drive: Any) -> None:
    port = free_port()
    with served(path, port) as process, contextlib.ExitStack() as pages:
        address = f"http://127.0.0.1:{port}"
        assert "EventSource" in drive.ask(f"{address}/")
        idle = pages.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)))
        idle.request("GET", "/counts")
        idle.getresponse().read()  # kept alive
        events = pages.enter_context(urllib.request.urlopen(f"{address}/events", timeout=DEADLINE))
        seen = [events.readline().decode()]  # the state as it was, read before anything changes
        drive.ask(f"{address}/webhook", "POST", {"delivery": "one", "path": "/media/<b>.mkv", "wait": True})
        for line in events:
            seen.append(line.decode())
            if "<b>1</b>webhooks" in seen[-1]:
                break
        process.send_signal(signal.SIGINT)
        seen += [line.decode() for line in events]  # the last state, and the end
        _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (0, "")
    assert all(line == "\n" or line.startswith("data: ") for line in seen)
    assert "<b>0</b>webhooks" in seen[0]
    assert len(seen) > 2


class Browser:
    """A browser without a window, told what to do through a pipe: https://chromedevtools.github.io/devtools-protocol/"""

    def __init__(self, asked: BinaryIO, told: BinaryIO) -> None:
        self._asked, self._told = asked, told
        self._number, self._session, self._events = 0, dict[str, str](), list[Any]()
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._asked.write(json.dumps(message).encode() + b"\0")
        self._asked.flush()
        while (answer := self._next()).get("id") != self._number:
            self._events.append(answer.get("method"))
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> Any:
        message = b"".join(iter(lambda: self._told.read(1).rstrip(b"\0"), b""))
        assert message, "the browser has ended"
        return json.loads(message)

    def open(self, url: str, width: int) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.ask("Page.enable")
        self._events.clear()
        self.ask("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:  # or else what is asked next would be asked of the last page
            self._events.append(self._next().get("method"))

    def value(self, expression: str) -> Any:
        """Of a promise, its result."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until it is true of the page; it is asked after each change."""
        self.value(
            f"new Promise(done => {{ const look = () => {{ if ({condition}) done() }}; look();"
            "new MutationObserver(look).observe(document, {attributes: true, childList: true, subtree: true}) })"
        )


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    (of_commands, commands), (answers, of_answers) = os.pipe(), os.pipe()
    begin = f"import os, sys; os.dup2({of_commands}, 3); os.dup2({of_answers}, 4)"  # as it expects them
    code = f"{begin}; os.execv(sys.argv[1], sys.argv[1:])"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    command, pipes = [sys.executable, "-c", code, str(CHROMIUM), *options], (of_commands, of_answers)
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, pass_fds=pipes, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        os.close(of_commands)
        os.close(of_answers)
        hangs = threading.Timer(DEADLINE, process.kill)
        hangs.start()
        try:
            with open(commands, "wb") as asked, open(answers, "rb") as told:
                yield Browser(asked, told)
        finally:
            hangs.cancel()
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_an_open_page_shows_each_change_fits_its_window_and_keeps_nothing_from_ending(
    path: Path, tmp_path_factory: pytest.TempPathFactory, drive: Any
) -> None:
    port = free_port()
    with served(path, port) as process, browser(tmp_path_factory.mktemp("browser")) as page:
        address = f"http://127.0.0.1:{port}"
        for number, width in enumerate((1280, 390), 1):
            page.open(f"{address}/", width)
            page.wait_for("window.now && events.readyState === 1")
            drive.ask(
                f"{address}/webhook", "POST", {"delivery": f"d{number}", "path": f"/media/{number}.mkv", "wait": True}
            )
            page.wait_for(f"now.innerHTML.includes('<b>{number}</b>webhooks')")
            assert page.value("document.documentElement.scrollWidth") <= width
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE)
        page.wait_for("now.className === 'late'")
    assert (process.returncode, errors) == (0, "")


def test_it_ends_at_ctrl_c_whoever_is_connected(path: Path, drive: Any) -> None:
    port = free_port()
    with served(path, port) as process, contextlib.ExitStack() as clients:

        def sent(request: bytes) -> None:
            client = clients.enter_context(socket.socket())
            client.connect(("127.0.0.1", port))
            client.sendall(request)

        sent(b"")  # says nothing
        sent(b"POST /webhook HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")  # nor the rest
        sent(b"GET /events HTTP/1.1\r\n\r\n")
        sent(b"GET / HTTP/1.1\r\n\r\n" * 100)  # reads nothing of it
        drive.ask(f"http://127.0.0.1:{port}/counts")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (0, "")
    assert sorted(os.listdir(path.parent)) == [path.name]


@pytest.mark.parametrize(("answer", "patience"), [(b"", 3600.0), (bytes(10**8), 0.0)], ids=["idle", "unread"])
def test_the_server_waits_for_no_request_and_not_for_ever_for_an_answer_to_be_read(
    answer: bytes, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    server, asked = module("server"), threading.Event()
    monkeypatch.setattr(server, "PATIENCE", patience)

    def do_get(handler: Any) -> None:
        asked.set()
        handler.wfile.write(answer)

    http = server.Server(("127.0.0.1", 0), type("Handler", (server.Handler,), {"do_GET": do_get}))
    http.store = None
    serving = threading.Thread(target=http.serve_forever)
    closing = threading.Thread(target=http.server_close, daemon=True)
    serving.start()
    with socket.create_connection(http.server_address) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert asked.wait(DEADLINE)
        http.shutdown()
        http.hang_up()
        closing.start()
        closing.join(DEADLINE)
        assert not closing.is_alive()
    serving.join()


def has_two(deliveries: list[str]) -> bool:
    return len(deliveries) > 1


def test_a_second_drive_sends_new_deliveries(path: Path, drive: Any) -> None:
    port = free_port()
    with served(path, port):
        runs = [drive.Traffic(f"http://127.0.0.1:{port}", clients=2) for _ in range(2)]
        for traffic in runs:
            traffic.start()
            eventually(partial(has_two, traffic.known))
            traffic.stop()
        sent = [delivery for traffic in runs for delivery in (*traffic.accepted, *traffic.known)]
        drive.ask(f"{traffic.address}/webhook", "POST", {"delivery": "last", "path": "/media/last.mkv", "wait": True})
        assert drive.ask(f"{traffic.address}/counts")["webhooks"] == len(set(sent)) + 1 == len(sent) + 1


def test_help_says_what_each_option_is_and_its_default() -> None:
    for command, told in (("serve", "port to listen on; 0: any free one (default: 8000)"), ("drive", "(default: 8)")):
        asked = [sys.executable, str(EXAMPLE), command, "--help"]
        wide = {**os.environ, "COLUMNS": "200"}
        assert told in subprocess.run(asked, env=wide, capture_output=True, text=True, timeout=DEADLINE).stdout


def test_a_port_that_is_taken_is_said_in_a_line(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, str(EXAMPLE), "serve", "--db", str(path), "--port", str(taken.getsockname()[1])]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert ended.returncode == 1
    assert "give another --port" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not path.exists()


def test_a_kill_in_the_middle_loses_only_what_was_accepted_and_not_yet_written(path: Path, drive: Any) -> None:
    port = free_port()
    traffic = drive.Traffic(f"http://127.0.0.1:{port}", clients=8, dashboards=2)
    with served(path, port) as process:
        traffic.start()
        time.sleep(SECONDS / 2)
        process.kill()
        process.wait(DEADLINE)
    before = len(traffic.accepted)
    with served(path, port) as process:
        time.sleep(SECONDS / 2)
        traffic.stop()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (0, "")
    written = look_into(path, traffic.accepted, traffic.known)
    lost = set(traffic.accepted) - written
    assert lost <= set(traffic.accepted[max(0, before - 200) : before + 8])
    assert len(traffic.accepted) > before  # it went on
    with contextlib.closing(sqlite3.connect(path)) as connection:
        half = connection.execute("SELECT count(*) FROM video WHERE state IN ('claimed', 'encoding')").fetchone()
    assert half == (0,)  # the workers finished what they had claimed, and the restart put back the rest


def test_the_store_by_itself(tmp_path: Path) -> None:
    logging.getLogger("onewriter").info("the store without a server")
    store_module = module("store")
    store = store_module.Store(str(tmp_path / "media.db"))
    store.scanned([("/a", 1), ("/b", 2)])
    store.scanned([("/a", 3)])
    store.webhook("d1", "/c", 4).result(DEADLINE)
    store.webhook("d1", "/c", 4).result(DEADLINE)
    assert store.counts()["states"]["found"] == 3
    for attempt in range(store_module.MOST_ATTEMPTS):
        video, name = store.claim("w")
        assert name == "/a"
        store.begin(video, "w")
        with pytest.raises(store_module.WrongStateError):
            store.begin(video, "w")
        store.fail(video, "w", f"reason {attempt}")
    assert store.counts()["states"]["failed"] == 1
    assert store.counts()["errors"] == store_module.MOST_ATTEMPTS
    video, _ = store.claim("w")
    store.begin(video, "w")
    store.finish(video, "w", 7)
    assert store.counts()["saved"] == 7
    assert store.claim("w") is not None
    assert store.claim("w") is None
    store.close()
    again = store_module.Store(str(tmp_path / "media.db"))
    assert again.recovered == 1
    again.close()
