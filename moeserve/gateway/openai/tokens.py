"""Bodies of ``/tokenize`` and ``/detokenize``, and the answer of ``/tokenizer_info``, as vLLM has
them."""

from __future__ import annotations

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


def parse_tokenize(body: Body) -> tuple[str, str | Conversation, bool]:
    """Model, text or conversation, and whether special tokens are added."""
    refuse_others(
        body,
        frozenset(
            "model prompt messages add_special_tokens add_generation_prompt "
            "chat_template_kwargs tools tool_choice documents reasoning_effort".split()
        ),
    )
    if ("prompt" in body) == ("messages" in body):
        refuse("prompt", "send either prompt or messages")
    if "messages" in body:
        conversation = parse_conversation(body)
        return text(body, "model"), conversation, flag(body, "add_special_tokens")
    special = flag(body, "add_special_tokens", default=True)
    return text(body, "model"), text(body, "prompt"), special


def parse_detokenize(body: Body) -> tuple[str, object, bool]:
    """Model, token ids and whether special tokens are left out."""
    refuse_others(body, frozenset({"model", "tokens", "skip_special_tokens"}))
    if "tokens" not in body:
        refuse("tokens", "missing: send a list of token ids")
    return text(body, "model"), body["tokens"], flag(body, "skip_special_tokens", default=True)


def tokenizer_info(tokenizer: Tokenizer, max_len: int) -> Json:
    """What ``tokenizer_config.json`` says that a client needs to write prompts itself."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one that reads tokenizer.json
        **tokenizer.named_specials,
        "model_max_length": max_len,
        "chat_template": tokenizer.chat_template,
    }
