"""Speed and memory of VisionGRU beside its peers, and of the three scans.

    python notebooks/bench.py                                     224 px, batch 8, inference and training
    python notebooks/bench.py --sizes 1024 --batch 1 --mode infer
    python notebooks/bench.py --scan                              the recurrence alone, at several lengths
    python notebooks/bench.py --compile                           compiled; ours block by block, as train.py --compile
    python notebooks/bench.py --count --batch 128                 kernels and bytes of the scans, counted, not timed
    python notebooks/bench.py --loader                            images per second that one core loads and augments
    python notebooks/bench.py --device cuda --amp bf16 --batch 128 --compile

Each model runs in its own process. The processes take turns, one step each, so that whatever slows the machine slows
every model alike. A ratio of speeds is the median over the rounds of the ratios within a round. Memory is what the
first step adds: on a CPU, the peak of the resident set less its size before the step (which needs Linux); on a GPU, the
same of the allocated memory. The tables go to standard output, and all numbers to --json.
"""

import argparse
import contextlib
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


def vit_small(size, fused=False):
    """ViT-S/16, which is DeiT-S. For inference PyTorch prefers a fast path that writes each layer's attention matrix to
    memory; `fused` turns that path off in this process, and PyTorch's fused attention takes its place."""
    from torchvision.models import VisionTransformer
    if fused:
        torch.backends.mha.set_fastpath_enabled(False)
    return VisionTransformer(image_size=size, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)


def from_torchvision(name):
    import torchvision
    return lambda size: getattr(torchvision.models, name)()


