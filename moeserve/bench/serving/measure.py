"""One run of ``moeserve bench serve``: the target is opened, warmed up and driven.

As many descriptors as the system allows are asked for, since an open loop may need thousands.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from moeserve.bench.serving.grpc import GrpcTarget
from moeserve.bench.serving.http import HttpTarget, require_model
from moeserve.bench.serving.openai import AskedOfAll
from moeserve.bench.serving.outcomes import Outcome
from moeserve.bench.serving.plan import PlannedRequest, warmup
from moeserve.bench.serving.prompts import PromptSource
from moeserve.bench.serving.report import LoadReport
from moeserve.bench.serving.run import LoadRun, RunOptions
from moeserve.bench.serving.slos import Slo
from moeserve.bench.serving.targets import ClientTls, TargetAddress, parse_address, read_key
from moeserve.errors import ConfigError, UnavailableError
from moeserve.gateway.descriptors import raise_descriptor_limit
from moeserve.pb import inference_pb2 as pb

VOCAB_SIZE = 256  # of servers that do not say: every vocabulary has as many
WARMUPS_AT_ONCE = 8
REFRESH_S = 0.25


async def measure(
    args: argparse.Namespace,
    requests: Sequence[PlannedRequest],
    slos: tuple[Slo, ...],
    percentiles: tuple[float, ...],
) -> LoadReport:
    """``args.prompts`` is ids or text. UnavailableError where the server does not say what it
    serves, or the warm-up fails."""
    raise_descriptor_limit()
    target, model = await _open(args)
    try:
        await _warm_up(args, target, requests)
        run: LoadRun[Any] = LoadRun(target, RunOptions(args.timeout, args.max_concurrency))
        cpu_s = time.process_time()
        outcomes = await _shown(run, requests)
        cpu_s = time.process_time() - cpu_s
    finally:
        await target.close()
    resent = target.resent if isinstance(target, HttpTarget) else 0
    return LoadReport(outcomes, slos, percentiles, cpu_s, settings_of(args, model), resent)


async def _open(args: argparse.Namespace) -> tuple[HttpTarget | GrpcTarget, str]:
    """The target, and the name of the model that it is asked for."""
    address = parse_address(args.target)
    tls = ClientTls(args.tls_ca, args.tls_cert, args.tls_key)
    key = None if args.api_key_file is None else read_key(args.api_key_file)
    if address.over_grpc:
        return await _open_grpc(args, address, tls, key)
    return await _open_http(args, address, tls, key)


async def _open_http(
    args: argparse.Namespace, address: TargetAddress, tls: ClientTls, key: str | None
) -> tuple[HttpTarget, str]:
    asked = AskedOfAll(
        model=args.model or "",
        api=args.api,
        prompts=args.prompts,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        standard=args.standard,
        extra=_extra(args.extra_body),
    )
    source = PromptSource(args.seed, args.vocab_size or VOCAB_SIZE)
    target = HttpTarget(address, asked, source, tls=tls, key=key)
    if args.model is None:
        target.ask_for(require_model(await target.models()))
    return target, target.model


def _extra(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--extra-body={text!r}: is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--extra-body={text!r}: expected an object")
    return found


async def _open_grpc(
    args: argparse.Namespace, address: TargetAddress, tls: ClientTls, key: str | None
) -> tuple[GrpcTarget, str]:
    if args.extra_body is not None or args.standard or args.api != "completions":
        raise ConfigError("--api, --extra-body and --standard: are of HTTP")
    target = GrpcTarget(address, tls=tls, key=key)
    try:
        info = await target.info()
        source = PromptSource(args.seed, args.vocab_size or info.vocab_size)
    except BaseException:  # goes on up; the channel must not stay
        await target.close()
        raise
    sampling = pb.SamplingParams(temperature=args.temperature, ignore_eos=args.ignore_eos)
    model = args.model or info.model
    target.ask_for(model, sampling, source, ids=args.prompts == "ids")
    return target, model


async def _warm_up(
    args: argparse.Namespace,
    target: HttpTarget | GrpcTarget,
    requests: Sequence[PlannedRequest],
) -> None:
    """UnavailableError where nothing comes of it: a run would only count failures."""
    if args.num_warmups == 0:
        return
    at_once = min(args.max_concurrency or WARMUPS_AT_ONCE, WARMUPS_AT_ONCE)
    run: LoadRun[Any] = LoadRun(target, RunOptions(args.timeout, at_once))
    outcomes = await run.drive(warmup(requests, args.num_warmups))
    if not any(outcome.ok for outcome in outcomes):
        first = outcomes[0]
        raise UnavailableError(
            f"{args.target}: {len(outcomes)} of {len(outcomes)} requests before the run failed, "
            f"the first with {first.failure}: {first.detail}"
        )


async def _shown(run: LoadRun[Any], requests: Sequence[PlannedRequest]) -> tuple[Outcome, ...]:
    """The run, with its progress on a terminal."""
    screen = Console(stderr=True)
    if not screen.is_terminal:
        return await run.drive(requests)
    said = TextColumn(
        "{task.fields[outstanding]} outstanding, {task.fields[failed]} failed, "
        "{task.fields[tokens]:,} tokens"
    )
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), said)
    with Progress(*columns, console=screen, transient=True, auto_refresh=False) as bar:
        shown = bar.add_task("requests", total=len(requests), outstanding=0, failed=0, tokens=0)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(run.drive(requests))
            while not task.done():
                await asyncio.wait([task], timeout=REFRESH_S)
                bar.update(
                    shown,
                    completed=run.ended,
                    outstanding=run.sent - run.ended,
                    failed=run.failed,
                    tokens=run.tokens,
                    refresh=True,
                )
    return task.result()


def settings_of(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """What the run was asked for, in the names of ``vllm bench serve`` where it has them."""
    rate = args.request_rate
    return {
        "backend": "moeserve-grpc" if args.target.startswith("grpc") else f"openai-{args.api}",
        "target": args.target,
        "model_id": model,
        "request_rate": None if rate is None else ("inf" if math.isinf(rate) else rate),
        "arrivals": args.arrivals,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "trace": None if args.trace is None else str(args.trace),
        "speed": args.speed,
        "seed": args.seed,
        "ignore_eos": args.ignore_eos,
    }
