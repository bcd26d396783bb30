"""The package keeps its shape: import layers, purity, names, sizes, what may lie where.

The layers are read from the docstring of ``moeserve/__init__.py``, which is the law. Every test is
one rule and names all who break it. Exceptions are written here with their reason, and a rule says
so when one is no longer needed.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moeserve"
NATIVE_HALVES = ("placement", "comm", "kernels", "offload", "proto")

ROUTING = (
    "base loads predict choosing least_finish locality_free kv_local freeness crowding "
    "role_shift".split()
)
PERFORMANCE_MODEL = (
    "halving overlap machine overheads distinct locality demand residency predict workload "
    "schedule steady bound".split()
)
POLICIES = (
    "choices drafts fairness layered made ngrams prefill_choice shape speculation split swap "
    "targets throughput".split()
)
# Modules that decide (law 2) and all they may import: no tensors, clocks, files or threads.
PURE = (
    "core.py",
    "engine/executor.py",
    "engine/acceptance.py",
    "engine/scheduler.py",
    "engine/semi/scheduler.py",
    "engine/sequence.py",
    "engine/step_builder.py",
    *(f"engine/policies/{name}.py" for name in POLICIES),
    "engine/bounds.py",
    "engine/foresight.py",
    "engine/step_cost.py",
    "engine/blocks.py",
    "engine/kv_manager.py",
    "engine/preemption.py",
    "engine/swap_space.py",
    "engine/swapping.py",
    "engine/waiting.py",
    "engine/deadlines.py",
    "engine/ranks/microbatches.py",
    "engine/replan/switch.py",
    "pools/members.py",
    "pools/registry/leases.py",
    *(f"pools/cache/{name}.py" for name in "keys ledger recompute ring".split()),
    *(f"pools/routing/{name}.py" for name in ROUTING),
    *(f"offload/model/{name}.py" for name in PERFORMANCE_MODEL),
)
# Modules that decide over many ranks or slots at once, and so may import numpy beside that.
PURE_WITH_ARRAYS = (
    *(
        f"engine/ranks/{name}.py"
        for name in "fleet front homes loads prefixes rank_view records".split()
    ),
    "offload/residency.py",
    "engine/policies/past_future.py",
)
PURE_IMPORTS = frozenset(
    "__future__ abc array bisect collections collections.abc dataclasses enum functools hashlib "
    "heapq itertools json math operator re statistics struct typing "
    "moeserve.core moeserve.errors".split()
).union("moeserve." + name.removesuffix(".py").replace("/", ".") for name in PURE)
ARRAY_IMPORTS = frozenset(
    "numpy numpy.typing moeserve.engine.ranks.homes moeserve.engine.ranks.loads "
    "moeserve.engine.ranks.prefixes moeserve.engine.ranks.rank_view "
    "moeserve.engine.ranks.microbatches moeserve.engine.replan.switch".split()
)
# What runs where neither torch nor numpy is installed.
BARE = (
    "__init__.py",
    "errors.py",
    "host.py",
    "config/group.py",
    "config/options.py",
    "config/steps.py",
    "config/cluster.py",
    "config/commands.py",
    "config/sources.py",
    "config/reference.py",
    "config/effect.py",
    *PURE,
)

UNPICKLERS = frozenset("pickle cPickle _pickle marshal shelve dill cloudpickle joblib".split())
FORBIDDEN_CALLS = frozenset(
    "globals eval exec torch.load torch.save torch.hub.load pandas.read_pickle".split()
)

# Modules that name, by string, a module above their own layer, and which.
STARTED_FROM_BELOW: dict[tuple[str, str], str] = {}

LONGEST_MODULE = 450
LONGER_WITH_REASON: dict[str, str] = {
    "moeserve/kernels/ops.py": "one closed table, the contract of every backend: read whole",
}
LONGEST_FUNCTION = 60
MOST_PARAMETERS = 10
LARGER_WITH_REASON: dict[str, str] = {}

FOLDERS_WITH_A_MAP = tuple(
    "config comm engine forecast grammar kernels models offload placement pools gateway worker "
    "observe".split()
)
MAPS_STILL_MISSING: dict[str, str] = {}


def is_generated(path: Path) -> bool:
    return path.parent == PACKAGE / "pb" and "_pb2" in path.name


def written_by_hand(*folders: Path) -> list[Path]:
    found = (p for folder in folders for p in sorted(folder.rglob("*.py")))
    return [p for p in found if not is_generated(p)]


MODULES = written_by_hand(PACKAGE)
SHIPPED = written_by_hand(PACKAGE, ROOT / "examples", ROOT / "bench")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted_name(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parse(path)))


def none_of(offenders: Iterable[str]) -> None:
    """Fails with every offender on a line of its own."""
    found = sorted(offenders)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def still_needed(reasons: Mapping[object, str], broken: Iterable[object]) -> None:
    """Fails unless every exception has a reason and something it excuses."""
    excused = set(broken)
    none_of(f"{key}: no reason is given" for key, reason in reasons.items() if not reason)
    none_of(f"{key}: the exception is no longer needed" for key in reasons if key not in excused)


def imports_of(tree: Iterable[ast.AST], package: tuple[str, ...] = ()) -> Iterator[str]:
    """Absolute dotted names, wherever in the module the import stands."""
    for node in tree:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            if module == "moeserve":
                yield from (f"moeserve.{alias.name}" for alias in node.names)
            else:
                yield module


def imports(path: Path) -> Iterator[str]:
    return imports_of(nodes(path), path.parent.relative_to(ROOT).parts)


def imports_by_string(tree: Iterable[ast.AST]) -> set[str]:
    """Modules of ours named by a string, to be imported or run with ``-m``; loggers are not.

    A string counts where the whole of it is a dotted name, and where it is code that imports.
    """
    tree = tuple(tree)
    loggers = {
        argument
        for node in tree
        if isinstance(node, ast.Call) and dotted(node.func).endswith("getLogger")
        for argument in node.args
    }
    found: set[str] = set()
    for node in tree:
        if not isinstance(node, ast.Constant) or node in loggers:
            continue
        if not isinstance(node.value, str) or "moeserve" not in node.value:
            continue
        if re.fullmatch(r"moeserve(\.\w+)+(:\w+)?", node.value):
            found.add(node.value.partition(":")[0])
        elif "import" in node.value:
            try:
                code = ast.parse(node.value)
            except SyntaxError:
                continue  # a sentence, not code
            found.update(n for n in imports_of(ast.walk(code)) if n.startswith("moeserve."))
    return found


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@functools.cache
def layers() -> Mapping[str, int]:
    """Which layer each part of the package belongs to, 0 the lowest."""
    diagram = ast.get_docstring(parse(PACKAGE / "__init__.py")) or ""
    rows = re.findall(r"^    (\w+(?: {1,2}\w+)*)(?:\s{3,}.*)?$", diagram, re.MULTILINE)
    return {part: height for height, row in enumerate(rows) for part in row.split()}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parts_of(names: Iterable[str]) -> set[str]:
    split = (name.split(".") for name in names)
    return {name[1] for name in split if name[0] == "moeserve" and len(name) > 1}


def parts_imported(path: Path) -> set[str]:
    return parts_of(imports(path))


def above(part: str, others: Iterable[str]) -> set[str]:
    """Those of ``others`` that lie in a layer above ``part``."""
    drawn = layers()
    return {other for other in others if other in drawn and drawn[other] > drawn[part]}


def test_the_docstring_draws_the_layers() -> None:
    drawn = layers()
    assert drawn["core"] == drawn["errors"] == drawn["config"] == 0
    assert drawn["kernels"] < drawn["models"] < drawn["engine"] < drawn["gateway"] < drawn["cli"]


def test_every_module_belongs_to_a_layer_and_imports_only_downwards() -> None:
    offenders = []
    for path in MODULES:
        part = part_of(path)
        if part == "__init__":
            offenders += [f"{name_of(path)} imports {name}" for name in parts_imported(path)]
        elif part not in layers():
            offenders.append(f"{name_of(path)}: moeserve/__init__.py draws no layer for {part!r}")
        elif upwards := above(part, parts_imported(path)):
            offenders.append(f"{name_of(path)} imports {sorted(upwards)}, which lie above {part!r}")
    none_of(offenders)


def test_no_module_is_started_or_imported_by_name_from_a_layer_below() -> None:
    found = {
        (name_of(path), part)
        for path in MODULES
        for part in above(part_of(path), parts_of(imports_by_string(nodes(path))))
    }
    none_of(
        f"{module} names a module of {part!r}, which lies above it"
        for module, part in found - STARTED_FROM_BELOW.keys()
    )
    still_needed(STARTED_FROM_BELOW, found)


def test_imports_by_string_are_seen_and_loggers_are_not() -> None:
    code = """
    import importlib, logging, sys
    log = logging.getLogger("moeserve.engine")
    command = [sys.executable, "-m", "moeserve.cli", "place"]
    module = importlib.import_module("moeserve.placement._search")
    script = "import moeserve.testbed.ranks; moeserve.testbed.ranks.main()"
    entry = "moeserve.worker.run:main"
    message = "nothing is imported by moeserve.gateway here"
    """
    tree = ast.walk(ast.parse("\n".join(line.strip() for line in code.splitlines())))
    assert imports_by_string(tree) == {
        "moeserve.cli",
        "moeserve.placement._search",
        "moeserve.testbed.ranks",
        "moeserve.worker.run",
    }


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


def test_models_know_no_ranks() -> None:
    """A decoder runs its layers through a ``LayerRunner``, whatever that does with them."""
    none_of(
        f"{name_of(path)} imports comm"
        for path in MODULES
        if part_of(path) == "models" and "comm" in parts_imported(path)
    )


def test_the_lowest_modules_import_nothing_of_ours() -> None:
    lowest = (PACKAGE / "core.py", PACKAGE / "errors.py")
    none_of(f"{name_of(p)} imports {part}" for p in lowest for part in parts_imported(p))


def test_decisions_import_no_tensors_clocks_or_files() -> None:
    none_of(
        f"moeserve/{name} imports {found}"
        for names, allowed in (
            (PURE, PURE_IMPORTS),
            (PURE_WITH_ARRAYS, PURE_IMPORTS | ARRAY_IMPORTS),
        )
        for name in names
        for found in set(imports(PACKAGE / name)) - allowed
    )


def import_without(absent: str, *modules: str) -> None:
    """Imports each module in an interpreter without ``absent``, as if it were the first of ours."""
    script = f"""
