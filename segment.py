"""Train UPerNet on VisionGRU to give every pixel a class, on ADE20K-style data or on built-in drawn scenes.

    python segment.py                                                   the built-in scenes, minutes on a laptop
    torchrun --nproc_per_node=8 segment.py --data ADEChallengeData2016 --backbone-weights tiny.pt
                                                                        the paper's recipe on eight GPUs
    python segment.py --eval --weights best.pt --data DIR               mean IoU of a checkpoint, class by class
    python segment.py --predict street.jpg --weights best.pt --out DIR  label maps and overlays of images

Data lie as in ADE20K: DIR/images/{training,validation}/NAME.jpg and DIR/annotations/{training,validation}/NAME.png,
a label map with one number per pixel. The names of the classes are the lines of DIR/classes.txt, or come from ADE20K's
objectInfo150.txt; --num-classes does without. 0 means "other" and is not learned, 1 is the first class; with
--no-zero-is-ignore 0 is the first class. --ignore-label (255) is not learned either.

What is common to both scripts, how they stop and resume and why a run depends on its seed alone, is in train.py. The
file in order: the built-in scenes; data; the score; the training loop; evaluation and prediction; arguments.
"""

import argparse
import colorsys
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

import train as common
import visiongru
from train import MEAN, MODELS, SHAPES, STD, UserError, random_seed

LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".pgm")  # for label maps: JPEG would make other labels of them
IGNORE = 255  # in the masks that the data sets below give: a pixel that is neither learned nor scored


# ---------------------------------------------------------------------------------------------------------------------
# The built-in scenes
# ---------------------------------------------------------------------------------------------------------------------

class Scenes(Dataset):
    """One to three textured shapes on a textured ground, one over the other. Drawn when asked for, never stored.

    Item i is (PIL image, mask (size, size) uint8) and depends on (split, seed, i) alone. Class 0 is the ground.
    """

    classes = ["ground", *SHAPES]

    def __init__(self, split, length, size=64, seed=0):
        self.split, self.length, self.size, self.seed = split, length, size, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(random_seed(self.seed, "scene", self.split, index))
        count = int(torch.randint(1, 4, (), generator=generator))
        shapes = torch.randint(len(SHAPES), (count,), generator=generator).tolist()
        image, mask = common.draw_scene(shapes, self.size, generator)
        return v2.functional.to_pil_image(image), mask


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

