"""The page's charts: matplotlib's SVG, put into the page, in colours that show on light and on dark ground."""

import io
import re
from dataclasses import dataclass

from markupsafe import Markup

from fitune.report.run_files import Points

COLOURS = ("#2f7ed8", "#e8710a", "#1a9e77", "#a55ad1", "#d64550", "#8a8d0f", "#0f9bb3", "#c2579b")
TEXT = "#010101"
"Stands for the page's text colour until the SVG is put into it."
POINTS_A_CHART = 1600
"Over all curves: the page must stay small however many lines a run logged."
MANY = 120
"Points from which on a noisy curve has its mean drawn."
ABOVE = {"frameon": False, "fontsize": 9, "loc": "lower left", "bbox_to_anchor": (0, 1)}
"A legend's place."
SIZE_INCHES = (4.4, 2.7)
"So that text is about as large as the page's on a phone, where a chart fills the width."


@dataclass(frozen=True)
class Curve:
    label: str
    points: Points
    colour: int = 0
    "Number in COLOURS."
    dashed: bool = False
    noisy: bool = True
    "Whether the running mean is drawn over many points."


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup


def line_chart(title: str, unit: str, curves: list[Curve]) -> Chart | None:
    """Values over optimizer steps; None without a point. Over many noisy ones their running mean is drawn."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    most = POINTS_A_CHART // len(curves)

    def draw(axes) -> None:
        lines = [_draw_curve(axes, curve, most) for curve in curves]
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        if len(curves) > 1:  # told, as matplotlib leaves out names that begin with _
            axes.legend(lines, [curve.label for curve in curves], **ABOVE)

    shown = ", ".join(
        f"{curve.label or title}: {curve.points[-1][1]:.4g} at step {curve.points[-1][0]:g}" for curve in curves
    )
    return _chart(
        title, f"{title} ({unit}) over optimizer steps. {shown}", draw, height=SIZE_INCHES[1] + 0.14 * (len(curves) - 1)
    )


def _draw_curve(axes, curve: Curve, most: int):
    """The line that stands for the curve in the legend."""
    style = {"color": COLOURS[curve.colour % len(COLOURS)], "linestyle": "--" if curve.dashed else "-"}
    steps, values = zip(*thinned(curve.points, most), strict=True)
    if len(curve.points) < MANY or not curve.noisy:
        few = {"marker": "o", "markersize": 3} if len(curve.points) < (60 if curve.dashed else 8) else {}
        return axes.plot(steps, values, linewidth=1.3, **style, **few)[0]
    axes.plot(steps, values, linewidth=0.6, alpha=0.35, **style)
    means = thinned(running_means(curve.points, len(curve.points) // 40), most)
    return axes.plot(*zip(*means, strict=True), linewidth=1.5, **style)[0]


def phase_chart(title: str, planned: dict[str, float], measured: dict[str, float]) -> Chart:
    """GiB by phase as bars, longest phase name outside; what was measured as lines across them."""

    def draw(axes) -> None:
        names = list(planned)[::-1]
        axes.barh(names, [planned[name] for name in names], color=COLOURS[0], alpha=0.55, label="planned")
        for number, (name, value) in enumerate(measured.items(), start=1):
            axes.axvline(value, color=COLOURS[number], linewidth=1.5, label=f"measured, {name}")
        axes.set_xlabel("GiB")
        axes.legend(**ABOVE)

    values = [f"planned, {name}: {value:.2f} GiB" for name, value in planned.items()]
    values += [f"measured, {name}: {value:.2f} GiB" for name, value in measured.items()]
    return _chart(title, f"{title}. {'; '.join(values)}", draw, height=1.5 + 0.2 * len(planned))


def histogram_chart(title: str, bins: dict[str, int]) -> Chart:
    """Rows by number of tokens; a bin's name is its upper edge."""

    def draw(axes) -> None:
        axes.bar([f"≤ {int(edge):,}" for edge in bins], list(bins.values()), color=COLOURS[0])
        axes.set_ylabel("rows")
        axes.set_xlabel("tokens of a row")
        axes.tick_params(axis="x", rotation=40 if len(bins) > 5 else 0)

    values = ", ".join(f"up to {edge} tokens: {count} rows" for edge, count in bins.items())
    return _chart(title, f"{title}. {values}", draw)


def thinned(points: Points, most: int) -> Points:
    """At most so many points: of each stretch the lowest and the highest, so that no spike gets lost."""
    if len(points) <= most:
        return points
    stretches = max(1, most // 2)
    kept = []
    for i in range(stretches):
        stretch = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def running_means(points: Points, width: int) -> Points:
    """At every point the mean of the last `width` values, or of as many as there are."""
    means, total = [], 0.0
    for i, (step, value) in enumerate(points):
        total += value - (points[i - width][1] if i >= width else 0.0)
        means.append((step, total / min(i + 1, width)))
    return means


def _chart(title: str, description: str, draw, height: float = SIZE_INCHES[1]) -> Chart:
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "axes.spines.top": False,
        "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "grid.alpha": 0.15,
        "text.parse_math": False,  # a run's name may hold any sign
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color",
                         "grid.color"), TEXT),
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(SIZE_INCHES[0], height), layout="constrained")
        draw(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title, _for_page(written.getvalue(), description))


def _for_page(svg: str, description: str) -> Markup:
    """The <svg> element alone, named for screen readers, as wide as its place, in the page's colours.

    Names that nothing refers to are taken out: every chart has a `figure_1`, the page may have one.
    """
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.S)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', opening)[0]
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', rest))
    rest = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", rest)
    return Markup("<svg {} role='img' aria-label='{}'>{}").format(
        Markup(box), description, Markup(rest.replace(TEXT, "currentColor").replace("xlink:href", "href"))
    )
