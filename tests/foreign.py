"""Other people's tests on plain sqlite3 and on lent connections: ``python tests/foreign.py [SUITE…]``.

What the package registry serves is fetched into a temporary folder, and nothing of it is kept. The program prints a
table; it fails if a test that passes on plain sqlite3 fails on ours for no reason that ``suites/refusals.toml`` has.
``--quick`` fetches nothing: it runs what the present environment has.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suites.table import CPYTHON, HERE, SUITES, WHEEL, Suite

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"
LONGEST = 1200.0  # seconds for one run of a suite
EACH = 20.0  # seconds for one test
UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class Outcome:
    """What one run of a suite has come to."""

    outcomes: dict[str, str]  # test: passed, failed or skipped
    lent: int
    log: str

    @property
    def passed(self) -> int:
        return sum(outcome == "passed" for outcome in self.outcomes.values())


class Refusals:
    """Why tests may fail on ours: a few documented reasons."""

    def __init__(self) -> None:
        document = tomllib.loads((TESTS / "suites" / "refusals.toml").read_text(encoding="utf-8"))
        self.reasons: dict[str, str] = document.pop("reasons")
        self._suites: dict[str, dict[str, list[str]]] = document
        for suite, by_reason in document.items():
            if unknown := set(by_reason) - set(self.reasons):
                raise ValueError(f"refusals.toml: [{suite}] has reasons that [reasons] has not: {unknown}")

    def reason(self, suite: str, test: str) -> str:
        for reason, patterns in self._suites.get(suite, {}).items():
            if any(matches(pattern, test) for pattern in patterns):
                return reason
        return UNKNOWN


def matches(pattern: str, test: str) -> bool:
    """``pattern`` is a name with or without parameters; one ``*`` in it is any text."""
    head, star, tail = pattern.partition("*")
    if star:
        return test.startswith(head) and test.endswith(tail)
    return pattern in (test, test.partition("[")[0])


class Workshop:
    """The temporary folder: environments and sources, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = functools.cache(self._environment)
        self.unpacked = functools.cache(self._unpacked)

    def _environment(self, needs: tuple[str, ...]) -> Path:
        """A Python that has these."""
        where = self.folder / f"environment-{len(list(self.folder.iterdir()))}"
        run([sys.executable, "-m", "venv", where])
        python = where / "bin" / "python"
        run([python, "-m", "pip", "install", "-q", "tenacity>=8.2", "pytest>=9.0", *needs])
        return python

    def _unpacked(self, requirement: str, python: Path) -> Path:
        """The source distribution of what ``python`` has installed."""
        name = requirement.partition("<")[0].partition(">")[0].partition("=")[0]
        where = Path(tempfile.mkdtemp(dir=self.folder))
        version = f"import importlib.metadata as m; print(m.version({name!r}))"
        exact = f"{name}=={subprocess.check_output([python, '-c', version], text=True).strip()}"
        # This one from its source, the tools that build it not.
        run([python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", where, exact])
        (archive,) = where.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(where, filter="data")
        (root,) = (path for path in where.iterdir() if path.is_dir())
        return root


def run(command: list[Any]) -> None:
    """Run it, and say what it said if it fails."""
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONGEST, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{ran.stdout}{ran.stderr}")


def place(suite: Suite, workshop: Workshop, python: Path) -> Path:
    """The folder that the suite's tests are run in."""
    if suite.source == HERE:
        return TESTS / "suites"
    if suite.source == CPYTHON:
        # A copy, so that pytest takes no settings from around it.
        copy = Path(tempfile.mkdtemp(dir=workshop.folder))
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / "test" / "test_sqlite3", copy / "test_sqlite3")
        return copy
    if suite.source.startswith(WHEEL):
        find = f"import importlib.util as u; print(u.find_spec({suite.source.removeprefix(WHEEL)!r}).origin)"
        package = Path(subprocess.check_output([python, "-c", find], text=True).strip()).parent
        copy = Path(tempfile.mkdtemp(dir=workshop.folder))
        for name in ("conftest.py", *suite.tests):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(package / name, copy / name)
        suite.prepare(copy)
        return copy
    return workshop.unpacked(suite.source, python)


def measure(suite: Suite, tests: tuple[str, ...], python: Path, root: Path, workshop: Workshop, on: str) -> Outcome:
    """Run the suite's tests in a process of their own, on ``plain`` or on ``ours``."""
    outcomes = Path(tempfile.mkdtemp(dir=workshop.folder)) / "outcomes.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (SOURCE, TESTS))),
        "PYTEST_ADDOPTS": "",
        "FOREIGN_ON": on,
        "FOREIGN_OUTCOMES": str(outcomes),
        "FOREIGN_FILES": "yes" if suite.files else "no",
        "FOREIGN_ATTACHED": suite.attached,
        "FOREIGN_EACH": str(EACH),
    }
    quiet = (
        "-q",
        "--continue-on-collection-errors",
        "--tb=native",
        "-p",
        "no:cacheprovider",
        "-p",
        "suites.plugin",
        "-W",
        "ignore",
    )
    command: list[Any] = [python, "-m", "pytest", *quiet, *suite.options, *tests]
    ran = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False
    )
    log = ran.stdout + ran.stderr
    if not outcomes.exists():
        raise SystemExit(f"{suite.name} on {on} did not end:\n{log[-5000:]}")
    found = json.loads(outcomes.read_text(encoding="utf-8"))
    return Outcome(found["outcomes"], found["lent"], log)


