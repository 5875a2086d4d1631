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
    arrow(axes, (1.32, 1.2), (7.52, 2.8), GREY)                # beside the line, from guess to x
    arrow(axes, x, step, RED)
    axes.plot(*zip(guess, step), ":", color=RED, linewidth=1.8)
    for place, color in ((guess, BLUE), (x, "black"), (step, RED)):
        axes.plot(*place, "o", color=color, markersize=11)
    axes.text(1.4, 0.5, "guess: the mean of all\nclean points behind x", ha="center", va="top",
              color=BLUE)
    axes.text(7.8, 2.3, "x: a noisy point\ns: its noise level", ha="center", va="top")
    axes.text(4.9, 1.25, "one step: the next x\nguess + t · estimated noise\n"
              "t: the next level, below s", ha="left", va="center", color=RED)
    axes.text(3.4, 2.5, "from the guess to x:\nx - guess = s · estimated noise", ha="center",
              va="center", color=GREY)

# ---- lesson 02 -----------------------------------------------------------------------------------

@drawing
def unet():
    """The UNet: three sizes, skip connections, and the noise level in every block."""
    axes = canvas(9, 4.4)
    down = ((1.5, 3.2), (2.4, 2.1), (3.3, 1.0))
    up = ((7.5, 3.2), (6.6, 2.1), (5.7, 1.0))
    middle = (4.5, 0.3)
    for (x, y), (x2, _), size, width in zip(down, up, ("8 x 8", "4 x 4", "2 x 2"), (1.4, 1.1, 0.8)):
        for place in (x, x2):
            box(axes, place, y, "block", width, 0.5)
        arrow(axes, (x + width / 2, y), (x2 - width / 2, y), GREY)
        label = size if size == "2 x 2" else f"{size}: skip connection"
        axes.text((x + x2) / 2, y + 0.14, label, ha="center", color=GREY)
    box(axes, *middle, "block", 0.8, 0.45)
    for way, ends in ((down, (middle,)), (up[::-1], ())):
        for a, b in zip(way, [*way[1:], *ends]):
            side = 0.55 if b[1] < a[1] else -0.55
            arrow(axes, (a[0] + side / 3, a[1] - 0.27 if b[1] < a[1] else a[1] + 0.27),
                  (b[0] - side / 3, b[1] + 0.27 if b[1] < a[1] else b[1] - 0.27), BLUE)
    arrow(axes, (4.9, 0.35), (5.55, 0.73), BLUE)
    arrow(axes, (0.35, 3.2), (0.8, 3.2), BLUE)
    arrow(axes, (8.2, 3.2), (8.65, 3.2), BLUE)
    axes.text(0.3, 3.45, "noisy", ha="center", color=BLUE)
    axes.text(8.6, 3.45, "guess", ha="center", color=BLUE)
    axes.text(0.9, 1.5, "half the size,\nmore channels", ha="center", va="center", color=BLUE)
    axes.text(8.1, 1.5, "twice the size,\nfewer channels", ha="center", va="center", color=BLUE)
    box(axes, 4.5, 4.05, "noise level: 64 waves, two layers  →  gain and shift in every block", 6.4, 0.45, RED)

# ---- lesson 03 -----------------------------------------------------------------------------------

def frames(axes, left, bottom, lit, T=4, side=3, cell=0.22, color=BLUE):
    """T frames of side x side places, where lit(t, h, w) says which are coloured."""
    for t in range(T):
        for h in range(side):
            for w in range(side):
                place = (left + t * (side + 1) * cell + w * cell, bottom + (side - 1 - h) * cell)
                shade = lit(t, h, w)
                axes.add_patch(Rectangle(place, cell, cell, edgecolor="black", linewidth=0.8,
                                         facecolor=color if shade else "white"))
                if (t, h, w) == (1, 1, 1):
                    axes.plot(place[0] + cell / 2, place[1] + cell / 2, "o", color="black",
                              markersize=5)

@drawing
def attention_over():
    """Which tokens the dotted one looks at: space, time, or both."""
    axes = canvas(9, 4.2)
    rows = (("over space", "(b t) (h w) c", lambda t, h, w: t == 1, BLUE, "its own frame"),
            ("over time", "(b h w) t c", lambda t, h, w: (h, w) == (1, 1), RED, "its place in all frames"),
            ("joint", "b (t h w) c", lambda t, h, w: True, GREY, "everything"))
    for i, (name, fold, lit, color, sees) in enumerate(rows):
        y = 3.05 - 1.3 * i
        axes.text(0.2, y + 0.42, name, weight="bold", color=color, va="center")
        axes.text(0.2, y + 0.12, fold, family="monospace", va="center", fontsize=11)
        frames(axes, 2.3, y, lit, color=color)
        axes.text(6.2, y + 0.33, sees, va="center")
    for t in range(4):
        axes.text(2.63 + t * 0.88, 3.95, f"frame {t}", ha="center", fontsize=10)

