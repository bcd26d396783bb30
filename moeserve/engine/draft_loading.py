"""What makes a rank's guesses, and its draft model: checked against the model that it drafts for,
loaded, and what it takes of the memory that the model and its KV have otherwise. Sizes are bytes.

A draft model's tokens must be the model's: every token of the two tokenizers with the same id, or,
where one of them has no tokenizer, vocabularies of one size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeserve.config.options import RankModelOptions
from moeserve.engine.device_memory import is_full
from moeserve.engine.draft_model import DraftModel
from moeserve.engine.model_runner import DraftMaker
from moeserve.engine.mtp_drafts import MtpDrafts
from moeserve.errors import ConfigError, MoeserveError
from moeserve.kernels.ops import Ops
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, assemble
from moeserve.models.families import read_spec
from moeserve.models.library import resolve_model
from moeserve.models.packed.checkpoint import open_checkpoint
from moeserve.models.survey import survey
from moeserve.models.tokenizer_parts import tokenizer_file, tokenizer_source


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """Without one ``decoder`` is None, and nothing is taken. ``mapped`` of its weights lie in the
    cache of files, which counts as free."""

    decoder: Decoder | None = None
    weights: int = 0
    mapped: int = 0

    @property
    def kv_bytes_per_token(self) -> int:
        return 0 if self.decoder is None else self.decoder.kv_bytes_per_token

    def within(self, options: RankModelOptions) -> RankModelOptions:
        """Options whose bound of the device's memory is without the draft model's weights (that of
        a process, ``memory``, counts what the process has by then). ConfigError where these leave
        nothing."""
        limit = options.device_memory
        if limit is None or not self.weights:
            return options
        if limit <= self.weights:
            raise ConfigError(
                f"device_memory={limit}: the draft model takes {self.weights} bytes for its "
                "weights: give more, or choose another --speculation"
            )
        return options.model_copy(update={"device_memory": limit - self.weights})


def load_draft(
    options: RankModelOptions, model: Checkpoint, ops: Ops, *, guesses: bool = True
) -> LoadedDraft:
    """Where one is asked for; ConfigError where it does not fit the ``model``, or the device. A
    rank that never ``guesses``, for it has no requests, looks at it as all do, and loads nothing.
    """
    name = draft_wanted(options)
    if name is None:
        return LoadedDraft()
    try:
        path = resolve_model(name)
        draft = open_checkpoint(path)
        require_same_tokens(draft, model)
        if not guesses:
            return LoadedDraft()
        weights = survey(path).weight_bytes
        decoder = assemble(draft, ops, options)
    except ConfigError:
        raise
    except MoeserveError as error:
        raise ConfigError(f"draft_model={name!r}: {error.message}") from error
    except RuntimeError as full:
        if not is_full(full):
            raise
        raise ConfigError(
            f"draft_model={name!r}: {ops.device} has no room for its weights, {weights} bytes as "
            "they are stored: give a smaller one, or another --speculation"
        ) from full
    return LoadedDraft(replace(decoder, mtp=None), weights, draft.mapped_bytes)


def draft_wanted(options: RankModelOptions) -> str | None:
    """The model that is to draft; ConfigError where one lacks, or is of no use."""
    wanted, name = options.speculation, options.draft_model
    if name is None and wanted == "draft":
        raise ConfigError("speculation=draft needs a model that drafts: give --draft-model")
    if name is not None and wanted not in ("draft", "auto"):
        raise ConfigError(
            f"draft_model={name!r} is of no use with speculation={wanted}: choose draft or auto, "
            "or leave it out"
        )
    return name


def maker_of(
    options: RankModelOptions, decoder: Decoder, draft: LoadedDraft, num_blocks: int
) -> DraftMaker | None:
    """Who guesses behind the steps of ``decoder``: the draft model, or the model's own module,
    where it is wanted and there is one."""
    if draft.decoder is not None:
        size, most = options.block_size, options.max_num_batched_tokens
        return DraftModel(decoder, draft.decoder, num_blocks, size, most)
    if options.speculation == "mtp" or (options.asks_the_module and decoder.mtp is not None):
        return MtpDrafts(decoder, options.max_num_seqs)
    return None


def require_same_tokens(draft: Checkpoint, model: Checkpoint) -> None:
    """ConfigError that names both sizes."""
    known, wanted = tokens_of(draft.path), tokens_of(model.path)
    if known is not None and wanted is not None:
        if known == wanted:
            return
        sizes, alike = (len(known), len(wanted)), len(known.items() & wanted.items())
        told = f"; {alike} are the same"
    else:
        sizes, told = (read_spec(draft)[0].vocab, read_spec(model)[0].vocab), ""
        if sizes[0] == sizes[1]:
            return
    raise ConfigError(
        f"draft_model={str(draft.path)!r}: its vocabulary has {sizes[0]} tokens, that of "
        f"{str(model.path)!r} {sizes[1]}{told}: a draft model needs the tokenizer of the model it "
        "drafts for; give one of its family, or another --speculation"
    )


def tokens_of(path: Path) -> dict[str, int] | None:
    """The ids of a tokenizer's tokens; None where a model has no tokenizer. ConfigError where it
    cannot be read."""
    file = tokenizer_file(path)
    if file is None:
        return None
    try:
        read = json.loads(tokenizer_source(file))
        vocab, added = read["model"]["vocab"], read.get("added_tokens") or ()
        ids = _ids(vocab)
        return ids | {one["content"]: one["id"] for one in added}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as wrong:
        raise ConfigError(
            f"{file}: no list of tokens can be read from it ({wrong!r}): download it again, or "
            "leave out --draft-model"
        ) from wrong


def _ids(vocab: Any) -> dict[str, int]:
    """As BPE and WordPiece have it, a mapping; as Unigram has it, a list in order."""
    if isinstance(vocab, dict):
        return dict(vocab)
    return {str(token): i for i, (token, _) in enumerate(vocab)}
