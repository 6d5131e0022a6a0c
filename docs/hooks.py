"""What MkDocs does not do by itself: formulas without scripts, and links to files of the repository outside of docs/.

Formulas become MathML, which browsers draw themselves, so that a page loads nothing from elsewhere. Links such as
`../BENCHMARKS.md` work where the repository is browsed; in the site they lead to a copy of the file in `repository/`.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

# Pages, pictures and sources that pages link to; each lies under this folder as it lies in the repository.
FOLDER = "repository"
COPIED = ("BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/benchmarks/*.md", "examples/benchmarks/*.svg",
          "examples/*.py", "examples/*.yaml", "loss_core/row_terms/*.py", "loss_core/losses/**/*.py",
          "loss_core/mismatch/**/*.py", "backends/loss_core_torch/auto.py",
          "backends/loss_core_torch/kernels/__init__.py", "tests/on_torch/kernels/gpu/predicted.py")  # fmt: skip

# A link to this folder, which has no page.
FOLDER_LINK = re.compile(r"\[([^\]]+)\]\(examples/benchmarks\)")
LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the copies."""
    root = Path(config.config_file_path).parent
    for path in sorted(found for pattern in COPIED for found in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        files.append(File.generated(config, f"{FOLDER}/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that leave docs/ to the copies."""
    folder = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return FOLDER_LINK.sub(r"\1", markdown)

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if not target.startswith("../"):
            return match[0]
        copy = posixpath.relpath(f"{FOLDER}/{target.removeprefix('../')}", folder or ".")
        return f"{match[1]}{copy}{match[3]}"

    return LINK.sub(lead, markdown)


def on_page_content(page_html: str, page: Any, **_: Any) -> str:
    """Formulas as MathML; one that can't be read is an error."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        text = html.unescape(match[2])
        formula: str = convert(text, display=display)
        # A command that it does not know is copied; a brace that is not closed is closed by itself.
        if "\\" in formula or text.count("{") != text.count("}"):
            raise PluginError(f"{page.file.src_uri}: can't read the formula {text}")
        return f'<div class="formula">{formula}</div>' if display == "block" else formula

    return FORMULA.sub(mathml, page_html)
