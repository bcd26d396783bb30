"""A conversation becomes a request: rendered with the model's template, and read as it answers."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace

from moeserve.core import Grammar, GrammarKind
from moeserve.errors import InvalidRequestError
from moeserve.gateway.limits import prompt_text
from moeserve.gateway.openai.chat import Conversation
from moeserve.gateway.openai.fields import refuse
from moeserve.gateway.openai.reading import Reading
from moeserve.gateway.parsers.answer_grammar import AnswerShape, answer_grammar
from moeserve.gateway.parsers.styles import AnswerStyle
from moeserve.gateway.parsers.thinking import ends_inside
from moeserve.gateway.service import ClientRequest, InferenceService, ServedModel
from moeserve.gateway.text_work import TextWork
from moeserve.grammar.json_options import json_options
from moeserve.models.tokenizer import Tokenizer


async def prepare(
    service: InferenceService, wanted: ClientRequest, conversation: Conversation
) -> tuple[ClientRequest, Reading]:
    """The request with its prompt, and how its answers are read."""
    served = service.model(wanted.model)
    _refuse_what_it_cannot(served.style, conversation)
    prompt = await render(service.texts, served, conversation)
    tokenizer = service.texts.tokenizer
    closing_id = tokenizer.token_to_id(served.style.reasoning_end)
    reading = Reading(served.style, conversation.tool_use, prompt, closing_id)
    params = dict(wanted.params)
    if reading.parses and any(_is_special(tokenizer, m) for m in served.style.markers):
        params["skip_special_tokens"] = False
    if reading.parses and served.style.stops:
        found = map(tokenizer.token_to_id, served.style.stops)
        own = [token for token in found if token is not None]
        params["stop_token_ids"] = [*_ids(params.get("stop_token_ids")), *own]
    shape = AnswerShape(
        tools=conversation.tool_use.forced,
        parallel=conversation.tool_use.parallel,
        budget=conversation.max_thinking,
        inside=served.style.reasoning == "think" and ends_inside(prompt),
    )
    _constrain(params, served.style, shape, tokenizer)
    return replace(wanted, prompts=(prompt,), params=params, operation="chat"), reading


def _constrain(
    params: dict[str, object], style: AnswerStyle, shape: AnswerShape, tokenizer: Tokenizer
) -> None:
    """One grammar for all that is asked of an answer. A form that is asked for beside calls holds
    where there are none, so calls that must be leave it without effect."""
    form = params.get("grammar")
    if isinstance(form, Grammar) and style.reasoning != "none" and not shape.tools:
        shape = replace(shape, body=lark_of(form))
    try:
        lark = answer_grammar(style, shape, tokenizer.token_to_id)
    except RecursionError as error:
        raise InvalidRequestError(
            "a tool's parameters are nested too deep", param="tools"
        ) from error
    if lark is not None:
        params["grammar"] = Grammar(GrammarKind.LARK, lark)


def lark_of(form: Grammar) -> str:
    """The form of an answer as a part of a larger one: an expression in Lark. Nothing that a
    request asks for is left out: what cannot be a part is refused."""
    match form.kind:
        case GrammarKind.JSON_SCHEMA:
            schema = json.loads(form.text) | {"x-guidance": json_options(form.whitespace)}
            return f"%json {json.dumps(schema, ensure_ascii=False)}"
        case GrammarKind.REGEX:
            return "/" + form.text.replace("/", r"\/") + "/"
        case GrammarKind.CHOICE:
            return "(" + " | ".join(json.dumps(one) for one in json.loads(form.text)) + ")"
        case _:
            raise InvalidRequestError(
                f"a {form.kind} cannot follow reasoning: ask for a JSON schema, regex or choice",
                param="grammar",
            )


def named(wanted: ClientRequest, prefix: str) -> ClientRequest:
    """The request with an id, the client's or a fresh one."""
    if wanted.request_id:
        return wanted
    return replace(wanted, request_id=f"{prefix}-{secrets.token_hex(12)}")


def _refuse_what_it_cannot(style: AnswerStyle, conversation: Conversation) -> None:
    if conversation.tool_use.offered and style.tools == "none":
        refuse(
            "tools",
            "not supported by this model: its chat template shows no form of tool calls; the "
            "server's --tool-parser can name one",
        )
    effort = (conversation.template_args or {}).get("reasoning_effort", "none")
    if effort != "none" and style.reasoning == "none":
        refuse("reasoning_effort", "not supported by this model: its chat template knows none")


async def render(texts: TextWork, served: ServedModel, conversation: Conversation) -> str:
    """The prompt. InvalidRequestError where the template rejects the conversation."""
    text = await texts.render(
        conversation.shaped(served.style),
        add_generation_prompt=conversation.add_generation_prompt,
        **conversation.arguments,
    )
    return prompt_text(text, "messages")


def _is_special(tokenizer: Tokenizer, marker: str) -> bool:
    """Whether a text that leaves special tokens out has lost the marker."""
    token = tokenizer.token_to_id(marker)
    return token is not None and not tokenizer.decode([token], skip_special_tokens=True)


def _ids(value: object) -> list[object]:
    """What a client gave; ``limits`` refuses what is no list of ids."""
    return [value] if value is not None and not isinstance(value, list) else value or []
