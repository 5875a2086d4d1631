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

# ---- lesson 08 -----------------------------------------------------------------------------------

@drawing
def latent_pipeline():
    """Three trainings in a row: what learns in each has a colour."""
    axes = canvas(10, 4.0)
    rows = (3.5, "1. frames", BLUE, BLUE), (2.3, "2. clips", GREY, RED), (0.9, "3. clips", GREY, GREY)
    for y, name, encoder, decoder in rows:
        axes.text(0.1, y, name, va="center")
        arrow(axes, (1.1, y), (1.6, y))
        box(axes, 2.3, y, "encoder", color=encoder)
        box(axes, 7.2, y, "decoder", color=decoder)
        arrow(axes, (7.9, y), (8.4, y))
    for y in (3.5, 2.3):
        arrow(axes, (3.0, y), (6.5, y), text="latents", shift=(0, 0.2))
    axes.text(9.2, 3.5, "both learn", color=BLUE, ha="center", va="center")
    axes.text(9.2, 2.3, "its temporal\nlayers learn", color=RED, ha="center", va="center")
    axes.text(9.2, 0.9, "video", ha="center", va="center")
    axes.text(2.3, 1.65, "measure: deviation 1", color=GREY, ha="center", va="center")
    arrow(axes, (3.0, 0.9), (4.1, 0.9), text="latents", shift=(0, 0.2))
    box(axes, 4.9, 0.9, "diffusion\nmodel", width=1.6, height=0.9, color=RED)
    arrow(axes, (5.7, 0.9), (6.5, 0.9))
    axes.text(4.9, 0.2, "the model learns. Sampling starts here, from noise", color=RED,
              ha="center", va="center")

@drawing
def three_planes():
    """A clip on three planes: each loses one axis, and every place reads three numbers off."""
    axes = canvas(10, 3.4)
    axes.add_patch(Rectangle((0.7, 0.9), 1.5, 1.5, facecolor="#dbe6f3", edgecolor=BLUE))
    axes.add_patch(plt.Polygon([(0.7, 2.4), (1.3, 2.9), (2.8, 2.9), (2.2, 2.4)], facecolor="#f5ddd8",
                               edgecolor=RED))
    axes.add_patch(plt.Polygon([(2.2, 0.9), (2.8, 1.4), (2.8, 2.9), (2.2, 2.4)], facecolor="#f5ddd8",
                               edgecolor=RED))
    axes.text(1.45, 0.65, "W", ha="center", va="center", color=BLUE)
    axes.text(0.5, 1.65, "H", ha="center", va="center", color=BLUE)
    axes.text(2.7, 1.0, "T", ha="center", va="center", color=RED)
    axes.text(1.6, 3.15, "features u(t, h, w)", ha="center", va="center")
    planes = (("(H, W)", "what lasts", BLUE, 2.55), ("(T, W)", "who is in which column, when", RED,
              1.65), ("(T, H)", "who is in which row, when", RED, 0.75))
    for name, said, color, y in planes:
        arrow(axes, (3.0, 1.65), (4.0, y), color)
        box(axes, 4.6, y, name, width=1.1, color=color)
        axes.text(5.3, y, said, va="center", color=color)
    axes.text(8.9, 2.2, "read off at (t, h, w):", ha="center", va="center")
    axes.text(8.9, 1.65, "hw[h, w]\n+ tw[t, w]\n+ th[t, h]", ha="center", va="top")

def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "figures")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw()
        plt.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close()

if __name__ == "__main__":
    main()
