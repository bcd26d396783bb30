"""Write the demo model's card from measured files.

``python examples/demo_model/card.py --evaluation FILE --run DIR --data DIR --model DIR`` puts
``README.md`` into the model folder. Every figure in it comes from ``evaluation.json`` (by
``evaluate.py``), the training log, or the token counts of ``data.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from data import GENERATED, MIXTURE
from safetensors import safe_open
from train import FINISH_MIXTURE, LATE_FROM, LATE_MIXTURE

SOURCES = {
    "stories_en": ("English short stories (TinyStories samples)", "CDLA-Sharing-1.0"),
    "novels_en": ("24 English novels, 1839-1911", "public domain (US)"),
    "novels_fr": ("26 French novels, 1840-1920 (ELTeC-fra)", "public domain"),
    "math_wordproblems": ("GSM8K, training split", "MIT"),
    "math_arithmetic": ("synthetic arithmetic and algebra", "own work"),
    "technical_zh": ("Chinese technical documentation of open-source projects", "Apache-2.0"),
    "code_py": ("the Python standard library", "PSF-2.0"),
}

TEXT = """\
# moeserve demo model

A small Mixture-of-Experts language model with the architecture of DeepSeek-V3, trained from
scratch by `examples/demo_model` so that a server has something real to serve offline: experts that
specialise, a draft module that is sometimes right, answers that can be checked.
It is for demonstrations and tests. It knows nothing, and must not be used for anything that matters.

| | |
|---|---|
| parameters | {total:.2f} M stored; about {active:.1f} M used per token |
| layers | {layers} ({dense} dense, {moe} MoE), hidden size {hidden}, {heads} heads, MLA with a latent of {latent} |
| experts | {experts} routed, top-{top_k} from {topk_group} of {n_group} groups, sigmoid scores with balancing bias; {shared} shared |
| multi-token prediction | 1 module, sharing embedding and head |
| vocabulary | {vocab} tokens, byte-level BPE, every digit its own token |
| context | {context} tokens |
| weights | bf16 safetensors, {megabytes:.1f} MB, licensed Apache-2.0 like the project |

## Training

{steps} steps of 4,096 tokens ({tokens:.1f} M tokens in all) on two CPU cores, {hours:.1f} hours of
stepping. Muon and AdamW, bf16 autocast, no auxiliary balancing loss: at the end the busiest expert of a layer had
{imbalance:.2f} times the mean load. Order and initialisation follow from the seed.

```bash
python examples/demo_model/data.py --corpus CORPUS --out data
python examples/demo_model/train.py --data data --out run --steps {main_steps} --finish {finish}
python examples/demo_model/export.py --data data --run run --out demo
python examples/demo_model/evaluate.py --model demo --data data --out evaluation.json
python examples/demo_model/card.py --evaluation evaluation.json --run run --data data --model demo
```

## Data

One document in fifty was held out of everything, the tokenizer included. Shares are of the
training windows: before step {late_from}, from there on, and in the finish of {finish} steps.

| domain | text | licence | tokens | early | late | finish |
|---|---|---|---|---|---|---|
{data_rows}

## Held-out results

Measured by `examples/demo_model/evaluate.py` with moeserve's CPU kernels on the shipped weights.
Acceptance is how often the MTP module's greedy guess of the token after next equals the model's
own greedy choice, on its own continuations of held-out text.

| domain | loss (nats/token) | bits/byte | MTP acceptance |
|---|---|---|---|
{domain_rows}

Exact match of greedy answers to problems that do not occur in the training text: held-out ones of
the corpus, most of them with numbers of three to five digits, and smaller ones drawn for the
measurement. Guessing would be right in one of some hundred or thousand cases.

| arithmetic | problems | exact match |
|---|---|---|
{arithmetic_rows}
"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--finish", type=int, default=550, help="as given to train.py")
    args = parser.parse_args()

    measured = json.loads(args.evaluation.read_text())
    config = json.loads((args.model / "config.json").read_text())
    # A resumed run repeats the steps after its checkpoint: the last row of a step counts.
    log = {r["step"]: r for r in map(json.loads, (args.run / "log.jsonl").read_text().splitlines())}
    sizes = tensor_sizes(args.model / "model.safetensors")
    expert = sum(n for name, n in sizes.items() if ".experts." in name and ".layers.8." not in name)
    mtp = sum(n for name, n in sizes.items() if ".layers.8." in name)
    idle = expert * (1 - config["num_experts_per_tok"] / config["n_routed_experts"])
    total = sum(sizes.values())
    text = TEXT.format(
        total=total / 1e6,
        active=(total - mtp - idle - config["vocab_size"] * config["hidden_size"]) / 1e6,
        layers=config["num_hidden_layers"],
        dense=config["first_k_dense_replace"],
        moe=config["num_hidden_layers"] - config["first_k_dense_replace"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        latent=config["kv_lora_rank"],
        experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        shared=config["n_shared_experts"],
        topk_group=config["topk_group"],
        n_group=config["n_group"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        megabytes=(args.model / "model.safetensors").stat().st_size / 1e6,
        steps=len(log),
        main_steps=len(log) - args.finish,
        tokens=len(log) * 4096 / 1e6,
        hours=sum(r["seconds"] for r in log.values()) / 3600,
        imbalance=[r["imbalance"] for r in log.values() if "imbalance" in r][-1],
        late_from=LATE_FROM,
        finish=args.finish,
        data_rows="\n".join(
            f"| {d} | {SOURCES[d][0]} | {SOURCES[d][1]} | "
            f"{measured['domains'][d]['train_tokens']:,} | "
            f"{MIXTURE[d]:.2f} | {LATE_MIXTURE[d]:.2f} | {FINISH_MIXTURE[d]:.2f} |"
            for d in MIXTURE
        )
        + f"\n| {GENERATED} | sums drawn by `data.py`, none of them held out | own work | "
        f"{len(np.load(args.data / f'{GENERATED}.train.npy', mmap_mode='r')):,} | 0 | 0 | "
        f"{FINISH_MIXTURE[GENERATED]:.2f} |",
        domain_rows="\n".join(
            f"| {d} | {row['loss_nats_per_token']:.3f} | {row['bits_per_byte']:.3f} | "
            f"{row['mtp_acceptance']:.2f} |"
            for d, row in measured["domains"].items()
        ),
        arithmetic_rows="\n".join(
            f"| {kind} | {row['problems']} | {row['exact_match']:.2f} |"
            for kind, row in measured["arithmetic"].items()
        ),
    )
    (args.model / "README.md").write_text(text)


def tensor_sizes(path: Path) -> dict[str, int]:
    """Elements of every tensor."""
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    sizes = {}
    for name, shape in shapes.items():
        sizes[name] = 1
        for side in shape:
            sizes[name] *= side
    return sizes


if __name__ == "__main__":
    main()