def compare(plain: Outcome, ours: Outcome, refusals: Refusals, suite: str) -> dict[str, str]:
    """The tests that pass on plain sqlite3 and not on ours, each with its reason."""
    passed = (test for test, outcome in plain.outcomes.items() if outcome == "passed")
    return {test: refusals.reason(suite, test) for test in passed if ours.outcomes.get(test) != "passed"}


def chosen(names: list[str], quick: bool) -> Iterator[Suite]:
    """The suites that were asked for; in the short form, those that are here."""
    if unknown := set(names) - {suite.name for suite in SUITES}:
        raise SystemExit(f"no such suite: {', '.join(unknown)}; there are {', '.join(suite.name for suite in SUITES)}")
    for suite in SUITES:
        wheel = suite.source.removeprefix(WHEEL) if suite.source.startswith(WHEEL) else "sqlite3"
        is_here = bool(suite.quick) and importlib.util.find_spec(wheel) is not None
        if (not names or suite.name in names) and (is_here or not quick):
            yield suite


def show(suite: Suite, plain: Outcome, ours: Outcome, different: dict[str, str]) -> None:
    reasons = collections.Counter(different.values())
    why = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    print(f"{suite.name:<16}{len(plain.outcomes):>7}{plain.passed:>8}{ours.passed:>8}{ours.lent:>8}  {why}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(suite.name for suite in SUITES))
    parser.add_argument("--quick", action="store_true", help="what the present environment has; fetches nothing")
    parser.add_argument("--logs", type=Path, help="a folder for what pytest has said")
    options = parser.parse_args(arguments)
    refusals = Refusals()
    unknown: list[str] = []
    print(f"{'suite':<16}{'tests':>7}{'plain':>8}{'ours':>8}{'lent':>8}  why not (tests)")
    with tempfile.TemporaryDirectory(prefix="foreign-", ignore_cleanup_errors=True) as folder:
        workshop = Workshop(Path(folder))
        for suite in chosen(options.suites, options.quick):
            python = Path(sys.executable) if options.quick else workshop.environment(suite.needs)
            root = place(suite, workshop, python)
            tests = suite.quick if options.quick else suite.tests
            plain, ours = (measure(suite, tests, python, root, workshop, on) for on in ("plain", "ours"))
            different = compare(plain, ours, refusals, suite.name)
            show(suite, plain, ours, different)
            unknown += [f"{suite.name}: {test}" for test, reason in different.items() if reason == UNKNOWN]
            if options.logs is not None:
                options.logs.mkdir(parents=True, exist_ok=True)
                (options.logs / f"{suite.name}-plain.log").write_text(plain.log, encoding="utf-8")
                (options.logs / f"{suite.name}-ours.log").write_text(ours.log, encoding="utf-8")
    for reason, meaning in refusals.reasons.items():
        print(f"{reason}: {meaning}")
    for test in unknown:
        print(f"{UNKNOWN}: {test}")
    return 1 if unknown else 0


if __name__ == "__main__":
    raise SystemExit(main())
