"""Who takes part in a cluster: what a member is, what it serves, and the load that it reports.

A member is one rank: an instance of several ranks (an EP group) has as many members, each with an
address of its own, so that whoever has a request talks to its home rank. Members are plain data,
written as JSON into whatever registry there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from moeserve.errors import InvalidRequestError


class Role(StrEnum):
    """What a member does for others. ``UNIFIED`` prefills and decodes, as load has it."""

    PREFILL = "prefill"
    DECODE = "decode"
    CACHE = "cache"
    UNIFIED = "unified"

    @property
    def prefills(self) -> bool:
        return self in (Role.PREFILL, Role.UNIFIED)

    @property
    def decodes(self) -> bool:
        return self in (Role.DECODE, Role.UNIFIED)


@dataclass(frozen=True, slots=True)
class ServedTerms:
    """What a request must know of the model that a member serves.

    Members of equal ``compute_id`` compute the same bits from the same tokens, whatever their block
    size and number of ranks: it is a digest of the checkpoint and of every setting that changes
    numbers, the type of the KV among them. KV goes between such members only. ``folder`` is where
    the member has the checkpoint, which a gateway on the same host may read the tokenizer of.
    Empty for a member that serves no model (``CACHE``).
    """

    name: str = ""
    compute_id: str = ""
    vocab: int = 0
    max_model_len: int = 0
    eos_ids: tuple[int, ...] = ()
    block_size: int = 0
    kv_bytes_per_token: int = 0
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """``id`` names one life of one rank: who starts anew has another. ``instance`` is what its
    operator calls the peer. ``address`` is ``host:port`` of its gRPC server, and ``server_name``
    one that its certificate is for, if it has one."""

    id: str
    instance: str
    role: Role
    address: str
    rank: int = 0
    ranks: int = 1
    server_name: str = ""
    terms: ServedTerms = ServedTerms()


@dataclass(frozen=True, slots=True)
class MemberLoad:
    """What a member reports about itself, with every heartbeat.

    ``waiting_tokens`` are those of prompts that are still to be computed, running or not.
    ``prefill_rate`` is tokens per second in steps that prefill, ``step_s`` seconds a step of decode
    takes, both as lately measured, 0 before. ``leans`` is what a unified member would rather do
    now. ``draining`` members take nothing new. ``stored_bytes`` of ``capacity_bytes`` is for
    members that keep KV. ``sequence`` grows with each report.
    """

    sequence: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    prefill_rate: float = 0.0
    step_s: float = 0.0
    leans: Role = Role.UNIFIED
    draining: bool = False
    stored_bytes: int = 0
    capacity_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """A member and its newest load: what a heartbeat carries and a view of the cluster holds."""

    member: Member
    load: MemberLoad = MemberLoad()

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def read_report(text: str | bytes) -> Report:
    """What ``Report.to_json`` wrote, perhaps by another release: unknown fields are passed over.
    InvalidRequestError where it is none."""
    try:
        found: Any = json.loads(text)
        member, load = dict(found["member"]), dict(found.get("load", {}))
        terms = _known(ServedTerms, dict(member.pop("terms", {})))
        terms["eos_ids"] = tuple(terms.get("eos_ids", ()))
        whole = Member(**_known(Member, member))
        read = MemberLoad(**_known(MemberLoad, load))
        return Report(
            replace(whole, role=Role(whole.role), terms=ServedTerms(**terms)),
            replace(read, leans=Role(read.leans)),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequestError(f"this is no report of a member: {error}") from error


def _known(kind: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name in kind.__dataclass_fields__}
