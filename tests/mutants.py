"""Whether the tests notice a change of what they test: `make mutants`.

cosmic-ray makes the mutants: one operator, number or comparison changed. Its own runner has one test command for all
sources and writes mutants into the checkout, so running them is here: each file of a seeded sample is judged by the
tests that concern it, in a copy of the checkout.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import parso  # noqa: F401  first: cosmic_ray.plugins imports it in a circle
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
# The survivors that are known, with the reason.
KNOWN = (ROOT / "tests" / "mutants.md").read_text()

# Sources -> the fastest tests that concern them, for pytest. Of a folder the test named as the source runs first.
TESTS = {
    # The same code over NumPy, torch and JAX.
    "loss_core/row_terms/*.py": ["tests/core/row_terms", "-k", "not torch and not jax"],
    "loss_core/losses/**/*.py": ["tests/losses", "loss_core/losses", "-k", "not users_loss and not with_torch"],
    "loss_core/workers/vocab_split.py": ["tests/workers/test_vocab_split.py"],
    "backends/loss_core_torch/reduction.py": [
        "tests/on_torch/test_reduction.py",
        "tests/on_torch/parallel/test_reduction.py",
    ],
    "backends/loss_core_torch/inputs.py": ["tests/on_torch/test_inputs.py", "tests/on_torch/test_labels.py"],
    "backends/loss_core_jax/reduction.py": ["tests/on_jax/test_reduction.py"],
    "backends/loss_core_jax/inputs.py": ["tests/on_jax/test_inputs.py"],
}
# Data: another size of a case, or share of its ignored labels, makes as good a case. So is what `rng.choice` takes.
DATA = ("loss_core/losses/cases/recipes.py", "loss_core/losses/cases/top_k.py", "Recipe", "RECIPES", "RANDOM_FIELDS")

# A shift of a float is an error in any test, and a remainder never near; `is` and == are the same for None and names.
NO_TEST = re.compile(
    r"_(Add|Sub|Mul|Div|Mod|FloorDiv|Pow)_(\w+Shift|Bit\w+|Mod|FloorDiv)$|_Bit\w+_(?!Bit)\w+$"
    r"|_(Is|IsNot)_(Eq|NotEq)$|_(Eq|NotEq)_(Is|IsNot)$"
)


class Mutant(NamedTuple):
    """The n-th place of a file where an operator of cosmic-ray applies."""

    path: Path
    operator: str
    number: int
    line: int


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All of a file but those that mean nothing."""
    source = path.read_text()
    spans = [span for node in ast.walk(ast.parse(source)) for span in left_out(node)]
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        operator = get_operator(name)
        if NO_TEST.search(name) or operator.arguments():
            continue
        places = [start for node in nodes for start, _ in operator().mutation_positions(node)]
        for number, (line, column) in enumerate(places):
            # Not the bare * before keyword arguments.
            if not any(start <= (line, column) < end for start, end in spans) and (
                not source.splitlines()[line - 1].startswith("*,", column)
            ):
                yield Mutant(path, name, number, line)


def left_out(node: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where what means nothing begins and ends.

    Data; annotations; axes, as -1 of a matrix is 1 and another an error; zip's strict=True, which no call violates.
    """
    targets = getattr(node, "targets", [getattr(node, "target", node)])
    names = {getattr(target, "id", getattr(target, "name", None)) for target in targets}
    if names & set(DATA) or (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "choice"):
        parts = [node]
    elif isinstance(node, ast.keyword) and node.arg in ("axis", "strict"):
        parts = [node.value]
    else:
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    for part in filter(None, parts):
        yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def failure(tests: list[str], limit: float | None = None) -> str:
    """What the tests print where they fail, or do not end within a number of seconds; nothing where they pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    try:
        run = subprocess.run(command, timeout=limit, stdout=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"{' '.join(tests)} ran for more than {limit:.0f} s."
    return "" if run.returncode == 0 else run.stdout


def survivor(mutant: Mutant, tests: list[str], limit: float) -> str:
    """What the mutant changes, if no test notices; else nothing."""
    before = mutant.path.read_text()
    after = mutate_code(before, get_operator(mutant.operator)(), mutant.number)
    mutant.path.write_text(after)
    passed = not failure(tests, limit)
    mutant.path.write_text(before)
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    lines = [f"{line[0]} {line[1:].strip()}" for line in list(changes)[3:]]
    return "\n".join(lines) if passed else ""


def judge(pattern: str, args: argparse.Namespace) -> str:
    """What was found for a row of the table: how many were killed, and the survivors that are not known."""
    sample, total = [], 0
    for path in sorted(
        path for path in Path().glob(pattern) if str(path) not in DATA and re.search(args.only, str(path))
    ):
        mutants = list(mutants_of(path))
        sample += random.Random(args.seed).sample(mutants, min(args.count, len(mutants)))
        total += len(mutants)
    if not sample:
        return ""
    tests, start = TESTS[pattern], time.perf_counter()
    if printed := failure(tests):
        sys.exit(f"{printed}\n{' '.join(tests)} fail without a mutant.")
    limit = 4 * (time.perf_counter() - start) + 30
    known, found = 0, []
    for mutant in sample:
        named = [str(path) for path in Path(tests[0]).rglob(f"test_{mutant.path.name}")]
        if change := survivor(mutant, named + tests, limit):
            known += change in KNOWN
            found += [] if change in KNOWN else [f"{mutant.path}:{mutant.line}\n{change}"]
            print(f"\n{mutant.path}:{mutant.line}\n{change}")
        print(".", end="", flush=True)
    print()
    killed = len(sample) - known - len(found)
    share = f"{killed} of {len(sample)} killed ({killed / len(sample):.0%}; a sample of {total})"
    return "\n".join([f"{pattern}: {share}, {known} known survivors, {len(found)} new", *found])


def main() -> None:
    """Judge each row of the table; print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a regular expression for the paths of the sources wanted")
    args, out = parser.parse_args(), ROOT / "outputs" / "mutants.txt"
    with tempfile.TemporaryDirectory(prefix="loss-core-mutants-") as name:
        copy = Path(name, "checkout")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "outputs", "site", "shared"))
        # Before the checkout, which is installed.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(copy), str(copy / "backends")])
        # A mutant has the size of its source, and is as old to the second: Python would run the bytecode of another.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        # Sizes are small: threads would cost more than they save.
        os.environ["OMP_NUM_THREADS"] = "1"
        with contextlib.chdir(copy):
            found = "\n".join(filter(None, (judge(pattern, args) for pattern in TESTS)))
    out.parent.mkdir(exist_ok=True)
    out.write_text(found + "\n")
    print(found)


if __name__ == "__main__":
    main()
