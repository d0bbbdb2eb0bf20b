"""Train VisionGRU on a folder of images, or on a built-in set of drawn shapes.

    python train.py                                                     the built-in set, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data /imagenet               the paper's recipe on eight GPUs
    python train.py --data DIR --weights best.pt --lr 1e-4 --epochs 30  fine-tuning on DIR/{train,val}/<class>/*.jpg
    python train.py --eval --weights best.pt --data DIR                 accuracy of a checkpoint
    python train.py --predict cat.jpg --weights best.pt                 top-5 classes of images

--batch-size is the number of images per optimizer step over all processes, so that the recipe is the same for any
number of them. Every random number comes from the seed, the epoch and the step or image: nothing depends on the number
of workers, and a run that was stopped and resumed goes on as if it had not been.

The file in order: the built-in set; data; processes; checkpoints; the training loop; evaluation and prediction;
arguments.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import types
import uuid
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

import visiongru

MODELS = {"nano": visiongru.visiongru_nano, "tiny": visiongru.visiongru_tiny, "base": visiongru.visiongru_base}
MOST_PIXELS = 16384  # a side: more would take all memory before the system says so, and other programs with it
# Ctrl-C, what a scheduler announces the end by, and a terminal that is closed, unless nohup has had that ignored.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOP_SIGNALS.append(signal.SIGHUP)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels


class UserError(Exception):
    """Something the user can put right. The scripts print its message without a traceback and exit with status 2."""

    def __init__(self, message):
        # A DataLoader hands over a worker's exception with the worker's traceback before the message.
        super().__init__(str(message).rsplit("UserError: ", 1)[-1].strip())


def random_seed(*parts):
    """A seed for torch from whole numbers and words; the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# ---------------------------------------------------------------------------------------------------------------------
# The built-in set: textured shapes on textured grounds
# ---------------------------------------------------------------------------------------------------------------------

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
    """Draw shapes on a ground, each with a texture, place, size, tilt and colours of its own, brighter than the ground.

    Args:
        shapes: indices into SHAPES, drawn in this order, the later over the earlier.
        size: side of the square image in pixels.
        generator: the torch.Generator that decides everything else.
    Returns:
        image (3, size, size) uint8, and mask (size, size) uint8: 0 for the ground, 1 + k for the shape with index k.
    """
    # Python's numbers in between: for so few pixels a tensor operation is mostly its overhead.
    chance = iter(torch.rand(16 + 32 * len(shapes), generator=generator).tolist())

    def uniform(low, high):
        return low + (high - low) * next(chance)

    def texture(colour):  # stripes of a lighter and a darker shade, bent by a wave across them
        bend = torch.sin(x * uniform(-0.5, 0.5) + y * uniform(-0.5, 0.5)) * 2
        stripes = torch.sin(bend + x * uniform(-1, 1) + y * uniform(-1, 1) + uniform(0, 6))
        return torch.stack([stripes.mul(uniform(-0.12, 0.12)).add_(channel) for channel in colour])

    pixels = torch.arange(size, dtype=torch.float32) * 64 / size
    y, x = pixels[:, None], pixels[None, :]
    ground = [uniform(0, 0.55) for _ in range(3)]
    image = texture(ground)
    mask = torch.zeros(size, size, dtype=torch.uint8)
    for shape in shapes:
        radius = uniform(13, 24) / max(1, len(shapes))**0.25
        left, top = uniform(0.8 * radius, 64 - 0.8 * radius), uniform(0.8 * radius, 64 - 0.8 * radius)
        cos, sin = math.cos(tilt := uniform(-0.5, 0.5)) / radius, math.sin(tilt) / radius
        dx, dy = x - left, y - top
        inside = SHAPES[list(SHAPES)[shape]](dx * cos + dy * sin, dy * cos - dx * sin)
        image = torch.where(inside, texture([channel + uniform(0.25, 0.55) for channel in ground]), image)
        mask[inside] = shape + 1
    image += 0.17 * torch.rand(3, size, size, generator=generator) - 0.085
    return image.clamp_(0, 1).mul_(255).to(torch.uint8), mask


class Shapes(Dataset):
    """The built-in classification set: one shape per image, its kind the class. Drawn when asked for, never stored.

    Item i is (PIL image, class) and depends on (split, seed, i) alone.
    """

    classes = list(SHAPES)

    def __init__(self, split, length, size=48, seed=0):
        self.split, self.length, self.size, self.seed = split, length, size, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        label = index % len(self.classes)
        generator = torch.Generator().manual_seed(random_seed(self.seed, self.split, index))
        image, _ = draw_scene([label], self.size, generator)
        return v2.functional.to_pil_image(image), label


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

