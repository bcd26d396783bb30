"""The commands of ``moeserve``: reads arguments, calls, prints.

Exit status: 0 done, 1 it failed or found problems, 2 the command line or a setting is wrong, 130
interrupted. ``--json`` prints one JSON object to standard output and nothing else there. Heavy
modules are imported by the command that needs them: ``moeserve place`` loads no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import moeserve
from moeserve.engine.replan.replay_command import add_place
from moeserve.errors import ConfigError, MoeserveError
from moeserve.offload.interpreter import require_interpreter

if TYPE_CHECKING:
    # argparse has no public name for what ``add_subparsers`` gives.
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    # An installed torch_npu would be loaded inside `import torch`, and break it where CANN is
    # absent: it is imported where an NPU was chosen, also by child processes.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    args = parser(words).parse_args(words)
    try:
        status = args.run(args)
    except ConfigError as error:
        print(f"moeserve: {error.message}", file=sys.stderr)
        return 2
    except MoeserveError as error:
        print(f"moeserve: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has left: nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(status)


def parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Of all commands, the one that ``words`` name has its options: theirs take time to import."""
    named = next((word for word in words if not word.startswith("-")), "")
    top = argparse.ArgumentParser(
        prog="moeserve", description="Serve Mixture-of-Experts language models."
    )
    top.add_argument("--version", action="version", version=f"moeserve {moeserve.__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command, (text, add) in COMMANDS.items():
        if command == named:
            add(commands)
        else:
            commands.add_parser(command, help=text)
    return top


def _add_serve(commands: Commands) -> None:
    from moeserve.config.sources import add_options

    command = commands.add_parser(
        "serve",
        help=COMMANDS["serve"][0],
        description="Serve a model over gRPC and OpenAI HTTP until SIGTERM, which drains.",
        epilog="example: moeserve serve demo --port 8000 --max-num-seqs 16",
        allow_abbrev=False,
    )
    command.add_argument("model_named", metavar="MODEL", nargs="?", help="the same as --model")
    command.add_argument("--port", metavar="PORT", help="the same as --http-port")
    add_options(command)
    command.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from moeserve.config.effect import require_effect
    from moeserve.config.options import ServeConfig
    from moeserve.config.sources import also_said, options_of, settings_from_args, to_yaml

    also_said(args, "model", "model_named", "MODEL")
    also_said(args, "http_port", "port", "--port")
    settings = settings_from_args(args, os.environ)
    config = options_of(settings, ServeConfig)
    require_effect(config, settings, config.ep or 1)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    require_interpreter(config.memory)
    # The import takes seconds, and only after it does the server have handlers of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    from moeserve.models.library import with_model_here
    from moeserve.observe.logs import configure_log

    configure_log(config.log_level, config.log_format)
    config = with_model_here(config)
    if config.ep is not None and config.ep > 1:
        from moeserve.worker.local import serve_local

        return serve_local(config, os.environ)
    from moeserve.gateway.server import serve

    return serve(config)


def _add_peer(commands: Commands) -> None:
    from moeserve.worker.cluster_cli import add_peer

    add_peer(commands, COMMANDS["peer"][0])


def _add_gateway(commands: Commands) -> None:
    from moeserve.worker.cluster_cli import add_gateway

    add_gateway(commands, COMMANDS["gateway"][0])


def _add_up(commands: Commands) -> None:
    from moeserve.worker.cluster_cli import add_up

    add_up(commands, COMMANDS["up"][0])


def _add_generate(commands: Commands) -> None:
    from moeserve.config.options import RankModelOptions
    from moeserve.config.sources import add_options

    command = commands.add_parser(
        "generate",
        help=COMMANDS["generate"][0],
        description="Load a model, answer one prompt, and end.",
        epilog='example: moeserve generate --model demo --prompt "Once upon a time" '
        "--max-tokens 64 --temperature 0",
        allow_abbrev=False,
    )
    asked = command.add_argument_group("what to generate")
    prompt = asked.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument(
        "--prompt-ids", metavar="IDS", help="token ids instead of text, separated by commas"
    )
    for name, (kind, text) in SAMPLING.items():
        asked.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    asked.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    asked.add_argument("--ignore-eos", action="store_true", help="go on after end-of-text")
    asked.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(command, RankModelOptions)
    command.set_defaults(run=_generate)


def _add_batch(commands: Commands) -> None:
    from moeserve.gateway.batch.command import add_parser

    add_parser(commands, COMMANDS["batch"][0])


SAMPLING: Mapping[str, tuple[type, str]] = {
    "max_tokens": (int, "tokens to make at most [16]"),
    "min_tokens": (int, "no end-of-text before so many [0]"),
    "temperature": (float, "0 is greedy [1]"),
    "top_k": (int, "keep the k likeliest; 0 keeps all [0]"),
    "top_p": (float, "keep the likeliest of this probability mass [1]"),
    "min_p": (float, "drop what is less likely than this share of the likeliest [0]"),
    "repetition_penalty": (float, "divides logits of tokens that occurred [1]"),
    "presence_penalty": (float, "subtracted once from logits of generated tokens [0]"),
    "frequency_penalty": (float, "subtracted for each occurrence [0]"),
    "seed": (int, "the same seed gives the same tokens; default: drawn"),
}


def _generate(args: argparse.Namespace) -> int:
    from moeserve.config.effect import require_effect
    from moeserve.config.options import RankModelOptions
    from moeserve.config.sources import options_of, settings_from_args, to_yaml

    settings = settings_from_args(args, os.environ)
    options = options_of(settings, RankModelOptions)
    require_effect(options, settings)
    if args.print_config:
        print(to_yaml(options), end="")
        return 0
    if args.prompt is None and args.prompt_ids is None:
        raise ConfigError("nothing to answer: give --prompt TEXT or --prompt-ids IDS")
    prompt = args.prompt if args.prompt is not None else _token_ids(args.prompt_ids)
    params: dict[str, object] = {
        name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None
    }
    if args.stop:
        params["stop"] = args.stop
    if args.ignore_eos:
        params["ignore_eos"] = True
    require_interpreter(options.memory)
    from moeserve.models.library import with_model_here

    options = with_model_here(options)
    from moeserve.gateway.offline import generate

    show = None if args.json else _show
    answer = generate(options, prompt, params, show)
    if args.json:
        print(json.dumps(answer.to_json()))
    else:
        print()
        print(
            f"[{len(answer.token_ids)} tokens, TTFT {answer.ttft_s * 1e3:.1f} ms, "
            f"TPOT {answer.tpot_s * 1e3:.2f} ms, ended by {answer.finish_reason}]",
            file=sys.stderr,
        )
    return 0


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--prompt-ids={text!r}: expected integers separated by commas, such as 1,2,3"
        ) from error


