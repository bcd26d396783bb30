"""A model folder is data: its headers, tokenizer and template are read, or an error of ours."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import MoeserveError
from moeserve.models.chat_template import ChatTemplate
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.families import read_config
from moeserve.models.fields import Fields
from moeserve.models.tokenizer import Tokenizer

EXAMPLES = 100
SMALL = st.none() | st.booleans() | st.integers(-5, 1000) | st.text(max_size=5) | st.just([])


@pytest.fixture(scope="module")
def folder(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    copy = tmp_path_factory.mktemp("fuzzed") / "model"
    shutil.copytree(tiny_checkpoint("mixtral"), copy)
    return copy


def read_all(folder: Path) -> None:
    with contextlib.suppress(MoeserveError):
        checkpoint = Checkpoint.open(folder)
        for name in checkpoint.in_order:
            with contextlib.suppress(MoeserveError):
                checkpoint.get(name)


@given(data=st.data())
def test_headers_with_other_values(
    data: st.DataObject, values: st.SearchStrategy[Any], edited: Any, spoiled: Any, folder: Path
) -> None:
    file = next(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = whole[8 : 8 + length]
    if data.draw(st.booleans()):
        changed = json.dumps(edited(json.loads(header), data, values)).encode()
        said = len(changed)
    else:
        changed = spoiled(header, data)
        said = data.draw(st.sampled_from([len(changed), length, 0, 2**63, 2**64 - 1]))
    try:
        file.write_bytes(struct.pack("<Q", said) + changed + whole[8 + length :])
        read_all(folder)
    finally:
        file.write_bytes(whole)


@given(data=st.data())
def test_configurations_with_other_values(
    data: st.DataObject, values: st.SearchStrategy[Any], edited: Any, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    with contextlib.suppress(MoeserveError):
        read_config(Fields(edited(config, data, values)))


@given(data=st.data())
def test_tokenizers_with_other_values(data: st.DataObject, edited: Any, folder: Path) -> None:
    """Small values: what takes much is for ``checked_tokenizer`` and its process."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        whole = file.read_text()
        try:
            file.write_text(json.dumps(edited(json.loads(whole), data, SMALL)))
            with contextlib.suppress(MoeserveError):
                tokenizer = Tokenizer.load(folder)
                ids = tokenizer.encode("Hello, é world <|end|> 12")
                tokenizer.decode([*ids, 2**31])
                tokenizer.byte_pieces()
        finally:
            file.write_text(whole)


PIECES = [
    "{{ messages }}", "{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}",
    "{% if add_generation_prompt %}", "{% else %}", "{% endif %}", "{{ x.__class__.__mro__ }}",
    "{{ messages|tojson }}", "{{ messages[9] }}", "{{ ''.format.__globals__ }}", "{% set a = 1 %}",
    "{{ a + 'b' }}", "{{ 1 // 0 }}", "{{ messages.append(1) }}", "{% macro f(a) %}{% endmacro %}",
    "{{ f(1, 2) }}", "{{ raise_exception('no') }}", "{% break %}", "{% generation %}", "{{", "%}",
    "{% endgeneration %}", "{{ '%d'|format('x') }}", "{{ strftime_now('%Y') }}", "{# ", "#}",
    "{{ messages|map(attribute='role')|list }}", "{{ none() }}", "{{ [1,2]|tojson(indent='a') }}",
    "{% include 'x' %}", "{% extends 'y' %}", "{% import 'os' as os %}", "{{ cycler() }}",
    "{{ namespace(a=1).a.b.c }}", "{{ lipsum.__globals__['os'] }}", "{{ messages|sort }}",
    "{{ {}|dictsort }}", "{{ 'a'|int(base='x') }}", "{{ messages|sum }}", "{{ dict(a=1).pop() }}",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=10), max_size=8).map("".join))
def test_templates_of_pieces(source: str) -> None:
    with contextlib.suppress(MoeserveError):
        ChatTemplate(source, {}, Path("template")).render([{"role": "user", "content": "hi"}])
