"""A model that other processes run: what the doors of a gateway serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeserve.engine.loop import ServingEngine
from moeserve.gateway.dashboard.live import Dashboard
from moeserve.gateway.service import ServedModel
from moeserve.observe.metrics import Metrics


@dataclass(frozen=True, slots=True)
class RoutedModel:
    """``served`` is what the doors show; its engine passes requests on. ``stop`` ends what reaches
    the other processes, within so many seconds, and is for any thread. ``show`` puts them
    on the dashboard and on the page of metrics."""

    served: ServedModel
    stop: Callable[[float], bool]
    show: Callable[[Dashboard, Metrics], None]

    @property
    def name(self) -> str:
        return self.served.name

    @property
    def engine(self) -> ServingEngine:
        return self.served.engine

    def close(self, timeout: float = 30.0) -> bool:
        return self.stop(timeout)
