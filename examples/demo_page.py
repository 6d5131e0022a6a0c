"""The page of demo.py: one self-contained HTML file with the figure as inline SVG."""

from __future__ import annotations

import io
import json
import math
import platform
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loss_core.dtypes import float_format

if TYPE_CHECKING:
    from demo import Result

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A8F98"
U = float_format("float32").u

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": "#30343b",
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#eceef1",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.hspace": 0.06,
    "svg.hashsalt": "loss_core",  # the same ids in every run
}

_STYLE = """
:root { color-scheme: light }
body { margin: 0; background: #f6f7f9; color: #1d2026;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 900px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 29px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.01em }
h2 { font-size: 18px; margin: 36px 0 10px }
p { margin: 0 0 12px } .lead { font-size: 17px; color: #444a54; max-width: 46em }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 24px 0 }
.card { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 12px 14px }
.card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums }
.card span { font-size: 13px; line-height: 1.35; color: #5b616b; display: block }
.card .number { display: inline; font: inherit; color: inherit; white-space: nowrap }
sup { font-size: .7em; line-height: 0 } .note { font-size: 14px; color: #444a54; margin-top: 8px }
.good b { color: #00704f } .bad b { color: #b3261e }
figure { margin: 0; background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 16px 14px 12px }
figure svg { width: 100%; height: auto; display: block }
figcaption { font-size: 14px; color: #444a54; padding: 10px 6px 0 }
.scroll { overflow-x: auto; background: #fff; border: 1px solid #e2e5ea; border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid #eceef1; white-space: nowrap }
th { color: #5b616b; font-weight: 600 } th:first-child, td:first-child { text-align: left }
tr:last-child td { border-bottom: 0 }
code, pre { font: 13.5px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
pre { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 12px 14px; overflow-x: auto; margin: 0 }
@media (max-width: 700px) { .cards { grid-template-columns: repeat(2, 1fr) } }
"""


