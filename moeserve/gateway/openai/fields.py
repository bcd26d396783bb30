"""Fields of OpenAI's request bodies that several routes share, and the rule for all others.

A field is used, inert (accepted where its value changes nothing), or refused by name: nothing is
dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from moeserve.errors import InvalidRequestError
from moeserve.gateway.json_body import Body
from moeserve.gateway.service import ClientRequest

_SAMPLING = frozenset(
    "max_tokens min_tokens temperature top_k top_p min_p repetition_penalty presence_penalty "
    "frequency_penalty logit_bias seed stop stop_token_ids ignore_eos skip_special_tokens".split()
)
COMMON = _SAMPLING | frozenset(
    "model n stream stream_options logprobs include_stop_str_in_output cache_salt domain "
    "request_id return_token_ids add_special_tokens".split()
)
# Known fields and the values with which they change nothing; any other value is refused.
_ANY = object()
_INERT: Mapping[str, tuple[object, ...]] = {
    "user": (_ANY,),
    "safety_identifier": (_ANY,),
    "prompt_cache_key": (_ANY,),
    "metadata": (_ANY,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answer is to be written."""

    chat: bool
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    token_ids: bool = False


def common(body: Body, *, chat: bool) -> tuple[ClientRequest, AnswerFormat]:
    """What completions and chat have alike; the request lacks its prompt."""
    params = {name: body[name] for name in _SAMPLING if name in body}
    if "include_stop_str_in_output" in body:
        params["include_stop"] = flag(body, "include_stop_str_in_output")
    options = mapping(body, "stream_options")
    if unknown := options.keys() - {"include_usage", "include_obfuscation"}:
        refuse("stream_options", f"unknown option {min(unknown)!a:.60}")
    stream = flag(body, "stream")
    if options and not stream:
        refuse("stream_options", "needs stream: true")
    wanted = ClientRequest(
        prompts=(),
        params=params,
        n=body.get("n", 1),
        request_id=text(body, "request_id"),
        model=text(body, "model"),
        salt=text(body, "cache_salt"),
        domain=text(body, "domain"),
        special_tokens=flag(body, "add_special_tokens", default=True),
    )
    form = AnswerFormat(
        chat=chat,
        stream=stream,
        include_usage=flag(options, "include_usage"),
        logprobs=flag(body, "logprobs") if chat else "logprobs" in body,
        token_ids=flag(body, "return_token_ids"),
    )
    return wanted, form


def refuse_others(body: Body, used: frozenset[str]) -> None:
    for name, value in body.items():
        if name in used:
            continue
        if name not in _INERT:
            raise InvalidRequestError(f"{name!a:.60}: unknown field", param=name[:60])
        if _ANY not in _INERT[name] and not any(
            type(value) is type(inert) and value == inert for inert in _INERT[name]
        ):
            refuse(name, "not supported by this server; leave it out")


def text(body: Body, name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str):
        refuse(name, "expected a string")
    return value


def flag(body: Body, name: str, *, default: bool = False) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        refuse(name, "expected true or false")
    return value


def mapping(body: Body, name: str) -> Mapping[str, object]:
    value = body.get(name, {})
    if not isinstance(value, dict):
        refuse(name, "expected an object")
    return value


def refuse(name: str, reason: str) -> NoReturn:
    raise InvalidRequestError(f"{name}: {reason}", param=name)
