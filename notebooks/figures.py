"""The figures of the notebooks, and their common style."""

import io
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython import display
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator
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
    """A sentence above the whole figure, flush left, that says what there is to see."""
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
    """Show the finished figure below the cell. A palette of 256 colours makes it a third of the size, which keeps
    notebooks below 1 MB. `keep` is the name of a file to save it to as well."""
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
    is_open = [value > 0.3 for value in gate]
    edges = [0, *(t for t in range(1, T) if is_open[t] != is_open[t - 1]), T]
    for first, last in zip(edges, edges[1:]):
        text = "open" if is_open[first] else "nearly closed"
        bottom.text((first + last - 1) / 2, 0.72, text, ha="center", color=GREY)
        for axis in (top, bottom) if is_open[first] else ():
            axis.axvspan(first - 0.5, last - 0.5, color=GREY, alpha=0.12, linewidth=0)
    top.grid(False)
    bottom.grid(False)
    draw(fig)


def chunk_levels(levels, R, exact):
    """`levels`: for each level its chunks' states from zero, and its true states; `exact`: the states by the loop."""
    T = len(exact)
    fig, axes = plt.subplots(len(levels), 2, figsize=(9, 1.6 * len(levels)), sharex=True, sharey=True, squeeze=False)
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
    axes[0, 0].set_title("down: each chunk from zero; its end (dark) goes down")
    axes[0, 1].set_title("up: each chunk from its carry; dots: the loop")
    for ax in axes[-1]:
        ax.set_xlabel("position in the sequence")
    axes[0, 1].plot(range(T), exact, "o", color=RED, markersize=2.5)
    fig.get_layout_engine().set(hspace=0.1)
    draw(fig)


def mixing_matrices(matrices, scanned, multiplied, width):
    """`matrices`: {"left": (T, T), "right": (T, T)} of one channel; its state from the right, by the scan and by
    matrix times candidates; `width` of the feature map."""
    T = len(scanned)
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), width_ratios=(1, 1, 1.1))
    title(fig, "A channel's scan is a triangular matrix: matrix times candidates gives the same state")
    for ax, (name, matrix) in zip(axes, matrices.items()):
        image = ax.imshow(matrix, vmin=0, vmax=1)
        ax.set(title=f"from the {name}", xlabel="position s that sends", xticks=range(0, T, width),
               yticks=range(0, T, width))
        ax.set_xticks([row - 0.5 for row in range(width, T, width)], minor=True)
        ax.set_yticks([row - 0.5 for row in range(width, T, width)], minor=True)
        ax.grid(False)
        ax.grid(True, which="minor", color="#666666", linewidth=0.5)
        ax.tick_params(which="minor", length=0)
    axes[0].set_ylabel("position t that receives")
    fig.colorbar(image, ax=axes[1], shrink=0.85, label="weight of s in t")
    axes[2].plot(scanned, color=BLUE)
    axes[2].plot(multiplied, "o", color=RED, markersize=4)
    axes[2].set(title="state from the right", xlabel="position t", xticks=range(0, T + 1, width),
                ylim=(0, 1.35 * multiplied.max()), box_aspect=1)
    for y, text, colour in (0.97, "line: the scan", BLUE), (0.88, "dots: matrix times candidates", RED):
        axes[2].text(0.03, y, text, color=colour, va="top", fontsize=10, transform=axes[2].transAxes)
    draw(fig)


