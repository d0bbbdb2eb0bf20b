"""Train VisionGRU on a folder of images, or on a built-in set of drawn shapes.

    python train.py                                                     the built-in set, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data /imagenet               the paper's recipe on eight GPUs
    python train.py --data DIR --weights best.pt --lr 1e-4 --epochs 30  fine-tuning on DIR/{train,val}/<class>/*.jpg
    python train.py --eval --weights best.pt --data DIR                 accuracy of a checkpoint
    python train.py --predict cat.jpg --weights best.pt                 top-5 classes of images

Part I is a training script to read from top to bottom: `train`, the training step below it, evaluation, prediction,
data, options. Part II is the engine that segment.py shares: runs and checkpoints, signals, processes, files, errors.

--batch-size is the global batch size, the number of images per optimizer step over all processes, so the recipe does
not depend on the number of processes. All randomness is seeded by --seed and the number of the step or image, so the
results do not depend on the number of workers, on processes and micro-batches (except with --drop-path), or on being
stopped and resumed, up to rounding and to operations that a GPU does not repeat exactly.

OUT/last.pt is written before and after each validation, every --save-every steps, and on Ctrl-C, SIGTERM or SIGHUP.
OUT/best.pt holds the weights with the best validation score, their moving average, the class names and the
preprocessing; OUT/log.jsonl has a line for each validation.

Long runs: add --resume auto --save-every 500, and pass --max-restarts=3 to torchrun, which then restarts all processes
when one dies; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or they read stale entries in torchrun's store. For two nodes
add --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 on each; --out must be on shared storage.
Out of memory: --grad-accum-steps 4 splits each step in four, --grad-checkpointing recomputes activations in backward.
Small images: enlarge them, since the stem divides both sides by four, and augment them less than ImageNet's, for
example --img-size 64 --val-resize 64 --crop-scale 0.6 --randaug 0 0 --reprob 0 --mixup 0 --cutmix 0.
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
from typing import NamedTuple

if sys.argv[0].endswith(("train.py", "segment.py")):  # no traceback for Ctrl-C while torch is being imported
    sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)

# GNU OpenMP threads spin while idle, which makes a step up to forty times slower on a busy machine. A short spin costs
# nothing on an idle one. The variable is read when torch is imported.
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
from torchvision.transforms import v2
from tqdm import tqdm

import visiongru

MODELS = {"nano": visiongru.visiongru_nano, "tiny": visiongru.visiongru_tiny, "base": visiongru.visiongru_base}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, scaled to [0, 1]


# ======================================================================================================================
# Part I. Training a classifier
# ======================================================================================================================

def train(args: Namespace, distributed: Distributed) -> None:
    """Train a classifier. The weights with the best validation score are left in OUT/best.pt."""
    device, world_size = distributed.device, distributed.world_size

    # Data
    train_data, val_data = open_data(args, ("train", "val"), distributed.print)
    train_data.transform, val_data.transform = train_transform(args), eval_transform(args.img_size, args.val_resize)
    num_classes = len(train_data.classes)
    micro_batch_size = split_batch(args, world_size, in_pairs=args.mixup > 0 or args.cutmix > 0)
    steps_per_epoch = max(1, len(train_data) // args.batch_size)
    total_steps = args.epochs * steps_per_epoch

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

    # The run: restore its state before the model is compiled and wrapped
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
    normalize = normalizer(device)

    def loss_fn(images: Tensor, labels: Tensor, first: int) -> Tensor:
        images, targets = augment_batch(normalize(images), labels, first, run.step, num_classes, args)
        return F.cross_entropy(ddp_model(images), targets, label_smoothing=args.smoothing)

    for epoch in range(run.validated // steps_per_epoch, args.epochs):
        ddp_model.train()
        for _ in run.steps(until=(epoch + 1) * steps_per_epoch):
            train_step(run, ddp_model, train_batches, loss_fn)
        models = {"model": model, "ema": ema} if ema else {"model": model}
        run.save()  # validation may take long, and be killed
        scores = evaluate(models, val_loader, distributed, normalize, run.autocast)
        better = max(scores, key=lambda name: scores[name]["top1"])
        text = "  ".join(f"{name}: top-1 {s['top1']:.2f} top-5 {s['top5']:.2f}" for name, s in scores.items())
        ema_scores = {f"ema_{key}": value for key, value in scores.get("ema", {}).items()}
        run.record({"epoch": epoch + 1, **scores["model"], **ema_scores},
                   f"epoch {epoch + 1:3d}/{args.epochs}  {text}", scores[better]["top1"], better)
    run.print_summary(__file__, f"top-1 {run.best:.2f} %")


def train_step(run: Run, ddp_model: nn.Module, batches: Iterator, loss_fn: Callable) -> None:
    """One optimizer step, over --grad-accum-steps micro-batches (inputs, targets) from `batches`.

    loss_fn(inputs, targets, first) -> the mean loss of a micro-batch, whose first image is number `first` of the step.
    There is no host-device sync here: `Run.steps` reads the loss one step later.
    """
    args, device = run.args, run.distributed.device
    step_loss = torch.zeros((), device=device)
    for micro_step in range(args.grad_accum_steps):
        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        part = run.distributed.rank * args.grad_accum_steps + micro_step  # of the step's images
        torch.manual_seed(random_seed(args.seed, "step", run.step, part))  # for dropout and stochastic depth
        # Like no_sync: DDP all-reduces gradients once per step, in the backward pass of the last micro-batch.
        ddp_model.require_backward_grad_sync = micro_step == args.grad_accum_steps - 1
        with run.autocast():
            loss = loss_fn(inputs, targets, part * len(inputs)) / args.grad_accum_steps
        run.scaler.scale(loss).backward()
        step_loss += loss.detach()
    run.report_loss(step_loss)
    run.scaler.step(run.optimizer)  # in fp16, skips the step if its gradients overflow,
    run.scaler.update()             # and then halves the scale
    run.optimizer.zero_grad()
    run.scheduler.step()
    if run.ema:
        update_ema(run.ema, run.model, args.model_ema_decay)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, for each parameter. Buffers are copied.
    (torch.optim.swa_utils.AveragedModel syncs with the device every step.)"""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for ours, theirs in zip(ema.buffers(), model.buffers()):
        ours.copy_(theirs)


def warmup_cosine(step: int, total_steps: int, warmup_steps: float) -> float:
    """The learning rate as a fraction of its peak: linear from 0 during warm-up, then a cosine to 0."""
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


# Evaluation and prediction --------------------------------------------------------------------------------------------