# Each model by name, as a function of the image size, which only ViT needs.
MODELS = {
    "ours": lambda size: visiongru.visiongru_tiny(),
    "ours, log scan": lambda size: visiongru.visiongru_tiny(scan="log"),  # what the authors' release computes
    "ours, grad checkpointing": lambda size: visiongru.visiongru_tiny(grad_checkpointing=True),
    "swin_t": from_torchvision("swin_t"),
    "convnext_tiny": from_torchvision("convnext_tiny"),
    "resnet50": from_torchvision("resnet50"),
    "vit_s": vit_small,
    "vit_s, fused": lambda size: vit_small(size, fused=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# One process: a model that makes a step whenever it is asked to
# ---------------------------------------------------------------------------------------------------------------------

def resident():
    """The current size of this process's resident set, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """Within a `with` block, the growth of memory up to its peak, in bytes, as .bytes."""

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
    """A function that runs one step: inference, or forward and backward (no optimizer)."""
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
    """The seconds that run() takes, including what it starts on a GPU."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def serve(spec):
    """For each line on standard input, run one step. Answer the first, which warms up, with its bytes, and each later
    one with its seconds."""
    step = make_step(**spec)
    sys.stdin.readline()
    with Peak(spec["device"]) as peak:
        step()
    print(json.dumps({"bytes": peak.bytes}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": timed(step, spec["device"])}), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# All models, in turns
# ---------------------------------------------------------------------------------------------------------------------

def measure(names, rounds, **spec):
    """-> for each name {"bytes": what the first step adds, "seconds": [one for each round]}, or {"error": ...}."""
    results = {name: {"seconds": []} for name in names}
    processes = {name: subprocess.Popen([sys.executable, __file__, "--serve", json.dumps({"name": name, **spec})],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True) for name in names}
    for turn in range(rounds + 1):
        for name, process in processes.items():
            if "error" in results[name]:
                continue
            time.sleep(0.1)  # until the threads of the previous process have stopped waiting for more work
            with contextlib.suppress(BrokenPipeError):  # if it has failed, its answer is empty
                process.stdin.write("step\n")
                process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                results[name] = {"error": (process.stderr.read().strip().splitlines() or ["no answer"])[-1]}
            elif turn == 0:
                results[name].update(json.loads(answer))
            else:
                results[name]["seconds"].append(json.loads(answer)["seconds"])
    for process in processes.values():
        process.communicate()
    return results


def table(results, batch):
    """A Markdown table: images per second and memory of each model, and how the first compares."""
    ours = next(iter(results.values()))
    lines = ["| model | images/s | first's speed / its speed | memory of a step | first's memory / its memory |",
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

# What any program must read and write, in tensors of h's size. Forward reads u (2) and writes h; backward reads the
# gradient of h, u and h, and writes the gradient of u (2).
FORWARD, BACKWARD = 3, 6


def recurrence(hidden, scan, device):
    """A minGRU without its projections, a function of u (batch, T, 2 hidden) that returns every h_t."""
    network = visiongru.MinGRU(hidden, 1, scan).to(device)
    network.in_proj = torch.nn.Identity()
    return lambda u: network(u)[0]


def measure_scans(lengths, batch, hidden, rounds, device):
    """-> for each length T and each scan, of a minGRU from u (batch, T, 2 hidden) to h: the seconds of a forward pass,
    and of forward and backward together, in turns; the bytes saved for backward; and the floor, the seconds that a copy
    of as many bytes takes as both passes must read and write."""
    rows = []
    for T in lengths:
        u = torch.randn(batch, T, 2 * hidden, device=device, requires_grad=True)
        grad, target = torch.randn(2, batch, T, hidden, device=device)
        # Longer than this, the loop takes seconds per step.
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
            rows.append({"T": T, "scan": name, "forward": forward, "both": both, "kept": sum(kept.values()),
                         "floor": (FORWARD + BACKWARD) / 2 * copy})  # a copy reads one tensor and writes one
            del h
    return rows


def medians(rounds):
    """The medians of the columns, without the first round, which warms up."""
    return [statistics.median(column) for column in zip(*rounds[1:])]


def scan_table(rows):
    lines = ["| T | scan | forward | forward + backward | parallel's speed / its speed | saved for backward | floor |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        ours = next(r for r in rows if r["T"] == row["T"] and r["scan"] == "parallel")
        lines.append(f"| {row['T']:,} | {row['scan']} | {1e3 * row['forward']:.1f} ms | {1e3 * row['both']:.1f} ms "
                     f"| {row['both'] / ours['both']:.1f}x | {row['kept'] / 2**20:.1f} MiB "
                     f"| {1e3 * row['floor']:.1f} ms |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Loading and augmenting images
# ---------------------------------------------------------------------------------------------------------------------

def photographs(folder, count):
    """Write `count` JPEG files to folder/train/{a,b}, of 500 x 375 pixels and about 100 KB: ImageNet's averages."""
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
    """-> for each recipe, images per second in each round: all images once, in one process with one thread."""
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
    lines = ["| recipe | images/s | our speed / its speed |", "|---|---|---|"]
    for name, rate in rates.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["ours"], rate))
        lines.append(f"| {name} | {statistics.median(rate):.0f} | {ratio:.2f}x |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels and bytes of the scans, counted
# ---------------------------------------------------------------------------------------------------------------------

class Count(TorchDispatchMode):
    """Counts the operations other than views, and the bytes of the tensors that they read and write."""

    def __enter__(self):
        self.kernels, self.bytes = 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not is_view and not function.name().startswith("aten::empty"):
            self.kernels += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs, result))
                              if isinstance(t, torch.Tensor))
        return result


def count(name, compiled, batch, T, hidden, backward=False):
    """-> kernels and bytes that they read and write, of a minGRU from u (batch, T, 2 hidden) to h; with `backward`, of
    forward and backward together. Eager operations are counted on the meta device, which computes nothing. Compiled
    kernels are those that torch.compile makes for the CPU, and the bytes its own estimate."""
    device = "cpu" if compiled else "meta"
    u = torch.randn(batch, T, 2 * hidden, device=device, requires_grad=True)
    scan = recurrence(hidden, name, device)

    def run(scan):
        with torch.set_grad_enabled(backward):
            h = scan(u)
        if backward:
            h.backward(torch.empty_like(h))

    if not compiled:
        with Count() as counted:
            run(scan)
        return counted.kernels, counted.bytes

    import logging

    import torch._inductor.compile_fx as inductor
    from torch._inductor import config, metrics
    inductor.inductor_metrics_log.setLevel(logging.INFO)  # inductor counts only if it would log the counts
    inductor.inductor_metrics_log.propagate = False
    inductor.inductor_metrics_log.addHandler(logging.NullHandler())
    torch._dynamo.reset()
    metrics.reset()
    with config.patch(force_disable_caches=True):
        run(torch.compile(scan))
    kernels = sum(type(node).__name__ != "NopKernelSchedulerNode" for node, _ in metrics.nodes_num_elem)
    return kernels, metrics.num_bytes_accessed


def count_table(batch, T, hidden):
    """A Markdown table of the scans' kernels and bytes, eager and compiled."""
    lines = ["| scan | | | kernels | GB | bytes / floor |", "|---|---|---|---|---|---|"]
    for name in visiongru.SCANS:
        for compiled in (False, True)[:1 if name == "sequential" else 2]:  # compiling T steps takes too long
            for backward, what in (False, "forward"), (True, "forward and backward"):
                kernels, moved = count(name, compiled, batch, T, hidden, backward)
                floor = (FORWARD + BACKWARD * backward) * 4 * batch * T * hidden
                lines.append(f"| {name} | {what} | {'compiled' if compiled else 'eager'} | {kernels:,} "
                             f"| {moved / 1e9:.2f} | {moved / floor:.1f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ours", "ours, log scan", "swin_t", "convnext_tiny", "resnet50",
                                                        "vit_s"], choices=MODELS, metavar="NAME",
                        help=f"any of {', '.join(map(repr, MODELS))}; the others are compared with the first")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], metavar="PX")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--mode", nargs="+", default=["infer", "train"], choices=["infer", "train"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--scan", action="store_true", help="time the scans alone")
    parser.add_argument("--loader", action="store_true", help="time loading and augmenting images on one core")
    parser.add_argument("--count", action="store_true", help="count the scans' kernels and bytes")
    parser.add_argument("--lengths", type=int, nargs="+", default=[196, 784, 3136, 12544], metavar="T")
    parser.add_argument("--hidden", type=int, default=144, metavar="E")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(json.loads(args.serve))

    if args.count:
        print(f"A minGRU from u to h, T = 3,136, E = {args.hidden}, batch {args.batch}, float32.\n"
              f"The floor is what any program must read and write.\n\n{count_table(args.batch, 3136, args.hidden)}")
        return

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
