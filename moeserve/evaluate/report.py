"""What an evaluation found, as JSON and as tables. ``docs/evaluation.md`` describes the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from moeserve.evaluate.arithmetic import Exam, Marks
from moeserve.evaluate.compare import Comparison
from moeserve.evaluate.divergence import Divergence, Estimate

FORMAT = "moeserve.evaluation.v1"


@dataclass(frozen=True, slots=True)
class RunVariant:
    """A checkpoint and how it is run."""

    model: str
    dtype: str
    quantization: str
    quantize_attention: bool
    kv_dtype: str

    def __str__(self) -> str:
        shown = {"auto": "as stored", "none": "not quantised"}
        words = [shown.get(self.quantization, self.quantization)]
        if self.quantization not in shown and not self.quantize_attention:
            words.append("attention in floats")
        if self.dtype != "auto":
            words.append(f"floats {self.dtype}")
        if self.kv_dtype != "auto":
            words.append(f"KV {self.kv_dtype}")
        return f"{self.model} ({', '.join(words)})"


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """``exams`` begin with that of all problems; where there are none ``no_exams`` says why."""

    reference: RunVariant
    tested: RunVariant
    window: int
    seed: int
    comparison: Comparison
    exams: tuple[Exam, ...]
    no_exams: str

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "reference": asdict(self.reference),
            "tested": asdict(self.tested),
            "window": self.window,
            "seed": self.seed,
            **_divergence_json(self.comparison.whole),
            "texts": [
                {"text": text, **_divergence_json(part)}
                for text, part in self.comparison.by_text.items()
            ],
            "routing": _routing_json(self.comparison),
            "arithmetic": [_exam_json(exam) for exam in self.exams] or None,
        }


def _divergence_json(d: Divergence) -> dict[str, Any]:
    return {
        "tokens": d.tokens,
        "perplexity": {
            "reference": d.reference_perplexity.to_json(),
            "tested": d.tested_perplexity.to_json(),
            "ratio": d.ratio.to_json(),
        },
        "kl": {
            "mean": d.kl.to_json(),
            "quantiles": {f"{share:g}": nats for share, nats in d.kl_quantiles.items()},
            "max": d.kl_max,
        },
        "top1_agreement": d.same_top.to_json(),
        "delta_p": {"mean": d.delta_p.to_json(), "rms": d.rms_delta_p},
    }


def _routing_json(c: Comparison) -> dict[str, Any] | None:
    if not c.routing:
        return None
    n = len(c.routing)
    return {
        "tokens": c.routed_tokens,
        "equal": sum(layer.equal for layer in c.routing) / n,
        "overlap": sum(layer.overlap for layer in c.routing) / n,
        "layers": [asdict(layer) for layer in c.routing],
    }


def _exam_json(exam: Exam) -> dict[str, Any]:
    def marks(m: Marks) -> dict[str, Any]:
        return {"right": m.right, "share": m.share, "interval": list(m.interval)}

    return {
        "kind": exam.kind,
        "problems": exam.reference.problems,
        "reference": marks(exam.reference),
        "tested": marks(exam.tested),
        "only_reference": exam.only_reference,
        "only_tested": exam.only_tested,
        "p_value": exam.p_value,
        "within_noise": exam.within_noise,
    }


def render(report: EvaluationReport, console: Console) -> None:
    """For people."""
    whole, exams = report.comparison.whole, report.exams
    kl = whole.kl_quantiles
    lines = [
        f"tested      {report.tested}, perplexity {_plain(whole.tested_perplexity, 4)}",
        f"reference   {report.reference}, perplexity {_plain(whole.reference_perplexity, 4)}",
        f"text        {whole.tokens} tokens scored, in windows of {report.window}",
        f"KL          median {kl[0.5]:.2e}, 99 % {kl[0.99]:.2e}, 99.9 % {kl[0.999]:.2e}, "
        f"max {whole.kl_max:.2e} nats",
        f"delta p     mean {whole.delta_p.value:+.3%} ± {whole.delta_p.error:.3%}, "
        f"RMS {whole.rms_delta_p:.3%}",
    ]
    if exams:
        both = f"tested {_marks(exams[0].tested)}, reference {_marks(exams[0].reference)}"
        lines.append(f"arithmetic  {both}: {_verdict(exams[0])}")
    else:
        lines.append(f"arithmetic  none: {report.no_exams}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    tables = [_texts_table(report.comparison)]
    if report.comparison.routing:
        tables.append(_routing_table(report.comparison))
    if exams:
        tables.append(_exams_table(exams[1:]))
    for table in tables:
        console.print()
        console.print(table)


def _texts_table(c: Comparison) -> Table:
    table = _table("text", "tokens", "perplexity ratio", "mean KL", "same top")
    rows = list(c.by_text.items())
    for text, d in [*rows, ("all", c.whole)] if len(rows) > 1 else rows:
        table.add_row(
            text,
            f"{d.tokens}",
            _plain(d.ratio, 5),
            _plain(d.kl, 6),
            f"{d.same_top.value:.2%} ± {d.same_top.error:.2%}",
        )
    return table


def _routing_table(c: Comparison) -> Table:
    table = _table(f"routing of {c.routed_tokens} tokens", "same experts", "experts shared")
    for layer in c.routing:
        table.add_row(f"layer {layer.layer}", f"{layer.equal:.2%}", f"{layer.overlap:.2%}")
    return table


def _exams_table(exams: Sequence[Exam]) -> Table:
    table = _table("arithmetic", "problems", "tested", "reference", "either alone")
    for exam in exams:
        table.add_row(
            exam.kind,
            f"{exam.tested.problems}",
            f"{exam.tested.share:.1%}",
            f"{exam.reference.share:.1%}",
            f"{exam.only_tested}, {exam.only_reference}",
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _plain(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"


def _marks(marks: Marks) -> str:
    low, high = marks.interval
    return f"{marks.right}/{marks.problems} = {marks.share:.1%} [{low:.1%}, {high:.1%}]"


def _verdict(exam: Exam) -> str:
    verdict = "within noise" if exam.within_noise else "more than noise"
    return f"{verdict} (p {exam.p_value:.2g})"
