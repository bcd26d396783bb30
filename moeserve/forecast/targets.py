"""Targets of latency that a forecast says would be missed."""

from __future__ import annotations

from collections.abc import Iterator

from moeserve.config.steps import StepOptions
from moeserve.forecast.predictions import ForecastReport

SMALLER = "give a larger target, or fewer sequences at once (--max-num-seqs)"


def missed_targets(report: ForecastReport, options: StepOptions) -> Iterator[str]:
    """One sentence for each workload and target; nothing where no speed is predicted."""
    for found in report.workloads:
        said = f"{found.batch} requests at once are predicted to take"
        if options.tpot_target is not None and 1e3 * found.tpot_s > options.tpot_target:
            took = f"{1e3 * found.tpot_s:.0f} ms between tokens"
            yield f"--tpot-target {options.tpot_target:g}: {said} {took}; {SMALLER}"
        if options.ttft_target is not None and 1e3 * found.ttft_s > options.ttft_target:
            took = f"{1e3 * found.ttft_s:.0f} ms to the first token"
            yield f"--ttft-target {options.ttft_target:g}: {said} {took}; {SMALLER}"
