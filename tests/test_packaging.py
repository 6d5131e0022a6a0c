"""One list of versions, documented make targets, and the release workflow."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
PINS = {
    canonicalize_name(r.name): r
    for r in map(Requirement, re.findall(r"^[^#\n]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
}
# Its version follows from torch's own.
NOT_PINNED = {"triton"}
LINUX_ONLY = {"triton", "transformer-engine", "megatron-core"}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_requirement_is_a_range_that_includes_the_pin(requirement):
    name = canonicalize_name(requirement.name)
    if name == PROJECT["name"]:
        assert requirement.extras <= set(PROJECT["optional-dependencies"])
        return
    assert {clause.operator for clause in requirement.specifier} <= {">=", "<"}, "pins belong in constraints.txt"
    if name in NOT_PINNED:
        assert name not in PINS
    else:
        (clause,) = PINS[name].specifier
        assert clause.operator == "=="
        assert clause.version in requirement.specifier


def test_pre_commit_runs_the_installed_tools():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    for hook in repos[0]["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")
        assert "additional_dependencies" not in hook


@pytest.mark.parametrize(
    "name",
    [
        "pyproject.toml",
        "Makefile",
        ".ci/run",
        ".github/workflows/ci.yml",
        ".github/workflows/release.yml",
        "CONTRIBUTING.md",
    ],
)
def test_no_second_list_of_versions(name):
    assert re.findall(r"\w==\s*\d\S*", (ROOT / name).read_text()) == []


def test_the_release_publishes_only_after_the_checks():
    # "on" is a boolean in YAML 1.1.
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    jobs = workflow["jobs"]
    assert (jobs["publish"]["needs"], jobs["build"]["needs"]) == ("build", "check")
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    # The pattern with which the workflow reads the version.
    assert re.findall(r'^__version__ = "(.*)"$', (ROOT / "loss_core/__init__.py").read_text(), re.MULTILINE)


def test_extras_for_linux_carry_their_marker():
    for requirement in REQUIREMENTS:
        if requirement.name in LINUX_ONLY:
            assert requirement.marker is not None
            assert requirement.marker.evaluate({"platform_system": "Linux"})
            assert not requirement.marker.evaluate({"platform_system": "Darwin"})


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"^  make ([a-z-]+) ", shown, re.MULTILINE) == targets
