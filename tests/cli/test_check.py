"""`loss-core check`: exit codes, messages, and commands in its output, which can be copied and run."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import time

import pytest

from helpers.command import QUICK, command, environment, interrupted, run, spawn
from loss_core import (
    LOSS_CONFIG_REGISTRY,
    LossConfig,
    register_loss,
    unregister_loss,
)
from loss_core.check import check


def test_a_good_check_exits_0_with_table_and_verdict():
    result = run("check", *QUICK)
    assert result.exit_code == 0, result.output
    for loss in LOSS_CONFIG_REGISTRY:
        assert loss in result.stdout
    assert result.stdout.count("ok torch:eager") == len(LOSS_CONFIG_REGISTRY)
    assert result.stdout.strip().splitlines()[-1].startswith("PASS: ")


def test_an_insensitive_row_is_reported_and_is_no_failure():
    result = run("check", "--config", "MaskedCrossEntropy", *QUICK[:-1], "all-ignored")
    assert result.exit_code == 0, result.output
    assert re.search(r"^ok torch:eager float64 float32 +1 insensitive ", result.stdout, re.MULTILINE)
    note = "MaskedCrossEntropy torch:eager against float64, float32: bfloat16 softmax would have passed in every case"
    assert note in " ".join(result.stdout.split())
    assert result.stdout.strip().splitlines()[-1].endswith("; 1 row insensitive to a lower arithmetic.")
    assert "insensitive" not in run("check", "--config", "MaskedCrossEntropy", *QUICK).stdout


def test_a_harder_case_is_named_and_its_command_runs():
    options = ("--config", "MaskedCrossEntropy", "--backend", "torch:eager", "--dtype", "float32")
    result = run("check", *options, "--shape", "1,1")
    assert result.exit_code == 0, result.output
    note = "Harder cases, since a lower arithmetic would have passed all others: MaskedCrossEntropy, float32: harder-1"
    assert note in " ".join(result.stdout.split())
    assert "insensitive" not in result.stdout
    again = run("check", *options, "--case", "harder-1")
    assert re.search(r"^ok torch:eager float64 float32 +1 +1 ", again.stdout, re.MULTILINE)
    assert "Harder cases" not in again.stdout
    assert run("check", *options, "--case", "harder-4").exit_code == 2


def test_the_condition_of_the_loss_is_in_the_row_of_the_worst_error():
    result = run("check", "--config", "MaskedCrossEntropy", *QUICK[:-1], "offset")
    heading = next(line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["flag"])
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith("ok"))
    assert float(row[heading.index("cond") + 1]) > 1e3


def reproduce_lines(result):
    return [line.strip() for line in result.stdout.splitlines() if line.strip().startswith("loss-core check")]


def test_a_bad_kernel_exits_1_and_its_lines_reproduce_it(forgetful):
    configs = [word for loss in ("MaskedCrossEntropy", "KDLoss", "ForgetfulKD") for word in ("--config", loss)]
    result = run("check", *configs, *QUICK, "--case", "temperature")
    assert result.exit_code == 1
    assert re.search(r"^FAIL torch:eager .* temperature, ", result.stdout, re.MULTILINE)
    assert len(re.findall("^ok +torch:eager", result.stdout, re.MULTILINE)) == 2, "the other losses are fine"
    assert result.stdout.strip().splitlines()[-1].startswith("FAIL: 1 of 3 rows")
    (line,) = reproduce_lines(result)
    assert line == "loss-core check --config ForgetfulKD --backend torch:eager --dtype float32 --case temperature"
    again = run(*shlex.split(line)[1:])
    assert again.exit_code == 1
    assert "student_logits" in again.stdout
    assert run(*shlex.split(line.replace("ForgetfulKD", "KDLoss"))[1:]).exit_code == 0


def test_reproduce_lines_of_a_config_with_fields_and_a_random_case(forgetful):
    config = "{name: ForgetfulKD, temperature: 3.0}"
    drawn = ("--cases", 3, "--seed", 7, "--shape", "5,40")
    result = run("check", "--config", config, "--backend", "torch:eager", "--dtype", "float64", *drawn)
    random = next(line for line in reproduce_lines(result) if "--case random-7-" in line)
    assert '\'{"name": "ForgetfulKD"' in random
    assert "--shape 5,40 --cases 3 --seed 7" in random
    again = run(*shlex.split(random)[1:])
    assert again.exit_code == 1, again.output
    assert again.stdout.count("loss-core check") == 1


def test_a_long_reproduce_line_is_one_line_in_a_pipe(forgetful, tmp_path):
    config = "{name: ForgetfulKD, temperature: 3.0, ignore_index: -7}"
    result = spawn("check", "--config", config, *QUICK, "--import", forgetful, cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "\x1b[" not in result.stdout + result.stderr
    line = next(line for line in result.stdout.splitlines() if "loss-core check" in line).strip()
    assert len(line) > 120
    assert line.endswith("--case basic --import forgetful_loss")
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
        seen = os.read(ours, 1 << 20).decode(errors="replace")  # its end may cut a character
    finally:
        os.close(ours)
    assert done.returncode == 0
    assert f"/{len(LOSS_CONFIG_REGISTRY)}" in seen, "how many are done"
    assert "\x1b[" not in done.stdout


@pytest.fixture
def stopped(tmp_path):
    """Runs a command with a loss `Slow`, made by `slow(config)`, until that makes the file "running", then Ctrl-C."""

    def run_until(slow, *words):
        (tmp_path / "slow_loss.py").write_text(
            "import pathlib, time\n"
            "from dataclasses import dataclass\n"
            "from loss_core import KDLossConfig, register_loss\n"
            "@dataclass\n"
            "class SlowConfig(KDLossConfig):\n"
            "    pass\n"
            "def sleep(**arguments):\n"
            "    pathlib.Path('running').touch()\n"
            "    time.sleep(60)\n"
            f"{slow}"
            "register_loss('Slow', SlowConfig, {'torch:eager': slow})\n"
        )

        def ready(process):
            deadline = time.monotonic() + 120
            while not (tmp_path / "running").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)

        return interrupted((*words, "--config", "Slow", "--import", "slow_loss"), ready, cwd=tmp_path)

    return run_until


def test_ctrl_c_is_quiet_and_does_not_wait_for_a_kernel(stopped):
    slow = "def slow(config):\n    return sleep\n"
    assert stopped(slow, "check", *QUICK) == (130, "", "loss-core: stopped.\n")


def test_ctrl_c_reports_what_was_run_and_how_to_continue(stopped):
    slow = (
        "built = []\n"
        "def slow(config):\n"
        "    built.append(1)\n"
        "    return sleep if len(built) > 2 else KDLossConfig(**vars(config)).build(backend='torch:eager')\n"
    )
    drawn = ("--backend", "torch:eager", "--dtype", "float32", "--cases", "9", "--first", "0")
    code, out, err = stopped(slow, "check", *drawn)
    assert code == 130
    assert "PASS so far: " in out
    assert "stopped after 2 of 9 calls" in out
    assert re.search(r"^loss-core check (?!.*--first 0).*--config Slow .*--first 2$", err, re.MULTILINE)
    assert err.endswith("loss-core: stopped.\n")


def test_a_time_limit_stops_the_check_with_a_report(tmp_path):
    drawn = ("--config", "KDLoss", "--backend", "torch:eager", "--dtype", "float32", "--cases", "1000", "--first", "5")
    result = run("check", *drawn, "--minutes", "1e-9", "--json", tmp_path / "r.json", obj="loss-core check --typed")
    assert result.exit_code == 0, result.output
    assert "PASS so far: " in result.stdout
    assert "stopped after 1 of 995 calls" in result.stdout
    assert result.stderr.splitlines()[-1] == "loss-core check --typed --first 5"
    read = json.loads((tmp_path / "r.json").read_text())
    assert (read["calls"], read["total"], read["next_first"]) == (1, 995, 5)


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_without_the_libraries_of_the_page_it_says_so_before_the_check(library, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    result = run("check", *QUICK, "--report", tmp_path / "r.html")
    assert result.exit_code == 2
    assert f"--report needs {library}" in result.stderr
    assert "pip install 'loss-core[cli]'" in result.stderr
    assert result.stdout == ""


def test_a_users_loss_without_a_definition_is_refused():
    from dataclasses import make_dataclass

    register_loss("OddLoss", make_dataclass("OddLossConfig", [], bases=(LossConfig,)), {"torch": lambda c: None})
    try:
        result = run("check", "--config", "OddLoss", "--backend", "torch:eager")
    finally:
        unregister_loss("OddLoss")
    assert result.exit_code == 2
    assert "There is no definition of OddLossConfig in float64" in result.stderr


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
        (("--cases", "3", "--first", "3"), "at least 0 and below 3; got 3"),
        (("--case", "basic", "--minutes", "0"), "minutes must be above 0"),
        (("--backend", "torch:eager", "--against", "torch:eager"), "is the only flag"),
        (("--json", "/absent/report.json"), "there is no folder /absent"),
        (("--report", "."), "is a folder"),
        (("--inputs", "x.npz"), "needs exactly one --config"),
        (("--inputs", "x.npz", "--config", "KDLoss", "--case", "basic"), "they can't be used beside --inputs"),
        (("--inputs", "x.csv", "--config", "KDLoss"), ".npz or .safetensors"),
        (("--inputs", "x.npz", "--config", "KDLoss"), "No such file"),
        (("--device", "cdua", "--backend", "torch:eager", "--case", "basic"), "--device cdua: nothing runs there"),
    ],
)
def test_invalid_options_exit_2_with_a_message(options, message):
    result = run("check", *options)
    assert result.exit_code == 2, result.output
    # typer's own messages stand in a box.
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_json_is_the_report(tmp_path):
    result = run("check", *QUICK, "--json", tmp_path / "r.json")
    assert result.exit_code == 0
    read = json.loads((tmp_path / "r.json").read_text())
    expected = json.loads(check(None, ["torch:eager"], dtypes=["float32"], only=["basic"]).to_json())
    assert read["rows"] == expected["rows"]
    assert read.keys() == expected.keys()
    assert read["passed"] is True
