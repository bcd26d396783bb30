"""Where weights lie: whole or absent, one copy for all who use it, and gone when nobody does."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from moeserve.errors import ConfigError, DeadlineError
from moeserve.pools.weights import folders
from moeserve.pools.weights.folders import WeightFolder, WeightFolders
from moeserve.pools.weights.manifest import Manifest, WeightFile

MODEL = Manifest("a" * 64, "small", "/nowhere", (WeightFile("config.json", 10),))


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary weights lie."""
    monkeypatch.setattr(folders, "_MEMORY", tmp_path)
    return tmp_path / f"moeserve-weights-{os.getuid()}"


async def arrive(root: Path | None) -> WeightFolder:
    async with WeightFolders(root).fetching(MODEL.id, 0.3) as folder:
        if not folder.is_whole:
            folder.begin(MODEL)
            folder.finish()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_temporary_one_is_there_while_somebody_uses_it(memory: Path) -> None:
    first, second = asyncio.run(arrive(None)), asyncio.run(arrive(None))
    assert first.path == second.path == memory / MODEL.id
    first.close()
    WeightFolders(None).sweep()
    assert names(second.path) == ["config.json"]
    second.close()
    assert names(memory) == []


def test_one_that_was_given_is_kept(tmp_path: Path) -> None:
    folder = asyncio.run(arrive(tmp_path / "x" / "y"))
    folder.close()
    WeightFolders(tmp_path / "x" / "y").sweep()
    assert folder.is_whole


def test_what_a_killed_process_left_is_removed_by_the_next(memory: Path) -> None:
    folder = asyncio.run(arrive(None))
    os.close(folder.lock)  # as the kernel does for a process that is killed
    (memory / f"{'b' * 64}.part").mkdir()
    (memory / f"{'b' * 64}.lock").touch()
    WeightFolders(None).sweep()
    assert names(memory) == []


def test_half_of_one_is_never_there(tmp_path: Path) -> None:
    async def fail() -> None:
        async with WeightFolders(tmp_path).fetching(MODEL.id, 1.0) as folder:
            folder.begin(MODEL)
            raise DeadlineError("nobody sent it")

    with pytest.raises(DeadlineError, match="nobody"):
        asyncio.run(fail())
    assert not (tmp_path / MODEL.id).exists()
    folder = asyncio.run(arrive(tmp_path))
    assert names(tmp_path) == [MODEL.id, f"{MODEL.id}.lock"]
    folder.close()


def test_whoever_comes_while_another_fetches_waits_until_its_deadline(tmp_path: Path) -> None:
    async def both() -> None:
        async with WeightFolders(tmp_path).fetching(MODEL.id, 1.0) as folder:
            folder.begin(MODEL)
            with pytest.raises(DeadlineError, match="another process"):
                await arrive(tmp_path)

    asyncio.run(both())


def test_a_place_of_others_is_refused(memory: Path) -> None:
    memory.mkdir(mode=0o777)
    memory.chmod(0o777)
    with pytest.raises(ConfigError, match="--weights-folder"):
        WeightFolders(None)
    memory.rmdir()
    memory.symlink_to("/tmp")
    with pytest.raises(ConfigError):
        WeightFolders(None)


def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="weights_folder"):
        WeightFolders(tmp_path / "file" / "x")
