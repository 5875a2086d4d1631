"""
The diagrams of the lessons, one idea each. Every function below draws one, and its name is that of
the file. Wide enough for a slide:

    python notebooks/figures.py                 # writes notebooks/figures/*.svg
"""

import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "vdm", "font.family": "sans-serif",
                     "font.size": 12})                       # text stays text: small, searchable
BLUE = "#3b6fb6"        # space: pictures, frames
RED = "#c8503c"         # time
GREY = "#888888"
DRAWINGS = {}

def drawing(draw):
    """Register a diagram under the name of its function."""
    DRAWINGS[draw.__name__] = draw
    return draw

def canvas(width, height):
    """Empty axes of this size in inches, whose units are inches."""
    figure, axes = plt.subplots(figsize=(width, height))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes

def box(axes, x, y, text, width=1.4, height=0.6, color=BLUE):
    """A box with text, centred at (x, y)."""
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor="white",
                                  boxstyle="round,pad=0,rounding_size=0.08", edgecolor=color,
                                  linewidth=2))
    axes.text(x, y, text, ha="center", va="center")

def arrow(axes, start, end, color="black", bend=0.0, text="", shift=(0, 0.15)):
    """An arrow from start to end with a text beside its middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=color,
                                   connectionstyle=f"arc3,rad={bend}", linewidth=1.8,
                                   shrinkA=0, shrinkB=0))
    middle = [(a + b) / 2 + c for a, b, c in zip(start, end, shift)]
    axes.text(*middle, text, ha="center", va="center", color=color)

# ---- lesson 01 -----------------------------------------------------------------------------------

@drawing
def denoising():
    """One step of sampling."""
    axes = canvas(9, 3.2)
    guess = (1.4, 0.9)
    x = (7.6, 2.5)
    step = (5.1, 1.855)
    arrow(axes, step, guess, GREY)
    arrow(axes, x, step, RED)
    for place, color in ((guess, BLUE), (x, "black"), (step, RED)):
        axes.plot(*place, "o", color=color, markersize=11)
    axes.text(1.4, 0.5, "guess: the mean of all\nclean points behind x", ha="center", va="top",
              color=BLUE)
    axes.text(7.6, 2.85, "x, at noise level s", ha="center", va="center")
    axes.text(5.4, 1.3, "one step: the next x, at level t\nguess + t · estimated noise", ha="left",
              va="center", color=RED)
    axes.text(3.6, 2.25, "estimated noise\n(x - guess) / s", ha="center", va="center", color=GREY)

# ---- lesson 07 -----------------------------------------------------------------------------------

@drawing
def action_embedding():
    """How the action of one frame enters the network."""
    axes = canvas(10.5, 3.9)
    rows = (("told", 3.0, "1 0 0 0   -0.7 -0.7", "1 1 1 1   1 1"),
            ("motion withheld", 2.0, "1 0 0 0   nan nan", "1 1 1 1   0 0"),
            ("nothing told", 1.0, "nan nan nan nan   nan nan", "0 0 0 0   0 0"))
    for name, y, action, told in rows:
        axes.text(0.15, y, name, va="center", color=GREY)
        axes.text(2.9, y, action.replace("nan", "?"), ha="center", va="center", family="monospace")
        axes.text(4.9, y, told, ha="center", va="center", family="monospace", color=GREY)
    axes.text(2.9, 3.5, "action[t]\n(? is NaN, goes in as 0)", ha="center", va="center")
    axes.text(4.9, 3.5, "told?", ha="center", va="center", color=GREY)
    box(axes, 6.8, 2.0, "linear, no bias\n0 at first", 1.5, 0.9, RED)
    axes.plot(8.35, 2.0, "o", color="black", markersize=18, markerfacecolor="white")
    axes.text(8.35, 1.98, "+", ha="center", va="center")
    box(axes, 8.35, 0.55, "embedded sigma", 1.8, 0.6, GREY)
    box(axes, 9.6, 3.3, "gain and shift\nof frame t,\nin every block", 1.6, 1.0)
    for y in (3.0, 2.0, 1.0):
        arrow(axes, (5.7, y), (6.05, 2.0 + 0.25 * (y - 2)), GREY)
    arrow(axes, (7.55, 2.0), (8.18, 2.0), RED)
    arrow(axes, (8.35, 0.85), (8.35, 1.82), GREY)
    arrow(axes, (8.52, 2.1), (9.5, 2.78))

@drawing
def ride():
    """How a model of four frames drives on: three are given, one is new."""
    axes = canvas(9, 3.4)
    side = 0.62
    for row, (y, first) in enumerate(((2.3, 0), (1.3, 1), (0.3, 2))):
        axes.text(0.2, y + side / 2, f"window {row + 1}", va="center")
        for k in range(first, first + 4):
            x = 1.6 + 0.9 * k
            new = k == first + 3
            axes.add_patch(Rectangle((x, y), side, side, facecolor="white" if new else BLUE,
                                     edgecolor=BLUE, linewidth=2))
            axes.text(x + side / 2, y + side / 2, k, ha="center", va="center",
                      color="black" if new else "white")
        if row < 2:
            x = 1.6 + 0.9 * (first + 3) + side / 2
            arrow(axes, (x, y - 0.02), (x, y - 1 + side + 0.04), GREY)
    for k, key in enumerate("XXXSSL"):
        axes.text(1.6 + 0.9 * k + side / 2, 3.15, key, ha="center", va="center", color=RED)
    axes.text(0.2, 3.15, "command", va="center", color=RED)
    axes.text(7.2, 3.15, "leads to the frame\nbelow it", va="center", color=RED)
    axes.text(7.2, 1.6, "blue: given\nwhite: generated", va="center", color=BLUE)

def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "figures")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw()
        plt.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close()

if __name__ == "__main__":
    main()
