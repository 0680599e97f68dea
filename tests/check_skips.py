"""Fail if a test was skipped or xfailed that allowed_skips.txt does not list: ``check_skips.py JUNIT_XML``."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def skipped(report: Path) -> set[str]:
    """The ids ``package.module::test`` of the tests that did not run to their end."""
    cases = ET.parse(report).iter("testcase")
    return {f"{c.get('classname')}::{c.get('name')}" for c in cases if c.find("skipped") is not None}


def allowed(listing: Path) -> set[str]:
    """The ids in ``listing``: each line is ``test id: reason``; # begins a comment."""
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    return {line.partition(": ")[0].strip() for line in lines if line.strip() and not line.startswith("#")}


def main(report: str) -> int:
    unexpected = sorted(skipped(Path(report)) - allowed(Path(__file__).with_name("allowed_skips.txt")))
    for test in unexpected:
        print(f"skipped, and not in allowed_skips.txt: {test}")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