@torch.compiler.set_stance("force_eager")  # --compile is for training only
@torch.inference_mode()
def evaluate(models: dict[str, nn.Module], loader: Iterable, distributed: Distributed, normalize: Callable,
             autocast: Callable = contextlib.nullcontext) -> dict[str, dict[str, float]]:
    """Score several models in one pass over the data.

    Returns, for each name, the mean loss and the top-1 and top-5 accuracy in percent (top-5 is 100 for five classes or
    fewer), exact over all processes. Raises Stopped if a process received a signal.
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
    totals = [torch.stack(batches).cpu().double().sum(0) for batches in sums.values()]  # the only host-device sync
    *totals, count = distributed.all_reduce([*torch.cat(totals).tolist(), count])
    distributed.raise_if_stopped()
    check_finite(torch.tensor(totals), "the validation images")
    return {name: {"val_loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
            for name, loss, top1, top5 in zip(models, totals[::3], totals[1::3], totals[2::3])}


def evaluate_checkpoint(args: Namespace, distributed: Distributed) -> None:
    """Print the accuracy of the checkpoint --weights on the validation images."""
    model, normalize, autocast = model_from_checkpoint(args, distributed.device)
    [data] = open_data(args, ["val"], distributed.print)
    check_classes(args.classes or [None] * model.num_classes, data.classes, args.weights)
    data.transform = eval_transform(args.img_size, args.val_resize)
    loader = validation_loader(data, max(1, args.batch_size // distributed.world_size), args, distributed)
    loader = tqdm(loader, unit="batch", leave=False, disable=distributed.rank > 0 or None)
    scores = evaluate({"model": model}, loader, distributed, normalize, autocast)["model"]
    if distributed.rank == 0:
        print_result(f"{args.weights}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %, loss "
                     f"{scores['val_loss']:.4f} ({len(data):,} images)")


@torch.inference_mode()
def predict(args: Namespace, distributed: Distributed) -> int:
    """Print the top-5 classes of images. An image that cannot be read is reported, and the others are processed.
    Returns the exit status: 2 if there was such an image."""
    model, normalize, autocast = model_from_checkpoint(args, distributed.device)
    transform = eval_transform(args.img_size, args.val_resize)
    failed = 0
    for path in args.predict[distributed.rank::distributed.world_size]:
        try:
            image = transform(read_image(path))[None].to(distributed.device)
            with autocast():
                logits = model(normalize(image)).float()[0]
            check_finite(logits, path)
        except Exception as error:
            report_image(path, error)
            failed += 1
            continue
        top = logits.softmax(dim=0).topk(min(5, len(logits)))
        lines = [f"  {100 * p:6.2f} %  {args.classes[k] if args.classes else f'class {k}'}"
                 for p, k in zip(top.values.tolist(), top.indices.tolist())]
        print_result("\n".join(map(printable, [path, *lines])))
    [failed] = distributed.all_reduce([failed])  # wait for all: torchrun kills the rest when one exits with an error
    return 2 if failed else 0


def model_from_checkpoint(args: Namespace, device: torch.device) -> tuple[nn.Module, Callable, Callable]:
    """The model in the checkpoint --weights, in eval mode, its normalization, and autocast. Sets args.classes to its
    class names (None for a bare state dict)."""
    weights = open_checkpoint(args, img_size=224, val_resize=256, mean=MEAN, std=STD, classes=None)
    if "head.weight" not in weights:
        raise UserError(f"{args.weights} has no classifier, head.weight, but {shown(next(iter(weights)))} and others")
    model = MODELS[args.model](num_classes=len(weights["head.weight"]))
    load_weights(model, weights, args.weights)
    model.to(device, memory_format=torch.channels_last).eval()
    return model, normalizer(device, args.mean, args.std), precision(args.amp, device)[1]


# Data: images are loaded as uint8, then normalized, erased and mixed on the device ------------------------------------

def open_data(args: Namespace, splits: Iterable[str], log: Callable = print) -> list[Dataset]:
    """The datasets DIR/split/<class>/<images>, or the built-in ones; they have the same `classes`. Raises UserError."""
    if args.data is None:
        return [Shapes(split, {"train": 14_000, "val": 1_000}[split]) for split in splits]
    layout = f"--data {args.data}: expected {{train,val}}/<class>/<images> in it"
    try:
        sets = [ImageFolder(Path(args.data, split), log) for split in splits]
    except OSError as error:
        raise UserError(f"{layout}: {error}") from None
    for split, data in zip(splits, sets):
        empty = {*data.classes} - {data.classes[label] for _, label in data.samples}
        if not data.samples or split == "train" and empty:  # in val a class may be empty
            raise UserError(f"{layout}: there are no images in {', '.join(sorted(empty if data.samples else [split]))}")
        if split == "train" and len(data.classes) == 1:
            raise UserError(f"{layout}: {data.classes[0]} is the only class; are the class folders inside it?")
    if sets[0].classes != sets[-1].classes:
        raise UserError(f"--data {args.data}: train and val have different classes (in val, one may be an empty "
                        f"folder); in one of them only: {', '.join(sorted({*sets[0].classes} ^ {*sets[-1].classes}))}")
    return sets


def eval_transform(img_size: int, val_resize: int) -> Callable:
    """PIL image -> its central square, (3, img_size, img_size) uint8."""
    return v2.Compose([functools.partial(center_square, img_size, val_resize), v2.PILToTensor()])


def center_square(img_size: int, val_resize: int, image: Image.Image) -> Image.Image:
    """Resize the shorter side to `val_resize` pixels, and crop the center."""
    # A line of pixels, resized whole, would fill the memory: first crop to at most four times as long as wide.
    image = v2.functional.center_crop(image, [min(side, 4 * min(image.size)) for side in (image.height, image.width)])
    return v2.functional.center_crop(v2.functional.resize(image, [max(img_size, val_resize)]), [img_size])


def train_transform(args: Namespace) -> Callable:
    """The recipe's augmentation of single images: PIL image -> (3, S, S) uint8. `augment_batch` does the rest."""
    crop = functools.partial(center_square, args.img_size, args.val_resize)
    if args.crop_scale < 1:
        crop = v2.RandomResizedCrop(args.img_size, scale=(args.crop_scale, 1))
    return v2.Compose([crop, v2.RandomHorizontalFlip(args.hflip), v2.RandAugment(*args.randaug), v2.PILToTensor()])


def augment_batch(images: Tensor, labels: Tensor, first: int, step: int, num_classes: int,
                  args: Namespace) -> tuple[Tensor, Tensor]:
    """Random erasing, then mixup or cutmix, on the device: normalized images (B, 3, H, W), labels (B,) -> images and
    the targets of cross_entropy. The result depends on the seed, the step and an image's number in the step, `first` of
    the micro-batch's first image, but not on the number of processes or micro-batches."""
    if args.reprob:
        images = random_erasing(images, args.reprob, first, random_seed(args.seed, "erase", step))
    if not (args.mixup or args.cutmix):
        return images, labels
    targets = F.one_hot(labels, num_classes).float()
    return mixup_or_cutmix(images, targets, args.mixup, args.cutmix, random_seed(args.seed, "mix", step))


def random_erasing(images: Tensor, probability: float, first: int, seed: int) -> Tensor:
    """Fill a rectangle of 2 to 33 % of an image's area, with an aspect ratio from 0.3 to 3.3, with noise.
    images: (B, 3, H, W), normalized: numbers first, ..., first + B - 1 of a step's images."""
    images, (H, W) = images.clone(), images.shape[2:]
    for number, image in enumerate(images, start=first):
        rng = random.Random(random_seed(seed, number))
        if rng.random() < probability:
            area, ratio = H * W * rng.uniform(0.02, 0.33), 0.3 ** rng.uniform(-1, 1)
            height, width = min(H, round(math.sqrt(area * ratio))), min(W, round(math.sqrt(area / ratio)))
            top, left = rng.randint(0, H - height), rng.randint(0, W - width)
            noise = torch.Generator(images.device).manual_seed(random_seed(seed, number, "noise"))
            image[:, top:top + height, left:left + width].normal_(generator=noise)
    return images


