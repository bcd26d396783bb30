"""The mixture's feed-forward layer alone: our ``moe_ffn`` beside others', on the same routing.

Each implementation is a worker with weights of its own, larger than the caches, bound to as many
cores as it has threads. Rounds are interleaved. Letters: T tokens, C experts per token.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

from moeserve.bench.roofline import experts_seconds, roofline
from moeserve.bench.rows import BenchReport, Row, summarise
from moeserve.bench.workers import Worker
from moeserve.errors import ConfigError, MoeserveError
from moeserve.kernels.probe import Machine, faster, probe_machine

START_S = 120.0
RUN_S = 120.0


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """The default is a layer of Qwen3-30B-A3B."""

    experts: int = 128
    per_token: int = 8
    hidden: int = 2048
    inner: int = 768

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.inner


@dataclass(frozen=True, slots=True)
class Contender:
    """A command that answers ``prepare`` and ``run``; ``absent`` says why there is none."""

    peer: str
    precision: str
    command: tuple[str, ...]
    most_threads: int = 1 << 10
    more_cores: int = 0  # for threads that spin beside those which compute
    absent: str = ""


ContenderSamples = dict[Contender, list[float]]


def ours(kind: str) -> Contender:
    module = ("-m", "moeserve.bench.worker.native_experts")
    return Contender(f"moeserve {kind}", kind, (sys.executable, *module, kind))


def torch_loops() -> list[Contender]:
    """bf16, int8 by ``_int_mm``, int8 by fbgemm."""
    module = ("-m", "moeserve.bench.worker.torch_experts")
    kinds = {"bf16": "bf16", "int_mm": "int8", "fbgemm": "int8"}
    return [
        Contender(f"torch {kind}", precision, (sys.executable, *module, kind))
        for kind, precision in kinds.items()
    ]


def read_contenders(file: Path) -> list[Contender]:
    """Others, from a JSON list of objects with the fields of ``Contender``."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(listed, list):
            raise TypeError(f"this is a {type(listed).__name__}")
        return [Contender(**{**one, "command": tuple(one["command"])}) for one in listed]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--contenders={str(file)!r}: expected a list of "
            f"{{{', '.join(field.name for field in fields(Contender))}}}: {error}"
        ) from error


def routing(layer: MoeLayer, tokens: int) -> list[list[int]]:
    """Uniform, drawn once: every implementation meets the same."""
    draw = random.Random(tokens)
    return [draw.sample(range(layer.experts), layer.per_token) for _ in range(tokens)]


def measure(
    contenders: Sequence[Contender],
    *,
    layer: MoeLayer,
    tokens: Sequence[int],
    threads: Sequence[int],
    rounds: int,
    seconds: float,
    report: Callable[[str], None] = lambda _: None,
) -> BenchReport:
    """Microseconds of one call, for each number of tokens and threads."""
    machines: list[Machine] = []
    rows: list[Row] = []
    for count in threads:
        machine = probe_machine(count)
        taken: dict[int, ContenderSamples] = {}
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            workers, problems = start_all(stack, contenders, layer, count, folder, report)
            for size in tokens:
                report(f"{count} threads, {size} tokens")
                taken[size] = take_samples(workers, problems, layer, size, rounds, seconds)
        machine = faster(machine, probe_machine(count))
        machines.append(machine)
        for size, samples in taken.items():
            limits = least_us(machine, layer, size, contenders)
            for contender in contenders:
                row = Row(
                    "moe_ffn",
                    contender.peer,
                    "us",
                    count,
                    tokens=size,
                    roofline=limits[contender],
                    note=problems.get(contender, ""),
                )
                found = samples.get(contender)
                rows.append(summarise(row, found) if found else row)
    return BenchReport(tuple(machines), tuple(rows))


def start_all(
    stack: ExitStack,
    contenders: Sequence[Contender],
    layer: MoeLayer,
    threads: int,
    folder: Path,
    report: Callable[[str], None],
) -> tuple[dict[Contender, Worker], dict[Contender, str]]:
    """Those that could be started, and why the others could not."""
    workers: dict[Contender, Worker] = {}
    problems: dict[Contender, str] = {}
    for contender in contenders:
        if contender.absent:
            problems[contender] = contender.absent
            continue
        if threads > contender.most_threads:
            problems[contender] = f"not run: it is faster with {contender.most_threads} threads"
            continue
        report(f"{threads} threads: starting {contender.peer}")
        try:
            workers[contender] = start(stack, contender, layer, threads, folder)
        except MoeserveError as failed:
            problems[contender] = f"failed: {failed.message}"
    return workers, problems


def start(
    stack: ExitStack, contender: Contender, layer: MoeLayer, threads: int, folder: Path
) -> Worker:
    worker = Worker(
        contender.peer,
        (*contender.command, str(threads)),
        cpus=threads + contender.more_cores,
        log=folder / f"{contender.peer.replace(' ', '-')}.log",
        env={"OMP_NUM_THREADS": str(threads)},
        deadline=START_S,
    )
    stack.enter_context(worker)
    worker.request(
        "prepare",
        deadline=START_S,
        experts=layer.experts,
        hidden=layer.hidden,
        inner=layer.inner,
        per_token=layer.per_token,
    )
    return worker


def take_samples(
    workers: dict[Contender, Worker],
    problems: dict[Contender, str],
    layer: MoeLayer,
    tokens: int,
    rounds: int,
    seconds: float,
) -> ContenderSamples:
    """Microseconds; whoever fails is left out from then on, and ``problems`` says why."""
    ids = routing(layer, tokens)
    samples: ContenderSamples = {}
    for _ in range(rounds):
        for contender in [c for c in workers if c not in problems]:
            try:
                answer = workers[contender].request(
                    "run", deadline=RUN_S, ids=ids, seconds=seconds, hidden=layer.hidden
                )
            except MoeserveError as failed:
                problems[contender] = f"failed: {failed.message}"
                continue
            samples.setdefault(contender, []).extend(1e6 * took for took in answer["seconds"])
    return samples


def least_us(
    machine: Machine, layer: MoeLayer, tokens: int, contenders: Sequence[Contender]
) -> dict[Contender, float]:
    met = Counter(expert for chosen in routing(layer, tokens) for expert in chosen)
    return {
        c: 1e6 * experts_seconds(roofline(machine, c.precision), met.values(), layer.expert_weights)
        for c in contenders
    }
