"""Which Python and SQLite: with the GIL's state where it is known."""

from __future__ import annotations

import platform
import sqlite3
import sys

import pytest

from onewriter.tools.versions import gil_enabled, versions


@pytest.mark.parametrize(("enabled", "told"), [(True, ", GIL enabled"), (False, ", GIL disabled")])
def test_the_gil_is_told_where_it_is_known(enabled: bool, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: enabled, raising=False)
    assert gil_enabled() is enabled
    assert versions() == f"Python {platform.python_version()}{told}, SQLite {sqlite3.sqlite_version}"


def test_before_python_3_13_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys, "_is_gil_enabled", raising=False)
    assert gil_enabled() is None
    assert versions() == f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