def read_image(path):
    """An image file as RGB, as a viewer shows it, or a UserError with its path and the reason.

    Upright as its EXIF data say; of an animation the first frame; what is transparent on white; 16 bits a channel cut
    to 8. More than 179 million pixels, the limit of PIL, are refused before they are decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images below the limit, and of odd metadata
            with Image.open(path) as file:
                if file.format == "EPS":
                    raise ValueError("PostScript is a program, which would be run")
                file.load()
                try:
                    image = ImageOps.exif_transpose(file)
                except Exception:  # damaged EXIF data: the picture is as good as before
                    image = file
                return as_rgb(image, file.format)
    except Exception as error:
        raise UserError(f"cannot read the image {path}: {error}") from None


def as_rgb(image, file_format):
    # PIL's own conversion of 16-bit grey clips at 255: all but the darkest pixels turn white. Earlier versions of PIL
    # open 16-bit PNG files, and all do 16-bit PGM files, as the 32-bit "I".
    if image.mode.startswith("I;16") or image.mode == "I" and file_format in ("PNG", "PPM"):
        return image.convert("I").point(lambda value: value / 256).convert("RGB")
    if image.mode[0] in "IF":
        raise ValueError(f"its pixels are 32-bit numbers (PIL's mode {image.mode}), of which white is not known; "
                         f"expected 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_folder(root, split):
    """DIR/split/<class>/... as (PIL image, class) items; classes in the sorted order of their folders."""
    folder = Path(root, split)
    if not Path(root).is_dir():
        raise UserError(f"--data {root}: no such folder")
    if not folder.is_dir():
        raise UserError(f"--data {root}: there is no folder {split} in it; expected {folder}/<class>/<images>")
    try:
        data = ImageFolder(folder, loader=read_image, allow_empty=True)
    except FileNotFoundError:
        raise UserError(f"{folder} has no class folders; expected {folder}/<class>/<images>") from None
    if not data.samples:
        raise UserError(f"{folder} has {len(data.classes)} class folders and no images in them")
    return data


def open_data(args, splits=("train", "val")):
    """The data sets of `splits` in that order, with the same `classes`."""
    if args.data is None:
        return [Shapes(split, {"train": 12_000, "val": 1_000}[split]) for split in splits]
    sets = [image_folder(args.data, split) for split in splits]
    for other in sets[1:]:
        if other.classes != sets[0].classes:
            def only(a, b): return ", ".join(sorted(set(a) - set(b))) or "none"
            raise UserError(f"{args.data}: train and val have different classes; only in train: "
                            f"{only(sets[0].classes, other.classes)}; only in val: "
                            f"{only(other.classes, sets[0].classes)}")
    if "train" in splits:
        filled = set(sets[0].targets)
        empty = [name for k, name in enumerate(sets[0].classes) if k not in filled]
        if empty:
            raise UserError(f"{args.data}/train: no images in the class folders {', '.join(empty)}")
    return sets


class NotTooLong(v2.Transform):
    """Of an image more than four times as long as wide, the middle: to resize the whole of it by its shorter side, of
    which the central crop then takes little, could need more memory than there is."""

    def transform(self, inpt, params):
        height, width = v2.functional.get_size(inpt)
        return v2.functional.center_crop(inpt, [min(height, 4 * width), min(width, 4 * height)])


def eval_transform(img_size, val_resize, mean=MEAN, std=STD):
    """Shorter side to `val_resize`, the central square of `img_size`, normalised: PIL image -> (3, S, S) float32."""
    return v2.Compose([NotTooLong(), v2.Resize(val_resize), v2.CenterCrop(img_size), v2.ToImage(),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def train_transform(args):
    """The recipe's augmentation of single images; mixup and cutmix work on batches and come later."""
    steps = []
    if args.crop_scale < 1:
        steps += [v2.RandomResizedCrop(args.img_size, scale=(args.crop_scale, 1))]
    else:
        steps += [NotTooLong(), v2.Resize(args.val_resize), v2.CenterCrop(args.img_size)]
    steps += [v2.RandomHorizontalFlip(args.flip)]
    if args.randaug[0] > 0:
        steps += [v2.RandAugment(args.randaug[0], args.randaug[1])]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    if args.erasing > 0:
        steps += [v2.RandomErasing(args.erasing, value="random")]
    return v2.Compose(steps)


def batch_transform(args, num_classes):
    """Mixup and cutmix, one of the two at even odds for each step: images, labels, the step -> images, soft labels.

    What is chosen depends on the seed and the step alone, and images are mixed in the pairs that `training_batches`
    keeps together, so that the number of processes and micro-batches makes no difference.
    """
    choices = [make(alpha=alpha) for make, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha > 0]
    choice = v2.RandomChoice(choices) if choices else None

    def mix(images, labels, *step):
        if choice is None:
            return images, labels
        soft = F.one_hot(labels, num_classes).float()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random_seed(args.seed, "mix", *step))
            # torchvision mixes each image of a batch with the one before: here two, each of many images' channels
            mixed = choice(images.reshape(2, -1, *images.shape[2:]), soft.view(2, -1))
        return mixed[0].view(images.shape), mixed[1].view(soft.shape)
    return mix


class Seeded(Dataset):
    """`data` with a transform whose every random choice depends on (seed, epoch, index) alone.

    The transform gets all that an item holds, as torchvision's v2 transforms do, which leave a label as it is.
    """

    def __init__(self, data, transform, seed=0, epoch=0):
        self.data, self.transform, self.seed, self.epoch = data, transform, seed, epoch

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random_seed(self.seed, self.epoch, index))
            return self.transform(*self.data[index])


def training_batches(length, batch_size, accum, processes, seed, epoch, first_step=0):
    """One process's batches of an epoch, as lists of indices: `accum` micro-batches for each optimizer step.

    The images of a step are the same for any number of processes and micro-batches. Where a micro-batch has an even
    number of them, so are the pairs of the k-th image of its first half and the k-th of its second. What is left at
    the end of an epoch, less than a batch, is not used in it.
    """
    generator = torch.Generator().manual_seed(random_seed(seed, "order", epoch))
    steps = length // batch_size
    order = torch.randperm(length, generator=generator)[:steps * batch_size]
    halves = 2 if batch_size // (accum * processes.count) % 2 == 0 else 1
    # axes: step, half of a micro-batch, micro-batch, image, process
    mine = order.view(steps, halves, accum, -1, processes.count)[first_step:, :, :, :, processes.rank]
    return mine.transpose(1, 2).flatten(2).flatten(0, 1).tolist()


def evaluation_batches(length, batch_size, processes):
    """One process's share of a data set, as lists of indices: each item once, over all the processes."""
    mine = list(range(processes.rank, length, processes.count))
    return [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]


def make_loader(data, batches, workers, device):
    return DataLoader(data, batch_sampler=batches, num_workers=min(workers, len(batches)),
                      worker_init_fn=_start_worker, pin_memory=device.type == "cuda")


