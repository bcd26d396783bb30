"""Files to read, and folders whose models can stand in one."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# What a GGUF file cannot say, changed to what it implies.
IMPLIED: dict[str, dict[str, Any]] = {
    "deepseek_v2_lite": {"n_group": 1, "topk_group": 1},
    "deepseek_v3_plain": {"rope_interleave": True},
    "mixtral": {"sliding_window": None},
    "olmoe_linear": {"norm_topk_prob": False},
    "qwen3_moe_yarn": {"norm_topk_prob": True},
}


@pytest.fixture(scope="session")
def writer() -> Any:
    """The module beside this file."""
    file = Path(__file__).with_name("gguf_writer.py")
    spec = importlib.util.spec_from_file_location("gguf_writer", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sayable(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The tiny checkpoint of a family, with a config of what a GGUF file can say."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            shutil.copytree(tiny_checkpoint(family), folder)
            config = json.loads((folder / "config.json").read_text()) | IMPLIED.get(family, {})
            rope = config["rope_parameters"]
            if "mscale" in rope:
                rope["mscale"] = rope["mscale_all_dim"]
            (folder / "config.json").write_text(json.dumps(config))
            made[family] = folder
        return made[family]

    return make
