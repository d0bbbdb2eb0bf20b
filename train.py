"""Train VisionGRU on a folder of images, or on a built-in set of drawn shapes.

    python train.py                                                     the built-in set, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data /imagenet               the paper's recipe on eight GPUs
    python train.py --data DIR --weights best.pt --lr 1e-4 --epochs 30  fine-tuning on DIR/{train,val}/<class>/*.jpg
    python train.py --eval --weights best.pt --data DIR                 accuracy of a checkpoint
    python train.py --predict cat.jpg --weights best.pt                 top-5 classes of images

`train` is the whole story. What it calls follows in the order of the story: the run, which segment.py uses too; data;
processes; files; arguments and errors; and at the end the built-in set.

--batch-size is the number of images per optimizer step over all processes, so that the recipe is the same for any
number of them. All randomness is seeded by the number of the step or image, so that results do not depend on the
number of workers, and a run that was stopped and resumed ends as if it had not been.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

import visiongru

MODELS = {"nano": visiongru.visiongru_nano, "tiny": visiongru.visiongru_tiny, "base": visiongru.visiongru_base}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels


# Train, evaluate, predict ---------------------------------------------------------------------------------------------

def train(args, processes):
    """Train a classifier as `args` say, and leave the best in OUT/best.pt."""
    # Data
    train_data, val_data = open_data(args, ("train", "val"))
    classes = train_data.classes
    epoch_steps = max(1, len(train_data) // args.batch_size)
    steps = args.epochs * epoch_steps
    mixes = bool(args.mixup or args.cutmix)  # pairs of images, which must lie in one micro-batch
    micro_batch = images_per_micro_batch(args, processes, multiple=2 if mixes else 1)
    mix = batch_transform(args, len(classes))

    # Model, optimizer, learning rate
    torch.manual_seed(args.seed)
    model = MODELS[args.model](num_classes=len(classes), drop_path=args.drop_path,
                               grad_checkpointing=args.checkpoint)
    if args.weights and not file_to_resume(args):  # a resumed run has weights of its own
        fill_model(model, load_checkpoint(args.weights), args.weights, processes.say)
    model.to(processes.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=tuple(args.betas), fused=True,
                                  weight_decay=args.weight_decay)
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, args.warmup * epoch_steps))
    run = Run(args, processes, model, optimizer, scheduler, steps, train_data)
    processes.say(f"{len(classes)} classes; {len(train_data):,} training and {len(val_data):,} validation images of "
                  f"{args.img_size} px; epochs x steps x images: {args.epochs} x {epoch_steps} x {args.batch_size}")

    # Loop
    train_data.transform = train_transform(args)
    val_data.transform = eval_transform(args.img_size, args.val_resize)
    batches, val_loader = run.loaders(train_data, val_data, micro_batch)

    def loss_of(images, labels):
        images, labels = mix(images, labels, run.step)
        return F.cross_entropy(run.network(images), labels, label_smoothing=args.smoothing)

    while run.validated < steps:
        epoch = run.validated // epoch_steps + 1  # the same one after a stop in its midst
        run.take_steps(epoch * epoch_steps, batches, loss_of)
        scores = {"model": evaluate(model, val_loader, processes, run.autocast)}
        if run.ema:
            scores["ema"] = evaluate(run.ema.module, val_loader, processes, run.autocast)
        better = max(scores, key=lambda name: scores[name]["top1"])
        words = "  ".join(f"{name}: top-1 {s['top1']:.2f} top-5 {s['top5']:.2f}" for name, s in scores.items())
        of_average = {f"ema_{key}": value for key, value in scores.get("ema", {}).items()}
        run.record({"epoch": epoch, **scores["model"], **of_average}, f"epoch {epoch:3d}/{args.epochs}  {words}",
                   scores[better]["top1"], better)
    processes.say(f"done: {run.out / 'best.pt'} has top-1 {run.best:.2f} %. To evaluate it:\n  python train.py --eval "
                  f"--weights {run.out / 'best.pt'}" + (f" --data {args.data}" if args.data else ""))


def warmup_cosine(step, steps, warmup):
    """The learning rate at `step` of `steps`, its peak being 1: linear from 0 over `warmup` steps, then cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.compiler.set_stance("force_eager")  # --compile is for training: here images may have any size
