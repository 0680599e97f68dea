"""A file that is mounted alone, whose log is seen by nobody else."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import DEADLINE, drop_session, raising
from onewriter import DbWriter
from onewriter.sqlite import file, mounts


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "CHECK_INTERVAL", 0.0)


MOUNTS_AND_OPENS = """
import logging, os, subprocess, sys
real, path = sys.argv[1:]
for folder in (real, path):
    os.makedirs(folder)
open(f"{real}/app.db", "w").close(); open(f"{path}/app.db", "w").close()
if subprocess.run(["mount", "--bind", f"{real}/app.db", f"{path}/app.db"]).returncode:
    sys.exit(77)
logging.basicConfig(level=logging.CRITICAL)
from onewriter import DbWriter
from onewriter.tools import check
with DbWriter(f"{path}/app.db") as db:
    db.run("CREATE TABLE t (n)")
    print(db.health)
print(check.check(f"{path}/app.db").problems)
print(check.check(f"{real}/app.db").problems)
"""


@pytest.fixture
def mountinfo(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    listed = path.parent / "mountinfo"
    monkeypatch.setattr(mounts, "MOUNTS", listed)
    return listed


def test_a_file_that_is_mounted_alone_is_told_at_once(
    path: Path, mountinfo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = os.path.realpath(path).replace(" ", r"\040")
    mountinfo.write_text(f"22 1 8:1 / / rw - ext4 /dev/a rw\n23 22 8:1 /a {place} rw - ext4 /dev/a rw\n")
    path.touch()
    with caplog.at_level(logging.CRITICAL), DbWriter(path) as db:
        assert db.health.startswith("degraded: ")
        assert "Mount the folder" in db.health
        db.run("CREATE TABLE t (n)")
        db.flush(DEADLINE)
        drop_session(db)
        db.run("INSERT INTO t VALUES (1)")  # with another connection, of which nothing new is to be told
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    mountinfo.write_text(f"22 1 8:1 / / rw - ext4 /dev/a rw\n23 22 8:1 /a {path.parent} rw - ext4 /dev/a rw\n")
    with DbWriter(path) as db:
        assert db.health == "ok"


def test_a_real_mount_of_the_one_file_is_seen(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "real one"), str(tmp_path / "seen")]
    unshare = shutil.which("unshare")
    if unshare is None:
        return
    command = [unshare, "--mount", "--", sys.executable, "-c", MOUNTS_AND_OPENS, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    if child.returncode == 77 or "unshare:" in child.stderr:  # no right to mount anything here
        return
    assert child.returncode == 0, child.stderr
    health, there, here = child.stdout.splitlines()
    assert health.startswith("degraded: ")
    assert "mounted without its folder" in there
    assert "mounted without its folder" in child.stderr
    assert here == "[]"


def test_the_innermost_mount_above_a_path_has_it_and_of_those_in_one_place_the_last(mountinfo: Path) -> None:
    points = {"8:1": "/", "8:2": "/data", "8:4": "/data", "8:5": "/da", "8:3": "/data/of/others"}
    mountinfo.write_text("".join(f"1 1 {device} / {point} rw - ext4 x rw\n" for device, point in points.items()))
    assert mounts.mount_of("/data/app.db") == mounts.Mount("/data", (8, 4))


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.usefixtures("mountinfo")
def test_where_the_mounts_are_unknown_the_device_decides(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    path.touch()
    place, found = os.path.realpath(path), list(os.stat(path))
    found[2] += is_alone  # st_dev
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda name, **options: os.stat_result(found) if name == place else stat(name))
    assert mounts.is_mounted_alone(str(path)) is is_alone


def test_a_file_that_cannot_be_looked_at_is_taken_for_an_ordinary_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.touch()
    monkeypatch.setattr(mounts, "mount_of", raising(PermissionError))
    assert not mounts.is_mounted_alone(str(path))
