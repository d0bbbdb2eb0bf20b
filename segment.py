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

`train` is the whole story, and the rest follows in its order: the score; data; predictions; arguments; and at the end
the built-in scenes. What a run is, how it stops and goes on, is in train.py.
"""

import colorsys
import contextlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

import train as common
import visiongru
from train import AMOUNT, COUNT, COUNT_OR_NONE, MEAN, MODELS, PIXELS, SHAPES, SHARE, STD, Shapes, UserError, limited

LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".pgm")  # for label maps: JPEG would make other labels of them
IGNORE = 255  # in the masks of the data sets below: a pixel that is neither learned nor scored


# Train and evaluate ---------------------------------------------------------------------------------------------------

def train(args, processes):
    """Train a segmentation model as `args` say, and leave the best in OUT/best.pt."""
    # Data
    train_data, val_data = open_data(args, ("training", "validation"))
    classes = train_data.classes
    device, sync_batchnorm = processes.device, processes.count > 1 and processes.device.type == "cuda"
    if common.images_per_micro_batch(args, processes) == 1 and not sync_batchnorm:
        raise UserError(f"--batch-size {args.batch_size}: a micro-batch would be one image, and BatchNorm needs two")
    weights = class_weights(train_data, args.balance).to(device) if args.balance else None

    # Model, optimizer, learning rate
    torch.manual_seed(args.seed)
    backbone = MODELS[args.model](drop_path=args.drop_path, grad_checkpointing=args.checkpoint)
    model = visiongru.UPerNet(backbone, len(classes), args.channels, args.aux_channels)
    for part, path in (model, args.weights), (model.backbone, args.backbone_weights):
        if path and not common.file_to_resume(args):
            common.fill_model(part, common.load_checkpoint(path), path, processes.say)
    model.to(device, memory_format=torch.channels_last)
    if sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=tuple(args.betas),
                                  fused=True)
    scheduler = LambdaLR(optimizer, lambda step: warmup_linear(step, args.iters, args.warmup))
    run = common.Run(args, processes, model, optimizer, scheduler, args.iters, train_data)
    processes.say(f"{len(classes)} classes; {len(train_data):,} training images in crops of {args.crop_size} px, "
                  f"{len(val_data):,} validation images; steps x images: {args.iters} x {args.batch_size}"
                  + (f"; label 0 is ignored, {classes[0]!r} is label 1" if args.zero_is_ignore else ""))

    # Loop
    train_data.transform, val_data.transform = TrainTransform(args), eval_transform(args.short_side)
    batches, val_loader = run.loaders(train_data, val_data, val_batch=1)

    def loss_of(images, masks):
        return segmentation_loss(run.network(images), masks.long(), weights)

    while run.validated < args.iters:
        run.take_steps(min((run.validated // args.eval_every + 1) * args.eval_every, args.iters), batches, loss_of)
        confusion = evaluate(model, val_loader, processes, run.autocast, args.crop_size if args.slide else 0)
        result = scores(confusion, classes)
        # Labels that count from 0 never reach the last number.
        if run.validated == 0 and args.zero_is_ignore and result["acc"][classes[-1]] is None:
            processes.say(f"note: no pixel to validate on has the last label, {len(classes)}; if labels count from 0, "
                          f"begin again with --no-zero-is-ignore")
        run.record(result, f"step {run.step:6d}/{args.iters}  {summary(result)}", result["miou"])
    processes.say(f"{score_table(run.log[-1])}\ndone: {run.out / 'best.pt'} has mIoU {run.best:.2f}. To evaluate it:\n"
                  f"  python segment.py --eval --weights {run.out / 'best.pt'}"
                  + (f" --data {args.data}" if args.data else "") + " --slide" * args.slide)


def warmup_linear(step, steps, warmup):
    """The learning rate at `step` of `steps`, its peak being 1: linear from 1e-6 over `warmup` steps, then to 0."""
    if step < warmup:
        return 1e-6 + (1 - 1e-6) * step / warmup
    return max(0, steps - step) / max(1, steps - warmup)


def parameter_groups(model, weight_decay):
    """For the optimizer: weight decay on everything but the norms."""
    norms = [p for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))
             for p in module.parameters()]
    others = set(model.parameters()) - set(norms)
    return [{"params": [p for p in model.parameters() if p in others], "weight_decay": weight_decay},
            {"params": norms, "weight_decay": 0.0}]


def segmentation_loss(outputs, masks, weights=None):
    """Cross-entropy of the decoder's logits plus 0.4 times that of the auxiliary head's, both (B, K, H, W), over masks
    (B, H, W): a mean over all pixels, of which the ignored ones have loss 0, so that a crop without labels is no
    division by zero, and a pixel counts the same in whatever micro-batch it is. weights: (K,), for each class."""
    def cross_entropy(logits):
        return F.cross_entropy(logits, masks, weights, ignore_index=IGNORE, reduction="sum") / masks.numel()
    logits, auxiliary = outputs
    return cross_entropy(logits) + 0.4 * cross_entropy(auxiliary)


def class_weights(data, balance):
    """For the loss, (K,): a class's share of the pixels ** -balance, times what makes the mean over all pixels 1. Poles
    and signs, a hundredth of a street's pixels each, have with 0.5 five times the weight of a road, a third of them.
    The shares are those in some 500 of the pictures, evenly spread."""
    pixels = torch.ones(len(data.classes))  # one too many, for a class that is in none of them
    for index in range(0, len(data), -(-len(data) // 500)):
        _, mask = data[index]
        pixels += mask[mask != IGNORE].bincount(minlength=len(pixels))
    weights = pixels ** -balance
    return weights * pixels.sum() / (weights * pixels).sum()


# From the network's output to a label map and a score -----------------------------------------------------------------

@torch.compiler.set_stance("force_eager")  # --compile is for training: here images have any size
@torch.inference_mode()
def evaluate(model, loader, processes, autocast=contextlib.nullcontext, window=0):
    """-> the pixels of class i that were taken for class j, (K, K), at each label map's size, exact over all processes.
    Raises Stopped if one of them is told to stop."""
    model.eval()
    K = model.num_classes
    confusion = torch.zeros(K * K, dtype=torch.int64, device=processes.device)
    for image, mask in loader:
        if processes.heard:
            break
        image = image.to(processes.device, memory_format=torch.channels_last, non_blocking=True)
        mask = mask[0].to(processes.device, non_blocking=True).long()
        with autocast():
            predicted = label_map(class_logits(model, image, window), mask.shape)
        known = mask != IGNORE
        confusion += torch.bincount(mask[known] * K + predicted[known], minlength=K * K)
    confusion = torch.tensor(processes.sum(confusion.tolist()), dtype=torch.float64).view(K, K)
    processes.stop_if_told()
    if confusion.sum() == 0:
        raise UserError("the validation set has no pixel with a label that is not ignored; there is nothing to score")
    return confusion


def class_logits(model, image, window=0):
    """image (1, 3, H, W) -> logits (K, H, W) float32, of the whole or, with `window`, as the mean over windows of so
    many pixels, a third of each overlapping the next."""
    height, width = image.shape[2:]
    image = F.pad(image, (0, max(0, 32 - width), 0, max(0, 32 - height)))  # what the model needs at least
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


def scores(confusion, classes):
    """Pixels of class i taken for class j, (K, K) -> percentages: IoU and accuracy of each class, None where it does
    not occur; their means over the classes that occur; and the share of all pixels that are right. A class that does
    not occur and is predicted all the same has IoU 0 and counts in the mean, as is usual."""
    right, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou, accuracy = 100 * right / (labelled + predicted - right), 100 * right / labelled

    def by_class(values):
        return {name: None if math.isnan(x) else x for name, x in zip(classes, values.tolist())}
    return {"miou": iou.nanmean().item(), "mean_acc": accuracy.nanmean().item(),
            "pixel_acc": (100 * right.sum() / labelled.sum()).item(), "iou": by_class(iou), "acc": by_class(accuracy)}


def score_table(result):
    """The per-class scores as lines of text."""
    width = max(5, *map(len, result["iou"]))
    lines = [f"{'class':{width}}    IoU    acc"]
    for name, iou in result["iou"].items():
        lines.append(f"{name:{width}} " + " ".join("     -" if x is None else f"{x:6.2f}"
                                                   for x in (iou, result["acc"][name])))
    return "\n".join(lines)


def summary(result):
    return (f"mIoU {result['miou']:.2f}, mean accuracy {result['mean_acc']:.2f}, pixel accuracy "
            f"{result['pixel_acc']:.2f}")


# The checkpoint --weights ---------------------------------------------------------------------------------------------

def model_from_checkpoint(args):
    """The model of the checkpoint --weights, and its preprocessing. args.classes, args.zero_is_ignore and the like are
    set where the command line did not; args.classes of a bare state dict is None."""
    weights = common.open_checkpoint(args, short_side=512, crop_size=512, mean=MEAN, std=STD, classes=None,
                                     zero_is_ignore=True, ignore_label=IGNORE)
    try:
        shapes = [weights[f"{name}.weight"].shape for name in
                  ("decode_head.conv_seg", "decode_head.bottleneck.0", "auxiliary_head.convs.0.0")]
    except KeyError as error:
        raise UserError(f"{args.weights} has no {error.args[0]}; expected a checkpoint of segment.py") from None
    model = visiongru.UPerNet(MODELS[args.model](), *(shape[0] for shape in shapes))
    common.fill_model(model, weights, args.weights)
    return model.eval(), eval_transform(args.short_side, args.mean, args.std)


def evaluate_checkpoint(args, processes):
    model, transform = model_from_checkpoint(args)
    [data] = open_data(args, ["validation"], args.classes or label_names(model.num_classes, args.zero_is_ignore))
    common.check_classes(args.classes or [None] * model.num_classes, data.classes, args.weights)
    data.transform = transform
    loader = common.evaluation_loader(data, 1, args, processes)
    loader = tqdm(loader, unit="image", leave=False, disable=processes.rank > 0 or None)
    model.to(processes.device, memory_format=torch.channels_last)
    confusion = evaluate(model, loader, processes, common.precision(args.amp, processes.device)[1],
                         args.crop_size if args.slide else 0)
    result = scores(confusion, data.classes)
    processes.say(f"{score_table(result)}\n{args.weights}: {summary(result)} ({len(data):,} images)")


@torch.inference_mode()
def predict(args, processes):
    """For each picture OUT/NAME_labels.png, a label map in the numbers of the training masks, and OUT/NAME_overlay.png.
    A picture that cannot be read is reported; the rest are still processed."""
    model, transform = model_from_checkpoint(args)
    model.to(processes.device, memory_format=torch.channels_last)
    first, out, unread = int(args.zero_is_ignore), Path(args.out), 0
    names = dict(enumerate(args.classes or label_names(model.num_classes, first), start=first))
    stems = {}
    for path in args.predict:
        if stems.setdefault(Path(path).stem, path) != path:
            raise UserError(f"{stems[Path(path).stem]} and {path} would be written to the same file in {out}")
    common.make_folder(out)
    autocast = common.precision(args.amp, processes.device)[1]
    mine = list(stems.items())[processes.rank::processes.count]
    for stem, path in tqdm(mine, unit="image", leave=False, disable=processes.rank > 0 or None):
        try:
            image = common.read_image(path)
        except UserError as error:
            tqdm.write(f"error: {error}", file=sys.stderr)
            unread += 1
            continue
        with autocast():
            pixels = transform(image)[None].to(processes.device)
            logits = class_logits(model, pixels, args.crop_size if args.slide else 0)
        labels = label_map(logits, (image.height, image.width)) + first
        labels = v2.functional.to_pil_image(labels.to("cpu", torch.uint8)).convert("P")
        labels.putpalette(palette(first))
        try:
            labels.save(out / f"{stem}_labels.png")
            overlay(image, labels, names).save(out / f"{stem}_overlay.png")
        except OSError as error:
            raise UserError(f"cannot write the prediction for {path} to {out}: {error.strerror or error}") from None
    unread, done = processes.sum([unread, len(mine) - unread])
    processes.say(f"{done:.0f} label maps (NAME_labels.png) and overlays (NAME_overlay.png) are in {out}")
    return 2 if unread else 0


def palette(zero_is_ignore):
    """256 colours, three numbers each, for the labels of a map: far apart for neighbours, black for "other"."""
    colours = [colorsys.hsv_to_rgb(0.618034 * k % 1, (0.9, 0.55, 0.75)[k % 3], (1.0, 0.85, 0.6)[k // 3 % 3])
               for k in range(256)]
    colours = [(0, 0, 0)] * zero_is_ignore + colours
    return [round(255 * value) for colour in colours[:256] for value in colour]


def overlay(image, labels, names):
    """The picture under half-transparent colours of its label map (a palette image), and below it a legend: a line for
    each label that occurs, the most frequent first. names: a name for each label, a dict."""
    counts = sorted(labels.getcolors(), reverse=True)
    size = min(max(12, max(image.size) // 40), 48)
    font, colours = ImageFont.load_default(size), labels.getpalette()
    texts = [f"{names[label]} {100 * count / image.width / image.height:.1f} %" for count, label in counts]
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
    """DIR/images/SPLIT and DIR/annotations/SPLIT as (PIL image, mask (H, W) uint8): class indices and IGNORE."""

    transform = None

    def __init__(self, root, split, classes, zero_is_ignore, ignore_label):
        self.classes, self.zero_is_ignore, self.ignore_label = classes, zero_is_ignore, ignore_label
        images, masks = ({path.stem: path for path in sorted(Path(root, kind, split).iterdir())
                          if path.suffix.lower() in extensions}
                         for kind, extensions in (("images", IMG_EXTENSIONS), ("annotations", LOSSLESS)))
        missing = sorted(images.keys() - masks.keys())
        if missing or not images:
            raise UserError(f"{images[missing[0]]} has no label map {missing[0]}.png in {root}/annotations/{split}"
                            if missing else f"{root}/images/{split} has no images in it")
        self.items = [(images[stem], masks[stem]) for stem in sorted(images)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        image_path, mask_path = self.items[index]
        image, mask = common.read_image(image_path), self.read_mask(mask_path)
        if image.size != mask.shape[::-1]:
            raise UserError(f"{mask_path} is {mask.shape[1]} x {mask.shape[0]} pixels and its image {image_path} "
                            f"{image.width} x {image.height}; expected the same")
        return self.transform(image, mask) if self.transform else (image, mask)

    def read_mask(self, path):
        try:
            with Image.open(path, formats=["PNG", "BMP", "TIFF", "PPM"]) as file:  # whatever its name says
                if len(file.getbands()) > 1:
                    raise ValueError(f"it has the channels {file.getbands()}; expected one, the number of the class")
                labels = v2.functional.pil_to_tensor(file)[0].to(torch.int64)
        except Exception as error:
            raise UserError(f"cannot read the label map {path}: {error}") from None
        first, last = int(self.zero_is_ignore), len(self.classes) - 1 + self.zero_is_ignore
        ignored = (labels == self.ignore_label) | (labels == 0) & self.zero_is_ignore
        wrong = ((labels < first) | (labels > last)) & ~ignored
        if wrong.any():
            ignore = f"{'0 or ' * self.zero_is_ignore}{self.ignore_label}"
            raise UserError(f"the label map {path} has a pixel of label {labels[wrong][0]}; expected {first} to "
                            f"{last}, or {ignore} to ignore it: --num-classes, --zero-is-ignore and --ignore-label say "
                            f"how labels are read")
        return (labels - first).masked_fill(ignored, IGNORE).to(torch.uint8)


def class_names(args, known=None):
    """The names of the classes of --data: from its files, or those `known` from a checkpoint, or --num-classes many."""
    for source in Path(args.data, "classes.txt"), Path(args.data, "objectInfo150.txt"):
        if source.exists():
            names = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            if source.name == "objectInfo150.txt":  # a title, then Idx, Ratio, Train, Val, Name between tabs
                names = [line.split("\t")[-1] for line in names[1:]]
            if not 1 <= len(set(names)) == len(names) < IGNORE or args.num_classes not in (None, len(names)):
                raise UserError(f"{source} has {len(names)} names, {len(set(names))} of them different; expected "
                                f"{args.num_classes or f'1 to {IGNORE - 1}'}, all different")
            return names
    if not known and args.num_classes is None:
        raise UserError(f"--data {args.data}: how many classes are there? Give their names, one per line, in "
                        f"{args.data}/classes.txt, or --num-classes")
    return known or label_names(args.num_classes, args.zero_is_ignore)


def label_names(count, zero_is_ignore):
    return [f"label {k + int(zero_is_ignore)}" for k in range(count)]


def open_data(args, splits, known=None):
    """The data sets of `splits` in that order, with the same `classes`."""
    if args.data is None:
        return [Scenes(split, {"training": 20_000, "validation": 300}[split]) for split in splits]
    try:
        classes = class_names(args, known)
        return [LabelledImages(args.data, split, classes, args.zero_is_ignore, args.ignore_label) for split in splits]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {args.data}: expected {{images,annotations}}/{{training,validation}} in it, and text "
                        f"in UTF-8: {error}") from None


class ShorterSide(v2.Transform):
    """Resize to a shorter side chosen at random from `low` to `high` pixels, and a longer of at most 4 times that."""

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
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()])

    def __call__(self, image, mask):
        image, mask = self.resize(image, tv_tensors.Mask(mask))
        # A crop that is nearly all road teaches little: of ten, the first in which no class has more than 75 %, or
        # otherwise the tenth.
        for _ in range(10):
            crop, crop_mask = self.crop(image, mask)
            counts = torch.bincount(crop_mask.flatten(), minlength=IGNORE)[:IGNORE]
            if 0 < counts.max() <= 0.75 * counts.sum():
                break
        return self.finish(crop, crop_mask)


def eval_transform(short_side, mean=MEAN, std=STD):
    """The whole image, resized as by `ShorterSide`, normalised. A mask beside it, a plain tensor, stays as it is."""
    return v2.Compose([ShorterSide(short_side, short_side), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(mean, std), v2.ToPureTensor()])


# Arguments ------------------------------------------------------------------------------------------------------------

CLASSES = limited(int, lambda k: 1 <= k < IGNORE, f"1 to {IGNORE - 1} classes")
LABEL = limited(int, lambda n: -2**31 <= n < 2**31, "a whole number of 32 bits")
SCALE = limited(float, lambda x: 0 < x <= 16, "a number above 0, at most 16")
STRENGTH = limited(float, lambda x: 0 <= x <= 2, "a number from 0 to 2")
# As in train.py. mmsegmentation's recipe for ADE20K, as the paper uses it, and what suits the built-in scenes.
OPTIONS = {
    "data": (str, None, None, "folder with {images,annotations}/{training,validation}; else the built-in scenes"),
    "num-classes": (CLASSES, None, None, "number of classes (as many as the names that --data has)"),
    "zero-is-ignore": (bool, True, False, "label 0 means other and is ignored, label 1 is the first class"),
    "ignore-label": (LABEL, IGNORE, IGNORE, "this label is ignored too"),
    "model": (list(MODELS), "tiny", "nano", "the backbone"),
    "channels": (COUNT, 512, 64, "width of the decoder"),
    "aux-channels": (COUNT, 256, 32, "width of the auxiliary head"),
    "backbone-weights": (str, None, None, "start the backbone from this checkpoint of train.py, or the authors'"),
    "iters": (COUNT, 160_000, 2400, "optimizer steps"),
    "batch-size": (COUNT, 16, 16, "images per optimizer step, over all processes"),
    "lr": (AMOUNT, 6e-5, 5e-3, "peak learning rate"),
    "weight-decay": (AMOUNT, 0.01, 0.01, "on all parameters but the norms'"),
    "warmup": (COUNT_OR_NONE, 1500, 200, "steps of rising learning rate"),
    "short-side": (PIXELS, None, None, "shorter side of resized images, the longer at most 4 times that (crop-size)"),
    "scale": ((SCALE, SCALE), [0.5, 2.0], [1.0, 1.0], "for training, short-side times a number between these"),
    "crop-size": (PIXELS, 512, 64, "side of the squares to train on, a multiple of 32 at best"),
    "distort": (STRENGTH, 1.0, 0.0, "strength of the changes of brightness, contrast, saturation and hue"),
    "balance": (SHARE, 0.0, 0.0, "weight of rare classes in the loss: (share of the pixels) ** -balance"),
    "eval-every": (COUNT, 4000, 600, "steps between validations"),
    "slide": (bool, False, False, "validate and predict with overlapping windows of crop-size, not the whole image"),
} | common.SHARED
FROM_CHECKPOINT = common.FROM_CHECKPOINT | {
    "short_side": None, "crop_size": None, "zero_is_ignore": None, "ignore_label": None, "num_classes": None,
    "slide": False, "out": "predictions"}


def parse_arguments(argv=None):
    args = common.parse(argv, __doc__, OPTIONS, FROM_CHECKPOINT)
    args.ema = 0  # no moving average of the weights
    if args.eval or args.predict:
        return args
    if args.weights and args.backbone_weights:
        raise UserError("--weights and --backbone-weights: give one of the two")
    if args.data is None and (args.num_classes, args.zero_is_ignore, args.ignore_label) != (None, False, IGNORE):
        raise UserError("--num-classes, --zero-is-ignore, --ignore-label: they say how labels of --data are read; "
                        "there is no --data")
    args.scale = sorted(args.scale)
    args.short_side = args.short_side or args.crop_size
    args.out = args.out or f"runs/{Path(args.data).resolve().name if args.data else 'scenes'}-upernet-{args.model}"
    return args


# The built-in scenes --------------------------------------------------------------------------------------------------

class Scenes(Shapes):
    """One to three textured shapes on a textured ground, class 0, one over the other: (PIL image, mask (size, size)
    uint8). Item i depends on (split, seed, i) alone, and is drawn when asked for."""

    classes, side = ["ground", *SHAPES], 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(common.random_seed(self.seed, "scene", self.split, index))
        count = int(torch.randint(1, 4, (), generator=generator))
        shapes = torch.randint(len(SHAPES), (count,), generator=generator).tolist()
        image, mask = common.draw_scene(shapes, self.size, generator)
        image = v2.functional.to_pil_image(image)
        return self.transform(image, mask) if self.transform else (image, mask)


def main(argv=None):
    return common.act(parse_arguments(argv), train, evaluate_checkpoint, predict)


if __name__ == "__main__":
    common.run_script(main)