@torch.inference_mode()
def evaluate(model, loader, processes, autocast=contextlib.nullcontext):
    """-> the mean loss, and top-1 and top-5 accuracy in percent (100 for five classes or fewer), exact over all
    processes. Raises Stopped if one of them is told to stop."""
    model.eval()
    loss = top1 = top5 = count = 0
    for images, labels in loader:
        if processes.heard:
            break
        images = images.to(processes.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(processes.device, non_blocking=True)
        with autocast():
            logits = model(images).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        top1 += hits[:, 0].sum().item()
        top5 += hits.sum().item()
        count += len(labels)
    loss, top1, top5, count = processes.sum([loss, top1, top5, count])
    processes.stop_if_told()
    return {"val_loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def evaluate_checkpoint(args, processes):
    model, transform = model_from_checkpoint(args)
    [data] = open_data(args, ["val"])
    check_classes(args.classes or [None] * model.num_classes, data.classes, args.weights)
    data.transform = transform
    loader = evaluation_loader(data, max(1, args.batch_size // processes.count), args, processes)
    loader = tqdm(loader, unit="batch", leave=False, disable=processes.rank > 0 or None)
    model.to(processes.device, memory_format=torch.channels_last)
    scores = evaluate(model, loader, processes, precision(args.amp, processes.device)[1])
    processes.say(f"{args.weights}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %, loss "
                  f"{scores['val_loss']:.4f} ({len(data):,} images)")


@torch.inference_mode()
def predict(args, processes):
    """Print the top-5 classes of images. One that cannot be read is reported; the rest are still processed."""
    model, transform = model_from_checkpoint(args)
    model.to(processes.device, memory_format=torch.channels_last).eval()
    _, autocast = precision(args.amp, processes.device)
    unread = 0
    for path in args.predict[processes.rank::processes.count]:
        try:
            image = transform(read_image(path))[None].to(processes.device)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            unread += 1
            continue
        with autocast():
            probabilities = model(image).float().softmax(dim=1)[0]
        top = probabilities.topk(min(5, len(probabilities)))
        print(path)
        for p, k in zip(top.values.tolist(), top.indices.tolist()):
            print(f"  {100 * p:6.2f} %  {args.classes[k] if args.classes else f'class {k}'}")
    [unread] = processes.sum([unread])  # wait for all: torchrun ends the rest when one exits with an error
    return 2 if unread else 0


def model_from_checkpoint(args):
    """The model of the checkpoint --weights, and its preprocessing. The names of its classes come into args.classes
    (None for a bare state dict)."""
    weights = open_checkpoint(args, img_size=224, val_resize=256, mean=MEAN, std=STD, classes=None)
    if "head.weight" not in weights:
        raise UserError(f"{args.weights} has no classifier")
    model = MODELS[args.model](num_classes=len(weights["head.weight"]))
    fill_model(model, weights, args.weights)
    return model, eval_transform(args.img_size, args.val_resize, args.mean, args.std)


# A run: how it steps, saves, stops and goes on -----------------------------------------------------------------------

class Run:
    """A training run of either script.

    OUT/last.pt holds all of its state, written after each validation, every --save-every steps and when it is told to
    stop; OUT/best.pt the weights that validated best, and the settings; OUT/log.jsonl a line for each validation.

    Attributes:
        network: the model for the loop, which averages the gradients over the processes.
        ema: the moving average of the model's weights, or None.
        step: optimizer steps taken.    validated: what `step` was at the last validation.
        best: the best score so far.    better: which weights did better at the last validation, "model" or "ema".
        parts: what has a state_dict, by its key in a checkpoint. VALUES are the attributes that are saved as they are.
    """

    VALUES = "validated", "loss_sum", "lr", "best", "better", "log"

    def __init__(self, args, processes, model, optimizer, scheduler, steps, train_data):
        self.args, self.processes, self.out = args, processes, Path(args.out)
        self.settings = {**vars(args), "classes": train_data.classes, "train_images": len(train_data),
                         "mean": list(MEAN), "std": list(STD)}
        self.model, self.optimizer, self.scheduler, self.steps = model, optimizer, scheduler, steps
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
        self.dtype, self.autocast = precision(args.amp, processes.device)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.dtype == torch.float16)
        self.parts = {"model": model, "ema": self.ema, "optimizer": optimizer, "scheduler": scheduler,
                      "scaler": self.scaler}
        self.validated, self.loss_sum, self.lr, self.best, self.better, self.log = 0, 0.0, 0.0, -1.0, "model", []
        self.open_folder()
        hear_signals(processes)
        if args.compile:
            compile_parts(model, processes.say)
        self.network = model
        if processes.count > 1:
            self.network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        size = sum(p.numel() for p in model.parameters())
        processes.say(f"{type(model).__name__} {args.model}, {size:,} parameters, on {processes.count} x "
                      f"{processes.device}, {self.dtype or 'float32'}; in {self.out}"
                      + (f"; resumed at step {self.step}" if self.step else ""))

    @property
    def step(self):
        return self.scheduler.last_epoch

    def loaders(self, train_data, val_data, val_batch):
        """An iterator over the micro-batches of all steps that are left, and the loader to validate with. There is one
        iterator for the whole run, so that its workers start once and never wait for a validation."""
        batches = training_batches(range(self.step, self.steps), self.args, self.processes)
        stream = Stream(train_data, self.args.seed)
        training = make_loader(stream, self.args.workers, self.processes, batch_sampler=batches)
        return iter(training), evaluation_loader(val_data, val_batch, self.args, self.processes)

    def take_steps(self, until, batches, loss_of):
        """Take optimizer steps until `until` of them are taken, and save, since a validation may take long. `batches`
        is an iterator over micro-batches (inputs, targets), of which `loss_of` gives the mean loss, under autocast."""
        args, processes, first = self.args, self.processes, self.step
        self.network.train()
        self.began = said = time.perf_counter()
        self.rate = 0.0
        torch.backends.cudnn.benchmark = True  # all images to train on have one size
        with tqdm(total=self.steps, initial=first, unit="step", leave=False, dynamic_ncols=True,
                  disable=processes.rank > 0 or None) as bar:  # None: where there is no terminal
            while self.step < until:
                self.lr = self.scheduler.get_last_lr()[0]
                loss = sum(self.backward(*next(batches), loss_of, micro) for micro in range(args.accum))
                [loss] = processes.sum([loss / processes.count])
                self.update(loss, f"at step {self.step + 1} of {self.steps}, learning rate {self.lr:.3g}")
                now = time.perf_counter()
                self.rate = (self.step - first) * args.batch_size / (now - self.began)
                progress = f"loss {loss:.3f}, lr {self.lr:.2e}, {self.rate:,.1f} images/s"
                bar.update()
                bar.set_postfix_str(progress, refresh=False)
                if bar.disable and now - said > 60:  # not a terminal: a line a minute
                    said = now
                    processes.say(f"step {self.step} of {self.steps}: {progress}")
                if processes.told or (args.save_every and self.step % args.save_every == 0 and self.step < until):
                    self.save()
                processes.stop_if_told()
        if processes.count > 1:  # BatchNorm's statistics are each process's own: all take the first one's
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        torch.backends.cudnn.benchmark = False
        self.save()

    def backward(self, inputs, targets, loss_of, micro):
        """Add the gradients of a micro-batch, and return its share of the step's loss."""
        args, processes = self.args, self.processes
        inputs = inputs.to(processes.device, memory_format=torch.channels_last, non_blocking=True)
        targets = targets.to(processes.device, non_blocking=True)
        torch.manual_seed(random_seed(args.seed, "step", self.step, micro, processes.rank))
        waits = micro < args.accum - 1 and processes.count > 1  # gradients are exchanged once for a step
        with self.network.no_sync() if waits else contextlib.nullcontext():
            with self.autocast():
                loss = loss_of(inputs, targets) / args.accum
            self.scaler.scale(loss).backward()
        return loss.item()

    def update(self, loss, where):
        """An optimizer step. UserError if the loss is not finite, or in fp16 the gradients overflow at every scale."""
        if math.isfinite(loss):
            self.scaler.step(self.optimizer)  # in fp16 it skips a step whose gradients overflow, and halves the scale
            self.scaler.update()
        if not math.isfinite(loss) or self.scaler.is_enabled() and self.scaler.get_scale() < 1e-6:
            self.give_up(f"the loss is {loss}, or its gradients are not finite at any scale, {where}")
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.loss_sum += loss
        if self.ema:
            self.ema.update_parameters(self.model)

    def give_up(self, reason):
        last = self.out / "last.pt"
        raise UserError(f"{reason}; {last} was not written over. A lower --lr, a longer --warmup or another --amp may "
                        f"help, in a new run: another --out, and --weights {last} to start from the last weights saved")

    def record(self, scores, words, score, better="model"):
        """After a validation: a line for the terminal, which begins with `words`; one for the log, with the dict
        `scores`; best.pt if `score`, of the weights called `better`, is the best so far; and last.pt."""
        loss = self.loss_sum / (self.step - self.validated)
        seconds, use = time.perf_counter() - self.began, accelerator_use(self)
        self.processes.say(f"{words}  loss {loss:.4f}  lr {self.lr:.2e}  {self.rate:,.1f} images/s  {seconds:.0f} s"
                           + "".join(f"  {name} {value:.2f}" for name, value in use.items()))
        self.log.append({"step": self.step, "loss": loss, "lr": self.lr, **scores, **use, "images_per_s": self.rate,
                         "seconds": seconds})
        if self.processes.rank == 0:
            write_whole(self.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log).encode())
        self.validated, self.loss_sum, self.better = self.step, 0.0, better
        if score > self.best:
            self.best = score
            self.save("best.pt")
        self.save()

    def save(self, name="last.pt"):
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            self.give_up(f"the weights are no longer finite after step {self.step}")
        if self.processes.rank > 0:
            return
        checkpoint = {key: part.state_dict() if part else None for key, part in self.parts.items()}
        checkpoint |= {key: getattr(self, key) for key in (*self.VALUES, "step", "settings")}
        if name == "best.pt":
            checkpoint = {key: checkpoint[key] for key in ("model", "ema", "better", "best", "step", "settings")}
        data = io.BytesIO()
        torch.save(checkpoint, data)
        write_whole(self.out / name, data.getbuffer())

    def open_folder(self):
        """Make OUT and, with --resume, go on from its checkpoint. Never begin over an earlier run."""
        resume, last = file_to_resume(self.args), self.out / "last.pt"
        checkpoint = load_checkpoint(resume) if resume else {}
        # A number that differs where the checkpoints differ. It is below 2^40, so that its sum is exact in float64.
        mark = random_seed(checkpoint.get("step"), checkpoint.get("settings")) % 2**40
        if self.processes.sum([mark])[0] != mark * self.processes.count:
            raise UserError(f"the processes see different {resume or last}: --out must be a folder that all share")
        for earlier in last, self.out / "best.pt", self.out / "log.jsonl":
            if earlier.exists() and (resume is None or resume.resolve() != last.resolve()):
                raise UserError(f"{earlier} is there from an earlier run: --resume auto goes on from its last.pt, "
                                f"another --out begins a new one")
        if resume:
            self.restore(checkpoint, resume)
        if self.processes.rank == 0:
            make_folder(self.out)
            for name in "last.pt", "best.pt", "log.jsonl":  # of a run that was killed while it wrote
                (self.out / f"{name}.tmp").unlink(missing_ok=True)

    def restore(self, checkpoint, name):
        """Take the state from a checkpoint of the same run: other data, or another recipe, would be another run."""
        if "optimizer" not in checkpoint:
            raise UserError(f"--resume {name}: this file has weights only; resume a last.pt, or start from --weights")
        try:
            check_classes(checkpoint["settings"]["classes"], self.settings["classes"], name)
            for option, before in checkpoint["settings"].items():
                now = self.settings.get(option, before)
                if now != before and option not in MAY_CHANGE:
                    raise UserError(f"--resume {name}: {option.replace('_', '-')} was {before} and is now {now}; go on "
                                    f"as before, or begin a new run with --weights")
            for key, part in self.parts.items():
                if checkpoint[key]:  # without --ema there is no average, and without fp16 no scale
                    part.load_state_dict(checkpoint[key])
            for key in self.VALUES:
                setattr(self, key, checkpoint[key])
            if not (self.out / "best.pt").exists():  # it goes on in another folder, which has no best yet
                self.best = -1.0
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(f"--resume {name}: this checkpoint does not fit: {type(error).__name__}: {error}") from None


# Options that a resumed run may change.
MAY_CHANGE = {"data", "out", "resume", "weights", "backbone_weights", "device", "workers", "save_every", "compile",
              "checkpoint", "accum", "amp", "epochs", "iters", "warmup", "eval_every", "slide"}


def file_to_resume(args):
    """The checkpoint that --resume names; None for a new run, as with --resume auto where there is none yet."""
    if args.resume != "auto":
        return Path(args.resume) if args.resume else None
    last = Path(args.out, "last.pt")
    return last if last.exists() else None


class Stopped(Exception):
    """The run was told to stop, and has saved; its argument is the signal's number."""


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
    STOP_SIGNALS.append(signal.SIGHUP)


def hear_signals(processes):
    """Hear Ctrl-C, SIGTERM and a closed terminal. After a first signal the loop finishes its step, saves and leaves. A
    second one ends the process at once."""
    def handler(number, frame):
        # The same signal may come twice: torchrun passes on what the terminal has sent to its processes too, and
        # `timeout` sends it to the process and then to its group.
        soon = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.1
        if not processes.heard:
            processes.heard, processes.heard_at = number, time.monotonic()
            if processes.rank == 0:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, b"\nstopping after this step; once more stops at once\n")  # print is not for handlers
        elif time.monotonic() - processes.heard_at > soon:
            end_workers()
            os._exit(128 + number)
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def precision(amp, device):
    """--amp -> the type that autocast computes in, or None; and autocast, to be entered by `with autocast():`."""
    if amp == "auto":
        has_bf16 = device.type == "xpu" or (device.type == "cuda"
                                            and torch.cuda.is_bf16_supported(including_emulation=False))
        amp = "bf16" if has_bf16 else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return dtype, functools.partial(torch.autocast, device.type, dtype, enabled=dtype is not None)


def compile_parts(model, say):
    """torch.compile, in place, the parts of which the model has many: blocks of one shape share their code, so that it
    takes a minute, where the whole model would take several. Validation, with images of any size, does without. So does
    the decoder of UPerNet: compiled, its gradient in bf16 on a CPU has NaN in it (PyTorch 2.14)."""
    torch._dynamo.config.cache_size_limit = 64  # with --drop-path every block has code of its own
    kinds = visiongru.Stem, visiongru.Block, visiongru.Downsample, visiongru.FCNHead
    parts = [part for part in model.modules() if isinstance(part, kinds)]
    for part in parts:
        part.compile(dynamic=False)
    say(f"--compile: {len(parts)} parts, those of one shape together, are compiled in the first step; it can take a "
        f"minute or two")


# FLOP/s in bf16 or fp16, from the data sheets.
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


def accelerator_use(run):
    """The peak of an accelerator's memory in GiB, and the share of its FLOP/s that the model uses (MFU), as far as they
    are known. A training step takes three times the FLOPs of a forward pass. For a CPU, nothing."""
    module = torch.get_device_module(run.processes.device)
    if not hasattr(module, "max_memory_allocated"):
        return {}
    use = {"GiB": module.max_memory_allocated() / 2**30}
    peak = next((flops for card, flops in PEAK.items() if re.search(rf"\b{card}\b", module.get_device_name())), None)
    if peak and run.dtype:
        size = run.settings.get("crop_size") or run.settings["img_size"]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copy.deepcopy(run.model).to("meta")(torch.empty(2, 3, size, size, device="meta"))
        use["MFU"] = 3 * counter.get_total_flops() / 2 * run.rate / (peak * run.processes.count)
    return use


# Data -----------------------------------------------------------------------------------------------------------------

def open_data(args, splits):
    """The data sets DIR/split/<class>/<images>, or the built-in ones: items (image, class), with the same `classes`."""
    if args.data is None:
        return [Shapes(split, {"train": 14_000, "val": 1_000}[split]) for split in splits]
    try:  # a class may be empty in val, not in train
        sets = [ImageFolder(Path(args.data, split), loader=read_image, allow_empty=split == "val") for split in splits]
    except OSError as error:
        raise UserError(f"--data {args.data}: expected {{train,val}}/<class>/<images> in it: {error}") from None
    if not all(data.samples for data in sets):
        raise UserError(f"--data {args.data}: there are no images in {splits[-1]}")
    if sets[0].classes != sets[-1].classes:
        raise UserError(f"--data {args.data}: train and val have different classes; in one of them only: "
                        f"{', '.join(sorted({*sets[0].classes} ^ {*sets[-1].classes}))}")
    return sets


def read_image(path):
    """An image file as RGB, as a viewer shows it: upright, the first frame, what is transparent on white, 16 bits cut
    to 8. UserError, with its path and the reason, if it cannot be read or has more pixels than PIL allows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images below the limit, and of odd metadata
            with Image.open(path) as image:
                if image.format == "EPS":
                    raise ValueError("PostScript is a program, which would be run")
                image.load()
                kind = image.format
                with contextlib.suppress(Exception):  # damaged EXIF data: the picture is as good as before
                    image = ImageOps.exif_transpose(image)
                # PIL opens some files of 16-bit grey as 32-bit "I", and its conversion turns all but the darkest white.
                if image.mode.startswith("I;16") or image.mode == "I" and kind in ("PNG", "PPM"):
                    return image.convert("I").point(lambda value: value / 256).convert("RGB")
                if image.mode[0] in "IF":
                    raise ValueError(f"its pixels are 32-bit numbers (PIL's mode {image.mode}); expected 8 or 16 bits")
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except Exception as error:
        raise UserError(f"cannot read the image {path}: {error}") from None


def eval_transform(img_size, val_resize, mean=MEAN, std=STD):
    """Shorter side to `val_resize`, the central square of `img_size`, normalised: PIL image -> (3, S, S) float32."""
    return v2.Compose([v2.Resize(max(img_size, val_resize)), v2.CenterCrop(img_size), v2.ToImage(),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def train_transform(args):
    """The recipe's augmentation of single images; mixup and cutmix work on batches and come later."""
    if args.crop_scale < 1:
        crop = v2.RandomResizedCrop(args.img_size, scale=(args.crop_scale, 1))
    else:
        crop = v2.Compose([v2.Resize(max(args.img_size, args.val_resize)), v2.CenterCrop(args.img_size)])
    return v2.Compose([crop, v2.RandomHorizontalFlip(args.flip), v2.RandAugment(*args.randaug), v2.ToImage(),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
                       v2.RandomErasing(args.erasing, value="random")])


def batch_transform(args, num_classes):
    """Mixup and cutmix, one of the two at even odds for each step: images, labels, the step -> images, soft labels. The
    choice depends on the seed and the step alone, and images are mixed in the pairs of `training_batches`."""
    choices = [make(alpha=alpha) for make, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha > 0]
    choice = v2.RandomChoice(choices) if choices else None

    def mix(images, labels, step):
        if choice is None:
            return images, labels
        soft = F.one_hot(labels, num_classes).float()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random_seed(args.seed, "mix", step))
            # torchvision mixes each item of a batch with the one before. We lay the batch out as two large items, its
            # two halves, so that image i is mixed with image i + B/2.
            mixed, labels = choice(images.reshape(2, -1, *images.shape[2:]), soft.view(2, -1))
        return mixed.view(images.shape).contiguous(memory_format=torch.channels_last), labels.view(soft.shape)
    return mix