def _add_doctor(commands: Commands) -> None:
    from moeserve.forecast.command import add_forecast_options

    command = commands.add_parser(
        "doctor",
        help=COMMANDS["doctor"][0],
        description="Look at this host, this installation and a model, and predict what it would "
        "do here; change nothing.",
        epilog="example: moeserve doctor --model demo   (exit status 1: it would not serve)",
        allow_abbrev=False,
    )
    command.add_argument("--model", help="a checkpoint folder, a GGUF file, or 'demo'")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    add_forecast_options(command)
    command.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console

    from moeserve.doctor import render, run_doctor
    from moeserve.forecast.command import calibrate_here, request_of

    asked = request_of(args)
    if args.calibrate:
        errors = Console(stderr=True)
        with errors.status("measuring") as status:
            name, file = calibrate_here(
                args.model, args.threads, lambda what: status.update(f"measuring {what}")
            )
        errors.print(f"measured {name}; kept in {file}", soft_wrap=True, highlight=False)
    report = run_doctor(args.model, asked, args.threads)
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        render(report, Console())
    return report.exit_status


def _add_bench(commands: Commands) -> None:
    from moeserve.bench.cli import add_arguments

    command = commands.add_parser(
        "bench",
        help=COMMANDS["bench"][0],
        description="Measure prefill, decode or the experts' kernel beside the roofline, or a "
        "running server under load.",
        epilog="example: moeserve bench decode --model demo --batch 1,16 --rounds 5",
        allow_abbrev=False,
    )
    add_arguments(command)


def _add_evaluate(commands: Commands) -> None:
    from moeserve.evaluate.cli import add_parser

    add_parser(commands, COMMANDS["evaluate"][0])