import importlib, sys
for name in {absent.split()}:
    sys.modules[name] = None
for module in {modules}:
    try:
        importlib.import_module(module)
    except ImportError as error:
        error.add_note(f"while importing {{module}}")
        raise
    for ours in [name for name in sys.modules if name.partition(".")[0] == "moeserve"]:
        del sys.modules[ours]
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_decision_modules_run_where_tensors_are_absent() -> None:
    import_without("torch numpy", *(dotted_name(PACKAGE / name) for name in BARE))


def test_the_planner_and_the_command_line_start_without_torch() -> None:
    planner = [dotted_name(p) for p in MODULES if part_of(p) == "placement"]
    import_without("torch", "moeserve.cli", "moeserve.doctor", *planner)


def test_a_native_half_holds_no_python() -> None:
    none_of(name_of(p) for folder in NATIVE_HALVES for p in (ROOT / folder).rglob("*.py"))


def test_no_folder_of_tests_is_a_package() -> None:
    none_of(name_of(p) for p in (ROOT / "tests").rglob("__init__.py"))


def test_every_module_says_what_it_is_for() -> None:
    none_of(f"{name_of(p)} has no docstring" for p in MODULES if not ast.get_docstring(parse(p)))


def mapped_folders() -> list[Path]:
    """The folders whose docstring is a map, with every folder of Python inside them."""
    tops = [PACKAGE / name for name in FOLDERS_WITH_A_MAP]
    return [p.parent for top in tops for p in sorted(top.rglob("__init__.py"))]


