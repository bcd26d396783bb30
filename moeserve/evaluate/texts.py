"""The tokens on which two runs are compared, in windows that fit a model.

Text comes from files, or the reference run writes it itself: sampled at temperature 1 it is always
at hand, needs no corpus, and the mean difference of losses on it is an unbiased estimate of the
divergence, though its perplexity says nothing about real text. As in llama.cpp, windows do not
overlap, each begins as the tokenizer begins a text, and only its second half is scored: what stands
before is context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeserve.core import Request, RequestId, SamplingParams
from moeserve.errors import ConfigError
from moeserve.evaluate.answers import answer
from moeserve.models.decoder import Decoder
from moeserve.models.tokenizer import Tokenizer

SAMPLED = "written by the reference"
# Files are read line by line, in pieces of about so many bytes.
PIECE = 1 << 16
SHORTEST = 4


@dataclass(frozen=True, slots=True)
class Window:
    """``ids`` are one more than go into the model: token i + 1 is what should follow token i."""

    text: str
    ids: tuple[int, ...]

    @property
    def context(self) -> int:
        """How many input tokens come before the first whose successor is scored."""
        return (len(self.ids) - 1) // 2

    @property
    def scored(self) -> int:
        return len(self.ids) - 1 - self.context


def windows_of_files(
    files: Sequence[Path], tokenizer: Tokenizer, *, window: int, tokens: int
) -> list[Window]:
    """Windows from the beginning of each file, together scoring about ``tokens``."""
    opening = opening_of(tokenizer)
    each = max(1, -(-tokens // len(files) // scored_per(window)))
    found = []
    for file in files:
        stream = _ids_of(file, tokenizer, opening)
        taken = [w for w in (_next(file.name, stream, opening, window) for _ in range(each)) if w]
        if not taken:
            raise ConfigError(f"--text {file}: no text in it that could be scored")
        found += taken
    return found


def sampled_windows(
    decoder: Decoder,
    *,
    window: int,
    tokens: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[Window]:
    """Windows that the decoder writes itself, at temperature 1 from its begin-of-text token."""
    spec = decoder.spec
    start = spec.bos_id if spec.bos_id is not None else next(iter(spec.eos_ids), 0)
    count = -(-tokens // scored_per(window))
    requests = [
        Request(
            RequestId(f"window {i}"),
            (start,),
            SamplingParams(max_tokens=window, temperature=1.0, seed=seed + i, ignore_eos=True),
        )
        for i in range(count)
    ]
    made = answer(decoder, requests, frozenset(), progress)
    return [Window(SAMPLED, (start, *ids)) for ids in made]


def scored_per(window: int) -> int:
    """Tokens scored of a full window."""
    return window - window // 2


def opening_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text: a begin-of-text token, or nothing."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    return tuple(whole[: whole.index(plain[0])]) if plain and plain[0] in whole else ()


def _next(name: str, stream: Iterator[int], opening: tuple[int, ...], window: int) -> Window | None:
    """The stream's next window; a shorter one where the text ends."""
    ids = list(opening)
    while len(ids) <= window and (token := next(stream, None)) is not None:
        ids.append(token)
    return Window(name, tuple(ids)) if len(ids) - len(opening) >= SHORTEST else None


def _ids_of(file: Path, tokenizer: Tokenizer, opening: tuple[int, ...]) -> Iterator[int]:
    try:
        with file.open(encoding="utf-8") as lines:
            while piece := lines.readlines(PIECE):
                yield from tokenizer.encode("".join(piece), add_special_tokens=False)
    except OSError as error:
        raise ConfigError(f"--text {file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {file}: is not UTF-8 text ({error.reason})") from error