class LabelledImages(Dataset):
    """DIR/images/SPLIT and DIR/annotations/SPLIT as (PIL image, mask (H, W) uint8): class indices and IGNORE."""

    def __init__(self, root, split, classes, zero_is_ignore, ignore_label):
        self.classes, self.zero_is_ignore, self.ignore_label = classes, zero_is_ignore, ignore_label
        images = self.by_stem(Path(root, "images", split), IMG_EXTENSIONS)
        masks = self.by_stem(Path(root, "annotations", split), LOSSLESS)
        if not images:
            raise UserError(f"{Path(root, 'images', split)} has no images in it")
        missing = sorted(images.keys() - masks.keys())
        if missing:
            raise UserError(f"{images[missing[0]]} has no label map; expected "
                            f"{Path(root, 'annotations', split, missing[0] + '.png')}"
                            + (f" ({len(missing)} images have none)" if len(missing) > 1 else ""))
        self.items = [(images[stem], masks[stem]) for stem in sorted(images)]

    @staticmethod
    def by_stem(folder, extensions):
        """The files of a folder that end so, by their names without the end."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected images/{{training,validation}} and "
                            f"annotations/{{training,validation}} in --data")
        files = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in extensions and files.setdefault(path.stem, path) != path:
                raise UserError(f"{files[path.stem]} and {path.name} have the same name; which of the two is meant?")
        return files

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        image_path, mask_path = self.items[index]
        image, mask = common.read_image(image_path), self.read_mask(mask_path)
        if image.size != mask.shape[::-1]:
            raise UserError(f"{mask_path} is {mask.shape[1]} x {mask.shape[0]} pixels and its image {image_path} "
                            f"{image.width} x {image.height}; expected the same")
        return image, mask

    def read_mask(self, path):
        try:
            with Image.open(path, formats=["PNG", "BMP", "TIFF", "PPM"]) as file:  # whatever its name says
                labels = v2.functional.pil_to_tensor(file).to(torch.int64)
                mode = file.mode
        except Exception as error:
            raise UserError(f"cannot read the label map {path}: {error}") from None
        if len(labels) > 1:
            raise UserError(f"the label map {path} has {len(labels)} channels ({mode}); expected one, the number of "
                            f"each pixel's class")
        mask = labels[0] - int(self.zero_is_ignore)
        ignored = (labels[0] == self.ignore_label) | (mask < 0 if self.zero_is_ignore else False)
        wrong = ((mask < 0) | (mask >= len(self.classes))) & ~ignored
        if wrong.any():
            first, last = int(self.zero_is_ignore), len(self.classes) - 1 + self.zero_is_ignore
            raise UserError(f"the label map {path} has a pixel of label {labels[0][wrong][0]}; expected {first} to "
                            f"{last}, or {'0 or ' if self.zero_is_ignore else ''}{self.ignore_label} to ignore it "
                            f"(--num-classes, --zero-is-ignore and --ignore-label say how labels are read)")
        mask[ignored] = IGNORE
        return mask.to(torch.uint8)


def class_names(args, known=None):
    """The names of the classes of --data: from its files, or those `known` from a checkpoint, or --num-classes many."""
    root = Path(args.data)
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder")
    source = next((path for path in (root / "classes.txt", root / "objectInfo150.txt") if path.exists()), None)
    if source is None and known:
        return known
    if source is None and args.num_classes is None:
        raise UserError(f"--data {root}: how many classes are there? Give their names, one in a line, in "
                        f"{root / 'classes.txt'}, or --num-classes")
    if source is None:
        return label_names(args.num_classes, args.zero_is_ignore)
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source} as text in UTF-8: {error}") from None
    if source.name == "objectInfo150.txt":  # Idx, Ratio, Train, Val, (Stuff,) Name between tabs, after a title line
        lines = [line.split("\t")[-1].strip() for line in lines[1:]]
    if args.num_classes not in (None, len(lines)):
        raise UserError(f"--num-classes {args.num_classes}: {source} names {len(lines)}")
    if not 1 <= len(lines) < IGNORE or len(set(lines)) < len(lines):
        raise UserError(f"{source} has {len(lines)} names, {len(set(lines))} of them different; expected 1 to "
                        f"{IGNORE - 1}, all different")
    return lines


def label_names(count, zero_is_ignore):
    return [f"label {k + int(zero_is_ignore)}" for k in range(count)]


def open_data(args, splits=("training", "validation"), known=None):
    """The data sets of `splits` in that order, with the same `classes`."""
    if args.data is None:
        return [Scenes(split, {"training": 20_000, "validation": 300}[split]) for split in splits]
    classes = class_names(args, known)
    return [LabelledImages(args.data, split, classes, args.zero_is_ignore, args.ignore_label) for split in splits]


class ShorterSide(v2.Transform):
    """Resize to a shorter side between `low` and `high` pixels, by chance, and a longer one of at most 4 times that."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs):
        height, width = v2.query_size(flat_inputs)
        short = self.low + (self.high - self.low) * torch.rand(()).item()
        scale = min(short / min(height, width), 4 * short / max(height, width))
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt, params):
        return v2.functional.resize(inpt, params["size"])  # bilinear; of a Mask the nearest pixel


class TrainTransform:
    """The recipe's augmentation: PIL image, mask (H, W) -> (3, S, S) float32 normalised, (S, S) uint8.

    Resize so that the shorter side is --short-side times a number from --scale; crop --crop-size, where that is larger
    than the image with a border of the mean colour and IGNORE; flip; distort the colours.
    """

    def __init__(self, args):
        self.resize = ShorterSide(*(args.short_side * scale for scale in args.scale))
        self.crop = v2.RandomCrop(args.crop_size, pad_if_needed=True,
                                  fill={tv_tensors.Mask: IGNORE, "others": tuple(round(255 * m) for m in MEAN)})
        # Each of the four at even odds, as far as at strength 1: a factor of 1 +- strength, the hue +- strength turns.
        colours = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
        self.finish = v2.Compose([
            v2.RandomHorizontalFlip(args.flip),
            *(v2.RandomApply([v2.ColorJitter(**{name: strength * args.distort})], p=0.5)
              for name, strength in colours.items() if args.distort),
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __call__(self, image, mask):
        image, mask = self.resize(image, tv_tensors.Mask(mask))
        # A crop that is nearly all road teaches little: of ten, the first in which no class has more than 75 %, or
        # else the last.
        for _ in range(10):
            crop, crop_mask = self.crop(image, mask)
            counts = torch.bincount(crop_mask.flatten(), minlength=IGNORE)[:IGNORE]
            if 0 < counts.max() <= 0.75 * counts.sum():
                break
        crop, crop_mask = self.finish(crop, crop_mask)
        return crop.as_subclass(torch.Tensor), crop_mask.as_subclass(torch.Tensor)


def eval_transform(short_side, mean=MEAN, std=STD):
    """The whole image, resized as by `ShorterSide`, normalised. A mask beside it, a plain tensor, stays as it is."""
    return v2.Compose([ShorterSide(short_side, short_side), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(mean, std), v2.ToPureTensor()])


class Shuffled(Dataset):
    """`data` over and over, in a new order each time: item `position` of a stream without end.

    The order, and every random choice of the transform, depends on (seed, position) alone.
    """

    def __init__(self, data, transform, seed):
        self.data, self.transform, self.seed, self.epoch = data, transform, seed, None

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self.data))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(random_seed(self.seed, "order", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.data), generator=generator).tolist()
        return common.Seeded(self.data, self.transform, self.seed, epoch)[self.order[place]]


