"""All that is said of a run, as JSON and as a table.

Names and meanings in the JSON are those of ``vllm bench serve --save-result`` where it has them:
times in ms, rates by second. ``duration`` is from the first request's sending to the last one's
end; latencies are of requests that are whole, failures are counted by kind beside them, and tokens
of failed answers are in no rate. Pure but for what is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from moeserve.bench.serving import statistics
from moeserve.bench.serving.outcomes import Outcome
from moeserve.bench.serving.slos import Slo, kept_by
from moeserve.bench.serving.statistics import Spread, spread

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between messages",
    "e2el": "whole answer",
}
# Timers of the loop are as fine as this: less is no lateness that could be helped.
_TIMER_S = 0.002
_SPOILS = 0.1  # a share of the median TTFT
_BUSY = 0.8  # of one core


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Of one run; ``cpu_s`` is what this process took for it, ``resent`` how many requests went out
    again because a server had closed an idle connection."""

    outcomes: tuple[Outcome, ...]
    slos: tuple[Slo, ...]
    percentiles: tuple[float, ...]
    cpu_s: float
    settings: Mapping[str, Any]
    resent: int = 0

    @property
    def whole(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.ok]

    @property
    def duration_s(self) -> float:
        return statistics.duration(self.outcomes)

    def failures(self) -> dict[str, int]:
        """By kind, the most frequent first."""
        return dict(Counter(o.failure for o in self.outcomes if not o.ok).most_common())

    def examples(self) -> dict[str, str]:
        """What the first failure of each kind said."""
        found: dict[str, str] = {}
        for outcome in self.outcomes:
            if not outcome.ok:
                found.setdefault(outcome.failure, outcome.detail)
        return found

    def latency(self, metric: str) -> Spread:
        """Seconds."""
        if metric == "itl":
            return self._spread(gap for o in self.outcomes for gap in o.itl_s)
        return self._spread(getattr(o, f"{metric}_s") for o in self.outcomes)

    def lag(self) -> Spread:
        """Seconds that requests were sent late: our own error."""
        return self._spread(o.lag_s for o in self.outcomes)

    def tokens_per_message(self) -> float:
        messages = sum(len(o.message_s) for o in self.whole)
        return sum(o.output_tokens for o in self.whole) / messages if messages else 0.0

    def warnings(self) -> list[str]:
        """What makes these figures say less than they seem to."""
        return list(_warnings(self))

    def _spread(self, values: Iterable[float | None]) -> Spread:
        return spread([v for v in values if v is not None], self.percentiles)

    def to_json(self) -> dict[str, Any]:
        whole, duration_s = self.whole, self.duration_s
        rate = 1 / duration_s if duration_s else 0.0
        inputs = sum(o.input_tokens for o in whole)
        outputs = sum(o.output_tokens for o in whole)
        levels = statistics.outstanding(self.outcomes)
        shown: dict[str, Any] = {
            **self.settings,
            "duration": duration_s,
            "completed": len(whole),
            "failed": len(self.outcomes) - len(whole),
            "failures": self.failures(),
            "failure_examples": self.examples(),
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "total_cached_tokens": sum(o.cached_tokens for o in whole),
            "request_throughput": len(whole) * rate,
            "output_throughput": outputs * rate,
            "total_token_throughput": (inputs + outputs) * rate,
            "max_concurrent_requests": max((level for _, level in levels), default=0),
            "mean_concurrent_requests": statistics.mean_outstanding(self.outcomes),
            "tokens_per_message": self.tokens_per_message(),
        }
        if self.slos:
            kept = kept_by(self.outcomes, self.slos)
            total = len(self.outcomes) or 1
            shown["request_goodput"] = kept * rate
            shown["slo_attainment"] = kept / total
            shown["slos"] = {
                slo.metric: {
                    "limit_ms": slo.limit_s * 1e3,
                    "attainment": kept_by(self.outcomes, [slo]) / total,
                }
                for slo in self.slos
            }
        for metric in LATENCIES:
            shown |= _in_ms(metric, self.latency(metric))
        shown |= _in_ms("send_lag", self.lag())
        shown |= {"client_cpu_s": self.cpu_s, "resent": self.resent, "warnings": self.warnings()}
        return shown


