"""Train VisionGRU-nano, models of its size and variants of it, by the loops of train.py and segment.py.

    python notebooks/compare.py --model swin --out runs/swin --data cifar10 --img-size 48 --epochs 12
    python notebooks/compare.py --segment --model swin --out runs/street --data camvid --iters 4000
    python notebooks/compare.py --recall recall.jsonl            the distance tasks of notebook 4
    python notebooks/compare.py --plot curves.png runs/*/log.jsonl

The first two accept the training options of train.py or, with --segment, of segment.py. A run leaves the files that
those scripts leave, and OUT.jsonl: first the command, commit and machine; then the lines of the run's log; last the
best score, and the classes that the best weights predict for the validation images, in order and in float32.

The models have 1.7 to 2.0 M parameters with ten classes; their multiply-adds differ. All are trained with VisionGRU's
recipe; only the learning rate should be tuned. "nano, X" is nano with X changed, "X+Y" with both. Only VisionGRU
supports --grad-checkpointing, --compile and --weights; resnet and vit ignore --drop-path.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402 (before torch, for OpenMP)
import segment  # noqa: E402
import visiongru  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torchvision.models import ConvNeXt, ResNet, SwinTransformer, VisionTransformer  # noqa: E402
from torchvision.models.convnext import CNBlockConfig  # noqa: E402
from torchvision.models.resnet import BasicBlock  # noqa: E402
from torchvision.models.vision_transformer import EncoderBlock  # noqa: E402


# Models of its size ---------------------------------------------------------------------------------------------------

class Staged(nn.Module):
    """A hierarchical classifier with VisionGRU's interface to UPerNet: `.dims` and `.features`.

    Args:
        stages: four modules, whose maps are at strides 4, 8, 16 and 32.
        dims: the channels of the maps.
        head: maps the last map to logits.
        channels_last: whether the maps are (B, H, W, C).
    """

    def __init__(self, stages, dims, head, channels_last=False):
        super().__init__()
        self.stages, self.dims, self.head, self.channels_last = nn.ModuleList(stages), list(dims), head, channels_last

    def maps(self, x):
        for stage in self.stages:
            x = stage(x)
            yield x

    def features(self, x):
        return [x.permute(0, 3, 1, 2) if self.channels_last else x for x in self.maps(x)]

    def forward(self, x):
        *_, last = self.maps(x)
        return self.head(last)


def convnext(num_classes, layer_scale, drop_path):
    """torchvision's ConvNeXt. The published layer scale, 1e-6, suits long runs; 1 suits short ones."""
    dims, depths = (32, 64, 128, 256), (1, 1, 8, 1)
    setting = [CNBlockConfig(*row) for row in zip(dims, (*dims[1:], None), depths)]
    model = ConvNeXt(setting, drop_path, layer_scale, num_classes=num_classes)
    parts = model.features  # stem, stage 1, downsampling, stage 2, ...
    return Staged([nn.Sequential(parts[i], parts[i + 1]) for i in (0, 2, 4, 6)], dims,
                  nn.Sequential(model.avgpool, model.classifier))


def swin(num_classes, drop_path, window):
    """torchvision's Swin. The window's side is a quarter of the first map's in classification, 3 x 3 at 48 px, and an
    eighth in segmentation, as published. There a quarter cost 7 points of mIoU: larger validation images are padded."""
    dims = (24, 48, 96, 192)
    model = SwinTransformer([4, 4], dims[0], [2, 2, 6, 2], [1, 2, 4, 8], [window, window],
                            stochastic_depth_prob=drop_path, num_classes=num_classes)
    parts = model.features  # patches, stage 1, merging, stage 2, ...
    return Staged([nn.Sequential(parts[i], parts[i + 1]) for i in (0, 2, 4, 6)], dims,
                  nn.Sequential(model.norm, model.permute, model.avgpool, model.flatten, model.head),
                  channels_last=True)


