"""A forecast as rows for people; ``ForecastReport.to_json`` says the same to programs."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from moeserve.forecast.predictions import ForecastReport

NAMES = {
    "process": "interpreter and libraries",
    "trunk": "layers without experts",
    "embedding": "embedding",
    "head": "head",
    "experts": "routed experts",
    "kv": "KV",
    "swap": "KV of preempted requests",
    "draft": "the draft model",
    "scratch": "a step",
}
SHOWN = 5


def tables(report: ForecastReport) -> Iterator[Table | str]:
    """What fits, then the workloads, then what would give more."""
    yield memory_table(report)
    if not report.fits:
        yield (
            f"a budget of {mib(report.budget)} does not hold it: the least is {mib(report.least)}"
        )
        return
    if report.in_memory < 1:
        yield (
            f"{report.in_memory:.0%} of the experts are in memory, the others are read from disk "
            f"as steps need them"
        )
    if report.calibration is None:
        yield (
            "not measured yet, so nothing is predicted: moeserve doctor --calibrate measures this "
            "host in seconds; with --model it does so for that model"
        )
        return
    yield f"predicted with: {report.calibration}"
    yield workload_table(report)
    if report.alternatives:
        yield alternative_table(report)


def memory_table(report: ForecastReport) -> Table:
    made = Table(title=f"memory, of {mib(report.budget)}", title_justify="left")
    made.add_column("what")
    made.add_column("MiB", justify="right")
    for name, text in NAMES.items():
        made.add_row(text, f"{getattr(report.parts, name) / 2**20:,.1f}")
    made.add_row("in all", f"{report.parts.total / 2**20:,.1f}")
    return made


def workload_table(report: ForecastReport) -> Table:
    title = f"prompt {report.prompt}, output {report.output} tokens"
    made = Table(title=title, title_justify="left")
    for head in ("batch", "at once", "tokens/s", "TTFT", "TPOT", "bound", "binds"):
        made.add_column(head, justify="left" if head == "binds" else "right")
    for w in report.workloads:
        busy = ", ".join(f"{name} {share:.0%}" for name, share in w.busy.items() if share >= 0.01)
        made.add_row(
            str(w.batch),
            str(w.concurrent),
            number(w.generated_per_s),
            f"{w.ttft_s * 1e3:,.0f} ms",
            f"{w.tpot_s * 1e3:,.1f} ms",
            number(w.bound),
            f"{w.binding} (busy: {busy})",
        )
    return made


def alternative_table(report: ForecastReport) -> Table:
    made = Table(title="what would give more, in tokens/s", title_justify="left")
    made.add_column("change")
    for w in report.workloads:
        made.add_column(f"batch {w.batch}", justify="right")
    for other in report.alternatives[:SHOWN]:
        cells = [
            f"{number(rate)} ({rate / w.generated_per_s:.2f}x)"
            for rate, w in zip(other.generated_per_s, report.workloads, strict=True)
        ]
        made.add_row(other.change, *cells)
    return made


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
