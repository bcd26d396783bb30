"""``moeserve bench prefill | decode | kernel``: measure, and show it beside the roofline;
``moeserve bench serve`` is in ``moeserve.bench.serving.command``.

``--json`` prints ``{"machine": ..., "rows": [{"what", "peer", "batch" or "tokens", "threads",
"median", "min", "max", "roofline", ...}]}``. Rounds are interleaved, so that what disturbs the
machine disturbs every row alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeserve.errors import ConfigError
from moeserve.host import allowed_cores

if TYPE_CHECKING:
    from moeserve.bench.generation import Case
    from moeserve.bench.rows import BenchReport, Row
    from moeserve.kernels.probe import Machine
    from moeserve.models.decoder import Decoder

TOKENS = {"prefill": "512", "decode": "64", "kernel": "1,4,16,64,256"}
QUANTIZATIONS = ("none", "int8", "int4")
KERNEL_KINDS = ("int8", "int4", "bf16")


def add_arguments(command: argparse.ArgumentParser) -> None:
    from moeserve.bench.serving.command import add_arguments as add_serving

    kinds = command.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what, text in (
        ("decode", "of a model, by batch, beside the roofline"),
        ("kernel", "the experts' kernel alone, beside the roofline"),
        ("prefill", "of a model, beside the roofline"),
    ):
        _add_measured(kinds.add_parser(what, help=text, description=text, allow_abbrev=False))
    serving = kinds.add_parser(
        "serve",
        help="a running server under load: latencies, throughput, goodput",
        description="Send requests to a server when they are due, and tell how it keeps up.",
        epilog="example: moeserve bench serve --target http://127.0.0.1:8000 --request-rate 4 "
        "--num-prompts 200 --ignore-eos --slo ttft:500ms tpot:50ms",
        allow_abbrev=False,
    )
    add_serving(serving)


def _add_measured(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="demo", help="a checkpoint folder [demo]")
    command.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="none", help="of the weights [none]"
    )
    command.add_argument("--batch", default="1,4,16,32", metavar="N,..", help="decode: streams")
    command.add_argument(
        "--tokens",
        metavar="N,..",
        help="prefill: prompt [512]; decode: tokens per stream [64]; kernel: [1,4,16,64,256]",
    )
    command.add_argument("--prompt", type=int, default=128, metavar="N", help="decode: [128]")
    command.add_argument("--threads", metavar="N,..", help="[all cores; kernel: 1 and all cores]")
    command.add_argument("--rounds", type=int, default=3, metavar="N", help="[3]")
    command.add_argument(
        "--layer",
        default="128,8,2048,768",
        metavar="E,C,H,I",
        help="kernel: experts, of them per token, hidden and intermediate size",
    )
    command.add_argument(
        "--kinds", default="int8,int4,bf16", metavar="KIND,..", help="kernel: our weights"
    )
    command.add_argument("--alone", action="store_true", help="kernel: without torch's loops")
    command.add_argument(
        "--contenders", type=Path, metavar="FILE", help="kernel: more of them, a list in JSON"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw .png, .svg or .pdf")
    command.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    from rich.console import Console

    from moeserve.bench.rows import notes, plot, table

    if args.rounds < 1:
        raise ConfigError(f"--rounds={args.rounds}: must be at least 1")
    measured = measure_kernel if args.what == "kernel" else measure_model
    report = measured(args, thread_counts(args))
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        console = Console()
        console.print(table(f"moeserve bench {args.what}", report.rows))
        for note in notes(report.rows):
            console.print(note, highlight=False)
    if args.plot is not None:
        plot(report.rows, args.plot)
    return 0


def thread_counts(args: argparse.Namespace) -> list[int]:
    cores = len(allowed_cores())
    if args.threads is None:
        return sorted({1, cores}) if args.what == "kernel" else [cores]
    counts = integers("--threads", args.threads)
    if max(counts) > cores:
        raise ConfigError(f"--threads={args.threads}: this process may use {cores} cores")
    return counts


def integers(flag: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{flag}={text!r}: expected integers separated by commas") from error
    if min(found) < 1:
        raise ConfigError(f"{flag}={text!r}: every one must be at least 1")
    return found


def show_progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def measure_kernel(args: argparse.Namespace, threads: Sequence[int]) -> BenchReport:
    from moeserve.bench.kernel import MoeLayer, measure, ours, read_contenders, torch_loops

    sizes = integers("--layer", args.layer)
    if len(sizes) != 4 or sizes[1] > sizes[0]:
        raise ConfigError(f"--layer={args.layer!r}: expected experts,per token,hidden,intermediate")
    kinds = args.kinds.split(",")
    if not set(kinds) <= set(KERNEL_KINDS):
        raise ConfigError(f"--kinds={args.kinds!r}: expected some of {','.join(KERNEL_KINDS)}")
    contenders = [ours(kind) for kind in kinds]
    if not args.alone:
        contenders += torch_loops()
    if args.contenders is not None:
        contenders += read_contenders(args.contenders)
    return measure(
        contenders,
        layer=MoeLayer(*sizes),
        tokens=integers("--tokens", args.tokens or TOKENS["kernel"]),
        threads=threads,
        rounds=args.rounds,
        seconds=0.15,
        report=show_progress,
    )


def measure_model(args: argparse.Namespace, threads: Sequence[int]) -> BenchReport:
    from moeserve.bench.generation import Case
    from moeserve.bench.rows import BenchReport

    tokens = integers("--tokens", args.tokens or TOKENS[args.what])
    if args.what == "prefill":
        cases = {count: Case(1, count, 1) for count in tokens}
    elif len(tokens) > 1:
        raise ConfigError(f"--tokens={args.tokens!r}: decode takes one number; vary --batch")
    else:
        batches = integers("--batch", args.batch)
        # One more than is timed: the first token ends the prefill.
        cases = {batch: Case(batch, args.prompt, tokens[0] + 1) for batch in batches}
    machines: list[Machine] = []
    rows: list[Row] = []
    for count in threads:
        show_progress(f"loading {args.model} for {count} threads")
        decoder = load(args.model, args.quantization, count)
        machine, found = measure_cases(args, decoder, cases, count)
        machines.append(machine)
        rows += found
    return BenchReport(tuple(machines), tuple(rows))


def load(model: str, quantization: str, threads: int) -> Decoder:
    import torch

    from moeserve.config.options import LoadOptions
    from moeserve.kernels.select import choose_ops
    from moeserve.models.decoder import load_decoder
    from moeserve.models.library import resolve_model

    torch.set_num_threads(1)  # as the server does: the native pool has the cores
    return load_decoder(
        resolve_model(model),
        ops=choose_ops(threads=threads),
        options=LoadOptions.model_validate({"quantization": quantization}),
    )


def measure_cases(
    args: argparse.Namespace, decoder: Decoder, cases: dict[int, Case], threads: int
) -> tuple[Machine, list[Row]]:
    from moeserve.bench.generation import bounds, run_case
    from moeserve.bench.roofline import roofline
    from moeserve.bench.rows import Row, summarise
    from moeserve.kernels.probe import faster, probe_machine

    prefill = args.what == "prefill"
    precision = precision_of(decoder, args.quantization)
    machine = probe_machine(threads)
    rates: dict[int, list[float]] = {size: [] for size in cases}
    for r in range(args.rounds + 1):  # the first one warms up
        for size, case in cases.items():
            show_progress(f"round {r}: {args.what} {size}")
            timing = run_case(decoder, case)
            if r:
                rates[size].append(timing.prefill_rate if prefill else timing.decode_rate)
    machine = faster(machine, probe_machine(threads))
    rows = []
    for size, case in cases.items():
        limit = bounds(decoder, case, roofline(machine, precision))
        row = Row(
            what=args.what,
            peer=f"moeserve {precision}",
            unit="tok/s",
            threads=threads,
            batch=None if prefill else size,
            tokens=size if prefill else None,
            roofline=limit.prefill_rate if prefill else limit.decode_rate,
        )
        rows.append(summarise(row, rates[size]))
    return machine, rows


def precision_of(decoder: Decoder, quantization: str) -> str:
    import torch

    if quantization != "none":
        return quantization
    return "bf16" if decoder.dtype is torch.bfloat16 else "fp32"