def missing_from_map(folder: Path) -> list[str]:
    """Modules and folders of ``folder`` that its docstring does not name."""
    text = ast.get_docstring(parse(folder / "__init__.py")) or ""
    words = set(re.findall(r"\w+", text))
    modules = {p.stem for p in folder.glob("*.py")} - {"__init__", "__main__"}
    folders = {p.parent.name for p in folder.glob("*/__init__.py")}
    return sorted((modules | folders) - words)


def test_the_docstring_of_a_folder_is_its_map() -> None:
    missing = {name_of(f): missing_from_map(f) for f in mapped_folders()}
    none_of(
        f"{folder}/__init__.py does not name {names}"
        for folder, names in missing.items()
        if names and folder not in MAPS_STILL_MISSING
    )
    still_needed(MAPS_STILL_MISSING, [folder for folder, names in missing.items() if names])


def test_nothing_unpickles_or_runs_code_from_data() -> None:
    offenders: list[str] = []
    for path in SHIPPED:
        calls = [node for node in nodes(path) if isinstance(node, ast.Call)]
        keywords = {f"{k.arg}={ast.unparse(k.value)}" for call in calls for k in call.keywords}
        found = UNPICKLERS & {name.split(".")[0] for name in imports(path)}
        found |= FORBIDDEN_CALLS & {dotted(call.func) for call in calls}
        found |= {"allow_pickle=True", "trust_remote_code=True"} & keywords
        offenders += [f"{name_of(path)}: {what}" for what in found]
    none_of(offenders)


