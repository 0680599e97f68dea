"""Histograms and percentiles."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onewriter import DbWriter
from onewriter.base.tally import BOUNDS, UNCOUNTED, Histogram, Tally, Times


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.floats(0, 100), max_size=20), max_size=5), st.sampled_from([0, 1, 50, 90, 99, 100]))
def test_a_histogram_counts_as_one_by_one(batches: list[list[float]], percent: int) -> None:
    histogram, values = Histogram(), [value for batch in batches for value in batch]
    for batch in batches:
        histogram.add(list(batch))
    latency = histogram.latency()
    assert latency.count == len(values)
    assert latency.sum == pytest.approx(sum(values))
    assert latency.max == max(values, default=0.0)
    assert latency.buckets == tuple((bound, sum(value <= bound for value in values)) for bound in BOUNDS)
    if values:
        wanted = sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]
        assert wanted <= latency.percentile(percent) <= max(5 * wanted / 2, BOUNDS[0])


def test_a_percentile_is_between_0_and_100(db: DbWriter) -> None:
    for percent in (-1, 101):
        with pytest.raises(ValueError, match="percent"):
            db.stats().run.percentile(percent)


def test_what_a_batch_has_waited_for_the_lock_is_not_counted_as_waiting_in_the_queue() -> None:
    tally, times = Tally(), Times()
    times.lock_wait = 3.0
    tally.add_batch([(0.0, 5.0, 6.0)], times, 1)
    tally.add_batch([(0.0, 1.0, 2.0)], Times(), 1)
    tally.count()
    assert (tally.queue_wait.latency().max, tally.queue_wait.latency().sum) == (2.0, 3.0)


def test_batches_are_counted_many_at_once_and_not_kept_for_ever() -> None:
    tally = Tally()
    tally.add_batch([(0.0, 0.0, 0.0)], Times(), 1)
    assert tally.commits == 0
    tally.add_batch([(0.0, 0.0, 0.0)] * UNCOUNTED, Times(), 1)
    assert tally.commits == 2
