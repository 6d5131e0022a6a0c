"""Who may import whom: the rules, read off the source without running it.

`make lint` runs this file; tests/test_import_rules.py holds the same rules at run time, too, and shows
that each of them can fail.

    python tests/import_rules.py [ROOT]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BACKEND_PACKAGES = ("loss_core_torch", "loss_core_jax", "loss_core_bridge", "loss_core_bench")
# What the command line and the report may load, inside a function.
CLI_LIBRARIES = frozenset({"jinja2", "matplotlib", "rich", "safetensors", "typer", "yaml"})
FOREIGN = {
    "loss_core_torch": frozenset({"jax", "jaxlib", "loss_core_jax", "loss_core_bridge", "loss_core_bench"}),
    "loss_core_jax": frozenset(
        {"torch", "triton", "transformer_engine", "loss_core_torch", "loss_core_bridge", "loss_core_bench"}
    ),
    "loss_core_bridge": frozenset({"loss_core_bench"}),
}
_TORCH, _JAX = frozenset({"torch", "triton", "loss_core_torch"}), frozenset({"jax", "jaxlib", "loss_core_jax"})
# By the beginning of a file's name in loss_core_bench.
BENCH_FOREIGN = {"torch_": _JAX, "jax_": _TORCH, "": _TORCH | _JAX}
# Where transformer_engine is known: our kernel, and the peer that it is beside it.
KNOWS_TE = frozenset({("loss_core_torch", "te.py"), ("loss_core_bench", "torch_peers.py")})


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        module: full name; for `from a import b` that is "a.b", whether b is a module or not.
        line: where.
        lazy: inside a function, so not loaded by importing the file.
        typing_only: under `if TYPE_CHECKING:`, so never loaded.
    """

    module: str
    line: int
    lazy: bool
    typing_only: bool

    @property
    def top(self) -> str:
        """The part before the first dot."""
        return self.module.partition(".")[0]


def imports_of(path: Path, package: str) -> list[Import]:
    """Every import of a file, `importlib.import_module("literal")` and `__import__("literal")` too.

    Args:
        package: dotted name of the package the file is in, which relative imports start from.
    """
    return list(_walk(ast.parse(path.read_text("utf-8"), str(path)), package, lazy=False, typing_only=False))


def _walk(node: ast.AST, package: str, *, lazy: bool, typing_only: bool) -> Iterator[Import]:
    for name in _names(node, package):
        yield Import(name, getattr(node, "lineno", 0), lazy, typing_only)
    if isinstance(node, ast.If) and _is_type_checking(node.test):
        for child in node.body:
            yield from _walk(child, package, lazy=lazy, typing_only=True)
        for child in node.orelse:
            yield from _walk(child, package, lazy=lazy, typing_only=typing_only)
        return
    inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, lazy=inside, typing_only=typing_only)


def _names(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, *filter(None, [node.module])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def sources(root: Path, package: str) -> list[tuple[Path, list[Import]]]:
    """The files of a top-level package with their imports, in a fixed order."""
    folder = root / package if package == "loss_core" else root / "backends" / package
    files = sorted(folder.rglob("*.py"))
    return [(file, imports_of(file, ".".join((package, *file.parent.relative_to(folder).parts)))) for file in files]


def _report(root: Path, file: Path, imported: Import, rule: str) -> str:
    return f"{file.relative_to(root)}:{imported.line}: imports {imported.module}; {rule}"


def core_is_light(root: Path) -> Iterator[str]:
    """loss_core imports the standard library and NumPy; the command line its own libraries, inside functions."""
    always = sys.stdlib_module_names | {"loss_core", "numpy"}
    for file, found in sources(root, "loss_core"):
        for imported in found:
            allowed = always | CLI_LIBRARIES if imported.lazy else always
            if not imported.typing_only and imported.top not in allowed:
                yield _report(
                    root,
                    file,
                    imported,
                    "loss_core imports the standard library and numpy only, its CLI libraries inside functions, "
                    "and reaches a framework through loss_core.backend.load_backend",
                )


def oracle_stands_alone(root: Path) -> Iterator[str]:
    """The oracle reaches row_stats by no chain of imports: it shares no code with what it judges."""
    by_name = {f"loss_core.{file.stem}": (file, found) for file, found in sources(root, "loss_core")}
    seen, queue = set[str](), ["loss_core.oracle"]
    while queue:
        name = queue.pop()
        if name in seen or name not in by_name:
            continue
        seen.add(name)
        file, found = by_name[name]
        for imported in found:
            if imported.typing_only:
                continue
            # "loss_core.config.LossConfig" names the module loss_core.config.
            target = ".".join(imported.module.split(".")[:2])
            if target == "loss_core.row_stats":
                yield _report(root, file, imported, "loss_core.oracle must not reach row_stats, which it judges")
            queue.append(target)


def backends_stand_apart(root: Path) -> Iterator[str]:
    """Neither backend imports the other, its framework or the bridge, not even for types."""
    for package, foreign in FOREIGN.items():
        for file, found in sources(root, package):
            for imported in found:
                if imported.top in foreign:
                    yield _report(root, file, imported, f"{package} must not import {imported.top}")


def only_te_imports_transformer_engine(root: Path) -> Iterator[str]:
    """One file of ours knows transformer_engine, and the one that runs it as a peer."""
    for package in ("loss_core", *BACKEND_PACKAGES):
        for file, found in sources(root, package):
            if (package, file.name) in KNOWS_TE:
                continue
            for imported in found:
                if imported.top == "transformer_engine":
                    yield _report(root, file, imported, "only loss_core_torch/te.py may import transformer_engine")


def bench_workers_load_one_framework(root: Path) -> Iterator[str]:
    """A worker of the benchmark loads torch or JAX, not both: torch_* and jax_* files, and nothing in the others."""
    for file, found in sources(root, "loss_core_bench"):
        foreign = next(names for start, names in BENCH_FOREIGN.items() if file.name.startswith(start))
        for imported in found:
            if imported.top in foreign:
                yield _report(root, file, imported, f"{file.name} of a benchmark's worker must not import it")


def kernels_import_only_triton(root: Path) -> Iterator[str]:
    """A kernel file holds kernels: it can be read, and compiled for any target, without the rest."""
    for file, found in sources(root, "loss_core_torch"):
        if file.name != "triton_kernels.py":
            continue
        for imported in found:
            if imported.top not in ("triton", "__future__"):
                yield _report(root, file, imported, "triton_kernels.py may import triton only")


RULES: tuple[Callable[[Path], Iterator[str]], ...] = (
    core_is_light,
    oracle_stands_alone,
    backends_stand_apart,
    only_te_imports_transformer_engine,
    bench_workers_load_one_framework,
    kernels_import_only_triton,
)


def violations(root: Path) -> list[str]:
    """Every breach of every rule in a checkout, as `file:line: what; why`."""
    return [breach for rule in RULES for breach in rule(root)]


def main() -> int:
    """Print the breaches; 1 if there are any."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    found = violations(root)
    print("\n".join(found) if found else f"import rules: {len(RULES)} hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
