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

def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "figures")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw()
        plt.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close()

if __name__ == "__main__":
    main()
