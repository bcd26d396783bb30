"""Change the code in one place at a time and see whether its tests notice: a mutation check.

    python tests/tools/mutate.py engine/scheduler.py            # modules of TESTS, or all of them
    python tests/tools/mutate.py engine/blocks.py -n 10 --json

Of all mutants of a module, ``-n`` are drawn by ``--seed`` and the module's name, so that a run
can be repeated. Each is written into a *copy* of the tree (never the checkout), where a forked
child, which has torch and pytest imported already, runs the module's tests with ``-x``. A mutant
is *noticed* when a test fails or the time is up, and *survives* when all pass; survivors are
printed with their place and difference. ``equivalent_mutants.toml`` lists those that cannot
change behaviour, with the reason; they are counted apart and not run. An entry of that list that
is no mutant of its module any more is an error.

Mutated are comparisons, arithmetic and boolean operators, ``not``, conditions (negated), numbers
(one more, one less), ``True``/``False`` and returned values (``None`` instead). Left alone are
annotations, decorators, docstrings and other strings, and ``assert``: an assertion speaks of
correct code, so nothing but a wrong program could tell that it became weaker.

Exit status: 0 when at least ``--least`` of the run mutants of every module were noticed, else 1;
2 when a module's tests fail or hang without any mutant, or the arguments make no sense.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENTS = Path(__file__).with_name("equivalent_mutants.toml")

SCHEDULER_TESTS = ("tests/engine/test_scheduler.py", "tests/engine/test_fleet.py")
KERNEL_TESTS = ("tests/kernels/test_cpu_equals_reference.py",)
# Arguments of pytest. One instruction set of the native twin is enough where all take minutes.
TESTS: dict[str, tuple[str, ...]] = {
    "engine/scheduler.py": SCHEDULER_TESTS,
    "engine/preemption.py": (*SCHEDULER_TESTS, "tests/engine/test_swapping.py"),
    "engine/swapping.py": ("tests/engine/test_swapping.py", "tests/engine/test_scheduler.py"),
    "engine/swap_space.py": ("tests/engine/test_swapping.py",),
    "engine/policies/fairness.py": ("tests/engine/test_fairness.py",),
    "engine/sequence.py": SCHEDULER_TESTS,
    "engine/step_builder.py": SCHEDULER_TESTS,
    "engine/foresight.py": ("tests/engine/test_scheduler.py",),
    "engine/input_batch.py": ("tests/engine/test_input_batch.py",),
    "engine/ranks/fleet.py": ("tests/engine/test_fleet.py", "tests/engine/test_homes.py"),
    "engine/blocks.py": ("tests/engine/test_blocks.py", "tests/engine/test_scheduler.py"),
    "kernels/reference/sampling.py": ("tests/kernels/test_sampling.py",),
    "placement/split.py": (
        "tests/placement/test_cost.py",
        "tests/placement/test_inputs.py",
        "tests/comm/test_assign.py",
    ),
    "gateway/limits.py": ("tests/gateway/test_limits.py",),
    "gateway/http/phases.py": ("tests/gateway/test_phases.py",),
    "engine/ranks/front.py": ("tests/engine/test_front.py",),
    "comm/launch/notes.py": (
        "tests/comm/test_notes.py",
        "-k",
        "bounded or store_of_torch or awaited or add_up or no_number",
    ),
    "observe/log_bound.py": ("tests/observe/test_log_bound.py",),
    "kernels/reference/kv.py": (
        "tests/kernels/test_attention.py",
        "tests/kernels/test_kv_blocks.py",
        "-k",
        "not portable",
    ),
    "kernels/reference/ops.py": (*KERNEL_TESTS, "tests/kernels/test_parts.py"),
    "kernels/reference/wire.py": ("tests/kernels/test_packing.py", "tests/kernels/test_combine.py"),
    "kernels/reference/combine.py": ("tests/kernels/test_combine.py",),
    "kernels/reference/products.py": ("tests/kernels/test_products.py", *KERNEL_TESTS),
}
# Imported once, before the children are forked. Nothing of moeserve: each child imports its own.
PRELOADED = ("torch", "numpy", "pytest", "hypothesis", "pytest_asyncio", "safetensors.torch")

COMPARISONS = {
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "==": ("!=",),
    "!=": ("==",),
    "is": ("is not",),
    "is not": ("is",),
    "in": ("not in",),
    "not in": ("in",),
}
OPERATORS = {
    "+": ("-",),
    "-": ("+",),
    "*": ("//",),
    "/": ("*",),
    "//": ("*",),
    "%": ("//",),
    "**": ("*",),
    "<<": (">>",),
    ">>": ("<<",),
    "&": ("|",),
    "|": ("&",),
    "^": ("&",),
}
FAILED, USAGE = 1, 2
LONGEST_TESTS_S = 600.0
COPIED = ("moeserve", "tests", "examples", "bench", "proto", "pyproject.toml", "README.md", "docs")


@dataclass(frozen=True, slots=True)
class Mutant:
    """``source[start:stop]`` of a module becomes ``text``; ``before``/``after`` are the lines."""

    module: str
    line: int
    where: str  # the dotted name of the function or class around it
    kind: str
    start: int
    stop: int
    text: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.module, self.where, self.before, self.after


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one mutant: noticed, timeout (noticed too), survived or equivalent."""

    mutant: Mutant
    outcome: str
    seconds: float
    detail: str  # the test that failed first, the reason of the list, or the difference


