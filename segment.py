"""Train UPerNet on VisionGRU to segment images, on data laid out like ADE20K or on built-in drawn scenes.

    python segment.py                                                   the built-in scenes, minutes on a laptop
    torchrun --nproc_per_node=8 segment.py --data ADEChallengeData2016 --backbone-weights tiny.pth
                                                                        the paper's recipe on eight GPUs
    python segment.py --eval --weights best.pt --data DIR               mean IoU of a checkpoint, and of each class
    python segment.py --predict street.jpg --weights best.pt --out DIR  label maps and overlays of images

DIR must contain images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png, each a label map
with one number per pixel. The class names are the lines of DIR/classes.txt, or come from ADE20K's objectInfo150.txt;
without either file, give --num-classes. Label 0 means "other" and is ignored, label 1 is the first class; with
--no-zero-is-ignore, label 0 is the first class. --ignore-label (255) is ignored too.

By default images are resized to a shorter side of --crop-size; training also scales them randomly (--scale). For thin
structures try a larger --short-side, and --balance 0.5, which gives rare classes more weight in the loss. --slide
validates and predicts with overlapping windows of the crop size. Scores are computed over all pixels, at the size of
the label maps; mIoU is the mean over the classes that occur or are predicted. --weights best.pt starts from a
segmentation model. Because of dropout and BatchNorm, losses (but not images) depend on the number of processes.

The order is that of Part I of train.py: `train`, evaluation, prediction, data, options. The training step and the
engine (runs, checkpoints, signals, processes, errors) are imported from train.py.
"""

from __future__ import annotations

import colorsys
import contextlib
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

import train as common  # before torch, for which it sets an environment variable
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import visiongru
from train import (CHECKPOINT_DEFAULTS, FLAG, FRACTION, MEAN, MODELS, NON_NEGATIVE, NON_NEGATIVE_INT, PIXELS,
                   POSITIVE_INT, STD, TEXT, Distributed, Option, Scenes, UserError, checked, pair)

LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".pgm")  # for label maps: JPEG would change the labels
LOSSY = "jpeg", "webp"  # compressions within TIFF
# PIL's names for the pixel formats that it reads unchanged; it converts others to levels of grey.
CODINGS = "1", "L", "P", "P;1", "P;2", "P;4", "I;16", "I;16B", "I;16S", "I;16BS", "I;32N", "I;32S", "I;32BS"
# System fonts for the legends of overlays. The last one that is found is used, so those with Chinese come last.
FONTS = "DejaVuSans.ttf", "PingFang.ttc", "msyh.ttc", "NotoSansCJK-Regular.ttc"
IGNORE = 255  # in the masks of the data sets below: a pixel that is neither learned nor scored


# Training -------------------------------------------------------------------------------------------------------------

