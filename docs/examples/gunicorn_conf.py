"""Settings of gunicorn for gunicorn_app.py."""

import gunicorn_app

preload_app = True
workers = 3


def post_fork(server, worker):
    gunicorn_app.open_database()


def worker_exit(server, worker):
    gunicorn_app.close_database()
