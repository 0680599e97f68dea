"""The tests on other versions and builds of SQLite: ``python tests/sqlites.py [VERSION[,OPTION=VALUE...]...]``.

Each is built from the amalgamation inside an npm package, put before Python's own by LD_LIBRARY_PATH, and kept for the
next time. ``--tests`` names other tests than those that SQLite could fail; without a VERSION, all that are known here.

Ends with 1 if a test failed, and with 3 if none did but a version could not be had; the line of that one says why.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from check_skips import allowed, skipped

ROOT = Path(__file__).parents[1]
LONGEST = 900  # seconds to fetch one, and to build one; half a minute where nothing else runs
NAME = "libsqlite3.so.0"
PACKAGE = "better-sqlite3"
VERSIONS = {  # of SQLite: of the package
    "3.37.2": "7.5.0",
    "3.39.1": "7.6.2",
    "3.42.0": "8.5.0",
    "3.45.1": "9.4.0",
    "3.49.1": "11.9.1",
    "3.51.3": "12.8.0",
    "3.54.1": "13.2.0",
}
# As Debian builds it, but for what its tools have to be built for.
ENABLED = ["COLUMN_METADATA", "DBSTAT_VTAB", "FTS3", "FTS3_PARENTHESIS", "FTS3_TOKENIZER", "FTS4", "FTS5", "JSON1"]
ENABLED += ["LOAD_EXTENSION", "MATH_FUNCTIONS", "PREUPDATE_HOOK", "RTREE", "SESSION", "STMTVTAB", "UNLOCK_NOTIFY"]
DEBIAN = [
    *(f"ENABLE_{name}" for name in ENABLED),
    *(f"HAVE_{name}=1" for name in ("FDATASYNC", "ISNAN", "PREAD", "PREAD64", "PWRITE", "PWRITE64", "USLEEP")),
    *("LIKE_DOESNT_MATCH_BLOBS", "OMIT_LOOKASIDE", "SECURE_DELETE", "SOUNDEX", "USE_URI"),
    *("MAX_SCHEMA_RETRY=25", "MAX_VARIABLE_NUMBER=250000", "TEMP_STORE=1", "THREADSAFE=1"),
]
UNTOLD = ("DQS", "HAVE", "DEFAULT_FOREIGN_KEYS")  # what PRAGMA compile_options has not, at least not everywhere
# What a version or build of SQLite changes: settings, errors, locks, logs, what a statement that fails leaves behind,
# and what is synced. Pages, the command line, threads, ends of processes and libraries are the same whichever it is.
TESTS = [
    "tests/property",
    *(f"tests/unit/{folder}" for folder in ("live", "read", "sqlite", "write")),
    *(f"tests/acceptance/test_{name}.py" for name in ("data", "failures", "files", "locks")),
    *("tests/crash/test_failed_fsync.py", "tests/crash/test_experiments.py::test_power_cuts"),
    "tests/unit/ends/test_backup.py",
]


class CannotBeHadError(Exception):
    """Why a version is not here."""


@dataclass
class Outcome:
    passed: int = 0
    failed: int = 0
    text: str = ""


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onewriter-sqlites"


def library(version: str, options: Sequence[str]) -> Path:
    """The folder of a shared library of it, built if it is not there."""
    settings = _settings(options)
    folder = cache() / f"{version}-{hashlib.sha256(' '.join(settings).encode()).hexdigest()[:8]}"
    if not (folder / NAME).exists():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache()) as work:
            built = _build(_source(version, Path(work)), settings)
            folder.mkdir(exist_ok=True)
            os.replace(built, folder / NAME)  # whole, or not there
    return folder


def _settings(options: Sequence[str]) -> list[str]:
    """For the compiler. A later one of the same name takes the place of an earlier one."""
    by_name = {option.partition("=")[0]: option for option in [*DEBIAN, *options]}
    defines = [f"-D{option}" if option.startswith("HAVE") else f"-DSQLITE_{option}" for option in by_name.values()]
    return ["-O1", "-fPIC", "-shared", f"-Wl,-soname,{NAME}", *defines]


def _source(version: str, work: Path) -> Path:
    archive = _fetch(VERSIONS[version], work)
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    (found,) = work.glob("package/deps/**/sqlite3.c")
    return found


def _fetch(version: str, work: Path) -> Path:
    if shutil.which("npm") is None:
        raise CannotBeHadError("there is no npm, which fetches it")
    ran = _run(["npm", "pack", "--loglevel=error", f"{PACKAGE}@{version}"], work)
    if ran.returncode:
        raise CannotBeHadError(f"npm pack {PACKAGE}@{version}: {_why(ran.stderr)}")
    return next(work.glob("*.tgz"))


def _build(source: Path, settings: Sequence[str]) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise CannotBeHadError("there is no C compiler")
    ran = _run([compiler, *settings, source.name, "-o", NAME, "-lpthread", "-ldl", "-lm"], source.parent)
    if ran.returncode:
        raise CannotBeHadError(f"{compiler}: {_why(ran.stderr)}")
    return source.parent / NAME


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired as error:
        raise CannotBeHadError(f"{command[0]} took more than {LONGEST} s") from error


def _why(said: str) -> str:
    return "; ".join(said.strip().splitlines()[:4]) or "it said nothing"


LOADED = """
import sqlite3
options = sqlite3.connect(":memory:").execute("PRAGMA compile_options").fetchall()
print(sqlite3.sqlite_version, *(name for name, in options))
"""


def check_loaded(version: str, options: Sequence[str], environment: dict[str, str]) -> None:
    """Raise unless this Python uses it: some have a SQLite of their own linked in."""
    found = subprocess.run([sys.executable, "-c", LOADED], env=environment, capture_output=True, text=True, check=True)
    loaded, *compiled = found.stdout.split()
    if loaded != version:
        raise CannotBeHadError(f"this Python has SQLite {loaded} linked in, and loads no other")
    asked = [option for option in options if not option.startswith(UNTOLD)]
    if missing := [option for option in asked if not {option, option.partition("=")[0]} & set(compiled)]:
        raise CannotBeHadError(f"{', '.join(missing)} came to nothing")


def run_tests(tests: Sequence[str], workers: int, environment: dict[str, str]) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="onewriter-sqlites-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-n", str(workers)]
        command += [f"--junitxml={report}", *tests]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode not in (0, 1) or not report.exists():
            return Outcome(failed=1, text=ran.stdout + ran.stderr)
        cases = list(ET.parse(report).iter("testcase"))
        bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        left_out = skipped(report)
        unexpected = sorted(left_out - allowed(Path(__file__).with_name("allowed_skips.txt")))
    text = ran.stdout + ran.stderr if bad else ""
    text += "".join(f"skipped, and not in allowed_skips.txt: {test}\n" for test in unexpected)
    return Outcome(len(cases) - len(bad) - len(left_out), len(bad) + len(unexpected), text)


def cpu_seconds() -> float:
    """Of processes that have ended: the same however much else the machine does."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=[*VERSIONS], metavar="VERSION[,OPTION=VALUE...]")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    runs = [text.split(",") for text in arguments.versions]
    if unknown := [version for version, *_ in runs if version not in VERSIONS]:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(VERSIONS)}")
    print(f"{'SQLite':8} {'options':50} {'passed':>7} {'failed':>7} {'CPU s':>6}", flush=True)
    failed = missing = False
    for version, *options in runs:
        begin = f"{version:8} {', '.join(options) or 'as Debian builds it':50}"
        try:
            environment = {
                **os.environ,
                "LD_LIBRARY_PATH": str(library(version, options)),
                "PYTHONPATH": str(ROOT / "src"),
            }
            check_loaded(version, options, environment)
        except CannotBeHadError as error:
            print(f"{begin} cannot be had: {error}", flush=True)
            missing = True
            continue
        began = cpu_seconds()
        outcome = run_tests(arguments.tests, arguments.workers, environment)
        print(f"{begin} {outcome.passed:7} {outcome.failed:7} {cpu_seconds() - began:6.0f}", flush=True)
        print(outcome.text, end="", flush=True)
        failed |= outcome.failed > 0
    return 1 if failed else 3 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