def train(args: Namespace, distributed: Distributed) -> None:
    """Train a segmentation model. The weights with the best mIoU are left in OUT/best.pt."""
    device, world_size = distributed.device, distributed.world_size

    # Data
    train_data, val_data = open_data(args, ("training", "validation"), log=distributed.print)
    classes = train_data.classes
    class_weights = balanced_weights(train_data, args.balance).to(device) if args.balance else None
    train_data.transform, val_data.transform = TrainTransform(args), eval_transform(args.short_side)
    sync_batchnorm = world_size > 1 and device.type == "cuda"
    if common.split_batch(args, world_size) == 1 and not sync_batchnorm:
        raise UserError(f"--batch-size {args.batch_size}: a micro-batch would be one image, and BatchNorm needs two")

    # Model, optimizer, learning rate
    torch.manual_seed(args.seed)
    backbone = MODELS[args.model](drop_path=args.drop_path, grad_checkpointing=args.grad_checkpointing)
    model = visiongru.UPerNet(backbone, len(classes), args.channels, args.aux_channels)
    for part, path in (model, args.weights), (model.backbone, args.backbone_weights):
        if path and not common.checkpoint_to_resume(args):  # a resumed run has weights of its own
            common.load_weights(part, common.load_checkpoint(path), path, distributed.print,
                                classes if part is model else None)
    model.to(device, memory_format=torch.channels_last)
    if sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=tuple(args.opt_betas),
                                  fused=True)
    scheduler = LambdaLR(optimizer, lambda step: warmup_linear(step, args.iters, args.warmup_iters))

    # The run: restore its state before the model is compiled and wrapped
    run = common.Run(args, distributed, (train_data, val_data), args.iters, model=model, ema=None, optimizer=optimizer,
                     scheduler=scheduler)
    run.start_or_resume()
    common.install_signal_handlers(distributed)
    if common.compiles(args, device):
        common.compile_parts(model, distributed.print)
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model
    distributed.print(f"{len(classes)} classes; {len(train_data):,} training images in crops of {args.crop_size} px, "
                      f"{len(val_data):,} validation images; {args.iters} steps of {args.batch_size} images"
                      + (f"; label 0 is ignored, {classes[0]!r} is label 1" if args.zero_is_ignore else ""))
    train_batches = iter(common.training_loader(train_data, range(run.step, args.iters), args, distributed))
    val_loader = common.validation_loader(val_data, 1, args, distributed)
    normalize = common.normalizer(device)

    def loss_fn(images: Tensor, masks: Tensor, first: int) -> Tensor:
        return segmentation_loss(ddp_model(normalize(images)), masks.long(), class_weights)

    while run.validated < args.iters:
        ddp_model.train()
        for _ in run.steps(until=min((run.validated // args.eval_every + 1) * args.eval_every, args.iters)):
            common.train_step(run, ddp_model, train_batches, loss_fn)
        run.save()  # validation may take long, and be killed
        window = args.crop_size if args.slide else 0
        confusion = evaluate(model, val_loader, distributed, normalize, run.autocast, window)
        result = scores(confusion, classes)
        if not run.log and args.zero_is_ignore and result["acc"][classes[-1]] is None:  # labels may count from 0
            distributed.print(f"note: no validation pixel has the last label, {len(classes)}; if labels count from 0, "
                              f"start again with --no-zero-is-ignore")
        run.record(result, f"step {run.step:6d}/{args.iters}  {summary(result)}", result["miou"])
    distributed.print(score_table(run.log[-1]))
    run.print_summary(__file__, f"mIoU {run.best:.2f}", ["--slide"] if args.slide else [])


def warmup_linear(step: int, total_steps: int, warmup_steps: int) -> float:
    """The learning rate as a fraction of its peak: linear from 1e-6 during warm-up, then linear to 0."""
    if step < warmup_steps:
        return 1e-6 + (1 - 1e-6) * step / warmup_steps
    return max(0, total_steps - step) / max(1, total_steps - warmup_steps)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for the optimizer, with weight decay on everything but the norms."""
    norms = [p for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))
             for p in module.parameters()]
    others = set(model.parameters()) - set(norms)
    return [{"params": [p for p in model.parameters() if p in others], "weight_decay": weight_decay},
            {"params": norms, "weight_decay": 0.0}]


def segmentation_loss(outputs: tuple[Tensor, Tensor], masks: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of the decoder's logits plus 0.4 times that of the auxiliary head's, both (B, K, H, W), for masks
    (B, H, W). It is a mean over all pixels, where ignored ones have loss 0, so a crop without labels does not divide by
    zero and a pixel counts the same in any micro-batch. class_weights: (K,)."""
    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, masks, class_weights, ignore_index=IGNORE, reduction="sum") / masks.numel()
    logits, auxiliary = outputs
    return cross_entropy(logits) + 0.4 * cross_entropy(auxiliary)


def balanced_weights(data: Dataset, balance: float) -> Tensor:
    """Class weights for the loss, (K,): the class's share of pixels ** -balance, scaled to a mean of 1 over all pixels.
    With 0.5, a class with 1 % of the pixels weighs five times as much as one with 30 %. The shares are estimated from
    250 to 500 images, evenly spaced."""
    pixels = torch.ones(len(data.classes))  # not zeros: a class may be absent from these images
    for index in range(0, len(data), -(-len(data) // 500)):
        _, mask = data[index]
        pixels += mask[mask != IGNORE].bincount(minlength=len(pixels))
    weights = pixels ** -balance
    return weights * pixels.sum() / (weights * pixels).sum()


# Evaluation -----------------------------------------------------------------------------------------------------------

@torch.compiler.set_stance("force_eager")  # --compile is for training only
@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable, distributed: Distributed, normalize: Callable,
             autocast: Callable = contextlib.nullcontext, window: int = 0) -> Tensor:
    """The confusion matrix (K, K), the number of pixels of class i that were predicted as class j, at the size of the
    label maps, exact over all processes. Raises Stopped if a process received a signal."""
    model.eval()
    K = model.num_classes
    counts = torch.zeros(K * K + 1, dtype=torch.int64, device=distributed.device)  # the last one: ignored pixels
    total = torch.zeros(K, device=distributed.device)  # of the logits, finite if they are
    for image, mask in loader:
        if distributed.stop_signal:
            break
        image, mask = (tensor.to(distributed.device, non_blocking=True) for tensor in (image, mask[0]))
        with autocast():
            logits = class_logits(model, normalize(image), window)
        total += logits.mean(dim=(1, 2))
        predicted = label_map(logits, mask.shape)
        cell = torch.where(mask == IGNORE, K * K, mask.long() * K + predicted).flatten()
        counts.scatter_add_(0, cell, torch.ones_like(cell))  # bincount would wait for the device
    totals = distributed.all_reduce([*counts[:-1].tolist(), *total.tolist()])
    distributed.raise_if_stopped()
    common.check_finite(torch.tensor(totals), "the validation images")
    confusion = torch.tensor(totals[:-K], dtype=torch.float64).view(K, K)
    if confusion.sum() == 0:
        raise UserError("all pixels of the validation set are ignored; there is nothing to score")
    return confusion


def class_logits(model: nn.Module, image: Tensor, window: int = 0) -> Tensor:
    """image (1, 3, H, W) -> logits (K, H, W) float32, of the whole image or, with `window`, as the mean over windows of
    that size, each of which overlaps the next by a third."""
    height, width = image.shape[2:]
    image = F.pad(image, (0, max(0, 32 - width), 0, max(0, 32 - height)))  # the model's minimum size
    if not window:
        return model(image)[0, :, :height, :width].float()

    def starts(length: int) -> list[int]:
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


def label_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """logits (K, h, w) -> the best class of each pixel of an image of `size`, (H, W) int64. The logits are enlarged one
    class at a time, since for a large image all of them would not fit in memory."""
    best, labels = torch.full(size, -torch.inf, device=logits.device), torch.zeros(size, device=logits.device).long()
    for k, channel in enumerate(logits):
        channel = visiongru.resize_to(channel[None, None], size)[0, 0]
        better = channel > best
        best, labels = torch.where(better, channel, best), labels.masked_fill_(better, k)
    return labels


def scores(confusion: Tensor, classes: list[str]) -> dict:
    """Confusion matrix (K, K) -> percentages: IoU and accuracy of each class (None if it does not occur), their means
    over the classes that occur, and the accuracy over all pixels. As usual, a class that does not occur but is
    predicted has IoU 0 and counts in the mean."""
    right, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou, accuracy = 100 * right / (labelled + predicted - right), 100 * right / labelled

    def by_class(values: Tensor) -> dict:
        return {name: None if math.isnan(x) else x for name, x in zip(classes, values.tolist())}
    return {"miou": iou.nanmean().item(), "mean_acc": accuracy.nanmean().item(),
            "pixel_acc": (100 * right.sum() / labelled.sum()).item(), "iou": by_class(iou), "acc": by_class(accuracy)}


def score_table(result: dict) -> str:
    """The per-class scores as lines of text."""
    width = max(5, *map(len, result["iou"]))
    lines = [f"{'class':{width}}    IoU    acc"]
    for name, iou in result["iou"].items():
        lines.append(f"{name:{width}} " + " ".join("     -" if x is None else f"{x:6.2f}"
                                                   for x in (iou, result["acc"][name])))
    return "\n".join(lines)


def summary(result: dict) -> str:
    return (f"mIoU {result['miou']:.2f}, mean accuracy {result['mean_acc']:.2f}, pixel accuracy "
            f"{result['pixel_acc']:.2f}")


def evaluate_checkpoint(args: Namespace, distributed: Distributed) -> None:
    """Print the scores of the checkpoint --weights on the validation images."""
    model, normalize, autocast = model_from_checkpoint(args, distributed.device)
    names = args.classes or label_names(model.num_classes, args.zero_is_ignore)
    [data] = open_data(args, ["validation"], names, distributed.print)
    common.check_classes(args.classes or [None] * model.num_classes, data.classes, args.weights)
    data.transform = eval_transform(args.short_side)
    loader = common.validation_loader(data, 1, args, distributed)
    loader = tqdm(loader, unit="image", leave=False, disable=distributed.rank > 0 or None)
    confusion = evaluate(model, loader, distributed, normalize, autocast, args.crop_size if args.slide else 0)
    result = scores(confusion, data.classes)
    if distributed.rank == 0:
        common.print_result(f"{score_table(result)}\n{args.weights}: {summary(result)} ({len(data):,} images)")


# Prediction -----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def predict(args: Namespace, distributed: Distributed) -> int:
    """Write OUT/NAME_labels.png, a label map with the labels of the training masks, and OUT/NAME_overlay.png for each
    image. An image that cannot be read is reported, and the others are processed. Returns the exit status: 2 if there
    was such an image."""
    model, normalize, autocast = model_from_checkpoint(args, distributed.device)
    transform, first, out, failed = eval_transform(args.short_side), int(args.zero_is_ignore), Path(args.out), 0
    names = dict(enumerate(args.classes or label_names(model.num_classes, first), start=first))
    stems = {}
    for path in args.predict:
        if stems.setdefault(Path(path).stem, path) != path:
            raise UserError(f"{stems[Path(path).stem]} and {path} would be written to the same file in {out}")
    mine = list(stems.items())[distributed.rank::distributed.world_size]
    for path in (out / f"{stem}_{suffix}.png" for stem, _ in mine for suffix in ("labels", "overlay")):
        if os.path.lexists(path):  # it may have been corrected by hand
            raise UserError(f"{path} already exists; move it, or choose another --out")
    common.make_folder(out)
    for stem, path in tqdm(mine, unit="image", leave=False, disable=distributed.rank > 0 or None):
        try:
            image = common.read_image(path)
            with autocast():
                pixels = normalize(transform(image)[None].to(distributed.device))
                logits = class_logits(model, pixels, args.crop_size if args.slide else 0)
            common.check_finite(logits, path)
            labels = label_map(logits, (image.height, image.width)) + first
        except Exception as error:
            common.report_image(path, error)
            failed += 1
            continue
        labels = v2.functional.to_pil_image(labels.to("cpu", torch.uint8)).convert("P")
        labels.putpalette(palette(first))
        for suffix, picture in ("labels", labels), ("overlay", overlay(image, labels, names)):
            common.atomic_write(out / f"{stem}_{suffix}.png", common.encoded(picture.save, format="PNG"))
    failed, done = distributed.all_reduce([failed, len(mine) - failed])
    distributed.print(f"{done:.0f} label maps (NAME_labels.png) and overlays (NAME_overlay.png) are in {out}")
    return 2 if failed else 0


def model_from_checkpoint(args: Namespace, device: torch.device) -> tuple[nn.Module, Callable, Callable]:
    """The model in the checkpoint --weights, in eval mode, its normalization, and autocast. Sets args.classes (None for
    a bare state dict) and, unless the command line did, args.short_side and the like."""
    weights = common.open_checkpoint(args, short_side=512, crop_size=512, mean=MEAN, std=STD, classes=None,
                                     zero_is_ignore=True, ignore_label=IGNORE)
    sizes = []  # classes, channels, auxiliary channels
    for name in "decode_head.conv_seg.weight", "decode_head.bottleneck.0.weight", "auxiliary_head.convs.0.0.weight":
        if weights.get(name, torch.empty(0)).dim() != 4 or not len(weights[name]):
            raise UserError(f"{args.weights} has no {name}; expected a checkpoint of segment.py")
        sizes.append(len(weights[name]))
    if sizes[0] >= IGNORE:
        raise UserError(f"{args.weights} has {sizes[0]} classes; expected at most {IGNORE - 1}: label maps have 8 bits")
    model = visiongru.UPerNet(MODELS[args.model](), *sizes)
    common.load_weights(model, weights, args.weights)
    model.to(device, memory_format=torch.channels_last).eval()
    return model, common.normalizer(device, args.mean, args.std), common.precision(args.amp, device)[1]


def palette(zero_is_ignore: bool) -> list[int]:
    """256 colours, as 768 numbers, for the labels of a map: distinct for neighbouring labels, black for "other"."""
    colours = [colorsys.hsv_to_rgb(0.618034 * k % 1, (0.9, 0.55, 0.75)[k % 3], (1.0, 0.85, 0.6)[k // 3 % 3])
               for k in range(256)]
    colours = [(0, 0, 0)] * zero_is_ignore + colours
    return [round(255 * value) for colour in colours[:256] for value in colour]


def overlay(image: Image.Image, labels: Image.Image, names: dict[int, str]) -> Image.Image:
    """The image blended with the colours of its label map (a palette image), above a legend with a line for each label
    that occurs, most frequent first. names: the name of each label."""
    counts = sorted(labels.getcolors(), reverse=True)
    size = min(max(12, max(image.size) // 40), 48)
    texts = [f"{label}: {common.printable(names[label])} {100 * count / image.width / image.height:.1f} %"
             for count, label in counts]
    font, colours = ImageFont.load_default(size), labels.getpalette()
    for name in () if "".join(texts).isascii() else FONTS:  # PIL's own font has only Latin letters
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, size)
    width = max(image.width, *(round(font.getlength(text)) + 2 * size for text in texts))
    page = Image.new("RGB", (width, image.height + 3 * size * len(texts) // 2 + size // 2), "white")
    page.paste(Image.blend(image, labels.convert("RGB"), 0.5))
    draw = ImageDraw.Draw(page)
    for line, ((_, label), text) in enumerate(zip(counts, texts)):
        y = image.height + size // 2 + 3 * size * line // 2
        draw.rectangle((size // 4, y, 5 * size // 4, y + size), tuple(colours[3 * label:3 * label + 3]), "black")
        draw.text((3 * size // 2, y + size // 2), text, "black", font, anchor="lm")
    return page


# Data -----------------------------------------------------------------------------------------------------------------

class LabelledImages(Dataset):
    """DIR/images/SPLIT and DIR/annotations/SPLIT as (PIL image, mask (H, W) uint8 of class indices and IGNORE)."""

    transform = None

    def __init__(self, args: Namespace, split: str, classes: list[str], log: Callable):
        self.classes, self.zero_is_ignore, self.ignore_label = classes, args.zero_is_ignore, args.ignore_label
        folder, label_folder = (Path(args.data, kind, split) for kind in ("images", "annotations"))
        images, masks = by_stem(folder, common.EXTENSIONS, log), by_stem(label_folder, LOSSLESS, log)
        missing = sorted(images.keys() - masks.keys())
        if missing or not images:
            raise UserError(f"{images[missing[0]]} has no label map {missing[0]}.png in {label_folder}"
                            if missing else f"{folder} has no images in it")
        common.note_skipped([masks[stem] for stem in sorted(masks.keys() - images.keys())], "without an image", log)
        self.samples = [(images[stem], masks[stem]) for stem in sorted(images)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple:
        image_path, mask_path = self.samples[index]
        image, mask = common.read_image(image_path), self.read_mask(mask_path)
        if image.size != mask.shape[::-1]:
            raise UserError(f"{mask_path} is {mask.shape[1]} x {mask.shape[0]} pixels and its image {image_path} "
                            f"{image.width} x {image.height}, turned as its EXIF data say; expected the same")
        return self.transform(image, mask) if self.transform else (image, mask)

    def check_labels(self) -> None:
        """UserError unless at least two classes occur. Label maps are read until they do: usually one."""
        seen = set()
        for _, path in self.samples:
            seen |= {*self.read_mask(path).unique().tolist()} - {IGNORE}
            if len(seen) > 1:
                return
        found = f"only {self.classes[seen.pop()]!r}" if seen else "no class"
        raise UserError(f"the label maps in {self.samples[0][1].parent} have {found} besides ignored pixels, so there "
                        f"is nothing to learn. If 0 is a class, give --no-zero-is-ignore and count it as a class. If "
                        f"{self.ignore_label} is one, give it another number in the files, such as 1")

    def read_mask(self, path: Path) -> Tensor:
        """A label map as (H, W) uint8: class indices and IGNORE. UserError for any other label."""
        try:
            with common.open_image(path, LOSSLESS) as file:
                if len(file.getbands()) > 1:
                    raise ValueError(f"it has the channels {file.getbands()}; expected one, the class number")
                decoder, _, _, coding = file.tile[0]
                coding = coding if isinstance(coding, str) else coding[0]
                if coding not in CODINGS or decoder.startswith("ppm") or file.info.get("compression") in LOSSY:
                    raise ValueError(f"PIL does not read this pixel format ({decoder}, {coding}) unchanged; save it as "
                                     f"a grey or palette PNG of 8 bits")
                labels = v2.functional.pil_to_tensor(file)[0].to(torch.int64)
        except Exception as error:
            raise UserError(f"cannot read the label map {path}: {error}") from None
        first, last = int(self.zero_is_ignore), len(self.classes) - 1 + self.zero_is_ignore
        ignored = (labels == self.ignore_label) | (labels == 0) & self.zero_is_ignore
        wrong = ((labels < first) | (labels > last)) & ~ignored
        if wrong.any():
            ignore = f"{'0 or ' * self.zero_is_ignore}{self.ignore_label}"
            raise UserError(f"the label map {path} has a pixel of label {labels[wrong][0]}; expected {first} to "
                            f"{last}, or {ignore} to ignore it; see --num-classes, --zero-is-ignore and --ignore-label")
        return (labels - first).masked_fill(ignored, IGNORE).to(torch.uint8)


def by_stem(folder: Path, extensions: Iterable[str], log: Callable) -> dict[str, Path]:
    """The files below a folder by relative path without extension. UserError if two have the same."""
    files = {}
    for path in map(Path, common.find_files(folder, extensions, log, once=False)):
        other = files.setdefault(str(path.relative_to(folder).with_suffix("")), path)
        if other != path:
            raise UserError(f"{other} and {path} differ only in their extension; remove one of them")
    return files


def class_names(args: Namespace, known: list[str] | None = None) -> list[str]:
    """The class names of --data: from its files, or those `known` from a checkpoint, or made up for --num-classes."""
    for source in Path(args.data, "classes.txt"), Path(args.data, "objectInfo150.txt"):
        if source.exists():
            try:
                text = source.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read {source}, text in UTF-8: {error}") from None
            names = [line.strip() for line in text.splitlines() if line.strip()]
            if source.name == "objectInfo150.txt":  # a title, then Idx, Ratio, Train, Val, Name between tabs
                names = [line.split("\t")[-1] for line in names[1:]]
            if not 1 <= len(set(names)) == len(names) < IGNORE or args.num_classes not in (None, len(names)):
                raise UserError(f"{source} has {len(names)} names, {len(set(names))} of them distinct; expected "
                                f"{args.num_classes or f'1 to {IGNORE - 1}'} distinct ones")
            return names
    if not known and args.num_classes is None:
        raise UserError(f"--data {args.data}: how many classes are there? List their names, one per line, in "
                        f"{args.data}/classes.txt, or give --num-classes")
    return known or label_names(args.num_classes, args.zero_is_ignore)


def label_names(count: int, zero_is_ignore: bool) -> list[str]:
    return [f"label {k + int(zero_is_ignore)}" for k in range(count)]


def open_data(args: Namespace, splits: Iterable[str], known: list[str] | None = None,
              log: Callable = print) -> list[Dataset]:
    """The datasets of `splits`, in that order, with the same `classes`. Raises UserError."""
    if args.data is None:
        return [Scenes(split, {"training": 20_000, "validation": 300}[split]) for split in splits]
    try:
        classes = class_names(args, known)
        sets = [LabelledImages(args, split, classes, log) for split in splits]
    except OSError as error:
        raise UserError(f"--data {args.data}: expected {{images,annotations}}/{{training,validation}} in it: "
                        f"{error}") from None
    if len(sets) > 1 and not common.checkpoint_to_resume(args):  # a new run
        sets[0].check_labels()
    return sets


class ShorterSide(v2.Transform):
    """Resize to a random shorter side from `low` to `high` pixels, and a longer side of at most 4 times that."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list) -> dict:
        height, width = v2.query_size(flat_inputs)
        short = self.low + (self.high - self.low) * torch.rand(()).item()
        scale = min(short / min(height, width), 4 * short / max(height, width))
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt: object, params: dict) -> object:
        return v2.functional.resize(inpt, params["size"])  # bilinear; nearest for a Mask


class TrainTransform:
    """The recipe's augmentation: PIL image, mask (H, W) -> (3, S, S) uint8, (S, S) uint8.

    Resize the shorter side to --short-side times a random number from --scale; crop to --crop-size, padded with the
    mean colour and IGNORE if the image is smaller; flip; distort the colours.
    """

    def __init__(self, args: Namespace):
        self.resize = ShorterSide(*(args.short_side * scale for scale in args.scale))
        self.crop = v2.RandomCrop(args.crop_size, pad_if_needed=True,
                                  fill={tv_tensors.Mask: IGNORE, "others": tuple(round(255 * m) for m in MEAN)})
        # Each with probability 1/2. At strength 1: factors of 1 +- these numbers, and hue shifts of +- 0.1 turns.
        colours = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
        self.finish = v2.Compose([
            v2.RandomHorizontalFlip(args.hflip),
            *(v2.RandomApply([v2.ColorJitter(**{name: strength * args.distort})], p=0.5)
              for name, strength in colours.items() if args.distort),
            v2.PILToTensor(), v2.ToPureTensor()])

    def __call__(self, image: Image.Image, mask: Tensor) -> tuple[Tensor, Tensor]:
        image, mask = self.resize(image, tv_tensors.Mask(mask))
        # A crop of almost nothing but road teaches little: take the first of ten in which no class exceeds 75 %.
        for _ in range(10):
            crop, crop_mask = self.crop(image, mask)
            counts = torch.bincount(crop_mask.flatten(), minlength=IGNORE)[:IGNORE]
            if 0 < counts.max() <= 0.75 * counts.sum():
                break
        return self.finish(crop, crop_mask)


def eval_transform(short_side: int) -> Callable:
    """PIL image -> the whole image, resized, (3, h, w) uint8. A mask beside it is left as it is."""
    return v2.Compose([ShorterSide(short_side, short_side), v2.PILToTensor()])


# Options: mmsegmentation's recipe for ADE20K, which the paper uses, and one for the built-in scenes -------------------

CLASSES = checked(int, lambda k: 1 <= k < IGNORE, f"1 to {IGNORE - 1} classes")
LABEL = checked(int, lambda n: -2**31 <= n < 2**31, "a 32-bit integer")
SCALE = checked(float, lambda x: 0 < x <= 16, "a number above 0 and at most 16")
STRENGTH = checked(float, lambda x: 0 <= x <= 2, "a number from 0 to 2")


def options() -> dict[str, Option]:
    """As in train.py."""
    return {
        "data": Option(TEXT, None, None, "folder with {images,annotations}/{training,validation} (built-in scenes)"),
        "num-classes": Option(CLASSES, None, None, "number of classes (as many as --data has class names)"),
        "zero-is-ignore": Option(FLAG, True, False, "ignore label 0; label 1 is the first class (on with --data)"),
        "ignore-label": Option(LABEL, IGNORE, IGNORE, "another label to ignore"),
        "model": Option({"choices": MODELS}, "tiny", "nano", "backbone size; with --weights that of the checkpoint"),
        "channels": Option(POSITIVE_INT, 512, 64, "width of the decoder"),
        "aux-channels": Option(POSITIVE_INT, 256, 32, "width of the auxiliary head"),
        "backbone-weights": Option(TEXT, None, None, "start the backbone from this classifier, ours or the authors'"),
        "iters": Option(POSITIVE_INT, 160_000, 2400, "training iterations: optimizer steps"),
        "batch-size": Option(POSITIVE_INT, 16, 16, "global batch size: images per optimizer step over all processes"),
        "lr": Option(NON_NEGATIVE, 6e-5, 5e-3, "peak learning rate"),
        "weight-decay": Option(NON_NEGATIVE, 0.01, 0.01, "weight decay, on all parameters except the norms"),
        "warmup-iters": Option(NON_NEGATIVE_INT, 1500, 200, "iterations of linear learning-rate warm-up"),
        "short-side": Option(PIXELS, None, None, "resize the shorter side to this, the longer to up to 4x (crop-size)"),
        "scale": Option(pair(SCALE), [0.5, 2.0], [1.0, 1.0], "range of random scales of short-side in training"),
        "crop-size": Option(PIXELS, 512, 64, "size of training crops in pixels, preferably a multiple of 32"),
        "distort": Option(STRENGTH, 1.0, 0.0, "strength of brightness, contrast, saturation and hue jitter"),
        "balance": Option(FRACTION, 0.0, 0.0, "weight rare classes in the loss: (share of the pixels) ** -balance"),
        "eval-every": Option(POSITIVE_INT, 4000, 600, "iterations between validations"),
        "slide": Option(FLAG, False, False, "validate and predict with overlapping windows of crop-size"),
    } | common.shared_options()


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    """The command line, with every default filled in. Raises UserError."""
    predicting = CHECKPOINT_DEFAULTS | {"short_side": None, "crop_size": None, "zero_is_ignore": None, "slide": False,
                                        "out": "predictions"}
    evaluating = predicting | {"data": None, "num_classes": None, "ignore_label": None, "workers": None}
    evaluating.pop("out")
    args = common.parse(argv, __doc__, options(), {"eval": evaluating, "predict": predicting},
                        {"weights": ["model", "channels", "aux_channels"], "backbone_weights": ["model"]})
    if args.eval or args.predict:
        return args
    if args.weights and args.backbone_weights:
        raise UserError("--weights and --backbone-weights: give one of the two")
    if args.data is None and (args.num_classes, args.zero_is_ignore, args.ignore_label) != (None, False, IGNORE):
        raise UserError("--num-classes, --zero-is-ignore and --ignore-label need --data")
    args.scale = sorted(args.scale)
    args.short_side = args.short_side or args.crop_size
    args.out = args.out or f"runs/{Path(args.data).resolve().name if args.data else 'scenes'}-upernet-{args.model}"
    return args


def main(argv: list[str] | None = None) -> int:
    return common.dispatch(parse_arguments(argv), train, evaluate_checkpoint, predict)


if __name__ == "__main__":
    common.run_main(main)
