"""Log-probabilities as OpenAI writes them, for completions and for chat. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from moeserve.core import Logprobs
from moeserve.gateway.openai.errors import Json
from moeserve.models.tokenizer import Tokenizer

# JSON has no -Infinity; OpenAI writes this for a token that cannot occur.
LEAST_LOGPROB = -9999.0


class TokenEntries:
    """One entry per token, in a form from which both of OpenAI's are made."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool = False) -> None:
        """``as_ids`` spells tokens "token_id:N", as they are without a tokenizer."""
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._spelled: dict[int, tuple[str, list[int] | None]] = {}

    def entries(
        self, token_ids: Sequence[int], logprobs: Sequence[Logprobs], offset: int
    ) -> tuple[list[Json], int]:
        """The entries of tokens whose text begins at character ``offset``, and where it ends."""
        entries = []
        for token, found in zip(token_ids, logprobs, strict=True):
            shown = self._shown(token, found.chosen)
            tops = [self._shown(other, value) for other, value in found.top]
            entries.append(shown | {"top_logprobs": tops, "offset": offset})
            offset += len(self._text(token))
        return entries, offset

    def prompt_entries(
        self, token_ids: Sequence[int], logprobs: Sequence[Logprobs], count: int
    ) -> tuple[list[Json], int]:
        """Of a prompt from its beginning on, with ``count`` best tokens: the first has nothing
        before it that would tell how likely it is."""
        first = self._shown(token_ids[0], 0.0)
        first |= {"logprob": None, "top_logprobs": None, "offset": 0}
        cut = [Logprobs(found.chosen, found.top[:count]) for found in logprobs]
        entries, end = self.entries(token_ids[1:], cut, len(self._text(token_ids[0])))
        return [first, *entries], end

    def by_token_id(
        self, token_ids: Sequence[int], logprobs: Sequence[Logprobs]
    ) -> list[Json | None]:
        """vLLM's form for prompts: an object by token id, None for the first token."""
        return [None, *map(self._by_id, token_ids[1:], logprobs)]

    def _by_id(self, token: int, found: Logprobs) -> Json:
        """The ranks of all but the token itself are known, and its own where it is among them."""
        ranked = {other: (value, i) for i, (other, value) in enumerate(found.top, 1)}
        return {
            str(other): {
                "logprob": max(value, LEAST_LOGPROB),
                "rank": rank,
                "decoded_token": self._text(other),
            }
            for other, (value, rank) in ({token: (found.chosen, None)} | ranked).items()
        }

    def _shown(self, token: int, logprob: float) -> Json:
        text, raw = self._spelling(token)
        return {
            "token": f"token_id:{token}" if self._as_ids else text,
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": raw,
        }

    def _text(self, token: int) -> str:
        return self._spelling(token)[0]

    def _spelling(self, token: int) -> tuple[str, list[int] | None]:
        """Text and bytes of a token, which are looked up once."""
        known = self._spelled.get(token)
        if known is None:
            known = self._spelled[token] = self._spell(token)
        return known

    def _spell(self, token: int) -> tuple[str, list[int] | None]:
        if self._tokenizer is None:
            return f"token_id:{token}", None
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


def chat_logprobs(entries: list[Json]) -> Json:
    shown = [{k: v for k, v in entry.items() if k != "offset"} for entry in entries]
    return {"content": shown, "refusal": None}


def completion_logprobs(entries: list[Json]) -> Json:
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [_by_token(entry) for entry in entries],
        "text_offset": [entry["offset"] for entry in entries],
    }


def _by_token(entry: Json) -> dict[str, float] | None:
    """The best tokens, and the chosen one where it is not among them; None where none are known."""
    if entry["top_logprobs"] is None:
        return None
    best = {top["token"]: top["logprob"] for top in entry["top_logprobs"]}
    return best | {entry["token"]: entry["logprob"]}
