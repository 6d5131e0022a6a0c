"""The command line: exit codes, messages, files, and that what it prints can be copied and run."""

import html.parser
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import loss_core.backend
import loss_core.cli_check
from loss_core import (
    BackendUnavailable,
    FlagStatus,
    KDLossConfig,
    LossConfig,
    __version__,
    register_loss,
    unregister_loss,
)
from loss_core.build import LOSS_CONFIG_REGISTRY
from loss_core.captured_call import read_call
from loss_core.check import Finding, Report, Row, check
from loss_core.cli import make_app
from loss_core.cli_configs import UsageProblem, read_configs
from loss_core.report_html import report_page
from loss_core.tables import described

ROOT = Path(__file__).resolve().parents[1]
ESCAPE = "\x1b["
QUICK = ("--backend", "torch:eager", "--dtype", "float32", "--case", "basic")


def run(*arguments, **options):
    """The command in this process."""
    return CliRunner().invoke(make_app(), [str(a) for a in arguments], **options)


def environment():
    """Of a user: nothing that forces colours or widths."""
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE")}
    return env | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])}


def command(*arguments, before=""):
    """Arguments that start the command in a process of its own, after the Python statement `before`."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {before}\n"
    code += "from loss_core.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def spawn(*arguments, before="", cwd=None):
    """The command in a process of its own."""
    return subprocess.run(
        command(*arguments, before=before), capture_output=True, text=True, env=environment(), cwd=cwd, timeout=120
    )


@pytest.fixture
def kd_without_temperature(monkeypatch):
    """The KD kernel with a realistic bug: the temperature is forgotten."""
    from loss_core_torch import backend
    from loss_core_torch.modules import KDLoss

    def build(c):
        return KDLoss(c.ignore_index, 1.0, c.fp32_upcast, c.tp_group, c.chunk_size)

    monkeypatch.setitem(backend._BUILDERS, (KDLossConfig, "eager"), build)


@pytest.fixture
def no_jax(monkeypatch):
    """A machine without JAX, whatever this one has."""
    kernels = loss_core.backend._BACKENDS["jax"][1]
    monkeypatch.setitem(loss_core.backend._BACKENDS, "jax", ("absent_framework.backend", kernels))


@pytest.fixture
def no_framework(monkeypatch, no_jax):
    kernels = loss_core.backend._BACKENDS["torch"][1]
    monkeypatch.setitem(loss_core.backend._BACKENDS, "torch", ("absent_framework.backend", kernels))


# --- exit codes and what goes where


def test_a_good_check_exits_0_with_table_and_verdict():
    result = run("check", *QUICK)
    assert result.exit_code == 0, result.output
    for loss in ("MaskedCrossEntropy", "FusedLinearCrossEntropy", "TEParallelCrossEntropy", "KDLoss"):
        assert loss in result.stdout
    assert result.stdout.count("ok torch:eager") == 4
    assert result.stdout.strip().splitlines()[-1].startswith("PASS: ")


@pytest.mark.usefixtures("kd_without_temperature")
def test_a_bad_kernel_exits_1_and_its_lines_reproduce_it(monkeypatch):
    result = run("check", "--backend", "torch:eager", "--dtype", "float32", "--case", "temperature", "--case", "basic")
    assert result.exit_code == 1
    assert re.search(r"^FAIL torch:eager .* temperature, ", result.stdout, re.MULTILINE)
    assert len(re.findall("^ok +torch:eager", result.stdout, re.MULTILINE)) == 3, "the other losses are fine"
    assert result.stdout.strip().splitlines()[-1].startswith("FAIL: 1 of 4 rows")
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip().startswith("loss-core check")]
    assert lines == ["loss-core check --config KDLoss --backend torch:eager --dtype float32 --case temperature"]
    again = run(*shlex.split(lines[0])[1:])
    assert again.exit_code == 1
    assert "student_logits" in again.stdout
    monkeypatch.undo()
    assert run(*shlex.split(lines[0])[1:]).exit_code == 0


@pytest.mark.usefixtures("kd_without_temperature")
def test_reproduce_lines_of_a_config_with_fields_and_a_random_case():
    config = "{name: KDLoss, temperature: 3.0}"
    drawn = ("--cases", 3, "--seed", 7, "--shape", "5,40")
    result = run("check", "--config", config, "--backend", "torch:eager", "--dtype", "float64", *drawn)
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip().startswith("loss-core check")]
    random = next(line for line in lines if "--case random-7-" in line)
    assert '\'{"name": "KDLoss"' in random
    assert "--shape 5,40 --cases 3 --seed 7" in random
    again = run(*shlex.split(random)[1:])
    assert again.exit_code == 1, again.output
    assert again.stdout.count("loss-core check") == 1


def test_a_long_reproduce_line_is_one_line_in_a_pipe(tmp_path):
    (tmp_path / "broken_kernel.py").write_text(
        "from loss_core.config import KDLossConfig\n"
        "from loss_core_torch import backend\n"
        "from loss_core_torch.modules import KDLoss\n"
        "backend._BUILDERS[(KDLossConfig, 'eager')] = lambda c: KDLoss(c.ignore_index, 1.0, c.fp32_upcast)\n"
    )
    config = "{name: KDLoss, temperature: 3.0, ignore_index: -7}"
    result = spawn("check", "--config", config, *QUICK, "--import", "broken_kernel", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert ESCAPE not in result.stdout + result.stderr
    line = next(line for line in result.stdout.splitlines() if "loss-core check" in line).strip()
    assert len(line) > 120
    assert line.endswith("--case basic --import broken_kernel")
    assert spawn(*shlex.split(line)[1:], cwd=tmp_path).returncode == 1
    table = [row for row in result.stdout.splitlines() if row.startswith(("ok ", "FAIL ", "   flag"))]
    assert table
    assert max(map(len, table)) <= 80


def test_a_terminal_gets_a_progress_bar_and_a_pipe_does_not():
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            command("check", *QUICK), stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment(), timeout=120
        )
        os.close(theirs)
        seen = os.read(ours, 1 << 20).decode()
    finally:
        os.close(ours)
    assert done.returncode == 0
    assert "/4" in seen, "how many of the four are done"
    assert ESCAPE not in done.stdout


def test_ctrl_c_is_quiet_and_does_not_wait_for_a_kernel(tmp_path):
    (tmp_path / "slow_kernel.py").write_text(
        "import pathlib, time\n"
        "from loss_core_torch import backend\n"
        "def evaluate(*args, **options):\n"
        "    pathlib.Path('running').touch()\n"
        "    time.sleep(60)\n"
        "backend.evaluate = evaluate\n"
    )
    process = subprocess.Popen(
        command("check", *QUICK, "--import", "slow_kernel"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "running").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert (out, err) == ("", "loss-core: stopped.\n")


@pytest.mark.parametrize("library", ["typer", "rich", "yaml"])
def test_without_the_cli_extra_one_line_and_2(library):
    result = spawn("losses", before=f"import sys; sys.modules[{library!r}] = None")
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(
        rf"loss-core: the command line needs {library} .*pip install 'loss-core\[cli\]'\n", result.stderr
    )


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_without_the_libraries_of_the_page_it_says_so_before_the_check(library, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    result = run("check", *QUICK, "--report", tmp_path / "r.html")
    assert result.exit_code == 2
    assert f"--report needs {library}" in result.stderr
    assert "pip install 'loss-core[cli]'" in result.stderr
    assert result.stdout == ""


def test_importing_the_library_or_the_command_loads_none_of_the_commands_libraries():
    code = (
        "import sys, loss_core, loss_core.cli, loss_core.report_html\n"
        "print([m for m in ('typer', 'rich', 'yaml', 'jinja2', 'matplotlib', 'torch', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_version_and_help():
    assert run("--version").stdout == f"loss-core {__version__}\n"
    assert run("check", "--help").exit_code == 0
    assert run("check", "--wat").exit_code == 2


# --- flags


@pytest.mark.usefixtures("no_jax")
def test_flags_that_cannot_be_used_are_listed_with_reason_and_install_line():
    checked = run("check", "--dtype", "float32", "--case", "basic")
    assert checked.exit_code == 0
    for result in (checked, run("backends")):
        flat = " ".join(result.stdout.split())
        assert "jax:xla, jax:pallas: backend 'jax' needs absent_framework" in flat
        assert "\n    pip install 'loss-core[jax]'\n" in result.stdout


@pytest.mark.usefixtures("no_jax")
@pytest.mark.parametrize("options", [("--backend", "jax:xla"), ("--backend", "jax"), ("--against", "jax:xla")])
def test_naming_a_flag_that_cannot_be_used_is_2(options):
    result = run("check", "--config", "KDLoss", "--case", "basic", *options)
    assert result.exit_code == 2
    assert "needs absent_framework" in result.stderr
    assert "\n    pip install 'loss-core[jax]'\n" in result.stderr
    assert result.stdout == ""


def test_check_never_skips_the_flag_to_compare_with_in_silence(monkeypatch):
    from loss_core_torch import backend

    def status(kernel):
        return FlagStatus(f"torch:{kernel}", kernel == "eager", "no such kernel today", "torch 2", "")

    monkeypatch.setattr(backend, "kernel_status", status)
    for named in (["torch:eager"], None):
        with pytest.raises(BackendUnavailable, match="no such kernel today"):
            check("KDLoss", named, against="torch:te", dtypes=["float32"], only=["basic"])


@pytest.mark.usefixtures("no_framework")
def test_without_any_framework_there_is_nothing_to_check():
    result = run("check")
    assert result.exit_code == 2
    assert "pip install 'loss-core[torch]'" in result.stderr
    assert "pip install 'loss-core[jax]'" in result.stderr
    assert "nothing to check" in result.stderr
    assert run("backends").exit_code == 0


def test_backends_names_every_flag():
    lines = run("backends").stdout.splitlines()
    for flag in loss_core.backend.all_flags():
        assert any(re.match(rf"{flag} +(yes|no) ", line) for line in lines), flag
    assert any(re.match(r"torch:eager +yes +torch \d", line) for line in lines)


def test_a_kernel_that_compiles_is_left_out_unless_it_is_named():
    quick = ("--config", "MaskedCrossEntropy", "--dtype", "float32", "--case", "vocab-1")
    status = loss_core.backend.flag_status("torch:compile")
    if not status.usable:
        pytest.skip(status.reason)
    bare = run("check", *quick)
    assert bare.exit_code == 0
    assert not re.search(r"^ok torch:compile", bare.stdout, re.M)
    flat = " ".join(bare.stdout.split())
    assert "Skipped: torch:compile: it compiles for each kind of input" in flat
    assert "(--backend torch:compile)" in flat
    for named in (("--backend", "torch:compile"), ("--against", "torch:compile")):
        result = run("check", *quick, *named)
        assert result.exit_code == 0
        assert re.search(r"^ok torch:compile", result.stdout, re.M)
        assert "it compiles" not in result.stdout


def test_a_loss_that_a_flag_does_not_serve_is_listed_as_skipped(monkeypatch):
    from loss_core_torch import backend

    monkeypatch.delitem(backend._BUILDERS, (KDLossConfig, "eager"))
    result = run("check", *QUICK)
    assert result.exit_code == 0
    assert re.search(r"Skipped:\n  KDLoss torch:eager: ", result.stdout)
    only = run("check", "--config", "KDLoss", *QUICK)
    assert only.exit_code == 2
    assert "Nothing could be run" in only.stderr


# --- losses


def test_losses_lists_fields_types_defaults_and_meaning():
    flat = re.sub(r" +", " ", run("losses", env={"COLUMNS": "200"}).stdout)
    assert "KDLoss (KDLossConfig)\n Knowledge distillation: forward KL(teacher || student)" in flat
    assert "temperature float 1.0 softmax temperature T, > 0, no unit." in flat
    assert 'reduction str \'sum\' "sum", "mean" (over positions that count) or "none".' in flat


def test_every_field_of_our_configs_has_a_meaning():
    for config_cls in LOSS_CONFIG_REGISTRY.values():
        summary, meanings = described(config_cls)
        assert summary
        assert set(meanings) == set(config_cls.__dataclass_fields__), config_cls


def test_a_users_loss_is_listed_and_checked(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "from dataclasses import dataclass\n"
        "from loss_core import KDLossConfig, register_loss\n"
        "from loss_core_torch.modules import KDLoss\n"
        "@dataclass\n"
        "class WarmKDConfig(KDLossConfig):\n"
        "    '''KD that is warm.\n\n    Attributes:\n        warmth: how warm, in kelvin.\n    '''\n"
        "    warmth: float = 300.0\n"
        "register_loss('WarmKD', WarmKDConfig, {'torch': lambda c: KDLoss(c.ignore_index, c.temperature)})\n"
    )
    listed = spawn("losses", "--import", "my_losses", cwd=tmp_path)
    assert "WarmKD (WarmKDConfig)\n  KD that is warm.\n" in listed.stdout, listed.stderr
    assert re.search(r"warmth +float +300.0 +how warm, in kelvin.", listed.stdout)
    assert "softmax temperature T" in listed.stdout, "the meaning of an inherited field"
    assert "WarmKD" not in run("losses").stdout
    missing = run("losses", "--import", "loss_core_absent")
    assert missing.exit_code == 2
    assert "--import loss_core_absent: ModuleNotFoundError" in missing.stderr


def test_a_users_loss_without_a_definition_is_refused():
    from dataclasses import make_dataclass

    register_loss("OddLoss", make_dataclass("OddLossConfig", [], bases=(LossConfig,)), {"torch": lambda c: None})
    try:
        result = run("check", "--config", "OddLoss", "--backend", "torch:eager")
    finally:
        unregister_loss("OddLoss")
    assert result.exit_code == 2
    assert "no float64 definition of OddLossConfig" in result.stderr


# --- configs from text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: KDLoss\ntemperature: 2.0\n", [KDLossConfig(temperature=2.0)]),
        ('{"name": "KDLoss", "temperature": 2.0}', [KDLossConfig(temperature=2.0)]),
        ("- KDLoss\n- {name: KDLoss, chunk_size: 3}\n", ["KDLoss", KDLossConfig(chunk_size=3)]),
        ("model: small\nloss:\n  name: KDLoss\nsteps: 3\n", [KDLossConfig()]),
        ("loss: KDLoss\n", ["KDLoss"]),
    ],
)
def test_yaml_files(text, expected, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert read_configs(str(path)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: KDLoss\ntemprature: 2.0",
            "recipe.yaml: KDLossConfig has no field 'temprature'. Did you mean 'temperature'",
        ),
        ("loss:\n  name: KDLos", "recipe.yaml, loss: unknown loss name 'KDLos'; did you mean 'KDLoss'?"),
        ("- KDLoss\n- {name: KDLoss, temperature: -1}", "item 2: temperature must be a finite number > 0, got -1"),
        ("name: KDLoss\n  temperature: 1", "recipe.yaml, line 2, column 14: not valid YAML"),
        ("name: KDLoss\nx: [1,\n", "line 3, column 1: not valid YAML"),
        ("name: MaskedCrossEntropy\nreduction: average", "reduction must be one of 'sum', 'mean', 'none'"),
        ("name: KDLoss\ntp_group: world", "tp_group is a live handle"),
        ("temperature: 2.0", "the key 'name' is missing"),
        ("", "got nothing"),
        ("[]", "got an empty list"),
        ("42", "got int 42"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("\0", "not valid YAML"),
    ],
)
def test_yaml_that_is_wrong_is_told_where(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    result = run("check", "--config", path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert str(path) in result.stderr
    assert len(result.stderr.splitlines()) <= 2


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path, message in (("absent.yaml", "No such file"), ("binary.yaml", "no text in UTF-8"), (".", "can't be read")):
        result = run("check", "--config", tmp_path / path)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_several_configs_of_one_loss_stay_apart():
    result = run("check", "--config", "[KDLoss, {name: KDLoss, temperature: 2.0}]", *QUICK)
    assert result.exit_code == 0
    assert "\nKDLoss\n" in result.stdout
    assert "\nKDLoss(temperature=2.0)\n" in result.stdout


# --- words that are wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config", "KDLos"), "did you mean 'KDLoss'?"),
        (("--backend", "torhc"), "Unknown backend flag 'torhc'"),
        (("--dtype", "floot32"), "did you mean 'float32'?"),
        (("--case", "bsic"), "did you mean 'basic'? Known: basic, none-ignored"),
        (("--case", "random-0-3", "--cases", "3"), "needs the options that draw it"),
        (("--case", "mask", "--config", "KDLoss"), "KDLoss: no case named mask"),
        (("--shape", "4"), "expected T,V or T,V,H"),
        (("--shape", "4,0"), "expected T,V or T,V,H"),
        (("--cases", "-1"), "greater than or equal to 0"),
        (("--backend", "torch:eager", "--against", "torch:eager"), "is the only flag"),
        (("--json", "/absent/report.json"), "there is no folder /absent"),
        (("--report", "."), "is a folder"),
        (("--inputs", "x.npz"), "needs exactly one --config"),
        (("--inputs", "x.npz", "--config", "KDLoss", "--case", "basic"), "leave them out beside --inputs"),
        (("--inputs", "x.csv", "--config", "KDLoss"), ".npz or .safetensors"),
        (("--inputs", "x.npz", "--config", "KDLoss"), "No such file"),
        (("--device", "cdua", "--backend", "torch:eager", "--case", "basic"), "--device cdua: nothing runs there"),
    ],
)
def test_wrong_words_are_2_and_told(options, message):
    result = run("check", *options)
    assert result.exit_code == 2, result.output
    # typer's own messages stand in a box.
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output


# --- captured calls


def captured(loss="MaskedCrossEntropy", tokens=6, vocab=11, dtype=np.float32):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, vocab, tokens)
    labels[1] = -100

    def floats(*shape):
        return rng.standard_normal(shape).astype(dtype)

    return {
        "MaskedCrossEntropy": lambda: {"logits": floats(tokens, vocab), "mask": np.ones(tokens, bool)},
        "TEParallelCrossEntropy": lambda: {"logits": floats(tokens, vocab), "loss_weights": np.abs(floats(tokens))},
        "FusedLinearCrossEntropy": lambda: {"hidden_states": floats(tokens, 5), "lm_weight": floats(vocab, 5),
                                            "num_label_tokens": np.asarray(4)},
        "KDLoss": lambda: {"student_logits": floats(tokens, vocab), "teacher_logits": floats(tokens, vocab)},
    }[loss]() | {"labels": labels}  # fmt: skip


@pytest.mark.parametrize("loss", list(LOSS_CONFIG_REGISTRY))
def test_a_captured_call_is_checked_in_its_own_dtype(loss, tmp_path):
    path = tmp_path / "call.npz"
    np.savez(path, **captured(loss, dtype=np.float16))
    result = run("check", "--config", loss, "--backend", "torch:eager", "--inputs", path)
    assert result.exit_code == 0, result.output
    assert re.search(r"ok torch:eager +float64 float16 +1 ", result.stdout)
    assert result.stdout.count("ok torch:eager") == 1
    # every floating input with a gradient was compared, not only the loss
    values = 1 + sum(a.size for n, a in captured(loss).items() if a.dtype.kind == "f")
    assert f" {values} values" in result.stdout


def test_bfloat16_from_safetensors(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "call.safetensors"
    arrays = captured()
    logits = torch.from_numpy(arrays["logits"]).to(torch.bfloat16)
    weights = torch.rand(6)
    save_file({"logits": logits, "labels": torch.from_numpy(arrays["labels"]), "loss_weights": weights}, path)
    call = read_call(path, "MaskedCrossEntropy")
    assert call.dtype == "bfloat16"
    np.testing.assert_array_equal(call.arrays["logits"], logits.float().numpy())
    result = run("check", "--config", "MaskedCrossEntropy", "--backend", "torch:eager", "--inputs", path)
    assert result.exit_code == 0, result.output
    assert re.search(r"ok torch:eager +float64 bfloat16 +1 ", result.stdout)
    assert "loss_weights is float32, but logits is bfloat16" in result.stderr
    wide = run(
        "check", "--config", "MaskedCrossEntropy", "--backend", "torch:eager", "--inputs", path, "--dtype", "float32"
    )
    assert re.search(r"ok torch:eager +float64 float32 +1 ", wide.stdout)


@pytest.mark.usefixtures("kd_without_temperature")
def test_a_captured_call_that_fails_is_reproduced_with_its_file(tmp_path):
    path = tmp_path / "a call.npz"
    np.savez(path, **captured("KDLoss"))
    result = run("check", "--config", "{name: KDLoss, temperature: 2.0}", "--backend", "torch:eager", "--inputs", path)
    assert result.exit_code == 1
    line = next(line.strip() for line in result.stdout.splitlines() if "loss-core check" in line)
    assert line.endswith(f"--dtype float32 --inputs '{path}'")
    assert run(*shlex.split(line)[1:]).exit_code == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels is missing. MaskedCrossEntropy takes logits [..., V], labels [...]"),
        ({"logits": None, "labels": None}, "logits, labels are missing"),
        ({"logit": np.ones((6, 11)), "logits": None}, "unknown argument 'logit'; did you mean 'logits'?"),
        ({"labels": np.ones(6)}, "labels must be integers, got float64"),
        ({"labels": np.ones(5, int)}, "labels has shape (5,) but logits has shape (6, 11)"),
        ({"labels": np.full(6, 11)}, "labels[0] is 11, which is outside [0, 11)"),
        ({"labels": np.ones((0,), int), "logits": np.ones((0, 11))}, "labels is empty"),
        ({"logits": np.ones((6, 11), int)}, "logits must be one of"),
        ({"logits": np.ones((6, 0))}, "V = 0"),
        ({"mask": np.ones(4)}, "mask has shape (4,)"),
        ({"loss_weights": np.ones(4)}, "loss_weights has shape (4,)"),
        ({"num_label_tokens": np.ones(2)}, "num_label_tokens must be one whole number"),
        ({"num_label_tokens": np.asarray(1.5)}, "num_label_tokens must be one whole number"),
        ({"logits": np.asarray([object()])}, "no .npz file of plain arrays"),
        ({"logits": np.zeros((6, 11), "V2")}, "store such tensors as .safetensors"),
    ],
)
def test_captured_calls_that_do_not_fit(change, message, tmp_path):
    path = tmp_path / "call.npz"
    np.savez(path, **{name: a for name, a in (captured() | change).items() if a is not None})
    with pytest.raises(UsageProblem) as error:
        read_call(path, "MaskedCrossEntropy")
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_captured_call_must_fit_the_config_and_the_other_losses_shapes(tmp_path):
    path = tmp_path / "call.npz"
    np.savez(path, **captured("KDLoss") | {"teacher_logits": np.ones((6, 12))})
    with pytest.raises(UsageProblem, match="V = 11 but teacher_logits V = 12"):
        read_call(path, "KDLoss")
    np.savez(path, **captured("FusedLinearCrossEntropy") | {"lm_weight": np.ones((11, 4))})
    with pytest.raises(UsageProblem, match=r"lm_weight has shape \(11, 4\)"):
        read_call(path, "FusedLinearCrossEntropy")
    np.savez(path, **captured() | {"num_label_tokens": 3})
    with pytest.raises(UsageProblem, match="goes with reduction 'sum' only"):
        read_call(path, read_configs("{name: MaskedCrossEntropy, reduction: mean}")[0])
    np.savez(path, **captured() | {"labels": np.full(6, 99), "mask": np.zeros(6)})
    assert read_call(path, "MaskedCrossEntropy").dtype == "float32", "a masked label may be anything"


def test_broken_files_are_told(tmp_path):
    for name, content in (
        ("a.npz", b"PK\x03\x04"),
        ("b.npz", b"nothing"),
        ("c.npz", b""),
        ("d.safetensors", b"12345678"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageProblem, match=name):
            read_call(tmp_path / name, "KDLoss")
    with open(tmp_path / "e.npz", "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(UsageProblem, match="holds a single array"):
        read_call(tmp_path / "e.npz", "KDLoss")


# --- files that it writes


def test_json_is_the_report(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(loss_core.cli_check, "check", lambda *a, **k: made.append(check(*a, **k)) or made[0])
    result = run("check", *QUICK, "--json", tmp_path / "r.json")
    assert result.exit_code == 0
    read = json.loads((tmp_path / "r.json").read_text())
    assert read == json.loads(made[0].to_json())
    assert [row["loss"] for row in read["rows"]] == [row.loss for row in made[0].rows]
    assert read["passed"] is True


class Page(html.parser.HTMLParser):
    """Text of the table's cells by row, the tags, and the attributes that could load something."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.loads, self._cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data") and v[:1] != "#"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data