def _add_quantize(commands: Commands) -> None:
    from moeserve.models.packed.cli import add_options

    command = commands.add_parser(
        "quantize",
        help=COMMANDS["quantize"][0],
        description="Write a copy of a model with 8- or 4-bit weights, as compressed-tensors, or "
        "with weights that start-up maps.",
        epilog="example: moeserve quantize --model demo --out demo-int8",
        allow_abbrev=False,
    )
    command.add_argument(
        "--model", required=True, help="a checkpoint folder, a GGUF file, or 'demo'"
    )
    command.add_argument("--out", type=Path, help="a folder that does not exist yet")
    command.add_argument(
        "--scheme",
        choices=("auto", "none", "int8", "int4"),
        help="int8 per row, or int4 in groups for feed-forward matrices and int8 for others [int8]",
    )
    command.add_argument(
        "--group", type=int, default=128, metavar="N", help="features in a group of int4 [128]"
    )
    command.add_argument(
        "--keep-attention", action="store_true", help="leave attention's matrices in floats"
    )
    command.add_argument(
        "--quantize-head",
        action="store_true",
        help="the output head too: faster here, but not every other runtime reads it",
    )
    add_options(command)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_quantize)


def _quantize(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from moeserve.models.library import resolve_model
    from moeserve.models.packed.cli import run
    from moeserve.models.quantize import Recipe, quantize

    if args.out is None and not args.check:
        raise ConfigError("--out: missing; give a folder that does not exist yet")
    if args.packed or args.check:
        return run(args)
    if args.dtype != "auto":
        raise ConfigError("--dtype: has no effect without --packed, which is what it is for")
    recipe = Recipe(args.scheme or "int8", args.group, not args.keep_attention, args.quantize_head)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("writing")
        done = quantize(
            resolve_model(args.model),
            args.out,
            recipe,
            progress=lambda now, total: bar.update(task, completed=now, total=total),
        )
    if args.json:
        print(json.dumps(done.to_json()))
        return 0
    print(
        f"{done.folder}: {done.int8} matrices in int8, {done.int4} in int4, {done.kept} tensors "
        f"kept; {done.bytes_before / 1e6:.1f} MB became {done.bytes_after / 1e6:.1f} MB"
    )
    for name in done.left_out:
        print(f"left out: {name}, which the model does not use", file=sys.stderr)
    return 0


def _add_certs(commands: Commands) -> None:
    command = commands.add_parser(
        "certs",
        help=COMMANDS["certs"][0],
        description="Make a certificate authority for tests, a server's certificate and a "
        "client's.",
        epilog="example: moeserve certs --out certs --host localhost --host 127.0.0.1",
        allow_abbrev=False,
    )
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where to")
    command.add_argument(
        "--host",
        action="append",
        metavar="NAME",
        help="name or address of the server; may be repeated [localhost, 127.0.0.1, ::1]",
    )
    command.add_argument("--days", type=int, default=30, help="they are valid for [30]")
    command.set_defaults(run=_certs)


def _certs(args: argparse.Namespace) -> int:
    from moeserve.gateway.trust.authority import write_authority

    hosts = args.host or ["localhost", "127.0.0.1", "::1"]
    for file in write_authority(args.out, hosts, args.days):
        print(file)
    return 0


def _add_testbed(commands: Commands) -> None:
    from moeserve.testbed.cli import add_parser

    add_parser(commands, COMMANDS["testbed"][0])


COMMANDS: Mapping[str, tuple[str, Callable[[Commands], None]]] = {
    "serve": ("serve a model over gRPC and OpenAI HTTP", _add_serve),
    "peer": ("be a member of a cluster: prefill, decode, or keep KV", _add_peer),
    "gateway": ("open the doors of a cluster", _add_gateway),
    "up": ("start a whole cluster on this host", _add_up),
    "generate": ("answer one prompt without a server", _add_generate),
    "batch": ("answer a file of requests, OpenAI's batch format", _add_batch),
    "bench": ("how fast is it here, and how fast could it be", _add_bench),
    "doctor": ("would this host serve, and what would bind it", _add_doctor),
    "evaluate": ("how far a run of a model lies from a reference run", _add_evaluate),
    "quantize": ("write a copy of a model in 8 or 4 bits, or packed", _add_quantize),
    "certs": ("make certificates for tests of TLS", _add_certs),
    "testbed": ("run ranks on several hosts made of this one", _add_testbed),
    "place": ("decide which device holds which expert", add_place),
}


if __name__ == "__main__":
    sys.exit(main())
