"""Work on clients' texts: bodies parsed, conversations rendered, texts tokenised.

One object behind all doors, so that what takes long has one place where it is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from moeserve.errors import TokenizerError
from moeserve.gateway.json_body import Body, parse_json
from moeserve.models.tokenizer import Tokenizer

# Longer texts are tokenised beside the event loop, not on it.
INLINE_CHARS = 4096


class TextWork:
    """Owns what works on texts for one served model; ``tokenizer`` None serves token ids only."""

    def __init__(self) -> None:
        self._name = ""
        self._tokenizer: Tokenizer | None = None

    def serve(self, name: str, tokenizer: Tokenizer | None) -> None:
        """The model is there; bodies can be parsed before."""
        self._name, self._tokenizer = name, tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """TokenizerError where the model has none."""
        if self._tokenizer is None:
            raise TokenizerError(
                f"model {self._name!r} has no tokenizer: send token ids instead of text",
                param="prompt",
            )
        return self._tokenizer

    async def parse_json(self, raw: bytes) -> Body:
        """A body's object without its nulls. InvalidRequestError where it is none."""
        return parse_json(raw)

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **template_args: Any,
    ) -> str:
        """The prompt of a conversation; ``template_args`` (``tools`` among them) are the
        template's. InvalidRequestError where the template rejects them."""
        return self.tokenizer.render_chat(messages, add_generation_prompt, **template_args)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        tokenizer = self.tokenizer
        if len(text) <= INLINE_CHARS:
            return tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, which are below the vocabulary's size."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    async def close(self) -> None:
        """May be called again."""
