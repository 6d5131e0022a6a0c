"""Shared parts of the HTML reports of check, bench and mismatch: one self-contained file with inline SVG figures."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib import resources
from typing import Any

from loss_core import __version__


def render_page(template: str, **values: Any) -> str:
    """Render a template such as "check/page.html.j2"; all values are escaped.

    The template extends loss_core/page.html.j2, which uses the values that `head` returns.
    """
    import jinja2

    loader = jinja2.FunctionLoader(_text)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(template).render(style=_text("page.css"), **values)


def _text(file: str) -> str:
    return resources.files("loss_core").joinpath(file).read_text("utf-8")


def head(verdict: str, *, good: bool, command: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Template values for the head of a report.

    Args:
        verdict: such as "PASS: all agree".
        command: command line that produced the report.
        versions: name -> version of the other libraries that were used.
    """
    state, _, summary = verdict.partition(": ")
    date = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return {
        "state": state,
        "summary": summary[:1].upper() + summary[1:],
        "bad": not good,
        "command": command,
        "facts": {"loss-core": __version__, **versions, "date": date},
    }


@contextmanager
def blank_figure(width: float, height: float) -> Iterator[Any]:
    """An empty matplotlib figure for `svg_of`, which must be called inside the context."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text is stored as text: small, selectable, and in the font of the page.
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "loss-core",
        "font.family": "sans-serif",
        "font.size": 11,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def without_frame(axes: Any) -> None:
    """Hide the top and right borders of a plot."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def svg_of(figure: Any, *, file: bool = False) -> str:
    """A figure as an SVG element for HTML, or as the text of an SVG file."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=not file, metadata={"Date": None})
    return out.getvalue() if file else _inline(out.getvalue())


def _inline(svg: str) -> str:
    """The svg element for HTML, without metadata, size and namespaces, which HTML does not need."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    head, _, rest = element.partition(">")
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    return f'{head} aria-hidden="true">{rest}'
