"""Curves of long runs: bounded, and their buckets are the means, least and most of the values they stand for."""

import random
import statistics

import pytest

from benthic.report.course import MOST_BUCKETS, Curve, read_course


@pytest.mark.parametrize(
    "count", [1, 2, MOST_BUCKETS - 1, MOST_BUCKETS, MOST_BUCKETS + 1, 5 * MOST_BUCKETS + 3, 20_001]
)
def test_buckets_stand_for_all_values(count):
    draw = random.Random(count)
    values = [draw.gauss(3, 2) for _ in range(count)]
    curve = Curve()
    for step, value in enumerate(values, start=1):
        curve.add(step, value)
    assert len(curve.buckets) <= MOST_BUCKETS
    assert sum(bucket.values for bucket in curve.buckets) == count
    assert len({bucket.values for bucket in curve.buckets[:-1]}) <= 1
    assert curve.last == values[-1]
    for bucket in curve.buckets:
        part = values[bucket.first - 1 : bucket.last]
        assert len(part) == bucket.values
        assert bucket.mean == pytest.approx(statistics.fmean(part))
        assert (bucket.least, bucket.most) == (min(part), max(part))


def test_a_missing_file_has_no_course(tmp_path):
    assert read_course(tmp_path / "metrics.jsonl") == {}
