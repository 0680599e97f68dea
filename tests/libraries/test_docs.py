"""The pages of the documentation that need a library run, and run again."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from pages import PAGES, blocks_of, name_of, run

WITH_LIBRARIES = [
    page for page in PAGES if any(block.needs and all(map(find_spec, block.needs)) for block in blocks_of(page))
]


@pytest.mark.parametrize("page", WITH_LIBRARIES, ids=name_of)
def test_the_blocks_of_a_page_run_and_run_again(page: Path, tmp_path: Path) -> None:
    for _ in range(2):  # in a process each time: Django, say, is set up once in a process
        run(page, tmp_path, "--libraries", warnings="default")


def test_there_are_such_pages() -> None:
    assert len(WITH_LIBRARIES) >= 4
