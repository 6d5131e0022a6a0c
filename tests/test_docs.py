"""The pages of docs/ do what they say: Python blocks run, what they print is what stands below them, commands parse.

    ```python           one namespace a page; a ```text block right below holds what is printed (`...` for anything)
    ```sh               each line `loss-core ...` has its options read
    ```yaml title="x"   a file x in the folder in which the page runs

A comment in the line above a block says more: `<!-- no-run -->` that a Python block is only compiled, since it needs
several processes or another library; `<!-- needs:x -->` the same where x is not installed; `<!-- run -->` that the
commands are run, too, and must succeed.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import itertools
import re
import shlex
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from loss_core import LOSS_CONFIG_REGISTRY, unregister_loss
from loss_core.baselines import JUDGED
from loss_core.cli.app import app
from loss_core.cli.common import read_losses
from loss_core.losses.cases.drawing import recipe_names

ROOT = Path(__file__).resolve().parents[1]
# One process imports both frameworks for all pages.
pytestmark = pytest.mark.xdist_group("docs")

PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"(?:^<!-- (\S+) -->\n)?^```(\S*)[ ]*([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'title="([^"]+)"')
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    mark: str | None
    language: str
    options: str
    text: str
    line: int
    printed: str | None


def blocks(path):
    text = path.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    for match, after in itertools.zip_longest(found, found[1:]):
        below = after is not None and after[2] == "text" and not text[match.end() : after.start()].strip()
        line = text.count("\n", 0, match.start(4)) + 1
        yield Block(match[1], match[2], match[3], match[4], line, after[4] if below else None)


def pages_with(language):
    found = [path for path in PAGES if any(block.language == language for block in blocks(path))]
    return pytest.mark.parametrize("path", found, ids=lambda path: path.relative_to(ROOT).as_posix())


def installed(library):
    return importlib.util.find_spec(library) is not None


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A module to run a page in, in a folder of its own; losses that it registers go with it."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page_of_docs")
    # As torchrun would start one process; port 0 is a free one.
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = set(LOSS_CONFIG_REGISTRY)
    yield module
    for name in set(LOSS_CONFIG_REGISTRY) - known:
        unregister_loss(name)


@pages_with("python")
def test_python_blocks_run(path, page, tmp_path):
    for block in blocks(path):
        if (title := TITLE.search(block.options)) is not None:
            (tmp_path / title[1]).write_text(block.text, encoding="utf-8")
        if block.language != "python":
            continue
        # Blank lines in front, so that an error names the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
        if block.mark == "no-run" or ((block.mark or "").startswith("needs:") and not installed(block.mark[6:])):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, vars(page))
        assert doctest.OutputChecker().check_output(block.printed or "", printed.getvalue(), SAME), (
            f"{path}:{block.line} prints\n{printed.getvalue()}"
        )


@pages_with("sh")
def test_commands_exist(path, page, tmp_path):
    group = typer.main.get_command(app)
    for block in blocks(path):
        if (title := TITLE.search(block.options)) is not None:
            (tmp_path / title[1]).write_text(block.text, encoding="utf-8")
        if block.language != "sh":
            continue
        lines = block.text.replace("\\\n", " ").splitlines()
        commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("loss-core ")]
        for name, *words in commands:
            # Without what a shell does with the output.
            arguments = words[: words.index(">")] if ">" in words else words
            with group.commands[name].make_context(name, list(arguments)):
                pass
            if block.mark == "run":
                done = CliRunner().invoke(app, [name, *arguments])
                assert done.exit_code == 0, f"{path}:{block.line}: {name}\n{done.output}"


RECORD = ROOT / "docs" / "defects.md"
RECORDED = re.findall(r"\| `(--implementation [^`]+)`", RECORD.read_text(encoding="utf-8"))


def test_the_record_names_projects_losses_and_cases_that_exist():
    assert len(RECORDED) > 20
    for words in map(shlex.split, RECORDED):
        given = dict(zip(words[::2], words[1::2], strict=True))
        assert given["--implementation"] in JUDGED
        assert given["--case"] in recipe_names()
        assert read_losses([given["--config"]])


@pytest.mark.parametrize("command", [words for words in RECORDED if " torch-own " in words])
def test_the_record_of_torch_itself_is_reproduced(command):
    torch = pytest.importorskip("torch")
    if not torch.__version__.startswith("2.13.0"):
        pytest.skip("the record is of torch 2.13.0")
    done = CliRunner().invoke(app, ["check", *shlex.split(command)])
    assert (done.exit_code, "BROKEN" in done.output) == (1, True), done.output
