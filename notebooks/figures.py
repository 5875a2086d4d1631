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

# ---- lesson 09 -----------------------------------------------------------------------------------

@drawing
def lora():
    """A frozen matrix, and a branch of low rank beside it."""
    axes = canvas(9, 3.6)
    box(axes, 0.8, 1.8, "x", 0.8, 1.6, GREY)
    box(axes, 4.0, 2.7, "W, frozen\nd_out × d_in", 2.2, 1.2, GREY)
    box(axes, 2.9, 0.8, "A, random\nr × d_in", 1.5, 1.0, RED)
    box(axes, 5.1, 0.8, "B, 0 at first\nd_out × r", 1.5, 1.0, RED)
    box(axes, 6.7, 1.8, "+", 0.6, 0.6, "black")
    box(axes, 8.3, 1.8, "W x + B A x", 1.3, 1.6, GREY)
    arrow(axes, (1.2, 2.2), (2.88, 2.7))
    arrow(axes, (1.2, 1.4), (2.13, 0.9), RED)
    arrow(axes, (3.65, 0.8), (4.33, 0.8), RED)
    axes.text(4.0, 0.12, "through r channels", ha="center", va="center", color=RED)
    arrow(axes, (5.1, 2.7), (6.4, 1.95))
    arrow(axes, (5.85, 0.8), (6.4, 1.6), RED)
    arrow(axes, (7.0, 1.8), (7.63, 1.8))

@drawing
def inversion():
    """Up to the noise of a clip, and down again to an edited one."""
    axes = canvas(9, 3.4)
    box(axes, 1.2, 0.7, "the clip", 1.6, 0.8, BLUE)
    box(axes, 7.6, 0.7, "the edited clip", 1.9, 0.8, RED)
    box(axes, 3.6, 2.8, "its own noise", 1.9, 0.7, GREY)
    box(axes, 6.3, 2.8, "fresh noise", 1.7, 0.7, GREY)
    arrow(axes, (1.5, 1.1), (3.2, 2.45), GREY, text="up: invert", shift=(-0.75, 0.1))
    arrow(axes, (3.9, 2.45), (7.0, 1.1), RED)
    arrow(axes, (6.4, 2.45), (7.4, 1.1), RED, text="down: sample", shift=(0.85, 0.1))
    arrow(axes, (2.0, 0.7), (6.65, 0.7), BLUE, text="first frames, edited by hand, are given",
          shift=(0, -0.25))

# ---- lesson 10 -----------------------------------------------------------------------------------

@drawing
def file_to_clip():
    """A long, wide video becomes a clip for the network."""
    axes = canvas(9, 3.2)
    for k in range(10):                                          # the file: frames wider than high
        here = k in (3, 6, 9)
        left = 0.3 + 0.24 * k
        bottom = 1.0 + 0.1 * k
        axes.add_patch(Rectangle((left, bottom), 1.0, 0.75, facecolor="white", linewidth=1.5,
                                 edgecolor=RED if here else GREY))
        if here:                                                           # its middle is a square
            axes.add_patch(Rectangle((left + 0.125, bottom), 0.75, 0.75, linewidth=1.5,
                                     facecolor="#dbe5f3", edgecolor=BLUE))
    axes.text(1.9, 0.5, "a file: crop the middle,\ntake every third frame", ha="center",
              va="center")
    arrow(axes, (4.0, 1.6), (5.0, 1.6), text="shrink", shift=(0, 0.25))
    for k in range(3):
        axes.add_patch(Rectangle((5.3 + 0.3 * k, 1.1 + 0.15 * k), 0.7, 0.7, facecolor="#dbe5f3",
                                 edgecolor=BLUE, linewidth=1.5))
    axes.text(6.0, 0.5, "bytes 0 ... 255\n(T, h, w, C)", ha="center", va="center")
    arrow(axes, (6.9, 1.6), (7.5, 1.6), text="scale", shift=(0, 0.25))
    box(axes, 8.2, 1.6, "-1 ... 1", 1.2, 0.9)
    axes.text(8.2, 0.5, "for the network\n(T, C, h, w)", ha="center", va="center")

def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "figures")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw()
        plt.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close()

if __name__ == "__main__":
    main()
