"""When what the next layer will need is read before it has chosen."""

from __future__ import annotations

from moeserve.offload.foresight import TRIED_EVERY, PredictionGate


def run(gate: PredictionGate, missing: int, used: int, wasted: int) -> bool:
    """A step of one layer; whether it was predicted for, and then so much was used."""
    gate.begin_step()
    predicted = gate.open
    gate.miss(missing)
    if predicted:
        gate.count(used, wasted)
    return predicted


def rested(missing: int) -> PredictionGate:
    """Since it was in vain with so many experts missing."""
    gate = PredictionGate("auto")
    while run(gate, missing, 1, 50):
        pass
    return gate


def test_what_is_mostly_in_vain_rests_and_is_tried_now_and_then() -> None:
    gate = rested(10)
    assert sum(run(gate, 10, 1, 50) for _ in range(4 * TRIED_EVERY)) == 4


def test_where_more_is_missing_than_when_it_was_in_vain_it_is_tried_at_once() -> None:
    gate = rested(10)
    assert not run(gate, 25, 0, 0)  # it is known after the step
    assert run(gate, 25, 20, 5)
    assert run(gate, 25, 20, 5), "it is worth it again"


def test_it_is_not_tried_again_and_again_where_that_is_in_vain_too() -> None:
    gate = rested(10)
    tried = [run(gate, 25, 1, 50) for _ in range(TRIED_EVERY // 2)]
    assert tried.count(True) <= 2  # one may be the one that comes now and then


def test_on_and_off_are_what_they_say() -> None:
    for mode, predicts in (("on", True), ("off", False)):
        gate = PredictionGate(mode)  # type: ignore[arg-type]
        assert all(run(gate, 50, 1, 50) is predicts for _ in range(40))
