"""OpenAI request bodies to client requests.

A field is used, inert (accepted where its value changes nothing), or refused by name: nothing is
dropped in silence. ``null`` is the same as absent, as OpenAI has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from moeserve.errors import InvalidRequestError
from moeserve.gateway import limits
from moeserve.gateway.json_body import Body
from moeserve.gateway.service import ClientRequest

_SAMPLING = frozenset(
    "max_tokens min_tokens temperature top_k top_p min_p repetition_penalty presence_penalty "
    "frequency_penalty logit_bias seed stop stop_token_ids ignore_eos skip_special_tokens".split()
)
_COMMON = _SAMPLING | frozenset(
    "model n stream stream_options logprobs include_stop_str_in_output cache_salt domain "
    "request_id return_token_ids add_special_tokens".split()
)
_COMPLETION = _COMMON | {"prompt"}
_CHAT = _COMMON | frozenset(
    "messages max_completion_tokens top_logprobs chat_template_kwargs add_generation_prompt".split()
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
    "response_format": ({"type": "text"},),
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
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answer is to be written."""

    chat: bool
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    token_ids: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages, still to be rendered with the model's template."""

    messages: list[dict[str, object]]
    add_generation_prompt: bool
    template_args: Mapping[str, object]


def parse_completion(body: Body) -> tuple[ClientRequest, AnswerFormat]:
    _refuse_others(body, _COMPLETION)
    wanted, form = _common(body, chat=False)
    if "prompt" not in body:
        _refuse("prompt", "missing: send a string, token ids, or a list of either")
    params = dict(wanted.params)
    if "logprobs" in body:
        params["logprobs"] = body["logprobs"]
    return replace(wanted, prompts=_prompts(body["prompt"]), params=params), form


def parse_chat(body: Body) -> tuple[ClientRequest, AnswerFormat, Conversation]:
    """The request lacks its prompt, which is the rendered conversation."""
    _refuse_others(body, _CHAT)
    wanted, form = _common(body, chat=True)
    params = dict(wanted.params)
    if "max_completion_tokens" in body:
        most = body["max_completion_tokens"]
        if params.get("max_tokens", most) != most:
            _refuse("max_completion_tokens", "differs from max_tokens; send one of them")
        params["max_tokens"] = most
    if _flag(body, "logprobs"):
        params["logprobs"] = _bounded_top(body)
    elif "top_logprobs" in body:
        _refuse("top_logprobs", "needs logprobs: true")
    conversation = Conversation(
        messages=_messages(body.get("messages")),
        add_generation_prompt=_flag(body, "add_generation_prompt", default=True),
        template_args=_template_args(body),
    )
    special = _flag(body, "add_special_tokens")
    return replace(wanted, params=params, fill=True, special_tokens=special), form, conversation


def parse_tokenize(body: Body) -> tuple[str, str | Conversation, bool]:
    """Model, text or conversation, and whether special tokens are added."""
    _refuse_others(
        body,
        frozenset(
            "model prompt messages add_special_tokens add_generation_prompt "
            "chat_template_kwargs".split()
        ),
    )
    if ("prompt" in body) == ("messages" in body):
        _refuse("prompt", "send either prompt or messages")
    if "messages" in body:
        conversation = Conversation(
            messages=_messages(body["messages"]),
            add_generation_prompt=_flag(body, "add_generation_prompt", default=True),
            template_args=_template_args(body),
        )
        return _text(body, "model"), conversation, _flag(body, "add_special_tokens")
    special = _flag(body, "add_special_tokens", default=True)
    return _text(body, "model"), _text(body, "prompt"), special


def parse_detokenize(body: Body) -> tuple[str, object, bool]:
    """Model, token ids and whether special tokens are left out."""
    _refuse_others(body, frozenset({"model", "tokens", "skip_special_tokens"}))
    if "tokens" not in body:
        _refuse("tokens", "missing: send a list of token ids")
    return _text(body, "model"), body["tokens"], _flag(body, "skip_special_tokens", default=True)


