"""Train VisionGRU on a folder of images, or on a built-in set of drawn shapes.

    python train.py                                                     the built-in set, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data /imagenet               the paper's recipe on eight GPUs
    python train.py --data DIR --weights best.pt --lr 1e-4 --epochs 30  fine-tuning on DIR/{train,val}/<class>/*.jpg
    python train.py --eval --weights best.pt --data DIR                 accuracy of a checkpoint
    python train.py --predict cat.jpg --weights best.pt                 top-5 classes of images

Part I is a training script to read from top to bottom: `train`, the training step below it, evaluation, prediction,
data, options. Part II is the engine that segment.py shares: runs and checkpoints, signals, processes, files, errors.

--batch-size is the global batch, the number of images per optimizer step over all processes, so the recipe does not
depend on how many there are. Everything random is seeded by the run's seed and the number of the step or image. Results
therefore do not depend on the number of workers, and a run that is stopped and resumed ends as if it had not been.
Where a GPU rounds differently from run to run, or --drop-path is on, they agree up to that.

OUT/last.pt is written before and after each validation, every --save-every steps, and on a signal. OUT/best.pt holds
the weights that validated best, their moving average, the class names and the preprocessing; OUT/log.jsonl has a line
for each validation.

For days on many GPUs: add --resume auto --save-every 500, and --max-restarts=3 for torchrun, which then replaces a
process that dies; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or the new processes read what the dead ones left in
torchrun's store. On several nodes add --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 on each; --out
must be on storage that they share.
Out of memory: --grad-accum-steps 4 splits each step in four, --grad-checkpointing recomputes activations in backward.
Small images: enlarge them, since the stem divides both sides by four, and distort them less than ImageNet's, such as
--img-size 64 --val-resize 64 --crop-scale 0.6 --randaug 0 0 --reprob 0 --mixup 0 --cutmix 0.
On CPU: run one single-threaded process per core, OMP_NUM_THREADS=1 torchrun --nproc_per_node=CORES train.py ...
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import platform
import random
import re
import reprlib
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

if sys.argv[0].endswith(("train.py", "segment.py")):  # Ctrl-C while torch is imported needs no traceback
    sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)

# GNU OpenMP's threads wait for work by spinning, which beside other busy processes makes a step forty times slower. A
# short spin costs nothing on a free machine. The variable is read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

import visiongru

MODELS = {"nano": visiongru.visiongru_nano, "tiny": visiongru.visiongru_tiny, "base": visiongru.visiongru_base}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, from 0 to 1


# ======================================================================================================================
# Part I. Training a classifier
# ======================================================================================================================

def train(args: Namespace, distributed: Distributed) -> None:
    """Train a classifier as `args` say, and leave the weights that validate best in OUT/best.pt."""
    device, world_size = distributed.device, distributed.world_size

    # Data
    train_data, val_data = open_data(args, ("train", "val"), distributed.print)
    train_data.transform, val_data.transform = train_transform(args), eval_transform(args.img_size, args.val_resize)
    num_classes, mixes = len(train_data.classes), bool(args.mixup or args.cutmix)
    micro_batch_size = split_batch(args, world_size, multiple=2 if mixes else 1)  # images are mixed in pairs
    steps_per_epoch = max(1, len(train_data) // args.batch_size)
    total_steps = args.epochs * steps_per_epoch
    if len(train_data) < args.batch_size:
        distributed.print(f"note: an epoch is one step, which has each of the {len(train_data)} training images "
                          f"{args.batch_size / len(train_data):.1f} times: a lower --batch-size makes it several")

    # Model, moving average, optimizer, learning rate
    torch.manual_seed(args.seed)
    model = MODELS[args.model](num_classes=num_classes, drop_path=args.drop_path,
                               grad_checkpointing=args.grad_checkpointing)
    if args.weights and not checkpoint_to_resume(args):  # a resumed run has weights of its own
        load_weights(model, load_checkpoint(args.weights), args.weights, distributed.print, train_data.classes)
    model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False) if args.model_ema_decay else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=tuple(args.opt_betas),
                                  weight_decay=args.weight_decay, fused=True)
    warmup_steps = args.warmup_epochs * steps_per_epoch
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, total_steps, warmup_steps))

    # The run: first its state, new or resumed, then what wraps the model
    run = Run(args, distributed, (train_data, val_data), total_steps, model=model, ema=ema, optimizer=optimizer,
              scheduler=scheduler)
    run.start_or_resume()
    install_signal_handlers(distributed)
    if compiles(args, device):
        compile_parts(model, distributed.print)
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model
    distributed.print(f"{num_classes} classes; {len(train_data):,} training and {len(val_data):,} validation images of "
                      f"{args.img_size} px; {args.epochs} epochs of {steps_per_epoch} steps of {args.batch_size}")
    train_batches = iter(training_loader(train_data, range(run.step, total_steps), args, distributed))
    val_loader = validation_loader(val_data, micro_batch_size, args, distributed)
    normalize, augment = normalizer(device), batch_augmentation(args, num_classes)

    def loss_fn(images: Tensor, labels: Tensor, first: int) -> Tensor:
        images, targets = augment(normalize(images), labels, run.step, first)
        return F.cross_entropy(ddp_model(images), targets, label_smoothing=args.smoothing)

    for epoch in range(run.validated // steps_per_epoch, args.epochs):
        ddp_model.train()
        for _ in run.steps(until=(epoch + 1) * steps_per_epoch):
            train_step(run, ddp_model, train_batches, loss_fn)
        models = {"model": model, "ema": ema} if ema else {"model": model}
        scores = run.validate(lambda: evaluate(models, val_loader, distributed, normalize, run.autocast))
        better = max(scores, key=lambda name: scores[name]["top1"])
        text = "  ".join(f"{name}: top-1 {s['top1']:.2f} top-5 {s['top5']:.2f}" for name, s in scores.items())
        ema_scores = {f"ema_{key}": value for key, value in scores.get("ema", {}).items()}
        run.record({"epoch": epoch + 1, **scores["model"], **ema_scores},
                   f"epoch {epoch + 1:3d}/{args.epochs}  {text}", scores[better]["top1"], better)
    distributed.print(f"done: {run.out / 'best.pt'} has top-1 {run.best:.2f} %. To evaluate it:\n  python train.py "
                      f"--eval --weights {shlex.quote(str(run.out / 'best.pt'))}"
                      + (f" --data {shlex.quote(args.data)}" if args.data else ""))


def train_step(run: Run, ddp_model: nn.Module, batches: Iterator, loss_fn: Callable) -> None:
    """One optimizer step, over --grad-accum-steps micro-batches (inputs, targets) from `batches`.

    loss_fn(inputs, targets, first) -> the mean loss of a micro-batch whose first image is number `first` of the step's
    --batch-size. Nothing here waits for the device: the loss is read after the next step, by `Run.steps`.
    """
    args, device = run.args, run.distributed.device
    step_loss = torch.zeros((), device=device)
    for micro_step in range(args.grad_accum_steps):
        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        chunk = run.distributed.rank * args.grad_accum_steps + micro_step  # of the step's images
        torch.manual_seed(random_seed(args.seed, "step", run.step, chunk))  # for dropout and stochastic depth
        # Gradients are all-reduced once per step, in the backward pass of its last micro-batch.
        is_last = micro_step == args.grad_accum_steps - 1
        with contextlib.nullcontext() if is_last or ddp_model is run.model else ddp_model.no_sync():
            with run.autocast():
                loss = loss_fn(inputs, targets, chunk * len(inputs)) / args.grad_accum_steps
            run.scaler.scale(loss).backward()
        step_loss += loss.detach()
    run.report_loss(step_loss)
    run.scaler.step(run.optimizer)  # in fp16 it skips a step whose gradients overflow
    run.scaler.update()             # and halves the scale
    run.optimizer.zero_grad(set_to_none=True)
    run.scheduler.step()
    if run.ema:
        update_ema(run.ema, run.model, args.model_ema_decay)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the parameters of `ema` towards the model's: ema = decay * ema + (1 - decay) * model. Buffers are copied.
    (torch.optim.swa_utils.AveragedModel waits for the device in each step.)"""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for ours, theirs in zip(ema.buffers(), model.buffers()):
        ours.copy_(theirs)


def warmup_cosine(step: int, total_steps: int, warmup_steps: float) -> float:
    """The learning rate as a fraction of its peak: linear from 0 during warm-up, then a cosine to 0."""
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def check_schedule(scheduler: LambdaLR, total_steps: int, log: Callable) -> None:
    """A note if a run ends before its warm-up has come half-way, or is to learn nothing."""
    base, highest = scheduler.base_lrs[0], max(map(scheduler.lr_lambdas[0], range(total_steps)))
    if highest < 0.5 or not base:
        log(f"note: --lr is {base:.2e}, and no step of this run of {total_steps} has more than {highest * base:.2e}: "
            f"a shorter warm-up, more steps or another --lr let it learn")


# Evaluation and prediction --------------------------------------------------------------------------------------------