def _start_worker(_):
    # Ctrl-C, or a scheduler's SIGTERM, reaches the workers too. The main process needs them until it has saved, and
    # then ends them; should it not, they end themselves a minute later.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------

# gloo's threads take Python's lock to let go of a tensor. Whoever forks at that moment, as for a worker that loads
# images, gets a child that waits for ever for a lock of CPython's (before 3.12) that nobody holds; whoever then leaves
# the group waits with the lock for the thread (PyTorch 2.6). They are given the time first, in seconds.
GLOO_SETTLES = 0.05


def start_processes(device):
    """Join the other processes if torchrun started several. -> rank, count, device."""
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if device.index is not None and count > 1:
            raise UserError(f"--device {device}: {count} processes cannot share a GPU; --device cuda gives one to each")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: GPU {index} was asked for and torch sees {torch.cuda.device_count()} "
                            f"(one process per GPU; --device cpu works without)")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # tf32
    elif device.type != "cpu":
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if count > 1 and not dist.is_initialized():
        patience = timedelta(minutes=30)
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=fresh_part(store, rank, count),
                                rank=rank, world_size=count, timeout=patience)
        if device.type != "cuda" and hasattr(os, "register_at_fork"):
            os.register_at_fork(before=lambda: time.sleep(GLOO_SETTLES))
    return types.SimpleNamespace(rank=rank, count=count, device=device)


def fresh_part(store, rank, count):
    """A part of `store` that these `count` processes share and nobody has written to.

    When a process has died, torchrun ends the others, starts all anew and gives them the same store. To connect by the
    addresses that the dead have left in it is refused or never ends (pytorch/pytorch#135712), and torchrun's count of
    restarts differs from host to host. So rank 0 makes up a name for the part and tells it the others: each asks under
    a random word, and only the answer to its own word is for it. Rank 0 may read a dead process's word at first, and
    so reads and answers again until it has been heard.
    """
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"word of {rank}", word)
        name = store.get(f"answer to {word}").decode()
        store.set(f"{name} heard by {rank}", "")
    else:
        name, deaf = uuid.uuid4().hex, range(1, count)
        while deaf:
            for other in deaf:
                store.set("answer to " + store.get(f"word of {other}").decode(), name)
            time.sleep(0.02)
            deaf = [other for other in deaf if not store.check([f"{name} heard by {other}"])]
    return dist.PrefixStore(name, store)


def speaker(processes):
    """`print` for the first process, silence for the others."""
    def say(*words):
        try:
            if processes.rank == 0:
                print(*words, flush=True)
        except OSError:  # the terminal, or the program that reads this, is gone: the run goes on without
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return say


def all_sum(numbers, device):
    """The sum over all processes of a list of numbers, as a list of floats."""
    if not dist.is_initialized():
        return [float(number) for number in numbers]
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def parallel_model(model, processes):
    """`model` for the training loop: with several processes its gradients are averaged over them."""
    if processes.count == 1:
        return model
    gpu = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=gpu, gradient_as_bucket_view=True)


def compile_parts(model, say):
    """torch.compile, in place, the parts of which the model has many. Blocks of one shape share their code, so that
    compiling takes a minute, where the whole model would take several. The code is for training alone: validation may
    have images of any size."""
    torch._dynamo.config.cache_size_limit = 64  # with --drop-path every block has code of its own
    kinds = visiongru.Stem, visiongru.Block, visiongru.Downsample, visiongru.UPerHead, visiongru.FCNHead
    parts = [part for part in model.modules() if isinstance(part, kinds)]
    for part in parts:
        part.compile(dynamic=False)
    say(f"--compile: {len(parts)} parts, those of one shape together, are compiled in the first step; this can take a "
        f"minute or two")


def precision(amp, device):
    """--amp -> the autocast type or None, and a GradScaler (that does nothing unless the type is fp16)."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) \
            else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return dtype, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def autocast(dtype, device):
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


class StopSignal:
    """One of STOP_SIGNALS: the loop finishes its step, saves and leaves. Twice: at once."""

    def __init__(self):
        self.number, self.since = 0, 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self)

    def __call__(self, number, frame):
        # Soon after the first it is the same one by another way: torchrun passes on what the terminal has sent to its
        # processes too, and coreutils' timeout sends it to the process and then to its group.
        soon = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.1
        if not self.number:
            self.number, self.since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, b"\nstopping after this step; once more stops at once\n")  # print is not for handlers
        elif time.monotonic() - self.since > soon:
            end_at_once(128 + number)


def end_at_once(status):
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and the log
# ---------------------------------------------------------------------------------------------------------------------

def write_whole(path, write):
    """Have `write(file)` fill a temporary file, flush it to the disk, rename it: at any moment `path` is whole.

    Raises:
        UserError: the disk is full, say. What was at `path` is there as before, and the temporary file is not.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save's own says nothing of it
        if isinstance(cause, OSError):
            raise UserError(f"cannot write {path}: {cause.strerror or cause}"
                            + ("; the one written before is still there" if path.exists() else "")) from None
        raise
    if os.name == "posix":  # the rename is on the disk when its folder is
        with contextlib.suppress(OSError):  # not all file systems can do it
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def save_checkpoint(checkpoint, path):
    write_whole(path, lambda file: torch.save(checkpoint, file))


def make_folder(path):
    """The folder --out, made if need be. A UserError if nothing can be written there: sooner than after an epoch."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot write in this folder: {error.strerror}") from None


def load_checkpoint(path):
    """What a checkpoint file holds, a dict; a UserError where there is none. No code in it is run."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the check sums
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged:
                raise ValueError(f"the check sum of {damaged} in it is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot open the checkpoint {path}: {error.strerror or error}") from None
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint, or a damaged one: {visiongru.why_unread(error)}") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}; expected a checkpoint or a state dict")
    return checkpoint