class Source:
    """A module's text, with the offsets of its syntax tree's nodes in characters."""

    def __init__(self, module: str, text: str) -> None:
        self.module, self.text = module, text
        self.lines = text.splitlines(keepends=True)
        self._starts = [0]
        for line in self.lines:
            self._starts.append(self._starts[-1] + len(line))

    def offset(self, line: int, utf8_column: int) -> int:
        before = self.lines[line - 1].encode()[:utf8_column].decode()
        return self._starts[line - 1] + len(before)

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self.offset(node.lineno, node.col_offset)

    def stop(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.offset(node.end_lineno, node.end_col_offset)

    def mutant(self, where: str, kind: str, start: int, stop: int, text: str) -> Mutant:
        """``before`` and ``after`` are the changed lines, each stripped and joined by a space."""
        line = self.text.count("\n", 0, start)
        last = self.text.count("\n", 0, max(start, stop - 1))
        begin, end = self._starts[line], self._starts[last + 1]
        changed = self.text[begin:start] + text + self.text[stop:end]
        before, after = (
            " ".join(part.strip() for part in lines.splitlines())
            for lines in (self.text[begin:end], changed)
        )
        return Mutant(self.module, line + 1, where, kind, start, stop, text, before, after)


def mutants(module: str, text: str) -> list[Mutant]:
    """All of a module, in the order of their places; each compiles."""
    source = Source(module, text)
    found = dict.fromkeys(_of_statements(source, ast.parse(text).body, ""))
    return [m for m in sorted(found, key=lambda m: (m.start, m.stop, m.text)) if _compiles(text, m)]


def apply(text: str, mutant: Mutant) -> str:
    return text[: mutant.start] + mutant.text + text[mutant.stop :]


def _compiles(text: str, mutant: Mutant) -> bool:
    try:
        ast.parse(apply(text, mutant))
    except SyntaxError:
        return False
    return True


def _of_statements(source: Source, body: list[ast.stmt], where: str) -> Iterator[Mutant]:
    for node in body:
        yield from _of_node(source, node, where)


def _of_node(source: Source, node: ast.AST, where: str) -> Iterator[Mutant]:
    if isinstance(node, ast.Assert | ast.JoinedStr):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        inner = f"{where}.{node.name}" if where else node.name
        for default in (*node.args.defaults, *(d for d in node.args.kw_defaults if d)):
            yield from _of_node(source, default, inner)
        yield from _of_statements(source, node.body, inner)
        return
    if isinstance(node, ast.ClassDef):
        yield from _of_statements(source, node.body, f"{where}.{node.name}" if where else node.name)
        return
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield from _of_node(source, node.value, where)
        return
    yield from _here(source, node, where)
    for child in ast.iter_child_nodes(node):
        yield from _of_node(source, child, where)


def _here(source: Source, node: ast.AST, where: str) -> Iterator[Mutant]:
    """The mutants of this node itself, not of its children."""
    if isinstance(node, ast.Compare):
        for left, right in zip((node.left, *node.comparators), node.comparators, strict=False):
            yield from _swap(source, where, "comparison", COMPARISONS, left, right)
    elif isinstance(node, ast.BinOp):
        yield from _swap(source, where, "operator", OPERATORS, node.left, node.right)
    elif isinstance(node, ast.BoolOp):
        swaps = {"and": ("or",), "or": ("and",)}
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield from _swap(source, where, "boolean", swaps, left, right)
    elif isinstance(node, ast.AugAssign):
        swaps = {f"{old}=": tuple(f"{n}=" for n in new) for old, new in OPERATORS.items()}
        yield from _swap(source, where, "operator", swaps, node.target, node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        start = source.start(node)
        length = len("not ") if isinstance(node.op, ast.Not) else len("-")
        kind = "not" if isinstance(node.op, ast.Not) else "operator"
        yield source.mutant(where, kind, start, start + length, "")
    elif isinstance(node, ast.Constant):
        yield from _of_constant(source, node, where)
    elif isinstance(node, ast.Return) and not _is_none(node.value):
        yield source.mutant(where, "return", source.start(node), source.stop(node), "return None")
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(
        node.test, ast.Compare | ast.BoolOp | ast.UnaryOp
    ):
        start, stop = source.start(node.test), source.stop(node.test)
        yield source.mutant(where, "not", start, stop, f"(not {source.text[start:stop]})")


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _of_constant(source: Source, node: ast.Constant, where: str) -> Iterator[Mutant]:
    start, stop = source.start(node), source.stop(node)
    if isinstance(node.value, bool):
        yield source.mutant(where, "constant", start, stop, str(not node.value))
    elif isinstance(node.value, int | float):
        for other in (node.value + 1, node.value - 1):
            text = f"({other})" if other < 0 else str(other)
            yield source.mutant(where, "constant", start, stop, text)


def _swap(
    source: Source,
    where: str,
    kind: str,
    swaps: dict[str, tuple[str, ...]],
    left: ast.expr,
    right: ast.expr,
) -> Iterator[Mutant]:
    """Replace the operator that stands between two operands by each that ``swaps`` has for it."""
    begin, end = source.stop(left), source.start(right)
    between = re.sub(r"#.*", lambda m: " " * len(m.group()), source.text[begin:end])
    match = re.search(r"not\s+in\b|is\s+not\b|[a-z]+|[^\s()\\]+", between)
    assert match is not None, source.text[begin:end]
    for new in swaps.get(re.sub(r"\s+", " ", match.group()), ()):
        yield source.mutant(where, kind, begin + match.start(), begin + match.end(), new)


def equivalents() -> dict[tuple[str, str, str, str], str]:
    """``{(module, where, before, after): reason}`` of the list beside this script."""
    listed = tomllib.loads(EQUIVALENTS.read_text(encoding="utf-8")).get("mutant", [])
    fields = ("module", "where", "before", "after")
    return {tuple(entry[f] for f in fields): entry["reason"] for entry in listed}  # type: ignore[misc]


def _copy(source: Path, target: Path) -> None:
    """With the compiled modules, which are valid there too: times of files are kept."""
    ignored = shutil.ignore_patterns(".venv", "results")
    if source.is_dir():
        shutil.copytree(source, target, ignore=ignored)
    elif source.exists():
        shutil.copy2(source, target)


def _copy_native(tree: Path) -> None:
    """The compiled modules of an editable installation, which lie outside the checkout."""
    installed = Path(sysconfig.get_path("purelib"))
    for native in (installed / "moeserve").rglob("*.so"):
        shutil.copy2(native, tree / native.relative_to(installed))


@dataclass(slots=True)
class Child:
    """A forked child that runs the tests of one mutant in its own copy of the tree."""

    pid: int
    tree: Path
    log: Path
    started: float

    def poll(self, limit_s: float) -> tuple[str, float, str] | None:
        """(outcome, seconds, first failure), or None while it runs; killed when it is late."""
        seconds = time.monotonic() - self.started
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if not done and seconds < limit_s:
            return None
        _kill_group(self.pid)  # also what a failing test left behind
        if not done:
            os.waitpid(self.pid, 0)
            return "timeout", seconds, f"not done after {limit_s:.0f} s"
        if status == 0:
            return "survived", seconds, ""
        said = self.log.read_text(encoding="utf-8", errors="replace")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return "noticed", seconds, failed.group(1) if failed else f"status {status}: {said[-2000:]}"


class Runner:
    """Owns ``jobs`` copies of the tree and runs tests in forked children, one to a copy."""

    def __init__(self, parent: Path, jobs: int) -> None:
        self._trees = [parent / f"tree{i}" for i in range(jobs)]
        for tree in self._trees:
            tree.mkdir()
            for name in COPIED:
                _copy(ROOT / name, tree / name)
            _copy_native(tree)

    def run(self, module: str, texts: list[str], limit_s: float) -> list[tuple[str, float, str]]:
        """(outcome, seconds, first failure) of the module's tests with each of the texts."""
        results: dict[int, tuple[str, float, str]] = {}
        running: dict[int, Child] = {}
        waiting = list(range(len(texts)))
        free = list(self._trees)
        for tree in self._trees:
            _forget_compiled(tree / "moeserve" / module)
        try:
            while waiting or running:
                while waiting and free:
                    number, tree = waiting.pop(0), free.pop()
                    (tree / "moeserve" / module).write_text(texts[number], encoding="utf-8")
                    running[number] = _start(tree, TESTS[module])
                for number, child in list(running.items()):
                    if (result := child.poll(limit_s)) is not None:
                        results[number] = result
                        free.append(running.pop(number).tree)
                time.sleep(0.02)
        finally:
            for child in running.values():
                _kill_group(child.pid)
            for tree in self._trees:
                shutil.copyfile(ROOT / "moeserve" / module, tree / "moeserve" / module)
        return [results[number] for number in range(len(texts))]


def _forget_compiled(module: Path) -> None:
    for compiled in (module.parent / "__pycache__").glob(f"{module.stem}.*.pyc"):
        compiled.unlink()


def _start(tree: Path, tests: tuple[str, ...]) -> Child:
    log = tree.with_suffix(".log")
    log.write_text("", encoding="utf-8")
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = _run_pytest(tree, tests, log)
        finally:  # a child of fork must never return into its parent's code
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
    return Child(pid, tree, log, time.monotonic())


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _run_pytest(tree: Path, tests: tuple[str, ...], log: Path) -> int:
    os.setsid()
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.chdir(tree)
    # No compiled module may outlive its source: two mutants of one size within one second.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    sys.path.insert(0, str(tree))
    # An editable installation has a finder of its own, which would lead to the checkout.
    sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, "known_source_files")]
    assert "moeserve" not in sys.modules
    import pytest

    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are preloaded
    status = int(pytest.main([*options, *tests]))
    sys.stdout.flush()
    home = Path(sys.modules["moeserve"].__file__ or "").parents[1] if status != 4 else tree
    assert home == tree, f"the tests imported moeserve from {home}"
    return status


