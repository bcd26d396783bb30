"""Arguments of ``moeserve bench serve``, the requests that follow from them, the report.

``--json`` prints one object; progress goes to standard error, where that is a terminal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeserve.errors import ConfigError

if TYPE_CHECKING:
    from moeserve.bench.serving.plan import PlannedRequest

PERCENTILES = "50,90,95,99"


def add_arguments(command: argparse.ArgumentParser) -> None:
    at = command.add_argument_group("the server")
    at.add_argument(
        "--target",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="http://, https://, grpc:// or grpcs:// [http://127.0.0.1:8000]",
    )
    at.add_argument(
        "--api", default="completions", help="of HTTP: completions or chat [completions]"
    )
    at.add_argument("--model", metavar="NAME", help="[the first that the server names]")
    at.add_argument("--api-key-file", type=Path, metavar="FILE", help="sent as a bearer token")
    at.add_argument("--tls-ca", type=Path, metavar="FILE", help="who signs the server's name")
    at.add_argument("--tls-cert", type=Path, metavar="FILE", help="our own, with --tls-key")
    at.add_argument("--tls-key", type=Path, metavar="FILE")
    at.add_argument("--timeout", type=float, default=600, metavar="S", help="of a request [600]")
    when = command.add_argument_group("when requests are sent")
    when.add_argument(
        "--request-rate",
        type=float,
        metavar="R",
        help="requests/s; inf: all at once [inf; of a trace: its own times]",
    )
    when.add_argument("--arrivals", default="poisson", help="poisson, gamma or constant [poisson]")
    when.add_argument(
        "--burstiness", type=float, default=1.0, metavar="B", help="gamma's shape; less is burstier"
    )
    when.add_argument("--speed", type=float, metavar="X", help="of a trace's times [1]")
    when.add_argument(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="a closed loop: at most N outstanding [no bound]",
    )
    what = command.add_argument_group("what is asked")
    what.add_argument("--num-prompts", type=int, metavar="N", help="[100; all of a trace]")
    what.add_argument("--input-len", type=int, metavar="N", help="tokens of a prompt [512]")
    what.add_argument("--output-len", type=int, metavar="N", help="tokens of an answer [128]")
    what.add_argument(
        "--range-ratio",
        type=float,
        metavar="R",
        help="lengths are uniform within (1 -+ R) times these [0]",
    )
    what.add_argument("--prefix-len", type=int, metavar="N", help="tokens that prompts share [0]")
    what.add_argument("--trace", type=Path, metavar="FILE", help="lengths and times of requests")
    what.add_argument(
        "--trace-format", metavar="F", help="azure, burstgpt, mooncake or jsonl [by its columns]"
    )
    what.add_argument("--length-scale", type=float, default=1.0, metavar="X", help="of a trace [1]")
    what.add_argument("--max-input-len", type=int, metavar="N", help="longer prompts are cut")
    what.add_argument("--max-output-len", type=int, metavar="N", help="longer answers are cut")
    what.add_argument("--prompts", help="ids or text [ids; chat and texts: text]")
    what.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="drawn ids are below it [gRPC: the model's; HTTP: 256]",
    )
    what.add_argument("--ignore-eos", action="store_true", help="answers have the asked length")
    what.add_argument("--temperature", type=float, default=0.0, metavar="T", help="[0]")
    what.add_argument("--extra-body", metavar="JSON", help="more fields of HTTP's requests")
    what.add_argument("--standard", action="store_true", help="HTTP: OpenAI's own fields only")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of times and prompts [0]")
    what.add_argument(
        "--num-warmups",
        type=int,
        default=1,
        metavar="N",
        help="requests that come before and are not counted [1]",
    )
    told = command.add_argument_group("what is told")
    told.add_argument(
        "--slo",
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:LIMIT",
        help="limits for goodput, as in ttft:200ms tpot:50ms e2el:5s",
    )
    told.add_argument("--percentiles", default=PERCENTILES, metavar="P,..", help=f"[{PERCENTILES}]")
    told.add_argument("--json", action="store_true", help="print one JSON object")
    told.add_argument("--save", type=Path, metavar="FILE", help="every request, as JSON lines")
    told.add_argument("--plot", type=Path, metavar="FILE", help="also draw .png, .svg or .pdf")
    command.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """The report goes to standard output, progress to the terminal; 1 where no answer is whole."""
    from rich.console import Console

    from moeserve.bench.serving.figures import draw, require_figures
    from moeserve.bench.serving.measure import measure
    from moeserve.bench.serving.prompts import form_of_prompts
    from moeserve.bench.serving.report import lines, table
    from moeserve.bench.serving.saving import save
    from moeserve.bench.serving.slos import parse_slos

    _check(args)
    slos, percentiles = parse_slos(args.slo), _percentiles(args.percentiles)
    if args.plot is not None:
        require_figures(args.plot)
    requests = plan_of(args)
    args.prompts = form_of_prompts(requests, args.prompts, chat=args.api == "chat")
    report = asyncio.run(measure(args, requests, slos, percentiles))
    if args.save is not None:
        save(report.outcomes, args.save)
    if args.plot is not None:
        draw(report, args.plot)
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        console = Console(soft_wrap=True)
        console.print(table(report))
        for line in lines(report):
            console.print(line, highlight=False, markup=False)
    return 0 if report.whole else 1


def _check(args: argparse.Namespace) -> None:
    least = {"num_prompts": 1, "max_concurrency": 1, "num_warmups": 0, "seed": 0}
    least |= {"max_input_len": 1, "max_output_len": 1, "vocab_size": 2}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be at least {bound}")
    for name in ("timeout", "speed", "length_scale"):
        value = getattr(args, name)
        if value is not None and not (0 < value < math.inf):
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be a number above 0")
    drawn = ("input_len", "output_len", "range_ratio", "prefix_len")
    given = [name for name in drawn if getattr(args, name) is not None]
    if args.trace is not None and given:
        raise ConfigError(f"--{given[0].replace('_', '-')}: lengths come from --trace")
    if args.speed is not None and (args.trace is None or args.request_rate is not None):
        raise ConfigError("--speed: is of a trace's own times")
    if args.trace is None and (args.trace_format is not None or args.length_scale != 1):
        raise ConfigError("--trace-format, --length-scale: are of a --trace")


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--percentiles={text!r}: expected numbers") from error
    if not all(0 <= p <= 100 for p in found):
        raise ConfigError(f"--percentiles={text!r}: expected numbers from 0 to 100")
    return found


def plan_of(args: argparse.Namespace) -> tuple[PlannedRequest, ...]:
    """The requests of the run. ConfigError where arguments do not fit."""
    from moeserve.bench.serving import plan
    from moeserve.bench.serving.arrivals import arrival_times
    from moeserve.bench.serving.traces import read_trace

    def times(count: int) -> list[float]:
        rate = math.inf if args.request_rate is None else args.request_rate
        return arrival_times(
            count, rate, kind=args.arrivals, burstiness=args.burstiness, seed=args.seed
        )

    requests: Sequence[PlannedRequest]
    if args.trace is None:
        lengths = plan.Lengths(
            512 if args.input_len is None else args.input_len,
            128 if args.output_len is None else args.output_len,
            args.range_ratio or 0.0,
            args.prefix_len or 0,
        )
        requests = plan.drawn(times(args.num_prompts or 100), lengths, args.seed)
    else:
        requests = read_trace(args.trace, args.trace_format, args.num_prompts)
        requests = plan.replayed(requests, args.speed or 1.0)
        if args.request_rate is not None:
            requests = plan.due_at(requests, times(len(requests)))
    return plan.fitted(
        requests,
        scale=args.length_scale,
        most_input=args.max_input_len or plan.MAX_TOKENS,
        most_output=args.max_output_len or plan.MAX_TOKENS,
    )