@torch.compiler.set_stance("force_eager")  # --compile is for training: here images may have any size
@torch.inference_mode()
def evaluate(models: dict[str, nn.Module], loader: Iterable, distributed: Distributed, normalize: Callable,
             autocast: Callable = contextlib.nullcontext) -> dict[str, dict[str, float]]:
    """Score several models in one pass over the data.

    -> for each name the mean loss, and top-1 and top-5 accuracy in percent (100 for five classes or fewer), exact over
    all processes. Raises Stopped if one of them was told to stop.
    """
    sums, count = {name: [torch.zeros(3, device=distributed.device)] for name in models}, 0
    for images, labels in loader:
        if distributed.stop_signal:
            break
        images, labels = (tensor.to(distributed.device, non_blocking=True) for tensor in (images, labels))
        images = normalize(images)
        for name, model in models.items():
            model.eval()
            with autocast():
                logits = model(images).float()
            correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums[name].append(torch.stack([loss, correct[:, 0].sum(), correct.sum()]))
        count += len(labels)
    totals = [torch.stack(batches).to("cpu").double().sum(0) for batches in sums.values()]  # the first wait for a GPU
    *totals, count = distributed.all_reduce([*torch.cat(totals).tolist(), count])
    distributed.raise_if_stopped()
    check_finite(torch.tensor(totals), "the validation images")
    return {name: {"val_loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
            for name, loss, top1, top5 in zip(models, totals[::3], totals[1::3], totals[2::3])}


def evaluate_checkpoint(args: Namespace, distributed: Distributed) -> None:
    """Print the accuracy of the checkpoint --weights on the validation images."""
    model, normalize = model_from_checkpoint(args, distributed.device)
    [data] = open_data(args, ["val"], distributed.print)
    check_classes(args.classes or [None] * model.num_classes, data.classes, args.weights)
    data.transform = eval_transform(args.img_size, args.val_resize)
    loader = validation_loader(data, max(1, args.batch_size // distributed.world_size), args, distributed)
    loader = tqdm(loader, unit="batch", leave=False, disable=distributed.rank > 0 or None)
    _, autocast = precision(args.amp, distributed.device)
    scores = evaluate({"model": model}, loader, distributed, normalize, autocast)["model"]
    if distributed.rank == 0:
        print_result(f"{args.weights}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %, loss "
                     f"{scores['val_loss']:.4f} ({len(data):,} images)")


@torch.inference_mode()
def predict(args: Namespace, distributed: Distributed) -> int:
    """Print the top-5 classes of images. -> the exit status: 2 if an image could not be read. Such an image is reported
    and the rest are still processed."""
    model, normalize = model_from_checkpoint(args, distributed.device)
    transform = eval_transform(args.img_size, args.val_resize)
    _, autocast = precision(args.amp, distributed.device)
    unread = 0
    for path in args.predict[distributed.rank::distributed.world_size]:
        try:
            image = transform(read_image(path))[None].to(distributed.device)
            with autocast():
                logits = model(normalize(image)).float()[0]
            check_finite(logits, path)
        except Exception as error:
            report_image(path, error)
            unread += 1
            continue
        top = logits.softmax(dim=0).topk(min(5, len(logits)))
        lines = [f"  {100 * p:6.2f} %  {args.classes[k] if args.classes else f'class {k}'}"
                 for p, k in zip(top.values.tolist(), top.indices.tolist())]
        print_result("\n".join(map(printable, [path, *lines])))
    [unread] = distributed.all_reduce([unread])  # wait for all: torchrun kills the rest when one exits with an error
    return 2 if unread else 0


def model_from_checkpoint(args: Namespace, device: torch.device) -> tuple[nn.Module, Callable]:
    """-> the model of the checkpoint --weights, ready to use, and its normalization. Its class names are put into
    args.classes (None for a bare state dict)."""
    weights = open_checkpoint(args, img_size=224, val_resize=256, mean=MEAN, std=STD, classes=None)
    if "head.weight" not in weights:
        raise UserError(f"{args.weights} has no classifier")
    model = MODELS[args.model](num_classes=len(weights["head.weight"]))
    load_weights(model, weights, args.weights)
    return model.to(device, memory_format=torch.channels_last).eval(), normalizer(device, args.mean, args.std)


# Data: images travel as uint8, a quarter of the bytes, and are normalized, erased and mixed on the device -------------

class Pictures(Dataset):
    """ROOT/<class>/<images>, which may lie in folders within, as (PIL image, class)."""

    transform = None

    def __init__(self, root: Path, log: Callable):
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        labels, paths = {name: label for label, name in enumerate(self.classes)}, find_files(root, EXTENSIONS, log)
        tops = [path[len(os.path.join(root, "")):].split(os.sep)[0] for path in paths]
        self.samples = [(path, labels[top]) for path, top in zip(paths, tops) if top in labels]
        note_left_out([path for path, top in zip(paths, tops) if top not in labels], "no class's folder has them", log)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple:
        path, label = self.samples[index]
        image = read_image(path)
        return (self.transform(image) if self.transform else image), label


def open_data(args: Namespace, splits: Iterable[str], log: Callable = print) -> list[Dataset]:
    """The data sets DIR/split/<class>/<images>, or the built-in ones: items (image, class), with the same `classes`."""
    if args.data is None:
        return [Shapes(split, {"train": 14_000, "val": 1_000}[split]) for split in splits]
    layout = f"--data {args.data}: expected {{train,val}}/<class>/<images> in it"
    try:
        sets = [Pictures(Path(args.data, split), log) for split in splits]
    except OSError as error:
        raise UserError(f"{layout}: {error}") from None
    for split, data in zip(splits, sets):
        empty = {*data.classes} - {data.classes[label] for _, label in data.samples}
        if not data.samples or split == "train" and empty:  # in val a class may be empty
            raise UserError(f"{layout}: there are no images in {', '.join(sorted(empty if data.samples else [split]))}")
        if split == "train" and len(data.classes) == 1:
            raise UserError(f"{layout}: {data.classes[0]} is the only class, and nothing is learned from one; do the "
                            f"classes' folders lie in it?")
    if sets[0].classes != sets[-1].classes:
        raise UserError(f"--data {args.data}: train and val have different classes; in one of them only: "
                        f"{', '.join(sorted({*sets[0].classes} ^ {*sets[-1].classes}))}")
    return sets


def eval_transform(img_size: int, val_resize: int) -> Callable:
    """Shorter side to `val_resize` pixels, then the central square: PIL image -> (3, img_size, img_size) uint8."""
    return v2.Compose([center_of_long, v2.Resize(max(img_size, val_resize)), v2.CenterCrop(img_size), v2.PILToTensor()])


def center_of_long(image: Image.Image) -> Image.Image:
    """At most four times as long as wide, around the center: a line of pixels, resized whole, would fill the memory."""
    return v2.functional.center_crop(image, [min(side, 4 * min(image.size)) for side in (image.height, image.width)])


def train_transform(args: Namespace) -> Callable:
    """The recipe's augmentation of single images: PIL image -> (3, S, S) uint8. `batch_augmentation` does the rest."""
    if args.crop_scale < 1:
        crop = v2.RandomResizedCrop(args.img_size, scale=(args.crop_scale, 1))
    else:
        side = max(args.img_size, args.val_resize)
        crop = v2.Compose([center_of_long, v2.Resize(side), v2.CenterCrop(args.img_size)])
    return v2.Compose([crop, v2.RandomHorizontalFlip(args.hflip), v2.RandAugment(*args.randaug), v2.PILToTensor()])


def batch_augmentation(args: Namespace, num_classes: int) -> Callable:
    """Random erasing, then mixup or cutmix, as a function of a micro-batch on its device. What it does to an image
    depends on (seed, step, the image's number in the step) alone: not on the process or the micro-batch."""
    def augment(images: Tensor, labels: Tensor, step: int, first: int) -> tuple[Tensor, Tensor]:
        if args.reprob:
            images = random_erasing(images, args.reprob, first, args.batch_size, random_seed(args.seed, "erase", step))
        if not (args.mixup or args.cutmix):
            return images, labels
        targets = F.one_hot(labels, num_classes).float()
        return mixup_or_cutmix(images, targets, args.mixup, args.cutmix, random_seed(args.seed, "mix", step))
    return augment


def random_erasing(images: Tensor, probability: float, first: int, batch_size: int, seed: int) -> Tensor:
    """Fill a rectangle of 2 to 33 % of an image's area, of aspect ratio 0.3 to 3.3, with noise.

    images: (B, 3, H, W), normalized: numbers first, ..., first + B - 1 of the `batch_size` images of a step. Each has a
    rectangle of its own; the noise under it is cut from one picture for each step.
    """
    (B, _, H, W), device = images.shape, images.device
    generator = torch.Generator(device).manual_seed(seed)
    chances = torch.rand(batch_size, 5, generator=generator, device=device)[first:first + B, :, None]
    chosen, area, ratio, top, left = chances.unbind(1)  # (B, 1) each
    area, ratio = H * W * (0.02 + 0.31 * area), 0.3 ** (2 * ratio - 1)
    height, width = (area * ratio).sqrt().clamp(max=H), (area / ratio).sqrt().clamp(max=W)

    def inside(start: Tensor, length: Tensor, side: int) -> Tensor:  # (B, side)
        offset = torch.arange(side, device=device) + 0.5 - start * (side - length)
        return (0 <= offset) & (offset < length)
    rectangle = inside(top, height, H)[:, None, :, None] & inside(left, width, W)[:, None, None, :]
    noise = torch.randn(3, H, W, generator=generator, device=device)
    return torch.where(rectangle & (chosen < probability)[:, :, None, None], noise, images)


def mixup_or_cutmix(images: Tensor, targets: Tensor, mixup: float, cutmix: float, seed: int) -> tuple[Tensor, Tensor]:
    """Mix neighbours, image 0 with 1, 2 with 3 and so on, in one proportion; with both alphas above 0 one of the two
    methods, with equal probability. images (B, 3, H, W), targets (B, K) soft labels -> the same shapes."""
    rng = random.Random(seed)
    use_cutmix = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    keep = rng.betavariate(cutmix, cutmix) if use_cutmix else rng.betavariate(mixup, mixup)

    def neighbours(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    if use_cutmix:  # a rectangle of the neighbour's, with the proportions of the image
        H, W = images.shape[2:]
        y, x, half = rng.randrange(H), rng.randrange(W), 0.5 * math.sqrt(1 - keep)
        top, bottom = max(0, y - int(half * H)), min(H, y + int(half * H))
        left, right = max(0, x - int(half * W)), min(W, x + int(half * W))
        rectangle = (..., slice(top, bottom), slice(left, right))
        mixed = images.clone()
        mixed[rectangle] = neighbours(images)[rectangle]
        keep = 1 - (bottom - top) * (right - left) / (H * W)
    else:
        mixed = images.lerp(neighbours(images), 1 - keep)
    return mixed, targets.lerp(neighbours(targets), 1 - keep)


# Options: DeiT's recipe, as the paper uses it, and what suits the built-in set ----------------------------------------

def options() -> dict[str, Option]:
    """An Option: what argparse takes; the default with --data, the recipe; the default without, for the built-in set,
    which has few epochs and no augmentation that cuts off the shapes; help. A default of None depends on others."""
    return {
        "data": Option(TEXT, None, None, "folder with {train,val}/<class>/<images>; without it: the built-in set"),
        "model": Option({"choices": MODELS}, "tiny", "nano", "model size; with --weights that of the checkpoint"),
        "img-size": Option(PIXELS, 224, 48, "image size in pixels"),
        "val-resize": Option(PIXELS, None, 48, "shorter side before the center crop (img-size x 256 / 224)"),
        "epochs": Option(COUNT, 300, 4, "training epochs"),
        "batch-size": Option(COUNT, 1024, 32, "global batch size: images per optimizer step over all processes"),
        "lr": Option(AMOUNT, None, 1e-3, "peak learning rate (1e-3 x batch-size / 1024)"),
        "weight-decay": Option(AMOUNT, 0.05, 0.05, "weight decay, on every parameter"),
        "warmup-epochs": Option(AMOUNT, None, 1, "epochs of linear learning-rate warm-up (epochs / 15)"),
        "crop-scale": Option(SHARE, 0.08, 1.0, "minimum area of a random resized crop, as a fraction; 1: no crop"),
        "randaug": Option(two(UP_TO_30), [2, 9], [0, 0], "number of operations and magnitude of RandAugment"),
        "reprob": Option(SHARE, 0.25, 0.0, "probability of random erasing"),
        "mixup": Option(ALPHA, 0.8, 0.0, "mixup alpha; 0: off"),
        "cutmix": Option(ALPHA, 1.0, 0.0, "cutmix alpha; 0: off"),
        "smoothing": Option(BELOW_1, 0.1, 0.0, "label smoothing"),
        "model-ema-decay": Option(BELOW_1, 0.9999, 0.99, "decay of the moving average of the weights; 0: off"),
    } | shared_options()


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    """The command line, with every default filled in. Raises UserError."""
    predicting = CHECKPOINT_DEFAULTS | {"img_size": None, "val_resize": None}
    evaluating = predicting | {"data": None, "batch_size": 64, "workers": None}
    args = parse(argv, __doc__, options(), {"eval": evaluating, "predict": predicting}, {"weights": ["model"]})
    if args.img_size and not args.val_resize:
        args.val_resize = round(args.img_size * 256 / 224)
    if not (args.eval or args.predict):
        args.lr = 1e-3 * args.batch_size / 1024 if args.lr is None else args.lr
        args.warmup_epochs = args.epochs / 15 if args.warmup_epochs is None else args.warmup_epochs
        args.out = args.out or f"runs/{Path(args.data).resolve().name if args.data else 'shapes'}-{args.model}"
    return args


def main(argv: list[str] | None = None) -> int:
    return dispatch(parse_arguments(argv), train, evaluate_checkpoint, predict)


# ======================================================================================================================
# Part II. The engine that segment.py shares
# ======================================================================================================================

# Runs -----------------------------------------------------------------------------------------------------------------

class Run:
    """The state of a training run, and the folder OUT that keeps it.

    OUT/last.pt holds all of it, written after each validation, every --save-every steps and when the run is told to
    stop; OUT/best.pt the weights that validated best; OUT/log.jsonl a line for each validation.

    Args:
        data: the training and the validation set, with their `classes`.
        total_steps: optimizer steps of the whole run.
        parts: what has a state_dict: `model`, `ema` (or None), `optimizer`, `scheduler`.

    Attributes:
        step: optimizer steps taken.    validated: `step` at the last validation.    lr: of the last step.
        best: the best score so far.    better: which weights scored better at the last validation, "model" or "ema".
        autocast: to be entered by `with run.autocast():`; `dtype` is its type, or None.
        scaler: the gradient scaler, which does nothing but in fp16.
    """

    def __init__(self, args: Namespace, distributed: Distributed, data: tuple[Dataset, Dataset], total_steps: int,
                 **parts):
        self.args, self.distributed, self.total_steps, self.out = args, distributed, total_steps, Path(args.out)
        self.dtype, self.autocast = precision(args.amp, distributed.device)
        self.scaler = torch.amp.GradScaler(distributed.device.type, enabled=self.dtype == torch.float16)
        self.parts = parts | {"scaler": self.scaler}
        self.model, self.ema = parts["model"], parts["ema"]
        self.optimizer, self.scheduler = parts["optimizer"], parts["scheduler"]
        self.config = {**vars(args), "classes": data[0].classes, "train_images": len(data[0]), "mean": list(MEAN),
                       "std": list(STD)}
        if distributed.rank == 0:
            names = "contents_of_training_files", "contents_of_validation_files"
            self.config |= dict(zip(names, map(files_digest, data)))
        self.validated, self.loss_sum, self.lr, self.best, self.better, self.log = 0, 0.0, 0.0, -1.0, "model", []
        self.reports = []  # of steps whose loss was not read yet
        self.loss = math.nan  # of the last step that was read

    @property
    def step(self) -> int:
        return self.scheduler.last_epoch

    def start_or_resume(self) -> None:
        """With --resume restore the checkpoint. UserError rather than overwrite an earlier run."""
        check_schedule(self.scheduler, self.total_steps, self.distributed.print)
        path, last = checkpoint_to_resume(self.args), self.out / "last.pt"
        checkpoint = load_checkpoint(path) if path else {}
        seen = self.distributed.all_gather((checkpoint.get("step"), checkpoint.get("config")))
        if any(other != seen[0] for other in seen):
            raise UserError(f"the processes see different {path or last}: --out must be on storage shared by all of "
                            f"them")
        for earlier in last, self.out / "best.pt", self.out / "log.jsonl":
            if os.path.lexists(earlier) and (path is None or path.resolve() != last.resolve()):
                raise UserError(f"{earlier} already exists: continue from its last.pt with --resume auto or choose "
                                f"another --out")
        if path:
            self.restore(checkpoint, path)
        if self.distributed.rank == 0:
            for name in "last.pt", "best.pt", "log.jsonl":  # of a run that was killed while it wrote
                (self.out / f"{name}.tmp").unlink(missing_ok=True)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.distributed.print(f"{type(self.model).__name__} {self.args.model}, {parameters:,} parameters, on "
                               f"{self.distributed.world_size} x {self.distributed.device}, {self.dtype or 'float32'}; "
                               f"in {self.out}" + (f"; resumed at step {self.step}" if self.step else ""))

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Take the state from a checkpoint of the same run: other data, or another recipe, would be another run."""
        if "optimizer" not in checkpoint:
            raise UserError(f"--resume {path}: this file has only weights; resume a last.pt, or start from --weights")
        files = {path: checkpoint}
        if os.path.lexists(best := self.out / "best.pt"):  # it may be damaged, another run's, or newer than last.pt
            try:
                files[best] = load_checkpoint(os.path.realpath(best))
            except UserError as error:
                raise UserError(f"{error}; mend {best}, or remove it: the next validation writes another") from None
        try:
            for file, content in files.items():
                check_classes(content["config"]["classes"], self.config["classes"], file)
                for name, before in content["config"].items():
                    now = self.config.get(name, before)
                    if now != before and name not in MAY_CHANGE:
                        raise UserError(f"--resume {file}: {name.replace('_', '-')} was {shown(before)} and is now "
                                        f"{now}; keep it, or start a new run with --weights")
            self.restore_parts(checkpoint)
            for key in STATE:
                setattr(self, key, checkpoint[key])
            self.best = files[best]["best"] if best in files else -1.0
            if best not in files and self.log and self.step == self.validated:  # validate again, for a best.pt
                again = self.log.pop()
                self.validated = self.log[-1]["step"] if self.log else 0
                self.loss_sum = again["loss"] * (self.step - self.validated)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(f"--resume {path}: this checkpoint does not fit: {type(error).__name__}: {error}") from None

    def restore_parts(self, checkpoint: dict) -> None:
        """Take the weights, the optimizer's moments, the step and, in fp16, the scale. All else, such as the learning
        rate of that step, follows from the options."""
        for key in ("model", "ema") if self.ema else ("model",):
            self.parts[key].load_state_dict(visiongru.extract_state_dict(checkpoint[key]))
        step, moments = checkpoint["scheduler"]["last_epoch"], checkpoint["optimizer"]["state"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]] if step or moments else []
        if len(moments) != len(parameters) or checkpoint["validated"] > step:
            raise ValueError(f"its optimizer knows {len(moments)} parameters of {len(parameters)}, and at step {step} "
                             f"its last validation is that of step {checkpoint['validated']}")
        state = {i: {} for i in range(len(parameters))}
        for i, p in enumerate(parameters):  # the fused AdamW would read and write beyond a moment that is too small
            for key, ours in ("step", torch.zeros(())), ("exp_avg", p), ("exp_avg_sq", p):
                found = moments[i][key]
                if (found.dtype, found.shape) != (ours.dtype, ours.shape) or not found.isfinite().all():
                    raise ValueError(f"its {key} of parameter {i} is not finite {ours.dtype} of {tuple(ours.shape)}")
                state[i][key] = torch.empty_like(ours).copy_(found)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        rates = [base * schedule(step) for base, schedule in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas)]
        self.scheduler.load_state_dict(self.scheduler.state_dict() | {
            "last_epoch": step, "_step_count": step + 1, "_last_lr": rates})
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        if self.scaler.is_enabled() and checkpoint["scaler"]:  # there is none without fp16
            self.scaler.load_state_dict(self.scaler.state_dict() | {
                key: checkpoint["scaler"][key] for key in ("scale", "_growth_tracker")})

    def steps(self, until: int) -> Iterator[int]:
        """Yield for each optimizer step until `until` are taken. In between, read the loss of the step before, show
        progress, save, and raise Stopped if a process was told to stop."""
        first, started = self.step, time.perf_counter()
        self.rate, self.started, shown = 0.0, started, started
        torch.backends.cudnn.benchmark = True  # all training images have one size
        with tqdm(total=self.total_steps, initial=first, unit="step", leave=False, dynamic_ncols=True,
                  disable=self.distributed.rank > 0 or None) as bar:  # None: where there is no terminal
            while self.step < until:
                yield self.step
                self.read_losses(keep=1)
                now = time.perf_counter()
                self.rate = (self.step - first) * self.args.batch_size / (now - started)
                progress = f"loss {self.loss:.3f}, lr {self.lr:.2e}, {self.rate:,.1f} images/s"
                bar.update()
                bar.set_postfix_str(progress, refresh=False)
                if bar.disable and now - shown > 60:  # no terminal: a line a minute
                    shown = now
                    self.distributed.print(f"step {self.step} of {self.total_steps}: {progress}")
                due = self.args.save_every and self.step % self.args.save_every == 0 and self.step < until
                if self.distributed.should_stop or due:
                    self.save()
                self.distributed.raise_if_stopped()
        torch.backends.cudnn.benchmark = False
        if self.distributed.world_size > 1:  # each process has BatchNorm statistics of its own: take those of rank 0
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def report_loss(self, loss: Tensor) -> None:
        """Start averaging a step's loss over the processes, and asking whether one was told to stop. On a GPU both
        happen on the device, and the result is on its way to the host when `read_losses` wants it."""
        distributed, ready = self.distributed, None
        stop = torch.full_like(loss, float(distributed.stop_signal > 0))
        report = torch.stack([loss / distributed.world_size, stop])
        if distributed.world_size > 1:
            dist.all_reduce(report)
        if report.is_cuda:
            report, ready = report.to("cpu", non_blocking=True), torch.cuda.Event()
            ready.record()
        self.reports.append((self.step + 1, self.optimizer.param_groups[0]["lr"], report, ready))

    def read_losses(self, keep: int = 0) -> None:
        """Read the reports of all steps but the last `keep`. UserError if a loss is not finite."""
        while len(self.reports) > keep:
            step, self.lr, report, ready = self.reports.pop(0)
            if ready:
                ready.synchronize()
            self.loss, stop = report.tolist()
            self.distributed.should_stop |= stop > 0
            self.loss_sum += self.loss
            if not math.isfinite(self.loss):
                self.fail(f"the loss is {self.loss} at step {step} of {self.total_steps}, learning rate {self.lr:.3g}")

    def validate(self, evaluate: Callable) -> object:
        """evaluate(), after saving, since a validation may take long and may be killed."""
        self.save()
        return evaluate()

    def record(self, scores: dict, text: str, score: float, better: str = "model") -> None:
        """After a validation: a line for the terminal, which begins with `text`; one for the log, with `scores`;
        best.pt if `score`, of the weights named `better`, is the best so far; and last.pt."""
        loss = self.loss_sum / (self.step - self.validated)
        seconds, usage = time.perf_counter() - self.started, accelerator_usage(self)
        self.distributed.print(f"{text}  loss {loss:.4f}  lr {self.lr:.2e}  {self.rate:,.1f} images/s  {seconds:.0f} s"
                               + "".join(f"  {name} {value:.2f}" for name, value in usage.items()))
        self.log.append({"step": self.step, "loss": loss, "lr": self.lr, **scores, **usage, "images_per_s": self.rate,
                         "seconds": seconds})
        if self.distributed.rank == 0:
            atomic_write(self.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log).encode())
        self.validated, self.loss_sum, self.better = self.step, 0.0, better
        if score > self.best or not (self.out / "best.pt").exists():
            self.best = score
            self.save("best.pt")
        self.save()

    def save(self, name: str = "last.pt") -> None:
        self.read_losses()
        self.check_finite()
        if self.distributed.rank > 0:
            return
        checkpoint = {key: part.state_dict() if part else None for key, part in self.parts.items()}
        checkpoint |= {key: getattr(self, key) for key in (*STATE, "step", "config")}
        if name == "best.pt":
            checkpoint = {key: checkpoint[key] for key in BEST}
        atomic_write(self.out / name, encoded(functools.partial(torch.save, checkpoint)))

    def check_finite(self) -> None:
        """UserError if a weight is not finite, or in fp16 the gradients overflow at every scale."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1e-6:
            self.fail(f"its gradients are not finite at any scale, at step {self.step} of {self.total_steps}")
        if not torch.stack([value.isfinite().all() for value in self.model.state_dict().values()]).all():
            self.fail(f"the weights are no longer finite after step {self.step}")

    def fail(self, reason: str) -> None:
        last = self.out / "last.pt"
        start = f", and --weights {shlex.quote(str(last))} to start from its weights" if last.exists() else ""
        raise UserError(f"{reason}; {last} is unchanged. A lower --lr, a longer warm-up or another --amp may help, in "
                        f"a new run: choose another --out{start}")


def accelerator_usage(run: Run) -> dict[str, float]:
    """The peak of an accelerator's memory in GiB, and the share of its FLOP/s that the model uses (MFU), as far as they
    are known. A training step takes three times the FLOPs of a forward pass. For a CPU, nothing."""
    module = torch.get_device_module(run.distributed.device)
    if not hasattr(module, "max_memory_allocated"):
        return {}
    usage = {"GiB": module.max_memory_allocated() / 2**30}
    peak = next((flops for card, flops in PEAK.items() if re.search(rf"\b{card}\b", module.get_device_name())), None)
    if peak and run.dtype:
        flops = forward_flops(run.model, run.config.get("crop_size") or run.config["img_size"])
        usage["MFU"] = 3 * flops * run.rate / (peak * run.distributed.world_size)
    return usage


PEAK = {  # FLOP/s in bf16 or fp16, from the data sheets
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


@functools.cache
def forward_flops(model: nn.Module, size: int) -> float:
    """FLOPs of a training forward pass for one square image of `size` pixels."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(torch.empty(2, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2


# Precision and compilation --------------------------------------------------------------------------------------------

def precision(amp: str, device: torch.device) -> tuple[torch.dtype | None, Callable]:
    """--amp -> the dtype of autocast, or None; and autocast, to be entered by `with autocast():`."""
    if amp == "auto":
        has_bf16 = device.type == "xpu" or (device.type == "cuda"
                                            and torch.cuda.is_bf16_supported(including_emulation=False))
        amp = "bf16" if has_bf16 else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return dtype, functools.partial(torch.autocast, device.type, dtype, enabled=dtype is not None)


def compiles(args: Namespace, device: torch.device) -> bool:
    """Whether to compile: as --compile or --no-compile say, and by default on a CUDA GPU if Triton is installed."""
    if args.compile is None:
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return args.compile


def compile_parts(model: nn.Module, log: Callable) -> None:
    """torch.compile, in place, the parts of which the model has many: blocks of one shape share their code, so that it
    takes a minute, where the whole model would take several. Validation, with images of any size, does without. So does
    the decoder of UPerNet: compiled, its gradient in bf16 on a CPU has NaN in it (PyTorch 2.14)."""
    torch._dynamo.config.cache_size_limit = 64  # with --drop-path every block has code of its own
    torch._dynamo.config.optimize_ddp = False   # it would cut large blocks in two
    kinds = visiongru.Stem, visiongru.Block, visiongru.Downsample, visiongru.FCNHead
    parts = [part for part in model.modules() if isinstance(part, kinds)]
    for part in parts:
        part.compile(dynamic=False)
    log(f"compiling {len(parts)} parts, those of one shape together, in the first step: it can take a minute or two; "
        f"--no-compile turns it off")


# Checkpoints ----------------------------------------------------------------------------------------------------------

# A checkpoint is a dict. last.pt has a state dict for each of the run's parts, model, ema, optimizer, scheduler and
# scaler (None if the run has no such part), the STATE of the run, its "step", and its "config": the options, the names
# of the classes, the number of training images, and the mean and deviation of the preprocessing. best.pt has BEST of
# these. Files with the same under the key "settings" in place of "config" were written by an earlier version.
STATE = "validated", "loss_sum", "lr", "best", "better", "log"
BEST = "model", "ema", "better", "best", "step", "config"


def is_number(x: object, above: float = -math.inf, below: float = math.inf) -> bool:
    return type(x) in (int, float) and above < x < below


def are_scores(x: object, depth: int = 2) -> bool:
    """Of a validation, or of its classes."""
    return isinstance(x, dict) and all(isinstance(name, str) and (
        value is None or is_number(value) or depth > 1 and are_scores(value, depth - 1)) for name, value in x.items())


def is_sound_tensor(x: object) -> bool:
    """Whether a tensor has memory for each of its numbers, since otherwise one in a small file can be of any size, and
    a type with arithmetic, which floats of 8 bits are not. True for what is no tensor."""
    return not isinstance(x, Tensor) or (
        x.layout == torch.strided and not x.is_nested and not x.is_meta
        and x.untyped_storage().nbytes() >= x.numel() * x.itemsize and (x.itemsize > 1 or not x.is_floating_point()))


def whole(least: int, most: int) -> tuple[str, Callable]:
    return f"a whole number from {least} to {most}", lambda x: type(x) is int and least <= x <= most


ENTRIES = {  # of a checkpoint, its config and its parts: what they must be, in words for a message and as a test
    **dict.fromkeys(("step", "validated", "last_epoch", "_growth_tracker"), whole(0, 2**31 - 1)),
    **dict.fromkeys(("img_size", "val_resize", "short_side", "crop_size"), whole(32, 2**15)),
    **dict.fromkeys(("channels", "aux_channels"), whole(1, 2**15)), "ignore_label": whole(-2**31, 2**31 - 1),
    **dict.fromkeys(("loss_sum", "lr", "best"), ("a finite number", is_number)),
    **dict.fromkeys(("mean", "std"), ("three numbers above 0", lambda x: isinstance(x, list) and len(x) == 3 and all(
        is_number(y, 0, 3e38) for y in x))),
    "scale": ("above 0, below 3e38", lambda x: all(is_number(y, 0, 3e38) for y in (x if isinstance(x, list) else [x]))),
    "log": ("a list of scores", lambda x: isinstance(x, list) and all(map(are_scores, x))),
    "better": ("'model' or 'ema'", lambda x: isinstance(x, str) and x in ("model", "ema")),
    "zero_is_ignore": ("true or false", lambda x: isinstance(x, bool)),
    "classes": ("a list of different names", lambda x: isinstance(x, list) and all(
        isinstance(name, str) for name in x) and 0 < len(set(x)) == len(x)),
}

# Options that a resumed run may change.
MAY_CHANGE = {"data", "out", "resume", "weights", "backbone_weights", "device", "workers", "save_every", "compile",
              "grad_checkpointing", "grad_accum_steps", "amp", "epochs", "iters", "warmup_epochs", "warmup_iters",
              "eval_every", "slide"}


def load_checkpoint(path: str | Path) -> dict:
    """The contents of a checkpoint file; no code in it is run. UserError if it is not a checkpoint, or damaged, or if
    an entry is not as in ENTRIES. (`visiongru.extract_state_dict` asks that the weights are finite.)"""
    try:
        checkpoint = visiongru.read_checkpoint(path)
    except OSError as error:
        raise UserError(f"cannot open the checkpoint {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"cannot use the checkpoint {path}: {error}") from None
    if not isinstance(checkpoint, dict) or not isinstance(config_of(checkpoint), dict):
        raise UserError(f"{path} is neither a checkpoint of these scripts nor a state dict")
    rules = ENTRIES if config_of(checkpoint) else {"better": ENTRIES["better"]}  # other people's entries differ
    for part in (part for part in (checkpoint, *checkpoint.values()) if isinstance(part, dict)):
        for name, value in part.items():
            expected, is_sound = rules.get(name, ("a dense tensor", is_sound_tensor))
            if not is_sound(value):
                raise UserError(f"cannot use the checkpoint {path}: {shown(name)} is {shown(value)}; expected "
                                f"{expected}")
    return checkpoint


def shown(value: object) -> str:
    """A value from a file for a message. The whole text of nested lists in a small file can fill the memory."""
    return (value if isinstance(value, str) else reprlib.repr(value))[:200]


def config_of(checkpoint: dict) -> dict:
    """The options and data that a checkpoint was trained with; empty for a state dict."""
    return checkpoint.get("config", checkpoint.get("settings", {}))


def checkpoint_to_resume(args: Namespace) -> Path | None:
    """The checkpoint that --resume names; None for a new run, as with --resume auto where there is none yet."""
    if args.resume != "auto":
        return Path(args.resume) if args.resume else None
    last = Path(args.out, "last.pt")
    return Path(os.path.realpath(last)) if os.path.lexists(last) else None  # it may be a link to what is not mounted


def open_checkpoint(args: Namespace, **defaults) -> dict:
    """The state dict in --weights. Where the command line did not say, `args` take the checkpoint's config, or else
    these defaults."""
    if not args.weights:
        raise UserError("--eval and --predict need a checkpoint: --weights FILE")
    checkpoint = load_checkpoint(args.weights)
    for name, default in {"model": "tiny", **defaults}.items():
        if vars(args).get(name) is None:
            setattr(args, name, config_of(checkpoint).get(name, default))
    check_model(args.model, args.weights)
    try:
        weights = visiongru.extract_state_dict(checkpoint)
    except ValueError as error:
        raise UserError(f"{args.weights}: {error}") from None
    head = weights.get("decode_head.conv_seg.weight", weights.get("head.weight"))
    if head is not None and (head.dim() < 2 or not 0 < len(head) == len(args.classes or head)):
        raise UserError(f"{args.weights}: its classifier has the shape {tuple(head.shape)}; expected a row for each of "
                        f"its {len(args.classes or [])} class names")
    return weights


def load_weights(model: nn.Module, checkpoint: dict, path: str | Path, log: Callable = print,
                 classes: list | None = None) -> None:
    """visiongru.load_weights from the contents of `path`. Its warnings are logged, its error is a UserError. `classes`:
    what the model is to be trained on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            visiongru.load_weights(model, checkpoint)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    for warning in caught:
        log(f"{path}: {warning.message}")
    known = config_of(checkpoint).get("classes", classes)
    if classes and known != classes and len(known) == len(classes):
        theirs, ours = next(pair for pair in zip(known, classes) if pair[0] != pair[1])
        log(f"{path}: its classifier, for as many other classes ({theirs!r} where the data has {ours!r}), is kept")


def check_model(name: object, path: str | Path) -> None:
    if name not in list(MODELS):
        raise UserError(f"{path} has a model called {shown(name)!r}; expected one of {', '.join(MODELS)}")


def check_classes(known: list, classes: list[str], path: str | Path) -> None:
    """UserError if `known`, the classes of the checkpoint at `path` (None: any name), are not the data's `classes`."""
    if len(known) != len(classes):
        raise UserError(f"{path} was trained on {len(known)} classes and the data has {len(classes)}; to "
                        f"fine-tune on other classes, train with --weights {shlex.quote(str(path))}")
    for ours, theirs in zip(known, classes):
        if ours not in (None, theirs):
            raise UserError(f"{path} was trained on other classes than the data's: {ours!r} where it has {theirs!r}")


# Images and the order of images ---------------------------------------------------------------------------------------

# The formats of image files, by the extensions of their names. PIL knows others, some of which hold programs, and runs
# those; and its registry lacks AVIF where it was built without.
EXTENSIONS = {extension: kind for extension, kind in Image.registered_extensions().items()
              if kind in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")}


def open_image(path: str | Path, extensions: Iterable[str] = EXTENSIONS) -> Image.Image:
    """PIL's image of a file in one of the formats of `extensions`, whatever the file's own name says."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is a folder, a pipe or a device; expected a file")
    return Image.open(path, formats=[EXTENSIONS[extension] for extension in extensions])


def find_files(folder: str | Path, extensions: Iterable[str], log: Callable) -> list[str]:
    """The files below a folder whose names have one of the extensions, in order; each once, whatever links lead to it.
    Hidden ones are left out and, with a note, those with another extension. UserError for what is no regular file."""
    found, others = [], []
    seen = {*map(str, Path(os.path.realpath(folder)).parents), os.path.realpath(folder)}  # links to these lead back

    def is_new(path: str) -> bool:
        real = os.path.realpath(path)
        return real not in seen and not seen.add(real)

    def stop(error: OSError) -> None:
        raise error
    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in sorted(folders) if name[0] != "." and is_new(os.path.join(root, name))]
        for path in (os.path.join(root, name) for name in sorted(names) if name[0] != "."):
            if Path(path).suffix.lower() not in extensions:
                others.append(path)
            elif not os.path.isfile(path):
                raise UserError(f"{path} is a pipe, a device or a link to nothing; expected a file")
            elif is_new(path):
                found.append(path)
    note_left_out(others, "their extensions are not among those that are read", log)
    return sorted(found, key=lambda path: path.split(os.sep))


def note_left_out(paths: list, reason: str, log: Callable) -> None:
    if paths:
        more = f" and {len(paths) - 3} more" * (len(paths) > 3)
        log(f"note: {len(paths)} files are left out, since {reason}: {', '.join(map(str, paths[:3]))}{more}")


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, as a viewer shows it: upright, the first frame, transparent parts on white, 16 bits cut
    to 8. UserError, with its path and the reason, if it cannot be read or has more pixels than PIL allows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images below the limit, and of odd metadata
            with open_image(path) as image:
                image.load()
                kind = image.format
                with contextlib.suppress(Exception):  # damaged EXIF data: the picture is as good as before
                    ImageOps.exif_transpose(image, in_place=True)
                # PIL opens some files of 16-bit grey as 32-bit "I", and its conversion turns all but the darkest white.
                if image.mode.startswith("I;16") or image.mode == "I" and kind in ("PNG", "PPM"):
                    return image.convert("I").point(lambda value: value / 256).convert("RGB")
                if image.mode[0] in "IF":
                    raise ValueError(f"its pixels are 32-bit numbers (PIL's mode {image.mode}); expected 8 or 16 bits")
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image if image.mode == "RGB" else image.convert("RGB")  # convert copies
    except Exception as error:
        raise UserError(f"cannot read the image {path}: {error}") from None


def files_digest(data: Dataset) -> str:
    """By which a data set is known again, wherever it lies: a digest of the names of its files, their classes, and the
    contents of some 1,000 of them, evenly spread. (To read all of ImageNet would take minutes.)"""
    items = [x for item in getattr(data, "samples", getattr(data, "items", ())) for x in item]  # paths and classes
    digest = hashlib.sha256(repr([x if isinstance(x, int) else os.path.basename(x) for x in items]).encode())
    files = [x for x in items if not isinstance(x, int)]
    for file in filter(os.path.isfile, files[::max(1, len(files) // 1000)]):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:12]


def normalizer(device: torch.device, mean: Iterable[float] = MEAN, std: Iterable[float] = STD) -> Callable:
    """-> a function from images (B, 3, H, W) uint8 on `device` to what the model takes: float32, mean 0, deviation 1,
    channels last. Mean and deviation are put on the device here, once: each copy makes the host wait for it."""
    mean, std = (torch.tensor(list(numbers), device=device).view(3, 1, 1) for numbers in (mean, std))

    def normalize(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        return v2.functional.to_dtype(images, torch.float32, scale=True).sub_(mean).div_(std)
    return normalize


class Stream(Dataset):
    """`data` over and over, in a new order each time: an item for every position from 0 on, without end.

    The order depends on (seed, epoch), and what is random in an item on (seed, epoch, index): torch's generator is
    seeded. (Its state is not restored: that takes longer than to read and augment a small picture.)
    """

    def __init__(self, data: Dataset, seed: int):
        self.data, self.seed, self.epoch = data, seed, None

    def __getitem__(self, position: int) -> tuple:
        epoch, place = divmod(position, len(self.data))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(random_seed(self.seed, "order", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.data), generator=generator)
        index = int(self.order[place])
        torch.default_generator.manual_seed(random_seed(self.seed, epoch, index))
        return self.data[index]


def micro_batches(steps: range, args: Namespace, distributed: Distributed) -> Iterator[list[int]]:
    """One process's micro-batches, as positions in a Stream: --grad-accum-steps of them for each step. Processes, and
    micro-batches within a process, are contiguous parts of a step's images, which are the same however it is split."""
    for step in steps:
        positions = torch.arange(step * args.batch_size, (step + 1) * args.batch_size)
        yield from positions.view(distributed.world_size, args.grad_accum_steps, -1)[distributed.rank].tolist()


def split_batch(args: Namespace, world_size: int, multiple: int = 1) -> int:
    """The number of images in a micro-batch, a multiple of `multiple`."""
    parts = world_size * args.grad_accum_steps
    if args.batch_size % (parts * multiple):
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of {parts * multiple}, for "
                        f"{world_size} processes x --grad-accum-steps {args.grad_accum_steps}"
                        + " x the pairs of --mixup and --cutmix" * (multiple > 1))
    return args.batch_size // parts


def training_loader(data: Dataset, steps: range, args: Namespace, distributed: Distributed) -> DataLoader:
    """This process's micro-batches of all `steps`. There is one loader for the whole run, so that its workers start
    once and never wait for a validation."""
    batches = micro_batches(steps, args, distributed)
    return make_loader(Stream(data, args.seed), args.workers, distributed, batch_sampler=batches)


def validation_loader(data: Dataset, batch_size: int, args: Namespace, distributed: Distributed) -> DataLoader:
    """This process's share of a data set: over all processes, each item once."""
    mine = range(distributed.rank, len(data), distributed.world_size)
    return make_loader(data, args.workers, distributed, sampler=mine, batch_size=batch_size)


def make_loader(data: Dataset, workers: int, distributed: Distributed, **order) -> DataLoader:
    """A DataLoader. UserError if its workers would lack file descriptors, without which they can wait for ever."""
    needed = 64 + 32 * workers
    with contextlib.suppress(ImportError):
        import resource  # Windows has none
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            if workers and 0 <= soft < needed:
                resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError):
            raise UserError(f"--workers {workers}: they need {needed} open files and the limit is {hard}; raise it "
                            f"(ulimit -n), or take fewer") from None
    return DataLoader(data, num_workers=workers, worker_init_fn=ignore_signals, persistent_workers=workers > 0,
                      pin_memory=distributed.device.type == "cuda", **order)


def random_seed(*parts: int | str) -> int:
    """A seed for a random generator from numbers and words; the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# Signals --------------------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """The run was told to stop, and has saved; its argument is the signal's number."""


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
    STOP_SIGNALS.append(signal.SIGHUP)


def install_signal_handlers(distributed: Distributed) -> None:
    """After a first Ctrl-C, SIGTERM or closed terminal, the loop takes at most one more step, saves and leaves. A
    second one ends the process at once."""
    first_at = 0.0

    def handler(number: int, frame: object) -> None:
        nonlocal first_at
        # The same signal may come twice: torchrun passes on what the terminal has sent to its processes too, and
        # `timeout` sends it to the process and then to its group.
        repeat = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.1
        if not distributed.stop_signal:
            distributed.stop_signal, first_at = number, time.monotonic()
            if distributed.rank == 0:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, b"\nstopping and saving; a second signal stops at once\n")  # print is not for handlers
        elif time.monotonic() - first_at > repeat:
            kill_workers()
            os._exit(128 + number)
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def ignore_signals(_: int) -> None:
    """In a data-loading worker: a signal to the whole group reaches it too, and it must last until the step is saved.
    It ends ten minutes after SIGTERM."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))


def kill_workers() -> None:
    """End the data-loading workers at once. By themselves they would take their time."""
    for worker in multiprocessing.active_children():
        worker.kill()


# Processes ------------------------------------------------------------------------------------------------------------

@dataclass
class Distributed:
    """This process among those that torchrun has started, one for each GPU."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    stop_signal: int = 0       # the first signal to stop that this process received
    should_stop: bool = False  # whether any process had received one when they last compared

    def print(self, text: str) -> None:
        """Print, on rank 0 alone. If the terminal, or the program that reads this, is gone, the run goes on without."""
        with contextlib.suppress(UserError):
            if self.rank == 0:
                print_result(text)

    def all_reduce(self, numbers: list) -> list[float]:
        """Sum a list of numbers over all processes, and set `should_stop`. The host waits for the result."""
        *numbers, stop = map(float, [*numbers, self.stop_signal])
        if self.world_size > 1:
            total = torch.tensor([*numbers, stop], dtype=torch.float64, device=self.device)
            dist.all_reduce(total)
            *numbers, stop = total.tolist()
        self.should_stop = stop > 0
        return numbers

    def all_gather(self, value: object) -> list:
        """The values of all processes, in the order of their ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def raise_if_stopped(self) -> None:
        if self.should_stop:
            raise Stopped(self.stop_signal or signal.SIGTERM)


def init_distributed(device: str = "auto") -> Distributed:
    """Join the other processes if torchrun started several, and take this one's device. Raises UserError."""
    rank, world_size, local_rank = (from_torchrun(*name) for name in
                                    (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(accelerator.type if device == "auto" else device)
        if device.type not in ("cpu", accelerator.type):
            raise RuntimeError(f"torch sees no {device.type} here")
        if device.type != "cpu":
            device = torch.device(device.type, local_rank if device.index is None else device.index)
            if world_size > 1 and device.index != local_rank:
                raise RuntimeError("each process needs a device of its own: leave its number out")
            torch.accelerator.set_device_index(device.index)
            torch.set_float32_matmul_precision("high")  # tf32
    except RuntimeError as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if world_size == 1 and rank == 0:
        return Distributed(device=device)
    try:
        dist.init_process_group(dist.get_default_backend_for_device(device))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}; start with "
                        f"torchrun, or unset RANK and WORLD_SIZE") from None
    if device.type == "cpu" and hasattr(os, "register_at_fork"):
        # A workaround: before Python 3.12 a worker that is forked while a thread of gloo's holds Python's lock hangs.
        os.register_at_fork(before=lambda: time.sleep(0.05))
    return Distributed(rank, world_size, device)


def from_torchrun(name: str, default: int) -> int:
    """A number from the environment. UserError if it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}; expected a number: use torchrun, or unset it")
    return int(text)


# Files ----------------------------------------------------------------------------------------------------------------

def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Fill a temporary file, flush it to the disk, rename it: at any moment the file at `path` is whole.

    Raises UserError if the disk is full, say; what was at `path` before is then unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        unchanged = "; the earlier one is unchanged" if path.exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror}{unchanged}") from None


def encoded(save: Callable, **options) -> memoryview:
    """The bytes that save(file, **options) writes."""
    buffer = io.BytesIO()
    save(buffer, **options)
    return buffer.getbuffer()


def make_folder(path: Path, open_file: Callable | None = None) -> IO:
    """Make the folder --out, if need be. -> open_file(), or a temporary file in it. UserError if nothing can be written
    there: sooner than after an epoch."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return open_file() if open_file else tempfile.TemporaryFile(dir=path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot write in this folder: {error.strerror}") from None


@contextlib.contextmanager
def locked_folder(out: Path, data: str | None = None) -> Iterator[None]:
    """The folder --out, made if need be, for this run alone: the system frees its lock however this process ends.
    (lockf rather than flock: data-loading workers do not inherit it, and over NFS it holds on all hosts.)"""
    for part in ("train", "val", "images", "annotations") if data else ():
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(Path(data, part))):
            raise UserError(f"--out {out}: it would be read as data, in {Path(data, part)}; choose another --out")
    new = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    with make_folder(out, lambda: open(out / "run.lock", "a+")) as file:
        try:
            import fcntl  # Windows has none
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.stat(file.fileno()), os.stat(file.name))  # a run that just ended removed its own
        except (ImportError, OSError) as error:  # of other kinds: storage without locks
            ours = not isinstance(error, (BlockingIOError, PermissionError, FileNotFoundError))
        if not ours:
            file.seek(0)
            raise UserError(f"--out {out}: another run{file.read()} uses this folder; end it, or choose another --out")
        file.truncate(0)
        print(f" (process {os.getpid()} on {platform.node()})", end="", file=file, flush=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
                for folder in new:  # if they are still empty
                    folder.rmdir()


# The command line -----------------------------------------------------------------------------------------------------

class Option(NamedTuple):
    """An option of a script; see `options`."""

    argument: dict    # for argparse's add_argument
    recipe: object    # default with --data
    built_in: object  # default without
    help: str


def number(kind: type, is_valid: Callable, expected: str) -> dict:
    """Arguments for add_argument: one number for which `is_valid`."""
    def parse_number(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if is_valid(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
    return {"type": parse_number}


def two(argument: dict) -> dict:
    return argument | {"nargs": 2}


TEXT = number(str, bool, "some text (is a variable not set?)")
FLAG = {"action": argparse.BooleanOptionalAction}
COUNT = number(int, lambda n: 1 <= n < 2**31, "a whole number of at least 1")
COUNT_OR_NONE = number(int, lambda n: 0 <= n < 2**31, "a whole number of at least 0")
AMOUNT = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
SHARE = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
BELOW_1 = number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
ALPHA = number(float, lambda x: x == 0 or 1e-6 <= x <= 1e6, "0 or a number from 1e-6 to 1e6")
UP_TO_30 = number(int, lambda n: 0 <= n <= 30, "a whole number from 0 to 30")
PIXELS = number(int, lambda n: 32 <= n <= 16384, "32 to 16384 pixels")
AMP = {"nargs": "?", "const": "auto", "choices": ["auto", "bf16", "fp16", "off"]}

# Options of every use of a checkpoint, with their defaults.
CHECKPOINT_DEFAULTS = {"weights": None, "model": None, "device": "auto", "amp": "auto"}


def shared_options() -> dict[str, Option]:
    return {
        "weights": Option(TEXT, None, None, "checkpoint to start from or, with --eval and --predict, to use"),
        "grad-accum-steps": Option(COUNT, 1, 1, "micro-batches per optimizer step"),
        "opt-betas": Option(two(BELOW_1), [0.9, 0.999], [0.9, 0.999], "betas of AdamW"),
        "drop-path": Option(BELOW_1, 0.0, 0.0, "stochastic depth rate of the last block"),
        "hflip": Option(SHARE, 0.5, 0.5, "probability of a horizontal flip"),
        "seed": Option(COUNT_OR_NONE, 0, 0, "random seed"),
        "device": Option(TEXT, "auto", "auto", "auto, cpu or an accelerator: cuda, cuda:1, mps, xpu"),
        "amp": Option(AMP, "auto", "auto", "automatic mixed precision; auto: bf16 on a GPU that has it, else off"),
        "compile": Option(FLAG, None, None, "torch.compile the model's parts for training (on with CUDA and Triton)"),
        "grad-checkpointing": Option(FLAG, False, False, "recompute activations in the backward pass to save memory"),
        "workers": Option(COUNT_OR_NONE, None, 0, "number of data-loading workers per process (share of the cores)"),
        "out": Option(TEXT, None, None, "output folder for checkpoints and log (runs/DATA-MODEL) or predictions"),
        "resume": Option(TEXT, None, None, "auto: continue from OUT/last.pt if it exists; or a checkpoint file"),
        "save-every": Option(COUNT_OR_NONE, 0, 0, "steps between checkpoints, besides those at validations; 0: none"),
    }


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse's own prints all options too
        raise UserError(message.removeprefix("argument "))


def parse(argv: list[str] | None, description: str, options: dict[str, Option], modes: dict[str, dict],
          inherited: dict[str, list[str]]) -> Namespace:
    """The arguments. `modes`: for "eval" and "predict" the options that are of use there, and their defaults.
    `inherited`: for an option that names a checkpoint, the options that default to that checkpoint's config."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--eval", action="store_true", help="validate the checkpoint --weights")
    group.add_argument("--predict", nargs="+", metavar="IMAGE", help="use the checkpoint --weights on image files")
    for name, option in options.items():
        defaults = {str(value): None for value in option[1:3] if value is not None and option.argument is not FLAG}
        shown = f" ({'; built-in set: '.join(defaults)})" if defaults else ""
        parser.add_argument(f"--{name}", help=option.help + shown, **option.argument)
    given = vars(parser.parse_args(argv))
    mode = next((mode for mode in modes if mode in given), None)
    if mode:
        for name in given:
            if name != mode and name not in modes[mode]:
                parser.error(f"--{name.replace('_', '-')}: does nothing with --{mode}")
        return finish({"eval": False, "predict": None, **modes[mode], **given})
    column = "recipe" if "data" in given else "built_in"
    defaults = {name.replace("-", "_"): getattr(option, column) for name, option in options.items()}
    for source, names in inherited.items():
        missing = [name for name in names if name not in given]
        if given.get(source) and missing:
            config = config_of(load_checkpoint(given[source]))
            defaults |= {name: config[name] for name in missing if name in config}
            check_model(defaults["model"], given[source])
    return finish({"eval": False, "predict": None, **defaults, **given})


def finish(arguments: dict) -> Namespace:
    """The arguments as a Namespace, the number of workers filled in."""
    args = Namespace(**arguments)
    if vars(args).get("workers", 0) is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = max(1, cores // max(1, from_torchrun("LOCAL_WORLD_SIZE", 1))) if args.data else 0
    return args


def dispatch(args: Namespace, train: Callable, evaluate: Callable, predict: Callable) -> int:
    """Do what the arguments ask for. -> the exit status: 0, 2, or 128 + the number of a signal that stopped it."""
    distributed = init_distributed(args.device)
    act = predict if args.predict else evaluate if args.eval else train
    try:
        with (locked_folder(Path(args.out), args.data) if act is train and distributed.rank == 0
              else contextlib.nullcontext()):
            return act(args, distributed) or 0
    except Stopped as stopped:
        distributed.all_reduce([])  # wait for rank 0 to save: torchrun kills the rest when one exits
        distributed.print("stopped by a signal, and saved: continue with the same command and --resume auto")
        return 128 + stopped.args[0]


# Errors ---------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can put right. The scripts print its message without a traceback and exit with status 2."""

    def __init__(self, message: object):
        # A DataLoader hands over a worker's exception with the worker's traceback before the message.
        super().__init__(str(message).rsplit("UserError: ", 1)[-1].strip())


def check_finite(logits: Tensor, source: str | Path) -> None:
    if not logits.isfinite().all():
        raise UserError(f"{source}: the model's output is not finite, and no class is the best; another --amp may help")


def report_image(path: str | Path, error: Exception) -> None:
    """Print why one of several images was not predicted. Raises `error` again if the others would meet it too."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        error = UserError(f"{path}: out of memory")
    if not isinstance(error, UserError):
        raise error
    print_error(error)


def run_main(main: Callable) -> None:
    """Run main() and exit with its status; with 2, and a line without a traceback, for what the user can put right
    and if memory runs out; with 130 for Ctrl-C while there is nothing to save."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: no other file may get its number, and a result would be lost
            os.dup2(os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_RDWR), number)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = main()
    except (Exception, KeyboardInterrupt) as error:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a DataLoader's handler would raise the error again
        status = report_error(error)
    kill_workers()
    if dist.is_initialized():  # to destroy the group in order can hang, if another process waits in a step
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def report_error(error: BaseException) -> int:
    """Print what went wrong. -> the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if os.environ.get("RANK", "0") != "0":  # if all meet the error, rank 0 reports it and torchrun kills the rest
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    found = f"{type(error).__name__}: {error}".strip(": \n")
    advice = next((f": {advice}" for words, advice in ADVICE.items() if re.search(words, found)), "")
    if isinstance(error, UserError):
        print_error(error)
    elif advice or isinstance(error, OSError):
        print_error(found.splitlines()[-1 if "Traceback" in found else 0] + advice)  # the last is what a worker met
    else:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
        return 1
    return 2


ADVICE = {  # by the words of an error
    r"gloo|DistBackendError|DistStoreError": "another process has ended; see its error",
    r"shared memory|/torch_\d": "is /dev/shm too small? Enlarge it (docker run --shm-size=8g), or take --workers 0",
    "Too many open files|ancdata": "raise the limit (ulimit -n 4096), or take fewer --workers",
    r"(?i)c\+\+ compiler|CxxCompiler": "install one, or take --no-compile",
    # The system kills a data-loading worker when memory runs out; what then fails may be the connection to it.
    r"^(MemoryError|OutOfMemoryError|ConnectionResetError|EOFError)|can't allocate memory|DataLoader worker \(pid":
        "out of memory? More --grad-accum-steps, --grad-checkpointing, fewer --workers, smaller images or batches need "
        "less",
}


def printable(text: object) -> str:
    """A line of text with the characters escaped that a terminal obeys. (Names come from anywhere.)"""
    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]",
                  lambda character: character[0].encode("unicode_escape").decode(), str(text))


def print_error(message: object) -> None:
    with contextlib.suppress(OSError):  # there is nobody to tell: the exit status still does
        tqdm.write("\n".join(map(printable, f"error: {message}".split("\n"))), file=sys.stderr)


def print_result(text: str) -> None:
    """Print, or raise UserError if what was asked for cannot be written."""
    try:
        print(*map(printable, text.split("\n")), sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries to write it once more as it exits
        raise UserError(f"cannot write the result to the standard output: {error.strerror}") from None


# The built-in sets: textured shapes on textured grounds ---------------------------------------------------------------

# Each shape as a test on points (u, v) of its own frame, about 1 in radius.
SHAPES = {
    "disc":      lambda u, v: u * u + v * v < 0.7,
    "ring":      lambda u, v: (u * u + v * v - 0.6).abs() < 0.3,
    "crescent":  lambda u, v: (u * u + v * v < 1) & ((u - 0.5)**2 + v * v > 0.6),
    "half disc": lambda u, v: ((u + 0.4)**2 + v * v < 1) & (u > -0.4),
    "triangle":  lambda u, v: (u > -0.5) & (u + 1.75 * v.abs() < 1),
    "square":    lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.7,
    "bar":       lambda u, v: torch.maximum(u.abs(), 3 * v.abs()) < 0.95,
    "cross":     lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.3) & (torch.maximum(u.abs(), v.abs()) < 0.95),
    "star":      lambda u, v: torch.hypot(u, v) < 0.7 + 0.35 * torch.cos(5 * torch.atan2(v, u)),
    "corner":    lambda u, v: (torch.minimum(u, v) < -0.2) & (torch.maximum(u.abs(), v.abs()) < 0.8),
}


def draw_scene(shapes: list[int], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw shapes, of these indices into SHAPES, one over the other on a ground; each with a texture, place, size, tilt
    and colours of its own, brighter than the ground. All but the shapes is decided by the torch.Generator.

    -> image (3, size, size) uint8, and mask (size, size) uint8: 0 for the ground, 1 + k for the shape with index k.
    """
    chance = iter(torch.rand(16 + 32 * len(shapes), generator=generator).tolist())

    def uniform(low, high):
        return low + (high - low) * next(chance)

    def texture(colour):  # stripes of a lighter and a darker shade, bent by a wave across them
        bend = torch.sin(x * uniform(-0.5, 0.5) + y * uniform(-0.5, 0.5)) * 2
        stripes = torch.sin(bend + x * uniform(-1, 1) + y * uniform(-1, 1) + uniform(0, 6))
        return torch.stack([stripes * uniform(-0.12, 0.12) + channel for channel in colour])

    pixels = torch.arange(size, dtype=torch.float32) * 64 / size
    y, x = pixels[:, None], pixels[None, :]
    ground = [uniform(0, 0.55) for _ in range(3)]
    image, mask = texture(ground), torch.zeros(size, size, dtype=torch.uint8)
    for shape in shapes:
        radius = uniform(13, 24) / max(1, len(shapes))**0.25
        left, top = uniform(0.8 * radius, 64 - 0.8 * radius), uniform(0.8 * radius, 64 - 0.8 * radius)
        cos, sin = math.cos(tilt := uniform(-0.5, 0.5)) / radius, math.sin(tilt) / radius
        dx, dy = x - left, y - top
        inside = SHAPES[list(SHAPES)[shape]](dx * cos + dy * sin, dy * cos - dx * sin)
        image = torch.where(inside, texture([channel + uniform(0.25, 0.55) for channel in ground]), image)
        mask[inside] = shape + 1
    noisy = image + 0.17 * torch.rand(3, size, size, generator=generator) - 0.085
    return noisy.clamp(0, 1).mul(255).to(torch.uint8), mask


class Shapes(Dataset):
    """One shape per image, its kind the class. Item i depends on (split, i) alone, and is drawn when asked for."""

    classes, side, transform = list(SHAPES), 48, None

    def __init__(self, split: str, length: int, size: int | None = None, seed: int = 0):
        self.split, self.length, self.size, self.seed = split, length, size or self.side, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple:
        label = index % len(self.classes)
        generator = torch.Generator().manual_seed(random_seed(self.seed, self.split, index))
        image = v2.functional.to_pil_image(draw_scene([label], self.size, generator)[0])
        return (self.transform(image) if self.transform else image), label


class Scenes(Shapes):
    """For segment.py: one to three shapes on a ground, class 0, one over the other: (PIL image, mask (size, size)
    uint8). Item i depends on (split, seed, i) alone, and is drawn when asked for."""

    classes, side = ["ground", *SHAPES], 64

    def __getitem__(self, index: int) -> tuple:
        generator = torch.Generator().manual_seed(random_seed(self.seed, "scene", self.split, index))
        count = int(torch.randint(1, 4, (), generator=generator))
        shapes = torch.randint(len(SHAPES), (count,), generator=generator).tolist()
        image, mask = draw_scene(shapes, self.size, generator)
        image = v2.functional.to_pil_image(image)
        return self.transform(image, mask) if self.transform else (image, mask)


if __name__ == "__main__":
    run_main(main)
