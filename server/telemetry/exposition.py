"""Metrics in the small forms that this server needs: plain numbers, and counts by bucket."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric


class Distribution:
    """How often values fell into each bucket, and their sum. For one thread: it takes no lock.

    `bounds`: upper bounds of the buckets, ascending; a last one without a bound is added.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, text: str, labels: dict[str, str]) -> Metric:
        return histogram(name, text, labels, self._bounds, self._counts, self._sum)


def histogram(
    name: str, text: str, labels: dict[str, str], bounds: Sequence[float], counts: Sequence[int], total: float
) -> Metric:
    """`counts`: of each bucket alone, one more than `bounds`; `total`: the sum of all values."""
    buckets, below = [], 0
    for bound, count in zip([*map(float, bounds), "+Inf"], counts, strict=True):
        below += count
        buckets.append((str(bound), below))
    family = HistogramMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), buckets, total)
    return family


def gauge(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels or ()))
    family.add_metric(list((labels or {}).values()), value)
    return family


def counter(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    family = CounterMetricFamily(name, text, labels=list(labels or ()))
    family.add_metric(list((labels or {}).values()), value)
    return family