@drawing
def gate():
    """A temporal layer: x + gate * f(x)."""
    axes = canvas(9, 2.6)
    axes.text(0.4, 1.8, "x", ha="center", va="center", fontsize=14)
    arrow(axes, (0.6, 1.8), (7.55, 1.8), "black")
    axes.text(4.4, 2.08, "nothing is changed on this way: the image model", ha="center", color=BLUE)
    axes.plot([1.2, 1.2], [1.8, 0.7], color=RED, linewidth=1.8)
    arrow(axes, (1.2, 0.7), (2.0, 0.7), RED)
    box(axes, 3.5, 0.7, "temporal layer f(x)", 3.0, 0.6, RED)
    arrow(axes, (5.0, 0.7), (5.7, 0.7), RED)
    box(axes, 6.6, 0.7, "× gate", 1.8, 0.6, RED)
    axes.text(6.6, 0.2, "a number, at first 0", ha="center", color=RED)
    axes.plot([7.5, 7.75], [0.7, 0.7], color=RED, linewidth=1.8)
    arrow(axes, (7.75, 0.7), (7.75, 1.62), RED)
    axes.text(7.75, 1.8, "+", ha="center", va="center", fontsize=18)
    arrow(axes, (7.95, 1.8), (8.7, 1.8), "black")

# ---- lesson 04 -----------------------------------------------------------------------------------

@drawing
def better_steps():
    """Three steps from level s to level t: Euler, Heun, 2M."""
    axes = canvas(9, 3.3)
    curve = lambda u: 0.75 + 1.5 * u ** 2.2                        # u: 1 at level s, 0 at level t
    names = ("Euler: one slope", "Heun: the mean of two slopes", "2M: with the last guess, too")
    for i, name in enumerate(names):
        left = 0.35 + 3 * i
        place = lambda u: (left + 2.1 * (1 - u), curve(u))
        us = [k / 30 for k in range(31)]
        axes.plot(*zip(*map(place, us)), color="black", linewidth=1.8)
        slope = 1.5 * 2.2 / 2.1
        end = (left + 2.1, place(1)[1] - 2.1 * slope * (0.44 if i == 0 else 0.5))
        axes.text(left + 1.05, 3.05, name, ha="center", weight="bold", fontsize=11)
        axes.plot(*place(1), "o", color="black", markersize=9)
        for x, text in ((left, "s"), (left + 2.1, "t")):
            axes.plot([x, x], [0.45, 2.6], ":", color=GREY)
            axes.text(x, 0.22, text, ha="center", va="center")
        if i == 0:
            arrow(axes, place(1), (left + 1.45, 0.1), RED)
            axes.text(left + 1.45, 1.75, "the slope\nat the start", ha="center", color=RED)
        if i == 1:
            arrow(axes, place(1), (left + 1.45, 0.1), GREY)
            arrow(axes, place(1), (left + 2.08, curve(0) + 0.05), RED)
            axes.text(left + 1.5, 1.75, "asked again\nat the end", ha="center", color=RED)
        if i == 2:
            arrow(axes, place(1), (left + 2.08, curve(0) + 0.05), RED)
            axes.plot(left - 0.28, 2.62, "o", color=BLUE, markersize=7)
            axes.text(left + 2.05, 2.2, "the guess, moved on\nby half a step",
                      ha="right", color=BLUE, fontsize=11)
            axes.text(left - 0.28, 2.75, "last step", ha="center", color=BLUE, fontsize=11)

@drawing
def guidance():
    """Guidance: from the weaker guess through the stronger one, and beyond."""
    axes = canvas(9, 2.5)
    weak = (1.4, 1.2)
    strong = (4.4, 1.2)
    beyond = (7.4, 1.2)
    arrow(axes, weak, strong, BLUE)
    arrow(axes, strong, beyond, RED)
    for place, color, above, below in (
            (weak, GREY, "scale 0", "alone: without temporal layers\nfree: without given frames"),
            (strong, BLUE, "scale 1", "together\ntold"),
            (beyond, RED, "scale 2", "exaggerated:\nmore contrast, out of range")):
        axes.plot(*place, "o", color=color, markersize=12)
        axes.text(place[0], 1.6, above, ha="center", color=color, weight="bold")
        axes.text(place[0], 0.85, below, ha="center", va="top", color=color)
    axes.text(2.9, 1.35, "the difference", ha="center", color=BLUE)
    axes.text(5.9, 1.35, "the same again", ha="center", color=RED)

# ---- lesson 05 -----------------------------------------------------------------------------------

