"""A report as a picture: how TTFT and TPOT are distributed, tokens/s and requests over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeserve.bench.serving.report import LoadReport
from moeserve.bench.serving.statistics import outstanding, token_rate
from moeserve.errors import ConfigError

BINS = 120


def require_figures(path: Path) -> None:
    """ConfigError where pictures cannot be drawn, before anything is measured."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as missing:
        raise ConfigError(
            f"--plot={str(path)!r}: pictures need matplotlib: pip install 'moeserve[figures]'"
        ) from missing
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot={str(path)!r}: expected .png, .svg or .pdf")


def draw(report: LoadReport, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (ttft, tpot), (tokens, requests) = figure.subplots(2, 2)
    _distribution(ttft, report, "ttft")
    _distribution(tpot, report, "tpot")
    last_s = max((o.end_s for o in report.outcomes), default=1.0) or 1.0
    bin_s = last_s / BINS
    rates = token_rate(report.outcomes, bin_s)
    tokens.stairs(rates, [i * bin_s for i in range(len(rates) + 1)], fill=True, alpha=0.6)
    tokens.set(title="output tokens/s", xlabel="s of the run", ylim=(0, None))
    levels = outstanding(report.outcomes)
    requests.step([at for at, _ in levels], [n for _, n in levels], where="post")
    failed = [o.end_s for o in report.outcomes if not o.ok]
    if failed:
        requests.plot(failed, [0] * len(failed), "x", color="C3", label="failed")
        requests.legend(fontsize="small")
    requests.set(title="requests outstanding", xlabel="s of the run", ylim=(0, None))
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot={str(path)!r}: cannot be written: {error.strerror}") from error


def _distribution(axes: Any, report: LoadReport, metric: str) -> None:
    """The share of requests up to each value; limits are drawn as lines."""
    found = (getattr(outcome, f"{metric}_s") for outcome in report.outcomes)
    values = sorted(value * 1e3 for value in found if value is not None)
    if values:
        axes.ecdf(values)
    for slo in report.slos:
        if slo.metric == metric:
            axes.axvline(slo.limit_s * 1e3, color="C3", linestyle=":")
    axes.set(title=f"{metric.upper()}: share of requests", xlabel="ms", ylim=(0, 1))