class Stream(Dataset):
    """`data` over and over, in a new order each time: an item for every position from 0 on, without end.

    The order depends on (seed, epoch), and what is random in an item on (seed, epoch, index): torch's generator is
    seeded. (Its state is not restored: that takes longer than to read and augment a small picture.)
    """

    def __init__(self, data, seed):
        self.data, self.seed, self.epoch = data, seed, None

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self.data))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(random_seed(self.seed, "order", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.data), generator=generator)
        index = int(self.order[place])
        torch.default_generator.manual_seed(random_seed(self.seed, epoch, index))
        return self.data[index]


def training_batches(steps, args, processes):
    """One process's micro-batches, as lists of positions in a Stream: args.accum of them for each step in `steps`. The
    images of a step, and the pairs for mixup, are the same for any number of processes and micro-batches: of eight
    images in two micro-batches the first has 0, 1, 4, 5, in which 0 is mixed with 4 and 1 with 5."""
    halves = 2 if args.batch_size // (args.accum * processes.count) % 2 == 0 else 1
    for step in steps:
        positions = torch.arange(step * args.batch_size, (step + 1) * args.batch_size)
        mine = positions.view(halves, args.accum, -1, processes.count)[..., processes.rank]  # half, micro-batch, pair
        yield from mine.transpose(0, 1).flatten(1).tolist()


