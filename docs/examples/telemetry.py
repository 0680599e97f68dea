"""Spans for OpenTelemetry: each job's wait in the queue, and its run.

    DbWriter(path, on_event=Spans(trace.get_tracer("app.db")))

A job that its caller waits for is part of the caller's trace. One that was queued by ``enqueue`` may run long after
that trace has ended: it begins a trace of its own, with a link to the first.
"""

from __future__ import annotations

import time
import weakref

from opentelemetry import context, trace

from onewriter import Ticket
from onewriter.events import BatchEnded, Event, JobSubmitted

NANOSECONDS = 1_000_000_000


class Spans:
    """The hook. ``JobSubmitted`` is told in the thread, and the context, of the call: that is where the span starts."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._submitted: weakref.WeakKeyDictionary[Ticket, tuple[int, context.Context, bool]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, event: Event) -> None:
        if isinstance(event, JobSubmitted):
            self._submitted[event.ticket] = time.time_ns(), context.get_current(), event.waits
        elif isinstance(event, BatchEnded):
            for ticket in event.tickets:
                if ticket in self._submitted:
                    self._tell(ticket, *self._submitted.pop(ticket))

    def _tell(self, ticket: Ticket, began: int, caller: context.Context, waits: bool) -> None:
        queued, lock_wait, run, commit = ticket.timings
        links = [] if waits else [trace.Link(trace.get_current_span(caller).get_span_context())]
        parent = caller if waits else context.Context()
        attributes = {"db.system": "sqlite", "onewriter.label": ticket.label, "code.location": ticket.called_from}
        started = began + int((queued + lock_wait) * NANOSECONDS)
        ended = started + int(run * NANOSECONDS)
        whole = self._tracer.start_span(ticket.label, parent, attributes=attributes, links=links, start_time=began)
        inside = trace.set_span_in_context(whole)
        self._tracer.start_span("queue wait", inside, start_time=began).end(started)
        self._tracer.start_span("run", inside, start_time=started).end(ended)
        error = ticket.exception()
        if error is not None:
            whole.record_exception(error, timestamp=ended)
            whole.set_status(trace.StatusCode.ERROR, str(error))
        whole.end(ended + int(commit * NANOSECONDS))