def fill_model(model, weights, name, say=print):
    """visiongru.load_weights with its warning said by `say` and its error made a UserError."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            visiongru.load_weights(model, weights)
        except ValueError as error:
            size = weights["settings"].get("model") if isinstance(weights.get("settings"), dict) else None
            message = str(error).replace("the state dict", str(name)).replace(
                "load_weights(model.backbone, ...)", "--backbone-weights")
            raise UserError(f"{name} is of --model {size}. {message}" if size in MODELS else message) from None
    for warning in caught:
        say(str(warning.message).replace("the state dict", str(name)))


def open_run(args, processes):
    """The run's folder, made if need be, and the checkpoint to go on from or None. Never begins over an earlier run."""
    out = Path(args.out)
    last = out / "last.pt"
    resume = last if args.resume == "auto" else args.resume and Path(args.resume)
    if resume == last and not last.exists():
        if args.resume != "auto":
            raise UserError(f"--resume {args.resume}: no such file")
        resume = None
    if all_sum([resume is not None], processes.device)[0] not in (0, processes.count):
        raise UserError(f"some processes see {last} and some do not: --out must be a folder that all nodes share")
    checkpoint = load_checkpoint(resume) if resume else None
    if checkpoint is not None and not {"optimizer", "args"} <= checkpoint.keys():
        raise UserError(f"--resume {resume}: this file has weights only and cannot be resumed; "
                        f"resume a last.pt, or start from the weights with --weights")
    if checkpoint is not None:
        mark = random_seed(checkpoint.get("epoch"), checkpoint.get("step"), checkpoint["args"]) % 2**40
        if all_sum([mark], processes.device)[0] != mark * processes.count:
            raise UserError(f"the processes read different checkpoints in {resume}: --out must be a folder that all "
                            f"nodes share")
    for earlier in last, out / "best.pt", out / "log.jsonl":
        if resume != last and earlier.exists():
            raise UserError(f"{earlier} is there from an earlier run: "
                            + ("--resume auto goes on with it, " if earlier == last else "")
                            + "another --out begins a new one")
    if processes.rank == 0:
        make_folder(out)
        for name in "last.pt", "best.pt", "log.jsonl":  # of a run that was killed while it wrote
            (out / f"{name}.tmp").unlink(missing_ok=True)
    return out, checkpoint


def check_resumed(checkpoint, classes, train_images, args, say=print):
    """A run goes on with the data, the model, the order of images and the optimizer it has; of other changes the user
    hears."""
    check_classes(checkpoint, classes, Path(args.out, "last.pt") if args.resume == "auto" else args.resume)
    before = checkpoint["settings"]["train_images"]
    if before != train_images:
        raise UserError(f"--resume: the run was started on {before} training images and there are now {train_images}; "
                        f"to go on with other data, begin a new run with --weights (instead of a picture that cannot "
                        f"be read put another under its name)")
    machine = {"data", "out", "resume", "weights", "backbone_weights", "device", "workers", "save_every", "compile",
               "checkpoint", "accum"}
    for name, before in checkpoint["args"].items():
        now = getattr(args, name, before)
        if now == before or name in machine:
            continue
        change = f"--{name.replace('_', '-')} was {before} and is now {now}"
        if name in ("model", "channels", "aux_channels", "zero_is_ignore", "ignore_label", "batch_size", "seed", "lr",
                    "betas", "weight_decay"):
            raise UserError(f"--resume: {change}; go on with the value it was started with")
        say(f"note: {change}")


@contextlib.contextmanager
def must_fit(args):
    """Around what is taken from the checkpoint --resume: a UserError if something is missing or of another shape."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).strip()
        raise UserError(f"--resume {args.resume}: this checkpoint does not fit: {reason}") from None


def restore(checkpoint, optimizer, scheduler, scaler):
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    if checkpoint["scaler"] and scaler.is_enabled():  # empty unless the run was in fp16
        scaler.load_state_dict(checkpoint["scaler"])


def check_finite(model, where, out):
    """A UserError if the weights are lost, so that they are not saved over the last good ones."""
    if not all(t.isfinite().all() for t in model.state_dict().values()):
        raise UserError(f"the weights are no longer finite after {where}; {advice(out)}")


def check_loss(loss, where, lr, out):
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at {where}, learning rate {lr:.3g}; {advice(out)}")


def advice(out):
    last = out / "last.pt"
    return (f"{last} was not written over. A lower --lr, a longer --warmup or another --amp may help, in a new run: "
            f"another --out, and --weights {last} to start from the last weights saved")


def check_division(args, processes):
    """-> images in one process's micro-batch."""
    parts = processes.count * args.accum
    if args.batch_size % parts:
        raise UserError(f"--batch-size {args.batch_size} does not divide by {processes.count} processes x --accum "
                        f"{args.accum}; expected a multiple of {parts}")
    return args.batch_size // parts


def append_log(path, entry, keep):
    """Add one line to log.jsonl. `keep` says which of the lines of a resumed run still hold; the others go."""
    try:
        lines = [line for line in path.read_text().splitlines() if keep(json.loads(line))] if path.exists() else []
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} has a line that is not of this log; move it away to go on") from None
    write_whole(path, lambda file: file.write("".join(line + "\n" for line in [*lines, json.dumps(entry)]).encode()))


# ---------------------------------------------------------------------------------------------------------------------
# The training loop
# ---------------------------------------------------------------------------------------------------------------------