def influence(forward, backward, source, target, opened):
    """The state after a pulse at `source`, and the gradient of a loss at `target`; gates are open in `opened`."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4), sharex=True, sharey=True)
    title(fig, "An input's influence fades forward; a loss's gradient fades backward, through the same gates")
    for ax, values, colour in (top, forward, BLUE), (bottom, backward, RED):
        ax.bar(range(len(values)), values, width=0.8, color=colour)
        ax.axvspan(opened[0] - 0.5, opened[-1] + 0.5, color=GREY, alpha=0.15, linewidth=0)
        ax.grid(False)
    label(top, source, 1.0, f"an input at {source}: state $h_t$", BLUE, dx=10, dy=-2)
    label(bottom, target, 1.0, f"a loss on $h_{{{target}}}$: gradient $G_t$", RED, dx=-10, dy=-2, ha="right")
    top.text((opened[0] + opened[-1]) / 2, 1.02, "gates open", color=GREY, ha="center")
    top.set(ylabel="$h_t$", ylim=(0, 1.15))
    bottom.set(ylabel="$G_t$", xlabel="position t in the sequence")
    draw(fig)


def agreement(differences):
    """`differences`: for each form a pair for each case in float64, of values and of gradients."""
    fig, ax = plt.subplots(figsize=(9, 3.4))
    title(fig, "In float64 every form agrees with the loop; beyond two chunks the wrong one does not")
    for row, (name, pairs) in enumerate(differences.items()):
        colour = {"log-space": ORANGE, "wrong": RED}.get(name, BLUE)
        for shift, values, marker in zip((-0.15, 0.15), zip(*pairs), "os"):
            ax.plot([max(value, 3e-18) for value in values], [row + shift] * len(values), marker, color=colour,
                    markersize=5, alpha=0.6)
    ax.set(xscale="log", xlim=(1e-18, 10), ylim=(len(differences) - 0.5, -1), yticks=range(len(differences)),
           yticklabels=differences, xlabel="largest difference from the loop, relative to the largest number "
           "(left edge: none)")
    ax.axvline(2**-52, color=GREY, linewidth=1, linestyle=":")
    label(ax, 2**-52, -0.7, "float64's eps", GREY, dx=4, fontsize=9)
    label(ax, 1e-8, -0.7, "circles: values; squares: gradients", GREY, dx=0, fontsize=9)
    draw(fig)


def precision(shifts, lengths, errors):
    """`shifts`: for each kind of gates its shift; `errors`: for each (kind, form) one error for each length."""
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.9), sharey=True)
    title(fig, "In float32 log-space loses digits as the sequence grows; the chunked scan does not")
    for ax, (kind, shift) in zip(axes, shifts.items()):
        for name, colour in ("log-space", RED), ("chunked", BLUE):
            ax.plot(lengths, errors[kind, name], "o-", color=colour, clip_on=False)
            if ax is axes[1]:
                label(ax, lengths[2], errors[kind, name][2], name, colour, dx=-14, dy=14, ha="center")
        ax.axhline(2**-23, color=GREY, linewidth=1, linestyle=":")
        ax.set(xscale="log", yscale="log", xlabel="length T of the sequence", xlim=(110, 1.2e5), ylim=(3e-8, 0.2),
               title=f"{kind}\n(median z = {1 / (1 + math.exp(-shift)):.2f})")
        ax.set_xticks(lengths[::2], [f"{T:,}\n= {round(T**0.5)}²" for T in lengths[::2]])
        ax.minorticks_off()
    axes[0].set_ylabel("largest relative error of a state")
    label(axes[0], lengths[1], 2**-23, "float32's eps", GREY, dx=0, dy=-8, fontsize=9)
    draw(fig)


def scan_costs(rows, text):
    """`rows` of bench.measure_scans; `text`: the title."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 4))
    title(fig, text)
    names = {"sequential": ("the loop", GREEN), "log": ("log-space", RED), "parallel": ("chunked", BLUE)}
    for ax, what, scale, text in ((axes[0], "both", 1e3, "forward and backward, ms"),
                                  (axes[1], "kept", 2**-20, "saved for backward, MiB")):
        for name, (words, colour) in names.items():
            points = [(row["T"], scale * row[what]) for row in rows if row["scan"] == name]
            ax.plot(*zip(*points), "o-", color=colour)
            if what == "both" or name != "sequential":  # on the right its name would lie on another's line
                label(ax, *points[-1], words, colour)
        ax.set(xscale="log", yscale="log", xlabel="length T of the sequence", title=text, xlim=(140, 5e5))
        ax.set_xticks([196, 3136, 65_536], ["196", "3,136", "65,536"])
        ax.minorticks_off()
    draw(fig)


# Notebook 2 -----------------------------------------------------------------------------------------------------------

def through_the_stages(pictures):
    """`pictures`: for each column its name, an image, and the number of channels that it stands for."""
    fig, axes = plt.subplots(1, len(pictures), figsize=(9, 3))
    title(fig, "From pixels to coarse, wide maps: half the size and twice the channels with each stage")
    for ax, (name, image, channels) in zip(axes, pictures):
        show(ax, image, name)
        ax.set_xlabel(f"{image.shape[0]} x {image.shape[1]},\n{channels} channels", loc="left")
    draw(fig)


