"""Modules that a fresh process loads; `make lint` checks the same rules statically (contracts in pyproject.toml)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def loaded_by(statement: str) -> set[str]:
    """Names of the modules that a statement loads in a fresh process, beyond those of a bare interpreter."""
    code = f"import sys, json; before = set(sys.modules); {statement}; print(json.dumps([*set(sys.modules) - before]))"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "backends")))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def tops(modules: set[str]) -> set[str]:
    # NumPy's compiled parts enter shared helper modules of Cython under names of their own; multiprocessing enters the
    # main module under a second one.
    known = ("_cython_", "cython_runtime", "__mp_main__")
    return {name.partition(".")[0] for name in modules if not name.startswith(known)}


def modules() -> list[str]:
    files = sorted((ROOT / "loss_core").rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


# An import must take less than 0.2 s. Tested by the modules that are loaded, not by time, which depends on the load of
# the machine: everything slow (torch 1 to 2 s, jax 0.5 s, matplotlib, typer, rich) is one of these names. NumPy takes
# 0.1 s.
def test_the_core_loads_only_the_standard_library_and_numpy():
    # The commands' own modules need the extra `cli`; `loss_core.cli` loads them when a command runs.
    light = [name for name in modules() if not name.startswith("loss_core.cli.")]
    loaded = loaded_by("; ".join(f"import {name}" for name in light))
    assert tops(loaded) - sys.stdlib_module_names - {"numpy", "loss_core"} == set()
    assert "loss_core.losses.oracle" in loaded


EACH_FIRST = """
import importlib, sys
for name in {names}:
    for known in [known for known in sys.modules if known.startswith('loss_core')]:
        del sys.modules[known]
    importlib.import_module(name)
"""


def test_every_module_can_be_the_first():
    # A circular import fails only from some first modules.
    assert loaded_by(f"exec({EACH_FIRST.format(names=modules())!r})")


def test_the_definitions_load_none_of_the_implementations():
    names = [name for name in modules() if name.startswith("loss_core.losses")]
    assert loaded_by("; ".join(f"import {name}" for name in names)) & {"loss_core.row_terms"} == set()


@pytest.mark.parametrize(
    ("framework", "module", "foreign"),
    [
        ("torch", "loss_core_torch.backend", {"jax", "jaxlib", "loss_core_jax", "transformer_engine"}),
        ("jax", "loss_core_jax.backend", {"torch", "triton", "loss_core_torch", "transformer_engine"}),
    ],
)
def test_one_backend_does_not_load_the_other(framework, module, foreign):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    assert tops(loaded_by(f"import {module}")) & foreign == set()


# Over one rank, a sharded loss.
SHARDED = """
import torch, torch.distributed as dist, loss_core
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
loss = loss_core.MaskedCrossEntropyConfig(tp_group=dist.group.WORLD).build(backend="torch:eager")
loss(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
"""


def test_a_call_over_ranks_loads_no_compiler():
    pytest.importorskip("torch")
    loaded = loaded_by(f"exec({SHARDED!r})")
    assert "loss_core_torch.parallel.agreement" in loaded
    assert "torch._dynamo" not in loaded


def test_a_loss_may_be_registered_before_check_is_imported():
    register = (
        "from dataclasses import dataclass; import loss_core; "
        "Own = dataclass(type('Own', (loss_core.LossConfig,), {})); "
        "loss_core.register_loss('Own', Own, {})"
    )
    assert "loss_core.check.run" in loaded_by(f"{register}; import loss_core.check, loss_core.bench")


def test_backends_is_no_package():
    assert not (ROOT / "backends" / "__init__.py").exists()
