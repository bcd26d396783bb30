"""A timeline is a list of trace events, complete or cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeserve.core import BudgetBy, Refusal, StepChoice, StepPlan
from moeserve.errors import ConfigError
from moeserve.observe.progress import Progress
from moeserve.observe.timeline import Timeline


def test_what_a_rank_does_becomes_events_on_the_track_of_its_microbatch(tmp_path: Path) -> None:
    with Progress(Timeline(tmp_path / "trace", 3)) as progress:
        progress.at(5, 1)
        progress.begin("attention")
        assert str(progress) == "attention in layer 5, microbatch 1"
        progress.begin("dispatch")
        progress.pause()
        progress.at(5, 0)
        progress.begin("experts")
        progress.rest()
        assert str(progress) == "between steps"
    named, _, *events = json.loads((tmp_path / "trace" / "rank-3.json").read_text())
    assert named["args"] == {"name": "rank 3"}
    assert [(e["name"], e["pid"], e["tid"], e["args"]["layer"]) for e in events] == [
        ("attention", 3, 1, 5),
        ("dispatch", 3, 1, 5),
        ("experts", 3, 0, 5),
    ]
    assert all(e["dur"] >= 0 for e in events)
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)


def test_a_step_is_drawn_with_what_is_said_of_it(tmp_path: Path) -> None:
    with Progress(Timeline(tmp_path, 0)) as progress:
        assert progress.drawn
        choice = StepChoice(3, 20, 64, BudgetBy.TPOT, refused=Refusal.BLOCKS, group=(2, 4))
        progress.on_step(StepPlan((), choice=choice), 0.25)
    _, track, step = json.loads((tmp_path / "rank-0.json").read_text())
    assert step["tid"] == track["tid"]
    assert (step["name"], step["dur"]) == ("mixed", 250_000)
    assert step["args"] == {
        "decodes": 3,
        "prefill_tokens": 20,
        "budget": 64,
        "budget_by": "tpot",
        "refused": "blocks",
        "group": [2, 4],
    }


def test_a_folder_that_cannot_be_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="ep_trace="):
        Timeline(tmp_path / "file" / "trace", 0)
