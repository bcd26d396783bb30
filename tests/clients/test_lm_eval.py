"""lm-eval's ``local-completions`` on tasks whose data lie beside this file: no hub is asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moeserve.kernels.select import choose_ops
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.tokenizer import Tokenizer

CLIENT = "lm_eval"
TASKS = Path(__file__).resolve().parent / "lm_eval"

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def evaluated(client: Any, server: Any) -> Any:
    """What lm-eval found for all tasks, in one run."""
    tasks = sorted(file.stem for file in TASKS.glob("*.yaml"))
    arguments = ("lm_eval_tasks.py", server.http, server.model, str(TASKS), *tasks)
    return client.run(*arguments, cwd=TASKS)


def log_likelihood(text: str) -> float:
    """Of a text's tokens behind the end-of-text token, by the decoder alone, in one piece."""
    folder = resolve_model("demo")
    tokenizer, decoder = Tokenizer.load(folder), load_decoder(folder, choose_ops())
    ids = [*tokenizer.eos_ids[:1], *tokenizer.encode(text, add_special_tokens=False)]
    blocks = range(-(-len(ids) // 16))
    step = pack_spans([Span(ids, 0, blocks, logits=len(ids))], 16)
    rows = decoder.forward(step, decoder.new_cache(len(blocks), 16)).double().log_softmax(-1)
    return math.fsum(float(rows[i, token]) for i, token in enumerate(ids[1:]))


def test_generate_until_solves_the_sums(evaluated: Any) -> None:
    assert evaluated["metrics"]["sums"]["exact_match,number"] == 1.0


def test_loglikelihood_tells_right_choices_from_wrong_ones(evaluated: Any) -> None:
    assert evaluated["metrics"]["choices"]["acc,none"] == 1.0


def test_loglikelihood_rolling_gives_what_the_decoder_gives(evaluated: Any) -> None:
    texts = [json.loads(line)["text"] for line in (TASKS / "texts.jsonl").read_text().splitlines()]
    found = [answer for (answer,) in evaluated["answers"]["texts"]]
    assert found == pytest.approx([log_likelihood(text) for text in texts], rel=1e-9)
