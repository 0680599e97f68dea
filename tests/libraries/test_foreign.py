"""Other people's tests, in the short form of ``tests/foreign.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from foreign import UNKNOWN, Outcome, Refusals, compare, matches

PROGRAM = Path(__file__).parents[1] / "foreign.py"


def test_other_peoples_tests_pass_on_a_lent_connection_but_for_documented_refusals() -> None:
    # What was compiled where pandas is installed is used, and not all of it compiled anew for this run.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": "", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, PROGRAM, "--quick"], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()[:3]] == ["suite", "cpython", "pandas"]


def test_a_difference_without_a_documented_reason_is_unknown() -> None:
    plain = Outcome({"a": "passed", "b": "passed", "c": "failed", "d": "skipped"}, 0, "")
    ours = Outcome({"a": "failed", "c": "failed", "d": "skipped"}, 4, "")
    assert compare(plain, ours, Refusals(), "cpython") == {"a": UNKNOWN, "b": UNKNOWN}


def test_a_reason_is_found_by_the_name_of_a_test_without_its_parameters() -> None:
    assert Refusals().reason("cpython", "test_sqlite3/test_hooks.py::ProgressTests::test_opcode_count") == "hook"
    assert matches("file.py::test_it", "file.py::test_it[one-two]")
    assert matches("file.py::Tests::*", "file.py::Tests::test_it")
    assert not matches("file.py::test_it", "file.py::test_it_all")
