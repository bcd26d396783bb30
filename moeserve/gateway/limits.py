"""Every bound on a request, in one table, and the one way from client fields to SamplingParams.

Both doors pass what a client gave as ``{field: value}``, so both refuse the same things with the
same words. Knows the model only by the numbers in ``ModelLimits``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moeserve.core import Grammar, SamplingParams
from moeserve.errors import (
    ContextLengthError,
    ExhaustedError,
    InvalidRequestError,
    MoeserveError,
)

MAX_MESSAGE_BYTES = 64 * 2**20
MAX_REQUEST_BYTES = 8 * 2**20
MAX_BODY_BYTES = 16 * 2**20
MAX_PROMPT_BYTES = 4 * 2**20
MAX_PROMPTS = 64
MAX_MESSAGES = 1024
MAX_IDS = 2**20
MAX_LISTED_IDS = 2**18
MAX_N = 16
MAX_STOP = 16
MAX_STOP_BYTES = 256
MAX_STOP_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_IDS = 2**14
MAX_BAD_WORDS = 64
# Log-probabilities of all prompts of a request together, each token's and its best ones'.
MAX_PROMPT_SCORES = 2**17
MAX_ID_CHARS = 128
MAX_SALT_BYTES = 128
MAX_DOMAIN_BYTES = 64
MAX_GRAMMAR_BYTES = 256 * 2**10
MAX_WHITESPACE_BYTES = 256


@dataclass(frozen=True, slots=True)
class Bound:
    """``low <= value <= high``; ``above`` leaves ``low`` itself out."""

    low: float
    high: float
    integer: bool = False
    above: bool = False

    def check(self, name: str, value: object) -> Any:
        expected = f"expected {self}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequestError(f"{name}={_shown(value)}: {expected}", param=name)
        if self.integer and not isinstance(value, int):
            raise InvalidRequestError(f"{name}={value!r}: {expected}", param=name)
        # NaN compares false with everything, so it is refused here too.
        inside = self.low < value if self.above else self.low <= value
        if not (inside and value <= self.high):
            raise InvalidRequestError(f"{name}={_shown(value)}: {expected}", param=name)
        return value if self.integer else float(value)

    def __str__(self) -> str:
        # Integers are written in full: as a float, 2**63 - 1 would be 2**63.
        low, high = (f"{x}" if self.integer else f"{x:g}" for x in (self.low, self.high))
        kind = "an integer" if self.integer else "a number"
        return f"{kind} {'above' if self.above else 'from'} {low}{' and' * self.above} up to {high}"


BOUNDS: Mapping[str, Bound] = {
    "n": Bound(1, MAX_N, integer=True),
    "max_tokens": Bound(1, 2**31 - 1, integer=True),
    "min_tokens": Bound(0, 2**31 - 1, integer=True),
    "temperature": Bound(0, 2),
    "top_k": Bound(0, 2**31 - 1, integer=True),
    "top_p": Bound(0, 1, above=True),
    "min_p": Bound(0, 1),
    # It divides logits, and no useful one is near 0: a quotient must stay a number.
    "repetition_penalty": Bound(0.01, 2),
    "presence_penalty": Bound(-2, 2),
    "frequency_penalty": Bound(-2, 2),
    "seed": Bound(0, 2**63 - 1, integer=True),
    "logprobs": Bound(0, 20, integer=True),
    "prompt_logprobs": Bound(0, 20, integer=True),
}
PRIORITY = Bound(-(2**31), 2**31 - 1, integer=True)
RESUME = Bound(0, 2**31 - 1, integer=True)
TRUNCATION = Bound(1, 2**31 - 1, integer=True)
SWITCHES = frozenset({"ignore_eos", "include_stop", "skip_special_tokens", "only_prompt"})
LOGIT_BIAS = Bound(-100, 100)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the served model adds: ids below ``vocab_size``, prompt and answer in ``max_len``.

    ``context`` is what they could be with more KV memory, where that is more.
    """

    vocab_size: int
    max_len: int
    context: int = 0


