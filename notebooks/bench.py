"""Time and memory of VisionGRU beside its peers, and of the three scans, measured side by side.

    python notebooks/bench.py                                     224 px, batch 8, inference and training
    python notebooks/bench.py --sizes 1024 --batch 1 --mode infer
    python notebooks/bench.py --scan                              the recurrence alone, against its length
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
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import visiongru  # noqa: E402

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
    "ours, checkpoint": lambda size: visiongru.visiongru_tiny(checkpoint=True),
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
    network = torch.compile(model) if compiled else model
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (batch,), device=device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]

    def forward():
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            return network(x)

    def infer():
        with torch.inference_mode():
            forward()

    def train():
        F.cross_entropy(forward().float(), y).backward()
        model.zero_grad(set_to_none=True)
    return {"infer": infer, "train": train}[mode]


def serve(spec):
    """Make steps as asked for, one per line of the standard input; answer each with its seconds, the first, which
    warms up, with its bytes too."""
    step = make_step(**spec)
    cuda = torch.device(spec["device"]).type == "cuda"
    with Peak(spec["device"]) as peak:
        step()
    print(json.dumps({"bytes": peak.bytes}), flush=True)
    for _ in sys.stdin:
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# All of them, in turns
# ---------------------------------------------------------------------------------------------------------------------

def measure(names, rounds, **spec):
    """-> for each name {"seconds": [one for each round], "bytes": growth in the first step}, or {"error": ...}."""
    # Without this an idle process's threads go on spinning for a while and disturb the one whose turn it is.
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"} if spec["device"] == "cpu" else None
    results, processes = {}, {}
    for name in names:
        process = subprocess.Popen([sys.executable, __file__, "--serve", json.dumps({"name": name, **spec})], env=env,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        answer = process.stdout.readline()
        if answer:
            results[name], processes[name] = {"seconds": [], **json.loads(answer)}, process
        else:
            results[name] = {"error": (process.stderr.read().strip().splitlines() or ["no answer"])[-1]}
    for _ in range(rounds):
        for name, process in processes.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            results[name]["seconds"].append(json.loads(process.stdout.readline())["seconds"])
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return results


def table(results, batch):
    """A Markdown table: images per second, and beside it the median ratio of speeds ours / theirs; memory likewise."""
    ours = results["ours"]
    lines = ["| model | images/s | ours is faster by | memory of a step | ours needs |", "|---|---|---|---|---|"]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"| {name} | {result['error'][:60]} | | | |")
            continue
        ratio = statistics.median(b / a for a, b in zip(ours["seconds"], result["seconds"]))
        lines.append(f"| {name} | {batch / statistics.median(result['seconds']):.2f} | {ratio:.2f}x "
                     f"| {result['bytes'] / GIB:.2f} GiB | {ours['bytes'] / result['bytes']:.2f}x |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The scans alone
# ---------------------------------------------------------------------------------------------------------------------

def measure_scans(lengths, batch, hidden, rounds, device):
    """The three scans on pre-activations u (batch, T, 2 hidden), with what a minGRU does around them.

    -> for each T and scan: seconds forward, seconds forward and backward, bytes kept for the backward pass; for each T
    the floor, the time in which u could be read and h be written, at the speed of a copy measured beside it.
    """
    cuda = torch.device(device).type == "cuda"

    def timed(run):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    rows = []
    for T in lengths:
        u = torch.randn(batch, T, 2 * hidden, device=device, requires_grad=True)
        grad = torch.randn(batch, T, hidden, device=device)
        source, target = torch.randn(2, batch, T, hidden, device=device)
        scans = [name for name in visiongru.SCANS if name != "sequential" or T <= 20_000]
        seconds = {}
        for turn in range(rounds + 1):
            for name in scans:
                def forward():
                    return visiongru.SCANS[name](u)

                def both():
                    torch.autograd.grad(forward(), u, grad)
                with torch.no_grad():
                    times = timed(forward), timed(both) if False else None
                times = times[0], timed(both)
                if turn:  # the first warms up
                    seconds.setdefault(name, []).append(times)
            if turn:
                seconds.setdefault("copy", []).append(timed(lambda: target.copy_(source)))
        copy = statistics.median(seconds.pop("copy"))
        for name in scans:
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                visiongru.SCANS[name](u)
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
            storages.pop(u.untyped_storage().data_ptr(), None)  # is there anyhow
            rows.append({"T": T, "scan": name, "forward": statistics.median(f for f, _ in seconds[name]),
                         "both": statistics.median(b for _, b in seconds[name]), "kept": sum(storages.values()),
                         "floor_forward": 1.5 * copy, "floor_both": 4.5 * copy})
    return rows
