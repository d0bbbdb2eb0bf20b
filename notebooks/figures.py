"""How the notebooks' figures look, and the drawing steps that more than one notebook needs."""

import io
import math
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


# Notebook 1 -----------------------------------------------------------------------------------------------------------

def gate_and_state(gate, candidate, state):
    T = len(gate)
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.2), sharex=True, height_ratios=(3, 1))
    title(fig, "Where the gate is open the state follows the candidate; where it is nearly closed it remembers")
    top.plot(range(T), candidate, "o", color=ORANGE, markersize=4)
    top.plot(range(T), state, color=BLUE, linewidth=2.5)
    label(top, T - 1, state[-1], "state $h_t$", BLUE)
    label(top, T - 1, candidate[-1], "candidate $\\tilde h_t$", ORANGE)
    bottom.bar(range(T), gate, width=1, color=BLUE)
    bottom.set(xlabel="position t in the sequence", ylabel="gate $z_t$", ylim=(0, 1), xlim=(-1, T))
    top.set(ylabel="value")
    for middle, text in ((5.5, "open"), (23.5, "nearly closed"), (40.5, "open"), (62.5, "nearly closed")):
        bottom.text(middle, 0.72, text, ha="center", color=GREY)
    for axis in top, bottom:
        axis.grid(False)
        for first, last in (0, 12), (36, 46):
            axis.axvspan(first - 0.5, last - 0.5, color=GREY, alpha=0.12, linewidth=0)
    draw(fig)


def chunk_levels(levels, R, exact, keep):
    """`levels`: for each the states of its chunks from zero, and its true states."""
    T = len(exact)
    fig, axes = plt.subplots(len(levels), 2, figsize=(9, 1.6 * len(levels)), sharex=True, sharey=True)
    title(fig, "A chunk's local state is one element of a shorter sequence, whose states are the carries")
    for level, ((left, right), (down, up)) in enumerate(zip(axes, levels)):
        width = R**level  # steps that an element stands for
        is_last = level == len(levels) - 1
        place = [k * width + (width - 1) / 2 for k in range(len(down))]
        for ax, values, dark, light in (left, down, ORANGE, "#F6DDA8"), (right, up, BLUE, "#A9CDE4"):
            colours = [dark if k % R == R - 1 or is_last else light for k in range(len(values))]
            ax.bar(place, values, width=0.86 * width, color=colours)
            ax.grid(False)
            for edge in range(0, T + 1, R * width):
                ax.axvline(edge - 0.5, color="#BBBBBB", linewidth=0.8)
        left.set(ylabel=f"{len(down)} elements", xlim=(-0.5, T - 0.5), xticks=[], yticks=[])
        for ax, tip, tail in (left, -0.17, 0.02), (right, 0.02, -0.17):
            if not is_last:
                ax.annotate("", (0.5, tip), (0.5, tail), xycoords="axes fraction", annotation_clip=False,
                            arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.5, "mutation_scale": 16})
    axes[0, 0].set_title("down: each chunk from zero; its end (dark) goes on")
    axes[0, 1].set_title("up: each chunk from its carry; dots: the loop")
    for ax in axes[-1]:
        ax.set_xlabel("position in the sequence")
    axes[0, 1].plot(range(T), exact, "o", color=RED, markersize=2.5)
    fig.get_layout_engine().set(hspace=0.1)
    draw(fig, keep)


def mixing_matrices(matrices, scanned, multiplied, width):
    """`matrices`: {"left": (T, T), "right": (T, T)} of one channel; the state from the right, found in two ways."""
    T = len(scanned)
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), width_ratios=(1, 1, 1.1))
    title(fig, "A channel's scan is a triangular matrix: matrix times candidates gives the same state")
    for ax, (name, matrix) in zip(axes, matrices.items()):
        image = ax.imshow(matrix, vmin=0, vmax=1)
        ax.set(title=f"from the {name}", xlabel="pixel m that sends", xticks=range(0, T, width),
               yticks=range(0, T, width))
        ax.set_xticks([row - 0.5 for row in range(width, T, width)], minor=True)
        ax.set_yticks([row - 0.5 for row in range(width, T, width)], minor=True)
        ax.grid(False)
        ax.grid(True, which="minor", color="#666666", linewidth=0.5)
        ax.tick_params(which="minor", length=0)
    axes[0].set_ylabel("pixel L that receives")
    fig.colorbar(image, ax=axes[1], shrink=0.85, label="weight of m in L")
    axes[2].plot(scanned, color=BLUE)
    axes[2].plot(multiplied, "o", color=RED, markersize=4)
    axes[2].set(title="state from the right", xlabel="pixel L", xticks=range(0, T + 1, width),
                ylim=(0, 1.35 * multiplied.max()), box_aspect=1)
    for y, text, colour in (0.97, "line: the scan", BLUE), (0.88, "dots: matrix times candidates", RED):
        axes[2].text(0.03, y, text, color=colour, va="top", fontsize=10, transform=axes[2].transAxes)
    draw(fig)