def mixup_or_cutmix(images: Tensor, targets: Tensor, mixup: float, cutmix: float, seed: int) -> tuple[Tensor, Tensor]:
    """Mix neighbours (images 0 and 1, 2 and 3, ...) in one proportion. With both alphas above 0, one of the methods is
    chosen with equal probability. images (B, 3, H, W), soft labels `targets` (B, K) -> the same shapes."""
    rng = random.Random(seed)
    use_cutmix = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    lam = rng.betavariate(cutmix, cutmix) if use_cutmix else rng.betavariate(mixup, mixup)

    def neighbours(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    if use_cutmix:  # paste a rectangle of the neighbour, with the image's aspect ratio
        H, W = images.shape[2:]
        y, x, half = rng.randrange(H), rng.randrange(W), 0.5 * math.sqrt(1 - lam)
        top, bottom = max(0, y - int(half * H)), min(H, y + int(half * H))
        left, right = max(0, x - int(half * W)), min(W, x + int(half * W))
        rectangle = (..., slice(top, bottom), slice(left, right))
        mixed = images.clone()
        mixed[rectangle] = neighbours(images)[rectangle]
        lam = 1 - (bottom - top) * (right - left) / (H * W)
    else:
        mixed = images.lerp(neighbours(images), 1 - lam)
    return mixed, targets.lerp(neighbours(targets), 1 - lam)


# Options: the paper's recipe, after DeiT's, and one for the built-in set ----------------------------------------------

def options() -> dict[str, Option]:
    """The options: arguments of add_argument, default with --data (the recipe), default without (the built-in set: few
    epochs, and no augmentation that cuts shapes off), help. A default of None depends on other options."""
    return {
        "data": Option(TEXT, None, None, "folder with {train,val}/<class>/<images>; without it: the built-in set"),
        "model": Option({"choices": MODELS}, "tiny", "nano", "model size; with --weights that of the checkpoint"),
        "img-size": Option(PIXELS, 224, 48, "image size in pixels"),
        "val-resize": Option(PIXELS, None, 48, "shorter side before the center crop (img-size x 256 / 224)"),
        "epochs": Option(POSITIVE_INT, 300, 4, "training epochs"),
        "batch-size": Option(POSITIVE_INT, 1024, 32, "global batch size: images per optimizer step over all processes"),
        "lr": Option(NON_NEGATIVE, None, 1e-3, "peak learning rate (1e-3 x batch-size / 1024)"),
        "weight-decay": Option(NON_NEGATIVE, 0.05, 0.05, "weight decay, on every parameter"),
        "warmup-epochs": Option(NON_NEGATIVE, None, 1, "epochs of linear learning-rate warm-up (epochs / 15)"),
        "crop-scale": Option(FRACTION, 0.08, 1.0, "minimum area of a random resized crop, as a share; 1: center crop"),
        "randaug": Option(pair(UP_TO_30), [2, 9], [0, 0], "number of operations and magnitude (to 30) of RandAugment"),
        "reprob": Option(FRACTION, 0.25, 0.0, "probability of random erasing"),
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
    """The state of a training run, kept in the folder OUT: OUT/last.pt holds all of it, OUT/best.pt the weights with
    the best score, OUT/log.jsonl a line for each validation.

    Args:
        data: the training and the validation set, with their `classes`.
        total_steps: optimizer steps of the whole run.
        parts: objects with a state_dict: `model`, `ema` (or None), `optimizer`, `scheduler`.

    Attributes:
        step: optimizer steps taken.    validated: `step` at the last validation.    lr: of the last step.
        best: the best score so far.    better: which weights scored better at the last validation, "model" or "ema".
        autocast: autocast to `dtype` in `with run.autocast():`, or nothing if `dtype` is None.
        scaler: the gradient scaler, enabled in fp16 only.
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
            self.config |= dict(zip(CONTENTS, map(dataset_digest, data)))
        self.validated, self.loss_sum, self.lr, self.best, self.better, self.log = 0, 0.0, 0.0, -1.0, "model", []
        self.reports = []  # of the steps whose loss has not been read yet
        self.loss = math.nan  # the last one read

    @property
    def step(self) -> int:
        return self.scheduler.last_epoch

    def start_or_resume(self) -> None:
        """With --resume, restore the checkpoint. UserError if an earlier run would be overwritten."""
        path, last = checkpoint_to_resume(self.args), self.out / "last.pt"
        checkpoint = load_checkpoint(path) if path else {}
        seen = self.distributed.all_gather((checkpoint.get("step"), checkpoint.get("config")))
        if any(other != seen[0] for other in seen):
            raise UserError(f"{path or last} differs between processes: --out must be on storage shared by all of them")
        for earlier in last, self.out / "best.pt", self.out / "log.jsonl":
            if os.path.lexists(earlier) and (path is None or path.resolve() != last.resolve()):
                advice = f"add --resume auto to continue from {last}" if last.exists() else "move it away"
                raise UserError(f"{earlier} already exists: {advice}, or choose another --out")
        if path:
            self.restore(checkpoint, path)
        if self.distributed.rank == 0:
            for name in "last.pt", "best.pt", "log.jsonl":  # left by a run that was killed while writing
                (self.out / f"{name}.tmp").unlink(missing_ok=True)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.distributed.print(f"{type(self.model).__name__} {self.args.model}, {parameters:,} parameters, on "
                               f"{self.distributed.world_size} x {self.distributed.device}, {self.dtype or 'float32'}; "
                               f"in {self.out}" + (f"; resumed at step {self.step}" if self.step else ""))
        highest = max(map(self.scheduler.lr_lambdas[0], range(0, self.total_steps, 1 + self.total_steps // 1000)))
        if highest < 0.5 or self.args.lr == 0:
            self.distributed.print(f"note: the learning rate never exceeds {highest * self.args.lr:.2e} in this run "
                                   f"of {self.total_steps} steps: is the warm-up too long, or --lr too low?")

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Restore the state of this run. UserError if the checkpoint is from other data or another recipe."""
        if not {"optimizer", "config"} <= checkpoint.keys():
            raise UserError(f"--resume {path}: this file has only weights, or is from an earlier version; resume a "
                            f"last.pt, or start a new run with --weights")
        files = {path: checkpoint}
        if os.path.lexists(best := self.out / "best.pt"):  # it may be damaged, another run's, or newer than last.pt
            try:
                files[best] = load_checkpoint(os.path.realpath(best))
            except UserError as error:
                raise UserError(f"{error}; repair {best}, or remove it: the next validation writes a new one") from None
        try:
            for file, content in files.items():
                self.check_config(content["config"], file)
            self.check_contents(checkpoint["config"], path)
            self.restore_parts(checkpoint)
            for key in STATE:
                setattr(self, key, checkpoint[key])
            self.best = files[best]["best"] if best in files else -1.0
            if best not in files and self.log and self.step == self.validated:  # validate again, to write best.pt
                again = self.log.pop()
                self.validated = self.log[-1]["step"] if self.log else 0
                self.loss_sum = again["loss"] * (self.step - self.validated)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(f"--resume {path}: this checkpoint does not fit: {type(error).__name__}: {error}") from None

    def check_config(self, config: dict, file: Path) -> None:
        """UserError if the config of a checkpoint is that of another recipe or of other classes."""
        check_classes(config["classes"], self.config["classes"], file)
        for name, before in config.items():
            now = self.config.get(name, before)
            if now != before and name not in MAY_CHANGE and name not in CONTENTS:
                raise UserError(f"--resume {file}: {name.replace('_', '-')} was {shown(before)} and is now {now}; keep "
                                f"it, or start a new run with --weights")

    def check_contents(self, config: dict, path: Path) -> None:
        """UserError if the data are other files now. --resume FILE accepts them, with a note: a user may have repaired
        one that could not be read."""
        for name in CONTENTS:
            if name in config and self.config.get(name, config[name]) != config[name]:
                changed = f"the {name.replace('_', ' ')} are not those that {path} was trained with"
                if self.args.resume == "auto":
                    raise UserError(f"{changed}; restore them, or accept these: --resume {shlex.quote(str(path))}")
                self.distributed.print(f"note: {changed}")

    def restore_parts(self, checkpoint: dict) -> None:
        """Restore the weights, the optimizer's moments, the step and the gradient scale. Everything else, such as the
        learning rate, follows from these and the options."""
        for key in ("model", "ema") if self.ema else ("model",):
            self.parts[key].load_state_dict(visiongru.extract_state_dict(checkpoint[key]))
        step, moments = checkpoint["scheduler"]["last_epoch"], checkpoint["optimizer"]["state"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]] if step or moments else []
        if len(moments) != len(parameters) or checkpoint["validated"] > step:
            raise ValueError(f"its optimizer knows {len(moments)} parameters of {len(parameters)}, and at step {step} "
                             f"its last validation is that of step {checkpoint['validated']}")
        state = {i: {} for i in range(len(parameters))}
        for i, p in enumerate(parameters):  # fused AdamW would write out of bounds if a moment were too small
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
        if self.scaler.is_enabled() and checkpoint["scaler"]:  # empty unless saved in fp16
            self.scaler.load_state_dict(self.scaler.state_dict() | {
                key: checkpoint["scaler"][key] for key in ("scale", "_growth_tracker")})

    def steps(self, until: int) -> Iterator[int]:
        """Yield once per optimizer step until `until` have been taken. In between, read the previous step's loss, show
        progress, save, and raise Stopped if a process received a signal."""
        first, started = self.step, time.perf_counter()
        self.rate, self.started, last_print = 0.0, started, started
        torch.backends.cudnn.benchmark = True  # all training images have one size
        with tqdm(total=self.total_steps, initial=first, unit="step", leave=False, dynamic_ncols=True,
                  disable=self.distributed.rank > 0 or None) as bar:  # None: disabled without a terminal
            while self.step < until:
                yield self.step
                self.read_losses(keep=min(1, self.step - first - 1))  # nothing to show before the first one is read
                now = time.perf_counter()
                self.rate = (self.step - first) * self.args.batch_size / (now - started)
                progress = f"loss {self.loss:.3f}, lr {self.lr:.2e}, {self.rate:,.1f} images/s"
                bar.update()
                bar.set_postfix_str(progress, refresh=False)
                if bar.disable and now - last_print > 60:
                    last_print = now
                    self.distributed.print(f"step {self.step} of {self.total_steps}: {progress}")
                due = self.args.save_every and self.step % self.args.save_every == 0 and self.step < until
                if self.distributed.should_stop or due:
                    self.save()
                self.distributed.raise_if_stopped()
        torch.backends.cudnn.benchmark = False
        if self.distributed.world_size > 1:  # BatchNorm's statistics differ between processes: take those of rank 0
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def report_loss(self, loss: Tensor) -> None:
        """Start to average a step's loss over the processes, and to ask whether one received a signal. On a GPU this is
        asynchronous: `read_losses` reads the result later, when it has reached the host."""
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
        """Read the losses of all steps but the last `keep`. UserError if one is not finite."""
        while len(self.reports) > keep:
            step, self.lr, report, ready = self.reports.pop(0)
            if ready:
                ready.synchronize()
            self.loss, stop = report.tolist()
            self.distributed.should_stop |= stop > 0
            self.loss_sum += self.loss
            if not math.isfinite(self.loss):
                self.fail(f"the loss is {self.loss} at step {step} of {self.total_steps}, learning rate {self.lr:.3g}")

    def record(self, scores: dict, text: str, score: float, better: str = "model") -> None:
        """After a validation: print a line that starts with `text`, append `scores` to the log, write best.pt if
        `score`, that of the weights named `better`, is the best so far, and write last.pt."""
        loss = self.loss_sum / (self.step - self.validated)
        seconds, usage = time.perf_counter() - self.started, peak_memory(self.distributed.device)
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
        earlier = [path for path in (self.out / "best.pt", self.out / "last.pt") if path.exists()]
        start = f", from the unchanged {earlier[0]}: --weights {shlex.quote(str(earlier[0]))}" if earlier else ""
        raise UserError(f"{reason}. A lower --lr, a longer warm-up or another --amp may help, in a new run with "
                        f"another --out{start}")

    def print_summary(self, script: str, result: str, options: Iterable[str] = ()) -> None:
        """Print the best result and the command that evaluates it."""
        best, data = str(self.out / "best.pt"), self.args.data
        script = os.path.basename(script) if os.path.samefile(Path(script).parent, os.curdir) else script
        command = ["python", script, "--eval", "--weights", best, *(("--data", data) if data else ()), *options]
        self.distributed.print(f"done: {best} has {result}. To evaluate it:\n  {shlex.join(command)}")


# Precision, memory and compilation ------------------------------------------------------------------------------------

def precision(amp: str, device: torch.device) -> tuple[torch.dtype | None, Callable]:
    """--amp -> the dtype of autocast, or None, and a context manager to use as `with autocast():`."""
    if amp == "auto":
        has_bf16 = device.type == "xpu" or (device.type == "cuda"
                                            and torch.cuda.is_bf16_supported(including_emulation=False))
        amp = "bf16" if has_bf16 else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return dtype, functools.partial(torch.autocast, device.type, dtype, enabled=dtype is not None)


def peak_memory(device: torch.device) -> dict[str, float]:
    """{"GiB": the accelerator's peak memory}; empty for a CPU."""
    module = torch.get_device_module(device)
    return {"GiB": module.max_memory_allocated() / 2**30} if hasattr(module, "max_memory_allocated") else {}


def compiles(args: Namespace, device: torch.device) -> bool:
    """Whether to compile: as --compile or --no-compile says, by default on CUDA if Triton is installed."""
    if args.compile is None:
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return args.compile


def compile_parts(model: nn.Module, log: Callable) -> None:
    """Compile the repeated parts of the model in place. Blocks of one shape share code, so this takes a minute where
    the whole model would take several. UPerNet's decoder is left out: compiled, its bf16 gradient has NaNs on a CPU
    (PyTorch 2.14)."""
    torch._dynamo.config.cache_size_limit = 64  # with --drop-path each block is compiled separately
    torch._dynamo.config.optimize_ddp = False   # it would split large blocks
    kinds = visiongru.Stem, visiongru.Block, visiongru.Downsample, visiongru.FCNHead
    parts = [part for part in model.modules() if isinstance(part, kinds)]
    for part in parts:
        part.compile(dynamic=False)
    log(f"compiling {len(parts)} parts of the model in the first step, which can take a minute or two; --no-compile "
        f"turns it off")


# Checkpoints ----------------------------------------------------------------------------------------------------------

# A checkpoint is a dict. last.pt has a state dict for each part of the run, model, ema, optimizer, scheduler and scaler
# (None if the run has no such part), the STATE of the run, its "step", and its "config": the options, the class names,
# the number of training images, and the mean and standard deviation of the preprocessing. best.pt has only the entries
# in BEST. An earlier version wrote "settings" for "config".
STATE = "validated", "loss_sum", "lr", "best", "better", "log"
BEST = "model", "ema", "better", "best", "step", "config"


def is_number(x: object, above: float = -math.inf, below: float = math.inf) -> bool:
    return type(x) in (int, float) and above < x < below


def are_scores(x: object, depth: int = 2) -> bool:
    """Whether x holds the scores of a validation: numbers or None by name, or by name and class."""
    return isinstance(x, dict) and all(isinstance(name, str) and (
        value is None or is_number(value) or depth > 1 and are_scores(value, depth - 1)) for name, value in x.items())


def is_dense(x: object) -> bool:
    """False for a tensor that has less memory than elements, so that a small file could claim any size, or whose dtype
    has no arithmetic, such as 8-bit floats. True for anything but a tensor."""
    return not isinstance(x, Tensor) or (
        x.layout == torch.strided and not x.is_nested and not x.is_meta
        and x.untyped_storage().nbytes() >= x.numel() * x.itemsize and (x.itemsize > 1 or not x.is_floating_point()))


def integer(low: int, high: int) -> tuple[str, Callable]:
    return f"an integer from {low} to {high}", lambda x: type(x) is int and low <= x <= high


ENTRIES = {  # of a checkpoint, its config and its parts: what is expected, in words and as a test
    **dict.fromkeys(("step", "validated", "last_epoch", "_growth_tracker"), integer(0, 2**31 - 1)),
    **dict.fromkeys(("img_size", "val_resize", "short_side", "crop_size"), integer(32, 2**15)),
    **dict.fromkeys(("channels", "aux_channels"), integer(1, 2**15)), "ignore_label": integer(-2**31, 2**31 - 1),
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

# Digests of the data in a config, of training and of validation.
CONTENTS = "contents_of_training_files", "contents_of_validation_files"

# Options that a resumed run may change.
MAY_CHANGE = {"data", "out", "resume", "weights", "backbone_weights", "device", "workers", "save_every", "compile",
              "grad_checkpointing", "grad_accum_steps", "amp", "epochs", "iters", "warmup_epochs", "warmup_iters",
              "eval_every", "slide"}


def load_checkpoint(path: str | Path) -> dict:
    """The contents of a checkpoint file; code in it is not executed. UserError if it is damaged, not a checkpoint, or
    has an entry unlike ENTRIES. (`visiongru.extract_state_dict` checks that the weights are finite.)"""
    try:
        checkpoint = visiongru.read_checkpoint(path)
    except OSError as error:
        raise UserError(f"cannot open the checkpoint {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"cannot use the checkpoint {path}: {error}") from None
    if not isinstance(checkpoint, dict) or not isinstance(config_of(checkpoint), dict):
        raise UserError(f"{path} is neither a checkpoint of these scripts nor a state dict")
    rules = ENTRIES if config_of(checkpoint) else {"better": ENTRIES["better"]}  # other programs' entries differ
    for part in (part for part in (checkpoint, *checkpoint.values()) if isinstance(part, dict)):
        for name, value in part.items():
            expected, is_valid = rules.get(name, ("a dense tensor", is_dense))
            if not is_valid(value):
                raise UserError(f"cannot use the checkpoint {path}: {shown(name)} is {shown(value)}; expected "
                                f"{expected}")
    return checkpoint


def shown(value: object) -> str:
    """A value from a file, shortened for a message: nested lists in a small file can have a huge repr."""
    return (value if isinstance(value, str) else reprlib.repr(value))[:200]


def config_of(checkpoint: dict) -> dict:
    """The config that a checkpoint was trained with; empty for a state dict."""
    return checkpoint.get("config", checkpoint.get("settings", {}))


def checkpoint_to_resume(args: Namespace) -> Path | None:
    """The checkpoint that --resume names; None for a new run, also for --resume auto if there is no checkpoint yet."""
    if args.resume != "auto":
        return Path(args.resume) if args.resume else None
    last = Path(args.out, "last.pt")
    return Path(os.path.realpath(last)) if os.path.lexists(last) else None  # a broken link is an error, not a new run


def open_checkpoint(args: Namespace, **defaults) -> dict:
    """The state dict in --weights. Sets the `args` that the command line left out, from the checkpoint's config or else
    from these defaults. Raises UserError."""
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
        raise UserError(f"{args.weights}: its classifier has shape {tuple(head.shape)}; expected a row for each of its "
                        f"{len(args.classes or [])} class names")
    return weights


def load_weights(model: nn.Module, checkpoint: dict, path: str | Path, log: Callable = print,
                 classes: list | None = None) -> None:
    """visiongru.load_weights from the contents of `path`, with its warnings logged and a UserError for its error.
    `classes`: those that the model will be trained on."""
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
        log(f"{path}: its classifier is kept, though the classes differ ({theirs!r} where the data has {ours!r})")


def check_model(name: object, path: str | Path) -> None:
    if name not in list(MODELS):
        raise UserError(f"{path} has a model called {shown(name)!r}; expected one of {', '.join(MODELS)}")


def check_classes(known: list, classes: list[str], path: str | Path) -> None:
    """UserError if the classes `known` to the checkpoint at `path` (None: any) differ from the data's `classes`."""
    if len(known) != len(classes):
        raise UserError(f"{path} was trained on {len(known)} classes and the data has {len(classes)}: is --data right? "
                        f"To fine-tune on other classes, train with --weights {shlex.quote(str(path))}")
    for ours, theirs in zip(known, classes):
        if ours not in (None, theirs):
            raise UserError(f"{path} was trained on other classes than the data's: {ours!r} where it has {theirs!r}")


# Images and their order -----------------------------------------------------------------------------------------------

# File extensions and their formats. PIL has others, but some of those, like EPS, execute programs in the file.
EXTENSIONS = {extension: kind for extension, kind in Image.registered_extensions().items()
              if kind in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")}


def open_image(path: str | Path, extensions: Iterable[str] = EXTENSIONS) -> Image.Image:
    """Open a file in one of the formats of `extensions`, whatever its own extension is."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is a folder, a pipe or a device; expected a file")
    return Image.open(path, formats=[EXTENSIONS[extension] for extension in extensions])


def find_files(folder: str | Path, extensions: Iterable[str], log: Callable, once: bool = True) -> list[str]:
    """The files below a folder with one of the extensions, in order. Each folder counts once, even if several links
    lead to it, and with `once` each file. Skips hidden files and, with a note, other extensions and files found
    before. UserError for a pipe, a device or a broken link."""
    found, others, links, root = [], [], [], os.path.realpath(folder)
    seen = {root, *map(str, Path(root).parents)}  # links to these are cycles

    def search(folder: str | Path, real_folder: str) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            # Only links cost a system call: on network storage one for each image of ImageNet would take minutes.
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real_folder, entry.name)
            if entry.name[0] == ".":
                continue
            if entry.is_dir():
                if real not in seen:
                    seen.add(real)
                    search(entry.path, real)
            elif os.path.splitext(entry.name)[1].lower() not in extensions:
                others.append(entry.path)
            elif entry.is_file():
                (links if once and real in seen else found).append(entry.path)
                seen.add(real)
            else:
                raise UserError(f"{entry.path} is a pipe, a device or a broken link; expected a file")

    search(folder, root)
    note_skipped(others, "unsupported extension", log)
    note_skipped(links, "the same file as another", log)
    return found


def note_skipped(paths: list, reason: str, log: Callable) -> None:
    if paths:
        more = f" and {len(paths) - 3} more" * (len(paths) > 3)
        log(f"note: {len(paths)} file(s) skipped, {reason}: {', '.join(map(str, paths[:3]))}{more}")


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, as a viewer shows it: upright, the first frame, transparent parts on white, 16 bits reduced
    to 8. UserError, with the path and the reason, if it cannot be read or has more pixels than PIL allows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images below the limit, and odd metadata
            with open_image(path) as image:
                image.load()
                kind = image.format
                with contextlib.suppress(Exception):  # damaged EXIF data do not harm the pixels
                    ImageOps.exif_transpose(image, in_place=True)
                # PIL opens some 16-bit grey files as 32-bit "I", and its own conversion clips all above 255 to white.
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


class ImageFolder(Dataset):
    """The images in ROOT/<class> and the folders below it, as (PIL image, class index)."""

    transform = None

    def __init__(self, root: Path, log: Callable):
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        labels, paths = {name: label for label, name in enumerate(self.classes)}, find_files(root, EXTENSIONS, log)
        names = [path.removeprefix(os.path.join(root, "")).split(os.sep)[0] for path in paths]
        self.samples = [(path, labels[name]) for path, name in zip(paths, names) if name in labels]
        note_skipped([path for path, name in zip(paths, names) if name not in labels], "not in a class folder", log)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple:
        path, label = self.samples[index]
        image = read_image(path)
        return (self.transform(image) if self.transform else image), label


def dataset_digest(data: Dataset) -> str:
    """A digest by which a resumed run recognizes its data: of all file names and classes, and the contents of
    1,000 to 2,000 samples, evenly spaced. (Reading all of ImageNet would take minutes.)"""
    digest = hashlib.sha256()
    for number, sample in enumerate(data.samples):
        for item in sample:  # paths, and a class index
            digest.update(os.fsencode(f"{item if isinstance(item, int) else os.path.basename(item)}\n"))
            if number % max(1, len(data.samples) // 1000) == 0 and not isinstance(item, int):
                digest.update(Path(item).read_bytes())
    return digest.hexdigest()[:12]


def normalizer(device: torch.device, mean: Iterable[float] = MEAN, std: Iterable[float] = STD) -> Callable:
    """A function from images (B, 3, H, W) uint8 on `device` to (images / 255 - mean) / std, float32, channels last.
    (Mean and deviation are moved to the device once, here: a copy is a host-device sync.)"""
    mean, std = (torch.tensor(list(numbers), device=device).view(3, 1, 1) for numbers in (mean, std))

    def normalize(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        return v2.functional.to_dtype(images, torch.float32, scale=True).sub_(mean).div_(std)
    return normalize


class Stream(Dataset):
    """An endless sequence of the items of `data`, in a new order each epoch, indexed by position.

    The order depends on (seed, epoch), and an item's random augmentation on (seed, epoch, index): torch's generator is
    seeded for it. (Its state is not restored afterwards, which would cost more than a small image.)
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
    """One process's micro-batches, as positions in a Stream: --grad-accum-steps of them per step. Each is a contiguous
    part of the step's images, so the step has the same images for any number of processes and micro-batches."""
    for step in steps:
        positions = torch.arange(step * args.batch_size, (step + 1) * args.batch_size)
        yield from positions.view(distributed.world_size, args.grad_accum_steps, -1)[distributed.rank].tolist()


def split_batch(args: Namespace, world_size: int, in_pairs: bool = False) -> int:
    """The number of images in a micro-batch; even if they are mixed in pairs. Raises UserError."""
    parts = world_size * args.grad_accum_steps
    multiple = parts * 2 if in_pairs else parts
    if args.batch_size % multiple:
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of {multiple}, {world_size} process(es) "
                        f"x {args.grad_accum_steps} micro-batch(es)" + " x 2 (images are mixed in pairs)" * in_pairs)
    return args.batch_size // parts


def training_loader(data: Dataset, steps: range, args: Namespace, distributed: Distributed) -> DataLoader:
    """This process's micro-batches of all `steps`. A single loader serves the whole run, so its workers start once and
    work ahead during validation."""
    if len(data) < args.batch_size:
        distributed.print(f"note: --batch-size {args.batch_size} is more than the {len(data)} training images, so that "
                          f"a step has some of them several times; consider a smaller one")
    batches = micro_batches(steps, args, distributed)
    return make_loader(Stream(data, args.seed), args.workers, distributed, batch_sampler=batches)


def validation_loader(data: Dataset, batch_size: int, args: Namespace, distributed: Distributed) -> DataLoader:
    """This process's share of a dataset. Over all processes, each item occurs once."""
    mine = range(distributed.rank, len(data), distributed.world_size)
    return make_loader(data, args.workers, distributed, sampler=mine, batch_size=batch_size)


def make_loader(data: Dataset, workers: int, distributed: Distributed, **order) -> DataLoader:
    """A DataLoader. UserError if there are too few file descriptors for its workers, which could then hang."""
    needed = 64 + 32 * workers
    with contextlib.suppress(ImportError):
        import resource  # Windows has none
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            if workers and 0 <= soft < needed:
                resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError):
            raise UserError(f"--workers {workers} needs {needed} open files, but the limit is {hard}; raise it "
                            f"(ulimit -n), or use fewer workers") from None
    return DataLoader(data, num_workers=workers, worker_init_fn=ignore_signals, persistent_workers=workers > 0,
                      pin_memory=distributed.device.type == "cuda", **order)


def random_seed(*parts: int | str) -> int:
    """A seed made from numbers and words, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# Signals --------------------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """Raised once a run that received a signal has saved. The argument is the signal's number."""


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
    STOP_SIGNALS.append(signal.SIGHUP)


def install_signal_handlers(distributed: Distributed) -> None:
    """On a first Ctrl-C, SIGTERM or SIGHUP, the loop takes at most one more step, saves and exits. A second one ends
    the process at once."""
    first_at = 0.0

    def handler(number: int, frame: object) -> None:
        nonlocal first_at
        # One Ctrl-C may arrive twice: torchrun forwards a signal that the terminal also sent to its processes, and
        # `timeout` signals the process and then its group.
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
    """For data-loading workers: a signal to the process group reaches them too, but they must live until the step is
    saved. They end ten minutes after SIGTERM."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))


def kill_workers() -> None:
    """Kill the data-loading workers, which would end slowly by themselves."""
    for worker in multiprocessing.active_children():
        worker.kill()


# Processes ------------------------------------------------------------------------------------------------------------

@dataclass
class Distributed:
    """This process among those that torchrun started, one per GPU."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    stop_signal: int = 0       # the first signal that this process received
    should_stop: bool = False  # whether any process had received one at the last all-reduce

    def print(self, text: str) -> None:
        """Print on rank 0. If the terminal, or the program reading the output, is gone, the run goes on without it."""
        with contextlib.suppress(UserError):
            if self.rank == 0:
                print_result(text)

    def all_reduce(self, numbers: list) -> list[float]:
        """Sum a list of numbers over all processes, and set `should_stop`. Waits for the result."""
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
    """Join the other processes if torchrun started several, and select this one's device. Raises UserError."""
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
                raise RuntimeError("each process needs its own device: leave out the number")
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
        # A workaround: before Python 3.12, a worker forked while a gloo thread holds the interpreter lock hangs.
        os.register_at_fork(before=lambda: time.sleep(0.05))
    return Distributed(rank, world_size, device)


def from_torchrun(name: str, default: int) -> int:
    """A number from an environment variable. UserError if it is not a number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}; expected a number: use torchrun, or unset it")
    return int(text)


# Files ----------------------------------------------------------------------------------------------------------------

def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Write a temporary file, flush it to disk, and rename it, so that the file at `path` is complete at any moment.
    Raises UserError, for example if the disk is full; an earlier file at `path` is then unchanged."""
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


def make_folder(path: Path) -> None:
    """Create the folder --out if necessary. UserError if it is not writable: better now than after an epoch."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot write in this folder: {error.strerror}") from None


@contextlib.contextmanager
def locked_folder(out: Path, data: str | None = None) -> Iterator[None]:
    """Create the folder --out if necessary and lock it for this run. The system releases the lock when the process
    ends, even if killed. (lockf rather than flock: workers do not inherit it, and over NFS it applies to all hosts.)"""
    for part in ("train", "val", "images", "annotations") if data else ():
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(Path(data, part))):
            raise UserError(f"--out {out} is inside the data, {Path(data, part)}; choose another --out")
    new = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    make_folder(out)
    with open(out / "run.lock", "a+") as file:
        try:
            import fcntl  # Windows has none
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.stat(file.fileno()), os.stat(file.name))  # a run that ends removes its file
        except (ImportError, OSError) as error:  # any other error: storage without locks
            ours = not isinstance(error, (BlockingIOError, PermissionError, FileNotFoundError))
        if not ours:
            file.seek(0)
            raise UserError(f"--out {out} is in use by another run{file.read()}; stop it, or choose another --out")
        file.truncate(0)
        print(f" (process {os.getpid()} on {platform.node()})", end="", file=file, flush=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
                for folder in new:  # those still empty
                    folder.rmdir()


# The command line -----------------------------------------------------------------------------------------------------

class Option(NamedTuple):
    """A command-line option."""

    argument: dict    # arguments of add_argument
    recipe: object    # default with --data
    built_in: object  # default without --data
    help: str


def checked(kind: type, is_valid: Callable, expected: str) -> dict:
    """Arguments of add_argument for a number that satisfies `is_valid`."""
    def parse_number(text: str) -> int | float:
        with contextlib.suppress(ValueError):
            if is_valid(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
    return {"type": parse_number}


def pair(argument: dict) -> dict:
    return argument | {"nargs": 2}


TEXT = checked(str, bool, "some text (is a shell variable empty?)")
FLAG = {"action": argparse.BooleanOptionalAction}
POSITIVE_INT = checked(int, lambda n: 1 <= n < 2**31, "an integer of at least 1")
NON_NEGATIVE_INT = checked(int, lambda n: 0 <= n < 2**31, "an integer of at least 0")
NON_NEGATIVE = checked(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
FRACTION = checked(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
BELOW_1 = checked(float, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
ALPHA = checked(float, lambda x: x == 0 or 1e-6 <= x <= 1e6, "0 or a number from 1e-6 to 1e6")
UP_TO_30 = checked(int, lambda n: 0 <= n <= 30, "an integer from 0 to 30")
PIXELS = checked(int, lambda n: 32 <= n <= 16384, "32 to 16384 pixels")
AMP = {"nargs": "?", "const": "auto", "choices": ["auto", "bf16", "fp16", "off"]}

# Options that apply to every use of a checkpoint, with their defaults.
CHECKPOINT_DEFAULTS = {"weights": None, "model": None, "device": "auto", "amp": "auto"}


def shared_options() -> dict[str, Option]:
    return {
        "weights": Option(TEXT, None, None, "checkpoint to start from or, with --eval and --predict, to use"),
        "grad-accum-steps": Option(POSITIVE_INT, 1, 1, "micro-batches per optimizer step"),
        "opt-betas": Option(pair(BELOW_1), [0.9, 0.999], [0.9, 0.999], "betas of AdamW"),
        "drop-path": Option(BELOW_1, 0.0, 0.0, "stochastic depth rate of the last block"),
        "hflip": Option(FRACTION, 0.5, 0.5, "probability of a horizontal flip"),
        "seed": Option(NON_NEGATIVE_INT, 0, 0, "random seed"),
        "device": Option(TEXT, "auto", "auto", "auto, cpu or an accelerator: cuda, cuda:1, mps, xpu"),
        "amp": Option(AMP, "auto", "auto", "automatic mixed precision; auto: bf16 on a GPU that has it, else off"),
        "compile": Option(FLAG, None, None, "torch.compile the model's parts for training (on with CUDA and Triton)"),
        "grad-checkpointing": Option(FLAG, False, False, "recompute activations in the backward pass to save memory"),
        "workers": Option(NON_NEGATIVE_INT, None, 0, "number of data-loading workers per process (share of the cores)"),
        "out": Option(TEXT, None, None, "output folder for checkpoints and log (runs/DATA-MODEL) or predictions"),
        "resume": Option(TEXT, None, None, "auto: continue from OUT/last.pt if it exists; or a checkpoint file"),
        "save-every": Option(NON_NEGATIVE_INT, 0, 0, "steps between checkpoints, in addition to validations; 0: off"),
    }


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse would print all options first
        raise UserError(message.removeprefix("argument "))


def parse(argv: list[str] | None, description: str, options: dict[str, Option], modes: dict[str, dict],
          inherited: dict[str, list[str]]) -> Namespace:
    """Parse the command line. `modes`: the options that apply to --eval and --predict, with their defaults.
    `inherited`: for options that name a checkpoint, the options whose defaults come from its config."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--eval", action="store_true", help="validate the checkpoint --weights")
    group.add_argument("--predict", nargs="+", metavar="IMAGE", help="use the checkpoint --weights on image files")
    for name, option in options.items():
        recipe, built_in = (" ".join(map(str, x)) if isinstance(x, list) else x for x in option[1:3])
        defaults = [str(recipe)] * (recipe is not None)
        defaults += [f"built-in set: {built_in}"] * (built_in not in (recipe, None))
        text = f"{option.help} ({'; '.join(defaults)})" if defaults and option.argument is not FLAG else option.help
        parser.add_argument(f"--{name}", help=text, **option.argument)
    given = vars(parser.parse_args(argv))
    if mode := next((mode for mode in modes if mode in given), None):
        defaults = modes[mode]
        for name in given:
            if name != mode and name not in defaults:
                parser.error(f"--{name.replace('_', '-')}: has no effect with --{mode}")
    else:
        column = "recipe" if "data" in given else "built_in"
        defaults = {name.replace("-", "_"): getattr(option, column) for name, option in options.items()}
        resumed = checkpoint_to_resume(Namespace(**{"resume": None, "out": os.devnull, **given}))
        for source, names in inherited.items():
            missing = [name for name in names if name not in given]
            if given.get(source) and missing:
                path = resumed or given[source]  # a resumed run needs no other weights
                config = config_of(load_checkpoint(path))
                defaults |= {name: config[name] for name in missing if name in config}
                check_model(defaults["model"], path)
    args = Namespace(**{"eval": False, "predict": None, **defaults, **given})
    if vars(args).get("workers", 0) is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = max(1, cores // max(1, from_torchrun("LOCAL_WORLD_SIZE", 1))) if args.data else 0
    return args


def dispatch(args: Namespace, train: Callable, evaluate: Callable, predict: Callable) -> int:
    """Train, evaluate or predict. Returns the exit status: 0, 2, or 128 + the number of the signal that stopped it."""
    distributed = init_distributed(args.device)
    act = predict if args.predict else evaluate if args.eval else train
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with (locked_folder(Path(args.out), args.data) if act is train and distributed.rank == 0
              else contextlib.nullcontext()):
            return act(args, distributed) or 0
    except Stopped as stopped:
        handlers.clear()  # the process is about to end; a signal that comes twice must not change its status
        distributed.all_reduce([])  # wait for rank 0 to save: torchrun kills the rest when one exits
        distributed.print("saved and stopped; to continue, add --resume auto to the same command")
        return 128 + stopped.args[0]
    finally:
        for number, handler in handlers.items():  # a notebook goes on
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


# Errors ---------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can fix. The scripts print the message without a traceback and exit with status 2."""

    def __init__(self, message: object):
        # A DataLoader re-raises a worker's exception with the worker's traceback in front of the message.
        super().__init__(str(message).rsplit("UserError: ", 1)[-1].strip())


def check_finite(logits: Tensor, source: str | Path) -> None:
    if not logits.isfinite().all():
        raise UserError(f"{source}: the model's output is not finite; another --amp may help")


def report_image(path: str | Path, error: Exception) -> None:
    """Print why an image was not predicted. Raises `error` again unless it concerns this image alone."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        error = UserError(f"{path}: out of memory")
    if not isinstance(error, UserError):
        raise error
    print_error(error)


def run_main(main: Callable) -> None:
    """Run main() and exit with its status. Exits with 2 and a one-line message for a user's mistake or lack of memory,
    with 130 for Ctrl-C when there is nothing to save."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: another file must not get its number, nor a result be lost
            os.dup2(os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_RDWR), number)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = main()
    except (Exception, KeyboardInterrupt) as error:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler would raise again
        status = report_error(error)
    kill_workers()
    if dist.is_initialized():  # destroying the group can hang if another process is waiting in a step
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def report_error(error: BaseException) -> int:
    """Print what went wrong. -> the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if os.environ.get("RANK", "0") != "0":  # if rank 0 has the same error, it reports it and torchrun kills the rest
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    found = f"{type(error).__name__}: {error}".strip(": \n")
    advice = next((f": {advice}" for words, advice in ADVICE.items() if re.search(words, found)), "")
    if isinstance(error, UserError):
        print_error(error)
    elif advice or isinstance(error, OSError):
        print_error(found.splitlines()[-1 if "Traceback" in found else 0] + advice)  # the last line of a worker's
    else:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
        return 1
    return 2


ADVICE = {  # by a pattern in the error
    r"gloo|DistBackendError|DistStoreError": "another process has ended; see its error",
    r"shared memory|/torch_\d": "is /dev/shm too small? Enlarge it (docker run --shm-size=8g), or use --workers 0",
    "Too many open files|ancdata": "raise the limit (ulimit -n 4096), or use fewer --workers",
    r"(?i)c\+\+ compile|CxxCompiler": "is a C++ compiler installed, with Python's headers? Or use --no-compile",
    # When memory runs out, the system may kill a data-loading worker; then the connection to it fails.
    r"^(MemoryError|OutOfMemoryError|ConnectionResetError|EOFError)|can't allocate memory|DataLoader worker \(pid":
        "out of memory? Try more --grad-accum-steps, --grad-checkpointing, fewer --workers, smaller images or batches",
}


def printable(text: object) -> str:
    """A line of text with control characters escaped: names of files and classes may come from anywhere."""
    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]",
                  lambda character: character[0].encode("unicode_escape").decode(), str(text))


def print_error(message: object) -> None:
    with contextlib.suppress(OSError):  # the exit status still tells
        tqdm.write("\n".join(map(printable, f"error: {message}".split("\n"))), file=sys.stderr)


def print_result(text: str) -> None:
    """Print a result. UserError if it cannot be written."""
    try:
        print(*map(printable, text.split("\n")), sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes it again at exit
        raise UserError(f"cannot write the result to the standard output: {error.strerror}") from None


# The built-in datasets: textured shapes on textured backgrounds -------------------------------------------------------

# Whether a point (u, v) is inside the shape, in the shape's own frame, in which its radius is about 1.
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
    """Draw the shapes with these indices in SHAPES over each other on a background. Texture, position, size, tilt and
    colours, brighter than the background's, are random.

    Returns an image (3, size, size) uint8 and a mask (size, size) uint8: 0 for the background, 1 + k for shape k.
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
    """One shape per image; its kind is the class. Images are drawn on access: image i depends on (seed, split, i)."""

    classes, side, transform, samples = list(SHAPES), 48, None, ()  # no files

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
    """For segment.py: one to three shapes on a background, which is class 0: (PIL image, mask (size, size) uint8)."""

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
