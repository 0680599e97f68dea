"""Simulated traffic: clients that send webhooks, and a reader of the dashboard."""

from __future__ import annotations

import http.client
import json
import secrets
import threading
import time
import urllib.request
from typing import Any

NO_NEWS = 1.0  # seconds after which a dashboard asks again, and checks whether it must stop
FAILURES = (OSError, http.client.HTTPException)  # while the service is being restarted


def ask(address: str, method: str = "GET", body: Any = None) -> Any:
    request = urllib.request.Request(address, method=method, data=None if body is None else json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as response:
        data = response.read()
        return json.loads(data) if response.headers["Content-Type"] == "application/json" else data.decode()


class Traffic:
    """``accepted`` has the deliveries that the service has answered with 202; ``known``: those it said are written."""

    def __init__(self, address: str, clients: int, dashboards: int = 0) -> None:
        self.address = address
        self.accepted: list[str] = []
        self.known: list[str] = []
        self.errors: list[str] = []
        self.looks = 0
        self._run = secrets.token_hex(4)  # deliveries are new ones each time
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=[number]) for number in range(clients)]
        self._threads += [threading.Thread(target=self._look) for _ in range(dashboards)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send(self, client: int) -> None:
        n = 0
        while not self._stop.is_set():
            n += 1
            delivery = f"{self._run}-{client}-{n}"
            body = {"delivery": delivery, "path": f"/media/hook-{delivery}.mkv", "bytes": n, "wait": n % 10 == 0}
            try:
                ask(f"{self.address}/webhook", "POST", body)
            except FAILURES as error:
                self.errors.append(repr(error))
                time.sleep(0.05)
                continue
            (self.known if body["wait"] else self.accepted).append(delivery)

    def _look(self) -> None:
        while not self._stop.is_set():
            try:
                ask(f"{self.address}/")
                with urllib.request.urlopen(f"{self.address}/events", timeout=NO_NEWS) as events:
                    for line in events:
                        self.looks += line.startswith(b"data: ")
                        if self._stop.is_set():
                            break
            except FAILURES as error:
                if not isinstance(getattr(error, "reason", error), TimeoutError):  # which is no news, or a busy service
                    self.errors.append(repr(error))
                    time.sleep(0.05)
