"""One rank of ``test_ranks``: generates greedily for the cases it reads, and writes its logits.

    python law_ranks.py STORE_PORT CASES.json OUT_FOLDER

Rank and world come from mpirun's environment. Plan and prompts follow from a case's seed, so that
all ranks, and the test, draw the same. Cases of one seed follow one another and differ in backend
and microbatches alone: what a rank loads for the first serves all of them.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from moeserve.comm.build import Bounds, open_parallel
from moeserve.comm.group import Group, Topology
from moeserve.comm.launch.note_store import join_store
from moeserve.comm.layout import LayerLayout
from moeserve.config.options import LoadOptions
from moeserve.kernels.ops import Ops
from moeserve.kernels.select import choose_ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.families import read_spec
from moeserve.models.spec import ModelSpec, MoeSpec
from moeserve.observe.progress import Progress

BLOCK = 8
BLOCKS = 16  # of a sequence
STEPS = 3


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    quantization: str
    backend: str
    world: int
    node_size: int
    micro: int
    extra: int
    seed: int

    @property
    def topology(self) -> Topology:
        return Topology(tuple(r // self.node_size for r in range(self.world)))


def layouts_of(spec: ModelSpec, case: Case) -> dict[int, LayerLayout]:
    """Every expert somewhere, ``extra`` slots of each rank for replicas."""
    random, found = np.random.default_rng(case.seed), {}
    for number, layer in enumerate(spec.layers):
        if isinstance(layer.mlp, MoeSpec):
            experts = layer.mlp.router.num_experts
            slots = (-(-experts // case.world) + case.extra) * case.world
            more = random.integers(experts, size=slots - experts)
            expert_S = random.permutation(np.concatenate((np.arange(experts), more)))
            found[number] = LayerLayout(expert_S.astype(np.int32), experts, case.world)
    return found


def prompts_of(case: Case, vocab: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, and the home of each; some ranks may have none."""
    random = np.random.default_rng(case.seed + 1)
    prompts = [
        random.integers(vocab, size=int(random.integers(1, 40))).tolist()
        for _ in range(int(random.integers(2, 6)))
    ]
    return prompts, random.integers(case.world, size=len(prompts)).tolist()


def greedy(
    decoder: Decoder, prompts: Sequence[Sequence[int]], micro: int, seed: int
) -> list[Tensor]:
    """Logits [STEPS, V] of each prompt: prefill, then the likeliest token again and again."""
    cache = decoder.new_cache(BLOCKS * max(1, len(prompts)), BLOCK)
    random = np.random.default_rng(seed)
    tokens = [list(p) for p in prompts]
    start = [0] * len(prompts)
    found: list[list[Tensor]] = [[] for _ in prompts]
    for _ in range(STEPS):
        parts: list[list[Span]] = [[] for _ in range(micro)]
        owner: list[list[int]] = [[] for _ in range(micro)]
        for i, known in enumerate(tokens):
            blocks = list(range(i * BLOCKS, (i + 1) * BLOCKS))
            m, new = int(random.integers(micro)), known[start[i] :]
            cut = int(random.integers(len(new)))
            if cut and m + 1 < micro:
                parts[m].append(Span(new[:cut], start[i], blocks, 0))
                new, m = new[cut:], m + 1
            parts[m].append(Span(new, len(known) - len(new), blocks, 1))
            owner[m].append(i)
        rows = decoder.forward_micro([pack_spans(spans, BLOCK) for spans in parts], cache)
        for i, row in zip(itertools.chain(*owner), torch.cat(rows), strict=True):
            found[i].append(row)
            start[i] = len(tokens[i])
            tokens[i].append(int(row.argmax()))
    return [torch.stack(rows) for rows in found]


@dataclass(frozen=True)
class Loaded:
    """What a rank holds for all cases of a seed."""

    seed: int
    decoder: Decoder
    layouts: dict[int, LayerLayout]


def load(case: Case, rank: int, ops: Ops) -> Loaded:
    spec, _ = read_spec(Checkpoint.open(case.model))
    layouts = layouts_of(spec, case)
    mine = {layer: layout.of_rank(rank) for layer, layout in layouts.items()}
    decoder = load_decoder(
        case.model, ops=ops, options=LoadOptions(quantization=case.quantization), experts=mine
    )
    return Loaded(case.seed, decoder, layouts)


def run(case: Case, loaded: Loaded, group: Group, ops: Ops) -> dict[str, Tensor]:
    decoder = loaded.decoder
    parallel = open_parallel(
        ops,
        decoder.stack.layers,
        loaded.layouts,
        group,
        case.topology,
        backend=case.backend,
        bounds=Bounds(256, case.micro, deadline_s=60.0),
        progress=Progress(),
    )
    prompts, home = prompts_of(case, decoder.spec.vocab)
    own = [i for i, rank in enumerate(home) if rank == group.rank]
    rows = greedy(
        decoder.over(parallel), [prompts[i] for i in own], case.micro,
        case.seed + group.rank,
    )  # fmt: skip
    parallel.dispatcher.close()
    return {str(i): row for i, row in zip(own, rows, strict=True)}


def main() -> None:
    torch.set_num_threads(1)
    importlib.import_module("mpi4py.MPI")  # starts MPI, which takes all ranks
    rank, world = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
    store = join_store("127.0.0.1", int(sys.argv[1]))
    cases: list[dict[str, Any]] = json.loads(Path(sys.argv[2]).read_text())
    ops, loaded = choose_ops(threads=1), None
    for case in (Case(**fields) for fields in cases):
        if rank < case.world:
            if loaded is None or loaded.seed != case.seed:
                loaded = load(case, rank, ops)
            group = Group(rank, world, PrefixStore(case.name, store))
            rows = run(case, loaded, group.sub_group(range(case.world)), ops)
            save_file(rows, Path(sys.argv[3]) / f"{case.name}.{rank}.safetensors")


if __name__ == "__main__":
    main()
