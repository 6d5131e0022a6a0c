"""Install and test the wheel as a user does: in an empty environment, then with torch only, then with jax only.

Builds the sdist, and the wheel from the sdist, so that both are tested. Prints a line for each check that
passed, and stops at the first failure. `make check-wheel` runs it; it needs `build` and `hatchling`, and
pip's registry or cache.

    python tests/wheel_check.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "loss_core", "loss_core_torch", "loss_core_jax", "loss_core_bridge", "loss_core_bench", "loss_core_baselines",
)  # fmt: skip

# Each of these runs with -I outside the checkout, so that none of its files is on the path.
LOADS_NEITHER = """
import sys, loss_core
from pathlib import Path
site = Path(loss_core.__file__).parent.parent
assert site.name == "site-packages", site
assert not {"torch", "jax"} & set(sys.modules), "import loss_core loaded a framework"
for name in ("backends", "tests", "examples"):
    assert not (site / name).exists(), f"the wheel put {name} into site-packages"
for name in PACKAGES:
    assert (site / name / "py.typed").is_file(), f"{name} has no py.typed"
"""
REFUSES = """
from loss_core import LOSS_CONFIG_REGISTRY, BackendUnavailable
for cls in LOSS_CONFIG_REGISTRY.values():
    for flag in FLAGS:
        try:
            cls().build() if flag is None else cls().build(backend=flag)
        except BackendUnavailable as error:
            assert isinstance(error, ImportError)
            for part in (f"No module named {MISSING!r}", f"pip install 'loss-core[{MISSING}]'"):
                assert part in str(error), f"{flag}: {part!r} is not in {str(error)!r}"
        else:
            raise AssertionError(f"{cls.__name__} was built for {flag} without {MISSING}")
"""
TORCH_BUILDS = """
import math, sys, torch
from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
labels = torch.tensor([1, 3])
logits = torch.zeros(2, 4, requires_grad=True)
for config in (MaskedCrossEntropyConfig(), TEParallelCEConfig()):
    module = config.build()
    assert isinstance(module, torch.nn.Module)
    loss = module(logits, labels)
    loss.backward()
    assert math.isclose(loss.item(), 2 * math.log(4), rel_tol=1e-6), loss
loss = FusedLinearCEConfig().build()(torch.zeros(2, 3), labels, torch.ones(4, 3))
assert math.isclose(loss.item(), 2 * math.log(4), rel_tol=1e-6), loss
assert KDLossConfig().build()(logits, torch.zeros(2, 4), labels).item() == 0
assert "jax" not in sys.modules
"""
JAX_BUILDS = """
import math, sys, jax, jax.numpy as jnp
from loss_core import FusedLinearCEConfig, KDLossConfig, MaskedCrossEntropyConfig, TEParallelCEConfig
labels = jnp.array([1, 3])
for config in (MaskedCrossEntropyConfig(), TEParallelCEConfig()):
    loss = config.build(backend="jax")
    hash(loss)
    value, grad = jax.jit(jax.value_and_grad(loss))(jnp.zeros((2, 4)), labels)
    assert math.isclose(value, 2 * math.log(4), rel_tol=1e-6), value
    assert grad.shape == (2, 4)
value = FusedLinearCEConfig().build(backend="jax")(jnp.zeros((2, 3)), labels, jnp.ones((4, 3)))
assert math.isclose(value, 2 * math.log(4), rel_tol=1e-6), value
assert KDLossConfig().build(backend="jax")(jnp.zeros((2, 4)), jnp.zeros((2, 4)), labels) == 0
assert "torch" not in sys.modules
"""
# Each adapter imports its library on use, with an error that names the install command. titan does so on import.
INTEGRATIONS = """
import importlib, sys
for name in ("heads", "hf", "megatron", "nemo", "trl"):
    importlib.import_module(f"loss_core_torch.integrations.{name}")
loaded = {"megatron", "nemo_automodel", "transformers", "trl"} & set(sys.modules)
assert not loaded, f"importing the adapters loaded {loaded}"
from loss_core_torch.integrations import nemo
for line, use in (
    ("pip install 'nemo-automodel>=0.7'", nemo.masked_ce),
    ("pip install 'torchtitan>=0.3'", lambda: importlib.import_module("loss_core_torch.integrations.titan")),
):
    try:
        use()
    except ImportError as error:
        assert line in str(error), error
    else:
        raise AssertionError(f"no error names {line}")