def sampling_params(given: Mapping[str, object], model: ModelLimits) -> SamplingParams:
    """Checks everything but what depends on the prompt; absent fields get their defaults."""
    values: dict[str, Any] = {}
    if asks_prompt_alone(given):
        given = prompt_alone(given)
    for name, value in given.items():
        if name in BOUNDS:
            values[name] = BOUNDS[name].check(name, value)
        elif name in SWITCHES:
            values[name] = _switch(name, value)
        elif name == "stop":
            values[name] = _stop(value)
        elif name == "stop_token_ids":
            values[name] = token_ids(value, model, name, MAX_STOP_IDS)
        elif name == "logit_bias":
            values[name] = _logit_bias(value, model)
        elif name == "grammar":
            values[name] = _grammar(value)
        elif name == "allowed_token_ids":
            values[name] = token_ids(value, model, name, MAX_ALLOWED_IDS)
            if not values[name]:
                raise InvalidRequestError(f"{name}: expected at least one token id", param=name)
        else:
            raise InvalidRequestError(f"{name}: unknown sampling parameter", param=name)
    if "max_tokens" in values and values["max_tokens"] > model.max_len:
        raise _too_long(
            values["max_tokens"],
            model,
            f"max_tokens={values['max_tokens']}: the model holds {model.max_len} tokens of prompt "
            "and answer together",
            "max_tokens",
        )
    params = SamplingParams(**values)
    if "max_tokens" in values and params.min_tokens > params.max_tokens:
        raise InvalidRequestError(
            f"min_tokens={params.min_tokens} is more than max_tokens={params.max_tokens}",
            param="min_tokens",
        )
    if params.grammar is not None and params.ignore_eos:
        raise InvalidRequestError(
            "ignore_eos: an answer in a given form ends with end-of-text; leave it out",
            param="ignore_eos",
        )
    if params.grammar is not None and params.allowed_token_ids:
        raise InvalidRequestError(
            "allowed_token_ids: an answer in a given form says itself what is allowed; leave it "
            "out",
            param="allowed_token_ids",
        )
    return params


def prompt_alone(params: Mapping[str, object]) -> dict[str, object]:
    """What asks for no answer: ``max_tokens`` is 1 for the engine, and nothing of it is shown."""
    return {**params, "max_tokens": 1, "only_prompt": True}


def asks_prompt_alone(params: Mapping[str, object], *, echo: bool = False) -> bool:
    """Whether no answer is wanted, where something of the prompt is."""
    most = params.get("max_tokens")
    return type(most) is int and most == 0 and (echo or "prompt_logprobs" in params)


def require_scorable(params: SamplingParams, tokens: int) -> None:
    """``tokens`` are those of all prompts of a request, each as often as it is run."""
    if params.prompt_logprobs is None:
        return
    scores = tokens * (1 + params.prompt_logprobs)
    if scores > MAX_PROMPT_SCORES:
        raise InvalidRequestError(
            f"prompt_logprobs: {tokens} tokens with {1 + params.prompt_logprobs} each are {scores} "
            f"log-probabilities, at most {MAX_PROMPT_SCORES}: send fewer prompts at once",
            param="prompt_logprobs",
        )


