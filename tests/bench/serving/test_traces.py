"""Traces are read as their formats say, and a wrong line is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.bench.serving.plan import PlannedRequest
from moeserve.bench.serving.prompts import PromptSource
from moeserve.bench.serving.traces import FORMATS, read_trace
from moeserve.errors import ConfigError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,,1.2,ChatGPT,472,18,490,Conversation log
45,,0.1,ChatGPT,1087,0,1087,Conversation log
118,9,2.0,GPT-4,417,276,693,API log
"""  # noqa: E501
MOONCAKE = [
    {"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 1500, "input_length": 1030, "output_length": 9, "hash_ids": [0, 1, 7]},
]


def written(folder: Path, content: str | list[dict[str, object]]) -> Path:
    path = folder / "trace"
    if not isinstance(content, str):
        content = "".join(json.dumps(line) + "\n" for line in content)
    path.write_text(content)
    return path


def shape(requests: list[PlannedRequest]) -> list[tuple[float, int | None, int]]:
    first = requests[0].at_s
    return [(round(r.at_s - first, 6), r.input_tokens, r.output_tokens) for r in requests]


def test_azure(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, AZURE))
    assert shape(found) == [(0.0, 374, 44), (4.314579, 396, 109)]
    offset = AZURE.replace("46.6805900", "46.680590+00:00")
    assert read_trace(written(tmp_path, offset))[0].at_s == found[0].at_s


def test_burstgpt_leaves_failed_requests_out(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, BURSTGPT))
    assert shape(found) == [(0.0, 472, 18), (113.0, 417, 276)]


def test_equal_block_hashes_are_equal_tokens(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, MOONCAKE))
    assert shape(found) == [(0.0, 1300, 5), (1.5, 1030, 9)]
    one, other = (PromptSource(0, 5000).token_ids(request) for request in found)
    assert (len(one), len(other)) == (1300, 1030)
    assert one[:1024] == other[:1024]
    assert one[1024:1030] != other[1024:]


def test_our_own_format(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"arrival_s": 1, "output_tokens": 3, "prompt": "Once upon"},
        {"arrival_s": 2.5, "output_tokens": 4, "prompt": [7, 8, 9]},
        {"output_tokens": 5, "input_tokens": 6},
        {"output_tokens": 5, "input_tokens": 6, "hash_ids": [3, 4], "block_size": 4},
    ]
    text, ids, drawn, blocks = read_trace(written(tmp_path, lines))
    assert (text.at_s, text.text, text.output_tokens) == (1.0, "Once upon", 3)
    assert (ids.at_s, ids.token_ids) == (2.5, (7, 8, 9))
    assert (drawn.at_s, drawn.input_tokens) == (0.0, 6)
    assert [(span.key, span.tokens) for span in blocks.spans] == [(3, 4), (4, 2)]


def test_prompts_without_hashes_share_nothing(tmp_path: Path) -> None:
    same = AZURE.splitlines()[0] + "\n" + "2023-11-16 18:15:46,64,4\n" * 3
    drawn = [tuple(PromptSource(0, 5000).token_ids(r)) for r in read_trace(written(tmp_path, same))]
    assert len({ids[:4] for ids in drawn}) == 3


def test_a_trace_may_be_compressed_and_only_its_beginning_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    assert len(read_trace(path)) == 2
    assert len(read_trace(path, "azure", 1)) == 1
    path.write_bytes(gzip.compress(AZURE.encode())[:-12])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no known format"),
        ("a,b\n1,2\n", "no known format"),
        ("{\n", "line 1: is no JSON"),
        (AZURE + "yesterday,1,2\n", "line 4: is no line of azure"),
        (
            AZURE + "2023-11-16 18:15:46,1\n",
            "line 4: is no line of azure: has no 'GeneratedTokens'",
        ),
        (AZURE + "2023-11-16 18:15:46,-1,2\n", "-1 tokens"),
        (AZURE.splitlines()[0] + "\n", "has no requests"),
        ([{"timestamp": 0, "input_length": True, "output_length": 1}], "input_length=True"),
        ([MOONCAKE[0] | {"hash_ids": [1]}], "1 hash_ids for 1300 tokens"),
        ([MOONCAKE[0] | {"hash_ids": [-1, 2, 3]}], "integers from 0"),
        ([MOONCAKE[0] | {"timestamp": 1e999}], "no time"),
        ([{"output_tokens": 1, "prompt": [1, -2]}], "a text or a list of token ids"),
        ([{"output_tokens": 1, "prompt": "a", "input_tokens": 3}], "says by itself"),
        ([{"output_tokens": 1, "prompt": "a", "colour": 3}], "'colour' is not known"),
        ([{"output_tokens": 1, "input_tokens": 1 << 40}], "expected 1 to"),
        (
            [{"output_tokens": 1, "input_tokens": 8, "hash_ids": [1], "block_size": 0}],
            "block_size 0",
        ),
        ([{"output_tokens": 1}], "has no 'input_tokens'"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, content: str | list[dict[str, object]], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        read_trace(written(tmp_path, content))


def test_a_wrong_format_and_a_file_that_is_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="burstgpt has Timestamp"):
        read_trace(written(tmp_path, AZURE), "burstgpt")
    with pytest.raises(ConfigError, match="--trace-format='parquet'"):
        read_trace(written(tmp_path, AZURE), "parquet")
    with pytest.raises(ConfigError, match="no regular file"):
        read_trace(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "nowhere")


@given(content=st.binary(max_size=300), form=st.sampled_from([None, *FORMATS]))
def test_any_bytes_are_a_trace_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, form: str | None
) -> None:
    path = tmp_path_factory.mktemp("any") / "trace"
    heads = {None: b"", "azure": AZURE.encode(), "burstgpt": BURSTGPT.encode()}
    path.write_bytes(heads.get(form, b"") + content)
    said = ""
    try:
        said = f"trace of {len(read_trace(path, form))}"
    except ConfigError as refused:
        said = refused.message
    assert "trace" in said