def influence(forward, backward):
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4), sharex=True, sharey=True)
    title(fig, "A pixel's influence fades forward; a loss's gradient fades backward, through the same gates")
    for ax, values, colour, at, text in ((top, forward, BLUE, 12, "a bright pixel at 12: state $h_t$"),
                                         (bottom, backward, RED, 48, "a loss on $h_{48}$: gradient $G_t$")):
        ax.bar(range(len(values)), values, width=0.8, color=colour)
        label(ax, at, 1.0, text, colour, dx=10 if at == 12 else -10, dy=-2, ha="left" if at == 12 else "right")
        ax.axvspan(37.5, 40.5, color=GREY, alpha=0.15, linewidth=0)
        ax.grid(False)
    top.text(39, 1.02, "gates open", color=GREY, ha="center")
    top.set(ylabel="$h_t$", ylim=(0, 1.15))
    bottom.set(ylabel="$G_t$", xlabel="position t in the sequence")
    draw(fig)


def agreement(differences):
    """`differences`: for each form pairs, of values and of gradients, one for each case in float64."""
    fig, ax = plt.subplots(figsize=(9, 3.4))
    title(fig, "In float64 every form agrees with the loop; the wrong one does not, beyond two chunks")
    for row, (name, pairs) in enumerate(differences.items()):
        colour = {"log": ORANGE, "wrong": RED}.get(name, BLUE)
        for shift, values, marker in zip((-0.15, 0.15), zip(*pairs), "os"):
            ax.plot([max(value, 3e-18) for value in values], [row + shift] * len(values), marker, color=colour,
                    markersize=5, alpha=0.6)
    ax.set(xscale="log", xlim=(1e-18, 10), ylim=(len(differences) - 0.5, -1), yticks=range(len(differences)),
           yticklabels=differences, xlabel="largest difference from the loop, relative to the largest number; "
           "at the left edge: none")
    ax.axvline(2**-52, color=GREY, linewidth=1, linestyle=":")
    label(ax, 2**-52, -0.7, "float64's last digit", GREY, dx=4, fontsize=9)
    label(ax, 1e-8, -0.7, "circles: values; squares: gradients", GREY, dx=0, fontsize=9)
    draw(fig)


def precision(kinds, lengths, errors):
    """`kinds`: a shift of the gates for each name; `errors`: for (kind, form) one error for each length."""
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.9), sharey=True)
    title(fig, "In float32 log-space loses digits as the image grows; real space stays at the last one")
    for ax, (kind, shift) in zip(axes, kinds.items()):
        for name, colour in ("log-space", RED), ("real-space (ours)", BLUE):
            ax.plot(lengths, errors[kind, name], "o-", color=colour, clip_on=False)
            if ax is axes[1]:
                label(ax, lengths[2], errors[kind, name][2], name, colour, dx=-14, dy=14, ha="center")
        ax.axhline(2**-23, color=GREY, linewidth=1, linestyle=":")
        ax.set(xscale="log", yscale="log", xlabel="length T of the sequence", xlim=(110, 1.2e5), ylim=(3e-8, 0.2),
               title=f"{kind}\n(median z = {1 / (1 + math.exp(-shift)):.2f})")
        ax.set_xticks(lengths[::2], [f"{T:,}\n= {round(T**0.5)}²" for T in lengths[::2]])
        ax.minorticks_off()
    axes[0].set_ylabel("largest relative error of a state")
    label(axes[0], lengths[1], 2**-23, "float32's last digit", GREY, dx=0, dy=-8, fontsize=9)
    draw(fig)


def scan_costs(rows, times):
    """`rows`: of bench.measure_scans; `times`: of each scan's time, in ours, at the greatest length."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 4))
    title(fig, f"Ours takes 1/{times['log']:.0f} of log-space's time and a quarter of its memory; "
               f"1/{times['sequential']:.0f} of the loop's time")
    names = {"sequential": ("the loop", GREEN), "log": ("log-space", RED), "parallel": ("ours", BLUE)}
    for ax, what, scale, text in ((axes[0], "both", 1e3, "forward and backward, ms"),
                                  (axes[1], "kept", 2**-20, "kept for the backward pass, MiB")):
        for name, (words, colour) in names.items():
            points = [(row["T"], scale * row[what]) for row in rows if row["scan"] == name]
            ax.plot(*zip(*points), "o-", color=colour)
            if what == "both" or name != "sequential":  # there its name would lie on the line of ours
                label(ax, *points[-1], words, colour)
        ax.set(xscale="log", yscale="log", xlabel="length T of the sequence", title=text, xlim=(140, 5e5))
        ax.set_xticks([196, 3136, 65_536], ["196", "3,136", "65,536"])
        ax.minorticks_off()
    draw(fig)