"""
SCHEMA = """
import json, subprocess, sys
from pathlib import Path
command = [Path(sys.executable).parent / "loss-core", "losses", "--schema"]
schema = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
assert {"KDLoss", "MaskedCrossEntropy"} < set(schema["$defs"]), sorted(schema["$defs"])
"""
TORCH_FLAGS = "[None, 'torch', 'torch:eager']"
JAX_FLAGS = "['jax', 'jax:xla']"


def refuses(missing: str, flags: str) -> str:
    """Code that asserts that no config can be built for these flags without the library."""
    return f"MISSING, FLAGS = {missing!r}, {flags}\n{REFUSES}"


def main() -> None:
    """Build, inspect the archives, and test three environments."""
    with tempfile.TemporaryDirectory(prefix="loss-core-wheel-") as folder:
        root = Path(folder)
        sdist, wheel = build(root / "dist")
        inspect_archives(sdist, wheel)

        empty = environment(root / "empty", f"{wheel}")
        check_absent(empty, "torch", "jax", "typer", "rich", "yaml")
        run_check(
            empty, "import loads neither torch nor jax; no 'backends'; typed", f"PACKAGES = {PACKAGES}{LOADS_NEITHER}"
        )
        run_check(empty, "without torch: BackendUnavailable, reason and install line", refuses("torch", TORCH_FLAGS))
        run_check(empty, "without jax: BackendUnavailable, reason and install line", refuses("jax", JAX_FLAGS))
        command_without_its_extra(empty)

        with_torch = environment(root / "torch", f"{wheel}[torch]")
        check_absent(with_torch, "jax")
        run_check(with_torch, "torch only: every config builds on torch", TORCH_BUILDS)
        run_check(with_torch, "torch only: jax flags are refused", refuses("jax", JAX_FLAGS))
        run_check(with_torch, "torch only: the adapters import, and say what to install", INTEGRATIONS)

        with_jax = environment(root / "jax", f"{wheel}[jax,cli]")
        check_absent(with_jax, "torch")
        run_check(with_jax, "jax only: every config builds on jax", JAX_BUILDS)
        run_check(with_jax, "jax only: torch flags are refused", refuses("torch", TORCH_FLAGS))
        run_check(with_jax, "jax only, cli: loss-core losses --schema is a schema", SCHEMA)
        check = ["check", "--backend", "jax:xla", "--config", "KDLoss", "--dtype", "float32"]
        for arguments in (["--help"], ["losses"], ["backends"], check):
            run([with_jax.parent / "loss-core", *arguments], cwd=root)
            report(f"jax only, cli: loss-core {' '.join(arguments)}")
    report("all passed")


def build(target: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it."""
    # Without isolation: hatchling is among the development tools, at the version of constraints.txt.
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", target, ROOT], cwd=ROOT)
    (sdist,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    report(f"built {sdist.name} and, from it, {wheel.name}")
    return sdist, wheel


def inspect_archives(sdist: Path, wheel: Path) -> None:
    """Check that the wheel has the packages and nothing else, and the sdist the files that a packager needs."""
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.partition("/")[0] for name in names}
    info = {top for top in top_level if top.endswith(".dist-info")}
    expect(top_level - info == set(PACKAGES), f"the wheel has {sorted(top_level)}")
    expect(any(name.endswith("licenses/LICENSE") for name in names), "the wheel has no LICENSE")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "tests/wheel_check.py"}
    expect(needed <= files, f"the sdist lacks {sorted(needed - files)}")
    for name in (*names, *files):
        expect("__pycache__" not in name and not name.endswith((".pyc", ".so")), f"build output in an archive: {name}")
    report(f"wheel: {len(names)} files, {', '.join(PACKAGES)}; sdist: {len(files)} files")


def environment(folder: Path, requirement: str) -> Path:
    """A new virtual environment with one requirement installed; returns its python."""
    run([sys.executable, "-m", "venv", folder], cwd=ROOT)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    run([*pip, "--constraint", ROOT / "constraints.txt", requirement], cwd=folder)
    return python


def check_absent(python: Path, *modules: str) -> None:
    """Check that the environment lacks the modules."""
    run_check(
        python,
        f"{python.parts[-3]}: no {', '.join(modules)}",
        f"""
import importlib.util
for name in {modules}:
    assert importlib.util.find_spec(name) is None, f"{{name}} is installed"
""",
    )


def command_without_its_extra(python: Path) -> None:
    """Check that `loss-core` without its libraries prints what to install instead of a traceback."""
    done = subprocess.run([python.parent / "loss-core", "--help"], capture_output=True, text=True)
    text = done.stdout + done.stderr
    expect(done.returncode != 0, "loss-core --help exits with 0 although its libraries are missing")
    expect("pip install 'loss-core[cli]'" in text, f"loss-core --help without the cli extra says: {text}")
    expect("Traceback" not in text, f"loss-core --help without the cli extra shows a traceback: {text}")
    report(f"empty: loss-core --help says {text.strip()!r}")


def run_check(python: Path, what: str, code: str) -> None:
    """Run code in an environment, outside the checkout."""
    run([python, "-I", "-c", code], cwd=python.parent)
    report(what)


def run(command: list[str | Path], cwd: Path) -> None:
    """Run a command; print its output only if it fails."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    shown = [str(part) if "\n" not in str(part) else "<code>" for part in command]
    expect(done.returncode == 0, f"{' '.join(shown)}\n{done.stdout}")


def expect(condition: bool, message: str) -> None:
    """Exit with a message unless the condition holds."""
    if not condition:
        sys.exit(f"wheel check FAILED: {message}")


def report(line: str) -> None:
    """Print a line for a check that passed, unbuffered."""
    print(f"wheel check: {line}", flush=True)


if __name__ == "__main__":
    main()