def training_batches(first_step, last_step, batch_size, accum, processes):
    """One process's micro-batches, `accum` for each step, as lists of positions: a step has the same images for any
    number of processes and micro-batches."""
    positions = torch.arange(first_step * batch_size, last_step * batch_size).view(-1, accum, batch_size // accum)
    return positions[:, :, processes.rank::processes.count].flatten(0, 1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# From the network's output to a label map and a score
# ---------------------------------------------------------------------------------------------------------------------

def class_logits(model, image, dtype=None, window=None):
    """image (1, 3, H, W) -> logits (K, H, W) float32, of the whole or, with `window`, as the mean over windows of so
    many pixels, a third of each overlapping the next."""
    height, width = image.shape[2:]
    image = F.pad(image, (0, max(0, 32 - width), 0, max(0, 32 - height)))  # what the model needs at least
    with common.autocast(dtype, image.device):
        if not window:
            return model(image)[0, :, :height, :width].float()

        def starts(length):
            last, stride = max(0, length - window), max(1, window * 2 // 3)
            return [*range(0, last, stride), last]
        total = image.new_zeros(model.num_classes, *image.shape[2:])
        count = image.new_zeros(image.shape[2:])
        for top in starts(image.shape[2]):
            for left in starts(image.shape[3]):
                part = (..., slice(top, top + window), slice(left, left + window))
                total[part] += model(image[part])[0]
                count[part] += 1
    return (total / count)[:, :height, :width]


def label_map(logits, size):
    """logits (K, h, w) -> the best class of each pixel of an image of `size`, (H, W) int64.

    The logits are enlarged one class at a time: of a large picture all of them would not fit into memory.
    """
    best, labels = torch.full(size, -torch.inf, device=logits.device), torch.zeros(size, device=logits.device).long()
    for k, channel in enumerate(logits):
        channel = visiongru.resize_to(channel[None, None], size)[0, 0]
        better = channel > best
        best, labels = torch.where(better, channel, best), labels.masked_fill_(better, k)
    return labels


@torch.compiler.set_stance("force_eager")
@torch.inference_mode()
def evaluate(model, loader, device, dtype=None, window=None, stop=None):
    """Exact over all processes: the pixels of class i that were taken for class j, (K, K), at each label map's size.
    None if the StopSignal `stop` came first."""
    model.eval()
    torch.backends.cudnn.benchmark = False  # images come in many sizes, and it would try all algorithms for each
    K = model.num_classes
    confusion = torch.zeros(K * K, dtype=torch.int64, device=device)
    for image, mask in loader:
        if stop and stop.number:
            break
        image = image.to(device, memory_format=torch.channels_last, non_blocking=True)
        mask = mask[0].to(device, non_blocking=True).long()
        predicted = label_map(class_logits(model, image, dtype, window), mask.shape)
        known = mask != IGNORE
        confusion += torch.bincount(mask[known] * K + predicted[known], minlength=K * K)
    *confusion, stopped = common.all_sum([*confusion.tolist(), stop.number if stop else 0], device)
    if stopped:
        return None
    confusion = torch.tensor(confusion, dtype=torch.float64).view(K, K)
    if confusion.sum() == 0:
        raise UserError("the validation set has no pixel with a label that is not ignored; there is nothing to score")
    return confusion


def scores(confusion):
    """Pixels of class i taken for class j, (K, K) -> percentages: IoU and accuracy of each class (nan where it does not
    occur), their means over the classes that occur, and the share of all pixels that are right.

    A class that does not occur and is predicted all the same has IoU 0 and counts in the mean, as is usual.
    """
    right, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou, accuracy = 100 * right / (labelled + predicted - right), 100 * right / labelled
    return {"miou": iou.nanmean().item(), "mean_acc": accuracy.nanmean().item(),
            "pixel_acc": (100 * right.sum() / labelled.sum()).item(), "iou": iou.tolist(), "acc": accuracy.tolist()}


def score_table(result, classes):
    """The per-class scores as lines of text."""
    width = max(5, *(len(name) for name in classes))
    lines = [f"{'class':{width}}    IoU    acc"]
    for name, iou, accuracy in zip(classes, result["iou"], result["acc"]):
        lines.append(f"{name:{width}} " + " ".join("     -" if math.isnan(x) else f"{x:6.2f}" for x in (iou, accuracy)))
    return "\n".join(lines)


def summary(result):
    return (f"mIoU {result['miou']:.2f}, mean accuracy {result['mean_acc']:.2f}, pixel accuracy "
            f"{result['pixel_acc']:.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# The training loop
# ---------------------------------------------------------------------------------------------------------------------

def warmup_linear(step, steps, warmup):
    """The learning rate at `step` of `steps`, its peak being 1: linear from 1e-6 over `warmup` steps, then to 0."""
    if step < warmup:
        return 1e-6 + (1 - 1e-6) * step / warmup
    return max(0, steps - step) / max(1, steps - warmup)


def parameter_groups(model, weight_decay):
    """For the optimizer: weight decay on everything but the norms."""
    norms = [p for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))
             for p in module.parameters()]
    ids = {id(p) for p in norms}
    return [{"params": [p for p in model.parameters() if id(p) not in ids], "weight_decay": weight_decay},
            {"params": norms, "weight_decay": 0.0}]


def segmentation_loss(outputs, masks):
    """Cross-entropy of the decoder's logits plus 0.4 times that of the auxiliary head's, both (B, K, H, W), over masks
    (B, H, W): a mean over all pixels, of which the ignored ones have loss 0, so that a crop without labels is no
    division by zero, and every pixel has the same weight in whatever micro-batch it is."""
    def cross_entropy(logits):
        return F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum") / masks.numel()
    logits, auxiliary = outputs
    return cross_entropy(logits) + 0.4 * cross_entropy(auxiliary)


def train(args, processes):
    """Train as `args` say. -> the exit status: 0, or 128 + the signal's number when one ended the run early."""
    device, main, say = processes.device, processes.rank == 0, common.speaker(processes)

    # Data and the run's folder. All that can be wrong with them is found before anything is built or written.
    train_data, val_data = open_data(args)
    classes = train_data.classes
    micro_batch = common.check_division(args, processes)
    sync_batchnorm = device.type == "cuda" and processes.count > 1
    if micro_batch == 1 and not sync_batchnorm:
        raise UserError(f"--batch-size {args.batch_size} over {processes.count} processes x --accum {args.accum} is "
                        f"one image at a time; BatchNorm needs two or more")
    out, checkpoint = common.open_run(args, processes)
    settings = {"model": args.model, "short_side": args.short_side, "crop_size": args.crop_size,
                "mean": list(MEAN), "std": list(STD), "classes": classes, "zero_is_ignore": args.zero_is_ignore,
                "ignore_label": args.ignore_label, "train_images": len(train_data)}
    if checkpoint:
        with common.must_fit(args):
            if "decode_head.conv_seg.weight" not in checkpoint["model"]:
                raise UserError(f"--resume {args.resume}: this is a classifier's run, of train.py")
            common.check_resumed(checkpoint, classes, len(train_data), args, say)

    # Model, optimizer, schedule.
    torch.manual_seed(args.seed)
    backbone = MODELS[args.model](drop_path=args.drop_path, checkpoint=args.checkpoint)
    model = visiongru.UPerNet(backbone, len(classes), args.channels, args.aux_channels)
    if args.weights and not checkpoint:
        common.fill_model(model, common.load_checkpoint(args.weights), args.weights, say)
    if args.backbone_weights and not checkpoint:
        common.fill_model(model.backbone, common.load_checkpoint(args.backbone_weights), args.backbone_weights, say)
    model.to(device, memory_format=torch.channels_last)
    if sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=tuple(args.betas),
                                  fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_linear(step, args.iters, args.warmup))
    dtype, scaler = common.precision(args.amp, device)
    step, validated, loss_sum, best = 0, 0, 0.0, -1.0
    if checkpoint:
        with common.must_fit(args):
            model.load_state_dict(checkpoint["model"])
            common.restore(checkpoint, optimizer, scheduler, scaler)
            step, validated, loss_sum, best = (checkpoint[name] for name in ("step", "validated", "loss_sum", "best"))
        if not (out / "best.pt").exists():  # resumed into another folder
            best = -1.0
    if args.compile:
        common.compile_parts(model, say)
    network = common.parallel_model(model, processes)
    stream = Shuffled(train_data, TrainTransform(args), args.seed)
    val_loader = common.make_loader(common.Seeded(val_data, eval_transform(args.short_side)),
                                    common.evaluation_batches(len(val_data), 1, processes), args.workers, device)
    window = args.crop_size if args.slide else None

    def loss_of(images, masks):
        return segmentation_loss(network(images.contiguous(memory_format=torch.channels_last)), masks.long())

    def save(name, **more):
        if main:
            common.save_checkpoint({"model": model.state_dict(), "settings": settings, "args": vars(args), "step": step,
                                    "validated": validated, "best": best, **more}, out / name)

    def save_last():
        common.check_finite(model, f"step {step}", out)
        save("last.pt", optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), scaler=scaler.state_dict(),
             loss_sum=loss_sum)

    say(f"UPerNet on VisionGRU-{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(classes)} "
        f"classes; {len(train_data):,} training images in crops of {args.crop_size} px, {len(val_data):,} validation "
        f"images" + (f"; label 0 is ignored, {classes[0]!r} is label 1" if args.zero_is_ignore else ""))
    say(f"{args.iters} steps of {args.batch_size} images on {processes.count} x {device}, "
        f"{dtype or ('tf32' if device.type == 'cuda' else 'float32')}; in {out}")
    if checkpoint:
        say(f"resumed at step {step}")
    checkpoint = None  # as large as model and optimizer
    stop = common.StopSignal()

    def leave():
        common.all_sum([0], device)  # nobody ends, for torchrun then ends the others, before the first has saved
        say(f"stopped by a signal after step {step}, and saved: the same command with --resume auto goes on")
        return 128 + (stop.number or signal.SIGTERM)

    result = None
    while validated < args.iters:
        # The step of the next validation: this one, if it is due here and the run was stopped before it was done.
        until = min(math.ceil(max(validated + 1, step) / args.eval_every) * args.eval_every, args.iters)
        batches = training_batches(step, max(step, until), args.batch_size, args.accum, processes)
        loader = common.make_loader(stream, batches, args.workers, device)
        network.train()
        torch.backends.cudnn.benchmark = True
        began, rate = time.perf_counter(), 0.0
        for loss, rate, stopping in common.optimizer_steps(loader, loss_of, network, optimizer, scheduler, scaler,
                                                           dtype, args, processes, stop, step, args.iters):
            step += 1
            loss_sum += loss
            if stopping:
                save_last()
                return leave()
            if args.save_every and step % args.save_every == 0 and step < until:
                save_last()
        save_last()  # validation takes a while, and a resumed run begins with it

        if processes.count > 1:  # each process has its own running statistics; the checkpoint's are the first one's
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        confusion = evaluate(model, val_loader, device, dtype, window, stop)
        if confusion is None:
            return leave()
        result = scores(confusion)
        lr = scheduler.get_last_lr()[0]
        loss_mean = loss_sum / (step - validated)
        say(f"step {step:6d}/{args.iters}  loss {loss_mean:.4f}  lr {lr:.2e}  {summary(result)}  {rate:,.1f} images/s  "
            f"{time.perf_counter() - began:.0f} s")
        if validated == 0 and args.zero_is_ignore and math.isnan(result["acc"][-1]):
            say(f"note: no pixel to validate on has the last label, {len(classes)}; if labels count from 0, begin "
                f"again with --no-zero-is-ignore")
        if main:
            def by_class(values):
                return {name: None if math.isnan(x) else x for name, x in zip(classes, values)}
            common.append_log(out / "log.jsonl", {
                "step": step, "loss": loss_mean, "lr": lr, **result, "iou": by_class(result["iou"]),
                "acc": by_class(result["acc"]), "images_per_s": rate, "seconds": time.perf_counter() - began},
                keep=lambda old: old["step"] < step)
        is_best, best = result["miou"] > best, max(best, result["miou"])
        validated, loss_sum = step, 0.0
        if is_best:
            save("best.pt")
        save_last()
        if common.all_sum([stop.number], device)[0] and validated < args.iters:
            return leave()

    if result:
        say(f"class by class after step {step}:\n{score_table(result, classes)}")
    say(f"done: {out / 'best.pt'} has mIoU {best:.2f}. To evaluate it:\n  python segment.py --eval --weights "
        f"{out / 'best.pt'}" + (f" --data {args.data}" if args.data else "") + (" --slide" if args.slide else ""))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and prediction
