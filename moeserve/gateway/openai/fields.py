"""Fields of OpenAI's request bodies that several routes share, and the rule for all others.

A field is used; inert, where its value changes nothing anyway; ignored, which the answer's
``warning`` header says and a strict server refuses; or refused by name, where an answer without it
would not be what was asked for. What is not known at all is ignored. Nothing is dropped in silence.
``docs/fields.md`` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from moeserve.errors import InvalidRequestError
from moeserve.gateway import limits
from moeserve.gateway.json_body import Body
from moeserve.gateway.service import ClientRequest

# Fields that a warning names.
MOST_NAMED = 8

_SAMPLING = frozenset(
    "max_tokens min_tokens temperature top_k top_p min_p repetition_penalty presence_penalty "
    "frequency_penalty logit_bias seed stop stop_token_ids ignore_eos skip_special_tokens "
    "prompt_logprobs allowed_token_ids bad_words".split()
)
COMMON = _SAMPLING | frozenset(
    "model n stream stream_options logprobs include_stop_str_in_output cache_salt domain "
    "request_id priority return_token_ids return_tokens_as_token_ids add_special_tokens "
    "truncate_prompt_tokens".split()
)
# Known fields and the values with which they change nothing; any other value is ignored where
# ``_IGNORED`` says so, else refused.
_ANY = object()
_INERT: Mapping[str, tuple[object, ...]] = {
    "user": (_ANY,),
    "safety_identifier": (_ANY,),
    "prompt_cache_key": (_ANY,),
    "metadata": (_ANY,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "logits_processors": ([],),
    "kv_transfer_params": ({},),
    "prompt_embeds": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (_ANY,),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "resume_from_token": (0,),
    "best_of": (1,),
}
# Known fields without which the answer is still what was asked for, and why they are ignored.
_IGNORED: Mapping[str, str] = {
    "store": "answers are not kept",
    "service_tier": "there is one",
    "verbosity": "ask for it in the prompt",
}
UNKNOWN = "unknown field"


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt stands before the answer, with the ``logprobs`` best tokens of each, if any."""

    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answer is to be written."""

    chat: bool
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    prompt_logprobs: bool = False
    echo: Echo | None = None
    best: int | None = None


def common(
    body: Body, *, chat: bool, ignored: tuple[str, ...] = ()
) -> tuple[ClientRequest, AnswerFormat]:
    """What completions and chat have alike; the request lacks its prompt. ``ignored`` is what
    ``refuse_others`` said."""
    params = {name: body[name] for name in _SAMPLING if name in body}
    if "include_stop_str_in_output" in body:
        params["include_stop"] = flag(body, "include_stop_str_in_output")
    options = mapping(body, "stream_options")
    known = {"include_usage", "include_obfuscation", "continuous_usage_stats"}
    ignored += tuple(f"stream_options: {UNKNOWN} {x!a:.60}" for x in options if x not in known)
    stream = flag(body, "stream")
    if options and not stream:
        refuse("stream_options", "needs stream: true")
    if stream and "prompt_logprobs" in body:
        refuse("prompt_logprobs", "is not streamed: leave stream out, or ask over gRPC")
    cut = body.get("truncate_prompt_tokens")
    wanted = ClientRequest(
        prompts=(),
        params=params,
        n=body.get("n", 1),
        request_id=text(body, "request_id"),
        model=text(body, "model"),
        salt=text(body, "cache_salt"),
        domain=text(body, "domain"),
        priority=int(limits.PRIORITY.check("priority", body.get("priority", 0))),
        special_tokens=flag(body, "add_special_tokens", default=True),
        truncate=None if cut is None else limits.truncation(cut),
        ignored=ignored,
    )
    form = AnswerFormat(
        chat=chat,
        stream=stream,
        include_usage=flag(options, "include_usage"),
        continuous_usage=(
            flag(options, "include_usage") and flag(options, "continuous_usage_stats")
        ),
        logprobs=flag(body, "logprobs") if chat else "logprobs" in body,
        token_ids=flag(body, "return_token_ids"),
        tokens_as_ids=flag(body, "return_tokens_as_token_ids"),
        prompt_logprobs="prompt_logprobs" in body,
    )
    return wanted, form


def refuse_others(body: Body, used: frozenset[str]) -> tuple[str, ...]:
    """What is ignored of the fields that the route does not use, each with the name first;
    InvalidRequestError for those that are refused."""
    ignored = []
    for name, value in body.items():
        if name in used or _is_inert(name, value):
            continue
        if name in _IGNORED:
            ignored.append(f"{name}: ignored, {_IGNORED[name]}")
        elif name in _INERT:
            refuse(name, "not supported by this server; leave it out")
        else:
            ignored.append(f"{name:.60}: {UNKNOWN}")
    return tuple(ignored)


def what_happens(name: str, used: frozenset[str]) -> str:
    """To a field, on a route that uses these: one of the four words of this module's rule."""
    if name in used:
        return "used"
    if _ANY in _INERT.get(name, ()):
        return "inert"
    return "ignored" if name in _IGNORED or name not in _INERT else "refused"


def known_fields() -> frozenset[str]:
    """Those that this rule names."""
    return COMMON | _INERT.keys()


def warning_header(ignored: Sequence[str]) -> dict[str, str]:
    """What the answer says of it: a header, or none."""
    if not ignored:
        return {}
    more = f"; and {len(ignored) - MOST_NAMED} more" if len(ignored) > MOST_NAMED else ""
    text = "; ".join(ignored[:MOST_NAMED]) + more
    plain = "".join(c if " " <= c <= "~" and c not in '"\\' else "?" for c in text)
    return {"warning": f'299 moeserve "{plain}"'}


def _is_inert(name: str, value: object) -> bool:
    """Of the same type too: 1 is not True."""
    values = _INERT.get(name, ())
    return _ANY in values or any(type(value) is type(inert) and value == inert for inert in values)


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
