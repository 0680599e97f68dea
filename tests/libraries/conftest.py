"""Libraries that are not part of the default test run: installed with ``.[libraries]``."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

# Not skipped but not collected: whoever runs the default command has not asked for them.
NEEDED = (
    *("fastapi", "gevent", "gunicorn", "httpx", "opentelemetry", "pandas"),
    *("pytest_asyncio", "sqlalchemy", "sqlite_utils", "uvicorn", "uvloop"),
)
collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["test_*.py"]
if not (os.environ.get("LITESTREAM") or shutil.which("litestream")):
    collect_ignore = ["test_litestream.py"]
