"""What a member says of itself is read back as it was, and nothing else is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import InvalidRequestError
from moeserve.pools.members import (
    MOST_REPORT_BYTES,
    Member,
    MemberLoad,
    Report,
    Role,
    ServedTerms,
    read_load,
    read_report,
    split_address,
    write_load,
)

counts = st.integers(0, 1 << 40)
rates = st.floats(0, 1e12)
loads = st.builds(
    MemberLoad,
    sequence=counts,
    running=counts,
    waiting=counts,
    waiting_tokens=counts,
    free_blocks=counts,
    total_blocks=counts,
    prefill_rate=rates,
    step_s=rates,
    leans=st.sampled_from(Role),
    draining=st.booleans(),
    stored_bytes=counts,
    capacity_bytes=counts,
    urgent=counts,
)
members = st.builds(
    Member,
    id=st.from_regex(r"[a-z0-9][a-z0-9:.-]{0,40}", fullmatch=True),
    instance=st.text(max_size=20),
    role=st.sampled_from(Role),
    address=st.sampled_from(["127.0.0.1:1", "[::1]:65535", "a.b-c.example:80"]),
    rank=st.integers(0, 3),
    ranks=st.just(4),
    terms=st.builds(
        ServedTerms,
        name=st.text(max_size=20),
        compute_id=st.text(max_size=20),
        eos_ids=st.lists(st.integers(0, 1000), max_size=4).map(tuple),
    ),
)
PLAIN = Report(Member("a", "one", Role.DECODE, "127.0.0.1:80"))


@given(st.builds(Report, members, loads))
def test_a_report_survives(report: Report) -> None:
    assert read_report(report.to_json()) == report
    assert read_load(write_load(report.load)) == report.load


def test_another_release_may_say_more_or_less() -> None:
    said = json.loads(PLAIN.to_json())
    del said["load"], said["member"]["terms"], said["member"]["rank"]
    said["member"]["colour"] = said["more"] = {"deep": [1]}
    assert read_report(json.dumps(said)) == PLAIN


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("member", "id", ""),
        ("member", "id", "a/b"),
        ("member", "id", "a" * 129),
        ("member", "role", "leader"),
        ("member", "role", ["prefill"]),
        ("member", "address", "127.0.0.1"),
        ("member", "address", "127.0.0.1:0"),
        ("member", "address", "127.0.0.1:70000"),
        ("member", "address", "127.0.0.1:" + "1" * 80),
        ("member", "address", "unix:/tmp/x:1"),
        ("member", "address", "a b:1"),
        ("member", "address", "::1:80"),
        ("member", "rank", 1),
        ("member", "rank", True),
        ("member", "instance", "x" * 257),
        ("member", "terms", [1]),
        ("member", "terms", {"eos_ids": "12"}),
        ("member", "terms", {"eos_ids": [1] * 65}),
        ("member", "terms", {"eos_ids": [-1]}),
        ("load", "running", -1),
        ("load", "running", 1.5),
        ("load", "running", None),
        ("load", "running", 10**400),
        ("load", "step_s", float("nan")),
        ("load", "step_s", float("inf")),
        ("load", "step_s", "1"),
        ("load", "draining", 1),
        ("load", "leans", "up"),
    ],
)
def test_what_no_member_can_be_is_refused(part: str, field: str, value: object) -> None:
    said = json.loads(PLAIN.to_json())
    said[part][field] = value
    with pytest.raises(InvalidRequestError):
        read_report(json.dumps(said))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"member": 1}',
        b'{"member": {}}',
        b"[" * MOST_REPORT_BYTES,
        b" " * (MOST_REPORT_BYTES + 1),
        b'{"member": ' + b'{"a":' * 1500,
        PLAIN.to_json().encode().replace(b"0", b"1e999"),
    ],
)
def test_what_is_no_report_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        read_report(text)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_whatever_comes_is_read_or_refused(text: str | bytes) -> None:
    for read in (read_report, read_load):
        try:
            read(text)
        except InvalidRequestError:
            continue


def test_an_address_is_taken_apart() -> None:
    assert split_address("[fe80::1%eth0]:80") == ("fe80::1%eth0", 80)
    assert split_address("host_1:5000") == ("host_1", 5000)