def parameters_and_work(places, parts, counts, text):
    """`places`: the rows; `parts`: (name, colour) of each piece of a bar; `counts`: for each axis label, numbers by
    (place, part)."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    title(fig, text)
    for ax, (what, numbers) in zip(axes, counts.items()):
        left = dict.fromkeys(places, 0)
        for part, colour in parts.items():
            widths = {place: numbers.get((place, part), 0) for place in places}
            ax.barh(places, widths.values(), left=list(left.values()), color=colour)
            if part in ("2DGRU", "FFN"):
                ax.text(left["stage 3"] + widths["stage 3"] / 2, "stage 3", part, color="white", ha="center",
                        va="center", fontweight="bold")
            left = {place: left[place] + widths[place] for place in places}
        for place, width in left.items():
            label(ax, width, place, f"{width:.2f}", GREY)
            if ax is axes[0] and place == "downsampling":
                label(ax, width, place, "3x3 convolutions, norms", GREEN, dx=42)
        ax.set_xlabel(what)
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    draw(fig)


def multiply_adds(sizes, giga, without, paper, text):
    """In G: `giga` for each (model, size); `without` projections, for each size; `paper`, by model and size."""
    fig, ax = plt.subplots(figsize=(9, 4.6))
    title(fig, text)
    last = sizes[-1]
    for name, colour, words, dy in (("vit_s", RED, "DeiT-S, all counted", 14), ("swin_t", GREEN, "Swin-T", -9),
                                    ("ours", BLUE, "VisionGRU-Ti", 5)):
        ax.plot(sizes, [giga[name, size] for size in sizes], color=colour)
        label(ax, last, giga[name, last], words, colour, dy=dy)
        if name in paper:
            ax.plot(*zip(*paper[name].items()), "o", markerfacecolor="white", markeredgecolor=colour, markersize=9,
                    markeredgewidth=2)
    ax.plot(sizes, without.values(), color=RED, linestyle=":")
    label(ax, last, without[last], "DeiT-S without\nattention's projections", RED, dy=-13)
    label(ax, 640, paper["ours"][640], "rings: the paper's numbers", GREY, dx=12, dy=-14)
    ax.set(xlabel="image size, px", ylabel="multiply-adds, G", xlim=(150, 1300), xscale="log", yscale="log",
           ylim=(2, 700))
    ax.set_xticks([224, 320, 512, 640, 1024], [224, 320, 512, 640, 1024])
    ax.set_yticks([2, 5, 10, 20, 50, 100, 200, 500], [2, 5, 10, 20, 50, 100, 200, 500])
    ax.minorticks_off()
    draw(fig)


def kernels(counts, floor, text):
    """`counts`: for each form whether it is compiled, its kernels and its bytes; `floor` of the bytes."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    title(fig, text)
    colours = {"the loop": GREEN, "log-space": RED, "chunked": BLUE}
    for y, (name, (compiled, launched, moved)) in enumerate(counts.items()):
        for ax, value, words in (axes[0], launched, f"{launched:,}"), (axes[1], moved / floor, f"{moved / floor:.1f}"):
            ax.barh(y, value, color=colours[name.split(",")[0]], alpha=1.0 if compiled else 0.55, height=0.7)
            label(ax, value, y, words, GREY)
    for ax, words in zip(axes, ("kernels", "bytes read and written, divided by the floor")):
        ax.set(title=words, yticks=range(len(counts)), yticklabels=counts, ylim=(len(counts) - 0.4, -0.6))
        ax.grid(False, axis="y")
    axes[0].set(xscale="log", xlim=(1, 12_000))
    axes[1].axvline(1, color=GREY, linestyle=":")
    draw(fig)


def costs(names, sizes, seconds, mebibytes, text):
    """`names`: for each model its words and colour; seconds and MiB for each (model, size)."""
    largest = sizes[-1]
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.2))
    title(fig, text)
    for ax, values, what in ((axes[0], seconds, "seconds for one image"),
                             (axes[1], mebibytes, "MiB that one image takes")):
        low, high = math.log(min(values.values())), math.log(max(values.values()))
        ax.set(xscale="log", yscale="log", xlabel="image size, px", title=what, xlim=(200, 2200))
        height = -math.inf  # of the previous label, which the next one must clear
        for name in sorted(names, key=lambda name: values[name, largest]):
            words, colour = names[name]
            ax.plot(sizes, [values[name, size] for size in sizes], "o-", color=colour)
            at = 250 * (math.log(values[name, largest]) - low) / (high - low)
            height = max(at, height + 16)
            label(ax, largest, values[name, largest], words, colour, dx=8, dy=height - at)
        ax.set_xticks(sizes, sizes)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    draw(fig)