# ---------------------------------------------------------------------------------------------------------------------

def model_from_checkpoint(args):
    """The checkpoint --weights: its model, its settings (classes None in a bare state dict) and contents."""
    if not args.weights:
        raise UserError("--eval and --predict need a checkpoint: --weights FILE")
    checkpoint = common.load_checkpoint(args.weights)
    settings = common.settings_in(checkpoint, args.weights, {
        "model": args.model, "short_side": 512, "crop_size": 512, "mean": MEAN, "std": STD, "classes": None,
        "zero_is_ignore": True, "ignore_label": IGNORE})
    for name in ("short_side", "crop_size", "zero_is_ignore", "ignore_label"):  # what was asked for comes first
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
        setattr(args, name, settings[name])
    try:
        weights = visiongru.named_weights(checkpoint, args.weights)
        shapes = [weights[f"{name}.weight"].shape for name in
                  ("decode_head.conv_seg", "decode_head.bottleneck.0", "auxiliary_head.convs.0.0")]
    except ValueError as error:
        raise UserError(str(error)) from None
    except KeyError as error:
        raise UserError(f"{args.weights} has no {error.args[0]}; expected a checkpoint of segment.py") from None
    model = visiongru.UPerNet(MODELS[settings["model"]](), shapes[0][0], shapes[1][0], shapes[2][0])
    common.fill_model(model, checkpoint, args.weights)
    return model.eval(), settings, checkpoint


