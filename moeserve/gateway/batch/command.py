"""``moeserve batch``: checks files, loads the model, runs the lines, says what was done."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeserve.config.effect import require_effect
from moeserve.config.options import BatchConfig
from moeserve.config.sources import add_options, options_of, settings_from_args, to_yaml
from moeserve.errors import ConfigError
from moeserve.gateway.batch.answers import AnswerFile
from moeserve.gateway.batch.outputs import Outputs, count_lines
from moeserve.gateway.batch.progress import BatchProgress, Done
from moeserve.offload.interpreter import require_interpreter

INTERRUPTED = 130


def add_parser(commands: Any, text: str) -> None:
    command = commands.add_parser(
        "batch",
        help=text,
        description="Answer requests from a file in OpenAI's batch format into another file. What "
        "is in that already is not done again, so the same command goes on after any end.",
        epilog="example: moeserve batch requests.jsonl answers.jsonl --model demo",
        allow_abbrev=False,
    )
    command.add_argument("input", metavar="IN", type=Path, help="requests, one JSON line each")
    command.add_argument("output", metavar="OUT", type=Path, help="answers, as they come")
    command.add_argument(
        "--errors", metavar="FILE", type=Path, help="failed requests go there instead of OUT"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object at the end")
    add_options(command, BatchConfig)
    command.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """Lines of the input; ``failed`` and ``before`` are among those ``answered``, ``failed`` as
    far as the files tell. The other figures are of this run."""

    input: str
    output: str
    errors: str | None
    lines: int
    answered: int
    failed: int
    before: int
    complete: bool
    prompt_tokens: int
    generated_tokens: int
    steps: int
    preemptions: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rate = (self.prompt_tokens + self.generated_tokens) / max(self.seconds, 1e-9)
        end = "" if self.complete else "; stopped: give the same command again to go on"
        return (
            f"{self.answered} of {self.lines} requests answered, {self.failed} of them failed, "
            f"{self.before} were there before; {self.prompt_tokens} tokens in, "
            f"{self.generated_tokens} out in {self.seconds:.1f} s, {rate:.0f} tokens/s, "
            f"{self.preemptions} preemptions{end}"
        )


def run(args: argparse.Namespace) -> int:
    """0 where every request has a good answer, 1 where some failed, 130 where it was stopped."""
    settings = settings_from_args(args, os.environ)
    config = options_of(settings, BatchConfig)
    require_effect(config, settings)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    require_interpreter(config.memory)
    _require_files(args.input, args.output, args.errors)
    with contextlib.ExitStack() as files:
        answers = files.enter_context(AnswerFile(args.output))
        errors = answers if args.errors is None else files.enter_context(AnswerFile(args.errors))
        outputs = Outputs(answers, errors)
        lines = count_lines(args.input, outputs.found)
        summary = _answer_all(args, config, outputs, lines)
    print(json.dumps(summary.to_json()) if args.json else summary)
    if not summary.complete:
        return INTERRUPTED
    return 1 if summary.failed else 0


def _require_files(given: Path, output: Path, errors: Path | None) -> None:
    """ConfigError where the input is no file, or one file has two uses."""
    if not given.is_file():
        raise ConfigError(f"{given}: no such file; the input is a file of JSON lines")
    paths = [path.resolve() for path in (given, output, errors) if path is not None]
    for i, path in enumerate(paths):
        if path in paths[:i] or (
            path.exists() and any(p.exists() and path.samefile(p) for p in paths[:i])
        ):
            raise ConfigError(f"{path}: is given twice; input, output and errors are three files")


def _answer_all(
    args: argparse.Namespace, config: BatchConfig, outputs: Outputs, lines: int
) -> BatchSummary:
    """Loads the model if there is something left to do."""
    before = len(outputs.found)
    progress, done = BatchProgress(lines, before), Done()
    if before < lines:
        from moeserve.gateway.batch.session import run_batch

        done = run_batch(config, args.input, outputs, progress)
    tokens = progress.tokens()
    return BatchSummary(
        input=str(args.input),
        output=str(args.output),
        errors=None if args.errors is None else str(args.errors),
        lines=lines,
        answered=before + progress.answered,
        failed=outputs.failed_before + progress.failed,
        before=before,
        complete=done.complete,
        prompt_tokens=tokens.prompt,
        generated_tokens=tokens.generated,
        steps=done.steps,
        preemptions=done.preemptions,
        seconds=round(progress.seconds, 3),
    )
