"""A new plan while serving: how ranks that prepare at their own pace switch before the same step.

Layers do not depend on each other, so every mixture of the old plan and the new one is a plan too,
and they change one after the other. Each change of a layer has a number, its turn; turns count up.

1. Rank 0 asks every rank to prepare a turn, beside its steps.
2. The record that a rank posts for a step names the turn that it has prepared (``promise``). From
   then on it keeps what it prepared until the records of all ranks are there, though it be told
   meanwhile to drop it.
3. Every rank gets all records of the step. Where all name the same turn (``agreed_turn``), every
   rank switches before that step (``settle``); else none does, and the promise lapses.

All ranks decide the same, for they decide from the same records. And rank 0 knows from its own part
alone what became of a turn: one that is dropped there is named by no later record of rank 0, so no
rank will ever switch it.

That all records name the *same* turn matters. The least of them would not do: where rank 1 has been
told to drop turn 4 and has prepared turn 5, and rank 2 still promises turn 4, the least is 4, and
rank 2 alone would switch.

Pure. Messages may come late and in any order. Letters: S slots of a layer on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeserve.errors import InternalError, PlacementError

# The experts in the slots of each layer, by model layer number.
Rows = Mapping[int, tuple[int, ...]]


def layers_to_change(held: Rows, wanted: Rows) -> list[tuple[int, tuple[int, ...]]]:
    """The layers that differ, with what their slots are to hold, in order of layers.

    PlacementError where ranks that hold ``held`` cannot change to ``wanted``: slots and experts of
    every layer must stay as many and the same.
    """
    if wanted.keys() != held.keys():
        raise PlacementError(
            f"the new plan is for layers {sorted(wanted)}, the model's are {sorted(held)}"
        )
    for layer, expert_S in wanted.items():
        check_row(layer, held[layer], expert_S)
    return [(layer, wanted[layer]) for layer in sorted(wanted) if wanted[layer] != held[layer]]


def check_row(layer: int, held_S: tuple[int, ...], wanted_S: tuple[int, ...]) -> None:
    """PlacementError where a layer cannot change from ``held_S`` to ``wanted_S``."""
    if len(wanted_S) != len(held_S):
        raise PlacementError(
            f"layer {layer}: the new plan has {len(wanted_S)} slots, and ranks were "
            f"started with {len(held_S)}: solve with --slots {len(held_S)}, or start again"
        )
    if set(wanted_S) != set(held_S):
        missing = sorted(set(held_S) ^ set(wanted_S))
        raise PlacementError(f"layer {layer}: experts {missing} are in one plan only")


def agreed_turn(least: int, most: int) -> int:
    """The turn to switch before this step, or 0: ``least`` and ``most`` of what the records of all
    ranks name."""
    return least if least == most else 0


class RankTurns:
    """One rank's part in the agreement. Turns are from 1 on; 0 stands for none.

    ``wanted`` is the turn that the rank is to prepare or has prepared, ``prepared`` the one that it
    holds ready, ``switched`` the last one that it took into use.
    """

    def __init__(self) -> None:
        self.wanted = 0
        self.prepared = 0
        self.switched = 0
        self._begun = 0  # the newest turn that was asked for
        self._abandoned = 0  # turns up to this one are not to be prepared any more
        self._promised: int | None = None  # None: no record is under way

    def begin(self, turn: int) -> bool:
        """To prepare ``turn`` from now on, instead of any before it; False where that is over.

        One that is promised stays prepared until it is settled: only then there is room.
        """
        if turn <= max(self._begun, self._abandoned):
            return False
        self.abandon(turn - 1)
        self._begun = self.wanted = turn
        return True

    @property
    def room(self) -> bool:
        """Whether the wanted turn may be prepared: one at a time is held."""
        return self.wanted != 0 and self.prepared == 0

    def finish(self, turn: int) -> bool:
        """``turn`` is prepared; False where it is not wanted any more, and is to be dropped."""
        if turn != self.wanted:
            return False
        assert self.prepared == 0, (turn, self.prepared)
        self.prepared = turn
        return True

    def abandon(self, turn: int) -> None:
        """Drop the turns up to this one; one that is promised, when it is settled."""
        self._abandoned = max(self._abandoned, turn)
        if self.wanted <= self._abandoned:
            self.wanted = 0
        if self.prepared <= self._abandoned and self.prepared != self._promised:
            self.prepared = 0

    def promise(self) -> int:
        """When the record of a step is made: what it is to name."""
        if self._promised is not None:
            raise InternalError("a record of a step was made before the last one was settled")
        self._promised = self.prepared
        return self.prepared

    def settle(self, agreed: int) -> bool:
        """When the records of all ranks are there, with ``agreed_turn`` of them: whether to take
        into use what is prepared."""
        promised, self._promised = self._promised, None
        if promised is None:
            raise InternalError("a step was settled without a record of this rank")
        if agreed and agreed != promised:
            raise InternalError(f"this rank named turn {promised}, and all agree on {agreed}")
        if agreed:
            assert self.prepared == agreed, (self.prepared, agreed)
            self.prepared, self.switched = 0, agreed
            self.wanted = 0 if self.wanted == agreed else self.wanted
            return True
        if self.prepared <= self._abandoned:
            self.prepared = 0
        return False

    def is_open(self, turn: int) -> bool:
        """Whether ``turn`` may yet be switched."""
        return turn != 0 and turn in (self.wanted, self.prepared)
