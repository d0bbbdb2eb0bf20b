"""Time and memory of VisionGRU beside its peers, and of the three scans, measured side by side.

    python notebooks/bench.py                                     224 px, batch 8, inference and training
    python notebooks/bench.py --sizes 1024 --batch 1 --mode infer
    python notebooks/bench.py --scan                              the recurrence alone, against its length
    python notebooks/bench.py --compile                           the same with compiled parts, as train.py --compile
    python notebooks/bench.py --count --batch 128                 what a GPU would do, counted on paper
    python notebooks/bench.py --loader                            images per second that one core loads and augments
    python notebooks/bench.py --device cuda --amp bf16 --batch 128 --compile

Each model runs in a process of its own, and the processes take turns, one step each, so that a drift of the machine
hits all alike. A ratio is the median, over the rounds, of (time of the reference) / (time of the model) in the same
round. Memory is by how much one step makes the process grow: on a CPU its resident set at its peak over that before
the first step; on a GPU the peak of allocated memory, likewise. The table goes to the standard output, and all numbers
to --json.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402 (before torch, for OpenMP)
import visiongru  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

GIB = 2**30


def vit_small(size):
    """ViT-S/16, which is DeiT-S without its distillation token."""
    from torchvision.models import VisionTransformer
    return VisionTransformer(image_size=size, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)


def from_torchvision(name):
    import torchvision
    return lambda size: getattr(torchvision.models, name)()


# What is measured, by name; each is made for an image size, which only ViT needs to know.
MODELS = {
    "ours": lambda size: visiongru.visiongru_tiny(),
    "ours, log scan": lambda size: visiongru.visiongru_tiny(scan="log"),  # what the authors' release computes
    "ours, grad checkpointing": lambda size: visiongru.visiongru_tiny(grad_checkpointing=True),
    "swin_t": from_torchvision("swin_t"),
    "convnext_tiny": from_torchvision("convnext_tiny"),
    "resnet50": from_torchvision("resnet50"),
    "vit_s": vit_small,
}


# ---------------------------------------------------------------------------------------------------------------------
# One process: a model that makes a step whenever it is told to
# ---------------------------------------------------------------------------------------------------------------------

def resident():
    """This process's resident set in bytes, now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The growth of memory within a `with` block, in bytes, as .bytes."""

    def __init__(self, device):
        self.device = torch.device(device)

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
            self.before = resident()
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
            self.bytes = peak - self.before


def make_step(name, size, batch, mode, device, amp, compiled):
    """A function that runs one step, of inference or of training without an optimizer."""
    torch.manual_seed(0)
    model = MODELS[name](size).to(device, memory_format=torch.channels_last)
    model.train(mode == "train")
    network = model
    if compiled and name.startswith("ours"):
        train.compile_parts(model, log=lambda text: None)
    elif compiled:
        network = torch.compile(model, dynamic=False)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (batch,), device=device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]

    def forward():
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            return network(x)

    def infer():
        with torch.inference_mode():
            forward()

    def forward_and_backward():
        F.cross_entropy(forward().float(), y).backward()
        model.zero_grad(set_to_none=True)
    return {"infer": infer, "train": forward_and_backward}[mode]


