"""One picture of an evaluation: how divergence spreads over tokens, how routing agrees by layer.

Needs matplotlib, which only the extra ``figures`` installs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from moeserve.errors import ConfigError
from moeserve.evaluate.report import EvaluationReport

# Below, a divergence is rounding: it is drawn at the left edge.
LEAST = 1e-9


def require_figures() -> None:
    """Before hours of work, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'moeserve[figures]'"
        )


def draw(report: EvaluationReport, file: Path) -> None:
    """Writes ``file`` in the format that its name ends in, PNG where it has no ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    c = report.comparison
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report.tested} against {report.reference}")
    left, right = figure.subplots(1, 2)
    kl = np.sort(np.maximum(c.kl, LEAST))
    beyond = 1 - (np.arange(len(kl)) + 0.5) / len(kl)
    left.loglog(kl, beyond)
    left.axvline(max(LEAST, c.whole.kl.value), color="tab:red", linewidth=1)
    left.set_title(f"mean {c.whole.kl.value:.2e}, same top token {c.whole.same_top.value:.2%}")
    left.set_xlabel("KL(reference || tested), nats")
    left.set_ylabel("share of tokens beyond")
    layers = [layer.layer for layer in c.routing]
    right.plot(layers, [layer.equal for layer in c.routing], "o-", label="same experts")
    right.plot(layers, [layer.overlap for layer in c.routing], "s-", label="experts shared")
    right.set_ylim(None, 1.005)
    right.set_title("routing" if layers else "routing: nothing to compare")
    right.set_xlabel("layer")
    right.set_ylabel("share of tokens, of experts")
    right.legend()
    try:
        figure.savefig(file, dpi=110, format=file.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {file}: cannot be written: {error}") from error
