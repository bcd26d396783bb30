"""Figures with the predicted step: what every row of the planner shows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.placement.cluster import Cluster
from moeserve.placement.plan import Plan
from moeserve.placement.report import BoundEffort, CopyBytes, figures
from moeserve.placement.routing import Routing
from moeserve.placement.step_time import PlacementRates, step_figures


def judged(
    plan: Plan,
    routing: Routing,
    cluster: Cluster,
    *,
    batch: int = 256,
    homes: str = "uniform",
    copy_bytes: CopyBytes | None = None,
    effort: BoundEffort | None = None,
    bound_L: NDArray[np.float64] | None = None,
    rates: PlacementRates | None = None,
) -> dict[str, Any]:
    """``figures``, and ``step``: a layer's time by ``rates`` (beside it; or the usual ones),
    in that of a copy inside a node."""
    found = figures(
        plan,
        routing,
        cluster,
        batch=batch,
        homes=homes,
        copy_bytes=copy_bytes,
        effort=effort,
        bound_L=bound_L,
    )
    rates = rates or PlacementRates()
    step = step_figures(plan, routing, cluster, rates, batch).step
    return found | {"step": step, "rates": asdict(rates)}