def evaluate_checkpoint(args, processes):
    model, settings, checkpoint = model_from_checkpoint(args)
    data, = open_data(args, ["validation"], settings["classes"] or label_names(model.num_classes, args.zero_is_ignore))
    common.check_classes(checkpoint, data.classes, args.weights)
    if model.num_classes != len(data.classes):
        raise UserError(f"{args.weights} has {model.num_classes} classes and the data has {len(data.classes)}")
    transform = eval_transform(settings["short_side"], settings["mean"], settings["std"])
    loader = common.make_loader(common.Seeded(data, transform), common.evaluation_batches(len(data), 1, processes),
                                args.workers, processes.device)
    model.to(processes.device, memory_format=torch.channels_last)
    result = scores(evaluate(model, tqdm(loader, unit="image", leave=False, disable=None if processes.rank == 0 else
                                         True), processes.device, common.precision(args.amp, processes.device)[0],
                             settings["crop_size"] if args.slide else None))
    if processes.rank == 0:
        print(score_table(result, data.classes))
        print(f"{args.weights}: {summary(result)} on {len(data):,} images")
    return 0


def palette(zero_is_ignore):
    """256 colours, three numbers each, for the labels of a map: far apart for neighbours, black for "other"."""
    colours = [colorsys.hsv_to_rgb(0.618034 * k % 1, (0.9, 0.55, 0.75)[k % 3], (1.0, 0.85, 0.6)[k // 3 % 3])
               for k in range(256)]
    colours = [(0, 0, 0)] * zero_is_ignore + colours
    return [round(255 * value) for colour in colours[:256] for value in colour]


def overlay(image, labels, names):
    """The picture under half-transparent colours of its label map (a palette image), and below it a legend.

    names: the name of each label that may occur, a dict.
    """
    blended = Image.blend(image, labels.convert("RGB"), 0.5)
    count = dict((label, pixels) for pixels, label in labels.getcolors())
    occurring = sorted(count, key=count.get, reverse=True)
    size = min(max(12, max(image.size) // 40), 48)
    font, colours = ImageFont.load_default(size), labels.getpalette()
    texts = [f"{names[label]} {100 * count[label] / image.width / image.height:.1f} %" for label in occurring]
    widths = [round(font.getlength(text)) + 2 * size for text in texts]
    # One after the other, as words in a paragraph.
    places, x, y, line = [], 0, 0, round(1.5 * size)
    for width in widths:
        if x and x + width > max(image.width, max(widths)):
            x, y = 0, y + line
        places.append((x, y))
        x += width
    page = Image.new("RGB", (max(image.width, max(widths)), image.height + y + line), "white")
    page.paste(blended)
    draw = ImageDraw.Draw(page)
    for label, text, (x, y) in zip(occurring, texts, places):
        y += image.height + size // 4
        colour = tuple(colours[3 * label:3 * label + 3])
        draw.rectangle((x + size // 4, y, x + 5 * size // 4, y + size), colour, "black")
        draw.text((x + 3 * size // 2, y + size // 2), text, "black", font, anchor="lm")
    return page


@torch.inference_mode()
def predict(args, processes):
    """For each picture OUT/NAME_labels.png, a label map in the numbers of the training masks, and OUT/NAME_overlay.png.
    A picture that cannot be read is reported, and the others done all the same."""
    model, settings, _ = model_from_checkpoint(args)
    first = int(settings["zero_is_ignore"])
    names = dict(enumerate(settings["classes"] or label_names(model.num_classes, first), start=first))
    stems = {}
    for path in map(Path, args.predict):
        if stems.setdefault(path.stem, path) != path:
            raise UserError(f"{stems[path.stem]} and {path} would be written to the same file in {args.out}; predict "
                            f"them one by one, with another --out")
    out = Path(args.out)
    common.make_folder(out)
    model.to(processes.device, memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = False
    dtype, _ = common.precision(args.amp, processes.device)
    transform = eval_transform(settings["short_side"], settings["mean"], settings["std"])
    unread = 0
    mine = list(stems.items())[processes.rank::processes.count]
    for stem, path in tqdm(mine, unit="image", leave=False, disable=None if processes.rank == 0 else True):
        try:
            image = common.read_image(path)
        except UserError as error:
            tqdm.write(f"error: {error}", file=sys.stderr)
            unread += 1
            continue
        logits = class_logits(model, transform(image)[None].to(processes.device), dtype,
                              settings["crop_size"] if args.slide else None)
        labels = label_map(logits, (image.height, image.width)) + first
        labels = v2.functional.to_pil_image(labels.to("cpu", torch.uint8)).convert("P")
        labels.putpalette(palette(first))
        try:
            labels.save(out / f"{stem}_labels.png")
            overlay(image, labels, names).save(out / f"{stem}_overlay.png")
        except OSError as error:
            raise UserError(f"cannot write the prediction for {path} to {out}: {error.strerror or error}") from None
    unread, done = common.all_sum([unread, len(mine) - unread], processes.device)
    if processes.rank == 0:
        print(f"{done:.0f} label maps (NAME_labels.png) and overlays (NAME_overlay.png) are in {out}")
    return 2 if unread else 0


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

# mmsegmentation's recipe for ADE20K, as the paper uses it, and what suits the built-in scenes.
RECIPE = dict(model="tiny", channels=512, aux_channels=256, crop_size=512, scale=[0.5, 2.0], distort=1.0, iters=160_000,
              batch_size=16, lr=6e-5, warmup=1500, eval_every=4000)
BUILT_IN = dict(model="nano", channels=64, aux_channels=32, crop_size=64, scale=[1.0, 1.0], distort=0.0, iters=2200,
                batch_size=16, lr=5e-3, warmup=200, eval_every=550)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def default(name):
        return f"({RECIPE[name]}; built-in scenes: {BUILT_IN[name]})".replace("[", "").replace("]", "").replace(",", "")

    group = parser.add_argument_group("what to do (default: train)").add_mutually_exclusive_group()
    group.add_argument("--eval", action="store_true", help="validate the checkpoint --weights")
    group.add_argument("--predict", nargs="+", metavar="IMAGE", help="write label maps and overlays of image files")
    group = parser.add_argument_group("data and model")
    group.add_argument("--data", metavar="DIR", help="DIR/{images,annotations}/{training,validation}; without it: the "
                                                     "built-in scenes")
    group.add_argument("--num-classes", type=int, metavar="K", help="(as many as the names that --data has)")
    group.add_argument("--zero-is-ignore", action=argparse.BooleanOptionalAction,
                       help="label 0 means other and is ignored, label 1 is the first class (yes)")
    group.add_argument("--ignore-label", type=int, metavar="LABEL", help="this one is ignored too (255)")
    group.add_argument("--model", choices=MODELS, help="the backbone " + default("model"))
    group.add_argument("--channels", type=int, metavar="C", help="width of the decoder " + default("channels"))
    group.add_argument("--aux-channels", type=int, metavar="C", help="width of the auxiliary head "
                                                                     + default("aux_channels"))
    group.add_argument("--backbone-weights", metavar="FILE",
                       help="start the backbone from these: of train.py, or the authors'")
    group.add_argument("--weights", metavar="FILE", help="start all of the model from these")
    group = parser.add_argument_group("recipe")
    group.add_argument("--iters", type=int, metavar="STEPS", help=default("iters"))
    group.add_argument("--batch-size", type=int, metavar="N",
                       help="images per optimizer step over all processes " + default("batch_size"))
    group.add_argument("--lr", type=float, help="peak learning rate " + default("lr"))
    group.add_argument("--weight-decay", type=float, default=0.01, help="on all parameters but the norms' (0.01)")
    group.add_argument("--warmup", type=int, metavar="STEPS", help=default("warmup"))
    group.add_argument("--short-side", type=int, metavar="PX",
                       help="images are resized to this shorter side, or less if the longer one would be more than 4 "
                            "times that (crop-size)")
    group.add_argument("--scale", type=float, nargs=2, metavar=("LOW", "HIGH"),
                       help="for training, times a number between these " + default("scale"))
    group.add_argument("--crop-size", type=int, metavar="PX",
                       help="side of the squares to train on, a multiple of 32 at best " + default("crop_size"))
    group.add_argument("--distort", type=float, metavar="S",
                       help="strength of the changes of brightness, contrast, saturation and hue; 0: none "
                            + default("distort"))
    group.add_argument("--eval-every", type=int, metavar="STEPS", help=default("eval_every"))
    group.add_argument("--slide", action="store_true",
                       help="validate and predict with overlapping windows of crop-size, not the whole image at once")
    common.add_common_arguments(parser, group)
    return parser


def parse_arguments(argv=None):
    parser = build_parser()
    given = parser.parse_args(argv)
    parser.set_defaults(**(BUILT_IN if given.data is None else RECIPE))
    args = parser.parse_args(argv)
    for name in "num_classes", "zero_is_ignore", "ignore_label":
        if getattr(given, name) is not None and (given.data is None and not given.predict):
            raise UserError(f"--{name.replace('_', '-')} says how the labels of --data are read; there is no --data")
    if args.eval or args.predict:  # what is not given comes from the checkpoint
        args.model, args.crop_size, args.short_side = given.model or "tiny", given.crop_size, given.short_side
    else:
        if args.short_side is None:
            args.short_side = args.crop_size
        if args.zero_is_ignore is None:
            args.zero_is_ignore = args.data is not None
        if args.ignore_label is None:
            args.ignore_label = IGNORE
    if args.workers is None:
        args.workers = common.default_workers(args)
    if args.out is None:
        args.out = "predictions" if args.predict else \
            f"runs/{Path(args.data).resolve().name if args.data else 'scenes'}-upernet-{args.model}"
    check = common.check
    common.check_common_arguments(args)
    check(args, ("iters", "channels", "aux_channels", "eval_every"),
          lambda value: value >= 1, "a whole number of at least 1")
    check(args, ["distort"], lambda value: 0 <= value <= 2, "a number from 0 to 2")
    check(args, ["scale"], lambda value: 0 < value[0] <= value[1] <= 16, "two numbers above 0, LOW first, at most 16")
    check(args, ("short_side", "crop_size"), lambda value: value is None or 32 <= value <= common.MOST_PIXELS,
          f"at least 32 pixels, at most {common.MOST_PIXELS}")
    check(args, ["ignore_label"], lambda value: value is None or -2**31 <= value < 2**31, "a number of 32 bits at most")
    check(args, ["num_classes"], lambda value: value is None or 1 <= value < IGNORE, f"1 to {IGNORE - 1}")
    if args.weights and args.backbone_weights:
        raise UserError("--weights and --backbone-weights: give one of the two")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    processes = common.start_processes(args.device)
    return (predict if args.predict else evaluate_checkpoint if args.eval else train)(args, processes)


if __name__ == "__main__":
    common.run(main)