def evaluation_loader(data, batch_size, args, processes):
    """One process's share of a data set: each item once, over all the processes."""
    mine = range(processes.rank, len(data), processes.count)
    return make_loader(data, args.workers, processes, sampler=mine, batch_size=batch_size)


def images_per_micro_batch(args, processes, multiple=1):
    parts = processes.count * args.accum
    if args.batch_size % (parts * multiple):
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of {parts * multiple}, for "
                        f"{processes.count} processes x --accum {args.accum}"
                        + " x the pairs of --mixup and --cutmix" * (multiple > 1))
    return args.batch_size // parts


def make_loader(data, workers, processes, **order):
    """A DataLoader whose worker processes start once."""
    return DataLoader(data, num_workers=workers, worker_init_fn=start_worker, persistent_workers=workers > 0,
                      pin_memory=processes.device.type == "cuda", **order)


def start_worker(_):
    # A signal to the whole group reaches the workers too. They must outlive it until the step is done and saved.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))


def random_seed(*parts):
    """A seed for torch from whole numbers and words; the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# Processes ------------------------------------------------------------------------------------------------------------

@dataclass
class Processes:
    """This process among those that torchrun has started, one for each GPU."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")
    heard: int = 0      # the number of the first signal to stop that this process has heard
    told: bool = False  # whether one of the processes had heard one at their last `sum`

    def say(self, words):
        """Print, in the first process alone."""
        try:
            if self.rank == 0:
                print(words, flush=True)
        except OSError:  # the terminal, or the program that reads this, is gone: the run goes on without
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def sum(self, numbers):
        """The sum over all processes of a list of numbers, as a list of floats. It also finds whether one was told to
        stop, so that all leave in the same place."""
        *numbers, told = map(float, [*numbers, self.heard])
        if self.count > 1:
            total = torch.tensor([*numbers, told], dtype=torch.float64, device=self.device)
            dist.all_reduce(total)
            *numbers, told = total.tolist()
        self.told = told > 0
        return numbers

    def stop_if_told(self):
        if self.told:
            raise Stopped(self.heard or signal.SIGTERM)


