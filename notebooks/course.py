"""
What the lessons share: film strips and animations with labels, a table of marks, and the cells that
check exercises. Lessons import it; vdm.py does not need it.
"""

import ast
import base64
import inspect
import io
import os
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML
from PIL import Image, ImageDraw

import vdm

FAST = bool(os.environ.get("VDM_FAST"))       # the tests set it: the same cells, a tiny budget
if FAST:
    plt.rcParams["figure.dpi"] = 30
LAWS = "passed", "shape", "color", "size", "path", "moving"

# ---- pictures ------------------------------------------------------------------------------------

def strip(clips, rows=(), columns=(), title="", scale=3):
    """Show a film strip of clips (B, T, C, H, W): row b is clip b, column t is frame t.

    rows names the clips; columns names the frames, by default by their numbers."""
    picture = vdm.to_uint8(vdm.film_strip(clips.detach().float().clamp(-1, 1)))
    B, T = clips.shape[:2]
    height, width = picture.shape[:2]
    figure, axes = plt.subplots(figsize=(width * scale / 72, height * scale / 72))
    axes.imshow(picture.repeat(scale, 0).repeat(scale, 1), extent=(0, width, height, 0))
    axes.set_yticks((np.arange(B) + 0.5) * height / B, list(rows) or [""] * B)
    axes.set_xticks((np.arange(T) + 0.5) * width / T, list(columns) or range(T))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if not columns and T > 1:
        axes.set_xlabel("frame")
        axes.xaxis.set_label_position("top")
    axes.set_title(title)
    plt.show()

def gif(frames, fps=8.0, about="an animation", colors=32, zoom=1):
    """Frames, uint8 (T, H, W, 3) -> an animation to show. about is read to those who cannot see."""
    pages = [Image.fromarray(frame) for frame in frames]
    palette = Image.fromarray(np.concatenate(frames)).quantize(
        colors, method=Image.Quantize.MAXCOVERAGE)                             # one for all frames
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    file = io.BytesIO()
    pages[0].save(file, "gif", save_all=True, append_images=pages[1:], duration=round(1000 / fps),
                  loop=0)
    data = base64.b64encode(file.getvalue()).decode()
    wide = zoom * pages[0].width
    return HTML(f'<img alt="{about}" width="{wide}" src="data:image/gif;base64,{data}">')

def animate(clips, names=(), columns=8, scale=4, fps=8.0, about="an animation of clips"):
    """Show clips (B, T, C, H, W) side by side, each under its name."""
    movies = vdm.to_uint8(clips.detach().float().clamp(-1, 1))                     # (B, T, H, W, C)
    movies = movies.repeat(scale, 2).repeat(scale, 3)
    if movies.shape[-1] == 1:
        movies = movies.repeat(3, -1)
    B, T, H, W, _ = movies.shape
    head = 16 if names else 0                                            # pixels above for the name
    columns = min(columns, B)
    cell_h = H + head + 4
    cell_w = W + 4
    pages = []
    for t in range(T):
        page = Image.new("RGB", (columns * cell_w, -(-B // columns) * cell_h), "white")
        for b in range(B):
            left = b % columns * cell_w
            top = b // columns * cell_h
            page.paste(Image.fromarray(movies[b, t]), (left, top + head))
            if names:
                ImageDraw.Draw(page).text((left + 2, top + 2), str(names[b]), fill="black")
        pages.append(np.asarray(page))
    return gif(np.stack(pages), fps, about)

def animate_figure(draw, moments, size=(4, 4), fps=8.0, about="an animated figure", hold=8):
    """Show a figure that moves: draw(axes, moment) for each moment; the last one stays longer."""
    figure, axes = plt.subplots(figsize=size)
    pages = []
    for moment in moments:
        axes.clear()
        draw(axes, moment)
        figure.tight_layout()
        figure.canvas.draw()
        pages.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)
    return gif(np.stack(pages + pages[-1:] * hold), fps, about, colors=16)

# ---- marks ---------------------------------------------------------------------------------------

def marks(world, rows, laws=LAWS):
    """Print a table: for each name of rows the share of its clips that keep each law."""
    print(" " * 26, *(f"{law:>7}" for law in laws))
    for name, clips in rows.items():
        found = world.check(clips)
        print(f"{name:>26}", *(f"{found[law].mean():7.0%}" for law in laws))

def centres(clips):
    """The centre of light of every frame, y and x in pixels: clips (B, T, C, H, W) -> (B, T, 2)."""
    light = ((clips.amax(2) + 0.8) / 1.6).clamp(0, 1)                              # (B, T, H, W)
    middle = []
    for shadow in (light.sum(3), light.sum(2)):                             # (B, T, H), (B, T, W)
        places = torch.arange(shadow.shape[2]) + 0.5
        middle.append((shadow * places).sum(2) / shadow.sum(2).clamp(min=1e-3))
    return torch.stack(middle, dim=2)

# ---- exercises -----------------------------------------------------------------------------------

def unanswered(answer):
    """Is there still a `...` where the answer should be? It may be a value, a function or class."""
    if answer is ...:
        return True
    if not (inspect.isfunction(answer) or inspect.isclass(answer)):
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(answer)))
    return any(isinstance(node, (ast.Expr, ast.Assign, ast.Return))
               and isinstance(node.value, ast.Constant) and node.value.value is ...
               for node in ast.walk(tree))

def exercise(number, *answers):
    """A decorator that runs a check at once, and prints one sentence of what came out.

    answers are what the student filled in. The check is a function of asserts. The text of each is
    what to say if it fails: the usual mistake and where to look. What it returns is said at the
    end, if all is right."""
    def run(check):
        name = f"Exercise {number}:"
        if any(unanswered(answer) for answer in answers):
            print(name, "not answered yet. Replace each ... in the cell above, and run both cells.")
            return
        try:
            more = check()
        except AssertionError as wrong:
            print(name, "not yet.", wrong)
        except Exception as stop:
            print(name, f"your code stopped with {type(stop).__name__}: {stop}")
        else:
            print(name, "right.", more or "")
    return run
