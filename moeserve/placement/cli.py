"""``moeserve place``: record, solve, evaluate, compare, export, plot. Needs no model and no torch.

Exit codes: 0 done; 1 bad input, nothing was written (the message names the constraint); 2 the
arguments do not parse; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

DATAFLOWS = ("replicated", "home-per-expert", "home-dedup", "migrate")
PHASES = ("prefill", "decode")
SOLVERS = (
    "auto", "balance", "eplb", "moetuner", "moetuner-ilp", "dp", "polish", "contiguous", "random",
    "lightllm",
)  # fmt: skip
FORMATS = ("sglang", "ascend", "tensorrt", "lightllm")
BAD_INPUT = 1
INTERRUPTED = 130

Subparsers = Any  # argparse's own type for these is private


def add_parser(subparsers: Subparsers) -> Subparsers:
    """Add ``place`` and its verbs, to which others may be added; each sets ``run``, a function of
    the parsed arguments."""
    place = subparsers.add_parser(
        "place",
        help="decide which device holds which expert",
        description="Plan where experts lie: balance, co-activation, affinity, with a bound.",
        epilog="exit codes: 0 done, 1 bad input (nothing written), 2 wrong arguments, "
        "130 interrupted",
    )
    verbs = place.add_subparsers(dest="verb", required=True, metavar="VERB")
    _record(verbs)
    _solve(verbs)
    _evaluate(verbs)
    _compare(verbs)
    _export(verbs)
    _plot(verbs)
    return verbs


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked; the exit code. Errors of ours become one line and code 1."""
    from moeserve.errors import MoeserveError
    from moeserve.placement import commands

    try:
        verb = getattr(commands, arguments.verb)
        result: dict[str, Any] = verb(arguments)
    except MoeserveError as error:
        if arguments.json:
            print(json.dumps({"error": error.message}))
        print(f"moeserve place {arguments.verb}: {error.message}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(result))
    else:
        commands.show(arguments.verb, result)
    return 0


def main(argv: list[str] | None = None) -> int:
    """``python -m moeserve.placement.cli place ...``: this part alone."""
    parser = argparse.ArgumentParser(prog="moeserve")
    add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


def _verb(verbs: Subparsers, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _routing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--routing",
        nargs="+",
        required=True,
        metavar="FILE",
        help="traces or counts: .npz, .safetensors, .json, .pt; FILE:weight=2 weighs one",
    )
    parser.add_argument("--experts", type=int, help="experts per layer, where files do not say")


def _cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--nodes", type=int, default=1)
    _link(parser)
    parser.add_argument("--memory", type=int, default=0, help="bytes for experts per device")


def _link(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--node-ratio",
        type=float,
        default=9.0,
        help="price of a copy across nodes over one inside (bandwidth ratio; default 9)",
    )
    parser.add_argument(
        "--speeds", type=float, nargs="+", default=(), help="relative speed of each device"
    )


def _problem(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=int, help="expert slots per layer (default: experts)")
    parser.add_argument("--dataflow", choices=DATAFLOWS, default="home-dedup")
    parser.add_argument("--phase", choices=PHASES, default="prefill")
    parser.add_argument("--batch", type=int, default=256, help="tokens of a decode step")
    parser.add_argument(
        "--max-imbalance",
        type=float,
        default=1.03,
        help="max/mean load that grouping may cause; also the factor by which a plan may be worse "
        "balanced than experts in order on what is held out (default 1.03)",
    )
    parser.add_argument(
        "--max-workload-imbalance",
        type=float,
        default=2.0,
        help="the same of each single workload, where several are given (default 2.0)",
    )
    parser.add_argument("--groups", type=int, default=1, help="expert groups of the router")
    for name, what in (("apart", "must not"), ("together", "must")):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            default=(),
            metavar="A,B",
            help=f"pairs of experts that {what} share a device",
        )
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--expert-bytes", type=int, default=0, help="bytes of one expert")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        help="share of each trace's sequences kept aside to evaluate on (default 0.1)",
    )
    _weigh(parser)


def _weigh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bound-limit",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="time for a bound on a plan's copies (default 10, in compare 2 for each solver)",
    )
    parser.add_argument("--dispatch-bytes", type=int, default=0, help="bytes of a copy going out")
    parser.add_argument("--combine-bytes", type=int, default=0, help="bytes of a copy coming back")
    parser.add_argument(
        "--homes",
        choices=("uniform", "histogram"),
        default="uniform",
        help="homes drawn uniformly (exact mean), or by each sequence's first experts",
    )


def _record(verbs: Subparsers) -> None:
    parser = _verb(verbs, "record", "collect routing files into one trace of our format")
    _routing(parser)
    parser.add_argument("--out", required=True, metavar="FILE.safetensors")


def _solve(verbs: Subparsers) -> None:
    parser = _verb(verbs, "solve", "find a plan, with its bound and gap")
    _routing(parser)
    _cluster(parser)
    _problem(parser)
    parser.add_argument("--solver", choices=SOLVERS, default="auto")
    parser.add_argument("--previous", metavar="PLAN", help="existing plan; moving away costs")
    parser.add_argument("--horizon-tokens", type=int, default=0, help="tokens a plan lives for")
    parser.add_argument("--cost-per-moved-byte", type=float, default=1.0)
    parser.add_argument("--out", required=True, metavar="PLAN")


def _evaluate(verbs: Subparsers) -> None:
    parser = _verb(verbs, "evaluate", "what a plan costs on given routing")
    parser.add_argument("--plan", required=True)
    _routing(parser)
    _link(parser)
    _weigh(parser)
    parser.add_argument("--batch", type=int, default=256, help="tokens of a decode step")
    parser.add_argument("--dataflow", choices=DATAFLOWS, help="other than the plan's own")


def _compare(verbs: Subparsers) -> None:
    parser = _verb(verbs, "compare", "solvers side by side, fitted and held out")
    _routing(parser)
    _cluster(parser)
    _problem(parser)
    parser.set_defaults(held_out=0.5, bound_limit=2.0)
    parser.add_argument(
        "--solvers",
        nargs="+",
        choices=SOLVERS,
        default=("contiguous", "random", "eplb", "moetuner", "auto"),
    )


def _export(verbs: Subparsers) -> None:
    parser = _verb(verbs, "export", "write a plan for another runtime, or read one of its plans")
    parser.add_argument("--plan", required=True, help="our plan; with --import, the other's")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--import", dest="importing", action="store_true", help="the other way")
    parser.add_argument("--experts", type=int, help="with --import: experts per layer")
    parser.add_argument("--devices", type=int, help="with --import")
    parser.add_argument("--nodes", type=int, default=1, help="with --import")
    parser.add_argument("--layers", type=int, nargs="+", help="with --import: MoE layer numbers")


def _plot(verbs: Subparsers) -> None:
    parser = _verb(verbs, "plot", "heat maps as PNG and a self-contained HTML report")
    parser.add_argument("--plan", required=True)
    _routing(parser)
    _link(parser)
    parser.add_argument("--layer", type=int, default=0, help="layer whose experts are shown")
    parser.add_argument("--out", required=True, metavar="FOLDER")


if __name__ == "__main__":
    sys.exit(main())