def timed(run, device):
    """The seconds that run() takes, on a GPU until it has finished."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def serve(spec):
    """Make steps as asked for, one per line of the standard input; answer each with its seconds, the first, which
    warms up, with its bytes too."""
    step = make_step(**spec)
    with Peak(spec["device"]) as peak:
        step()
    print(json.dumps({"bytes": peak.bytes}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": timed(step, spec["device"])}), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# All of them, in turns
# ---------------------------------------------------------------------------------------------------------------------

def measure(names, rounds, **spec):
    """-> for each name {"seconds": [one for each round], "bytes": growth in the first step}, or {"error": ...}."""
    results, processes = {}, {}
    for name in names:
        process = subprocess.Popen([sys.executable, __file__, "--serve", json.dumps({"name": name, **spec})],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        answer = process.stdout.readline()
        if answer:
            results[name], processes[name] = {"seconds": [], **json.loads(answer)}, process
        else:
            results[name] = {"error": (process.stderr.read().strip().splitlines() or ["no answer"])[-1]}
    for _ in range(rounds):
        for name, process in processes.items():
            time.sleep(0.1)  # until the threads of the one before have stopped waiting for more work
            process.stdin.write("step\n")
            process.stdin.flush()
            results[name]["seconds"].append(json.loads(process.stdout.readline())["seconds"])
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return results


def table(results, batch):
    """A Markdown table: images per second, and by what the first model is faster than each and needs less memory."""
    ours = next(iter(results.values()))
    lines = ["| model | images/s | the first is faster by | memory of a step | the first needs |",
             "|---|---|---|---|---|"]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"| {name} | {result['error'][:60]} | | | |")
            continue
        ratio = statistics.median(b / a for a, b in zip(ours["seconds"], result["seconds"]))
        lines.append(f"| {name} | {batch / statistics.median(result['seconds']):.3g} | {ratio:.2f}x "
                     f"| {result['bytes'] / GIB:.2f} GiB | {ours['bytes'] / result['bytes']:.2f}x |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The scans alone
# ---------------------------------------------------------------------------------------------------------------------

def recurrence(hidden, scan, device):
    """A minGRU without its projections: u (batch, T, 2 hidden) -> every h_t (batch, T, hidden)."""
    network = visiongru.MinGRU(hidden, 1, scan).to(device)
    network.in_proj = torch.nn.Identity()
    return lambda u: network(u)[0]


def measure_scans(lengths, batch, hidden, rounds, device):
    """-> for each length T and scan: seconds of a forward pass and of a forward and backward pass of a minGRU, from u
    (batch, T, 2 hidden) to h, in turns, and bytes kept for the backward pass; and the floor of both, the time in which
    what must be read and written could be copied, at the speed of a copy measured in the same turns."""
    rows = []
    for T in lengths:
        u = torch.randn(batch, T, 2 * hidden, device=device, requires_grad=True)
        grad, target = torch.randn(2, batch, T, hidden, device=device)
        # The loop is left out where a round of it takes longer than a second.
        names = [name for name in visiongru.SCANS if name != "sequential" or T <= 12_544]
        scans = {name: recurrence(hidden, name, device) for name in names}
        seconds = {name: [] for name in (*scans, "copy")}
        for _ in range(rounds + 1):
            for name, scan in scans.items():
                with torch.no_grad():
                    forward = timed(lambda: scan(u), device)
                both = timed(lambda: torch.autograd.grad(scan(u), u, grad), device)
                seconds[name].append((forward, both))
            seconds["copy"].append((timed(lambda: target.copy_(grad), device),))
        copy, = medians(seconds.pop("copy"))
        for name, scan in scans.items():
            kept = {}
            with torch.autograd.graph.saved_tensors_hooks(
                    lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t,
                    lambda t: t):
                h = scan(u)
            forward, both = medians(seconds[name])
            # In tensors of h's size, of which a copy moves 2: forward reads u (2) and writes h; backward reads the
            # gradient, u and h, and writes the gradient of u (6).
            rows.append({"T": T, "scan": name, "forward": forward, "both": both, "kept": sum(kept.values()),
                         "floor_forward": 3 / 2 * copy, "floor_both": 9 / 2 * copy})
            del h
    return rows


def medians(rounds):
    """The medians of the columns, without the first round, which warms up."""
    return [statistics.median(column) for column in zip(*rounds[1:])]


def scan_table(rows):
    lines = ["| T | scan | forward | forward + backward | parallel is faster by | kept for backward | floor |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        ours = next(r for r in rows if r["T"] == row["T"] and r["scan"] == "parallel")
        lines.append(f"| {row['T']:,} | {row['scan']} | {1e3 * row['forward']:.1f} ms | {1e3 * row['both']:.1f} ms "
                     f"| {row['both'] / ours['both']:.1f}x | {row['kept'] / 2**20:.1f} MiB "
                     f"| {1e3 * row['floor_both']:.1f} ms |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Loading and augmenting images
# ---------------------------------------------------------------------------------------------------------------------

def photographs(folder, count):
    """`count` JPEG files of 500 x 375 pixels and about 100 KB, as ImageNet has on average, in folder/train/{a,b}."""
    from torchvision.io import write_jpeg
    for name in "ab":
        (folder / "train" / name).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        shapes, noise = (torch.rand(1, 3, *size, generator=generator) for size in ((12, 16), (375, 500)))
        image = F.interpolate(shapes, (375, 500), mode="bicubic") + 0.28 * (noise - 0.5)
        write_jpeg((255 * image[0]).clamp(0, 255).byte(), str(folder / "train" / "ab"[i % 2] / f"{i}.jpg"), quality=85)


def torchvision_recipe(tensors):
    """The transforms of torchvision's reference script for classification, on tensors or on PIL images."""
    from torchvision.transforms import v2
    first, last = ([v2.PILToTensor()], []) if tensors else ([], [v2.PILToTensor()])
    return v2.Compose([*first, v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.RandAugment(),
                       *last, v2.ToDtype(torch.float32, scale=True), v2.Normalize(train.MEAN, train.STD),
                       v2.RandomErasing(0.25)])