# Notebook 3 -----------------------------------------------------------------------------------------------------------

def shape_examples(images, classes):
    """`images`: two of each class, the classes in order."""
    fig, axes = plt.subplots(2, len(classes), figsize=(9, 2.5))
    title(fig, "Ten shapes to tell apart, whatever their texture, position, size and tilt")
    for k, name in enumerate(classes):
        show(axes[0, k], images[2 * k], name)
        show(axes[1, k], images[2 * k + 1])
        axes[0, k].title.set(ha="left", fontsize=9)
    draw(fig)


def learning_curves(losses, scores, what, floor, text):
    """`losses` of each step; `scores`: by step, in %; `floor`: what gives a score without learning, and that score."""
    width, last = 20, max(scores)
    smooth = [sum(losses[k:k + width]) / width for k in range(len(losses) - width + 1)]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    title(fig, text)
    left.plot(losses, color=BLUE, alpha=0.25, linewidth=1)
    left.plot(range(width // 2, width // 2 + len(smooth)), smooth, color=BLUE)
    left.set(title=f"training loss, and its mean over {width} steps", xlabel="step", ylim=(0, None))
    right.plot(*zip(*scores.items()), "o-", color=BLUE)
    right.set(title=what, xlabel="step", ylim=(0, 100))
    right.axhline(floor[1], color=GREY, linestyle=":", linewidth=1)
    label(right, last, floor[1], floor[0], GREY, dx=0, dy=7, ha="right", fontsize=9)
    label(right, last, scores[last], f"{scores[last]:.0f} %", BLUE)
    draw(fig)


def segmented(scenes, classes, palette):
    """`scenes`: an RGB image (H, W, 3), its true labels and its predicted labels, (H, W), for each; `palette`: (n, 3).
    Labels other than 0 are drawn over the scene in grey."""
    fig, axes = plt.subplots(3, len(scenes), figsize=(9, 4.9))
    title(fig, "New scenes: their labels, and what the model predicts")
    for column, (image, *both) in enumerate(scenes):
        show(axes[0, column], image)
        grey = image.mean(axis=2, keepdims=True)
        for ax, labels in zip(axes[1:, column], both):
            show(ax, np.where(labels[..., None] > 0, 0.35 * grey + 0.65 * palette[labels], image).astype(np.uint8))
            for k in np.unique(labels[labels > 0]):
                y, x = np.nonzero(labels == k)
                if len(x) > 80:  # no names for small patches
                    ax.text(np.clip(x.mean(), 14, 50), y.mean(), classes[k], ha="center", va="center", fontsize=9,
                            color="white", path_effects=[withStroke(linewidth=2, foreground="black")])
    for ax, text in zip(axes[:, 0], ("scene", "labels", "prediction")):
        ax.set_ylabel(text)
    draw(fig)


def receptive_fields(fields, shares):
    """`fields`: for each row's name a map per stage; `shares`: in % of the pixels, the part that holds 90 % of each."""
    fig, axes = plt.subplots(len(fields), 4, figsize=(9, 2.4 * len(fields)))
    for row, (name, of_stages) in enumerate(fields.items()):
        for stage, field in enumerate(of_stages):
            ax = axes[row, stage]
            show(ax, (field / field.max()).sqrt(), vmin=0, vmax=1)
            ax.text(4, len(field) - 5, f"90 % in {shares[name][stage]:.0f} % of the pixels", color="white", fontsize=9)
            if row == 0:
                ax.set_title(f"stage {stage + 1}", fontweight="bold")
        axes[row, 0].set_ylabel(name)
    title(fig, "The centre sees a streak along its row in stage 1 and much of the scene in stage 4")
    draw(fig)


def gate_maps(image, gates, channels):
    """`gates`: for each direction (H, W, E); `channels`: for each direction, those to show."""
    fig, axes = plt.subplots(2, 1 + len(channels["left"]), figsize=(9, 3.9))
    title(fig, "Bright gates take in new values, dark ones remember: channels differ and follow the image")
    for row, (side, name) in enumerate((("left", "first to last"), ("right", "last to first"))):
        show(axes[row, 0], image, "" if row else "scene")
        axes[row, 0].set_ylabel(name)
        for ax, channel in zip(axes[row, 1:], channels[side]):
            shown = show(ax, gates[side][..., channel], f"channel {channel}", vmin=0, vmax=1)
    fig.colorbar(shown, ax=axes[:, -1], label="gate z")
    draw(fig)


def memories(reaches, widths, stages):
    """`reaches`: untrained and trained, for each block the memory of each channel; `widths`: the maps', by block."""
    fig, ax = plt.subplots(figsize=(9, 3.8))
    title(fig, "Training lengthens some memories and shortens others; only in stage 4 do some outlast a row")
    for name, shift, colour in ("untrained", -0.18, GREY), ("trained", 0.18, BLUE):
        for k, reach in enumerate(reaches[name]):
            jitter = [0.24 * (i * 0.618 % 1) - 0.12 for i in range(len(reach))]
            ax.plot([k + shift + j for j in jitter], reach, ".", color=colour, markersize=3, alpha=0.6)
    for k, width in enumerate(widths):
        ax.plot([k - 0.4, k + 0.4], [width, width], color=RED, linewidth=1.5)
    label(ax, len(stages) - 0.6, width, "one row\nof the map", RED)
    ax.set(yscale="log", yticks=(1, 2, 4, 8, 16, 32), yticklabels=(1, 2, 4, 8, 16, 32),
           ylabel="positions until 1/e is left", xticks=range(len(stages)),
           xticklabels=[f"stage {stage}" + (f"\nblock {stages[:k + 1].count(stage)}" if stages.count(stage) > 1 else "")
                        for k, stage in enumerate(stages)])
    ax.minorticks_off()
    ax.grid(axis="x", visible=False)
    ax.text(-0.02, 6, "untrained", color=GREY, ha="right")
    ax.text(0.02, 6, "trained", color=BLUE, ha="left")
    draw(fig)


# Notebook 4 -----------------------------------------------------------------------------------------------------------

def recall_examples(tasks, colours):
    """`tasks`: for each an image, the answers, and the distances, in a batch of one. No distance, -1: no answer."""
    fig, axes = plt.subplots(1, 2 * len(tasks), figsize=(9, 2.3))
    title(fig, "The image, and the colour to name at each position")
    for (task, (images, answers, distances)), left, right in zip(tasks.items(), axes[::2], axes[1::2]):
        show(left, images[0].permute(1, 2, 0) + 0.5, task)
        named = np.where(distances[0, :, None] < 0, 0.85, colours[answers[0]])
        show(right, named.reshape(*[math.isqrt(len(named))] * 2, 3), "answers")
        for ax in left, right:
            ax.title.set_fontsize(9)
    draw(fig)


def recall_accuracy(tasks, octaves):
    """`tasks`: for each task and each model the accuracy, in %, at each octave of distance."""
    styles = ((BLUE, "-", "o"), (BLUE, "--", "s"), (BLUE, ":", "v"), (GREEN, "-", "^"), (RED, "-", "o"),
              (ORANGE, "-", "s"), (GREY, "-", "D"))
    lengths = [len(next(iter(curves.values()))) for curves in tasks.values()]
    fig, axes = plt.subplots(1, len(tasks), figsize=(9, 4.6), sharey=True, width_ratios=lengths)
    title(fig, "The scan carries a key along its own order; kernels stop where their reach ends")
    for ax, length, (task, curves) in zip(axes, lengths, tasks.items()):
        for (name, curve), (colour, line, marker) in zip(curves.items(), styles):
            ax.plot(range(length), curve, line, color=colour, marker=marker, markersize=5, label=name)
        ax.axhline(25, color=GREY, linewidth=1, linestyle=":")
        ax.set(title=task, ylim=(0, 104), xticks=range(length))
        ax.set_xticklabels([octave.replace("-", "–\n") for octave in octaves[:length]], fontsize=8)
    label(axes[0], 0, 25, "guessing", GREY, dx=-4, dy=-8, fontsize=9)
    axes[0].set(xlabel="distance to the key, positions", ylabel="accuracy, %, mean of five seeds")
    axes[1].set_xlabel("distance, rows")
    axes[2].set_xlabel("distance, steps of the path")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=9)
    draw(fig, keep="4_distance.png")


def equals(curves, units, names, colours):
    """`curves`: the top-1 of each model after each epoch; `units`: for each x axis, the cost of an epoch by model."""
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.8), sharey=True)
    for ax, (text, per_epoch) in zip(axes, units.items()):
        for name, curve in curves.items():
            ends = [per_epoch(name) * epoch for epoch in range(1, len(curve) + 1)]
            ax.plot(ends, curve, color=colours[name])
            if ax is axes[0]:
                label(ax, ends[-1], curve[-1], f"{names[name]} {curve[-1]:.1f}", colours[name],
                      dy={"convnext": 5, "vit": -6}.get(name, 0), fontsize=9)  # these two end level
        ax.set(xlabel=text, ylim=(40, 82))
        if ax is not axes[0]:  # since ViT needs several times as much
            ax.set(xscale="log", xticks=(3, 10, 30, 100), xticklabels=(3, 10, 30, 100))
    axes[0].set_ylabel("top-1, %")
    title(fig, "ResNet is ahead of VisionGRU, with three seeds each; the others, with one seed, are behind")
    draw(fig)