def start_processes(device="auto"):
    """Join the other processes if torchrun started several, and take this one's device."""
    rank, count, local_rank = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(accelerator.type if device == "auto" else device)
        if device.type not in ("cpu", accelerator.type):
            raise RuntimeError(f"torch sees no {device.type} here")
        if device.type != "cpu":
            device = torch.device(device.type, local_rank if device.index is None else device.index)
            if count > 1 and device.index != local_rank:
                raise RuntimeError("each process needs a device of its own: leave its number out")
            torch.accelerator.set_device_index(device.index)
            torch.set_float32_matmul_precision("high")  # tf32
    except RuntimeError as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if count == 1:
        return Processes(device=device)
    dist.init_process_group(dist.get_default_backend_for_device(device))
    if device.type == "cpu" and hasattr(os, "register_at_fork"):
        # A workaround: before Python 3.12 a worker that is forked while a thread of gloo's holds Python's lock hangs.
        os.register_at_fork(before=lambda: time.sleep(0.05))
    return Processes(rank, count, device)


# Files ----------------------------------------------------------------------------------------------------------------

def write_whole(path, data):
    """Fill a temporary file, flush it to the disk, rename it: at any moment the file at `path` is whole.

    Raises UserError if the disk is full, say; then what was at `path` before is still there.
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
        raise UserError(f"cannot write {path}: {error.strerror}; one written before is still there") from None


def make_folder(path):
    """The folder --out, made if need be. UserError if nothing can be written there: sooner than after an epoch."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot write in this folder: {error.strerror}") from None