def _common(body: Body, *, chat: bool) -> tuple[ClientRequest, AnswerFormat]:
    params = {name: body[name] for name in _SAMPLING if name in body}
    if "include_stop_str_in_output" in body:
        params["include_stop"] = _flag(body, "include_stop_str_in_output")
    options = _object(body, "stream_options")
    if unknown := options.keys() - {"include_usage", "include_obfuscation"}:
        _refuse("stream_options", f"unknown option {min(unknown)!a:.60}")
    stream = _flag(body, "stream")
    if options and not stream:
        _refuse("stream_options", "needs stream: true")
    wanted = ClientRequest(
        prompts=(),
        params=params,
        n=body.get("n", 1),
        request_id=_text(body, "request_id"),
        model=_text(body, "model"),
        salt=_text(body, "cache_salt"),
        domain=_text(body, "domain"),
        special_tokens=_flag(body, "add_special_tokens", default=True),
    )
    form = AnswerFormat(
        chat=chat,
        stream=stream,
        include_usage=_flag(options, "include_usage"),
        logprobs=_flag(body, "logprobs") if chat else "logprobs" in body,
        token_ids=_flag(body, "return_token_ids"),
    )
    return wanted, form


def _refuse_others(body: Body, used: frozenset[str]) -> None:
    for name, value in body.items():
        if name in used:
            continue
        if name not in _INERT:
            raise InvalidRequestError(f"{name!a:.60}: unknown field", param=name[:60])
        if _ANY not in _INERT[name] and not any(
            type(value) is type(inert) and value == inert for inert in _INERT[name]
        ):
            _refuse(name, "not supported by this server; leave it out")


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        _refuse("prompt", "expected a string, token ids, or a list of either")
    if not value:
        _refuse("prompt", "empty: send at least one")
    if all(type(item) is int for item in value):
        return (tuple(value),)
    if len(value) > limits.MAX_PROMPTS:
        _refuse("prompt", f"{len(value)} prompts, at most {limits.MAX_PROMPTS}")
    for item in value:
        if not isinstance(item, str | list):
            _refuse("prompt", "expected a string, token ids, or a list of either")
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)


def _messages(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or not value:
        _refuse("messages", "expected a list of at least one message")
    if len(value) > limits.MAX_MESSAGES:
        _refuse("messages", f"{len(value)} messages, at most {limits.MAX_MESSAGES}")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(value)]


def _message(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        _refuse("messages", f"{where}: expected an object with role and content")
    given = {name: item for name, item in value.items() if item is not None}
    if unknown := given.keys() - {"role", "content", "name", "refusal"}:
        _refuse("messages", f"{where}.{min(unknown)!a:.60}: not supported")
    if given.get("role") not in _ROLES:
        _refuse("messages", f"{where}.role: expected one of {', '.join(_ROLES)}")
    message: dict[str, object] = {
        "role": given["role"],
        "content": _content(given.get("content"), where),
    }
    if isinstance(given.get("name"), str):
        message["name"] = given["name"]
    return message


def _content(value: object, where: str) -> str:
    """A string, or OpenAI's list of parts, of which only text is understood."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _refuse("messages", f"{where}.content: expected a string")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            _refuse("messages", f"{where}.content: only parts of type 'text' are supported")
        if not isinstance(part.get("text"), str):
            _refuse("messages", f"{where}.content: a text part needs a string 'text'")
        texts.append(part["text"])
    return "".join(texts)


def _bounded_top(body: Body) -> int:
    value = body.get("top_logprobs", 0)
    try:
        return int(limits.BOUNDS["logprobs"].check("top_logprobs", value))
    except InvalidRequestError as error:
        raise InvalidRequestError(error.message, param="top_logprobs") from error


def _text(body: Body, name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str):
        _refuse(name, "expected a string")
    return value


def _flag(body: Body, name: str, *, default: bool = False) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        _refuse(name, "expected true or false")
    return value


def _object(body: Body, name: str) -> Mapping[str, object]:
    value = body.get(name, {})
    if not isinstance(value, dict):
        _refuse(name, "expected an object")
    return value


def _template_args(body: Body) -> Mapping[str, object]:
    args = _object(body, "chat_template_kwargs")
    for name in args:
        if not name.isidentifier() or name in ("self", "messages", "add_generation_prompt"):
            _refuse("chat_template_kwargs", f"{name!a:.60} cannot be set")
    return args


def _refuse(name: str, reason: str) -> NoReturn:
    raise InvalidRequestError(f"{name}: {reason}", param=name)
