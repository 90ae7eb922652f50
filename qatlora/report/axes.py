"""What all plots share: panels, colours, and one colour and marker per kind of tensor.

Figures are built without pyplot, so nothing global is touched. Colours are those of Okabe and Ito
("Color Universal Design", 2008), told apart by line style and marker as well.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PANEL_INCHES = (5.6, 4.0)
DOTS_PER_INCH = 140

BLUE, SKY, GREEN, BLACK = "#0072B2", "#56B4E9", "#009E73", "#000000"
AMBER, VERMILION, PURPLE, GREY = "#E69F00", "#D55E00", "#CC79A7", "#6F6F6F"

KIND_STYLES = {
    "q": (BLUE, "o"),
    "k": (SKY, "s"),
    "v": (GREEN, "^"),
    "o": (BLACK, "D"),
    "gate": (AMBER, "v"),
    "up": (VERMILION, "P"),
    "down": (PURPLE, "X"),
}
OTHER_STYLES = ((GREY, "*"), (BLUE, "x"), (VERMILION, "+"))


def new_panels(number: int, *, share_axes: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `number` panels side by side, with the look that all plots share."""
    width, height = PANEL_INCHES
    figure = Figure(
        figsize=(width * max(number, 2) if number > 1 else width * 1.4, height),
        dpi=DOTS_PER_INCH,
        layout="constrained",
        facecolor="white",
    )
    axes = figure.subplots(1, number, squeeze=False, sharex=share_axes, sharey=share_axes)[0]
    for axis in axes:
        axis.grid(visible=True, color="#DDDDDD", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelleft=True)
    return figure, list(axes)


def whole_numbers() -> MaxNLocator:
    """Ticks for layers and steps."""
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])