def load_checkpoint(path):
    """What a checkpoint file holds, a dict; no code in it is run. UserError if it is not a checkpoint, or damaged."""
    try:
        checkpoint = visiongru.read_checkpoint(path)
    except OSError as error:
        raise UserError(f"cannot open the checkpoint {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"cannot use the checkpoint {path}: {error}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("settings", {}), dict):
        raise UserError(f"{path} holds no checkpoint of these scripts, and no state dict")
    return checkpoint


def open_checkpoint(args, **defaults):
    """--weights: the weights in it. Its settings, or else these defaults, become those of `args` that are None."""
    if not args.weights:
        raise UserError("--eval and --predict need a checkpoint: --weights FILE")
    checkpoint = load_checkpoint(args.weights)
    for name, default in {"model": "tiny", **defaults}.items():
        if vars(args).get(name) is None:
            setattr(args, name, checkpoint.get("settings", {}).get(name, default))
    if args.model not in MODELS:
        raise UserError(f"{args.weights} has a model called {args.model!r}; expected one of {', '.join(MODELS)}")
    try:
        return visiongru.extract_state_dict(checkpoint)
    except ValueError as error:
        raise UserError(f"{args.weights}: {error}") from None


def fill_model(model, weights, path, say=print):
    """visiongru.load_weights with what was read from `path`: what it warns of is said, its error is a UserError."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            visiongru.load_weights(model, weights)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    for warning in caught:
        say(f"{path}: {warning.message}")


def check_classes(known, classes, name):
    """UserError if `known`, the classes of the checkpoint called `name` (or None for each), are not the data's."""
    if len(known) != len(classes):
        raise UserError(f"{name} was trained on {len(known)} classes and the data has {len(classes)}; to "
                        f"fine-tune on other classes, train with --weights {name}")
    for ours, theirs in zip(known, classes):
        if ours not in (None, theirs):
            raise UserError(f"{name} was trained on other classes than the data's: {ours!r} where it has {theirs!r}")


