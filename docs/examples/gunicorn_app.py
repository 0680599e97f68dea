"""A WSGI application on gunicorn, preloaded: each worker opens its own gateway, after the fork.

    PYTHONPATH=docs/examples gunicorn --config docs/examples/gunicorn_conf.py gunicorn_app:app

POST counts a visit, GET returns the number of visits of each worker. The database is ``$APP_DB``, or ``app.db``.
"""

from __future__ import annotations

import json
import os

from onewriter import DbWriter

db: DbWriter | None = None


def open_database() -> None:
    """Called in each worker, and never in the parent: a gateway does not survive a fork."""
    global db
    db = DbWriter(os.environ.get("APP_DB", "app.db"))
    db.run("CREATE TABLE IF NOT EXISTS visit (worker INTEGER NOT NULL)")


def close_database() -> None:
    if db is not None:
        db.close()


def app(environ, start_response):
    if environ["REQUEST_METHOD"] == "POST":
        db.run("INSERT INTO visit VALUES (?)", (os.getpid(),))
    visits = db.read("SELECT worker, count(*) FROM visit GROUP BY worker")
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(dict(visits)).encode()]
