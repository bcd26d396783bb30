"""The house keeps its shape: import layers, purity, what may lie where.

The layers are read from the docstring of ``moeserve/__init__.py``, which is the law.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moeserve"
NATIVE_HALVES = ("placement", "comm", "kernels", "proto")

# Modules that decide (law 2) and all they may import: no tensors, clocks, files or threads.
PURE = (
    "core.py",
    "engine/scheduler.py",
    "engine/sequence.py",
    "engine/step_builder.py",
    "engine/blocks.py",
    "engine/ranks/fleet.py",
    "engine/ranks/homes.py",
    "engine/ranks/microbatches.py",
    "engine/replan/switch.py",
)
PURE_IMPORTS = frozenset(
    "__future__ abc array bisect collections collections.abc dataclasses enum functools hashlib "
    "heapq itertools math operator struct typing "
    "moeserve.core moeserve.errors moeserve.engine.blocks moeserve.engine.sequence "
    "moeserve.engine.step_builder moeserve.engine.scheduler moeserve.engine.ranks.fleet".split()
)
BARE = (
    "moeserve",
    "moeserve.core",
    "moeserve.errors",
    "moeserve.config",
    "moeserve.host",
    "moeserve.engine.blocks",
    "moeserve.engine.scheduler",
    "moeserve.engine.ranks.fleet",
    "moeserve.engine.ranks.homes",
    "moeserve.engine.ranks.microbatches",
    "moeserve.engine.replan.switch",
)

UNPICKLERS = frozenset("pickle cPickle _pickle marshal shelve dill cloudpickle joblib".split())
FORBIDDEN_CALLS = frozenset(
    "globals eval exec torch.load torch.save torch.hub.load pandas.read_pickle".split()
)

LONGEST_MODULE = 450
LONGER_WITH_REASON: dict[str, str] = {
    "moeserve/kernels/ops.py": "one closed table, the contract of every backend: read whole",
}


def is_generated(path: Path) -> bool:
    return path.parent == PACKAGE / "pb" and "_pb2" in path.name


def written_by_hand(*folders: Path) -> list[Path]:
    found = (p for folder in folders for p in sorted(folder.rglob("*.py")))
    return [p for p in found if not is_generated(p)]


MODULES = written_by_hand(PACKAGE)
SHIPPED = written_by_hand(PACKAGE, ROOT / "examples", ROOT / "bench")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)
each_shipped = pytest.mark.parametrize("path", SHIPPED, ids=name_of)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names, wherever in the module the import stands."""
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            if module == "moeserve":
                yield from (f"moeserve.{alias.name}" for alias in node.names)
            else:
                yield module


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def layers() -> dict[str, int]:
    """Which layer each part of the package belongs to, 0 the lowest."""
    diagram = ast.get_docstring(parse(PACKAGE / "__init__.py")) or ""
    rows = re.findall(r"^    (\w+(?: {1,2}\w+)*)(?:\s{3,}.*)?$", diagram, re.MULTILINE)
    return {part: height for height, row in enumerate(rows) for part in row.split()}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parts_imported(path: Path) -> set[str]:
    ours = (name.split(".") for name in imports(path))
    return {name[1] for name in ours if name[0] == "moeserve" and len(name) > 1}


def test_the_docstring_draws_the_layers() -> None:
    drawn = layers()
    assert drawn["core"] == drawn["errors"] == drawn["config"] == 0
    assert drawn["kernels"] < drawn["models"] < drawn["engine"] < drawn["gateway"] < drawn["cli"]


@each_module
def test_a_module_belongs_to_a_layer_and_imports_only_downwards(path: Path) -> None:
    drawn = layers()
    part = part_of(path)
    if part == "__init__":
        assert not parts_imported(path)
        return
    assert part in drawn, f"moeserve/__init__.py draws no layer for {part!r}"
    above = {other for other in parts_imported(path) & drawn.keys() if drawn[other] > drawn[part]}
    assert not above, f"{name_of(path)} imports {sorted(above)}, which lie above {part!r}"


def test_parts_of_one_layer_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        part = part_of(path)
        graph.setdefault(part, set()).update((parts_imported(path) & layers().keys()) - {part})
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as circle:
        pytest.fail(f"imports run in a circle: {' -> '.join(circle.args[1])}")
    assert graph.keys() <= set(order)


@pytest.mark.parametrize("name", ["core.py", "errors.py"])
def test_the_lowest_modules_import_nothing_of_ours(name: str) -> None:
    assert not parts_imported(PACKAGE / name)


@pytest.mark.parametrize("name", PURE)
def test_decisions_import_no_tensors_clocks_or_files(name: str) -> None:
    assert set(imports(PACKAGE / name)) <= PURE_IMPORTS


def import_without(absent: str, *modules: str) -> None:
    block = "".join(f"sys.modules[{name!r}] = None; " for name in absent.split())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; {block}import {', '.join(modules)}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", BARE)
def test_a_decision_module_runs_where_tensors_are_absent(module: str) -> None:
    import_without("torch numpy", module)


def test_the_planner_and_the_command_line_start_without_torch() -> None:
    planner = [p for p in MODULES if part_of(p) == "placement" and p.name != "__init__.py"]
    dotted_names = (name_of(p).removesuffix(".py").replace("/", ".") for p in planner)
    import_without("torch", "moeserve.cli", "moeserve.doctor", *dotted_names)


@pytest.mark.parametrize("folder", NATIVE_HALVES)
def test_a_native_half_holds_no_python(folder: str) -> None:
    assert not list((ROOT / folder).rglob("*.py"))


def test_no_folder_of_tests_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


@each_module
def test_a_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(parse(path)), f"{name_of(path)} has no docstring"


@each_shipped
def test_nothing_unpickles_or_runs_code_from_data(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & UNPICKLERS
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    assert not {dotted(call.func) for call in calls} & FORBIDDEN_CALLS
    keywords = {(k.arg, ast.unparse(k.value)) for call in calls for k in call.keywords}
    assert not keywords & {("allow_pickle", "True"), ("trust_remote_code", "True")}


@each_shipped
def test_no_global_is_rebound_and_no_exception_swallowed_whole(path: Path) -> None:
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Global), f"{name_of(path)}:{node.lineno}: global"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name_of(path)}:{node.lineno}: bare except"


@each_shipped
def test_a_module_is_named_for_its_idea_and_stays_short(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_MODULE or name_of(path) in LONGER_WITH_REASON, f"{lines} lines"


def test_every_exception_to_the_length_is_still_needed() -> None:
    for name, reason in LONGER_WITH_REASON.items():
        assert reason
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > LONGEST_MODULE
