"""What the pages of check, bench and mismatch have in common: one self-contained HTML file, pictures as SVG inside."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any


def render_page(template: str, **values: Any) -> str:
    """A page from a template such as "check/page.html.j2"; everything that comes from the values is escaped."""
    import jinja2

    files = resources.files("loss_core")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(files.joinpath(template).read_text("utf-8"))
    return page.render(style=files.joinpath("page.css").read_text("utf-8"), **values)


@contextmanager
def blank_figure(width: float, height: float) -> Iterator[Any]:
    """An empty matplotlib figure that becomes an SVG; its text is drawn while the context lasts."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text stays text: small, selectable, and in the font of the page.
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
    """Leave out the lines above and to the right of a picture."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def svg_of(figure: Any, *, file: bool = False) -> str:
    """A figure as an SVG element for HTML, or as the text of an SVG file."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=not file, metadata={"Date": None})
    return out.getvalue() if file else _inline(out.getvalue())


def _inline(svg: str) -> str:
    """The SVG element alone, without the names of namespaces, which HTML knows."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    head, _, rest = element.partition(">")
    head = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    return f'{head} aria-hidden="true">{rest}'