def warmup_cosine(step, steps, warmup):
    """The learning rate at `step` of `steps`, its peak being 1: linear from 0 over `warmup` steps, then cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimizer_steps(loader, loss_of, network, optimizer, scheduler, scaler, dtype, args, processes, stop, step, steps,
                    epoch=None):
    """Both scripts' inner loop: from micro-batches (images, targets), args.accum of them for each step, to a trained
    network.

    Args:
        loss_of: images, targets -> the loss of a micro-batch; called under autocast to `dtype`.
        step, steps: the number of the first step, and how many there are in the epoch, or in all.
        epoch: the number of the epoch, where steps are counted within one.
    Yields:
        after each step its loss, a mean over all processes; images per second; whether a process was told to stop.
    Raises:
        UserError: the loss is not finite; no step has been taken with it.
    """
    device, out, began, first = processes.device, Path(args.out), time.perf_counter(), step
    said, say = began, speaker(processes)
    bar = tqdm(total=steps, initial=step, desc=None if epoch is None else f"epoch {epoch + 1}/{args.epochs}",
               unit="step", leave=False, dynamic_ncols=True, disable=None if processes.rank == 0 else True)
    for number, (images, targets) in enumerate(loader):
        micro = number % args.accum
        if micro == 0:
            # All that is random in a step comes from its number, so that a resumed run has nothing to restore.
            place = (step,) if epoch is None else (epoch, step)
            torch.manual_seed(random_seed(args.seed, "step", *place, processes.rank))
            loss_here = 0.0
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        complete = micro == args.accum - 1  # gradients are exchanged once for all micro-batches
        with contextlib.nullcontext() if complete or processes.count == 1 else network.no_sync():
            with autocast(dtype, device):
                loss = loss_of(images, targets) / args.accum
            scaler.scale(loss).backward()
        loss_here += loss.item()
        if not complete:
            continue
        lr = scheduler.get_last_lr()[0]
        loss_here, stopping = all_sum([loss_here / processes.count, stop.number], device)
        where = f"step {step + 1} of {steps}" if epoch is None else f"epoch {epoch + 1}, step {step + 1} of {steps}"
        check_loss(loss_here, where, lr, out)
        scaler.step(optimizer)
        scaler.update()
        if scaler.is_enabled() and scaler.get_scale() < 1e-6:  # so often halved: no step would ever be taken again
            raise UserError(f"the gradients are no longer finite at {where}, at any scale of the loss; {advice(out)}")
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        step += 1
        rate = (step - first) * args.batch_size / (time.perf_counter() - began)
        bar.update()
        progress = f"loss {loss_here:.3f}, lr {lr:.2e}, {rate:,.1f} images/s"
        bar.set_postfix_str(progress, refresh=False)
        if bar.disable and time.perf_counter() - said > 60:  # not a terminal: a line a minute
            said = time.perf_counter()
            say(f"{where}: {progress}")
        if stopping:
            bar.close()
        yield loss_here, rate, stopping
    bar.close()


def train(args, processes):
    """Train as `args` say. -> the exit status: 0, or 128 + the signal's number when one ended the run early."""
    device, main, say = processes.device, processes.rank == 0, speaker(processes)

    # Data and the run's folder. All that can be wrong with them is found before anything is built or written.
    train_data, val_data = open_data(args)
    classes = train_data.classes
    steps_per_epoch = len(train_data) // args.batch_size
    micro_batch = check_division(args, processes)
    if steps_per_epoch == 0:
        raise UserError(f"{len(train_data)} training images are fewer than one --batch-size of {args.batch_size}; "
                        f"give a smaller one")
    if (args.mixup or args.cutmix) and micro_batch % 2:
        raise UserError(f"--mixup and --cutmix mix images in pairs, and a micro-batch has {micro_batch}; expected a "
                        f"--batch-size that is a multiple of {2 * processes.count * args.accum}, or --mixup 0 --cutmix "
                        f"0")
    out, checkpoint = open_run(args, processes)
    settings = {"model": args.model, "img_size": args.img_size, "val_resize": args.val_resize,
                "mean": list(MEAN), "std": list(STD), "classes": classes, "train_images": len(train_data)}
    if checkpoint:
        with must_fit(args):
            check_resumed(checkpoint, classes, len(train_data), args, say)

    # Model, average, optimizer, schedule.
    torch.manual_seed(args.seed)
    model = MODELS[args.model](num_classes=len(classes), drop_path=args.drop_path, checkpoint=args.checkpoint)
    if args.weights and not checkpoint:
        fill_model(model, load_checkpoint(args.weights), args.weights, say)
    model.to(device, memory_format=torch.channels_last)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=tuple(args.betas), fused=True,
                                  weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(
        step, args.epochs * steps_per_epoch, args.warmup * steps_per_epoch))
    dtype, scaler = precision(args.amp, device)
    epoch, step, loss_sum, best, better = 0, 0, 0.0, -1.0, "model"  # `step` within the epoch
    if checkpoint:
        with must_fit(args):
            model.load_state_dict(checkpoint["model"])
            if ema:
                ema.module.load_state_dict(checkpoint["ema"] or checkpoint["model"])
                ema.n_averaged.fill_(checkpoint["averaged"])
            restore(checkpoint, optimizer, scheduler, scaler)
            epoch, step, loss_sum, best, better = (checkpoint[name] for name in (
                "epoch", "step", "loss_sum", "best", "better"))
        if not ema:
            better = "model"
        if not (out / "best.pt").exists():  # resumed into another folder
            best = -1.0
    if args.compile:
        compile_parts(model, say)
    network = parallel_model(model, processes)
    mix = batch_transform(args, len(classes))
    transform = train_transform(args)
    val_loader = make_loader(
        Seeded(val_data, eval_transform(args.img_size, args.val_resize)),
        evaluation_batches(len(val_data), micro_batch, processes),
        args.workers, device)

    def loss_of(images, labels):
        images, labels = mix(images, labels, epoch, step)
        images = images.contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(network(images), labels, label_smoothing=args.smoothing)

    def save(name, **more):
        if main:
            save_checkpoint({"model": model.state_dict(), "ema": ema.module.state_dict() if ema else None,
                             "settings": settings, "args": vars(args), "epoch": epoch, "step": step, "best": best,
                             "better": better, **more}, out / name)

    def save_last():
        check_finite(model, f"epoch {epoch + 1}, step {step}", out)
        save("last.pt", optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), scaler=scaler.state_dict(),
             averaged=int(ema.n_averaged) if ema else 0, loss_sum=loss_sum)

    say(f"VisionGRU-{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(classes)} classes; "
        f"{len(train_data):,} training and {len(val_data):,} validation images at {args.img_size} px")
    say(f"{args.epochs} epochs of {steps_per_epoch} steps of {args.batch_size} images on {processes.count} x {device}, "
        f"{dtype or ('tf32' if device.type == 'cuda' else 'float32')}; in {out}")
    if checkpoint:
        say(f"resumed at epoch {epoch + 1}, step {step}")
    checkpoint = None  # as large as model, average and optimizer
    stop = StopSignal()

    def leave():
        all_sum([0], device)  # nobody ends, for torchrun then ends the others, before the first process has saved
        say(f"stopped by a signal in epoch {epoch + 1}, after step {step}, and saved: the same command with --resume "
            f"auto goes on")
        return 128 + (stop.number or signal.SIGTERM)

    for epoch in range(epoch, args.epochs):
        batches = training_batches(len(train_data), args.batch_size, args.accum, processes, args.seed, epoch, step)
        loader = make_loader(Seeded(train_data, transform, args.seed, epoch), batches, args.workers, device)
        network.train()
        began, rate = time.perf_counter(), 0.0
        for loss, rate, stopping in optimizer_steps(loader, loss_of, network, optimizer, scheduler, scaler, dtype, args,
                                                    processes, stop, step, steps_per_epoch, epoch):
            if ema:
                ema.update_parameters(model)
            step += 1
            loss_sum += loss
            if stopping:
                save_last()
                return leave()
            if args.save_every and step % args.save_every == 0 and step < steps_per_epoch:
                save_last()
        save_last()  # validation takes a while, and a resumed run begins with it

        scores = {"model": evaluate(model, val_loader, device, dtype, stop)}
        if ema and scores["model"]:
            scores["ema"] = evaluate(ema.module, val_loader, device, dtype, stop)
        if None in scores.values():
            return leave()
        better = max(scores, key=lambda name: scores[name]["top1"])
        lr = scheduler.get_last_lr()[0]
        entry = {"epoch": epoch + 1, "loss": loss_sum / steps_per_epoch, "lr": lr, **scores["model"],
                 **{f"ema_{name}": value for name, value in scores.get("ema", {}).items()},
                 "images_per_s": rate, "seconds": time.perf_counter() - began}
        say(f"epoch {epoch + 1:3d}/{args.epochs}  loss {entry['loss']:.4f}  lr {lr:.2e}  " + "  ".join(
            f"{name}: top-1 {s['top1']:.2f} top-5 {s['top5']:.2f}" for name, s in scores.items())
            + f"  {rate:,.0f} images/s  {entry['seconds']:.0f} s")
        if main:
            append_log(out / "log.jsonl", entry, keep=lambda old: old["epoch"] <= epoch)
        is_best, best = scores[better]["top1"] > best, max(best, scores[better]["top1"])
        epoch, step, loss_sum = epoch + 1, 0, 0.0  # where a resumed run begins
        if is_best:
            save("best.pt")
        save_last()
        if all_sum([stop.number], device)[0] and epoch < args.epochs:
            return leave()

    say(f"done: {out / 'best.pt'} has top-1 {best:.2f} %. To evaluate it:\n  python train.py --eval --weights "
        f"{out / 'best.pt'}" + (f" --data {args.data}" if args.data else ""))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and prediction
