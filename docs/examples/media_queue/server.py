"""The service: webhooks, settings and a dashboard over HTTP; a scanner and workers in threads of the same process."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import threading
import time
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from store import Store

from onewriter import OneWriterError, ReadTimeoutError, Watch, WriterClosedError

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>media queue</title><style>
body {{ font: 16px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 40rem; padding: 0 1rem; color: #222 }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(6.5rem, 1fr)); gap: .5rem }}
.tile {{ background: #eef3f8; border-radius: .5rem; padding: .6rem; text-align: center }}
.tile b {{ display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed }}
td, th {{ text-align: left; padding: .25rem .4rem .25rem 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere }}
th:nth-child(n+2) {{ width: 5.2rem }}
small {{ color: #666 }}
.late {{ opacity: .4 }}
</style></head><body><h1>media queue</h1><main id="now">{now}</main><script>
const now = document.getElementById("now"), events = new EventSource("/events");
events.onmessage = event => {{ now.innerHTML = event.data; now.className = ""; }};
events.onerror = () => {{ now.className = "late"; }};  // the browser tries again by itself
</script></body></html>
"""
NOW = (
    '<div class="tiles">{tiles}</div><h2>Latest</h2><table><tr><th>video</th><th>state</th><th>worker</th></tr>{rows}'
    "</table><p><small>{jobs:,} writes in {commits:,} commits, {depth} waiting; writer: {health}</small></p>"
)
PATIENCE = 0.5  # seconds for clients to read their last answers
HEARTBEAT = 15.0  # seconds without news after which a page that is not there any more is found out


class Server(ThreadingHTTPServer):
    """Knows its open connections, most of which wait for another request.

    Each is entered before its thread starts, so ``hang_up``, once ``serve_forever`` has ended, misses none.
    """

    store: Store
    daemon_threads = False  # their last answers are given before it ends

    def __init__(self, *args: Any) -> None:
        self._connections: set[Any] = set()
        self._ended = threading.Condition()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._ended:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._ended:
            self._connections.discard(request)
            self._ended.notify_all()

    def hang_up(self, direction: int = socket.SHUT_RD) -> None:
        """No further request comes on them."""
        with self._ended:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the other side was first
                    connection.shutdown(direction)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that is gone is no error
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Once the last answers are read, or have not been for too long."""
        with self._ended:
            self._ended.wait_for(lambda: not self._connections, PATIENCE)
        self.hang_up(socket.SHUT_RDWR)
        super().server_close()


class Handler(BaseHTTPRequestHandler):
    """One thread for each connection; all of them write through the one store."""

    server: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.store = self.server.store

    def _dispatch(self) -> None:
        try:
            getattr(self, f"_{self.command.lower()}")()
        except (OneWriterError, TimeoutError) as error:  # full or closing: the sender tries again
            self._answer(503, {"error": str(error)})

    do_GET = do_POST = do_PUT = do_DELETE = _dispatch

    def _get(self) -> None:
        if self.path == "/counts":
            self._answer(200, self.store.counts())
        elif self.path == "/":
            page = PAGE.format(now=self._now(self.store.counts()))
            self._answer(200, page, "text/html; charset=utf-8")
        elif self.path == "/events":
            self._follow()
        else:
            self._answer(404, {"error": "not found"})

    def _follow(self) -> None:
        """Server-sent events: the page as it is, and again whenever a commit has changed it, until one side ends."""
        with self.store.watch() as live:
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            with contextlib.suppress(ConnectionError, OneWriterError):  # the page is gone, or the store is closed
                while True:
                    self.wfile.write(self._event(live).encode())

    def _event(self, live: Watch[dict[str, Any]]) -> str:
        try:
            return f"data: {self._now(live.next(HEARTBEAT))}\n\n"
        except ReadTimeoutError:
            return ": nothing new\n\n"

    def _post(self) -> None:
        body = self._body()
        if self.path != "/webhook" or not isinstance(body, dict):
            self._answer(404, {"error": "not found"})
            return
        try:
            ticket = self.store.webhook(str(body["delivery"]), str(body["path"]), int(body.get("bytes", 0)))
            if body.get("wait"):  # a sender that has to know
                ticket.result(10)
        except (KeyError, ValueError) as error:
            self._answer(400, {"error": repr(error)})
        else:
            self._answer(200 if body.get("wait") else 202, {"accepted": True})

    def _put(self) -> None:
        name, address = self.path.removeprefix("/services/"), self._body()
        if not isinstance(address, str):
            self._answer(400, {"error": "the body must be the address, a JSON string"})
            return
        self.store.set_service(name, address)
        self._answer(200, {"name": name})

    def _delete(self) -> None:
        found = self.store.delete_service(self.path.removeprefix("/services/"))
        self._answer(200 if found else 404, {"deleted": found})

    def _now(self, counts: dict[str, Any]) -> str:
        """One line of HTML."""
        stats = self.store.db.stats()
        figures = {**counts["states"], "webhooks": counts["webhooks"], "errors": counts["errors"]}
        tiles = "".join(f'<div class="tile"><b>{value:,}</b>{name}</div>' for name, value in figures.items())
        rows = "".join(
            f"<tr><td>{escape(path)}</td><td>{state}</td><td>{escape(worker or '')}</td></tr>"
            for path, state, worker, _ in counts["latest"]
        )
        health = escape(self.store.db.health)
        return NOW.format(
            tiles=tiles, rows=rows, jobs=stats.committed, commits=stats.commits, depth=stats.queue_depth, health=health
        )

    def _body(self) -> Any:
        try:
            return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
        except ValueError:
            return None

    def _answer(self, status: int, body: Any, kind: str = "application/json") -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Service:
    """The HTTP server, the scanner and the workers, until ``stop``."""

    def __init__(self, path: str, port: int, workers: int, scans: bool = True) -> None:
        self.http = Server(("127.0.0.1", port), Handler)
        self.store = self.http.store = Store(path)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self.http.serve_forever, args=[0.1], name="http")]
        if scans:
            self._threads.append(threading.Thread(target=self._scan, name="scanner"))
        for number in range(workers):
            self._threads.append(threading.Thread(target=self._work, args=[f"worker-{number}"]))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        self.http.shutdown()
        for thread in self._threads:
            thread.join()
        self.http.hang_up()
        self.store.close()  # which ends the pages, each with the last state
        self.http.server_close()

    def _scan(self) -> None:
        """Made-up folders that grow."""
        chance, count = random.Random(1), 0
        while not self._stop.wait(0.5):
            count += 20
            self.store.scanned((f"/media/scan-{n}.mkv", chance.randrange(10**9)) for n in range(count))

    def _work(self, name: str) -> None:
        chance = random.Random(name)
        while not self._stop.is_set():
            try:
                claimed = self.store.claim(name)
            except WriterClosedError:
                return
            if claimed is None:
                self._stop.wait(0.05)
                continue
            video, _ = claimed
            self.store.begin(video, name)
            time.sleep(chance.random() * 0.02)  # made-up encoding
            if chance.random() < 0.1:
                self.store.fail(video, name, "the encoder gave up")
            else:
                self.store.finish(video, name, saved=chance.randrange(10**6))
