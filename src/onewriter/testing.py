"""For tests of code that uses a gateway: the pytest fixture ``db_writer``.

Put ``pytest_plugins = ["onewriter.testing"]`` into ``conftest.py``. ``@pytest.mark.db_writer(inline=True, …)`` gives
arguments to its ``DbWriter``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from onewriter.gateway import DbWriter
from onewriter.tools.check import check

CLOSE_TIMEOUT = 10.0  # seconds


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "db_writer(**options): arguments for the DbWriter of the fixture db_writer")


@pytest.fixture
def db_writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DbWriter]:
    """A ``DbWriter`` on a new file, ``tmp_path / "test.db"``.

    At the end of the test it is closed, and the test fails if a job is still running then, or if the file is damaged
    or violates a foreign key. The test may close it itself.
    """
    mark = request.node.get_closest_marker("db_writer")
    if mark is not None and mark.args:
        raise TypeError(f"@pytest.mark.db_writer takes arguments by name only, as inline=True, not {mark.args!r}")
    db = DbWriter(tmp_path / "test.db", **({} if mark is None else mark.kwargs))
    yield db
    closed = db.close(CLOSE_TIMEOUT)
    assert closed.unfinished == 0, f"jobs still running at the end of the test: {', '.join(closed.labels)}"
    has_data = os.path.exists(db.path) and os.path.getsize(db.path) > 0  # nothing was ever written, say
    problems = check(db.path).problems if has_data else []
    assert not problems, "; ".join(problems)
