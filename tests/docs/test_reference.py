"""The reference has an entry for each public name: a heading, and the signature that the code has."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest

import onewriter
from onewriter import (
    AsyncDbWriter,
    AsyncReader,
    AsyncTransaction,
    AsyncWatch,
    Checkpoint,
    CheckpointResult,
    CloseReport,
    DbWriter,
    Latency,
    Result,
    Running,
    Stats,
    Ticket,
    Timings,
    Transaction,
    Watch,
    events,
)
from onewriter.base.strict import CONNECTIONS_OWN
from pages import FENCED, ROOT, anchors_of, blocks_of

FOLDER = ROOT / "docs" / "reference"
REFERENCE = {page.name: page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md"))}
WHOLE = "\n".join(REFERENCE.values())
ENTRY = re.compile(r"^### ([\w.]+)\n\n```text\n(.+?)```$", re.MULTILINE | re.DOTALL)
ENTRIES = {  # by name, with its class: the heading and the signature
    re.split(r"[(\n]", signature, maxsplit=1)[0]: (heading, " ".join(signature.split()))
    for text in REFERENCE.values()
    for heading, signature in ENTRY.findall(text)
}
KINDS: tuple[type[Any], ...] = (
    *(DbWriter, Transaction, Ticket, Result, Watch),
    *(AsyncDbWriter, AsyncTransaction, AsyncReader, AsyncWatch),
)
RECORDS: tuple[Any, ...] = (Stats, Latency, CloseReport, Running, CheckpointResult, Timings, Checkpoint)
INNER = {  # of other files of the package, though they have no underscore
    "Ticket": {
        *("belongs_to", "describe", "withdraw", "withdraw_quietly", "arrival", "wait", "run_callbacks", "outcome"),
        *("in_stats", "logs_failure", "created_at", "started_at", "ended_at", "work"),
    },
    "Transaction": set(CONNECTIONS_OWN),  # which raise
    "AsyncReader": {"call", "lends", "expire", "leave", "drop", "end"},
}


def public_names(kind: type[Any]) -> list[str]:
    names = [name for name in dir(kind) if name[0] != "_"]
    return [f"{kind.__name__}.{name}" for name in names if name not in INNER.get(kind.__name__, ())]


NAMES = ["DbWriter", "AsyncDbWriter", *(name for kind in KINDS for name in public_names(kind))]
NAMES += ["Stats.as_dict", "Latency.percentile"]


def signature_of(name: str) -> str:
    """As it is called, without types."""
    kind, _, method = name.partition(".")
    found = getattr(onewriter, kind)
    if not method:
        return written(name, inspect.signature(found))
    member = inspect.getattr_static(found, method)
    if isinstance(member, classmethod):
        member = member.__func__
    if not inspect.isroutine(member):
        return name
    signature = inspect.signature(member)
    return written(name, signature.replace(parameters=list(signature.parameters.values())[1:]))


def written(name: str, signature: inspect.Signature) -> str:
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return f"{name}{inspect.Signature(parameters)}"


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_its_entry_with_its_signature(name: str) -> None:
    heading, signature = ENTRIES[name]
    assert heading in (name, name.rpartition(".")[2])
    assert signature.replace("( ", "(").replace(" )", ")") == signature_of(name)


def test_there_is_no_entry_for_what_is_not_there() -> None:
    assert {name for name in ENTRIES if not name.startswith(("engine", "on_connect"))} == set(NAMES)


def test_the_examples_use_each_name() -> None:
    for page, text in REFERENCE.items():
        code = "\n".join(block.text for block in blocks_of(FOLDER / page))
        for _, signature in ENTRY.findall(text):
            name = re.split(r"[(\n]", signature, maxsplit=1)[0].rpartition(".")[2]
            assert re.search(rf"\b{name}\b", code), f"{page}: {name}"


def test_every_argument_of_the_gateway_is_in_the_table() -> None:
    missing = [name for name in inspect.signature(DbWriter).parameters if f"`{name}`" not in REFERENCE["opening.md"]]
    assert missing == []


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_field_of_what_a_call_returns_is_there(kind: Any) -> None:
    fields = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else kind._fields
    assert [name for name in fields if f"`{name}`" not in WHOLE] == []
    assert f"`{kind.__name__}`" in WHOLE


def test_every_event_and_error_has_its_entry() -> None:
    kinds = [kind.__name__ for kind in events.Event.__args__]
    kinds += [name for name in onewriter.__all__ if name.endswith("Error")]
    assert [name for name in kinds if f"### {name}\n" not in WHOLE] == []
    for kind in events.Event.__args__:
        entry = WHOLE.split(f"### {kind.__name__}\n")[1].split("\n#")[0]
        assert [field.name for field in dataclasses.fields(kind) if f"`{field.name}`" not in entry] == []


def test_every_error_says_what_became_of_the_write() -> None:
    for name, entry in re.findall(r"^### (\w+Error)\n(.+?)(?=^#|\Z)", REFERENCE["errors.md"], re.MULTILINE | re.DOTALL):
        fates = r"Not committed|not committed|Rolled back|rolled back|Unknown|Nothing was changed"
        assert name == "OneWriterError" or re.search(fates, entry), name


def test_every_public_name_of_the_package_is_mentioned() -> None:
    assert [name for name in onewriter.__all__ if f"`{name}" not in WHOLE and name not in WHOLE] == []


def test_no_two_headings_of_a_page_have_one_anchor() -> None:
    for page in REFERENCE:
        anchors = anchors_of(FOLDER / page)
        assert len(set(anchors)) == len(anchors), page


def test_the_index_leads_to_every_entry() -> None:
    index = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for page, text in REFERENCE.items():
        headings = re.findall(r"^### (.+)$", FENCED.sub("", text), re.MULTILINE)
        assert [name for name in headings if f"[{name}](reference/{page}#" not in index] == []
