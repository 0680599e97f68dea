"""python -m onewriter check FILE: what it finds, what it says, and that it changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import onewriter
from helpers import DEADLINE, HEARS_INTERRUPTS, eventually, holding_lock, names_in
from onewriter import DbWriter
from onewriter.__main__ import main
from onewriter.sqlite import lock_holders
from onewriter.sqlite.connection import open_to_look
from onewriter.tools import check
from onewriter.tools.report import LARGE_WAL, Report, describe, judge
from onewriter.tools.versions import versions

READER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN")
connection.execute("SELECT count(*) FROM t").fetchone()
print("reads", flush=True)
sys.stdin.read()
"""

INSERT = "INSERT INTO t VALUES (?)"
linux = pytest.mark.skipif(not lock_holders.LOCKS.exists(), reason="only Linux tells who holds a lock")


def plain(path: Path, mode: str = "WAL") -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA journal_mode = {mode}")
    connection.execute("PRAGMA foreign_keys = OFF")  # some builds have them on
    connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT)")
    connection.execute("CREATE INDEX i ON t (text)")
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO t VALUES (?, ?)", [(n, "x" * 200) for n in range(2000)])
    connection.execute("COMMIT")
    return connection


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith("-shm")}


def asked(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["check", str(path), "--json"])
    return code, json.loads(capsys.readouterr().out)


