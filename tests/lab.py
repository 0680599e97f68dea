"""The reliability laboratory: ``python tests/lab.py --minutes N``. Prints one table; any finding is a fault.

The test suite runs the same experiments with small, fixed sizes. Those that need strace (and a SQLite that writes
by pwrite, which it can look at), or leave to mount, are left out where they cannot be had, and the table says so.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sqlite3
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic

from experiments import (
    Outcome,
    badinput,
    files,
    forks,
    handlers,
    hands,
    histories,
    interleavings,
    interrupts,
    iofaults,
    migrations,
    oddities,
    powerloss,
    programs,
    recipes,
    schedules,
    sigkill,
    signals,
    soak,
    strace,
    tasks,
    watches,
)

# Name, seconds for one of its size on a small machine, the size that is enough, whether strace is needed.
Run = Callable[[int, int, Path], Outcome]
EXPERIMENTS: tuple[tuple[str, Run, float, int, bool], ...] = (
    ("SIGKILL at random moments", sigkill.run, 0.3, 200, False),
    ("migrations that are killed", migrations.run, 3.0, 200, False),
    ("SIGKILL at each write call", lambda size, seed, folder: sigkill.run_by_calls(1, folder), 100.0, 1, True),
    ("power loss, WAL, FULL", partial(powerloss.run, synchronous="FULL", mode="WAL"), 0.005, 1000, True),
    ("power loss, WAL, NORMAL", partial(powerloss.run, synchronous="NORMAL", mode="WAL"), 0.005, 1000, True),
    ("power loss, DELETE, FULL", partial(powerloss.run, synchronous="FULL", mode="DELETE"), 0.005, 1000, True),
    ("failing system calls", iofaults.run, 0.6, len(iofaults.faults()), True),
    ("a full disk", lambda size, seed, folder: iofaults.run_on_full_disk(folder), 1.0, 1, False),
    ("histories, linearizable", histories.run, 0.08, 500, False),
    ("forced schedules", schedules.run, 0.5, 100, False),
    ("orders of few switches", interleavings.run, 0.2, 20_000, False),
    ("signals at random moments", signals.run, 0.25, 200, False),
    ("forks", forks.run, 4.0, 50, False),
    ("handlers that write", handlers.run, 1.5, 100, False),
    ("files that are lost", files.run, 3.0, 100, False),
    ("interrupts survived", interrupts.run, 0.006, 20_000, False),
    ("blocks from hand to hand", hands.run, 0.04, 2000, False),
    ("recipes of others' faults", lambda size, seed, folder: recipes.run(float(size), seed, folder), 1.0, 60, False),
    ("live queries", watches.run, 0.25, 200, False),
    ("cancelled tasks", tasks.run, 0.002, 100_000, False),
    ("programs of tasks", programs.run, 0.35, 1000, False),
    ("odd exceptions, handlers", oddities.run, 2.5, 24, False),
    ("bad input", badinput.run, 0.06, 2000, False),
    ("soak", lambda size, seed, folder: soak.run(float(size), seed, folder), 1.0, 3600, False),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="for all of them together (default: 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="experiments whose name has this in it")
    arguments = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    chosen = [experiment for experiment in EXPERIMENTS if arguments.only in experiment[0]]
    each = arguments.minutes * 60 / len(chosen)
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, seed {arguments.seed}", flush=True)
    print(f"{'':28} {'trials':>9} {'acknowledged':>12} {'lost':>5} {'hung':>5} {'corrupt':>8} {'seconds':>8}")
    findings = []
    for name, run, cost, enough, needs_strace in chosen:
        with tempfile.TemporaryDirectory(prefix="onewriter-lab-") as folder:
            if (needs_strace and strace() is None) or (name == "a full disk" and not iofaults.can_mount(Path(folder))):
                print(f"{name:28} left out: strace, pwrite in SQLite, or leave to mount cannot be had here", flush=True)
                continue
            began = monotonic()
            outcome = run(max(1, min(enough, int(each / cost))), arguments.seed, Path(folder))
        findings += [f"{name}: {text}" for text in outcome.findings]
        counts = f"{outcome.trials:9,} {outcome.acknowledged:12,} {outcome.lost:5} {outcome.hung:5} {outcome.corrupt:8}"
        print(f"{name:28} {counts} {monotonic() - began:8.0f}", flush=True)
        if name == "soak":
            print("    " + ", ".join(f"{key}: {value:,}" for key, value in outcome.notes.items()), flush=True)
    print("\n".join(findings) or "no findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
