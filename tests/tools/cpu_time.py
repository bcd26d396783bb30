"""A plugin of pytest: which files of tests take most CPU time, their processes included.

On few cores the run takes as long as what it computes, and a test that waits costs nobody anything:
so this, not how long a test took, says what to make cheaper. A process counts when its parent has
waited for it. ``PYTHONPATH=tests/tools pytest -p cpu_time``; ``make test-all`` asks for it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator

import pytest

SHOWN = 25
_KEY = "cpu seconds"


def spent() -> float:
    """CPU seconds of this process, all its threads, and its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """What a fixture of the module takes counts for the test that asked for it first."""
    item.user_properties.append((_KEY, spent()))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown":
        begun = dict(report.user_properties).get(_KEY)
        if isinstance(begun, float):
            report.user_properties = [(_KEY, spent() - begun)]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    by_file: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "teardown":
                taken = dict(report.user_properties).get(_KEY, 0.0)
                by_file[report.nodeid.split("::")[0]] += taken
    terminalreporter.section(f"CPU seconds: {sum(by_file.values()):.0f}, most of them in")
    for file, seconds in by_file.most_common(SHOWN):
        terminalreporter.write_line(f"{seconds:8.1f}  {file}")