def measure_loading(rounds, count=64):
    """-> for each recipe the images per second of each round: all images once, in one process with one thread."""
    from torchvision.datasets import ImageFolder
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), count)
        args = train.parse_arguments(["--data", folder])
        ours, = train.open_data(args, ["train"])
        ours.transform = train.train_transform(args)
        recipes = {"ours": train.Stream(ours, args.seed)}
        for form in "PIL", "tensor":
            recipes[f"torchvision, {form}"] = ImageFolder(Path(folder, "train"), torchvision_recipe(form == "tensor"))
        seconds = {name: [] for name in recipes}
        for _ in range(rounds):
            for name, data in recipes.items():
                loader = torch.utils.data.DataLoader(data, batch_size=32, sampler=range(count))
                seconds[name].append(timed(lambda: list(loader), "cpu"))
    return {name: [count / s for s in times] for name, times in seconds.items()}


def loading_table(rates):
    lines = ["| recipe | images/s | ours is faster by |", "|---|---|---|"]
    for name, rate in rates.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["ours"], rate))
        lines.append(f"| {name} | {statistics.median(rate):.0f} | {ratio:.2f}x |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# On paper: launches and bytes
# ---------------------------------------------------------------------------------------------------------------------

# Bytes per second from and to memory, of the data sheets. A kernel's launch takes the processor's time, a stated guess;
# it goes on while the GPU works, so that the longer of the two counts.
GPUS = {"A100": 2.04e12, "H100": 3.35e12, "H200": 4.8e12}
LAUNCH = {"eager": 8e-6, "compiled": 4e-6}


class Count(TorchDispatchMode):
    """Counts the operations that are no views, and the bytes of the tensors that they read and write."""

    def __enter__(self):
        self.launches, self.bytes = 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not is_view and not function.name().startswith("aten::empty"):
            self.launches += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs, result))
                              if isinstance(t, torch.Tensor))
        return result


def eager_counts(make_run):
    """-> (launches, bytes) of a forward pass on the meta device, and of forward and backward. `make_run(device)` gives
    a function whose result, if it has a gradient, is summed and differentiated."""
    run = make_run("meta")
    with torch.no_grad(), Count() as forward:
        run()
    with Count() as both:
        run().sum().backward()
    return [(count.launches, count.bytes) for count in (forward, both)]


def compiled_counts(make_run):
    """The same of what inductor makes of it for the CPU: all its kernels, and the products and convolutions between."""
    import logging

    import torch._inductor.compile_fx as inductor
    from torch._inductor import config, metrics
    inductor.inductor_metrics_log.setLevel(logging.INFO)  # or it does not count
    inductor.inductor_metrics_log.propagate = False
    inductor.inductor_metrics_log.addHandler(logging.NullHandler())
    run, counts = make_run("cpu"), []
    with config.patch(force_disable_caches=True):
        for grad in False, True:
            torch._dynamo.reset()
            metrics.reset()
            with torch.set_grad_enabled(grad):
                result = run()
            if grad:
                result.sum().backward()
            nodes = [type(node).__name__ for node, _ in metrics.nodes_num_elem]
            counts.append((sum(name != "NopKernelSchedulerNode" for name in nodes), metrics.num_bytes_accessed))
    return counts


