"""Plots of a plan: expert loads, device balance before and after, co-activation, traffic.

PNG files and one HTML report that needs nothing beside it. matplotlib is imported here only.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.errors import PlacementError
from moeserve.placement.cost import device_loads
from moeserve.placement.layer_use import layer_uses
from moeserve.placement.plan import EMPTY, Plan, contiguous, with_slots
from moeserve.placement.routing import Routing
from moeserve.placement.solvers.dp import affinity

F64 = NDArray[np.float64]


def coactivation(topk_TK: NDArray[np.int32], experts: int) -> F64:
    """[E, E] share of the layer's tokens that use both experts."""
    used_TE = np.zeros((len(topk_TK), experts), np.float32)
    for k in range(topk_TK.shape[1]):
        valid = topk_TK[:, k] >= 0
        used_TE[np.flatnonzero(valid), topk_TK[valid, k]] = 1
    both_EE = (used_TE.T @ used_TE).astype(np.float64) / max(1, len(topk_TK))
    np.fill_diagonal(both_EE, 0)
    return both_EE


def device_traffic(plan: Plan, topk_TLK: NDArray[np.int32]) -> F64:
    """[D, D] share of token-layers that use both devices."""
    both_DD = np.zeros((plan.num_devices, plan.num_devices))
    for use in layer_uses(plan, topk_TLK):
        used_TD = use.used_TD.astype(np.float32)
        both_DD += used_TD.T @ used_TD
    return both_DD / (len(topk_TLK) * plan.num_layers)


def matrices(plan: Plan, routing: Routing, layer: int) -> dict[str, tuple[F64, str, str]]:
    """Title -> (matrix, axis across, axis down) of everything there is to show."""
    if not 0 <= layer < plan.num_layers:
        raise PlacementError(f"layer {layer}: the plan has {plan.num_layers}")
    load_LE = routing.mixed_LE * routing.num_experts
    before = with_slots(
        plan,
        contiguous(
            layers=plan.num_layers,
            experts=plan.num_experts,
            slots=plan.num_slots,
            devices=plan.num_devices,
        ),
    )
    fair = plan.num_devices / plan.num_experts
    shown = {
        "expert load over mean": (load_LE, "expert", "layer"),
        "device load over mean, contiguous": (
            device_loads(before, load_LE) * fair, "device", "layer",
        ),
        "device load over mean, this plan": (
            device_loads(plan, load_LE) * fair, "device", "layer",
        ),
    }  # fmt: skip
    if routing.has_tokens:
        topk_TLK = routing.tokens_TLK
        order = _filled(plan.expert_LS[layer])
        both_EE = coactivation(topk_TLK[:, layer], plan.num_experts)[np.ix_(order, order)]
        shown[f"co-activation in layer {layer}, by slot"] = (both_EE, "slot", "slot")
        if layer + 1 < plan.num_layers:
            pairs_EE = affinity(topk_TLK[:, layer : layer + 2], plan.num_experts)[0]
            after = _filled(plan.expert_LS[layer + 1])
            title = f"affinity of layer {layer} and the next, by slot"
            shown[title] = (pairs_EE[np.ix_(order, after)], "slot after", "slot")
        shown["devices used together"] = (device_traffic(plan, topk_TLK), "device", "device")
    return shown


def _filled(expert_S: NDArray[np.int32]) -> NDArray[np.int32]:
    filled_S: NDArray[np.int32] = expert_S[expert_S != EMPTY]
    return filled_S


def draw(matrix: F64, title: str, across: str, down: str) -> bytes:
    """A heat map as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(matrix, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=axes)
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def report(pictures: Mapping[str, bytes], figures: Mapping[str, Any]) -> str:
    """One HTML page with the figures and every picture in it."""
    images = "\n".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}"></figure>'
        for title, png in pictures.items()
    )
    table = html.escape(json.dumps(figures, indent=2))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Placement report</title>'
        "<style>body{font:15px system-ui;max-width:60rem;margin:2rem auto}img{max-width:100%}"
        "figure{margin:2rem 0}pre{background:#f4f4f4;padding:1rem;overflow:auto}</style>"
        f"<h1>Placement report</h1>{images}<h2>Figures</h2><pre>{table}</pre></html>\n"
    )


def write(
    folder: Path, plan: Plan, routing: Routing, figures: Mapping[str, Any], layer: int
) -> list[str]:
    """PNG files and ``report.html`` in ``folder``; their names."""
    pictures = {
        title: draw(matrix, title, across, down)
        for title, (matrix, across, down) in matrices(plan, routing, layer).items()
    }
    page = report(pictures, figures)
    names = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for title, png in pictures.items():
            name = "".join(c if c.isalnum() else "_" for c in title) + ".png"
            (folder / name).write_bytes(png)
            names.append(name)
        (folder / "report.html").write_text(page, encoding="utf-8")
    except OSError as cause:
        raise PlacementError(f"cannot write into {folder}: {cause.strerror}") from cause
    return [*names, "report.html"]
