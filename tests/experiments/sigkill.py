"""SIGKILL: at random moments under mixed load, and at each write system call of one run in turn."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import threading
from pathlib import Path

from experiments import HANG, Outcome, child, environment, load, strace

CALLS = "pwrite64,fdatasync,fsync,ftruncate,unlink"


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` kills of processes that go on with the same file."""
    chance, outcome, path = random.Random(seed), Outcome(), folder / "app.db"
    told: list[str] = []
    for trial in range(size):
        command = child(load.CODE, path, 4, 0, "FULL", "WAL", "-")
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
            assert process.stdout is not None
            watchdog = threading.Timer(HANG, process.kill)
            watchdog.start()
            lines = list(itertools.islice(process.stdout, chance.randrange(1, 1500)))  # which drops none
            if not watchdog.is_alive():
                outcome.hung += 1
            watchdog.cancel()
            process.kill()
            lines += process.stdout
        if process.returncode != -signal.SIGKILL:
            outcome.find(f"kill {trial}: a producer failed before it")
        told += lines
        outcome.trials += 1
        before = outcome.acknowledged
        load.judge(path, told, outcome, f"kill {trial}")
        if trial < size - 1:
            outcome.acknowledged = before
    return outcome


def run_by_calls(step: int, folder: Path) -> Outcome:
    """A kill at the first write system call, the ``step``-th after it, and so on, each of a new file."""
    outcome, tool = Outcome(), strace()
    assert tool is not None, "needs strace"
    at = 1
    while True:
        path, told = folder / f"{at}.db", folder / f"{at}.told"
        inject = f"inject={CALLS}:signal=SIGKILL:when={at}"
        prefix = (tool, "-f", "-qq", "-o", os.devnull, "-e", f"trace={CALLS}", "-e", inject)
        command = child(load.CODE, path, 1, 30, "FULL", "WAL", told, prefix=prefix)
        try:
            code = subprocess.run(command, env=environment(), timeout=HANG, capture_output=True, check=False).returncode
        except subprocess.TimeoutExpired:
            outcome.hung += 1
            return outcome
        outcome.trials += 1
        if code not in (0, -signal.SIGKILL):
            outcome.find(f"kill at call {at}: exit code {code}")
        load.judge(path, told.read_text().splitlines() if told.exists() else [], outcome, f"kill at call {at}")
        for file in folder.glob(f"{at}.*"):
            file.unlink()
        if code == 0:  # strace counts each thread's calls; the writer's are over
            return outcome
        at += step