# Arguments ------------------------------------------------------------------------------------------------------------

def limited(kind, good, expected):
    """For argparse's type=: a number that is `good`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if good(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
    return parse


COUNT = limited(int, lambda n: 1 <= n < 2**31, "a whole number of at least 1")
COUNT_OR_NONE = limited(int, lambda n: 0 <= n < 2**31, "a whole number of at least 0")
AMOUNT = limited(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
SHARE = limited(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
BELOW_1 = limited(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
ALPHA = limited(float, lambda x: x == 0 or 1e-6 <= x <= 1e6, "0 or a number from 1e-6 to 1e6")
UP_TO_30 = limited(int, lambda n: 0 <= n <= 30, "a whole number from 0 to 30")
PIXELS = limited(int, lambda n: 32 <= n <= 16384, "32 to 16384 pixels")


# For each option: what it takes; its default with --data, the recipe, and without, for the built-in set; what it is. A
# default of None is made from other options.
SHARED = {  # by both scripts
    "weights": (str, None, None, "start from this checkpoint, ours or the authors'; with --eval, --predict: use it"),
    "accum": (COUNT, 1, 1, "micro-batches per optimizer step"),
    "betas": ((BELOW_1, BELOW_1), [0.9, 0.999], [0.9, 0.999], "of AdamW"),
    "drop-path": (BELOW_1, 0.0, 0.0, "probability of stochastic depth, in the last block"),
    "flip": (SHARE, 0.5, 0.5, "probability of horizontal flips"),
    "seed": (COUNT_OR_NONE, 0, 0, "of all that is random"),
    "device": (str, "auto", "auto", "auto, cpu or an accelerator: cuda, cuda:1, mps, xpu"),
    "amp": (["auto", "bf16", "fp16", "off"], "auto", "auto", "autocast; auto: bf16 on a GPU that has it, else off"),
    "compile": (bool, False, False, "torch.compile the parts of the model for training; a minute more to start"),
    "checkpoint": (bool, False, False, "activation checkpointing: less memory for more time, the same result"),
    "workers": (COUNT_OR_NONE, None, 0, "processes that load images, for each that trains (its share of the cores)"),
    "out": (str, None, None, "folder for log.jsonl, last.pt and best.pt (runs/DATA-MODEL), or for predictions"),
    "resume": (str, None, None, "auto: go on from OUT/last.pt if it is there; or FILE"),
    "save-every": (COUNT_OR_NONE, 0, 0, "steps between checkpoints, besides those at validations; 0: none"),
}
FROM_CHECKPOINT = {"weights": None, "data": None, "model": None, "device": "auto", "amp": "auto", "workers": None}
# DeiT's recipe, as the paper uses it, and what suits the built-in set: few epochs, and no augmentation that cuts off
# the shapes.
OPTIONS = {
    "data": (str, None, None, "folder with {train,val}/<class>/<images>; without it: the built-in set"),
    "model": (list(MODELS), "tiny", "nano", "size of the model"),
    "img-size": (PIXELS, 224, 48, "side of the images in pixels"),
    "val-resize": (PIXELS, None, 48, "shorter side before the central crop, for validation (img-size x 256 / 224)"),
    "epochs": (COUNT, 300, 4, "times that all images are seen"),
    "batch-size": (COUNT, 1024, 32, "images per optimizer step, over all processes"),
    "lr": (AMOUNT, None, 1e-3, "peak learning rate (1e-3 x batch-size / 1024)"),
    "weight-decay": (AMOUNT, 0.05, 0.05, "on every parameter"),
    "warmup": (AMOUNT, None, 1, "epochs of rising learning rate (epochs / 15)"),
    "crop-scale": (SHARE, 0.08, 1.0, "least share of an image that a random crop takes; 1: no random crop"),
    "randaug": ((UP_TO_30, UP_TO_30), [2, 9], [0, 0], "operations and magnitude of RandAugment"),
    "erasing": (SHARE, 0.25, 0.0, "probability of random erasing"),
    "mixup": (ALPHA, 0.8, 0.0, "alpha; 0: none"),
    "cutmix": (ALPHA, 1.0, 0.0, "alpha; 0: none"),
    "smoothing": (BELOW_1, 0.1, 0.0, "of the labels"),
    "ema": (BELOW_1, 0.9999, 0.99, "decay of the moving average of the weights; 0: none"),
} | SHARED


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse's own prints all options too
        raise UserError(message.removeprefix("argument "))


def parse(argv, description, options, from_checkpoint):
    """The arguments, by a table of `options` as above. With --eval and --predict only those in `from_checkpoint` are of
    use; they have the defaults given there."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--eval", action="store_true", help="validate the checkpoint --weights")
    action.add_argument("--predict", nargs="+", metavar="IMAGE", help="use the checkpoint --weights on image files")
    for name, (kind, recipe, built_in, text) in options.items():
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else \
            {"choices": kind} if isinstance(kind, list) else \
            {"type": kind[0], "nargs": len(kind)} if isinstance(kind, tuple) else {"type": kind}
        shown = dict.fromkeys(str(default) for default in (recipe, built_in) if default is not None and kind != bool)
        parser.add_argument(f"--{name}", help=text + f" ({'; built-in set: '.join(shown)})" * bool(shown), **how)
    given = vars(parser.parse_args(argv))
    if given.keys() & {"eval", "predict"}:
        action, idle = "eval", {"out"}
        if "predict" in given:
            action, idle = "predict", {"data", "workers", "batch_size", "num_classes", "ignore_label"}
        for name in given.keys() - {action} - (from_checkpoint.keys() - idle):
            parser.error(f"--{name.replace('_', '-')}: does nothing with --{action}")
        defaults = from_checkpoint
    else:
        defaults = {name.replace("-", "_"): row[1 if "data" in given else 2] for name, row in options.items()}
    args = argparse.Namespace(**{"eval": False, "predict": None, **defaults, **given})
    if args.workers is None:  # this process's share of the cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))) if args.data else 0
    return args