@drawing
def shown():
    """What the network is shown when frames are given."""
    axes = canvas(9, 3.6)
    rows = (("x: noisy frames", 2.7, GREY, "~~~~~~"), ("given frames, clean", 1.75, BLUE, "●●●   "),
            ("mask", 0.8, RED, "111000"))
    for name, y, color, signs in rows:
        axes.text(0.15, y + 0.36, name, color=color, fontsize=11)
        for t, sign in enumerate(signs):
            axes.add_patch(Rectangle((0.15 + 0.5 * t, y - 0.2), 0.44, 0.44, facecolor="white",
                                     edgecolor=color, linewidth=1.5))
            axes.text(0.37 + 0.5 * t, y + 0.01, sign, ha="center", va="center", color=color)
        arrow(axes, (3.2, y), (4.1, 1.75 + 0.3 * (y - 1.75)), color)
    for t, level in enumerate("000sss"):
        axes.text(0.37 + 0.5 * t, 0.2, level, ha="center", color=GREY)
    axes.text(3.2, 0.2, "noise level that is told of each frame", color=GREY, fontsize=11)
    box(axes, 4.9, 1.75, "network", 1.5, 1.2, "black")
    arrow(axes, (5.7, 1.75), (6.1, 1.75), "black")
    axes.text(6.15, 2.2, "guess", fontsize=11)
    for t in range(6):
        color = BLUE if t < 3 else "black"
        axes.add_patch(Rectangle((6.15 + 0.47 * t, 1.55), 0.41, 0.44, facecolor="white",
                                 edgecolor=color, linewidth=1.5))
        axes.text(6.355 + 0.47 * t, 1.76, "●", ha="center", va="center", color=color)
    axes.text(6.8, 1.1, "as they are", ha="center", color=BLUE, fontsize=11)
    axes.text(8.25, 1.1, "estimated", ha="center", fontsize=11)

# ---- lesson 06 -----------------------------------------------------------------------------------

@drawing
def windows_of_a_rollout():
    """Three windows of a roll-out, each given the last frames of the one before."""
    axes = canvas(10, 3.6)
    side = 0.52
    overlap = 4
    for window in range(3):
        y = 2.45 - 0.9 * window
        for i in range(8):
            given = window > 0 and i < overlap
            x = 1.5 + (window * (8 - overlap) + i) * side
            axes.add_patch(Rectangle((x, y), side - 0.05, side - 0.05, linewidth=2, edgecolor=BLUE,
                                     facecolor=BLUE if given else "white"))
            axes.text(x + side / 2, y + side / 2, window * (8 - overlap) + i, ha="center",
                      va="center", color="white" if given else "black")
        axes.text(1.3, y + side / 2, f"window {window + 1}", ha="right", va="center")
        if window > 0:
            x = 1.5 + (window * (8 - overlap) + overlap / 2) * side
            arrow(axes, (x, y + 0.85), (x, y + side + 0.02), RED)
    axes.text(5.8, 3.2, "time", color=RED, ha="right", va="center")
    arrow(axes, (5.9, 3.2), (9.8, 3.2), RED)
    axes.text(1.5, 0.25, "blue: given, the last frames of the window before (here 4).   "
              "white: generated", va="center")

@drawing
def level_matrix():
    """Three orders of denoising: a row is a step, a column a frame, dark is noise."""
    axes = canvas(10, 4.6)
    steps, frames, side = 4, 4, 0.215
    orders = ("together", 0), ("a pyramid", 2), ("one by one", 4)
    for k, (name, lag) in enumerate(orders):
        left = 1.2 + 2.9 * k
        rows = steps + lag * (frames - 1) + 1
        for i in range(rows):
            for t in range(frames):
                togo = steps - min(max(i - lag * t, 0), steps)            # steps still to be made
                axes.add_patch(Rectangle((left + 0.36 * t, 3.75 - side * i), 0.36, side,
                                         edgecolor="white", facecolor=str(1 - 0.2 * togo)))
                axes.text(left + 0.36 * (t + 0.5), 3.75 - side * (i - 0.45), togo, ha="center",
                          va="center", fontsize=8, color="white" if togo > 2 else "black")
        axes.text(left + 0.72, 4.2, name, ha="center", color=BLUE)
        axes.text(left + 1.6, 3.75 - side * (rows / 2 - 1), f"{rows - 1} steps", va="center",
                  color=GREY)
    arrow(axes, (0.85, 3.95), (0.85, 0.5), RED)
    axes.text(0.55, 2.2, "steps of the sampler", color=RED, rotation=90, ha="center", va="center")
    axes.text(4.9, 0.12, "columns: frames 0 to 3.   Numbers: steps to go, 4 is pure noise, 0 is done",
              ha="center", va="center")
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

# ---- lesson 08 -----------------------------------------------------------------------------------

@drawing
def latent_pipeline():
    """Three trainings in a row: what learns in each has a colour."""
    axes = canvas(10, 4.0)
    rows = ((3.5, "1. frames", BLUE, BLUE), (2.3, "2. clips", GREY, RED),
            (0.9, "3. clips", GREY, GREY))
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
    top = [(0.7, 2.4), (1.3, 2.9), (2.8, 2.9), (2.2, 2.4)]
    right = [(2.2, 0.9), (2.8, 1.4), (2.8, 2.9), (2.2, 2.4)]
    for side in (top, right):
        axes.add_patch(plt.Polygon(side, facecolor="#f5ddd8", edgecolor=RED))
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