def variants(scores, differences):
    """`scores`: the top-1 of each variant's runs, the unchanged model first; `differences` from it, as text."""
    fig, ax = plt.subplots(figsize=(9, 3.4))
    for row, (name, values) in enumerate(scores.items()):
        colour, middle = GREY if row else BLUE, sum(values) / len(values)
        ax.plot(values, [row + 0.2 * (k - (len(values) - 1) / 2) for k in range(len(values))], "o", color=colour)
        ax.plot([middle] * 2, [row - 0.35, row + 0.35], color=colour)
        text = f"{middle:.1f}" + (f" ({differences[name]})" if name in differences else "")
        ax.text(max(values) + 0.2, row, text, va="center", fontsize=10)
    ax.set(yticks=range(len(scores)), yticklabels=scores, xlim=(72, 82), xlabel="top-1 after 12 epochs, %")
    ax.invert_yaxis()
    title(fig, "At 48 px, three seeds show no difference between the models with and without recurrence")
    draw(fig)


def longer(runs, labels, colours):
    """`runs`: for each model one of 48 epochs, or one that was stopped."""
    fig, ax = plt.subplots(figsize=(9, 4))
    for name, run in runs.items():
        curve, colour = [entry["top1"] for entry in run["log"]], colours.get(name, BLUE)
        ax.plot(range(1, len(curve) + 1), curve, color=colour,
                linestyle={"nano, no recurrence": "--", "tiny": ":"}.get(name, "-"))
        dx, dy = {"nano": (6, -5), "convnext": (6, -4), "tiny": (-80, 24), "vit": (8, 10)}.get(name, (6, 0))
        text = f"{labels[name]} {curve[-1]:.1f}" + ", stopped" * ("stopped" in run)
        label(ax, len(curve), curve[-1], text, colour, dx, dy)
    ax.set(xlabel="epochs", ylabel="top-1, %", ylim=(50, 87), xticks=(12, 24, 36, 48))
    title(fig, "48 epochs, one seed each: ResNet is ahead; one seed cannot tell what recurrence is worth")
    draw(fig)