def page_of(report, typed="loss-core check"):
    text = report_page(report, typed)
    page = Page(text)
    assert page.loads == []
    assert "http" not in text
    assert "script" not in page.tags
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    return text, page


def test_the_page_has_the_table_a_picture_per_flag_and_nothing_from_outside(tmp_path):
    result = run("check", *QUICK, "--dtype", "bfloat16", "--report", tmp_path / "r.html", obj="loss-core check --typed")
    assert result.exit_code == 0, result.output
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    rows = [row for row in page.rows if row[0] == "ok"]
    assert len(rows) == 8
    assert [row[1:4] for row in rows[:2]] == [["torch:eager", "float64", d] for d in ("float32", "bfloat16")]

    report = check(None, ["torch:eager"], dtypes=["float32"], only=["basic"])
    report.histograms["jax:xla", "float32"] = report.histograms["torch:eager", "float32"]
    text, page = page_of(report, "loss-core check --typed")
    assert page.tags.count("svg") == 2
    assert "PASS" in text
    assert "loss-core check --typed" in text
    for version in report.versions.values():
        assert version in text


@pytest.mark.usefixtures("kd_without_temperature", "no_jax")
def test_the_page_marks_failures_and_tells_what_could_not_run():
    report = check("KDLoss", dtypes=["float32"], only=["temperature"])
    text, page = page_of(report)
    assert [row[0] for row in page.rows[2:]] == ["FAIL"]
    assert "loss-core check --config KDLoss --backend torch:eager --dtype float32 --case temperature" in text
    assert "backend &#39;jax&#39; needs absent_framework" in text
    assert "pip install &#39;loss-core[jax]&#39;" in text


def test_hostile_names_are_escaped():
    evil = "<script>alert('x')</script>"
    finding = Finding(evil, "torch:eager", "float64", "float32", evil, evil, 2.0, 1.0, 0.5, (0,), 1.0, 0.0, evil, evil)
    number = replace(finding, problem="")
    row = Row(evil, "torch:eager", "float64", "float32", 1, number, [finding, number])
    report = Report(rows=[row], skipped=[evil], versions={"numpy": evil})
    text, page = page_of(report, evil)
    assert evil not in text
    assert evil in [cell for r in page.rows for cell in r], "shown as text"


def test_a_report_with_infinite_and_missing_numbers_is_shown():
    nan = float("nan")
    finding = Finding(
        "L", "torch:eager", "float64", "float32", "c", "loss", float("inf"), nan, 0.0, (), nan, 0.0, "", "l"
    )
    rows = [Row("L", "torch:eager", "float64", "float32", 1, finding, [finding]), Row("L", "x", "float64", "float32")]
    _, page = page_of(Report(rows=rows))
    assert [row[0] for row in page.rows[2:]] == ["FAIL", "ok"]
    assert page.rows[2][5] == "inf"