def parse_arguments(argv=None):
    args = parse(argv, __doc__, OPTIONS, FROM_CHECKPOINT | {"img_size": None, "val_resize": None, "batch_size": 64})
    if args.img_size and not args.val_resize:
        args.val_resize = round(args.img_size * 256 / 224)
    if not (args.eval or args.predict):
        args.lr = 1e-3 * args.batch_size / 1024 if args.lr is None else args.lr
        args.warmup = args.epochs / 15 if args.warmup is None else args.warmup
        args.out = args.out or f"runs/{Path(args.data).resolve().name if args.data else 'shapes'}-{args.model}"
    return args


# Errors ---------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can put right. The scripts print its message without a traceback and exit with status 2."""

    def __init__(self, message):
        # A DataLoader hands over a worker's exception with the worker's traceback before the message.
        super().__init__(str(message).rsplit("UserError: ", 1)[-1].strip())


def act(args, train, evaluate, predict):
    """Do what the arguments ask for. -> the exit status: 0, 2, or 128 + the number of a signal that ended it early."""
    processes = start_processes(args.device)
    try:
        return (predict if args.predict else evaluate if args.eval else train)(args, processes) or 0
    except Stopped as stopped:
        processes.sum([])  # nobody ends, for torchrun then ends the others, before the first process has saved
        processes.say("stopped by a signal, and saved: the same command with --resume auto goes on")
        return 128 + stopped.args[0]


def run_script(main):
    """Run main() and exit with its status; or with 2, and a line without a traceback, for what the user can put right
    and memory that does not suffice; or with 130 for Ctrl-C while there is nothing to be saved."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = main()
    except (Exception, KeyboardInterrupt) as error:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a DataLoader's handler would raise the error again
        status = tell(error)
    end_workers()
    if dist.is_initialized():  # to destroy the group in order can hang, if another process waits in a step
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def tell(error):
    """Say what went wrong. -> the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if os.environ.get("RANK", "0") != "0":  # if all meet the error, the first one tells it, and torchrun ends the rest
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    # The system kills a process that loads images when memory runs out; what then fails may be the connection to it.
    no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError, ConnectionResetError, EOFError)) \
        or any(words in str(error) for words in ("can't allocate memory", "DataLoader worker (pid"))
    if not no_memory and not isinstance(error, UserError):
        traceback.print_exception(error)
        return 1
    message = str(error)
    if no_memory:
        reason = (message.splitlines() or [type(error).__name__])[0]
        message = (f"{reason}: out of memory? A larger --accum, --checkpoint, fewer --workers, smaller images or "
                   f"batches need less")
    print(f"error: {message}", file=sys.stderr)
    return 2


def end_workers():
    """End the processes that load images at once. By themselves they would take their time."""
    for worker in multiprocessing.active_children():
        worker.kill()


# The built-in set: textured shapes on textured grounds ----------------------------------------------------------------

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


def draw_scene(shapes, size, generator):
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

    def __init__(self, split, length, size=None, seed=0):
        self.split, self.length, self.size, self.seed = split, length, size or self.side, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        label = index % len(self.classes)
        generator = torch.Generator().manual_seed(random_seed(self.seed, self.split, index))
        image = v2.functional.to_pil_image(draw_scene([label], self.size, generator)[0])
        return (self.transform(image) if self.transform else image), label


def main(argv=None):
    return act(parse_arguments(argv), train, evaluate_checkpoint, predict)


if __name__ == "__main__":
    run_script(main)
