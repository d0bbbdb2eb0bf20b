"""How the notebooks' figures look, and the drawing steps that more than one notebook needs."""

import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from IPython import display
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for visiongru.py, train.py and segment.py

# Okabe and Ito's colours, which stay apart for colour-blind eyes and in grey. What is ours is blue in every figure.
BLUE, RED, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#666666"


def use_style():
    plt.rcParams.update({
        "figure.dpi": 100, "figure.constrained_layout.use": True, "font.size": 11,
        "figure.titlesize": 13, "axes.titlesize": 11, "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": "#E5E5E5", "grid.linewidth": 0.8, "lines.linewidth": 2, "lines.markersize": 6,
        "image.cmap": "magma", "image.interpolation": "nearest", "legend.frameon": False,
    })


def title(fig, text):
    """What there is to see, as a sentence above the whole figure, at its left."""
    fig.suptitle(text, x=0.01, ha="left", fontweight="bold")


def label(ax, x, y, text, colour, dx=6, dy=0, **kw):
    """A label beside the point (x, y), in place of a legend; dx and dy in points."""
    ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", color=colour,
                **{"va": "center", "annotation_clip": False, **kw})


def show(ax, image, text="", **kw):
    """An image or a map without axes, its title above."""
    shown = ax.imshow(image, **kw)
    ax.set(xticks=[], yticks=[], title=text)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return shown


def draw(fig, keep=None):
    """Put the finished figure below the cell, with a palette of 256 colours: a third of the size, since a notebook is
    to stay below 1 MB. `keep` is the name of a file to write it to as well, for the README."""
    full, small = io.BytesIO(), io.BytesIO()
    fig.savefig(full, format="png", bbox_inches="tight")
    plt.close(fig)
    Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    if keep:
        Path(keep).write_bytes(small.getvalue())
    display.display(display.Image(small.getvalue()))
