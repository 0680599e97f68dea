"""Tables for the tests of statements."""

from __future__ import annotations

import pytest

from helpers import CREATE
from onewriter import DbWriter


@pytest.fixture
def names_db(any_db: DbWriter) -> DbWriter:
    """An open gateway, with its writer thread and without, and tables of names whose triggers write too."""
    any_db.run_script(CREATE)
    return any_db