def _in_ms(name: str, found: Spread) -> dict[str, float]:
    at = {f"p{p:g}_{name}_ms": value * 1e3 for p, value in found.percentiles.items()}
    return {
        f"mean_{name}_ms": found.mean * 1e3,
        f"median_{name}_ms": found.percentiles[50.0] * 1e3,
        f"std_{name}_ms": found.std * 1e3,
        f"max_{name}_ms": found.most * 1e3,
        **at,
    }


def _warnings(report: LoadReport) -> Iterable[str]:
    ttft_s = report.latency("ttft").percentiles[50.0]
    late_s = spread([o.lag_s for o in report.outcomes], (99.0,)).percentiles[99.0]
    if late_s > max(_TIMER_S, _SPOILS * ttft_s):
        yield (
            f"requests were sent up to {late_s * 1e3:.1f} ms late (p99), and the median TTFT is "
            f"{ttft_s * 1e3:.1f} ms: this process or host is too slow for the load; send less, or "
            "from several processes"
        )
    if report.duration_s and report.cpu_s / report.duration_s > _BUSY:
        yield (
            f"this process was busy for {report.cpu_s / report.duration_s:.0%} of the run: "
            "latencies contain its own delays"
        )
    failed = len(report.outcomes) - len(report.whole)
    if failed:
        yield f"{failed} of {len(report.outcomes)} requests failed: they are in no latency or rate"
    short = sum(o.output_tokens < o.asked_output for o in report.whole)
    if short and report.settings.get("ignore_eos"):
        yield f"{short} answers are shorter than asked for, in spite of ignore_eos"
    longer = sum(o.output_tokens > o.asked_output for o in report.whole)
    if longer:
        yield f"{longer} answers are longer than asked for"
    told = [(o.asked_input, o.input_tokens) for o in report.whole if o.asked_input]
    asked, counted = sum(a for a, _ in told), sum(c for _, c in told)
    if told and abs(counted - asked) > 0.05 * asked:
        yield f"prompts have {counted / asked:.2f} times the tokens that were asked for"
    if report.resent:
        yield f"{report.resent} requests went out again: idle connections had been closed"


def table(report: LoadReport) -> Table:
    """Latencies in ms, a line for each."""
    made = Table(title="latency, ms", title_justify="left")
    made.add_column("")
    names = [f"p{p:g}" for p in report.latency("ttft").percentiles]
    for name in ("mean", *names, "max"):
        made.add_column(name, justify="right")
    for metric, text in LATENCIES.items():
        made.add_row(f"{metric.upper()}, {text}", *_cells(report.latency(metric)))
    made.add_row("sent late", *_cells(report.lag()))
    return made


def _cells(found: Spread) -> list[str]:
    values = (found.mean, *found.percentiles.values(), found.most)
    return [f"{value * 1e3:,.1f}" if found.count else "-" for value in values]


def lines(report: LoadReport) -> Sequence[str]:
    """What stands beside the table."""
    shown = report.to_json()
    said = [
        f"{shown['completed']} answers in {shown['duration']:.1f} s, {shown['failed']} failed: "
        f"{shown['request_throughput']:.2f} requests/s, {shown['output_throughput']:,.0f} output "
        f"tokens/s, {shown['total_token_throughput']:,.0f} tokens/s with prompts",
        f"{shown['total_input_tokens']:,} prompt tokens, of them {shown['total_cached_tokens']:,} "
        f"from caches; {shown['total_output_tokens']:,} output tokens, "
        f"{shown['tokens_per_message']:.2f} in a message",
        f"outstanding: {shown['mean_concurrent_requests']:.1f} on average, "
        f"{shown['max_concurrent_requests']} at most",
    ]
    if report.slos:
        parts = ", ".join(
            f"{name} <= {slo['limit_ms']:g} ms {slo['attainment']:.1%}"
            for name, slo in shown["slos"].items()
        )
        said.append(
            f"goodput {shown['request_goodput']:.2f} requests/s: {shown['slo_attainment']:.1%} "
            f"keep all limits ({parts})"
        )
    for kind, count in shown["failures"].items():
        example = shown["failure_examples"][kind]
        said.append(f"failed: {count} x {kind}" + (f" ({example})" if example else ""))
    said += [f"warning: {warning}" for warning in shown["warnings"]]
    return said
