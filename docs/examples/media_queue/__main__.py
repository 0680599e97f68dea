"""``python docs/examples/media_queue serve`` and, in another terminal, ``python docs/examples/media_queue drive``."""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from drive import Traffic, ask
from server import Service


def serve(arguments: argparse.Namespace) -> None:
    try:
        service = Service(arguments.db, arguments.port, arguments.workers)
    except OSError as error:
        raise SystemExit(f"cannot listen on port {arguments.port} ({error}): give another --port") from None
    except sqlite3.Error as error:
        raise SystemExit(f"{error}: give another --db") from None
    try:
        service.start()
        print(
            f"{service.address}/ ({arguments.db}; {service.store.recovered} videos put back); Ctrl-C ends", flush=True
        )
        while True:
            time.sleep(1)
            counts, stats = service.store.counts(), service.store.db.stats()
            states = ", ".join(f"{number} {state}" for state, number in counts["states"].items())
            print(f"{counts['webhooks']} webhooks; {states}; {stats.jobs_per_commit:.1f} writes a commit", flush=True)
    except KeyboardInterrupt:
        print("finishing what was accepted")
    finally:
        service.stop()


def drive(arguments: argparse.Namespace) -> None:
    traffic = Traffic(arguments.url, arguments.clients, dashboards=2)
    try:
        ask(f"{arguments.url}/services/sonarr", "PUT", "http://sonarr.local")
    except OSError as error:
        raise SystemExit(f"nobody answers at {arguments.url} ({error}): start `serve` first, or give --url") from None
    traffic.start()
    try:
        while True:
            time.sleep(1)
            sent = len(traffic.accepted) + len(traffic.known)
            print(f"{sent} webhooks sent, {traffic.looks} looks, {len(traffic.errors)} errors", flush=True)
    except KeyboardInterrupt:
        traffic.stop()


def main() -> None:
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python docs/examples/media_queue", description="A re-encoding queue on one SQLite file."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serving = commands.add_parser(
        "serve",
        help="run the service, its scanner and its workers",
        description="Serve webhooks, settings and a live page on 127.0.0.1, and process the queue, until Ctrl-C.",
        formatter_class=defaults,
    )
    serving.add_argument("--db", default="media.db", metavar="FILE", help="the database; created if it does not exist")
    serving.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free one")
    serving.add_argument("--workers", type=int, default=4, metavar="N", help="threads that encode")
    serving.set_defaults(run=serve)
    driving = commands.add_parser(
        "drive",
        help="send simulated traffic to it",
        description="Send webhooks to a running service, and read its page, until Ctrl-C.",
        formatter_class=defaults,
    )
    driving.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the service")
    driving.add_argument("--clients", type=int, default=8, metavar="N", help="threads that send webhooks")
    driving.set_defaults(run=drive)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
