"""Masks are what grammar and tokens say, whatever happened to the worker, and whoever is beside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from moeserve.core import Grammar, GrammarKind, Request, RequestId, SamplingParams
from moeserve.grammar.compiling import matcher_of
from moeserve.grammar.masks import GrammarMasks, MaskWanted
from moeserve.grammar.worker import Vocabulary
from moeserve.models.library import resolve_model

FILE = resolve_model("demo") / "tokenizer.json"
V, EOS = 4096, 0
VOCABULARY = Vocabulary(FILE, V, (EOS,))

GRAMMARS = (
    Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}'),
    Grammar(GrammarKind.JSON_SCHEMA, '{"type":"array","items":{"type":"integer"}}', ""),
    Grammar(GrammarKind.REGEX, "[a-f]{2,9}(-[0-9]+)*"),
    Grammar(GrammarKind.CHOICE, json.dumps(["yes", "no", 'say "no"\n'])),
    Grammar(GrammarKind.LARK, 'start: "(" start ")" | "x"'),
    Grammar(GrammarKind.LARK, 'root ::= "a" root | "b"'),
)
HOSTILE = (
    Grammar(
        GrammarKind.JSON_SCHEMA,
        json.dumps({"enum": [f"value number {i}" for i in range(200_000)]}),
    ),
    Grammar(GrammarKind.LARK, "start: " + '"a"? ' * 20_000),
    Grammar(
        GrammarKind.JSON_SCHEMA,
        json.dumps(
            {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(1, 40)]}
        ),
    ),
)
REFUSED = (
    Grammar(GrammarKind.REGEX, "("),
    Grammar(GrammarKind.JSON_SCHEMA, '{"type":"array","items":' * 3000 + "{}" + "}" * 3000),
    Grammar(GrammarKind.LARK, "start: " + "(" * 3000 + '"a"' + ")" * 3000),
)
KILLED = "the grammar takes more time or memory than a grammar may: simplify it"


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer(FILE.read_text("utf-8"), eos_token=[EOS])


@pytest.fixture
def masks() -> Iterator[GrammarMasks]:
    masks = GrammarMasks(VOCABULARY)
    yield masks
    masks.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[GrammarMasks]:
    masks = GrammarMasks(VOCABULARY)
    yield masks
    masks.close()


names = count()


def request(grammar: Grammar) -> Request:
    return Request(RequestId(f"r{next(names)}"), (1,), SamplingParams(grammar=grammar))


def expected(tokenizer: LLTokenizer, grammar: Grammar, output_ids: list[int]) -> list[int]:
    """The slow way: a new matcher is shown every token."""
    matcher = matcher_of(grammar, tokenizer)
    assert matcher.consume_tokens(output_ids)
    return ids_of(np.frombuffer(matcher.compute_bitmask(), np.uint8))


def ids_of(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask, count=V, bitorder="little")).tolist()


def step(masks: GrammarMasks, *wanted: tuple[Request, list[int]]) -> list[list[int] | str]:
    """For each request its allowed tokens, or why it fails."""
    masks.begin(MaskWanted(*one) for one in wanted)
    result = masks.take()
    return [
        result.failed[r.id] if r.id in result.failed else ids_of(result.allowed[r.id])
        for r, _ in wanted
    ]


moves = st.lists(
    st.tuples(
        st.lists(st.integers(0, len(GRAMMARS) - 1), max_size=4, unique=True),
        st.sampled_from(["go", "go", "go", "take back", "forget", "end worker", "break off"]),
        st.integers(0, 2**31 - 1),
    ),
    max_size=12,
)


@pytest.mark.long
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(moves)
def test_masks_are_those_of_a_matcher_that_is_shown_every_token(
    shared: GrammarMasks,
    tokenizer: LLTokenizer,
    drawn: list[tuple[list[int], str, int]],
) -> None:
    requests = [request(grammar) for grammar in GRAMMARS]
    outputs: list[list[int]] = [[] for _ in requests]
    for chosen, what, seed in drawn:
        if what == "end worker" and shared._worker is not None:
            shared._worker._process.send_signal(9)
        if what == "break off":
            shared.begin([MaskWanted(requests[i], outputs[i]) for i in chosen])
        for i in chosen:
            if what == "take back":
                del outputs[i][-1:]
            if what == "forget":
                shared.forget([requests[i].id])
        found = step(shared, *((requests[i], outputs[i]) for i in chosen))
        for i, allowed in zip(chosen, found, strict=True):
            assert allowed == expected(tokenizer, GRAMMARS[i], outputs[i])
            outputs[i].append(allowed[seed % len(allowed)])
            if outputs[i][-1] == EOS:
                outputs[i].clear()
    shared.forget([r.id for r in requests])


@pytest.mark.long
def test_where_the_same_requests_come_again_their_new_tokens_are_enough(
    masks: GrammarMasks, tokenizer: LLTokenizer
) -> None:
    requests = [request(grammar) for grammar in GRAMMARS]
    outputs: list[list[int]] = [[] for _ in requests]

    def go(count: int, number: int) -> None:
        for _ in range(count):
            found = step(masks, *zip(requests[:number], outputs[:number], strict=True))
            for one, output, allowed in zip(requests, outputs, found, strict=False):
                assert allowed == expected(tokenizer, one.params.grammar, output)
                output.append(allowed[-1])

    go(4, len(requests))
    assert masks.counts.short == 3
    go(3, len(requests) - 1)  # one less: the first question is another
    assert masks.counts.short == 3 + 2
    masks.forget([requests[-1].id])
    go(2, len(requests) - 1)  # the worker is told to forget it as well
    assert masks.counts.short == 5 + 1
    # What goes wrong on a short question goes wrong alone, and the next one is whole again.
    *_, wrong = step(
        masks,
        *zip(requests[:1], outputs[:1], strict=True),
        (second := request(GRAMMARS[2]), []),
    )
    assert not isinstance(wrong, str)
    outputs[0].append(step_token := expected(tokenizer, GRAMMARS[0], outputs[0])[-1])
    found, wrong = step(masks, (requests[0], outputs[0]), (second, [EOS]))
    assert masks.counts.short == 6 + 1
    assert step_token in outputs[0]
    assert found == expected(tokenizer, GRAMMARS[0], outputs[0])
    assert isinstance(wrong, str)
    outputs[0].append(found[-1])
    assert step(masks, (requests[0], outputs[0])) == [expected(tokenizer, GRAMMARS[0], outputs[0])]
    assert masks.counts.short == 7


@pytest.mark.long
@pytest.mark.parametrize("grammar", HOSTILE)
def test_a_grammar_that_overruns_fails_alone_and_the_others_go_on(
    masks: GrammarMasks, tokenizer: LLTokenizer, grammar: Grammar
) -> None:
    honest = [request(g) for g in GRAMMARS]
    outputs: list[list[int]] = [[] for _ in honest]
    for _ in range(3):
        for output, allowed in zip(
            outputs, step(masks, *zip(honest, outputs, strict=True)), strict=True
        ):
            output.append(allowed[-1])
    *found, bad = step(masks, *zip(honest, outputs, strict=True), (request(grammar), []))
    assert bad == KILLED
    for one, output, allowed in zip(honest, outputs, found, strict=True):
        assert allowed == expected(tokenizer, one.params.grammar, output)
    assert (masks.counts.workers, masks.counts.lost, masks.counts.failed) == (2, 1, 1)
    assert masks.counts.replayed == 3 * len(honest)


@pytest.mark.long
def test_a_grammar_that_cannot_be_followed_fails_alone_and_costs_no_worker(
    masks: GrammarMasks, tokenizer: LLTokenizer
) -> None:
    honest = request(GRAMMARS[0])
    bad = [request(g) for g in REFUSED]
    found, *refused = step(masks, (honest, []), *((r, []) for r in bad))
    assert found == expected(tokenizer, GRAMMARS[0], [])
    assert all(str(r).startswith("the grammar cannot be followed: ") for r in refused)
    # Nor does one that goes wrong on the way, as where a token comes that it does not allow.
    found, wrong = step(masks, (honest, []), (request(GRAMMARS[2]), [EOS]))
    assert found == expected(tokenizer, GRAMMARS[0], [])
    assert isinstance(wrong, str)
    assert (masks.counts.workers, masks.counts.lost) == (1, 0)


@pytest.mark.long
def test_behind_the_end_of_a_grammar_only_the_end_is_allowed(masks: GrammarMasks) -> None:
    one = request(Grammar(GrammarKind.REGEX, "a"))
    (allowed,) = step(masks, (one, []))
    (end,) = step(masks, (one, allowed))
    assert end == [EOS]
    assert step(masks, (one, [*allowed, EOS])) == [[EOS]]
    assert step(masks, (one, [*allowed, EOS, 17])) == [[EOS]]


@pytest.mark.long
def test_an_id_that_returns_with_another_grammar_begins_anew(
    masks: GrammarMasks, tokenizer: LLTokenizer
) -> None:
    first, second = request(GRAMMARS[0]), request(GRAMMARS[2])
    step(masks, (first, []))
    again = Request(first.id, (1,), second.params)
    assert step(masks, (again, [])) == [expected(tokenizer, GRAMMARS[2], [])]


@pytest.mark.long
def test_a_padded_vocabulary_allows_none_of_its_padding(tokenizer: LLTokenizer) -> None:
    masks = GrammarMasks(Vocabulary(FILE, V + 1000, (EOS,)))
    one = request(Grammar(GrammarKind.REGEX, "(.|\n)*"))
    masks.begin([MaskWanted(one, [])])
    bits = np.unpackbits(masks.take().allowed[one.id], bitorder="little")
    masks.close()
    assert len(bits) >= V + 1000
    assert bits[:V].sum() == len(expected(tokenizer, one.params.grammar, []))
    assert not bits[V:].any()


def test_without_a_tokenizer_no_grammar_can_be_followed() -> None:
    (failed,) = step(GrammarMasks(), (request(GRAMMARS[0]), []))
    assert "no tokenizer" in str(failed)


def test_who_fails_for_want_of_a_worker_is_told_apart() -> None:
    """It is nobody's grammar that is wrong."""
    masks, one = GrammarMasks(), request(GRAMMARS[0])
    masks.begin([MaskWanted(one, [])])
    result = masks.take()
    assert result.unserved == result.failed.keys() == {one.id}


@pytest.mark.long
def test_a_file_that_is_no_tokenizer_fails_those_who_need_it(tmp_path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text('{"nothing": 1}')
    masks = GrammarMasks(Vocabulary(file, V, (EOS,)))
    (failed,) = step(masks, (request(GRAMMARS[0]), []))
    masks.close()
    assert "no grammar can be followed now" in str(failed)