# ---------------------------------------------------------------------------------------------------------------------

@torch.compiler.set_stance("force_eager")
@torch.inference_mode()
def evaluate(model, loader, device, dtype=None, stop=None):
    """Exact over all processes: loss, and the shares of images, in percent, whose class is the first, or one of the
    first five, of the model's. With fewer than five classes top-5 is 100. None if the StopSignal `stop` came first."""
    model.eval()
    loss = top1 = top5 = count = 0
    for images, labels in loader:
        if stop and stop.number:
            break
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with autocast(dtype, device):
            logits = model(images)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        top1, top5, count = top1 + hits[:, 0].sum().item(), top5 + hits.sum().item(), count + len(labels)
    loss, top1, top5, count, stopped = all_sum([loss, top1, top5, count, stop.number if stop else 0], device)
    return None if stopped else {"val_loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def check_classes(checkpoint, classes, name):
    """The checkpoint's classes must be the data's."""
    known = checkpoint.get("settings", {}).get("classes", classes)
    if len(known) != len(classes):
        raise UserError(f"{name} was trained on {len(known)} classes and the data has {len(classes)}; "
                        f"to fine-tune on other classes, train with --weights {name}")
    if known != classes:
        ours, theirs = next(pair for pair in zip(known, classes) if pair[0] != pair[1])
        raise UserError(f"{name} was trained on other classes than the data's: {ours!r} where the data has {theirs!r}")


def settings_in(checkpoint, name, defaults):
    """A checkpoint's settings, with `defaults` for those that it lacks, as a bare state dict lacks all."""
    settings = checkpoint.get("settings", {})
    if not isinstance(settings, dict):
        raise UserError(f"{name} has no settings of a model; expected a checkpoint of this script, or a state dict")
    settings = defaults | settings
    if settings["model"] not in MODELS:
        raise UserError(f"{name} has a model called {settings['model']!r}; expected one of {', '.join(MODELS)}")
    return settings


def model_from_checkpoint(args):
    """The checkpoint --weights: its model, preprocessing, class names (None in a bare state dict) and contents."""
    if not args.weights:
        raise UserError("--eval and --predict need a checkpoint: --weights FILE")
    checkpoint = load_checkpoint(args.weights)
    settings = settings_in(checkpoint, args.weights, {"model": args.model, "img_size": 224, "val_resize": 256,
                                                      "mean": MEAN, "std": STD, "classes": None})
    try:
        weights = visiongru.named_weights(checkpoint, args.weights)
    except ValueError as error:
        raise UserError(str(error)) from None
    if "head.weight" not in weights:
        raise UserError(f"{args.weights} has no classifier")
    model = MODELS[settings["model"]](num_classes=len(weights["head.weight"]))
    fill_model(model, checkpoint, args.weights)
    img_size = args.img_size or settings["img_size"]  # one asked for, or the one it was trained at
    val_resize = args.val_resize or round(img_size * settings["val_resize"] / settings["img_size"])
    if val_resize < img_size:
        raise UserError(f"--val-resize {val_resize}: expected at least --img-size, {img_size}")
    transform = eval_transform(img_size, val_resize, settings["mean"], settings["std"])
    return model, transform, settings["classes"], checkpoint


def evaluate_checkpoint(args, processes):
    model, transform, classes, checkpoint = model_from_checkpoint(args)
    data, = open_data(args, ["val"])
    check_classes(checkpoint, data.classes, args.weights)
    if model.num_classes != len(data.classes):
        raise UserError(f"{args.weights} has {model.num_classes} classes and the data has {len(data.classes)}")
    batch_size = max(1, args.batch_size // (processes.count * args.accum))
    loader = make_loader(Seeded(data, transform), evaluation_batches(len(data), batch_size, processes),
                         args.workers, processes.device)
    model.to(processes.device, memory_format=torch.channels_last)
    scores = evaluate(model, tqdm(loader, unit="batch", leave=False, disable=None if processes.rank == 0 else True),
                      processes.device, precision(args.amp, processes.device)[0])
    if processes.rank == 0:
        print(f"{args.weights}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %, loss "
              f"{scores['val_loss']:.4f} on {len(data):,} images")
    return 0


@torch.inference_mode()
def predict(args, processes):
    """Print the top-5 classes of images. One that cannot be read is reported, and the others done all the same."""
    model, transform, classes, _ = model_from_checkpoint(args)
    model.to(processes.device, memory_format=torch.channels_last).eval()
    dtype, _ = precision(args.amp, processes.device)
    unread = 0
    for path in args.predict[processes.rank::processes.count]:
        try:
            image = transform(read_image(path))[None].to(processes.device)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            unread += 1
            continue
        with autocast(dtype, processes.device):
            probabilities = model(image).float().softmax(dim=1)[0]
        print(path)
        for p, k in zip(*(t.tolist() for t in probabilities.topk(min(5, len(probabilities))))):
            print(f"  {100 * p:6.2f} %  {classes[k] if classes else f'class {k}'}")
    return 2 if unread else 0


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

# DeiT's recipe, as the paper uses it, and what suits the built-in set: few epochs, and no augmentation that cuts off
# the shapes.
RECIPE = dict(model="tiny", img_size=224, epochs=300, batch_size=1024, crop_scale=0.08, randaug=[2, 9], erasing=0.25,
              mixup=0.8, cutmix=1.0, smoothing=0.1, weight_decay=0.05, ema=0.9999)
BUILT_IN = dict(model="nano", img_size=48, epochs=4, batch_size=32, lr=1e-3, warmup=1, crop_scale=1.0, randaug=[0, 0],
                erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0, weight_decay=0.05, ema=0.99)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def default(name):
        return f"({RECIPE[name]}; built-in set: {BUILT_IN[name]})".replace("[", "").replace("]", "").replace(",", "")

    group = parser.add_argument_group("what to do (default: train)").add_mutually_exclusive_group()
    group.add_argument("--eval", action="store_true", help="validate the checkpoint --weights")
    group.add_argument("--predict", nargs="+", metavar="IMAGE", help="print the top-5 classes of image files")
    group = parser.add_argument_group("data and model")
    group.add_argument("--data", metavar="DIR", help="DIR/{train,val}/<class>/<images>; without it: the built-in set")
    group.add_argument("--model", choices=MODELS, help=default("model"))
    group.add_argument("--img-size", type=int, metavar="PX", help=default("img_size"))
    group.add_argument("--val-resize", type=int, metavar="PX",
                       help="shorter side before the central crop, for validation (img-size x 256/224; built-in set: "
                            "img-size)")
    group.add_argument("--weights", metavar="FILE", help="start from these weights: ours or the authors'")
    group = parser.add_argument_group("recipe")
    group.add_argument("--epochs", type=int, help=default("epochs"))
    group.add_argument("--batch-size", type=int, metavar="N",
                       help="images per optimizer step over all processes " + default("batch_size"))
    group.add_argument("--lr", type=float, help="peak learning rate (1e-3 x batch-size / 1024; built-in set: "
                                                f"{BUILT_IN['lr']})")
    group.add_argument("--weight-decay", type=float, help="on every parameter " + default("weight_decay"))
    group.add_argument("--warmup", type=float, metavar="EPOCHS", help="(epochs / 15; built-in set: "
                                                                      f"{BUILT_IN['warmup']})")
    group.add_argument("--crop-scale", type=float, metavar="S",
                       help="least share of an image that a random crop takes; 1: no random crop "
                            + default("crop_scale"))
    group.add_argument("--randaug", type=int, nargs=2, metavar=("OPS", "MAGNITUDE"), help=default("randaug"))
    group.add_argument("--erasing", type=float, metavar="P", help="random erasing " + default("erasing"))
    group.add_argument("--mixup", type=float, metavar="ALPHA", help=default("mixup"))
    group.add_argument("--cutmix", type=float, metavar="ALPHA", help=default("cutmix"))
    group.add_argument("--smoothing", type=float, help="of the labels " + default("smoothing"))
    group.add_argument("--ema", type=float, metavar="DECAY", help="moving average of the weights; 0: none "
                                                                  + default("ema"))
    add_common_arguments(parser, group)
    return parser


def add_common_arguments(parser, group):
    """What both scripts take: the end of the recipe, into `group`, and the machine and the run."""
    group.add_argument("--accum", type=int, default=1, metavar="N", help="micro-batches per optimizer step (1)")
    group.add_argument("--betas", type=float, nargs=2, default=[0.9, 0.999], help="of AdamW (0.9 0.999)")
    group.add_argument("--drop-path", type=float, default=0.0, metavar="P", help="stochastic depth (0)")
    group.add_argument("--flip", type=float, default=0.5, metavar="P", help="horizontal flips (0.5)")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    group.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                       help="auto: bf16 on a GPU that has it, else off")
    group.add_argument("--compile", action="store_true", help="torch.compile the parts of the model for training; a minute more to start")
    group.add_argument("--checkpoint", action="store_true",
                       help="activation checkpointing: less memory for more time, the same result")
    group.add_argument("--workers", type=int, default=None, metavar="N",
                       help="processes that load images, for each training process (its share of the cores, at most "
                            "8; built-in set: 0)")
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="DIR",
                       help="for log.jsonl, last.pt and best.pt (runs/DATA-MODEL; segmentation: "
                            "runs/DATA-upernet-MODEL, and for predictions: predictions)")
    group.add_argument("--resume", metavar="auto|FILE", help="auto: go on from OUT/last.pt if it is there")
    group.add_argument("--save-every", type=int, default=0, metavar="STEPS",
                       help="save last.pt between validations too")