def count_rows(batch, T, hidden):
    """What is counted: name, how it is run, (launches, bytes) forward and with backward, and the floor of each: what
    goes in and comes out, once."""
    numbers = 4 * batch * T * hidden  # bytes of h; u is twice as large
    floors = 3 * numbers, (3 + 6) * numbers  # u and h; then the gradient, u and h again, and the gradient of u
    for form in visiongru.SCANS:
        def make_run(device, form=form):
            u = torch.randn(batch, T, 2 * hidden, device=device, requires_grad=True)
            scan = recurrence(hidden, form, device)

            def run():
                return scan(u)
            return torch.compile(run) if device == "cpu" else run
        yield f"minGRU, {form}", "eager", eager_counts(make_run), floors
        if form != "sequential":  # a program of T steps takes longer to compile than anyone waits
            yield f"minGRU, {form}", "compiled", compiled_counts(make_run), floors

    tiny = visiongru.visiongru_tiny()
    network = tiny.to("meta")
    yield ("tiny at 224 px", "eager",
           eager_counts(lambda device: lambda: network(torch.randn(batch, 3, 224, 224, device=device))), None)
    # Compiled, part by part, as train.py does it: the parts of a stage share their code. Of 8 images, times batch / 8.
    parts = [(1, tiny.stem, (8, 3, 224, 224))]
    for stage, dim in enumerate(tiny.dims):
        side = 56 >> stage
        parts += [(len(tiny.stages[stage]), tiny.stages[stage][0], (8, side, side, dim))]
        parts += [(1, down, (8, side, side, dim)) for down in tiny.downsamples[stage:stage + 1]]
    total = [[0, 0], [0, 0]]
    for times, part, shape in parts:
        part = torch.compile(part.to_empty(device="cpu"), dynamic=False)
        counts = compiled_counts(lambda device: lambda: part(torch.zeros(shape, requires_grad=True)))
        for k, (launches, moved) in enumerate(counts):
            total[k][0] += times * launches
            total[k][1] += times * moved * batch // 8
    yield "tiny at 224 px", "compiled", total, None


def count_table(rows):
    """A Markdown table of `count_rows`, with the predicted milliseconds."""
    lines = ["| | | launches | GB | x floor | " + " | ".join(f"{name}, ms" for name in GPUS) + " |",
             "|---|---|---|---|---|" + "---|" * len(GPUS)]
    for name, how, counts, floors in rows:
        for k, what in enumerate(("forward", "forward and backward")):
            launches, moved = counts[k]
            times = [1e3 * max(launches * LAUNCH[how], moved / bandwidth) for bandwidth in GPUS.values()]
            lines.append(f"| {name}, {what} | {how} | {launches:,} | {moved / 1e9:.2f} | "
                         f"{f'{moved / floors[k]:.1f}' if floors else ''} | "
                         + " | ".join(f"{t:.2f}" for t in times) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ours", "ours, log scan", "swin_t", "convnext_tiny", "resnet50",
                                                        "vit_s"], choices=MODELS, metavar="NAME",
                        help=f"of {', '.join(map(repr, MODELS))}")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], metavar="PX")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--mode", nargs="+", default=["infer", "train"], choices=["infer", "train"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--scan", action="store_true", help="measure the scans alone")
    parser.add_argument("--loader", action="store_true", help="measure the loading of images on one core")
    parser.add_argument("--count", action="store_true", help="count launches and bytes, and predict a GPU's time")
    parser.add_argument("--lengths", type=int, nargs="+", default=[196, 784, 3136, 12544], metavar="T")
    parser.add_argument("--hidden", type=int, default=144, metavar="E")
    parser.add_argument("--json", metavar="FILE", help="write all numbers here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(json.loads(args.serve))

    if args.count:
        print(f"From u to h at T = 3,136, E = {args.hidden}, batch {args.batch}, float32: counted, not measured.\n"
              f"Predicted is the longer of {1e6 * LAUNCH['eager']:.0f} us for each launch "
              f"({1e6 * LAUNCH['compiled']:.0f} compiled), and all bytes at the data sheet's bandwidth.\n")
        return print(count_table(count_rows(args.batch, 3136, args.hidden)))

    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    print(f"PyTorch {torch.__version__}, {where}, amp {args.amp}{', compiled' if args.compile else ''}\n")
    record = []
    if args.scan:
        rows = measure_scans(args.lengths, args.batch, args.hidden, args.rounds, args.device)
        print(f"The scans alone, batch {args.batch}, E = {args.hidden}\n\n{scan_table(rows)}\n")
        record.append({"scans": rows})
    elif args.loader:
        rates = measure_loading(args.rounds)
        print(f"JPEG files of 500 x 375, the ImageNet recipe, one core\n\n{loading_table(rates)}\n")
        record.append({"loading": rates})
    else:
        for size in args.sizes:
            for mode in args.mode:
                results = measure(args.models, args.rounds, size=size, batch=args.batch, mode=mode, device=args.device,
                                  amp=args.amp, compiled=args.compile)
                print(f"{mode}, {size} px, batch {args.batch}\n\n{table(results, args.batch)}\n", flush=True)
                record.append({"size": size, "mode": mode, "batch": args.batch, "results": results})
    if args.json:
        Path(args.json).write_text(json.dumps({"torch": torch.__version__, "where": where, "amp": args.amp,
                                               "compiled": args.compile, "measured": record}, indent=1))


if __name__ == "__main__":
    main()
