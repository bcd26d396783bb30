"""The model that we train ourselves loads as DeepSeek-V3, its MTP module included.

The training code is an independent oracle: it expands keys and values where we absorb, and knows
no cache.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeserve.errors import CheckpointError
from moeserve.kernels.ops import Ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder

SOURCE = Path(__file__).parents[2] / "examples" / "demo_model" / "model.py"
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
IDS = torch.randint(0, 320, (30,), generator=torch.Generator().manual_seed(5))
BLOCKS = [3, 1, 0, 2]


@pytest.fixture(scope="module")
def training() -> Iterator[ModuleType]:
    found = importlib.util.spec_from_file_location("demo_model_under_test", SOURCE)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    yield module
    del sys.modules[found.name]


@pytest.fixture(scope="module")
def trained(training: ModuleType) -> Any:
    torch.manual_seed(11)
    model = training.DemoModel(training.Config(**SMALL))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(1.0 + 0.2 * torch.randn_like(p))
            if name in ("embed.weight", "head.weight"):
                p.mul_(8)
        for moe in model.moe_layers():
            moe.bias_E.copy_(0.3 * torch.randn_like(moe.bias_E))
    return model


@pytest.fixture
def folder(trained: Any, tmp_path: Path) -> Path:
    save_file(exported(trained), tmp_path / "model.safetensors")
    config = {"architectures": ["DeepseekV3ForCausalLM"], **asdict(trained.c)}
    config |= {"num_nextn_predict_layers": 1, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def exported(model: Any) -> dict[str, Tensor]:
    """Its tensors, named as DeepSeek-V3 names them."""
    last = model.c.num_hidden_layers
    blocks = {f"layers.{i}.": f"model.layers.{i}." for i in range(last)}
    renamed = {
        **blocks,
        "mtp_norm.": f"model.layers.{last}.shared_head.norm.",
        "mtp.": f"model.layers.{last}.",
        "enorm.": f"model.layers.{last}.enorm.",
        "hnorm.": f"model.layers.{last}.hnorm.",
        "eh_proj.": f"model.layers.{last}.eh_proj.",
        "embed.": "model.embed_tokens.",
        "norm.": "model.norm.",
        "head.": "lm_head.",
    }
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        old = next(prefix for prefix in renamed if name.startswith(prefix))
        ours = renamed[old] + name.removeprefix(old)
        stem = ours.rpartition(".")[0]
        if ours.endswith(".router"):
            tensors[f"{stem}.gate.weight"] = value
        elif ours.endswith(".bias_E"):
            tensors[f"{stem}.gate.e_score_correction_bias"] = value
        elif ours.endswith(".gate_up"):
            for e, (gate, up) in enumerate(x.chunk(2) for x in value):
                tensors[f"{stem}.experts.{e}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{stem}.experts.{e}.up_proj.weight"] = up.contiguous()
        elif ours.endswith(".down"):
            for e, down in enumerate(value):
                tensors[f"{stem}.experts.{e}.down_proj.weight"] = down.contiguous()
        else:
            tensors[ours.replace(".mlp.shared.", ".mlp.shared_experts.")] = value
    return tensors


def test_logits_agree_with_the_training_code(folder: Path, trained: Any, ops: Ops) -> None:
    decoder = load_decoder(folder, ops=ops)
    step = pack_spans([Span(IDS.tolist(), 0, BLOCKS, len(IDS))], 8)

    ours = decoder.forward(step, decoder.new_cache(4, 8))

    with torch.no_grad():
        theirs = trained.head(trained.trunk(IDS[None]))[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def draft(decoder: Decoder, cuts: list[int]) -> Tensor:
    """Logits of the token after next at every position but the last, chunk by chunk."""
    cache = decoder.new_cache(4, 8, mtp=True)
    parts = []
    for start, end in itertools.pairwise(cuts):
        main = pack_spans([Span(IDS[start:end].tolist(), start, BLOCKS)], 8)
        normed = decoder.final_norm(decoder.trunk(main, cache))
        following = IDS[start + 1 : end + 1].tolist()
        ahead = pack_spans([Span(following, start, BLOCKS, len(following))], 8)
        parts.append(decoder.mtp_forward(normed, ahead, cache))
    return torch.cat(parts)


def test_drafts_agree_with_the_training_code(folder: Path, trained: Any, ops: Ops) -> None:
    decoder = load_decoder(folder, ops=ops)

    ours = draft(decoder, [0, 29])

    with torch.no_grad():
        hidden = trained.trunk(IDS[None])[:, :-1]
        theirs = trained.head(trained.predict_next(hidden, IDS[None, 1:]))[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert torch.equal(draft(decoder, [0, 3, 4, 20, 29]), ours)


def test_an_mtp_module_may_bring_its_own_embedding_and_head(
    folder: Path, trained: Any, ops: Ops
) -> None:
    shared = draft(load_decoder(folder, ops=ops), [0, 29])
    own = exported(trained)
    own["model.layers.3.embed_tokens.weight"] = own["model.embed_tokens.weight"].roll(1, 0)
    own["model.layers.3.shared_head.head.weight"] = own["lm_head.weight"].roll(1, 0)
    save_file(own, folder / "model.safetensors")

    ours = draft(load_decoder(folder, ops=ops), [0, 29])

    assert not torch.allclose(ours, shared, atol=0.1)


def test_without_an_mtp_module_drafting_says_so(tiny_decoder: Callable[[str], Decoder]) -> None:
    decoder = tiny_decoder("deepseek_v3")
    step = pack_spans([Span([1, 2], 0, [0])], 8)

    with pytest.raises(CheckpointError, match="no MTP module"):
        decoder.mtp_forward(torch.zeros(2, 64), step, decoder.new_cache(1, 8, mtp=True))
