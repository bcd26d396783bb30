"""Counters that parts of the program keep, as metrics: each field of their dataclasses is one.

A part counts in a dataclass of its own, where things happen, and is added here once under its name:
field ``sent_bytes`` of ``kv`` is then ``moeserve_kv_sent_bytes_total``. Nothing is listed twice, so
no field is without its metric. The help text of each is the docstring of its class, which says what
the fields count.

Numbers become counters, or gauges where they are of now and may fall. Mappings of numbers get a
label ``kind``, True and False are numbers, and fields that are neither (a lock) are passed over.
Names that end in ``_s`` are seconds and are spelled so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from moeserve.observe.families import PREFIX

KIND = "kind"


@dataclass(frozen=True, slots=True)
class _Part:
    counts: Callable[[], Any]
    now: frozenset[str]


class CountedParts:
    """The parts of a process, by name."""

    def __init__(self) -> None:
        self._parts: dict[str, _Part] = {}

    def add(self, name: str, counts: Callable[[], Any], now: Collection[str] = ()) -> None:
        """``counts`` gives the dataclass whenever it is asked, from the thread of the scrape;
        ``now`` are the fields that may fall."""
        assert name not in self._parts, f"two parts count as {name!r}"
        self._parts[name] = _Part(counts, frozenset(now))

    def collect(self) -> Iterator[Metric]:
        """A family for each field of each part."""
        for name, part in self._parts.items():
            yield from counted_families(name, part.counts(), part.now)

    def totals(self) -> dict[str, float]:
        """Every number by name, those of a mapping summed up."""
        return {
            f"{part}_{name}": sum(value.values()) if isinstance(value, Mapping) else value
            for part, kept in self._parts.items()
            for name, value in _numbers(kept.counts())
        }


def counted_families(part: str, counts: Any, now: Collection[str] = ()) -> Iterator[Metric]:
    """A family for each field that is a number or a mapping of numbers."""
    text = " ".join((type(counts).__doc__ or type(counts).__name__).split())
    for name, value in _numbers(counts):
        kind = GaugeMetricFamily if name in now else CounterMetricFamily
        spelled = f"{name[:-2]}_seconds" if name.endswith("_s") else name
        labels = [KIND] if isinstance(value, Mapping) else []
        family = kind(f"{PREFIX}{part}_{spelled}", f"{name}: {text}", labels=labels)
        for label, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
            family.add_metric([] if label is None else [str(label)], number)
        yield family


def _numbers(counts: Any) -> Iterator[tuple[str, float | Mapping[Any, float]]]:
    for field in fields(counts):
        value = getattr(counts, field.name)
        if isinstance(value, int | float):
            yield field.name, value
        elif isinstance(value, Mapping):
            yield field.name, dict(value)  # as another thread may add to it meanwhile
