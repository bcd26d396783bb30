"""Train the demo model: ``python examples/demo_model/train.py --data DIR --out DIR --steps N``.

Reproducible from ``--seed``: the batch of a step depends only on (seed, step), and the learning
rate is constant until the last fifth of ``--steps``, so a run may be stopped at any time, resumed
by the same command, and shortened or prolonged while it is still in the constant part. ``--finish``
steps on mostly sums follow, from half the rate down to nothing. Progress
goes to the terminal and to ``log.jsonl``. On a machine that others use too, run it with
``OMP_WAIT_POLICY=PASSIVE``: threads that spin while they wait slow each other down many times.

Optimisers: Muon (K. Jordan, 2024; scaled as in Moonlight, 2502.16982, section 2.2) for matrices,
AdamW for embeddings, router, head and norms. Balance: DeepSeek-V3 section 2.1.2, a bias that is
moved by the sign of each expert's overload, no auxiliary loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from data import GENERATED, MIXTURE
from model import Config, DemoModel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WARMUP = 60
DECAY_SHARE = 0.2
LONG_SHARE = 0.1
TOKENS_PER_STEP = 4096
# Long windows come last: they cost more per token.
WINDOW, LONG_WINDOW = 256, 1024
# Language first; then more of what can be checked, which is slow to learn.
LATE_FROM = 1000
LATE_MIXTURE = {
    "stories_en": 0.28,
    "math_arithmetic": 0.40,
    "novels_en": 0.07,
    "code_py": 0.07,
    "math_wordproblems": 0.07,
    "novels_fr": 0.06,
    "technical_zh": 0.05,
}
BIAS_SPEED = 0.003
MTP_WEIGHT, MTP_ROWS_ONE_IN = 0.3, 4


# After ``--steps``: what answers can be checked by, from half the peak rate down to nothing.
FINISH_MIXTURE = {
    GENERATED: 0.50,
    "math_arithmetic": 0.14,
    "stories_en": 0.20,
    "novels_en": 0.03,
    "code_py": 0.04,
    "math_wordproblems": 0.04,
    "novels_fr": 0.03,
    "technical_zh": 0.02,
}
FINISH_RISE = 20


class Muon:
    """Momentum, orthogonalised by five Newton-Schulz steps; batched over leading dimensions."""

    def __init__(self, params: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.05):
        self.params, self.momentum, self.decay = params, momentum, decay
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for p, buffer in zip(self.params, self.buffers, strict=True):
            assert p.grad is not None
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = orthogonalise(p.grad.lerp(buffer, self.momentum))
            p.mul_(1 - lr * self.decay)
            p.add_(update, alpha=-lr * 0.2 * max(p.shape[-2:]) ** 0.5)


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, about; quintic iteration of K. Jordan."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(g.dtype)


def learning_rate(step: int, steps: int, finish: int, peak: float) -> float:
    if step >= steps:
        done = step - steps
        return peak / 2 * min((done + 1) / FINISH_RISE, (finish - done) / finish)
    decay = max(1, int(steps * DECAY_SHARE))
    rise = min(1.0, (step + 1) / WARMUP)
    fall = min(1.0, (steps - step) / decay)
    return peak * rise * fall


class Windows:
    """Random windows over the token arrays, drawn by (seed, step)."""

    def __init__(self, folder: Path, seed: int, steps: int) -> None:
        self.seed, self.steps = seed, steps
        domains = [*MIXTURE, GENERATED]
        self.arrays = [np.load(folder / f"{d}.train.npy", mmap_mode="r") for d in domains]
        self.shares = [
            [mixture.get(d, 0.0) for d in domains]
            for mixture in (MIXTURE, LATE_MIXTURE, FINISH_MIXTURE)
        ]

    def batch(self, step: int, window: int) -> Tensor:
        rng = np.random.default_rng((self.seed, step))
        shares = self.shares[2 if step >= self.steps else int(step >= LATE_FROM)]
        rows = []
        for _ in range(TOKENS_PER_STEP // window):
            array = self.arrays[rng.choice(len(self.arrays), p=shares)]
            start = rng.integers(0, len(array) - window - 2)
            rows.append(array[start : start + window + 2].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def held_out_loss(model: DemoModel, folder: Path, max_windows: int = 8) -> dict[str, float]:
    """Mean next-token loss in nats per token, by domain, over windows of ``WINDOW``."""
    model.eval()
    losses = {}
    for domain in MIXTURE:
        ids = torch.from_numpy(np.load(folder / f"{domain}.held.npy").astype(np.int64))
        count = min(max_windows, (len(ids) - 2) // WINDOW)
        rows = torch.stack([ids[i * WINDOW : (i + 1) * WINDOW + 2] for i in range(count)])
        losses[domain] = round(float(model.losses(rows, 1)[0]), 4)
    model.train()
    for layer in model.moe_layers():
        layer.load_E.zero_()
    return losses


class Trainer:
    """Owns model, optimiser state and the step counter; saves and resumes them."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = DemoModel(Config())
        matrices, rest = [], []
        for name, p in self.model.named_parameters():
            plain = p.ndim >= 2 and not name.startswith(("embed", "head"))
            (matrices if plain and not name.endswith("router") else rest).append(p)
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.step_no = 0

    def step(self, ids: Tensor, lr: float) -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16):
            main, mtp = self.model.losses(ids, max(1, len(ids) // MTP_ROWS_ONE_IN))
        self.model.zero_grad(set_to_none=True)
        (main + MTP_WEIGHT * mtp).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step(lr)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        for layer in self.model.moe_layers():
            layer.bias_E += BIAS_SPEED * (layer.load_E.mean() - layer.load_E).sign()
        self.step_no += 1
        return float(main.detach()), float(mtp.detach())

    def imbalance(self) -> float:
        """Largest load over mean load, averaged over layers; resets the counts."""
        ratios = [float(m.load_E.max() / m.load_E.mean()) for m in self.model.moe_layers()]
        for layer in self.model.moe_layers():
            layer.load_E.zero_()
        return sum(ratios) / len(ratios)

    def save(self, path: Path) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"muon.{i}": b for i, b in enumerate(self.muon.buffers)}
        for i, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
        tensors |= {f"load.{i}": m.load_E for i, m in enumerate(self.model.moe_layers())}
        partial = path.with_suffix(".partial")
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        save_file(tensors, partial, metadata={"step": str(self.step_no)})
        os.replace(partial, path)

    def load(self, path: Path, step_no: int) -> None:
        tensors = load_file(path)
        prefix = "model."
        self.model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        for i in range(len(self.muon.buffers)):
            self.muon.buffers[i].copy_(tensors[f"muon.{i}"])
        for i, layer in enumerate(self.model.moe_layers()):
            layer.load_E.copy_(tensors[f"load.{i}"])
        state = self.adam.state_dict()
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                state["state"].setdefault(int(index), {})[name] = value
        self.adam.load_state_dict(state)
        self.step_no = step_no


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by data.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--finish", type=int, default=550, help="steps of the finish after them")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--stop-after", type=int, help="stop after this many steps of this run")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.out / "checkpoint.safetensors", args.out / "log.jsonl"

    trainer, windows = Trainer(args.seed), Windows(args.data, args.seed, args.steps)
    if checkpoint.exists():
        with safe_open(checkpoint, "pt") as file:
            step_no = int(file.metadata()["step"])
        trainer.load(checkpoint, step_no)
        print(f"resumed at step {step_no}")
    size = sum(p.numel() for p in trainer.model.parameters())
    total = args.steps + args.finish
    print(f"{size / 1e6:.2f} M parameters, {total} steps of {TOKENS_PER_STEP} tokens")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    last = trainer.step_no + (args.stop_after or total)
    with Progress(*columns) as progress, log.open("a") as log_file:
        task = progress.add_task("training", total=total, completed=trainer.step_no)
        while trainer.step_no < min(total, last):
            step, began = trainer.step_no, time.monotonic()
            long = args.steps * (1 - LONG_SHARE) <= step < args.steps
            ids = windows.batch(step, LONG_WINDOW if long else WINDOW)
            main_loss, mtp_loss = trainer.step(
                ids, learning_rate(step, args.steps, args.finish, args.lr)
            )
            row = {"step": step, "loss": round(main_loss, 4), "mtp_loss": round(mtp_loss, 4)}
            row["seconds"] = round(time.monotonic() - began, 3)
            if (step + 1) % 10 == 0:
                row["imbalance"] = round(trainer.imbalance(), 3)
            if (step + 1) % 250 == 0 or step + 1 == total:
                row["held_out"] = held_out_loss(trainer.model, args.data)
                trainer.save(checkpoint)
            log_file.write(json.dumps(row) + "\n")
            log_file.flush()
            progress.update(task, advance=1, description=f"loss {main_loss:.3f}")
    trainer.save(checkpoint)
    (args.out / "config.json").write_text(json.dumps(dataclasses.asdict(trainer.model.c)))


if __name__ == "__main__":
    main()
