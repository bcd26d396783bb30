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
FORMATS = ("sglang", "vllm", "ascend", "tensorrt", "lightllm", "eplb")
EXAMPLES = {
    "record": "moeserve place record --routing dump.pt --out trace.safetensors",
    "solve": "moeserve place solve --routing chat.npz code.npz --devices 16 --nodes 4 "
    "--out plan.json",
    "evaluate": "moeserve place evaluate --plan plan.json --routing tomorrow.npz",
    "compare": "moeserve place compare --routing chat.npz --topology h200.toml",
    "export": "moeserve place export --plan plan.json --format vllm --out map.json",
    "plot": "moeserve place plot --plan plan.json --routing chat.npz --out plan.html",
}
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
    from moeserve.placement.cluster_arguments import describe_cluster

    try:
        describe_cluster(arguments)
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
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}"
    )
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
    """What is not said of the cluster is None: ``describe_cluster`` fills it in."""
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--devices", type=int, help="devices in all (or --topology)")
    _topology(size)
    parser.add_argument("--nodes", type=int, help="nodes that the devices are in (default 1)")
    _link(parser)
    parser.add_argument(
        "--memory", type=int, help="bytes for experts per device (default 0: no limit)"
    )


def _topology(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--topology",
        metavar="FILE",
        help="the cluster as a file, .toml or .json: nodes, rails, rates, speeds, memory; in place "
        "of --devices, --nodes, --node-ratio, --speeds and --memory",
    )


def _link(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--node-ratio",
        type=float,
        help="price of a copy across nodes over one inside (bandwidth ratio; default 9)",
    )
    parser.add_argument("--speeds", type=float, nargs="+", help="relative speed of each device")


def _problem(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=int, help="expert slots per layer (default: experts)")
    parser.add_argument(
        "--dataflow",
        choices=DATAFLOWS,
        default="home-dedup",
        help="how activations travel, and so what a plan can gain (default %(default)s)",
    )
    parser.add_argument(
        "--phase",
        choices=PHASES,
        default="prefill",
        help="balance tokens, or the experts that a decode step reads (default %(default)s)",
    )
    _batch(parser)
    parser.add_argument(
        "--max-imbalance",
        type=float,
        default=1.03,
        help="max/mean load that grouping may cause; also the factor by which a plan may be worse "
        "balanced than experts in order on what is held out (default %(default)s)",
    )
    parser.add_argument(
        "--max-workload-imbalance",
        type=float,
        default=2.0,
        help="the same of each single workload, where several are given (default %(default)s)",
    )
    parser.add_argument(
        "--groups",
        type=int,
        default=1,
        help="expert groups of the router (default %(default)s)",
    )
    for name, what in (("apart", "must not"), ("together", "must")):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            default=(),
            metavar="A,B",
            help=f"pairs of experts that {what} share a device",
        )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="time for a solver to search (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the search (default %(default)s)")
    parser.add_argument(
        "--expert-bytes",
        type=int,
        default=0,
        help="bytes of one expert: for memory limits, and for what moving it costs",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        help="share of each trace's sequences kept aside to evaluate on (default %(default)s)",
    )
    _weigh(parser)


def _batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch", type=int, default=256, help="tokens of a decode step (default %(default)s)"
    )


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", required=True, metavar="PLAN", help="a plan that solve wrote")


def _weigh(parser: argparse.ArgumentParser) -> None:
    _effort(parser)
    _copies(parser)


def _effort(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=int, default=2, help="to search with (default %(default)s)"
    )
    parser.add_argument(
        "--bound-limit",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="time for a bound on each plan's copies (default %(default)s)",
    )


def _copies(parser: argparse.ArgumentParser) -> None:
    for name, way in (("dispatch", "going out"), ("combine", "coming back")):
        parser.add_argument(
            f"--{name}-bytes",
            type=int,
            default=0,
            help=f"bytes of a copy {way}: for bytes by class of link, and for the predicted step "
            "with --topology (there by default DeepSeek-V3's)",
        )
    parser.add_argument(
        "--expert-flops",
        type=float,
        metavar="OPERATIONS",
        help="of one expert on one token: for the predicted step with --topology (default 88e6, "
        "DeepSeek-V3's); without, an expert on a token takes as long as 0.7 copies",
    )
    parser.add_argument(
        "--homes",
        choices=("uniform", "histogram"),
        default="uniform",
        help="homes drawn uniformly (exact mean), or by each sequence's first experts",
    )


def _record(verbs: Subparsers) -> None:
    parser = _verb(verbs, "record", "collect routing files into one trace of our format")
    _routing(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE.safetensors", help="the trace to write"
    )


def _solve(verbs: Subparsers) -> None:
    parser = _verb(verbs, "solve", "find a plan, with its bound and gap")
    _routing(parser)
    _cluster(parser)
    _problem(parser)
    parser.add_argument(
        "--solver",
        choices=SOLVERS,
        default="auto",
        help="how to search (default %(default)s)",
    )
    parser.add_argument("--previous", metavar="PLAN", help="existing plan; moving away costs")
    parser.add_argument(
        "--horizon-tokens", type=int, default=0, help="with --previous: tokens a plan lives for"
    )
    parser.add_argument(
        "--cost-per-moved-byte",
        type=float,
        default=1.0,
        help="with --previous: a moved byte over a byte of activations (default %(default)s)",
    )
    parser.add_argument("--out", required=True, metavar="PLAN", help="the plan to write, JSON")


def _evaluate(verbs: Subparsers) -> None:
    parser = _verb(verbs, "evaluate", "what a plan costs on given routing")
    _plan(parser)
    _routing(parser)
    _topology(parser)
    _link(parser)
    _weigh(parser)
    _batch(parser)
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
        help="which (default contiguous random eplb moetuner auto); those that need tokens are "
        "listed with the reason where there are counts only",
    )


def _export(verbs: Subparsers) -> None:
    parser = _verb(verbs, "export", "write a plan for another runtime, or read one of its plans")
    parser.add_argument(
        "--plan", required=True, metavar="PLAN", help="our plan; with --import, the other's"
    )
    parser.add_argument("--format", choices=FORMATS, required=True, help="whose plans")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--import", dest="importing", action="store_true", help="the other way")
    parser.add_argument("--experts", type=int, help="with --import: experts per layer")
    parser.add_argument("--devices", type=int, help="with --import: its devices")
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        help="with --import: its nodes (default %(default)s)",
    )
    parser.add_argument("--layers", type=int, nargs="+", help="with --import: MoE layer numbers")


def _plot(verbs: Subparsers) -> None:
    parser = _verb(verbs, "plot", "a report of a plan: one HTML page, against contiguous and EPLB")
    _plan(parser)
    _routing(parser)
    _topology(parser)
    _link(parser)
    _copies(parser)
    _batch(parser)
    parser.add_argument(
        "--layer", type=int, default=0, help="layer whose experts are shown (default %(default)s)"
    )
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="FILE.html, or a folder for report.html"
    )


if __name__ == "__main__":
    sys.exit(main())
