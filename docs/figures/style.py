"""The look of all figures: legible on a white page and on a dark one, small, the same each time.

The background is transparent. Text and colours have a contrast of at least 4 to 1 both with white
and with #0d1117, the page of GitHub's dark theme: so all are of about one brightness.
"""

import re

import matplotlib
from matplotlib import pyplot

GREY = "#747a83"
BLUE, ORANGE, GREEN, RED = "#2f77e1", "#c15d0a", "#148c3d", "#e23640"
PURPLE, TEAL, GOLD, PINK = "#975ed0", "#0b8787", "#9a730d", "#cf4096"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, TEAL, RED, GOLD, PINK)
# A reference, which another curve lies on: rings around its points.
RINGS = {
    "color": ORANGE, "marker": "o", "markersize": 6, "markerfacecolor": "none", "linestyle": "none",
}  # fmt: skip
WIDTH = 7.5  # inches
SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # text stays text: small, and the browser's fonts
    "svg.hashsalt": "gpt3jax",  # the same names each time
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY
    ),
}  # fmt: skip
NUMBERS = re.compile(r' (?:d|x|y|transform)="[^"]*"')


def panels(n_rows, height, **ratios):
    """Return a figure and its panels, one below the other."""
    matplotlib.use("svg")
    pyplot.rcParams.update(SETTINGS)
    return pyplot.subplots(n_rows, figsize=(WIDTH, height), squeeze=False, **ratios)


def label(panel, x, y, text, **look):
    """Write text a little to the right of a point."""
    panel.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", **look)


def told(source):
    """Return where the data of a figure are from, as its last line says it."""
    code = source["commit"].replace("+", " and changes not committed")
    return (
        f"commit {code}, {source['date']}, jax {source['jax']}, Python {source['python']}, "
        f"{source['machine']}"
    )


def save(figure, file, title, source):
    """Write a figure as SVG; its last line and its metadata say where the data are from."""
    figure.supxlabel(told(source), x=0.01, ha="left", fontsize=7)
    metadata = {"Title": title, "Source": f"gpt3jax, {told(source)}", "Creator": None, "Date": None}
    figure.savefig(file, format="svg", metadata=metadata)
    pyplot.close(figure)
    file.write_text(rounded(file.read_text()))


def rounded(svg):
    """Return an SVG whose coordinates have one decimal: 1/10 of a point."""
    short = re.compile(r"(\.\d)\d+")
    text = NUMBERS.sub(lambda match: short.sub(r"\1", match.group()), svg)
    text = text.replace(" \nL ", " ")  # what follows M is a line without saying so
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
