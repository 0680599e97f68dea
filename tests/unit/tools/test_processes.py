"""The processes of the load, as the bench has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onewriter.tools import contestants, figures
from onewriter.tools.load import Share, Task
from onewriter.tools.processes import LoadError, Process, merged


def test_ctrl_c_of_a_terminal_does_not_reach_them_and_the_end_of_the_block_ends_them(path: Path) -> None:
    with Process(Task(str(path), hold=3600)) as process:
        process.ready.wait()
        assert os.getsid(process._process.pid) != os.getsid(0)
    assert process.has_ended(0)
    with pytest.raises(LoadError, match="ended too early"):
        process.result()


def test_what_processes_did_at_the_same_time_is_added_up() -> None:
    one = Share(2.0, [1.0, 2.0, 9.0], [7], 1, [])
    other = Share(1.0, [3.0], [], 1, ["OSError: late"])
    outcome = figures.outcome(contestants.THREADS[3], "some", merged([one, other]), 1)
    assert (outcome.acknowledged, outcome.locked_errors, outcome.other_errors, outcome.lost) == (1, 2, 1, 0)
    assert (outcome.writes_per_second, outcome.p50_ms, outcome.p99_ms, outcome.max_ms) == (0.5, 2.0, 9.0, 9.0)
    assert (outcome.transactions, outcome.first_other_error) == (4, "OSError: late")
