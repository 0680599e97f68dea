"""Which Python and which SQLite do the work: figures and findings depend on them."""

from __future__ import annotations

import platform
import sqlite3
import sys
from collections.abc import Callable


def gil_enabled() -> bool | None:
    """None before Python 3.13, which cannot be without it."""
    ask: Callable[[], bool] | None = getattr(sys, "_is_gil_enabled", None)
    return None if ask is None else ask()


def versions() -> str:
    """Of Python and SQLite, for people."""
    gil = {None: "", True: ", GIL enabled", False: ", GIL disabled"}[gil_enabled()]
    return f"Python {platform.python_version()}{gil}, SQLite {sqlite3.sqlite_version}"