def parse_arguments(argv=None):
    parser = build_parser()
    given = parser.parse_args(argv)
    parser.set_defaults(**(BUILT_IN if given.data is None else RECIPE))
    args = parser.parse_args(argv)
    if args.eval or args.predict:  # what is not given comes from the checkpoint
        args.model, args.img_size, args.val_resize = given.model or "tiny", given.img_size, given.val_resize
        args.batch_size = given.batch_size or 64
    elif args.val_resize is None:
        args.val_resize = args.img_size if args.data is None else round(args.img_size * 256 / 224)
    if args.lr is None:
        args.lr = 1e-3 * args.batch_size / 1024
    if args.warmup is None:
        args.warmup = args.epochs / 15
    if args.workers is None:
        args.workers = default_workers(args)
    if args.out is None:
        args.out = f"runs/{Path(args.data).resolve().name if args.data else 'shapes'}-{args.model}"

    check_common_arguments(args)
    check(args, ["epochs"], lambda value: value >= 1, "a whole number of at least 1")
    check(args, ("mixup", "cutmix"), lambda value: value >= 0 and math.isfinite(value), "a number of at least 0")
    check(args, ["erasing"], lambda value: 0 <= value <= 1, "a probability from 0 to 1")
    check(args, ("ema", "smoothing"), lambda value: 0 <= value < 1, "a number from 0 to below 1")
    check(args, ["crop_scale"], lambda value: 0 < value <= 1, "a share above 0, at most 1")
    check(args, ["img_size"], lambda value: value is None or 32 <= value <= MOST_PIXELS,
          f"at least 32 pixels, at most {MOST_PIXELS}")
    check(args, ["val_resize"], lambda value: value is None or (args.img_size or 32) <= value <= MOST_PIXELS,
          f"at least --img-size, at most {MOST_PIXELS}")
    check(args, ["randaug"], lambda value: value[0] >= 0 and 0 <= value[1] <= 30,
          "OPS of at least 0, MAGNITUDE from 0 to 30")
    return args