def check(module: str, count: int, seed: int, runner: Runner) -> list[Verdict]:
    """Draw mutants of a module and run them; ValueError when its tests fail without any."""
    text = (ROOT / "moeserve" / module).read_text(encoding="utf-8")
    known = equivalents()
    all_mutants = mutants(module, text)
    stale = {key for key in known if key[0] == module} - {m.key for m in all_mutants}
    if stale:
        raise ValueError(f"{EQUIVALENTS.name}: no mutant of {module}: {sorted(stale)}")
    [(outcome, base_s, detail)] = runner.run(module, [text], LONGEST_TESTS_S)
    if outcome != "survived":
        raise ValueError(f"{module}: its tests fail as it is: {outcome} {detail}")
    drawn = random.Random(f"{seed}:{module}").sample(all_mutants, min(count, len(all_mutants)))
    drawn.sort(key=lambda m: (m.start, m.text))
    verdicts = [Verdict(m, "equivalent", 0.0, known[m.key]) for m in drawn if m.key in known]
    rest = [m for m in drawn if m.key not in known]
    texts = [apply(text, m) for m in rest]
    results = runner.run(module, texts, 10.0 + 4.0 * base_s)
    for mutant, mutated, (outcome, seconds, detail) in zip(rest, texts, results, strict=True):
        told = detail or _difference(module, text, mutated)
        verdicts.append(Verdict(mutant, outcome, seconds, told))
    return verdicts


