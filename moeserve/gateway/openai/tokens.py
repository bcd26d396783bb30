"""Bodies of ``/tokenize`` and ``/detokenize``, and the answer of ``/tokenizer_info``, as vLLM has
them."""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.gateway.json_body import Body
from moeserve.gateway.openai.chat import Conversation, parse_conversation
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import (
    flag,
    refuse,
    refuse_others,
    text,
)
from moeserve.models.tokenizer import Tokenizer

TOKENIZE_FIELDS = frozenset(
    "model prompt messages add_special_tokens add_generation_prompt chat_template_kwargs tools "
    "tool_choice documents reasoning_effort".split()
)
DETOKENIZE_FIELDS = frozenset({"model", "tokens", "skip_special_tokens"})


@dataclass(frozen=True, slots=True)
class TokenizeBody:
    """Text or conversation, whether special tokens are added, and what of the body is ignored."""

    model: str
    prompt: str | Conversation
    special_tokens: bool
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DetokenizeBody:
    """Token ids, still to be checked, and what of the body is ignored."""

    model: str
    tokens: object
    skip_special_tokens: bool
    ignored: tuple[str, ...]


def parse_tokenize(body: Body) -> TokenizeBody:
    ignored = refuse_others(body, TOKENIZE_FIELDS)
    if ("prompt" in body) == ("messages" in body):
        refuse("prompt", "send either prompt or messages")
    if "messages" in body:
        conversation = parse_conversation(body)
        special = flag(body, "add_special_tokens")
        return TokenizeBody(text(body, "model"), conversation, special, ignored)
    special = flag(body, "add_special_tokens", default=True)
    return TokenizeBody(text(body, "model"), text(body, "prompt"), special, ignored)


def parse_detokenize(body: Body) -> DetokenizeBody:
    ignored = refuse_others(body, DETOKENIZE_FIELDS)
    if "tokens" not in body:
        refuse("tokens", "missing: send a list of token ids")
    skip = flag(body, "skip_special_tokens", default=True)
    return DetokenizeBody(text(body, "model"), body["tokens"], skip, ignored)


def tokenizer_info(tokenizer: Tokenizer, max_len: int) -> Json:
    """What ``tokenizer_config.json`` says that a client needs to write prompts itself."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one that reads tokenizer.json
        **tokenizer.named_specials,
        "model_max_length": max_len,
        "chat_template": tokenizer.chat_template,
    }
