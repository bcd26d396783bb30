"""Who takes part in a cluster: what a member is, what it serves, and the load that it reports.

A member is one rank: an instance of several ranks (an EP group) has as many members, each with an
address of its own, so that whoever has a request talks to its home rank. Members are plain data,
written as JSON into whatever registry there is. What is read is not believed: ``read_report`` and
``read_load`` raise InvalidRequestError, which names the field, for whatever a member cannot be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

from moeserve.errors import InvalidRequestError

# A report as JSON, and what its strings, lists and numbers may be.
MOST_REPORT_BYTES = 8192
_MOST_TEXT = {"id": 128, "instance": 128, "address": 262, "server_name": 255, "folder": 1024}
_MOST_OTHER_TEXT = 256
_MOST_EOS_IDS = 64
_MOST_NUMBER = 1 << 53
_MOST_RANKS = 1 << 16
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]*")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]+(?:%\w+)?\]")


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


_ROLES = frozenset(Role)


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

    ``waiting`` are requests that it has taken and does not run yet, those whose KV is on its way
    among them: else everybody sends it more until that has come. ``waiting_tokens`` are those of
    prompts that are still to be computed here, running or not.
    ``prefill_rate`` is tokens per second in steps that prefill, ``step_s`` seconds a step of decode
    takes, both as lately measured, 0 before. ``leans`` is what a unified member would rather do
    now. ``draining`` members take nothing new. ``stored_bytes`` of ``capacity_bytes`` is for
    members that keep KV. ``urgent`` of the running requests have a high priority. ``sequence``
    grows with each report.
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
    urgent: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """A member and its newest load: what a heartbeat carries and a view of the cluster holds."""

    member: Member
    load: MemberLoad = MemberLoad()

    def to_json(self) -> str:
        member = _plain(self.member) | {"terms": _plain(self.member.terms)}
        found = {"member": member, "load": _plain(self.load)}
        return json.dumps(found, separators=(",", ":"))


def write_load(load: MemberLoad) -> str:
    return json.dumps(_plain(load), separators=(",", ":"))


def _plain(data: Member | ServedTerms | MemberLoad) -> dict[str, Any]:
    """Its fields; ``asdict`` would copy each of them, several times as slowly."""
    return {name: getattr(data, name) for name in data.__dataclass_fields__}


def read_report(text: str | bytes) -> Report:
    """What ``Report.to_json`` wrote, perhaps by another release: unknown fields are passed over."""
    found = _object(_parse(text), "the report")
    member = _fields(Member, found.get("member"), "member")
    terms = _fields(ServedTerms, member.pop("terms", {}), "terms")
    terms["eos_ids"] = _eos_ids(terms.get("eos_ids", ()))
    load = _fields(MemberLoad, found.get("load", {}), "load")
    try:
        whole = Member(**member, terms=ServedTerms(**terms))
    except TypeError as error:  # a field is missing
        raise InvalidRequestError(f"member: {error}") from error
    check_member(whole)
    return Report(whole, MemberLoad(**load))


def read_load(text: str | bytes) -> MemberLoad:
    """What ``write_load`` wrote, read as ``read_report`` does."""
    return MemberLoad(**_fields(MemberLoad, _parse(text), "load"))


def check_member(member: Member) -> None:
    """InvalidRequestError where no other process could use what this member says of itself."""
    if not _ID.fullmatch(member.id) or len(member.id) > _MOST_TEXT["id"]:
        _refuse("member.id", member.id, f"{_MOST_TEXT['id']} letters, digits or ._:@+- at most")
    split_address(member.address)
    if not 0 <= member.rank < member.ranks <= _MOST_RANKS:
        _refuse("member.rank", (member.rank, member.ranks), "a rank below the number of ranks")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``, in which an IPv6 address stands in brackets, which the host
    that is returned has no more. InvalidRequestError."""
    host, _, port = address.rpartition(":")
    good = bool(_HOST.fullmatch(host)) and len(host) <= 255
    if not good or not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 1 << 16):
        _refuse("address", address, "host:port, or [IPv6]:port")
    return host.strip("[]"), int(port)


def _parse(text: str | bytes) -> Any:
    if len(text) > MOST_REPORT_BYTES:
        raise InvalidRequestError(
            f"a report of {len(text)} bytes: expected {MOST_REPORT_BYTES} at most"
        )
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"this is no report of a member: {error}") from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} is a {type(value).__name__}: expected an object")
    return value


def _fields(kind: type[Any], value: Any, where: str) -> dict[str, Any]:
    """Those of ``value`` that ``kind`` has, each of its type."""
    known = kind.__dataclass_fields__
    return {
        name: _typed(given, known[name].type, where, name)
        for name, given in _object(value, where).items()
        if name in known
    }


def _typed(value: Any, kind: Any, where: str, name: str) -> Any:
    """``value`` of JSON as a field of this type, which is written as text, within its bounds."""
    good = True  # of other types, which the caller looks into
    if kind in ("int", "float"):
        number = isinstance(value, int) or (kind == "float" and isinstance(value, float))
        good = number and not isinstance(value, bool) and 0 <= value <= _MOST_NUMBER
    elif kind == "str":
        good = isinstance(value, str) and len(value) <= _MOST_TEXT.get(name, _MOST_OTHER_TEXT)
    elif kind == "bool":
        good = isinstance(value, bool)
    elif kind == "Role":
        good = isinstance(value, str) and value in _ROLES
    if not good:
        _refuse(f"{where}.{name}", value, f"{kind} within its bounds")
    return Role(value) if kind == "Role" else float(value) if kind == "float" else value


def _eos_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > _MOST_EOS_IDS:
        _refuse("terms.eos_ids", value, f"a list of {_MOST_EOS_IDS} at most")
    return tuple(_typed(item, "int", "terms", "eos_ids") for item in value)


def _refuse(where: str, value: Any, wanted: str) -> NoReturn:
    raise InvalidRequestError(f"{where}={str(value)[:80]!r}: expected {wanted}")