def _difference(module: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), module, module, lineterm="", n=1
    )
    return "\n".join(list(lines)[2:])


def summary(module: str, verdicts: list[Verdict]) -> dict[str, object]:
    counts = {o: sum(v.outcome == o for v in verdicts) for o in OUTCOMES}
    judged = len(verdicts) - counts["equivalent"]
    noticed = counts["noticed"] + counts["timeout"]
    return {"module": module, **counts, "share": noticed / judged if judged else 1.0}


OUTCOMES = ("noticed", "timeout", "survived", "equivalent")


def report(module: str, verdicts: list[Verdict]) -> str:
    lines = []
    for v in verdicts:
        if v.outcome == "survived":
            place = f"moeserve/{module}:{v.mutant.line}"
            lines.append(f"survived: {place} ({v.mutant.kind}) in {v.mutant.where or 'the module'}")
            lines += [f"    {line}" for line in v.detail.splitlines()]
    counts = summary(module, verdicts)
    told = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES)
    seconds = sum(v.seconds for v in verdicts)
    lines.append(f"{module}: {counts['share']:.0%} noticed ({told}; {seconds:.0f} s of tests)")
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=f"modules: {' '.join(TESTS)}",
    )
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="its path under moeserve/, or how that ends"
    )
    parser.add_argument("-n", "--count", type=int, default=40, help="mutants a module (40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="children at a time (2)")
    parser.add_argument("--least", type=float, default=0.9, help="share to notice (0.9)")
    parser.add_argument("--json", action="store_true", help="verdicts as JSON, nothing else")
    parser.add_argument("--list", action="store_true", help="list all mutants, run none")
    options = parser.parse_args(argv)
    options.modules = [known_module(parser, name) for name in options.modules]
    return options


def known_module(parser: argparse.ArgumentParser, name: str) -> str:
    """``limits`` is ``gateway/limits.py``."""
    ending = f"/{name.removesuffix('.py')}.py"
    found = [module for module in TESTS if f"/{module}".endswith(ending)]
    if len(found) != 1:
        parser.error(f"{name!r}: expected one of {', '.join(TESTS)}, or how it alone ends")
    return found[0]


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    modules = options.modules or list(TESTS)
    if options.list:
        for module in modules:
            text = (ROOT / "moeserve" / module).read_text(encoding="utf-8")
            for m in mutants(module, text):
                print(f"{module}:{m.line} {m.where}: {m.before}  ->  {m.after}")
        return 0
    for name in PRELOADED:
        importlib.import_module(name)
    results = []
    with tempfile.TemporaryDirectory(prefix="moeserve-mutate-") as scratch:
        runner = Runner(Path(scratch), options.jobs)
        for module in modules:
            try:
                verdicts = check(module, options.count, options.seed, runner)
            except ValueError as error:
                print(f"mutate: {error}", file=sys.stderr)
                return USAGE
            results.append((summary(module, verdicts), [asdict(v) for v in verdicts]))
            if not options.json:
                print(report(module, verdicts), flush=True)
    if options.json:
        print(json.dumps([{**s, "verdicts": v} for s, v in results], indent=1))
    return 0 if all(s["share"] >= options.least for s, _ in results) else FAILED


if __name__ == "__main__":
    sys.exit(main())
