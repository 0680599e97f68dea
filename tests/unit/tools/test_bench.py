"""bench: the same load on plain sqlite3 and on the gateway, one table, honest exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import HEARS_INTERRUPTS
from onewriter.__main__ import main
from onewriter.tools import bench, contestants

DEADLINE = 60  # seconds; a child that takes longer hangs
QUICK = ["bench", "--threads", "2", "--seconds", "0.2"]
TITLES = ["writes/s", "vs (b)", "p50 ms", "p99 ms", "max ms", "locked errors", "acknowledged", "found again"]


def rows_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("(") and "  " in line]


@contextlib.contextmanager
def forgetful(path: Path) -> Iterator[contestants.Session]:
    """A contestant that acknowledges what it never writes."""
    yield contestants.Session(lambda: lambda row: None)


@contextlib.contextmanager
def failing(path: Path) -> Iterator[contestants.Session]:
    """A contestant whose every write fails, and not because of a lock."""

    def write(row: int) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    yield contestants.Session(lambda: write)


@contextlib.contextmanager
def interrupted(path: Path) -> Iterator[contestants.Session]:
    raise KeyboardInterrupt
    yield


def only(monkeypatch: pytest.MonkeyPatch, opener: object, *, gateway: bool) -> None:
    monkeypatch.setattr(bench, "CONTESTANTS", (contestants.Contestant("b", "a stand-in", gateway, opener),))  # type: ignore[arg-type]


def test_the_table_and_the_json_file_have_the_same_figures_and_every_acknowledged_write_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    assert main([*QUICK, "--path", str(tmp_path), "--json", str(file)]) == 0

    output, progress = capsys.readouterr()
    header = next(line for line in output.splitlines() if "writes/s" in line)
    figures = json.loads(file.read_text())
    assert [title for title in TITLES if title in header] == TITLES
    for fact in (
        f"SQLite {sqlite3.sqlite_version}",
        "journal mode WAL",
        "synchronous FULL",
        "2 threads",
        "0.2 s each",
        "fsync",
    ):
        assert fact in output
    assert [row[:3] for row in rows_of(output)[:4]] == ["(a)", "(b)", "(c)", "(d)"]
    for outcome, row in zip(figures["contestants"], rows_of(output), strict=False):
        assert row.split()[-1] == f"{outcome['found']:,}"
        assert outcome["acknowledged"] == outcome["found"] > 0
        assert 0 < outcome["p50_ms"] <= outcome["p99_ms"] <= outcome["max_ms"]
    assert [o["locked_errors"] for o in figures["contestants"][1:]] == [0, 0, 0]
    refused, committed = figures["contestants"][0]["locked_errors"], figures["contestants"][2]["acknowledged"]
    assert f"sqlite3 refused {refused:,} of " in output
    assert f"DbWriter.run refused 0, and committed {committed:,} in the same time." in output
    assert (figures["threads"], figures["seconds"], figures["journal_mode"]) == (2, 0.2, "WAL")
    assert progress.count("running ") == 4
    assert os.listdir(tmp_path) == ["figures.json"]


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "onewriter", *QUICK, "--path", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (child.returncode, len(rows_of(child.stdout)) >= 4) == (0, True), child.stderr
    assert "\r" not in child.stdout + child.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to a child there")
def test_ctrl_c_ends_it_with_130_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        HEARS_INTERRUPTS + "import runpy; runpy.run_module('onewriter', run_name='__main__', alter_sys=True)",
        "bench",
        "--seconds",
        "3600",
        "--threads",
        "2",
        "--path",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert child.stderr.readline().startswith("running ")
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=DEADLINE)
    assert (child.returncode, errors) == (130, "interrupted\n")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_anywhere_removes_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, interrupted, gateway=True)
    assert main([*QUICK, "--path", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("gateway", "code"), [(True, 1), (False, 0)])
def test_a_lost_acknowledged_write_fails_the_run_if_the_gateway_lost_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gateway: bool, code: int
) -> None:
    only(monkeypatch, forgetful, gateway=gateway)
    assert main(["bench", "--threads", "1", "--seconds", "0.01"]) == code
    assert "LOST" in capsys.readouterr().out


def test_another_error_ends_the_load_is_named_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, failing, gateway=False)
    assert main(QUICK) == 1
    assert "(b): 2 other errors; the first: OperationalError: database or disk is full" in capsys.readouterr().out


def test_a_transaction_that_looked_before_another_wrote_is_refused_and_can_begin_anew(path: Path) -> None:
    bench._prepare(path)
    with contextlib.closing(contestants.connect(path)) as one, contextlib.closing(contestants.connect(path)) as other:

        def write_behind(sql: str, values: tuple[object, ...]) -> None:
            one.execute(sql, values).fetchall()
            if sql == contestants.LOOK:
                contestants.in_transaction(other, 2)

        one.execute("BEGIN")
        with pytest.raises(sqlite3.OperationalError, match="locked") as refused:
            contestants.operate(write_behind, 1)
        assert bench.is_locked(refused.value)
        one.execute("ROLLBACK")
        contestants.in_transaction(one, 1)
        assert one.execute("SELECT id FROM load").fetchall() == [(1,), (2,)]


def test_a_locked_error_is_told_by_its_code() -> None:
    locked, other = sqlite3.OperationalError("locked?"), sqlite3.OperationalError("database is locked")
    locked.sqlite_errorcode = sqlite3.SQLITE_BUSY_SNAPSHOT
    other.sqlite_errorcode = sqlite3.SQLITE_FULL
    assert (bench.is_locked(locked), bench.is_locked(other), bench.is_locked(None)) == (True, False, False)


def test_on_a_terminal_one_line_is_rewritten_and_removed_in_the_end() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    progress = bench.Progress(terminal)
    progress.begin("it")
    progress.update("it", 1.5, 1200)
    progress.clear()
    assert terminal.getvalue() == "\rit: 1.5 s, 1,200 writes\x1b[K\r\x1b[K"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--threads", "0"], "--threads"),
        (["--threads", "many"], "--threads"),
        (["--threads", "100000"], "--threads"),
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--seconds", "inf"], "--seconds"),
        (["--path", "no/such/folder"], "no folder 'no/such/folder'"),
        (["--json", "no/such/folder/file"], "no folder 'no/such/folder'"),
        (["--json", "."], "'.' is not the name of a file"),
    ],
)
def test_bad_arguments_are_named_and_end_with_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_without_a_command_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