def default_workers(args):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if args.data is None else max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def check_common_arguments(args):
    check(args, ("batch_size", "accum"), lambda value: value >= 1, "a whole number of at least 1")
    check(args, ("workers", "save_every", "lr", "weight_decay", "warmup"),
          lambda value: value >= 0 and math.isfinite(value), "a number of at least 0")
    check(args, ["seed"], lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
    check(args, ["flip"], lambda value: 0 <= value <= 1, "a probability from 0 to 1")
    check(args, ["drop_path"], lambda value: 0 <= value < 1, "a number from 0 to below 1")
    check(args, ["betas"], lambda value: all(0 <= beta < 1 for beta in value), "two numbers from 0 to below 1")


def check(args, names, good, expected):
    """A UserError for an argument whose value is not `good`."""
    for name in names:
        value = getattr(args, name)
        if not good(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {expected}")


def run(act):
    """Run a script's `act()` and exit with its status; a UserError, and memory that does not suffice, are printed
    without a traceback, status 2; Ctrl-C while there is nothing to be saved is status 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = act()
        if dist.is_initialized():
            time.sleep(GLOO_SETTLES)
            dist.destroy_process_group()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:
        message = explained(error)
        below_bar = "\n" if sys.stderr.isatty() else ""  # of a progress bar that was not finished
        print(f"{below_bar}error: {message}" if message else traceback.format_exc(), file=sys.stderr)
        status = 2 if message else 1
    if dist.is_initialized():
        # The others may be in the midst of a step, waiting for this process. To leave the group in order would be to
        # wait for them; when it has ended, torchrun ends them, or starts all of them again.
        for stream in sys.stdout, sys.stderr:
            with contextlib.suppress(OSError):
                stream.flush()
        end_at_once(status)
    sys.exit(status)


def explained(error):
    """What to tell the user of an error, or None of one that nobody expected."""
    if isinstance(error, UserError):
        return str(error)
    # A process that loads images ends unasked, and its connection with it, where the system has no memory left.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, ConnectionResetError, EOFError)) \
            or any(words in str(error) for words in ("can't allocate memory", "DataLoader worker (pid")):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return (f"{reason}: out of memory? A larger --accum, --checkpoint, fewer --workers, smaller images or batches "
                f"need less")


def main(argv=None):
    args = parse_arguments(argv)
    processes = start_processes(args.device)
    return (predict if args.predict else evaluate_checkpoint if args.eval else train)(args, processes)


if __name__ == "__main__":
    run(main)