@contextlib.contextmanager
def read_by_a_process(path: Path) -> Iterator[int]:
    command = [sys.executable, "-c", READER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        try:
            yield process.pid
        finally:
            process.kill()


def cannot_open(path: str, patience: float, *, immutable: bool) -> sqlite3.Connection:
    error = sqlite3.OperationalError("unable to open database file")
    error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
    raise error


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_healthy_file(path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain(path, mode).close()
    before = contents(path.parent)
    assert main(["check", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"journal mode  {mode}" in text
    assert text.endswith("\nok\n")
    assert "foreign keys  none declared\n" in text
    code, report = asked(path, capsys)
    assert code == 0
    assert (report["journal_mode"], report["quick_check"], report["problems"]) == (mode, [], [])
    assert (report["page_size"], report["wal_bytes"], report["can_be_checkpointed"]) == (4096, 0, True)
    assert report["pages"] * 4096 == report["bytes"] == path.stat().st_size
    assert any("wait for each other" in line for line in report["advice"]) is (mode == "DELETE")
    assert os.listdir(path.parent) == [path.name]  # no -wal, no -shm
    assert contents(path.parent) == before


@linux
def test_processes_that_have_it_open_are_named_and_the_wal_reset_bug_is_told_if_there_are_several(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))
    with contextlib.closing(plain(path)):
        report = asked(path, capsys)[1]
        assert ([process["pid"] for process in report["opened_by"]], report["advice"]) == ([os.getpid()], [])
        with read_by_a_process(path) as pid:
            code, report = asked(path, capsys)
            assert (code, {process["pid"] for process in report["opened_by"]}) == (0, {os.getpid(), pid})
            assert "several processes have it open" in report["advice"][0]
    assert asked(path, capsys)[1]["opened_by"] == []


def test_an_open_gateway_is_no_problem_and_is_not_disturbed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        db.run("INSERT INTO t VALUES (1)")
        code, report = asked(path, capsys)
        assert (code, report["journal_mode"], report["problems"]) == (0, "WAL", [])
        assert report["wal_bytes"] == os.path.getsize(f"{path}-wal")
        db.run("INSERT INTO t VALUES (2)")
        db.checkpoint()
        assert os.path.getsize(f"{path}-wal") == 0
        assert asked(path, capsys)[0] == 0
        db.run("INSERT INTO t VALUES (3)")
    assert asked(path, capsys)[1]["pages"] == 2


@linux
def test_a_large_log_that_another_process_reads_from_is_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(plain(path)) as connection, read_by_a_process(path) as pid:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("INSERT INTO t VALUES (-1, hex(zeroblob(?)))", (LARGE_WAL,))
        assert main(["check", str(path)]) == 1
        text = capsys.readouterr().out
        assert f"read by       process {pid} ({sys.executable} -c" in text
        assert f"PROBLEM: the write-ahead log is large, and cannot be reset while it is read, by process {pid}" in text
        assert text.endswith("\nneeds attention\n")
        code, report = asked(path, capsys)
        assert code == 1
        assert not report["can_be_checkpointed"]
        assert [reader["pid"] for reader in report["wal_readers"]] == [pid]
        assert report["wal_readers"][0]["command"].startswith(f"{sys.executable} -c")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        with connection:
            connection.execute("INSERT INTO t VALUES (-2, hex(zeroblob(?)))", (LARGE_WAL,))
        code, report = asked(path, capsys)
        assert (code, report["can_be_checkpointed"]) == (0, True)
        assert any("wal_checkpoint(TRUNCATE)" in line for line in report["advice"])


@linux
@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_who_holds_the_write_lock_is_named(path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain(path, mode).close()
    with holding_lock(path):
        code, report = asked(path, capsys)
        assert (code, [holder["pid"] for holder in report["write_lock"]]) == (0, [os.getpid()])
        main(["check", str(path)])
        assert "advice: SQLite's write lock is held at this moment by this process" in capsys.readouterr().out


def test_where_the_system_does_not_tell_it_says_so(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(path).close()
    monkeypatch.setattr(lock_holders, "LOCKS", path.parent / "missing")
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out.count("cannot be determined here") == 3
    assert asked(path, capsys)[1]["write_lock"] is None


def test_a_file_that_is_locked_altogether(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "PATIENCE", 0.05)
    with contextlib.closing(plain(path, "DELETE")) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        code, report = asked(path, capsys)
    assert code == 1
    assert report["problems"][0].startswith("not checked any further: database is locked")
    assert report["problems"][0].endswith("Check again when that transaction has ended, or end that process")
    assert (len(report["problems"]), [line for line in report["advice"] if "lock" in line]) == (1, [])


def test_a_damaged_page(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain(path).close()
    with open(path, "r+b") as file:
        file.seek(4096 * 20)
        file.write(b"\xff" * 4096)
    before = contents(path.parent)
    code, report = asked(path, capsys)
    assert (code, report["verdict"]) == (3, "damaged")
    assert report["quick_check"]
    assert any("damaged" in line for line in report["problems"])
    assert main(["check", str(path)]) == 3
    assert "PROBLEM: the file is damaged" in capsys.readouterr().out
    assert contents(path.parent) == before


def test_a_damaged_schema(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain(path).close()
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 3000)
    code, report = asked(path, capsys)
    assert (code, report["quick_check"]) == (3, ["database disk image is malformed"])


def test_rows_without_their_parent(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(plain(path)) as connection:
        connection.execute("CREATE TABLE child (n REFERENCES t (n), m REFERENCES t (n))")
        connection.execute("INSERT INTO child VALUES (1, 99999)")
    code, report = asked(path, capsys)
    assert (code, report["foreign_keys"]) == (1, 2)
    assert report["foreign_key_violations"] == ["child, rowid 1, has no parent in t"]
    assert main(["check", str(path)]) == 1
    assert "2 declared, 1 violation\n" in capsys.readouterr().out


def test_a_row_without_rowid_is_named_by_its_table(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(plain(path)) as connection:
        connection.execute("CREATE TABLE child (n INTEGER PRIMARY KEY REFERENCES t (n)) WITHOUT ROWID")
        connection.execute("INSERT INTO child VALUES (-1)")
    assert asked(path, capsys)[1]["foreign_key_violations"] == ["child, a row has no parent in t"]


def test_many_free_pages(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(plain(path)) as connection:
        connection.execute("DELETE FROM t")
    code, report = asked(path, capsys)
    assert code == 0
    assert any("VACUUM" in line for line in report["advice"])


def test_a_log_that_a_crash_left_behind_is_read(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy" / "app.db"
    copy.parent.mkdir()
    with contextlib.closing(plain(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("INSERT INTO t VALUES (-1, 'in the log')")
        for suffix in ("", "-wal"):
            Path(f"{copy}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
    before = contents(copy.parent)
    code, report = asked(copy, capsys)
    assert (code, report["journal_mode"]) == (0, "WAL")
    assert report["wal_bytes"] > 0
    assert contents(copy.parent) == before


NOT_A_DATABASE = (
    "file is not a database: it is of another kind, encrypted, or its beginning was overwritten. Look whether this is "
    "the path that the application opens; if it is, restore a backup"
)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "it is a folder"),
        (lambda path: path.write_text("not a database, " * 100), NOT_A_DATABASE),
        (lambda path: path.write_text("short"), NOT_A_DATABASE),
        (lambda path: os.mkfifo(path), "it is not a regular file"),
    ],
)
def test_what_cannot_be_checked_is_said_in_a_line(
    path: Path, make: Any, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(path)
    before = os.listdir(path.parent)
    for arguments in ([], ["--json"]):
        assert main(["check", str(path), *arguments]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err == f"cannot check {path}: {why}\n"
    assert os.listdir(path.parent) == before


def test_no_right_to_read(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain(path).close()
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # the tests may be run by a user who may do anything
    assert main(["check", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"cannot check {path}: no right to read {path}: run this as its owner")


def test_a_log_that_may_not_be_read_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(plain(path)):
        monkeypatch.setattr(check, "open_to_look", cannot_open)
        allowed = os.access
        monkeypatch.setattr(
            os, "access", lambda name, mode, **_: not f"{name}".endswith("-wal") and allowed(name, mode)
        )
        with pytest.raises(check.CannotCheckError, match=r"no right to read .*-wal: run this as its owner"):
            check.check(str(path))


def test_a_folder_that_may_not_be_written_is_named_if_there_is_a_log_to_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.db"
    with contextlib.closing(plain(path)):
        for suffix in ("", "-wal"):
            Path(f"{copy}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
    monkeypatch.setattr(check, "open_to_look", cannot_open)
    with pytest.raises(check.CannotCheckError, match="unable to open database file"):
        check.check(str(copy))
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda name, mode, **_: name != str(tmp_path) and allowed(name, mode))
    with pytest.raises(check.CannotCheckError, match=r"creates .*-shm, and this user may not write in that folder"):
        check.check(str(copy))


def test_who_may_not_write_the_file_need_not_be_able_to_write_its_log(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.access
    with contextlib.closing(plain(path)):
        for missing, problems in (("-wal", 1), ("", 0)):
            monkeypatch.setattr(
                os, "access", lambda name, mode, end=missing, **_: not (mode & os.W_OK and f"{name}".endswith(end))
            )
            assert len(check.check(str(path)).problems) == problems
    monkeypatch.setattr(os, "access", allowed)


def test_without_a_python_to_run_it_is_opened_like_any_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(path).close()
    monkeypatch.setattr(sys, "executable", None)
    assert check.check(str(path)).verdict == "ok"


def test_a_link_that_has_taken_the_place_of_a_database_with_a_log_is_told(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = path.with_name("moved.db")
    plain(target).close()
    path.symlink_to(target)
    path.with_name(f"{path.name}-wal").write_bytes(b"log")
    code, report = asked(path, capsys)
    assert (code, report["problems"][0][:17]) == (1, "it is a link, and")


def test_a_second_name_is_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain(path).close()
    os.link(path, path.with_name("other.db"))
    code, report = asked(path, capsys)
    assert (code, report["problems"][0][:31]) == (1, "the file has a second name (a h")


def test_an_impossible_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "a\0b"]) == 2
    assert "null" in capsys.readouterr().err


def test_a_file_that_is_opened_meanwhile_is_looked_at_again(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads a file as if nobody could change it must look whether somebody did."""
    plain(path).close()
    looks: list[bool] = []
    with contextlib.ExitStack() as stack:

        def look(report: Report, *, immutable: bool) -> None:
            if not looks:
                db = stack.enter_context(DbWriter(path))
                db.run("INSERT INTO t VALUES (-1, '')")
            looks.append(immutable)
            original(report, immutable=immutable)

        original = check._look
        monkeypatch.setattr(check, "_look", look)
        assert asked(path, capsys)[1]["wal_bytes"] > 0
    assert looks == [True, False]


def test_as_a_command(path: Path) -> None:
    plain(path).close()
    command = [sys.executable, "-m", "onewriter", "check"]
    found = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith(f"{path}\n")
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 2


def test_what_only_the_application_has_is_said_to_be_missing(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.create_collation("mine", lambda a, b: (a > b) - (a < b))
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("CREATE TABLE t (name TEXT COLLATE mine)")
        connection.execute("CREATE INDEX i ON t (name)")
        connection.execute("CREATE TABLE c (name REFERENCES t (name))")  # which is not unique
        connection.execute("INSERT INTO t VALUES ('a'), ('b')")
        connection.execute("INSERT INTO c VALUES ('a')")
        connection.commit()
    report = check.check(str(path))
    assert report.not_checked == ["quick_check", "foreign_key_check"]
    assert report.problems == []
    assert "could not be done here: no such collation sequence: mine" in report.advice[0]
    assert "quick_check   not done" in describe(report)


CUT_OFF = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 5")
connection.execute("BEGIN")
connection.execute("UPDATE t SET text = 'other' || text")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_transaction_that_a_crash_has_cut_off_is_told_and_left_alone(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain(path, "DELETE").close()
    subprocess.run([sys.executable, "-c", CUT_OFF, str(path)], timeout=60, check=False)
    before = contents(path.parent)
    assert sorted(before) == [path.name, f"{path.name}-journal"]
    assert main(["check", str(path)]) == 1
    told = capsys.readouterr().out
    assert f"PROBLEM: not checked any further: a crash has interrupted a transaction, and {path}-journal" in told
    assert "The next connection that may write rolls it back" in told
    assert "quick_check   not done" in told
    assert sorted(os.listdir(path.parent)) == sorted(before)
    assert contents(path.parent) == before
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM t WHERE text LIKE 'other%'").fetchone() == (0,)
    assert main(["check", str(path)]) == 0


def test_an_empty_file_needs_attention(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.touch()
    assert main(["check", str(path)]) == 1
    told = capsys.readouterr().out
    assert "journal mode  none yet" in told
    assert "PROBLEM: the file is empty" in told
    assert "DELETE" not in told
    assert contents(path.parent) == {path.name: b""}


def test_a_database_without_tables_is_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DbWriter(path).close()
    code, report = asked(path, capsys)
    assert (code, report["tables"]) == (0, 0)
    assert "no tables" in report["advice"][0]


def test_a_log_beside_an_empty_file_survives_a_check(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.touch()
    log = Path(f"{path}-wal")
    log.write_bytes(b"w" * (LARGE_WAL + 1))
    code, report = asked(path, capsys)
    assert (code, report["wal_bytes"]) == (1, LARGE_WAL + 1)
    assert log.read_bytes() == b"w" * (LARGE_WAL + 1)
    assert (report["advice"], report["can_be_checkpointed"]) == ([], False)  # a checkpoint would delete it


@pytest.mark.parametrize(("count", "said"), [(1, "1 violation"), (2, "2 violations"), (30, "30 violations")])
def test_violations_are_counted_in_words(path: Path, count: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(plain(path)) as connection:
        connection.execute("CREATE TABLE c (n REFERENCES t (n))")
        connection.executemany("INSERT INTO c VALUES (?)", [(-n,) for n in range(1, count + 1)])
    assert main(["check", str(path)]) == 1
    told = capsys.readouterr().out
    assert f"1 declared, {said}\n" in told
    assert told.count("has no parent in t\n") == min(count, 20)
    assert ("    and 10 more\n" in told) is (count == 30)


def test_check_reads_an_open_file_whose_log_is_empty_as_an_open_one(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.run("CREATE TABLE t (n)")
    db.checkpoint()
    asked: list[bool] = []

    def watched(path: str, patience: float, *, immutable: bool) -> sqlite3.Connection:
        asked.append(immutable)
        return open_to_look(path, patience, immutable=immutable)

    monkeypatch.setattr(check, "open_to_look", watched)
    assert check.check(db.path).problems == []
    assert asked == [False]


def test_check_looks_again_at_a_file_that_was_written_and_closed_meanwhile(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
    looks: list[bool] = []
    look = check._look

    def watched(report: Report, *, immutable: bool) -> None:
        look(report, immutable=immutable)
        looks.append(immutable)
        if immutable:
            with DbWriter(path) as other:
                other.run_many(INSERT, [(n,) for n in range(5000)])

    monkeypatch.setattr(check, "_look", watched)
    check.check(str(path))
    assert looks == [True, True, False]


def test_check_of_a_closed_damaged_file_in_wal_mode_says_wal(damaged: Path) -> None:
    report = check.check(str(damaged))
    assert report.quick_check
    assert report.journal_mode == "WAL"
    assert not report.can_be_checkpointed


@pytest.mark.parametrize(("mode", "count"), [("WAL", 2), ("DELETE", 3)])
def test_nothing_that_writes_is_advised_of_a_damaged_file(mode: str, count: int) -> None:
    def advice(*damage: str) -> list[str]:
        report = Report("app.db", bytes=1, journal_mode=mode, tables=1, pages=10, free_pages=9, opened_by=[])
        report.wal_bytes, report.quick_check = LARGE_WAL + 1, [*damage]
        judge(report)
        return report.advice

    assert advice("a page is damaged") == []
    assert len(advice()) == count


def test_the_command_line_tells_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"onewriter {onewriter.__version__} ({versions()})\n"


def test_it_ends_quietly_if_nobody_reads_what_it_says(path: Path) -> None:
    plain(path).close()
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "onewriter", "check", str(path)]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


@linux
def test_its_exit_code_is_told_without_an_output_and_a_full_disk_has_its_own(path: Path) -> None:
    plain(path).close()
    command = f"{sys.executable} -m onewriter check {path}"
    for output, expected in ((">&-", (0, "")), (">/dev/full", (141, "cannot write: No space left on device\n"))):
        ended = subprocess.run(
            ["sh", "-c", f"{command} {output}"], stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
        assert (ended.returncode, ended.stderr) == expected


@linux
def test_ctrl_c_ends_it_while_sqlite_is_at_work(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (n, m NOT NULL AS (length(hex(zeroblob(n)))))")
        connection.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(3000)])
        connection.execute("PRAGMA writable_schema = 1")
        connection.execute("UPDATE sqlite_schema SET sql = replace(sql, '(n)', '(2000000 + n)')")  # takes its time
    command = [
        sys.executable,
        "-c",
        HEARS_INTERRUPTS + "import runpy; runpy.run_module('onewriter', run_name='__main__', alter_sys=True)",
        "check",
        str(path),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        eventually(lambda: child.pid in (lock_holders.readers_in_the_way(str(path)) or []))
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=DEADLINE)
    assert (child.returncode, output, errors) == (130, "", "interrupted\n")


def test_a_name_that_the_output_cannot_have_is_escaped(path: Path) -> None:
    with contextlib.closing(plain(path)) as connection:
        connection.execute('CREATE TABLE "\N{SNOWMAN}\x1b[31m" (n REFERENCES t (n))')
        connection.execute('INSERT INTO "\N{SNOWMAN}\x1b[31m" VALUES (-1)')
    command = [sys.executable, "-m", "onewriter", "check", str(path)]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, env=ascii_only, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (1, "")
    assert "    \\u2603\\x1b[31m, rowid 1, has no parent in t\n" in found.stdout


def spoil_the_version_for_writers(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[18] = 9
    path.write_bytes(content)


def leave_an_index(path: Path) -> None:
    path.with_name(f"{path.name}-shm").write_bytes(b"x" * 100)


@pytest.mark.parametrize("change", [spoil_the_version_for_writers, leave_an_index])
def test_beside_a_closed_file_with_a_log_no_file_appears(path: Path, change: Callable[[Path], None]) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
    change(path)
    before, content = names_in(path.parent), path.read_bytes()
    main(["check", str(path)])
    assert names_in(path.parent) == before
    assert path.read_bytes() == content


def test_a_log_that_was_deleted_under_a_process_is_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (n)")
        os.unlink(f"{path}-wal")
        code, report = asked(path, capsys)
        assert (code, report["verdict"]) == (1, "needs attention")
        assert report["problems"][0].startswith(f"{path}-wal was deleted under this process")


def test_a_process_that_has_no_log_yet_has_lost_none(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
    monkeypatch.setattr(check, "openers", lambda path, answers=[[1], []]: answers.pop(0))
    assert asked(path, capsys)[0] == 0
