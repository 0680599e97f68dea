"""No call on what a loan has given out can crash the process: in one of its own, so that a crash is a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "experiments" / "lentcalls.py"
ROUNDS = 6  # a few seconds; the program takes more


@pytest.mark.parametrize("seed", [0, 1000])
def test_every_attribute_can_be_called_in_every_state_of_the_loan(seed: int) -> None:
    command = [sys.executable, "-W", "ignore", str(PROGRAM), "--rounds", str(ROUNDS), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "lived\n"), done.stderr[-4000:]
