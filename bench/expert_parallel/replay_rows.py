"""What was measured of a replay, beside what was predicted: rows, and their tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expert_parallel.group import TrafficVariant
from expert_parallel.predicted import PredictedStep
from expert_parallel.record_bytes import copy_bytes
from expert_parallel.replay_case import Replay
from expert_parallel.replay_plans import BASE, RECIPES
from expert_parallel.schemes import Scheme, SchemeSamples
from rich.table import Table

from moeserve.testbed.links import show_rate


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """A plan at a rate. Copies are one way, per token and layer, to ranks of other hosts and of the
    own; bytes of a step, both ways, of all ranks. Seconds are median, least and greatest median of
    a round, and of each round. ``waiting`` is the share of a step in which even the rank that waits
    least waits. Saved are shares of the first plan's: of the predicted bytes between hosts, of
    those on the busiest link, which are what a step waits for, and of the step, round by round;
    ``least_saved`` is of the fastest step of all, which a busy machine disturbs least."""

    model: str
    bed: str
    plan: str
    rate: str
    held_out: bool
    drawn: bool
    inter_copies: float
    intra_copies: float
    inter_bytes: float
    predicted_inter_bytes: float
    intra_bytes: float
    predicted_intra_bytes: float
    link_bytes: float
    step_s: tuple[float, float, float]
    predicted_step_s: float
    round_s: Sequence[float]
    waiting: float
    bytes_saved: float
    busiest_saved: float
    time_saved: float
    least_saved: float

    @property
    def kept(self) -> float | None:
        """Which part of the share of bytes that is saved is saved of the step."""
        return self.time_saved / self.bytes_saved if self.bytes_saved > 0 else None


def rows_of(
    replay: Replay,
    rates: Sequence[int | None],
    by_rate: Sequence[Mapping[Scheme, SchemeSamples]],
    on_links: Mapping[str, float],
) -> list[ReplayRow]:
    """``rates`` begin with the unlimited one; ``on_links`` is what the kernel counts in a step."""
    steps = range(replay.repetitions.steps)
    predicted = {name: [replay.predicted(name, step) for step in steps] for name in replay.plans}
    schemes = {name: Scheme(TrafficVariant(name), 1) for name in replay.plans}
    free_s = by_rate[0][schemes[BASE]].seconds
    return [
        row_of(
            replay, name, rate, found[scheme],
            (found[schemes[BASE]], predicted[BASE]), predicted[name], free_s, on_links[name],
        )
        for rate, found in zip(rates, by_rate, strict=True)
        for name, scheme in schemes.items()
    ]  # fmt: skip


def row_of(
    replay: Replay,
    plan: str,
    rate: int | None,
    samples: SchemeSamples,
    first: tuple[SchemeSamples, Sequence[PredictedStep]],
    predicted: Sequence[PredictedStep],
    free_s: float,
    on_links: float,
) -> ReplayRow:
    recording, source = replay.recording, replay.recording.source
    base, base_predicted = first
    each = sum(copy_bytes(source.hidden, recording.top_k))
    inter_bytes = statistics.mean(t.inter_bytes for t in samples.steps)
    token_layers = sum(t.token_layers for t in samples.steps)
    inter_copies = sum(t.inter_copies for t in samples.steps) / token_layers
    links_s = [p.seconds(source.hidden, recording.top_k, rate) for p in predicted]
    busiest, base_busiest = (
        sum(int(p.busiest_L.sum()) for p in of) for of in (predicted, base_predicted)
    )
    inter, base_inter = (statistics.mean(p.inter for p in of) for of in (predicted, base_predicted))
    pairs = zip(base.round_s, samples.round_s, strict=True)
    return ReplayRow(
        model=source.name,
        bed=str(replay.shape),
        plan=plan,
        rate=show_rate(rate),
        held_out=recording.held_out,
        drawn=recording.drawn,
        inter_copies=inter_copies,
        intra_copies=samples.copies - inter_copies,
        inter_bytes=inter_bytes,
        predicted_inter_bytes=inter * each,
        intra_bytes=samples.sent_bytes - inter_bytes,
        predicted_intra_bytes=statistics.mean(p.intra for p in predicted) * each,
        link_bytes=on_links,
        step_s=(samples.seconds, *samples.range_s),
        predicted_step_s=free_s + statistics.median(links_s),
        round_s=samples.round_s,
        waiting=samples.waiting,
        bytes_saved=1 - inter / base_inter,
        busiest_saved=1 - busiest / base_busiest,
        time_saved=1 - statistics.median(own / theirs for theirs, own in pairs),
        least_saved=1 - samples.least_s / base.least_s,
    )


def show_rows(rows: Sequence[ReplayRow]) -> Table:
    grid = Table(title="recorded routing replayed, one microbatch", title_justify="left")
    for heading in (
        "model", "bed", "rate", "plan", "copies between hosts", "within", "kB between", "predicted",
        "on links", "kB within", "predicted", "step ms", "predicted", "waiting", "bytes saved",
        "busiest link", "time saved", "of it", "least step",
    ):  # fmt: skip
        grid.add_column(heading)
    for row in rows:
        middle, low, high = (1e3 * s for s in row.step_s)
        grid.add_row(
            row.model, row.bed, row.rate, row.plan,
            f"{row.inter_copies:.3f}", f"{row.intra_copies:.3f}",
            *(f"{b / 1e3:.0f}" for b in (row.inter_bytes, row.predicted_inter_bytes,
                                         row.link_bytes, row.intra_bytes,
                                         row.predicted_intra_bytes)),
            f"{middle:.1f} ({low:.1f}-{high:.1f})", f"{1e3 * row.predicted_step_s:.1f}",
            f"{row.waiting:.0%}", f"{row.bytes_saved:.1%}", f"{row.busiest_saved:.1%}",
            f"{row.time_saved:.1%}",
            "" if row.kept is None else f"{row.kept:.2f}", f"{row.least_saved:.1%}",
        )  # fmt: skip
    return grid


def show_ratios(rows: Sequence[ReplayRow]) -> Table:
    """Ours beside the best of the others, round by round, with replicas and without."""
    grid = Table(title="step of ours / best other's", title_justify="left")
    for heading in ("model", "bed", "rate", "replicas", "best other", "ratio"):
        grid.add_column(heading)
    for key in dict.fromkeys((row.model, row.bed, row.rate) for row in rows):
        here = [row for row in rows if (row.model, row.bed, row.rate) == key]
        for replicas in (False, True):
            alike = [row for row in here if replicas or not RECIPES[row.plan].replicas]
            best = min((r for r in alike if not RECIPES[r.plan].ours), key=lambda r: r.step_s[0])
            ours = next(
                r for r in alike if RECIPES[r.plan].ours and RECIPES[r.plan].replicas is replicas
            )
            pairs = zip(ours.round_s, best.round_s, strict=True)
            ratio = statistics.median(own / other for own, other in pairs)
            grid.add_row(*key, "yes" if replicas else "no", best.plan, f"{ratio:.3f}")
    return grid
