"""The OpenTelemetry example: waits and runs are spans apart; what nobody waits for is linked, not nested."""

from __future__ import annotations

import importlib.util
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from onewriter import DbWriter

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "telemetry.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("telemetry", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_waits_and_runs_are_spans_apart(path: Path) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    with DbWriter(path, on_event=example().Spans(tracer), on_error=lambda ticket: None) as db:
        with tracer.start_as_current_span("request") as request:
            db.run("CREATE TABLE t (n PRIMARY KEY)", label="table")
            db.enqueue("INSERT INTO t VALUES (1)", label="later")
            db.flush()
            with pytest.raises(sqlite3.IntegrityError):
                db.run("INSERT INTO t VALUES (1)", label="fails")
        here = request.get_span_context()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    parts = [span for span in exporter.get_finished_spans() if span.name in ("queue wait", "run")]
    assert len(parts) == 6
    table, later, fails = spans["table"], spans["later"], spans["fails"]
    assert table.parent.span_id == fails.parent.span_id == here.span_id
    assert table.links == ()
    assert later.parent is None
    assert [link.context.span_id for link in later.links] == [here.span_id]
    assert later.context.trace_id != here.trace_id
    assert fails.status.status_code is trace.StatusCode.ERROR
    assert table.status.status_code is trace.StatusCode.UNSET
    for whole in (table, later, fails):
        wait, run = sorted(
            (span for span in parts if span.parent.span_id == whole.context.span_id), key=lambda span: span.start_time
        )
        assert (wait.name, run.name) == ("queue wait", "run")
        assert whole.start_time == wait.start_time <= wait.end_time == run.start_time <= run.end_time <= whole.end_time