def write_page(path: Path, result: Result, steps: int) -> None:
    """Write the HTML page of a result."""
    first, second = result.first, result.second
    gap = max(result.worst.between.values())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "jax", "numpy"))
    verdict = (
        f"At every compared step the gradients agree: no element is beyond {result.error_ratio:.0%} of what rounding "
        "allows."
        if result.agree
        else f"The backends DISAGREE: the worst element is {result.error_ratio:.3g} times what rounding allows."
    )
    cards = "".join(
        f'<div class="card {kind}"><b>{value}</b><span>{label}</span></div>'
        for value, label, kind in (
            (f"{first.valid_loss:.4f}", f"nats per held-out byte ({second.kernel}: {second.valid_loss:.4f})", ""),
            (_power(result.loss_gap), f"between the two held-out losses (control: {_power(result.control_gap)})", ""),
            (_power(gap), f"largest relative gradient difference: {gap / U:.1f} unit roundoffs of float32", ""),
            (f"{result.error_ratio:.0%}", "of its allowance: the worst element, against float64",
             "good" if result.agree else "bad"),
        )
    )  # fmt: skip
    path.write_text(
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>One model, two loss backends: {escape(first.kernel)} and {escape(second.kernel)}</title>
<style>{_STYLE}</style>
<main>
<h1>One model, two loss backends</h1>
<p class="lead">A byte-level transformer in PyTorch, trained for {steps} steps on Python's standard library, once
with its loss on <code>{escape(first.kernel)}</code> and once on <code>{escape(second.kernel)}</code>. Only the flag
differs. {verdict}</p>
<div class="cards">{cards}</div>
<figure>
{figure(result)}
<figcaption>Top: both loss curves. Middle: their difference at each step, and that of a control,
<code>{escape(first.kernel)}</code> against itself with each initial parameter moved to the next float32. Bottom: the
gradients of both backends at the same parameters and batch. A derived bound is what the rounding of each operation can
add up to.
</figcaption>
</figure>
<h2>Gradients at the same parameters and batch</h2>
<div class="scroll">{_table(result)}</div>
<p class="note">2-norms, relative to the gradient. The first three columns are the first backend minus the second; the
next two are each backend minus float64, over the gradients of the loss's own arguments together.
u = 2<sup>−24</sup> = {_power(U)} is the unit roundoff of float32. The ratio is that of the worst single element of
loss and gradients, of either backend against float64; above 100% rounding does not explain it.</p>
<h2>Why curves may drift while gradients agree</h2>
<p>Training in float32 is chaotic: a difference in the last bit can grow from step to step, so two correct backends may
end at losses that differ, as may two runs of one backend that start one rounding apart (the control). At the same
parameters nothing accumulates: there each element of loss and gradients is compared with a derived bound, and this
comparison decides.</p>
<h2>What was run</h2>
<pre>{escape(_settings(result, steps))}</pre>
<p class="note">{escape(versions)}, Python {platform.python_version()},
{escape(platform.system())} {escape(platform.machine())}</p>
</main>
</html>
""",
        encoding="utf-8",
    )


def _power(value: float) -> str:
    """A number in scientific notation, as HTML."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f'<span class="number">{digits} × 10<sup>{int(exponent)}</sup></span>'.replace("-", "−")


def _settings(result: Result, steps: int) -> str:
    first, second = result.first, result.second
    fields = ", ".join(f"{key}: {json.dumps(value)}" for key, value in first.config.items())
    runs = "\n".join(
        f"train_byte_lm.py --steps {steps} --seed {curve.seed} --backend {curve.backend:<11}"
        f" # {curve.seconds:.1f} s, ran {curve.kernel}"
        for curve in (first, second)
    )
    return f"loss: {{{fields}}}\n{runs}"


def _table(result: Result) -> str:
    names = list(result.gaps[0].between)
    flags = list(result.gaps[0].from_float64)
    head = ["step", *(f"{escape(name)}" for name in names), *(f"{escape(flag)} − float64" for flag in flags), "ratio"]
    rows = [
        [
            str(gap.step + 1),
            *(f"{gap.between[name]:.1e}" for name in names),
            *(f"{gap.from_float64[flag]:.1e}" for flag in flags),
            f"{gap.error_ratio:.0%}",
        ]
        for gap in result.gaps
    ]
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{cells}</table>"


def figure(result: Result) -> str:
    """The three panels as an SVG element."""
    with mpl.rc_context(_RC):
        fig = Figure(figsize=(9, 9.6), layout="constrained")
        top, middle, bottom = fig.subplots(3, 1, sharex=True, height_ratios=(1.15, 1, 1.15))
        _curves(top, result)
        _differences(middle, result)
        _gradients(bottom, result)
        bottom.set_xlabel("training step")
        buffer = io.StringIO()
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _steps(values: list[float]) -> np.ndarray:
    return np.arange(1, len(values) + 1)


def _curves(ax: Axes, result: Result) -> None:
    first, second = result.first, result.second
    ax.plot(_steps(first.losses), first.losses, color=BLUE, lw=3.2, alpha=0.4, label=first.kernel)
    ax.plot(_steps(second.losses), second.losses, color=ORANGE, lw=1.0, label=second.kernel)
    ax.set_title("Training loss")
    ax.set_ylabel("nats per byte")
    bits = ax.secondary_yaxis("right", functions=(_nats_to_bits, _bits_to_nats))
    bits.set_ylabel("bits per byte")
    bits.spines["right"].set_visible(True)
    ax.legend(loc="upper right")


def _nats_to_bits(nats: Any) -> Any:
    return nats / math.log(2)


def _bits_to_nats(bits: Any) -> Any:
    return bits * math.log(2)


def _differences(ax: Axes, result: Result) -> None:
    first = np.array(result.first.losses)
    ulp = float(np.spacing(np.float32(np.median(first))))
    # float32 losses differ by multiples of their spacing, or by 0, which has no logarithm.
    floor = ulp / 4
    for curve, color, label in (
        (result.control, GREY, f"control: {result.first.kernel}, parameters one rounding off"),
        (result.second, ORANGE, f"{result.first.kernel} and {result.second.kernel}"),
    ):
        difference = np.maximum(np.abs(first - np.array(curve.losses)), floor)
        ax.plot(_steps(curve.losses), difference, ".", ms=4, color=color, label=label)
    steps, bound = [gap.step + 1 for gap in result.gaps], [gap.allowed_loss for gap in result.gaps]
    ax.plot(steps, bound, ls="--", lw=1.1, color=ORANGE, label="derived bound at the same parameters")
    _mark(ax, ulp, f"{ulp:.1e}: float32\nspacing")
    ax.set_yscale("log")
    ax.set_yticks([*(10.0**n for n in range(-6, 1)), floor], [*(f"$10^{{{n}}}$" for n in range(-6, 1)), "equal"])
    ax.minorticks_off()
    ax.set_ylim(floor / 1.8, 100 * max(*bound, np.abs(first - np.array(result.second.losses)).max()))
    ax.set_title(
        f"Difference of the losses, {result.first.kernel} − {result.second.kernel}, each at its own parameters"
    )
    ax.set_ylabel("nats per byte")
    ax.legend(loc="upper left")


def _mark(ax: Axes, y: float, text: str) -> None:
    """A dotted horizontal line, labelled at its right end."""
    ax.axhline(y, color="#30343b", lw=0.9, ls=":")
    ax.text(1.008, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8, color="#30343b")


def _gradients(ax: Axes, result: Result) -> None:
    steps = [gap.step + 1 for gap in result.gaps]
    names = list(result.gaps[0].between)
    for name, color, marker in zip(names, (BLUE, GREEN, PURPLE), "osD", strict=False):
        values = [gap.between[name] for gap in result.gaps]
        ax.plot(steps, values, marker=marker, ms=4, lw=1.3, color=color, label=name)
    for name, color in zip(result.gaps[0].allowed, (BLUE, GREEN), strict=False):
        values = [gap.allowed[name] for gap in result.gaps]
        ax.plot(steps, values, ls="--", lw=1.1, color=color, label=f"derived bound, {name}")
    _mark(ax, U, "u = 2⁻²⁴, unit\nroundoff")
    ax.set_yscale("log")
    top = max(value for gap in result.gaps for value in (*gap.allowed.values(), *gap.between.values()))
    ax.set_ylim(U / 3, 60 * top)  # room for the legend
    ax.set_title(
        f"Relative difference of the gradients, {result.first.kernel} − {result.second.kernel}, same parameters"
    )
    ax.set_ylabel("‖difference‖ / ‖gradient‖")
    ax.legend(loc="upper left", ncols=2)