def resnet(num_classes):
    """torchvision's ResNet of basic blocks, half as wide as ResNet-18, with 2, 2, 3, 1 of them."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes)
    dims, model.inplanes = (32, 64, 128, 256), 32
    stem = nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), model.maxpool)
    layers = [model._make_layer(BasicBlock, width, depth, stride)
              for width, depth, stride in zip(dims, (2, 2, 3, 1), (1, 2, 2, 2))]
    for conv in (module for part in (stem, *layers) for module in part.modules() if isinstance(module, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as in ResNet.__init__
    return Staged([nn.Sequential(stem, layers[0]), *layers[1:]], dims,
                  nn.Sequential(model.avgpool, nn.Flatten(), nn.Linear(dims[-1], num_classes)))


def vit(num_classes, img_size):
    """torchvision's ViT with patches of 8 pixels. It has a single map, so UPerNet cannot use it."""
    return VisionTransformer(img_size, patch_size=8, num_layers=9, num_heads=4, hidden_dim=128, mlp_dim=512,
                             num_classes=num_classes)


# Variants of nano -----------------------------------------------------------------------------------------------------

class Columns(nn.Module):
    """A 2DGRU that scans along columns: it runs on the transposed image."""

    def __init__(self, gru):
        super().__init__()
        self.gru = gru

    def forward(self, x):
        return self.gru(x.transpose(1, 2).contiguous()).transpose(1, 2)


def patches(conv):
    """The same convolution without overlap: the kernel is as large as the stride, as in ConvNeXt."""
    return nn.Conv2d(conv.in_channels, conv.out_channels, conv.stride, conv.stride)


def change(block, number, what):
    """Change one thing in a block of nano; `number` is its index."""
    if what in visiongru.SCANS:
        block.gru.left.scan = block.gru.right.scan = what
    elif what == "one direction":  # both minGRUs read forward; the number of weights stays
        block.gru.right.register_forward_pre_hook(lambda gru, inputs, options: (inputs, {}), with_kwargs=True)
    elif what == "columns" or what == "columns in every second block":
        block.gru = Columns(block.gru) if what == "columns" or number % 2 else block.gru
    elif what == "no convolution":
        block.dwconv = nn.Identity()
    elif what == "7x7":
        dim = block.dwconv.in_channels
        block.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
    else:
        raise ValueError(what)


def nano(variant, **kw):
    model = visiongru.visiongru_nano(**kw)
    if variant == "no overlap":
        stem = model.stem
        stem.conv1, stem.conv2 = patches(stem.conv1), patches(stem.conv2)
        for downsample in model.downsamples:
            downsample.conv = patches(downsample.conv)
        return model
    for number, block in enumerate(block for stage in model.stages for block in stage):
        for what in variant.split("+"):
            change(block, number, what)
    return model


def no_recurrence(a, b, h0=None, reverse=False):
    """Replaces the scan: each state is its own gate times its own candidate."""
    return b


visiongru.SCANS["no recurrence"] = no_recurrence
VARIANTS = ["no recurrence", "no recurrence+7x7", "one direction", "columns", "columns in every second block",
            "no convolution", "no convolution+no recurrence", "no overlap", "log", "sequential"]
IMG_SIZE = {"px": 224}  # sets vit's positions and swin's window, 1/16 of it; `compare` replaces it by --img-size

