"""What is generated is committed, and is what the protos say."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

from moeserve.pb import inference_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    protos = sorted((ROOT / "proto/moeserve/pb").glob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto"), *outputs]
    subprocess.run([*command, *map(str, protos)], check=True, timeout=60, cwd=ROOT)
    made = {p.name: p.read_text() for p in (tmp_path / "moeserve/pb").iterdir()}
    kept = {
        p.name: p.read_text()
        for p in (ROOT / "moeserve/pb").glob("*_pb2*")
        if p.suffix in (".py", ".pyi")
    }
    assert len(made) == 3 * len(protos)
    assert made == kept, "run `make proto`"


def test_every_request_field_is_explained() -> None:
    source = (ROOT / "proto/moeserve/pb/inference.proto").read_text()
    for name in ("GenerateRequest", "SamplingParams"):
        body = re.search(rf"^message {name} \{{\n(.*?)^\}}", source, re.M | re.S)
        assert body is not None
        lines = body[1].splitlines()
        for above, line in itertools.pairwise(lines):
            if re.search(r"= \d+;", line) and "token_ids" not in line:
                assert above.strip().startswith("//"), f"{name}: {line.strip()} has no comment"


def test_field_numbers_never_change() -> None:
    numbers = {f.name: f.number for f in pb.GenerateRequest.DESCRIPTOR.fields}
    assert numbers == {
        "request_id": 1,
        "model": 2,
        "text": 3,
        "token_ids": 4,
        "sampling": 5,
        "n": 6,
        "cache_salt": 7,
        "domain": 8,
        "truncate_prompt_tokens": 9,
        "resume_from_token": 10,
        "priority": 11,
    }
    sampling = [f.name for f in sorted(pb.SamplingParams.DESCRIPTOR.fields, key=lambda f: f.number)]
    assert sampling == (
        "max_tokens min_tokens temperature top_k top_p min_p repetition_penalty "
        "presence_penalty frequency_penalty logit_bias seed stop stop_token_ids ignore_eos "
        "include_stop skip_special_tokens logprobs prompt_logprobs allowed_token_ids "
        "bad_words grammar".split()
    )
    assert pb.SamplingParams.DESCRIPTOR.fields_by_name["grammar"].number == 25
    assert [f.number for f in pb.GenerateChunk.DESCRIPTOR.fields] == list(range(1, 10))
