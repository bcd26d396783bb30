"""Where the answers of a batch go, and what of its input is answered already."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from moeserve.errors import ConfigError
from moeserve.gateway.batch.answers import AnswerFile
from moeserve.gateway.batch.lines import read_lines


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where answers go; ``errors`` takes the failed ones, and may be the same file."""

    answers: AnswerFile
    errors: AnswerFile

    @property
    def found(self) -> Set[bytes]:
        """The digests of all lines that were answered before."""
        return self.answers.found.digests | self.errors.found.digests

    @property
    def failed_before(self) -> int:
        files = {id(file): file for file in (self.answers, self.errors)}
        return sum(file.found.failed for file in files.values())

    def sync_if_due(self) -> None:
        self.answers.sync_if_due()
        self.errors.sync_if_due()


def count_lines(path: Path, found: Set[bytes]) -> int:
    """How many lines there are. ConfigError where an answer that was ``found`` is to none of them:
    the input is another one, or was changed."""
    missing, total = set(found), 0
    for line in read_lines(path):
        total += 1
        if missing:
            missing.discard(line.digest)
            missing.discard(line.own_digest)
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} of the {len(found)} answers in the output are to lines that "
            f"it does not have, batch_req_{min(missing).hex()} first: it was changed, or is "
            "another batch; give another output, or take those answers out of it"
        )
    return total
