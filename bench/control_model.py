"""What control costs a decode instance: one scheduler for all ranks beside one on each.

    python bench/control_model.py [--ranks 8 32 64 320] [--requests 96] [--step-ms 50]
                                  [--per-rank-us US] [--agreement-us US] [--central-ms MS] [--json]

The defaults are CloudMatrix-Infer's decode instance: 320 ranks of 96 requests and a step of 50 ms,
control left out. What control costs is measured elsewhere and given here; the rest is a model:

- **central**: all ranks wait while rank 0 plans, sends, collects and applies. ``--central-ms`` is
  that time at the greatest number of ranks, ``--central-request-us`` what a request costs where
  ranks are few; what is more than that grows with the square of ranks, as splitting a step over
  ranks does.
- **distributed**: every rank plans and applies its own requests, ``--per-rank-us`` a step, and the
  slowest rank holds all others up. So single ranks' times are drawn (log-normal, ``--variation`` is
  deviation over mean), with a pause of ``--pause-ms`` once in ``--pause-every`` steps of a rank, as
  a garbage collector or the operating system makes it; the greatest of all ranks' counts. The
  agreement runs while a step does, ``--agreement-us`` at the greatest number of ranks, in
  proportion at fewer; only what is longer than the step counts.

A rank makes ``--requests`` tokens a step; ``lost`` is the share of tokens/s that control takes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds; ``rate`` is tokens a second and rank."""

    ranks: int
    way: str
    control: float
    step: float
    slowest_steps: float  # 99 of 100 are shorter
    rate: float
    lost: float


@dataclass(frozen=True, slots=True)
class RankTimes:
    """How long single ranks take for control, in milliseconds."""

    mean: float
    variation: float
    pause: float
    pause_every: int

    def slowest(self, ranks: int, steps: int, seed: int) -> np.ndarray:
        """Of all ranks, for each of so many steps."""
        generator = np.random.default_rng(seed)
        sigma2 = np.log1p(self.variation**2)
        shape = steps, ranks
        drawn = generator.lognormal(np.log(self.mean) - sigma2 / 2, np.sqrt(sigma2), shape)
        drawn += self.pause * (generator.random(shape) < 1 / self.pause_every)
        return drawn.max(axis=1)


def central_ms(ranks: int, args: argparse.Namespace) -> float:
    """``--central-ms`` at the greatest number of ranks."""
    most = max(args.ranks)
    linear = args.central_request_us / 1e3 * args.requests
    square = max(0.0, args.central_ms - linear * most) / most**2
    return linear * ranks + square * ranks**2


def row_of(ranks: int, way: str, control: np.ndarray, args: argparse.Namespace) -> Row:
    """``control`` milliseconds of each step are added to it."""
    lengths = args.step_ms + control
    mean = float(lengths.mean())
    return Row(
        ranks,
        way,
        float(control.mean()),
        mean,
        float(np.percentile(lengths, 99)),
        args.requests / mean * 1e3,
        1 - args.step_ms / mean,
    )


def rows(args: argparse.Namespace) -> list[Row]:
    times = RankTimes(args.per_rank_us / 1e3, args.variation, args.pause_ms, args.pause_every)
    found = []
    for ranks in args.ranks:
        found.append(row_of(ranks, "central", np.array([central_ms(ranks, args)]), args))
        agreement = args.agreement_us / 1e3 * ranks / max(args.ranks)
        beyond = max(0.0, agreement - args.step_ms)
        control = times.slowest(ranks, args.steps, seed=ranks) + beyond
        found.append(row_of(ranks, "distributed", control, args))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python bench/control_model.py --per-rank-us 800 --agreement-us 900",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64, 320])
    parser.add_argument("--requests", type=int, default=96, help="of each rank")
    parser.add_argument("--step-ms", type=float, default=50.0, help="without control")
    parser.add_argument("--per-rank-us", type=float, default=1000.0)
    parser.add_argument("--agreement-us", type=float, default=1000.0)
    parser.add_argument("--central-ms", type=float, default=740.0)
    parser.add_argument("--central-request-us", type=float, default=7.6)
    parser.add_argument("--variation", type=float, default=0.2)
    parser.add_argument("--pause-ms", type=float, default=5.0)
    parser.add_argument("--pause-every", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=4000, help="that are drawn")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    found = rows(args)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        print(json.dumps({"settings": settings, "rows": [asdict(row) for row in found]}))
        return
    table = Table("ranks", "scheduled", "control ms", "step ms", "p99 ms", "tokens/s", "lost")
    for r in found:
        cells = f"{r.control:.2f}", f"{r.step:.2f}", f"{r.slowest_steps:.2f}", f"{r.rate:.0f}"
        table.add_row(str(r.ranks), r.way, *cells, f"{r.lost:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