def test_no_global_is_rebound_and_no_exception_swallowed_whole() -> None:
    offenders: list[str] = []
    for path in SHIPPED:
        for node in nodes(path):
            if isinstance(node, ast.Global):
                offenders.append(f"{name_of(path)}:{node.lineno}: global")
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                offenders.append(f"{name_of(path)}:{node.lineno}: bare except")
    none_of(offenders)


def test_every_module_is_named_for_its_idea_and_stays_short() -> None:
    vague = {"utils", "util", "helpers", "common", "misc"}
    none_of(f"{name_of(p)}: a name that says nothing" for p in SHIPPED if p.stem in vague)
    lines = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in SHIPPED}
    long = {name: n for name, n in lines.items() if n > LONGEST_MODULE}
    none_of(f"{name}: {n} lines" for name, n in long.items() if name not in LONGER_WITH_REASON)
    still_needed(LONGER_WITH_REASON, long)


def test_no_two_public_classes_have_one_name() -> None:
    where: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(f"{name_of(path)}:{node.lineno}")
    none_of(f"{name}: {', '.join(places)}" for name, places in where.items() if len(places) > 1)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """``(module:Class.name, function)`` of every one, also nested, overloaded or abstract."""

    def within(node: ast.AST, outer: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{outer}.{child.name}" if outer else child.name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name_of(path)}:{name}", child
            yield from within(child, name)

    return within(parse(path), "")


def is_argument_parser(function: Function) -> bool:
    """A list of ``add_argument`` is read from top to bottom, however long."""
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    return any(isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument" for c in calls)


def is_kernel(function: Function) -> bool:
    """Of Triton: its parameters are what a launch takes, pointers and numbers one by one."""
    return any("triton.jit" in ast.unparse(d) for d in function.decorator_list)


def parameters(function: Function) -> int:
    """How many a caller can give: neither ``self`` nor ``cls``; ``*args`` and ``**kw`` are one."""
    given = function.args
    named = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    bound = bool(named) and named[0] in ("self", "cls")
    return len(named) - bound + (given.vararg is not None) + (given.kwarg is not None)


def size_faults(function: Function) -> str:
    """What of a function is too large; empty where nothing is."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    faults = []
    if lines > LONGEST_FUNCTION and not is_argument_parser(function):
        faults.append(f"{lines} lines, at most {LONGEST_FUNCTION}")
    if parameters(function) > MOST_PARAMETERS and not is_kernel(function):
        faults.append(f"{parameters(function)} parameters, at most {MOST_PARAMETERS}")
    return "; ".join(faults)


def test_functions_stay_short_and_take_few_parameters() -> None:
    sizes = {name: size_faults(f) for path in SHIPPED for name, f in functions(path)}
    large = {name: faults for name, faults in sizes.items() if faults}
    none_of(f"{name}: {what}" for name, what in large.items() if name not in LARGER_WITH_REASON)
    still_needed(LARGER_WITH_REASON, large)
