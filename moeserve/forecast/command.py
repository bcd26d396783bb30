"""What ``moeserve doctor`` takes to measure a host and to predict a model, and how it does so."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from moeserve.config.kinds import parse_bytes
from moeserve.config.options import RankModelOptions
from moeserve.errors import ConfigError

if TYPE_CHECKING:
    from moeserve.forecast.predictions import ForecastReport
    from moeserve.kernels.ops import Ops

EXAMPLE = "moeserve doctor --model demo --calibrate --prompt 512 --output 128 --batch 1,8,64"
SIZES = ("memory", "kv_memory", "swap_memory")
PASSED_ON = (
    *("kv_memory", "swap_memory", "quantization", "kv_dtype", "dtype"),
    *("max_num_seqs", "max_num_batched_tokens", "block_size"),
    *("speculation", "draft_model"),
)
MOST_BATCHES = 16


@dataclass(frozen=True, slots=True)
class ForecastRequest:
    """Of the command line; ``memory`` None is all that this process may take."""

    prompt: int
    output: int
    batches: tuple[int, ...]
    memory: int | None
    options: RankModelOptions


def add_forecast_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what to predict", f"with --model; example: {EXAMPLE}")
    group.add_argument("--prompt", type=int, metavar="N", help="tokens of a prompt [512]")
    group.add_argument("--output", type=int, metavar="N", help="tokens of an answer [128]")
    group.add_argument("--batch", metavar="N,N", help="requests at once [1,8,64]")
    group.add_argument("--memory", metavar="SIZE", help="what the process may take [all there is]")
    group.add_argument("--kv-memory", metavar="SIZE", help="as of serve, and so are these")
    group.add_argument("--swap-memory", metavar="SIZE")
    group.add_argument("--quantization", choices=("auto", "none", "int8", "int4"))
    group.add_argument("--kv-dtype", choices=("auto", "float32", "bfloat16", "int8"))
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"))
    group.add_argument("--max-num-seqs", type=int, metavar="N")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N")
    group.add_argument("--block-size", type=int, metavar="N")
    group.add_argument("--speculation", choices=("off", "ngram", "mtp", "draft", "auto"))
    group.add_argument("--draft-model", metavar="MODEL")
    command.add_argument(
        "--calibrate",
        action="store_true",
        help="measure memory, disk, kernels and steps for seconds, for the model or for any, and "
        "keep the result in the cache folder",
    )
    command.add_argument("--threads", type=int, metavar="N", help="to measure and predict with")


def request_of(args: argparse.Namespace) -> ForecastRequest | None:
    """None where nothing is to be predicted: there is no model, or nothing but it is said."""
    words = ("prompt", "output", "batch", "memory", *PASSED_ON)
    said = {name: getattr(args, name) for name in words if getattr(args, name) is not None}
    if args.model is None:
        if said:
            raise ConfigError(f"--{next(iter(said)).replace('_', '-')} needs --model")
        return None
    if not said and not args.calibrate:
        return None
    sizes = {name: bytes_of(name, said.pop(name)) for name in SIZES if name in said}
    options = {name: said[name] for name in PASSED_ON if name in said}
    options |= sizes
    return ForecastRequest(
        prompt=args.prompt or 512,
        output=args.output or 128,
        batches=batches_of(args.batch or "1,8,64"),
        memory=sizes.get("memory"),
        options=options_from(options),
    )


def options_from(said: Mapping[str, Any]) -> RankModelOptions:
    try:
        return RankModelOptions(**said)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def bytes_of(name: str, text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--{name.replace('_', '-')}={text!r}: {error}") from error
    assert isinstance(size, int), size
    if size < 1:
        raise ConfigError(f"--{name.replace('_', '-')}={text!r}: expected more than nothing")
    return size


def batches_of(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--batch={text!r}: expected numbers such as 1,8,64") from error
    if not 1 <= len(found) <= MOST_BATCHES:
        raise ConfigError(f"--batch: {len(found)} numbers, expected 1 to {MOST_BATCHES}")
    return found


def calibrate_here(
    model: str | None, threads: int | None, report: Callable[[str], None]
) -> tuple[str, Path]:
    """Measures and keeps; the name of the calibration, and where it is."""
    from moeserve.forecast.calibrate import calibrate
    from moeserve.models.library import resolve_model
    from moeserve.offload.calibrations import calibration_folder, keep

    folder = calibration_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made: {error.strerror}; set XDG_CACHE_HOME to a folder that can"
        ) from error
    path = None if model is None else resolve_model(model)
    machine = calibrate(path, folder, threads=threads, report=report)
    return machine.name, keep(machine, folder)


def forecast_here(
    model: str, asked: ForecastRequest, threads: int | None, available: int
) -> tuple[ForecastReport, str]:
    """With the calibration of this host for this model, else for any; without one there is no
    prediction of speed. Beside it, why a calibration that is there cannot be used, or "".
    ``available`` bytes may still be taken."""
    from moeserve.forecast.drafts import draft_sizes
    from moeserve.forecast.predictions import ForecastQuestion, forecast
    from moeserve.forecast.shapes import ANY_MODEL, shapes_of
    from moeserve.kernels.select import choose_ops
    from moeserve.models.library import resolve_model
    from moeserve.offload.calibrations import calibration_folder, find, host_name
    from moeserve.offload.checkpoint_demand import stored_sizes
    from moeserve.offload.process_memory import resident

    ops = choose_ops(threads=threads)
    folder = resolve_model(model)
    sizes = stored_sizes(folder, asked.options)
    shapes = shapes_of(sizes.spec).name
    count = threads_and_isa(ops)[0]
    machine, unusable = None, ""
    try:
        machine = find(calibration_folder(), host_name(), count, shapes, ANY_MODEL)
    except ConfigError as broken:
        unusable = broken.message
    taken = resident()
    question = ForecastQuestion(
        prompt=asked.prompt,
        output=asked.output,
        batches=asked.batches,
        budget=asked.memory or available + taken,
        process=taken,
        options=asked.options,
        draft=draft_sizes(asked.options, folder, ops),
    )
    return forecast(sizes, question, ops, machine), unusable


def threads_and_isa(ops: Ops) -> tuple[int, str]:
    """Of the native half, or what plain torch was set to."""
    if ops.name == "reference":
        import torch

        return torch.get_num_threads(), ops.name
    from moeserve.kernels.cpu import _cpu

    return _cpu.threads(), _cpu.isa()