train.MODELS |= {
    "convnext": lambda num_classes=1000, drop_path=0.0, **_: convnext(num_classes, 1.0, drop_path),
    "convnext-1e-6": lambda num_classes=1000, drop_path=0.0, **_: convnext(num_classes, 1e-6, drop_path),
    "swin": lambda num_classes=1000, drop_path=0.0, **_: swin(num_classes, drop_path, max(2, IMG_SIZE["px"] // 16)),
    "resnet": lambda num_classes=1000, **_: resnet(num_classes),
    "vit": lambda num_classes=1000, **_: vit(num_classes, IMG_SIZE["px"])}
train.MODELS |= {f"nano, {variant}": partial(nano, variant) for variant in VARIANTS}


# A run ----------------------------------------------------------------------------------------------------------------

def git(*words):
    try:
        return subprocess.run(["git", "-C", HERE, *words], capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return ""


def processor(device):
    """The name of the accelerator, or of the processor if `device` is a CPU or there is no accelerator."""
    if not device.startswith("cpu") and torch.accelerator.is_available():
        module = torch.get_device_module()
        return module.get_device_name() if hasattr(module, "get_device_name") else module.__name__
    info = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def origin(device, command):
    """Where the numbers come from: command, commit and machine."""
    count = os.environ.get("WORLD_SIZE")  # set by torchrun
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={count}"] if count else ["python"]
    threads = f"{count} processes of " * bool(count) + f"{torch.get_num_threads()} thread(s)"
    return {"command": shlex.join([*launcher, "notebooks/compare.py", *command]),
            "commit": git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", ":/*.py")),
            "machine": f"{processor(device)}, {threads}, PyTorch {torch.__version__}"}


def make_model(script, args, classes):
    if script is train:
        return train.MODELS[args.model](num_classes=classes)
    return visiongru.UPerNet(train.MODELS[args.model](), classes, args.channels, args.aux_channels)


def describe(script, args, argv):
    """A run's first line: the model, its settings and size, and where the numbers come from."""
    size = args.img_size if script is train else args.crop_size
    [data] = script.open_data(args, ["train" if script is train else "training"])
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = make_model(script, args, len(data.classes)).eval()
        model(torch.empty(1, 3, size, size))
    return {"model": args.model, "seed": args.seed, "img_size": size, "lr": args.lr,
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds": counter.get_total_flops() // 2,  # per image
            **origin(args.device, argv)}


@torch.inference_mode()
def predictions(model, args):
    """The class that a classifier predicts for each validation image."""
    [data] = train.open_data(args, ["val"])
    data.transform = train.eval_transform(args.img_size, args.val_resize)
    loader = train.validation_loader(data, 64, args, train.Distributed())
    normalize = train.normalizer(torch.device("cpu"))
    return [label for images, _ in loader for label in model(normalize(images)).argmax(1).tolist()]


def compare(script, argv, command):
    """Train with `script` and the options in argv. -> the exit status."""
    args = script.parse_arguments(argv)
    if args.eval or args.predict:
        raise train.UserError("compare.py trains; --eval and --predict are options of train.py and segment.py")
    if args.model == "vit" and (script is segment or args.img_size % 8):
        raise train.UserError("vit has one map, but UPerNet needs four; and its image size must be a multiple of 8 px")
    IMG_SIZE["px"] = args.img_size if script is train else args.crop_size // 2
    first = describe(script, args, command)
    status = script.main(argv)
    if status or os.environ.get("RANK", "0") != "0":
        return status
    best = train.load_checkpoint(Path(args.out, "best.pt"))
    model = make_model(script, args, len(best["config"]["classes"])).eval()
    model.load_state_dict(best[best["better"]])
    last = {"best": best["best"]} | ({"predicted": predictions(model, args)} if script is train else {})
    log, end = Path(args.out, "log.jsonl").read_text(), json.dumps(last, separators=(",", ":"))
    train.atomic_write(Path(f"{Path(args.out)}.jsonl"), f"{json.dumps(first)}\n{log}{end}\n".encode())
    return 0


# Recall at a distance -------------------------------------------------------------------------------------------------

SIDE = 32  # positions of 2 x 2 pixels along a side of the image
COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
OCTAVES = [0, *(2**k for k in range(11))]  # of distance: 0, 1, 2-3, 4-7, ..., 512-1023
TASKS = ["reading order", "top of the column", "path"]


def recall_images(task, count, generator):
    """Grey noise with coloured keys. -> images (count, 3, 2 SIDE, 2 SIDE) and, for each position in reading order,
    (count, SIDE**2), the colour of its key and the distance to it.

    "reading order": the key is the last one at or before the position; the distance is in positions. The gaps between
    keys are log-uniform from 4 to 1,000.
    "top of the column": the top row consists of keys; the key is that of the column, and the distance is in rows.
    "path": the key is the root of a white tree; the distance is in steps along the tree. Off the trees it is -1. Nodes
    are at even rows and columns; one in eight is a root, the others are joined to the node above or on the left.
    """
    T = SIDE**2
    place = torch.arange(T).expand(count, T)
    row, column = place // SIDE, place % SIDE
    on_path = torch.zeros(count, T, dtype=torch.bool)
    if task == "reading order":
        gaps = 4 * 250 ** torch.rand(count, T // 4, generator=generator)
        starts = F.pad(gaps.long().cumsum(dim=1), (1, 0)).clamp(max=T)          # of keys; from T on they are outside
        is_key = torch.zeros(count, T + 1, dtype=torch.bool).scatter(1, starts, True)[:, :T]
        key = (place * is_key).cummax(dim=1).values
        distance = place - key
    elif task == "top of the column":
        is_key, key, distance = row == 0, column, row
    else:
        node, draw = (row % 2 == 0) & (column % 2 == 0), torch.rand(2, count, T, generator=generator)
        is_key = node & ((draw[0] < 1 / 8) | (place == 0))
        left = (column > 0) & ((row == 0) | (draw[1] < 0.5))
        step = torch.where(node & ~is_key, torch.where(left, 1, SIDE), 0)       # to the next position of the path
        step += (step.roll(-1, 1) == 1) + SIDE * (step.roll(-SIDE, 1) == SIDE)  # and the same from between two nodes
        on_path, key, distance = step > 0, place - step, (step > 0).long()
        for _ in range(6):  # each time twice as far, up to 64 steps
            distance, key = distance + distance.gather(1, key), key.gather(1, key)
        distance = torch.where(on_path | is_key, distance, -1)
    colour = torch.randint(len(COLOURS), (count, T), generator=generator)
    noise = torch.rand(count, 1, 2 * SIDE, 2 * SIDE, generator=generator)

    def enlarged(values):  # (count, T, C) -> (count, C, 2 SIDE, 2 SIDE)
        return F.interpolate(values.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2), scale_factor=2)

    shown = torch.where(is_key[..., None], COLOURS[colour], 1.0)                # keys are coloured, paths are white
    where = enlarged((is_key | on_path)[..., None].float()) > 0
    return torch.where(where, enlarged(shown), noise) - 0.5, colour.gather(1, key), distance


class Recaller(nn.Module):
    """Patches of 2 x 2 pixels, two blocks, and a linear classifier at each position: (B, 3, H, W) -> (B, T, 4).

    There is one stage and no pooling, so only the blocks connect positions. `model` is "attention", ViT blocks with one
    head and learned positions, or names a variant of VisionGRU's blocks.
    """

    def __init__(self, model, dim=16):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, dim, kernel_size=2, stride=2), nn.Linear(dim, len(COLOURS))
        self.attention = model == "attention"
        if self.attention:
            self.positions = nn.Parameter(0.02 * torch.randn(SIDE**2, dim))
            self.blocks = nn.Sequential(*(EncoderBlock(1, dim, 4 * dim, 0.0, 0.0) for _ in range(2)))
        else:
            self.blocks = nn.Sequential(*(visiongru.Block(dim) for _ in range(2)))
            for number, block in enumerate(self.blocks):
                for what in model.split("+"):
                    change(block, number, what)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        if self.attention:
            return self.head(self.blocks(x.flatten(1, 2) + self.positions))
        return self.head(self.blocks(x).flatten(1, 2))


def recall(task, model, seed, steps=400, batch=8, lr=1e-2):
    """Train a Recaller. -> a dict: the settings, the mean loss of every 20 steps, and the accuracy in % for each octave
    of distance.

    The loss weighs an answer by 1 / (1 + distance), so each octave of distance counts about the same. Most positions
    are far from their key: without the weights, 400 steps teach nothing.
    """
    torch.manual_seed(seed)
    network, images = Recaller(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: train.warmup_cosine(step + 1, steps, steps // 10))
    losses, began = [], time.perf_counter()
    for _ in range(steps):
        x, answer, distance = recall_images(task, batch, images)
        weight = (distance >= 0) / (1 + distance.abs())
        each = F.cross_entropy(network(x).flatten(0, 1), answer.flatten(), reduction="none")
        loss = (weight.flatten() * each).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - began

    x, answer, distance = recall_images(task, 1000, torch.Generator().manual_seed(10_000 + seed))
    with torch.inference_mode():
        right = torch.cat([network(part).argmax(dim=-1) for part in x.split(50)]) == answer
    within = [right[(low <= distance) & (distance < high)] for low, high in zip(OCTAVES, OCTAVES[1:])]
    return {"task": task, "model": model, "seed": seed, "steps": steps, "lr": lr, "seconds": round(seconds, 1),
            "parameters": sum(p.numel() for p in network.parameters()),
            "losses": [round(sum(losses[k:k + 20]) / 20, 4) for k in range(0, steps, 20)],
            "accuracy": [round(100 * some.float().mean().item(), 2) if len(some) else None for some in within]}


RECALL_MODELS = ["parallel", "no recurrence", "no recurrence+7x7", "one direction", "columns",
                 "columns in every second block", "attention"]


def recall_all(path, tasks, command):
    """Train each model on each task with five seeds. -> the exit status; `path` gets a line about the runs, then a line
    per run."""
    with open(path, "w") as file:
        print(json.dumps(origin("cpu", command)), file=file, flush=True)
        for seed in range(5):
            for task in tasks:
                for model in RECALL_MODELS:
                    print(json.dumps(recall(task, model, seed), separators=(",", ":")), file=file, flush=True)
    return 0


# Curves, and the command line -----------------------------------------------------------------------------------------

def plot(picture, logs):
    """Plot the training loss and the score of runs against the steps."""
    import figures
    names = {"miou": "mIoU", "ema_top1": "top-1 of the average", "top1": "top-1"}
    figures.use_style()
    fig, axes = figures.plt.subplots(1, 2, figsize=(11, 4))
    for log in map(Path, logs):
        name = log.parent.name if log.name == "log.jsonl" else log.stem
        try:
            entries = [entry for entry in map(json.loads, log.read_text().splitlines()) if "loss" in entry]
            steps = [entry["step"] for entry in entries]
            score = next(key for key in names if key in entries[0])
        except (OSError, ValueError, LookupError, StopIteration) as error:
            raise train.UserError(f"{log} is not the log of a run that was validated: {error}") from None
        axes[0].plot(steps, [entry["loss"] for entry in entries])
        curve, = axes[1].plot(steps, [entry[score] for entry in entries])
        text = f"{name}: {names[score]} {entries[-1][score]:.1f}"
        figures.label(axes[1], steps[-1], entries[-1][score], text, curve.get_color())
    axes[0].set(title="Training loss", xlabel="steps")
    axes[1].set(title="Score on the validation images, %", xlabel="steps")
    for ax in axes:
        ax.locator_params(axis="x", nbins=5)  # so that the labels do not touch
    fig.savefig(picture)
    return 0


def main():
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                          allow_abbrev=False)
    parser.add_argument("--segment", action="store_true", help="train with segment.py rather than train.py")
    parser.add_argument("--recall", metavar="LOG", help="train on the distance tasks and write LOG")
    parser.add_argument("--plot", nargs="+", metavar=("PNG", "LOG"), help="plot the curves of runs' log.jsonl")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS[:2], help="the tasks of --recall")
    ours, argv = parser.parse_known_args()
    if ours.plot:
        return plot(ours.plot[0], ours.plot[1:])
    if ours.recall:
        return recall_all(ours.recall, ours.tasks, sys.argv[1:])
    return compare(segment if ours.segment else train, argv, sys.argv[1:])


if __name__ == "__main__":
    train.run_main(main)
