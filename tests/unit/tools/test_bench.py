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
from onewriter.tools import bench, contestants, load

DEADLINE = 60  # seconds; a child that takes longer hangs
QUICK = ["bench", "--threads", "3", "--seconds", "0.2"]
TITLES = ["writes/s", "p50 ms", "p99 ms", "max ms", "locked", "commits", "found"]


def rows_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("(") and line.endswith("all")]


@contextlib.contextmanager
def forgetful(path: Path, timeout: float) -> Iterator[contestants.Session]:
    """A contestant that acknowledges what it never writes."""
    yield contestants.Session(lambda: lambda row: None)


@contextlib.contextmanager
def failing(path: Path, timeout: float) -> Iterator[contestants.Session]:
    """A contestant whose every write fails, and not because of a lock."""

    def write(row: int) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    yield contestants.Session(lambda: write)


def closed(path: Path, timeout: float) -> contextlib.AbstractContextManager[contestants.Session]:
    """A contestant that cannot begin."""
    raise PermissionError("the door is closed")


def gone(path: Path, timeout: float) -> contextlib.AbstractContextManager[contestants.Session]:
    """A contestant whose process ends without a word."""
    os._exit(3)


def only(monkeypatch: pytest.MonkeyPatch, opener: contestants.Opener, *, gateway: bool = False) -> None:
    stand_in = contestants.Contestant("x", "a stand-in", gateway, opener)
    monkeypatch.setattr(bench, "loads", lambda threads, seconds: [bench.Load("some", [stand_in], threads, seconds)])


def test_the_table_and_the_json_file_have_the_same_figures_and_every_acknowledged_write_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "PROCESSES", 2)
    monkeypatch.setattr(bench, "HOLD", 1.5)  # seconds, so that
    monkeypatch.setattr(contestants, "TIMEOUT", 0.1)  # a slow writer still outlasts the timeout
    file = tmp_path / "figures.json"
    assert main([*QUICK, "--path", str(tmp_path), "--json", str(file)]) == 0

    output, progress = capsys.readouterr()
    header = next(line for line in output.splitlines() if "writes/s" in line)
    numbers = json.loads(file.read_text())
    assert header.split("  ")[-1] == "found"
    assert [title for title in TITLES if title in header] == TITLES
    for fact in (
        f"SQLite {sqlite3.sqlite_version}",
        "journal mode WAL",
        "synchronous FULL",
        "0.2 s for each",
        "fsync",
        "\n3 threads\n",
        "\n2 processes with 1 thread each\n",
        "\n3 threads, while another process holds SQLite's write lock for 1.5 s\n",
    ):
        assert fact in output
    rows = rows_of(output)
    assert [row[:3] for row in rows] == [f"({key})" for key in "abcdefghi"]
    assert all(len(line) <= 80 for line in (header, *rows))
    for outcome, row in zip(numbers["contestants"], rows, strict=True):
        assert row.split()[-2] == f"{outcome['acknowledged']:,}"
        assert outcome["acknowledged"] == outcome["found"] > 0
        assert 0 < outcome["p50_ms"] <= outcome["p99_ms"] <= outcome["max_ms"]
    refused = {outcome["key"]: outcome["locked_errors"] for outcome in numbers["contestants"]}
    assert refused["h"] >= 3  # each thread met the slow writer's lock for longer than the timeout
    assert [refused[key] for key in "bcdgi"] == [0] * 5
    assert f"Plain sqlite3 refused {refused['a'] + refused['e'] + refused['f'] + refused['h']:,} of " in output
    assert f"{refused['h']} of them after it had waited" in output
    assert "the gateway refused 0 of " in output
    assert (numbers["threads"], numbers["seconds"], numbers["journal_mode"]) == (3, 0.2, "WAL")
    assert progress.startswith("[1 of 8] (a) sqlite3, BEGIN ...\n[2 of 8] ")
    assert "\r" not in output + progress
    assert os.listdir(tmp_path) == ["figures.json"]


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
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stderr is not None
        assert child.stderr.readline().startswith("[1 of 8] ")
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does
        _, errors = child.communicate(timeout=DEADLINE)  # which waits for its processes too: they have its stderr
    assert (child.returncode, errors) == (130, "interrupted\n")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_anywhere_removes_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(processes: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "begin_together", interrupted)
    assert main([*QUICK, "--path", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("gateway", "code"), [(True, 1), (False, 0)])
def test_a_lost_acknowledged_write_fails_the_run_if_the_gateway_lost_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gateway: bool, code: int
) -> None:
    only(monkeypatch, forgetful, gateway=gateway)
    assert main(["bench", "--threads", "1", "--seconds", "0.01"]) == code
    assert "(x): LOST" in capsys.readouterr().out


def test_another_error_ends_the_load_is_named_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, failing)
    assert main(QUICK) == 1
    assert "(x): 3 other errors; the first: OperationalError: database or disk is full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("opener", "why"),
    [(closed, "PermissionError: the door is closed"), (gone, "a process of the load has ended too early")],
)
def test_a_process_that_cannot_do_its_part_fails_the_run_in_a_line(
    opener: contestants.Opener, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, opener)
    assert main(QUICK) == 1
    assert capsys.readouterr().err.endswith(f"onewriter bench failed: {why}\n")


def test_it_ends_quietly_if_nobody_reads_what_it_says(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "onewriter", *QUICK, "--path", str(tmp_path)]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")
    assert os.listdir(tmp_path) == []


def test_on_a_terminal_one_line_is_rewritten_and_removed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    told(bench.Progress(terminal := Terminal(), 2))
    assert terminal.getvalue() == "\r[1 of 2] it: 1.5 s, 1,200 writes\x1b[K\r\x1b[K"


def test_a_terminal_that_cannot_rewrite_a_line_gets_one_for_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    told(bench.Progress(terminal := Terminal(), 2))
    assert terminal.getvalue() == "[1 of 2] it ...\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(progress: bench.Progress) -> None:
    progress.begin("it")
    progress.update(1.5, 1200)
    progress.clear()


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


def test_a_transaction_that_looked_before_another_wrote_is_refused_and_can_begin_again(path: Path) -> None:
    bench._prepare(path)
    with contextlib.closing(contestants.connect(path)) as one, contextlib.closing(contestants.connect(path)) as other:

        def write_behind(sql: str, values: tuple[object, ...]) -> None:
            one.execute(sql, values).fetchall()
            if sql == contestants.LOOK:
                contestants.in_transaction(other, 2)

        one.execute("BEGIN")
        with pytest.raises(sqlite3.OperationalError, match="locked") as refused:
            contestants.operate(write_behind, 1)
        assert load.is_locked(refused.value)
        one.execute("ROLLBACK")
        contestants.in_transaction(one, 1)
        assert one.execute("SELECT id FROM load").fetchall() == [(1,), (2,)]


def test_plain_connections_have_the_timeout_that_sqlite3_has_by_default(path: Path) -> None:
    asked = "PRAGMA busy_timeout"
    with contextlib.closing(contestants.connect(path)) as ours, contextlib.closing(sqlite3.connect(path)) as plain:
        assert ours.execute(asked).fetchone() == plain.execute(asked).fetchone()
    assert bench.HOLD > contestants.TIMEOUT


def test_each_row_is_written_by_one_thread_of_one_process(tmp_path: Path) -> None:
    tasks = bench._tasks(bench.Load("some", [], 3, 1.0, processes=4), contestants.PROCESSES[0], tmp_path)
    firsts = [task.first + thread for task in tasks for thread in range(task.threads)]
    assert (sorted(firsts), {task.stride for task in tasks}) == (list(range(12)), {12})
