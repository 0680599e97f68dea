"""Lines keep to a terminal's width, and obey nobody's control characters."""

from __future__ import annotations

import sys

import pytest

from onewriter.tools.terminal import printable, wrap

LINE = "advice: " + "word " * 30 + "/a/path/that-is-not-broken/" + "x" * 60


def test_on_a_terminal_a_line_is_broken_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    lines = wrap(LINE, 2).split("\n")
    assert len(lines) > 3
    assert all(len(line) <= 40 for line in lines[:-1])
    assert [line[:2] for line in lines[1:]] == ["  "] * (len(lines) - 1)
    assert " ".join(line.strip() for line in lines) == LINE
    assert lines[-1].strip().startswith("/a/path")


def test_elsewhere_a_line_stays_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert wrap(LINE, 2) == LINE


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable("a\x1b[2Jb\nc\udce9 \N{SNOWMAN}") == "a\\x1b[2Jb\\nc\\udce9 \N{SNOWMAN}"
