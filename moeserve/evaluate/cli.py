"""``moeserve evaluate``: loads two runs of a model, compares them, prints a report.

Loads no torch before the arguments are read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moeserve.config.options import Dtype, KvDtype, LoadOptions, Quantization
from moeserve.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from moeserve.evaluate.report import EvaluationReport, RunVariant
    from moeserve.evaluate.texts import Window
    from moeserve.kernels.ops import Ops
    from moeserve.models.decoder import Decoder
    from moeserve.models.tokenizer import Tokenizer

Subparsers = Any  # argparse's own type for these is private

DTYPES, KV_DTYPES, QUANTIZATIONS = get_args(Dtype), get_args(KvDtype), get_args(Quantization)
WINDOW = 512
PROBE = (
    "One text, 2 tokenizers? They differ (if they do) in words, digits such as 345, or  spaces.\n"
)


def add_parser(subparsers: Subparsers, text: str) -> None:
    """Adds the command; its ``run`` is a function of the parsed arguments."""
    command = subparsers.add_parser(
        "evaluate",
        help=text,
        description="Compare a run of a model with a reference run: perplexity, KL divergence, "
        "agreement on the likeliest token and on experts, exact answers to sums.",
        epilog="example: moeserve evaluate --model demo --quantization int8 --text book.txt",
        allow_abbrev=False,
    )
    tested = command.add_argument_group("the run to be tested")
    tested.add_argument("--model", default="demo", help="checkpoint folder, or 'demo' [demo]")
    tested.add_argument("--dtype", choices=DTYPES, default="auto", help="of its floats [auto]")
    tested.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default="auto",
        help="of its matrices; auto as stored, none as floats [auto]",
    )
    tested.add_argument(
        "--quantize-attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="attention's matrices, too, where --quantization rounds",
    )
    tested.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        default="auto",
        help="of its KV; auto is the floats' [auto]",
    )
    reference = command.add_argument_group("the reference")
    reference.add_argument(
        "--against", metavar="MODEL", help="checkpoint folder; default: the tested one"
    )
    reference.add_argument("--against-dtype", choices=DTYPES, default="auto", help="[auto]")
    reference.add_argument(
        "--against-quantization",
        choices=QUANTIZATIONS,
        help="default: auto with --against, else none: the floats that stored codes stand for",
    )
    reference.add_argument("--against-kv-dtype", choices=KV_DTYPES, default="auto", help="[auto]")
    on = command.add_argument_group("what they run on")
    on.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 text; default: the reference writes text itself, at temperature 1",
    )
    on.add_argument("--tokens", type=int, default=8192, help="tokens to score [8192]")
    on.add_argument(
        "--window", type=int, help=f"tokens of a window, whose second half is scored [{WINDOW}]"
    )
    on.add_argument("--problems", type=int, default=400, help="sums to ask; 0 asks none [400]")
    on.add_argument("--seed", type=int, default=0, help="of written text and of sums [0]")
    command.add_argument("--threads", type=int, help="CPU threads; default: all allowed cores")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture as well")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The report goes to standard output, progress to the terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from moeserve.evaluate.picture import draw, require_figures
    from moeserve.evaluate.report import render

    _check(args)
    if args.plot is not None:
        require_figures()
    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        report = _evaluate(args, bar)
    if args.plot is not None:
        draw(report, args.plot)
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        render(report, Console())
    return 0


def _check(args: argparse.Namespace) -> None:
    least = {"tokens": 1, "window": 4, "problems": 0, "seed": 0, "threads": 1}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise ConfigError(f"--{name}={value}: must be at least {bound}")
    if not args.quantize_attention and not {"int8", "int4"} & {
        args.quantization,
        args.against_quantization,
    }:
        raise ConfigError(
            "--no-quantize-attention: has no effect, --quantization rounds nothing: give "
            "--quantization int8 or int4, or leave it out"
        )
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        raise ConfigError(f"--plot {args.plot}: there is no folder {args.plot.parent}")
    for file in args.text or ():
        if not file.is_file():
            raise ConfigError(f"--text {file}: no such file")


def _evaluate(args: argparse.Namespace, bar: Progress) -> EvaluationReport:
    import torch

    from moeserve.engine.build import load_tokenizer
    from moeserve.evaluate.arithmetic import draw_problems
    from moeserve.evaluate.compare import compare, examine
    from moeserve.evaluate.report import EvaluationReport, RunVariant
    from moeserve.kernels.select import choose_ops
    from moeserve.models.library import resolve_model

    attention = args.quantize_attention
    tested_as = RunVariant(args.model, args.dtype, args.quantization, attention, args.kv_dtype)
    reference_as = RunVariant(
        args.against or args.model,
        args.against_dtype,
        args.against_quantization or ("auto" if args.against else "none"),
        attention,
        args.against_kv_dtype,
    )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    ops = choose_ops(threads=args.threads)
    tokenizer, no_tokenizer = load_tokenizer(resolve_model(tested_as.model))
    reference = _load(reference_as, ops, bar)
    tested = _load(tested_as, ops, bar)
    _require_same_tokens(args, reference, tested, tokenizer)
    windows = _windows(args, reference, tested, tokenizer, no_tokenizer, bar)
    task = bar.add_task("comparing", total=sum(w.scored for w in windows))
    comparison = compare(reference, tested, windows, lambda n: bar.advance(task, n))
    exams = []
    if tokenizer is not None and args.problems:
        task = bar.add_task("arithmetic", total=None)
        problems = draw_problems(args.problems, args.seed)
        exams = examine(reference, tested, tokenizer, problems, lambda n: bar.advance(task, n))
    return EvaluationReport(
        reference=reference_as,
        tested=tested_as,
        window=max(len(w.ids) - 1 for w in windows),
        seed=args.seed,
        comparison=comparison,
        exams=tuple(exams),
        no_exams=no_tokenizer or "--problems is 0",
    )


def _load(variant: RunVariant, ops: Ops, bar: Progress) -> Decoder:
    from moeserve.models.decoder import load_decoder
    from moeserve.models.library import resolve_model

    task = bar.add_task(f"loading {variant}")
    names = ("dtype", "quantization", "quantize_attention", "kv_dtype")
    return load_decoder(
        resolve_model(variant.model),
        ops,
        LoadOptions.model_validate({name: getattr(variant, name) for name in names}),
        progress=lambda done, total: bar.update(task, completed=done, total=total),
    )


def _require_same_tokens(
    args: argparse.Namespace, reference: Decoder, tested: Decoder, tokenizer: Tokenizer | None
) -> None:
    """Distributions compare over one vocabulary only, each id meaning the same."""
    if args.against is None:
        return
    if reference.spec.vocab != tested.spec.vocab:
        raise ConfigError(
            f"--against {args.against}: has {reference.spec.vocab} tokens and {args.model} "
            f"{tested.spec.vocab}: compare models of one vocabulary"
        )
    from moeserve.engine.build import load_tokenizer
    from moeserve.models.library import resolve_model

    other, _ = load_tokenizer(resolve_model(args.against))
    if tokenizer and other and tokenizer.encode(PROBE) != other.encode(PROBE):
        raise ConfigError(
            f"--against {args.against}: its tokenizer splits text otherwise than that of "
            f"{args.model}: compare models of one vocabulary"
        )


def _windows(
    args: argparse.Namespace,
    reference: Decoder,
    tested: Decoder,
    tokenizer: Tokenizer | None,
    no_tokenizer: str,
    bar: Progress,
) -> list[Window]:
    from moeserve.evaluate.texts import sampled_windows, windows_of_files

    most = min(reference.spec.max_positions, tested.spec.max_positions)
    if args.window is not None and args.window > most:
        raise ConfigError(f"--window={args.window}: the checkpoint was made for {most} positions")
    window = args.window or min(WINDOW, most)
    if args.text:
        if tokenizer is None:
            raise ConfigError(f"--text: {no_tokenizer}; leave --text out, or add a tokenizer")
        return windows_of_files(args.text, tokenizer, window=window, tokens=args.tokens)
    task = bar.add_task("writing text", total=2 * args.tokens)
    return sampled_windows(
        reference,
        window=window,
        tokens=args.tokens,
        seed=args.seed,
        progress=lambda n: bar.advance(task, n),
    )
