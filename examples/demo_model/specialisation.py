"""Draw which domain uses which expert, from a recorded routing trace.

``python examples/demo_model/specialisation.py --routing FILE --out FIGURE.png`` reads a file
written by ``moeserve serve --record-routing`` and draws one panel per layer: rows are domains,
columns are experts (ordered by the domain that favours them), colour is how many times more
often the domain's tokens choose the expert than an even split would. ``--json`` prints the
information, in bits per chosen expert, that the domain gives about the expert of each layer.

Letters: T tokens, L MoE layers, C experts per token, D domains, E experts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

mpl.use("Agg")
import matplotlib.pyplot as plt


def read(path: Path) -> tuple[NDArray[np.float64], list[str], list[int]]:
    """Choices by domain, layer and expert [D, L, E], domain names, layer numbers."""
    with safe_open(path, "np") as file:
        meta = file.metadata()
        ids_TLC = file.get_tensor("topk_ids")
        lens_S = file.get_tensor("seq_lens")
        domain_S = file.get_tensor("domain_ids")
    names: list[str] = json.loads(meta["domains"])
    layers: list[int] = json.loads(meta["moe_layers"])
    experts = int(meta["num_experts"])
    counts = np.zeros((len(names), len(layers), experts))
    domain_T = np.repeat(domain_S, lens_S)
    for d in range(len(names)):
        chosen_TLC = ids_TLC[domain_T == d]
        for layer in range(len(layers)):
            counts[d, layer] = np.bincount(chosen_TLC[:, layer].ravel(), minlength=experts)
    return counts, names, layers


def information_L(counts_DLE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mutual information of domain and expert per layer, in bits, domains weighted evenly."""
    share = counts_DLE / counts_DLE.sum(-1, keepdims=True)
    mean = share.mean(0, keepdims=True)
    terms = np.where(share > 0, share * np.log2(np.maximum(share, 1e-12) / (mean + 1e-12)), 0.0)
    return terms.sum(-1).mean(0)


def draw(counts_DLE: NDArray[np.float64], names: list[str], layers: list[int], out: Path) -> None:
    lift = counts_DLE / counts_DLE.sum(-1, keepdims=True) * counts_DLE.shape[-1]
    bits = information_L(counts_DLE)
    rows = -(-len(layers) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(12, 2.1 * rows), layout="constrained")
    image = None
    for i, axis in enumerate(axes.flat):
        if i >= len(layers):
            axis.axis("off")
            continue
        favourite = lift[:, i].argmax(0)
        order = np.lexsort((-lift[:, i].max(0), favourite))
        image = axis.imshow(lift[:, i][:, order], aspect="auto", cmap="magma", vmin=0, vmax=6)
        axis.set_title(f"layer {layers[i]}: {bits[i]:.2f} bits", fontsize=10)
        axis.set_yticks(range(len(names)), names if i % 2 == 0 else [""] * len(names), fontsize=8)
        axis.set_xticks([])
    assert image is not None
    figure.colorbar(image, ax=axes, label="times an even split", shrink=0.6)
    figure.supxlabel("experts of the layer, ordered by the domain that favours them", fontsize=9)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--routing", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="a PNG or SVG file to draw")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    counts, names, layers = read(args.routing)
    if args.out:
        draw(counts, names, layers, args.out)
    bits_L = [round(float(b), 3) for b in information_L(counts)]
    bits = dict(zip(map(str, layers), bits_L, strict=True))
    tokens = {n: int(c) for n, c in zip(names, counts[:, 0].sum(-1), strict=True)}
    if args.json:
        print(json.dumps({"bits_by_layer": bits, "choices_by_domain": tokens}))
    else:
        print("bits the domain gives about the expert, by layer:", bits)


if __name__ == "__main__":
    main()