def require_choice(params: SamplingParams, eos_ids: Iterable[int], model: ModelLimits) -> None:
    """Some token must be left whatever was chosen before: of those allowed, one that neither ends
    a bad word nor is held back by ``min_tokens``."""
    if not (params.allowed_token_ids or params.bad_token_ids):
        return
    allowed = set(params.allowed_token_ids or range(model.vocab_size))
    allowed -= {bad[-1] for bad in params.bad_token_ids}
    if params.min_tokens:
        allowed -= {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
    if not allowed:
        name = "allowed_token_ids" if params.allowed_token_ids else "bad_words"
        raise InvalidRequestError(
            f"{name}: no token is left that could be chosen, less bad_words and what min_tokens "
            "holds back",
            param=name,
        )


def bad_words(value: object) -> tuple[str, ...]:
    """Texts that are kept out of the answer."""
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        raise InvalidRequestError("bad_words: expected a list of strings", param="bad_words")
    if len(value) > MAX_BAD_WORDS:
        raise InvalidRequestError(
            f"bad_words: {len(value)} strings, at most {MAX_BAD_WORDS}", param="bad_words"
        )
    for word in value:
        size = _utf8_len(word, "bad_words")
        if not word.strip() or size > MAX_STOP_BYTES:
            raise InvalidRequestError(
                f"bad_words: {_shown(word)} has {size} bytes, expected 1 to {MAX_STOP_BYTES} that "
                "are not all spaces",
                param="bad_words",
            )
    return tuple(dict.fromkeys(value))


def truncation(value: object) -> int:
    """Tokens of the prompt to keep; -1 is as many as leave room for the answer."""
    if type(value) is int and value == -1:
        return -1
    kept: int = TRUNCATION.check("truncate_prompt_tokens", value)
    return kept


def room_for_answer(prompt_len: int, model: ModelLimits) -> int:
    """Tokens that fit after the prompt; at least one, or the prompt is refused."""
    if prompt_len < 1:
        raise InvalidRequestError("the prompt is empty: send at least one token", param="prompt")
    if prompt_len >= model.max_len:
        raise _too_long(
            prompt_len + 1,
            model,
            f"the prompt has {prompt_len} tokens, but the model holds {model.max_len} of prompt "
            f"and answer together: send at most {model.max_len - 1}",
            "prompt",
        )
    return model.max_len - prompt_len


def require_may_fit(chars: int, least_tokens: int, model: ModelLimits) -> None:
    """Refuses a text that is too long whatever its tokens are, before they are looked for."""
    if least_tokens >= model.max_len:
        raise _too_long(
            least_tokens + 1,
            model,
            f"the prompt has {chars} characters, which are at least {least_tokens} tokens, but the "
            f"model holds {model.max_len} of prompt and answer together: send at most "
            f"{model.max_len - 1} tokens",
            "prompt",
        )


def require_fits(prompt_len: int, max_tokens: int, model: ModelLimits) -> None:
    if max_tokens > room_for_answer(prompt_len, model):
        raise _too_long(
            prompt_len + max_tokens,
            model,
            f"the prompt has {prompt_len} tokens and max_tokens={max_tokens}, together more than "
            f"the {model.max_len} that the model holds: ask for at most "
            f"{model.max_len - prompt_len}",
            "max_tokens",
        )


def _too_long(tokens: int, model: ModelLimits, message: str, param: str) -> MoeserveError:
    """RESOURCE_EXHAUSTED where only this server's KV memory stands in the way."""
    if tokens <= model.context:
        return ExhaustedError(
            f"out of KV memory: {message}, or serve with more --kv-memory "
            f"(the model itself allows {model.context} tokens)",
            param=param,
        )
    return ContextLengthError(message, param=param)


def token_ids(
    value: object, model: ModelLimits, name: str = "prompt", most: int | None = None
) -> tuple[int, ...]:
    """A sequence of ids of the vocabulary."""
    if not isinstance(value, list | tuple):
        raise InvalidRequestError(f"{name}: expected a list of token ids", param=name)
    if most is not None and len(value) > most:
        raise InvalidRequestError(f"{name}: {len(value)} ids, at most {most}", param=name)
    of_ints = set(map(type, value)) <= {int}
    if of_ints and min(value, default=0) >= 0 and max(value, default=0) < model.vocab_size:
        return tuple(value)
    for token in value:
        if type(token) is not int or not 0 <= token < model.vocab_size:
            raise InvalidRequestError(
                f"{name}: {_shown(token)} is no token id; ids are integers from 0 to "
                f"{model.vocab_size - 1}",
                param=name,
            )
    return tuple(value)


def prompt_text(text: str, name: str = "prompt") -> str:
    """Non-empty, bounded, and encodable: JSON can spell lone surrogates, UTF-8 cannot."""
    if not text:
        raise InvalidRequestError("the prompt is empty: send at least one character", param=name)
    size = _utf8_len(text, name)
    if size > MAX_PROMPT_BYTES:
        raise InvalidRequestError(
            f"{name} has {size} bytes, at most {MAX_PROMPT_BYTES}", param=name
        )
    return text


def label(name: str, value: str, most: int) -> str:
    """A short text that only tells requests apart."""
    if (size := _utf8_len(value, name)) > most:
        raise InvalidRequestError(f"{name} has {size} bytes, at most {most}", param=name)
    return value


def request_id(value: str) -> str:
    if len(value) > MAX_ID_CHARS or not all(" " < char <= "~" for char in value):
        raise InvalidRequestError(
            f"request_id={_shown(value)}: expected at most {MAX_ID_CHARS} printable ASCII "
            "characters without spaces",
            param="request_id",
        )
    return value


def _switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{name}={_shown(value)}: expected true or false", param=name)
    return value


def _stop(value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise InvalidRequestError("stop: expected a string or a list of strings", param="stop")
    if len(strings) > MAX_STOP:
        raise InvalidRequestError(f"stop: {len(strings)} strings, at most {MAX_STOP}", param="stop")
    for string in strings:
        if not 1 <= _utf8_len(string, "stop") <= MAX_STOP_BYTES:
            raise InvalidRequestError(
                f"stop: {_shown(string)} has {_utf8_len(string, 'stop')} bytes, expected 1 to "
                f"{MAX_STOP_BYTES}",
                param="stop",
            )
    return tuple(dict.fromkeys(strings))


def _logit_bias(value: object, model: ModelLimits) -> tuple[tuple[int, float], ...]:
    """Keys are ids, or their decimal digits as JSON spells them."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError("logit_bias: expected {token id: bias}", param="logit_bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequestError(
            f"logit_bias: {len(value)} entries, at most {MAX_LOGIT_BIAS}", param="logit_bias"
        )
    ids = token_ids([_as_id(key) for key in value], model, "logit_bias")
    biases = [LOGIT_BIAS.check("logit_bias", bias) for bias in value.values()]
    if len(set(ids)) < len(ids):
        raise InvalidRequestError("logit_bias: a token id is given twice", param="logit_bias")
    return tuple(sorted(zip(ids, biases, strict=True)))


def _grammar(value: object) -> Grammar:
    """Of a size that can be looked at; whether it is a grammar says who compiles it."""
    if not isinstance(value, Grammar):
        raise InvalidRequestError(f"grammar={_shown(value)}: expected a grammar", param="grammar")
    bounds = ((value.text, MAX_GRAMMAR_BYTES), (value.whitespace or "", MAX_WHITESPACE_BYTES))
    for text, most in bounds:
        if (size := _utf8_len(text, "grammar")) > most:
            raise InvalidRequestError(
                f"the grammar has {size} bytes, at most {most}: simplify it", param="grammar"
            )
    if not value.text:
        raise InvalidRequestError("the grammar is empty", param="grammar")
    return value


def _as_id(key: object) -> object:
    plain = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12
    return int(str(key)) if plain else key


def _utf8_len(text: str, name: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name}: not valid Unicode (a lone surrogate at character {error.start})", param=name
        ) from error


def _shown(value: object) -> str:
    """As the client wrote it, cut short: an answer must not grow with what was sent."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and value.bit_length() > 128:
        return "an integer of more than 128 bits"
    text = (
        ascii(value)
        if not isinstance(value, Iterable) or isinstance(value, str)
        else (f"a {type(value).__name__}")
    )
    return text if len(text) <= 60 else text[:57] + "..."