def of_sizes(scores):
    """`scores`: for each model and each image size, the top-1 of its runs."""
    fig, ax = plt.subplots(figsize=(9, 3.4))
    for (name, runs), colour, aside in zip(scores.items(), (BLUE, GREY), (0.4, -0.4)):
        means = {px: sum(runs[px]) / len(runs[px]) for px in sorted(runs)}
        ax.plot(means.keys(), means.values(), color=colour, marker="_", markersize=16)
        ax.plot(*zip(*((px + aside, value) for px in runs for value in runs[px])), "o", color=colour)
        label(ax, 96, means[96], f"{name} {means[96]:.1f}", colour, dx=12)
    ax.set(xticks=list(means), xticklabels=[f"{px} px:\n{(px // 4)**2} positions" for px in means],
           ylabel="top-1 after 4 epochs, %", ylim=(62, 70))
    title(fig, "At 96 px both seeds are ahead with recurrence, but two seeds do not show a difference")
    draw(fig)


def loss_differences(differences):
    """`differences`: for each kind of run and each seed, the training loss with minus without recurrence."""
    fig, ax = plt.subplots(figsize=(9, 3))
    for k, values in enumerate(differences.values()):
        ax.plot([k] * len(values), values, "o", color=BLUE)
        ax.plot([k - 0.2, k + 0.2], [sum(values) / len(values)] * 2, color=BLUE)
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set(xticks=range(len(differences)), xticklabels=[kind.replace(", ", ",\n") for kind in differences],
           xlim=(-0.5, len(differences) - 0.5), ylabel="training loss, with\nminus without recurrence")
    ax.grid(axis="x", visible=False)
    title(fig, "With recurrence the training loss is lower where sequences are longest; each dot is a seed")
    draw(fig)
