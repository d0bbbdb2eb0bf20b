"""What VisionGRU promises, each promise on the smallest case that could break it.

`pytest` runs all of it in a short form, `pytest -m slow` the long forms, `pytest -m "not slow and not process"` in a
minute what needs no other process or compiler. What the two scripts promise, and where it is tested:

-k resume        Killed at any moment, also while it writes a checkpoint, and resumed: on a CPU, with one process or
                 two, a run ends with the same bits as one left alone. There is always a checkpoint that loads, once
                 there is one. (-m slow -k twenty_kills)
-k signals       After Ctrl-C, SIGTERM or SIGHUP the step is finished (at most one more is taken) and saved, validation
                 is cut short, and the status is 130, 143 or 129. A second signal stops at once. Under torchrun the
                 processes do the same within the 30 seconds that it gives them; it ends with a status of its own.
-k distributed   `torchrun --max-restarts=3 ... --resume auto` continues by itself when a process dies, and ends as if
                 none had. Two hosts end with the weights of one. Each validation image counts once.
-k "two_runs or predictions"  An output folder belongs to one run: a second one is refused until the first ends, even by
                 a kill. A prediction replaces no file.
-k disk          A full disk or an unwritable folder is an error that says so; the checkpoint before it stays.
-k checkpoints   A damaged checkpoint, or one that would run code, is refused with its path and the reason.
-k images        An image is read as a viewer shows it (upright, transparent parts on white, 16 bits, the first frame),
                 or refused with its path and the reason.
-k finite        No scan gives NaN. Gradients that overflow in fp16 are skipped. A loss or weights that are not finite
                 end the run and are not saved.
-k reproducible  The same seed and batch size give the same images, augmented and mixed alike, and losses to 1e-5 over
                 50 steps, for any number of processes, micro-batches and workers, without drop-path, dropout and
                 BatchNorm. (-m slow -k shapes)
-k options       Any command line ends with status 0 or 2 and without a traceback.
-k cuda          The same on CUDA devices, where there are any.
"""

import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import segment
import train
import visiongru
from visiongru import (FCNHead, GRU2D, MinGRU, UPerNet, VisionGRU, coefficients, load_weights, scan_log, scan_parallel,
                       scan_sequential, visiongru_base, visiongru_nano, visiongru_tiny)

HERE = Path(__file__).parent
MICRO = dict(dim=8, depths=(1, 1, 2, 1))
SMALL = dict(dim=4, depths=(1, 1, 1, 1))
torch.set_num_threads(1)  # as in `started`: a sum's order of terms depends on their number
HANDLERS = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

process = pytest.mark.process
each_scan = pytest.mark.parametrize("scan", visiongru.SCANS)
each_way = pytest.mark.parametrize("with_h0, reverse", list(itertools.product((False, True), repeat=2)))


@pytest.fixture(autouse=True)
def repeatable():
    torch.manual_seed(0)
    yield
    for number, handler in HANDLERS:  # pytest's own, which a run of ours replaces
        signal.signal(number, handler)
    train.kill_workers()  # and the processes of a test that failed


def micro_upernet(num_classes=5, channels=8, aux_channels=4):
    return UPerNet(VisionGRU(7, **MICRO), num_classes, channels, aux_channels)


def with_gradients(outputs, inputs):
    """The outputs, and the gradients of their weighted sum, in which no two numbers weigh the same, for the inputs."""
    loss = sum((y * torch.arange(y.numel()).cos().view_as(y)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def assert_refused(message, function, *args, error=train.UserError):
    with pytest.raises(error, match=message):
        function(*args)


# The recurrence -------------------------------------------------------------------------------------------------------

def random_coefficients(T, with_h0):
    """Random a, b and, if wanted, h0. Neither a nor b is contiguous in memory."""
    a, b = torch.rand(T, 2, 3).double().transpose(0, 1), torch.rand(2, T, 6).double()[..., 3:].add_(0.1)
    return [t.requires_grad_() for t in (a, b, *with_h0 * [torch.rand(2, 3).double()])]


@each_way
def test_scans_are_the_loop_at_every_length_and_in_reverse_the_loop_over_the_flipped_sequence(with_h0, reverse):
    for T in [*range(1, 301), 1009, 4095, 4096, 4097]:
        a, b, *h0 = inputs = random_coefficients(T, with_h0)
        copies = [t.clone() for t in inputs]
        h = scan_sequential(a.flip(1), b.flip(1), *h0).flip(1) if reverse else scan_sequential(*inputs)
        expected = with_gradients([h], inputs)
        for scan, longest, tolerance in (scan_sequential, 40, 1e-11), (scan_parallel, T, 1e-11), (scan_log, 1009, 1e-6):
            if T <= longest:  # the loop would take long; log-space loses digits with T, in float64 too
                assert_close(with_gradients([scan(*inputs, reverse=reverse)], inputs), expected, rtol=tolerance,
                             atol=tolerance, msg=lambda m: f"T = {T}, {scan.__name__}: {m}")
        assert all(map(torch.equal, inputs, copies))  # nothing is written to them


@each_way
def test_scan_and_mingru_have_the_right_first_and_second_derivatives_also_by_torch_func(with_h0, reverse):
    gru, loop = MinGRU(2).double(), MinGRU(2, scan="sequential").double()
    loop.load_state_dict(gru.state_dict())
    x, *h0 = inputs = [torch.randn(2, 20, 2).double(), torch.rand(2, 4).double()][:1 + with_h0]
    cases = [(gru, [x[:, :7], *h0])] + [(scan_parallel, random_coefficients(T, with_h0)) for T in (1, 2, 5, 8)]
    for function, tensors in cases:
        for check in torch.autograd.gradcheck, torch.autograd.gradgradcheck:
            assert check(lambda *t: function(*t, reverse=reverse), [t.detach().requires_grad_() for t in tensors])

    def loss(gru):
        return lambda *inputs: sum(y.pow(3).sum() for y in gru(*inputs, reverse=reverse))
    every, jacrev, hessian = tuple(range(len(inputs))), torch.func.jacrev, torch.func.hessian
    assert_close(jacrev(jacrev(loss(gru), every), every)(*inputs), hessian(loss(loop), every)(*inputs))
    assert_refused("jvp", hessian(loss(gru)), *inputs, error=(NotImplementedError, RuntimeError))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gates", [-8, 0, 8], ids=["nearly closed", "typical", "nearly open"])
def test_float32_keeps_its_accuracy_over_65536_steps_and_log_space_does_not(gates, reverse):
    u = torch.randn(1, 65_537, 4)  # a prime: no chunk divides the sequence
    u[..., 2:] += gates  # candidates first, then gates
    exact = scan_sequential(*coefficients(u.double()), reverse=reverse)
    assert_close(scan_parallel(*coefficients(u.double()), reverse=reverse), exact)
    of_parallel, of_log = (((scan(*coefficients(u), reverse=reverse) - exact).abs() / exact).max()
                           for scan in (scan_parallel, scan_log))
    assert of_parallel < 1e-5
    assert of_log > 1e-4 or gates < 0  # with closed gates log A_t hardly grows, and log-space does better


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gates", [-8, -6, 0, 6, 8])
@pytest.mark.parametrize("dtype, T", [(torch.float16, 64), (torch.bfloat16, 64), (torch.float32, 4096)])
def test_gradients_of_scan_and_mingru_are_as_accurate_as_the_loops(dtype, T, gates, reverse):
    gru, loop = MinGRU(8, expansion=1), MinGRU(8, expansion=1, scan="sequential")
    gru.in_proj = loop.in_proj = torch.nn.Identity()
    u = torch.cat([torch.randn(2, T, 8), torch.randn(2, T, 8) + gates], dim=-1).to(dtype)
    grad = torch.randn(2, T, 8).to(dtype)

    def gradient(function, u):
        u = u.detach().requires_grad_()
        return torch.autograd.grad(function(u, reverse=reverse)[0], u, grad.to(u.dtype))[0].double()
    exact = gradient(loop, u.double())
    errors = [gradient(function, u) - exact for function in (
        loop, gru, lambda u, reverse: [scan_parallel(*coefficients(u), reverse=reverse).to(u.dtype)])]
    for half, norm in itertools.product((slice(0, 8), slice(8, 16)), (2, math.inf)):  # of the candidates, of the gates
        of_loop, *others = (torch.linalg.vector_norm(error[..., half], norm) for error in errors)
        rounding = 1e-6 * torch.linalg.vector_norm(exact[..., half], norm) if dtype == torch.float32 else 0
        assert max(others) < 2 * of_loop + rounding


# minGRU and 2DGRU -----------------------------------------------------------------------------------------------------

def mingru_by_hand(gru, x, h=0):
    """MinGRU's equations, one step after another. -> the outputs, and the states."""
    (W_h, W_z), states = gru.in_proj.weight.chunk(2), []
    for x_t in x.unbind(1):
        z, v = torch.sigmoid(x_t @ W_z.T), x_t @ W_h.T
        h = (1 - z) * h + z * torch.where(v > 0, v + 0.5, torch.sigmoid(v))
        states.append(h)
    states = torch.stack(states, 1)
    return gru.out_proj(states), states


@each_way
def test_mingru_computes_its_equations_in_value_and_gradient_at_once_and_step_by_step(with_h0, reverse):
    for T, size, expansion in ((1, 1, 2), (2, 1, 2), (3, 0, 2), (12, 1, 1), (13, 1, 1.5), (37, 1, 2), (1009, 1, 2)):
        gru = MinGRU(6, expansion).double()
        x = (size * torch.randn(2, T, 6).double()).requires_grad_()  # of size 0 it is where g has its kink
        state = h0 = with_h0 * [torch.rand(2, gru.hidden, dtype=torch.float64, requires_grad=True)]
        y, states = mingru_by_hand(gru, x.flip(1) if reverse else x, *h0)
        expected = with_gradients([y.flip(1) if reverse else y, states[:, -1]], [x, *h0, *gru.parameters()])
        for gru.scan, tolerance in (("sequential", 1e-11), ("parallel", 1e-11), ("log", 1e-6)):
            assert_close(with_gradients(gru(x, *h0, reverse=reverse), [x, *h0, *gru.parameters()]), expected,
                         rtol=tolerance, atol=tolerance, msg=lambda m: f"T = {T}, {gru.scan}: {m}")
        for t in range(T):
            y_t, *state = gru.step(x[:, -1 - t if reverse else t], *state)
            assert_close((y_t, *state), (y[:, t], states[:, t]))


def test_tensors_of_wrong_shapes_and_types_are_refused():
    a, gru, scans = torch.rand(2, 5, 3), MinGRU(3, 1), visiongru.SCANS.values()
    for T, shape in ((5, (2, 4, 3)), (5, (2, 1, 3)), (40, (2, 39, 3)), (40, (2, 1, 3)), (0, (2, 0, 3)), (3, (3,))):
        for scan in scans:
            assert_refused("expected both", scan, torch.rand(2, T, 3), torch.rand(shape), error=ValueError)
    for shape in (3,), (1, 3), (1, 2, 3):
        for scan in (*scans, lambda a, b, h0: gru(b, h0)):
            assert_refused("h0 has shape", scan, a, a, torch.rand(shape), error=ValueError)
    assert_refused(r"shape \(2, 0, \d+\).*; expected .* with T > 0", gru, torch.zeros(2, 0, 3), error=ValueError)
    model = VisionGRU(5, **SMALL)
    for shape in (3, 64, 64), (1, 64, 64, 3), (1, 1, 64, 64), (1, 3, 31, 64):
        message = re.escape(f"shape {shape}; expected (B, 3, H, W), H and W at least 32")
        assert_refused(message, model, torch.zeros(shape), error=ValueError)
    assert_refused("torch.uint8; expected floating", model, torch.zeros(1, 3, 64, 64).byte(), error=ValueError)
    assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 5)  # no images are well-formed images


def test_torch_func_differentiates_a_scan_forward_and_a_model_for_each_image():
    a, b, h0 = random_coefficients(20, True)
    assert_close(*(torch.func.jvp(scan, (a, b, h0), (b, a, h0))[1] for scan in (scan_parallel, scan_sequential)))
    model, x, y = VisionGRU(5, **SMALL).double(), torch.randn(3, 3, 40, 48).double(), torch.tensor([0, 1, 2])
    weights = dict(model.named_parameters())

    def loss(weights, image, label):
        return F.cross_entropy(torch.func.functional_call(model, weights, (image[None],)), label[None])
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    alone = [torch.autograd.grad(F.cross_entropy(model(x[i:i + 1]), y[i:i + 1]), weights.values()) for i in range(3)]
    assert_close([*mapped.values()], [*map(torch.stack, zip(*alone))])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_scan
def test_half_precision_accumulates_in_float32_and_stays_finite_however_large_the_input(dtype, scan):
    model = VisionGRU(5, **SMALL, scan=scan)
    for network, shape, sizes in ((GRU2D(8, scan=scan), (2, 6, 7, 8), (0.0, 1e-6, 1.0, 1e3, 3e4)),
                                  (model, (2, 3, 64, 64), (0.0, 1.0, 1e3))):
        for size in sizes:
            x = (size * torch.randn(shape)).clamp(-6e4, 6e4).requires_grad_()
            with torch.autocast("cpu", dtype):
                y = network(x)
            # The model normalises its input: its logits, and their gradients, do not grow with it.
            (y.float() / (1 if y.ndim == 2 else 1 + size)).mean().backward()
            assert all(t.isfinite().all() for t in [y, x.grad, *(p.grad for p in network.parameters())])
    gru, x, images = MinGRU(4, scan=scan), torch.randn(1, 50, 4), torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", dtype):
        (a, b), (y, h) = coefficients(gru.in_proj(x)), gru(x)
    assert a.dtype == b.dtype == h.dtype == torch.float32 and y.dtype == dtype
    y, h = gru.to(dtype)(x.to(dtype))
    assert h.dtype == torch.float32 and y.dtype == dtype
    assert model(images.to(dtype)).dtype == model(images.double()).dtype == torch.float32
    logits = model.to(dtype)(images)
    assert logits.dtype == dtype and logits.isfinite().all()


# The whole model ------------------------------------------------------------------------------------------------------

def release_names(model):
    """The names that the authors' release gives to the parameters of `model`, in the same order."""
    names = "\n".join(model.state_dict())
    for ours, theirs in {"gru.left": "min_gru_1", "gru.right": "min_gru_2", "in_proj": "to_hidden_and_gate",
                         "out_proj": "to_out", "dwconv": "dw_conv", "ffn.0": "projection1", "ffn.2": "projection2",
                         "stages": "snake_gru.layers", "stem": "tokenizer", "head": "fc"}.items():
        names = names.replace(ours, theirs)
    names = re.sub(r"(layers.*)\.norm1", r"\1.norm", names)
    return re.sub(r"downsamples\.(.)\.(\w+)", lambda m: f"snake_gru.{m[2]}{int(m[1]) + 1}", names).split("\n")


# What the authors' code computes in float64 for the weights and images of the test below: mean, standard deviation, and
# the values at eight places spread evenly over the flat result.
GOLDEN = {  # for the model, its classes (None: the four stages' maps in place of the logits) and the images' shape
    ("micro", 10, (2, 3, 64, 64)): [
        [-0.5298888, 3.019635, -0.6758669, -4.529035, 4.072605, -1.787238, -0.2224777, -2.390919, 3.864772, -3.568216]],
    ("tiny", 1000, (2, 3, 224, 224)): [
        [-0.01587228, 13.25639, -5.209287, 14.33676, 15.34964, 15.21584, -14.0412, -17.26901, -16.42624, -15.35343]],
    ("micro", None, (1, 3, 64, 96)): [
        [-0.5574175, 4.324003, 0.2805898, 4.66955, -3.726358, -1.741787, 1.290875, -3.765666, 7.440732, -4.632366],
        [0.07394818, 1.520765, 0.4727215, -0.6542455, 1.139864, 0.09063206, -2.991231, -0.6285712, 1.45286, -0.254249],
        [0.02518317, 2.106611, -0.4070333, 1.009608, -0.7041401, 3.417406, -2.404418, 4.345813, -1.623804, -0.5918379],
        [0.0495858, 1.413403, 0.1847017, -0.1301683, 0.7348603, 3.530168, 0.09837994, -0.1436832, 2.034506, 0.2284919]],
    ("micro", None, (1, 3, 97, 130)): [
        [-0.4803119, 4.191852, 1.402958, 5.371926, -5.238252, -4.346403, 2.527399, -2.396532, 7.809329, -3.198477],
        [0.06088725, 1.573518, 0.8402493, -2.133585, 0.5017744, -0.1579758, -1.741409, -0.2999264, 1.299246, 1.888478],
        [0.02513415, 1.371347, -0.2746697, 1.694531, 0.9790202, 0.326523, 0.7025676, 0.2379475, 1.083762, -2.096772],
        [0.04534746, 1.259835, -1.8041, -1.008582, 1.370768, -0.1161439, 1.477638, 2.321572, -0.4210127, 0.4258587]],
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_the_authors_weights_give_the_authors_logits_and_features(case):
    name, classes, shape = case
    model, weights = VisionGRU(classes or 1000, **(MICRO if name == "micro" else {})).double(), {}
    for key, value in zip(release_names(model), model.state_dict().values()):
        wave = torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + sum(map(ord, key))).view(value.shape)
        scale = 0.1 if value.ndim == 1 else math.sqrt(2 / value[0].numel())
        offset = 1 if value.ndim == 1 and not key.endswith("bias") else 0
        weights[key] = (offset + scale * wave).float()
    load_weights(model, weights)
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    images = (torch.sin(0.013 * i) + torch.cos(0.00071 * i)).float().double().view(shape)
    with torch.no_grad():
        results = [model(images)] if classes else model.features(images)
    for result, expected in zip(results, GOLDEN[case], strict=True):
        flat = result.flatten()
        found = [flat.mean(), flat.std(), *(flat[k * (len(flat) - 1) // 7] for k in range(8))]
        assert [x.item() for x in found] == pytest.approx(expected, rel=1e-6)


def test_the_named_models_have_the_papers_parameters_and_multiply_adds_and_take_the_arguments_of_visiongru():
    with torch.device("meta"):
        upernet, model = UPerNet(visiongru_tiny(), 150), visiongru_nano(num_classes=7, drop_path=0.1, scan="log")
        models = [visiongru_nano(), visiongru_tiny(), visiongru_base(), VisionGRU(10, **MICRO),
                  upernet, upernet.decode_head, upernet.auxiliary_head]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [
        1_959_232, 30_216_952, 86_907_352, 157_778, 60_475_964, 30_133_398, 702_614]
    gru = model.stages[3][0].gru
    assert model.num_classes == 7 and gru.left.scan == gru.right.scan == "log"
    tiny = models[1]
    for size, giga in ((224, 4.87), (512, 25.6), (640, 40.0), (1024, 102.3), (1248, 151.9)):  # as in figure 1
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            (tiny if size == 224 else tiny.features)(torch.empty(1, 3, size, size, device="meta"))
        assert counter.get_total_flops() / 2 / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (40, 56), (32, 500), (97, 64), (131, 131)])
def test_any_size_and_aspect_gives_a_map_for_each_stage_and_logits_for_each_pixel(height, width):
    model, upernet, x = VisionGRU(5, **SMALL), micro_upernet(), torch.randn(2, 3, height, width)
    assert [m.shape for m in model.features(x)] == [
        (2, 4 * 2**i, math.ceil(height / 2**(i + 2)), math.ceil(width / 2**(i + 2))) for i in range(4)]
    outputs = upernet(x)
    assert [y.shape for y in outputs] == 2 * [(2, 5, height, width)]
    sum(y.square().sum() for y in (model(x), *outputs)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*model.parameters(), *upernet.parameters()])
    assert upernet.eval()(x).shape == (2, 5, height, width) and torch.equal(upernet(x), upernet(x))


@pytest.mark.parametrize("make, arguments, message", [
    (MinGRU, [dict(dim=4, scan="fast")], "expected one of 'parallel', 'log', 'sequential'"),
    (MinGRU, [dict(dim=0), dict(dim=5, expansion=1.5), dict(dim=4, expansion=math.inf)], "positive integer"),
    (VisionGRU, [dict(dim=7), dict(dim=-8), dict(dim=72.0)], "expected an even number"),
    (VisionGRU, [dict(depths=(2, 2)), dict(depths=(2, 2, 0, 2)), dict(depths=(2, 2, 8.0, 2))],
     "expected four positive integers"),
    (VisionGRU, [dict(num_classes=0), dict(mlp_ratio=0), dict(drop_path=1.0), dict(scan="quick")], "expected"),
    (micro_upernet, [dict(num_classes=0), dict(channels=1.5), dict(aux_channels=-1)], "expected")])
def test_sizes_that_make_no_sense_are_refused_by_name(make, arguments, message):
    for given in arguments:
        name, value = list(given.items())[-1]
        assert_refused(rf"{name} (is )?{re.escape(repr(value))}.*{message}", lambda: make(**given), error=ValueError)


def test_stochastic_depth_grows_with_depth_and_activation_checkpointing_changes_memory_alone():
    x, plain, results, kept = torch.randn(4, 3, 64, 64), VisionGRU(5, **MICRO), [], []
    for grad_checkpointing in (False, True):
        model, tensors = VisionGRU(5, **MICRO, drop_path=0.4, grad_checkpointing=grad_checkpointing), []
        model.load_state_dict(plain.state_dict())
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            y = model(x)
        results.append(with_gradients([y], [*model.parameters()]))
        kept.append(sum({t.untyped_storage().data_ptr(): t.numel() for t in tensors}.values()))
    assert all(map(torch.equal, *results)) and kept[1] < 0.5 * kept[0]
    rates = [block.drop_path.p for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4]) and not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), plain(x))  # off by default, and when it is not trained


# Export and compile ---------------------------------------------------------------------------------------------------

any_size = pytest.mark.skipif(torch.__version__ < "2.8", reason="needs PyTorch 2.8")


@any_size
@process
def test_an_exported_scan_is_the_loop_at_any_length_in_its_range_and_needs_a_range():
    class Scans(torch.nn.Module):
        def forward(self, a, b, h0, scan=scan_parallel):
            return [scan(a, b, start, reverse) for start in (None, h0) for reverse in (False, True)]

    def slow(T):  # what a state was at one end is still felt at the other
        return 1 - torch.rand(1, T, 1).double() / T, torch.rand(1, T, 1).double(), torch.ones(1, 1).double()

    def export(most):
        length = {1: torch.export.Dim("T", min=2, max=most)}
        return torch.export.export(Scans(), slow(40), dynamic_shapes=(length, length, None), strict=False).module()
    for most, lengths in (70_000, (2, 63, 64, 65, 1009, 70_000)), (10_000_000, (2, 1009)):
        program = export(most)
        for inputs in map(slow, lengths):
            assert_close(program(*inputs), Scans()(*inputs, scan_sequential))
    assert_refused("no upper bound: give its torch.export.Dim a max", export, None, error=ValueError)


def model_with_short_export():
    model = VisionGRU(5, **SMALL)
    for stage in model.stages[1:]:
        stage[0].gru = torch.nn.Identity()  # the longest scans, of stage 1, are enough: each takes seconds
    return model


@pytest.mark.parametrize("make, sides, shapes", [
    pytest.param(model_with_short_export, (), [(1, 3, 32, 40), (5, 3, 32, 40)], id="one size"),
    pytest.param(model_with_short_export, ("height", "width"),  # 117 to 3,200 elements
                 [(1, 3, 33, 50), (2, 3, 40, 64), (3, 3, 97, 130), (1, 3, 256, 200)], marks=any_size, id="any size"),
    *(pytest.param(make, (), [(1, 3, 224, 224), (3, 3, 224, 224)], marks=pytest.mark.slow, id=f"{name} at 224_px")
      for name, make in {"nano": visiongru_nano, "tiny": visiongru_tiny,
                         "upernet": lambda: UPerNet(visiongru_nano(), 7, 64, 32)}.items())])
@process
def test_exported_models_run_in_onnxruntime_and_as_pt2_files_where_visiongru_is_unknown(make, sides, shapes, tmp_path):
    model, images, example = make().eval(), [torch.randn(shape) for shape in shapes], torch.randn(2, *shapes[1][1:])
    dynamic = {0: torch.export.Dim("batch")}
    dynamic |= {axis: torch.export.Dim(side, min=33, max=256) for axis, side in enumerate(sides, start=2)}
    program = torch.export.export(model, (example,), dynamic_shapes=(dynamic,), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(images, tmp_path / "images.pt")
    with subprocess.Popen([sys.executable, "-c", """if True:
            import sys, torch
            sys.modules["visiongru"] = None  # to import it is an error
            model = torch.export.load("model.pt2").module()
            torch.save([model(x) for x in torch.load("images.pt")], "logits.pt")
            assert "torchvision" not in sys.modules"""], cwd=tmp_path) as elsewhere:
        with torch.no_grad():
            expected = [model(x) for x in images]
        if importlib.util.find_spec("onnxruntime"):
            torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).save(tmp_path / "model.onnx")
    assert elsewhere.returncode == 0
    assert_close(torch.load(tmp_path / "logits.pt"), expected)
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for x, y in zip(images, expected):
        logits = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        assert logits.shape == y.shape and (logits - y).abs().max() < 1e-4 * y.std()


@pytest.mark.slow
def test_the_readmes_lines_on_compiling_and_exporting_run(tmp_path, monkeypatch):
    section = (HERE / "README.md").read_text().split("## Compile and export")[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(section.split("```python")[1].split("```")[0], names)
    program = torch.export.load("tiny.pt2").module()
    x = torch.randn(3, 3, 224, 224)
    assert_close(program(x), names["model"](x), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "tiny.onnx").stat().st_size > 1e6


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("amp, T, reverse", [(False, 36, False), (False, 36, True), (True, 36, True),
                                             (True, 3136, False)])  # bf16 has casts to fuse too
@process
def test_a_compiled_mingru_is_the_eager_one_in_few_kernels(amp, T, reverse):
    gru = MinGRU(4)
    x, h0 = torch.randn(2, T, 4, requires_grad=True), torch.rand(2, 8, requires_grad=True)
    results = []
    for network in (gru, torch.compile(gru, fullgraph=True, dynamic=False)):
        torch._inductor.metrics.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y, h = network(x, h0, reverse)
        forward = torch._inductor.metrics.generated_kernel_count
        loss = y.float().square().mean() + h.square().mean()
        results.append([y, h, *torch.autograd.grad(loss, [x, h0, *gru.parameters()])])
    for value, expected in zip(*results):
        scale = expected.detach().float().abs().max()
        # bf16's products and sums round to 8 bits, and not the same ones
        assert_close(value / scale, expected / scale, rtol=0, atol=2**-6 if amp else 1e-6)
    assert 0 < forward <= 14 and torch._inductor.metrics.generated_kernel_count <= 32


# load_weights ---------------------------------------------------------------------------------------------------------

def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def state_of(model, names="ours"):
    """A copy of the state dict of `model`, under our names or the release's."""
    keys = release_names(model) if names == "release" else model.state_dict()
    return {key: value.clone() for key, value in zip(keys, model.state_dict().values())}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "vig.", "backbone.", "backbone.vig.",
                                    "module._orig_mod.", "_orig_mod.module.vig."])
@pytest.mark.parametrize("names", ["ours", "release"])
def test_weights_load_with_any_prefix_and_leave_a_head_of_other_classes_alone_with_one_message(names, prefix, tmp_path):
    source, path = VisionGRU(5, **MICRO), tmp_path / "w.pth"
    state = {prefix + key: value for key, value in state_of(source, names).items()}
    torch.save(state, path)
    for given in (state, path, str(path)):
        assert same(load_weights(VisionGRU(5, **MICRO), given), source.state_dict())
    headless = {key: value for key, value in state.items() if not re.search(r"\b(head|fc)\.", key)}
    cases = [(state, "a classifier for 5 classes instead of 7"), (headless, "no classifier")]
    if prefix.startswith("backbone."):
        cases.append((headless | {"decode_head.conv_seg.weight": torch.zeros(3, 4, 1, 1)}, "no classifier"))
    for given, found in cases:
        model = VisionGRU(7, **MICRO)
        expected = state_of(source) | {key: value for key, value in state_of(model).items() if key.startswith("head.")}
        with pytest.warns(UserWarning, match=f"have {found}: head keeps its initial values") as caught:
            load_weights(model, given)
        assert len(caught) == 1 and same(model, expected)


@pytest.mark.parametrize("better", ["model", "ema"])
def test_of_a_checkpoint_the_better_of_model_and_ema_loads_and_of_an_averaged_model_its_state(better):
    averaged, model = torch.optim.swa_utils.AveragedModel(VisionGRU(5, **MICRO)), VisionGRU(5, **MICRO)
    states = {"model": VisionGRU(5, **MICRO).state_dict(), "ema": averaged.module.state_dict()}
    for source, expected in (({**states, "better": better, "epoch": 3}, better), (states, "ema"),
                             ({**states, "ema": None, "better": "model"}, "model"), (averaged.state_dict(), "ema"),
                             ({"model_state_dict": states["model"]}, "model")):
        assert load_weights(model, source) is model and same(model, states[expected])


def test_what_does_not_fit_and_files_that_hold_no_weights_are_named_and_change_nothing(tmp_path):
    model, state = VisionGRU(5, **MICRO), state_of(VisionGRU(5, **SMALL)) | {"extra.weight": torch.zeros(1)}
    before = state_of(model)
    with pytest.raises(ValueError, match=r"fit this VisionGRU\n *missing: stages.2.1(.|\n)* and \d+ more$") as error:
        load_weights(model, state)
    assert len(str(error.value)) < 1000
    for change, message in (({"extra.weight": torch.zeros(1)}, "unexpected: extra.weight"),
                            ({"stem.conv1.weight": torch.zeros(4, 3, 3)},
                             r"stem.conv1.weight has shape \(4, 3, 3\), expected \(4, 3, 3, 3\)")):
        assert_refused(message, load_weights, model, before | change, error=ValueError)
    torch.save({"a": 1}, tmp_path / "dict.pt")
    torch.save(torch.nn.Identity(), tmp_path / "pickle.pt")
    for name, error in (("dict.pt", ValueError), ("pickle.pt", ValueError), ("absent.pt", FileNotFoundError)):
        assert_refused(name, load_weights, model, tmp_path / name, error=error)
    assert same(model, before)


# UPerNet --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_upernets_decoder_computes_what_its_docstring_says():
    head = micro_upernet().double().eval().decode_head
    pools = [pool[1] for pool in head.psp_modules]
    for conv in (*pools, head.bottleneck, *head.lateral_convs, *head.fpn_convs, head.fpn_bottleneck):
        assert [type(layer).__name__ for layer in conv] == ["Conv2d", "BatchNorm2d", "ReLU"] and conv[0].bias is None
    m1, m2, m3, m4 = (torch.randn(1, *shape).double() for shape in ((8, 12, 20), (16, 6, 10), (32, 3, 5), (64, 2, 3)))

    def to(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear")
    pooled = [to(conv(F.adaptive_avg_pool2d(m4, grid)), m4) for conv, grid in zip(pools, (1, 2, 3, 6))]
    p4 = head.bottleneck(torch.cat([m4, *pooled], 1))
    p3 = head.lateral_convs[2](m3) + to(p4, m3)
    p2 = head.lateral_convs[1](m2) + to(p3, m2)
    p1 = head.lateral_convs[0](m1) + to(p2, m1)
    finest = [to(x, p1) for x in (*(conv(p) for conv, p in zip(head.fpn_convs, (p1, p2, p3))), p4)]
    assert_close(head([m1, m2, m3, m4]), head.conv_seg(head.fpn_bottleneck(torch.cat(finest, 1))))


def test_upernet_takes_a_classifier_as_backbone_alone_and_keeps_a_decoder_for_other_classes_with_two_messages():
    source, model, classifier = micro_upernet(5), micro_upernet(3), VisionGRU(9, **MICRO).state_dict()
    assert same(load_weights(micro_upernet().backbone, classifier), classifier)
    without_decoder = {key: value for key, value in state_of(source).items() if "decode_head.conv" not in key}
    for state, message in ((classifier, r"no decoder; for the backbone alone: load_weights\(model.backbone"),
                           (without_decoder, "missing: decode_head.conv_seg.weight")):
        assert_refused(message, load_weights, model, state, error=ValueError)
    heads = {key: value for key, value in state_of(model).items() if "conv_seg." in key}
    with pytest.warns(UserWarning, match="5 classes instead of 3") as caught:
        load_weights(model, source.state_dict())
    assert len(caught) == 2 and same(model, source.state_dict() | heads)


def test_the_authors_segmentation_checkpoints_load_into_upernet_and_its_backbone():
    source = micro_upernet()
    keys = [f"backbone.vig.{key}" for key in release_names(source.backbone)]
    keys += [re.sub(r"(psp_modules\.\d\.1|bottleneck|_convs\.\d|head\.convs\.0)\.([01])\.",
                    lambda m: f"{m[1]}.{('conv', 'bn')[int(m[2])]}.", key)
             for key in source.state_dict() if not key.startswith("backbone.")]
    assert {"decode_head.psp_modules.3.1.conv.weight", "decode_head.fpn_bottleneck.bn.running_var",
            "auxiliary_head.convs.0.conv.weight", "decode_head.lateral_convs.2.bn.bias"} <= set(keys)
    state = dict(zip(keys, source.state_dict().values(), strict=True))
    for more in ({}, {"backbone.vig.fc.weight": torch.zeros(1000, 64)}):  # a classifier: of no use, and no harm
        assert same(load_weights(micro_upernet(), {"state_dict": state | more}), source.state_dict())
        assert same(load_weights(micro_upernet().backbone, {"state_dict": state | more}), source.backbone.state_dict())


# Data: the built-in sets and the order of images ----------------------------------------------------------------------

def test_a_built_in_image_depends_on_its_index_alone_and_its_mask_shows_the_shape():
    for kind, first, second in (train.Shapes, "train", "val"), (segment.Scenes, "training", "validation"):
        image, again, other = (kind(*given)[7][0] for given in ((first, 20), (first, 500), (second, 20)))
        assert image.tobytes() == again.tobytes() != other.tobytes()
    for shape in range(len(train.SHAPES)):
        image, mask = train.draw_scene([shape], 64, torch.Generator().manual_seed(shape))
        assert image.shape == (3, 64, 64) and image.dtype == mask.dtype == torch.uint8
        assert set(mask.unique().tolist()) == {0, shape + 1} and 0.01 < (mask > 0).float().mean() < 0.6
        assert image[:, mask > 0].float().mean() > image[:, mask == 0].float().mean() + 30


def test_reproducible_epochs_have_each_image_once_in_an_order_of_the_seed():
    class Noisy(list):
        def __getitem__(self, index):
            return index, torch.rand(()).item()
    stream = train.Stream(Noisy(range(5)), seed=1)
    items = [stream[position] for position in range(15)]
    for epoch in range(3):
        assert sorted(index for index, _ in items[5 * epoch:5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert len({chance for _, chance in items}) == 15 and items[:5] != items[5:10]
    assert [stream[position] for position in reversed(range(15))] == items[::-1]
    assert [train.Stream(Noisy(range(5)), seed=2)[position] for position in range(15)] != items


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_with_their_neighbour_and_labels_in_the_same_proportion(kind):
    args = train.parse_arguments(["--data", "x", "--mixup", "0", "--cutmix", "0", "--reprob", "0", f"--{kind}", "1"])
    images, shares = torch.arange(4.).view(4, 1, 1, 1).expand(4, 3, 20, 20), set()
    for step in range(5):
        mixed, labels = train.augment_batch(images, torch.arange(4), 0, step, 4, args)
        for i, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
            share = labels[i, i].item()
            assert labels[i, partner] == pytest.approx(1 - share, abs=1e-6)
            assert mixed[i].mean().item() == pytest.approx(share * i + (1 - share) * partner, abs=1e-5)
            shares.add(round(share, 5))
    assert mixed.shape == (4, 3, 20, 20) and labels.shape == (4, 4) and len(shares) > 3  # by the step


def test_random_erasing_fills_a_rectangle_with_noise_in_the_share_of_images_asked_for():
    images = torch.full((400, 3, 40, 60), 9.0)
    erased = train.random_erasing(images, 0.25, 0, seed=1)
    masks = [image.ne(9).any(0) for image in erased if image.ne(9).any()]
    assert 70 < len(masks) < 130 and torch.equal(train.random_erasing(images[:50], 0.25, 100, 1), erased[100:150])
    for mask in masks:
        (height, width), area = (mask.any(side).sum().item() for side in (1, 0)), mask.sum().item()
        assert area == height * width and 0.01 < area / 2400 < 0.36 and 0.25 < height / width < 4
    noise = erased[erased.ne(9)]
    assert abs(noise.mean()) < 0.1 and 0.9 < noise.std() < 1.1


def test_options_default_to_the_papers_recipes():
    args, seg_args = (vars(module.parse_arguments(["--data", "somewhere"])) for module in (train, segment))
    assert args == args | dict(model="tiny", img_size=224, val_resize=256, epochs=300, batch_size=1024, lr=1e-3,
                               warmup_epochs=20, weight_decay=0.05, opt_betas=[0.9, 0.999], randaug=[2, 9], reprob=0.25,
                               mixup=0.8, cutmix=1.0, smoothing=0.1, model_ema_decay=0.9999, drop_path=0.0,
                               crop_scale=0.08)
    assert seg_args == seg_args | dict(
        model="tiny", channels=512, aux_channels=256, iters=160_000, batch_size=16, lr=6e-5, weight_decay=0.01,
        warmup_iters=1500, crop_size=512, short_side=512, scale=[0.5, 2.0], zero_is_ignore=True, ignore_label=255)
    assert train.parse_arguments(["--data", "somewhere", "--batch-size", "4096"]).lr == 4e-3
    assert [train.warmup_cosine(step, 300, 20) for step in (0, 10, 20, 160, 300)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    lr = [segment.warmup_linear(step, 160_000, 1500) for step in (0, 750, 1500, 80_750, 160_000)]
    assert lr == pytest.approx([1e-6, 0.5, 1, 0.5, 0], abs=1e-6)
    model = micro_upernet()
    decayed, free = ({id(p): group["weight_decay"] for p in group["params"]}
                     for group in segment.parameter_groups(model, 0.01))
    norms = {id(p) for module in model.modules() for p in module.parameters()
             if type(module).__name__ in ("LayerNorm", "BatchNorm2d")}
    assert free == dict.fromkeys(norms, 0) and len(norms) == 2 * (2 * 5 + 2 + 3 + 12 + 1)
    assert decayed == dict.fromkeys({id(p) for p in model.parameters()} - norms, 0.01)


# Segmentation: label maps, crops, scores ------------------------------------------------------------------------------

def write_labelled(root, split, name, rows, image=None, mode=None):
    """An image NAME.jpg and its label map NAME.png, of these rows."""
    rows = torch.as_tensor(rows)
    labels = Image.fromarray(rows.to(torch.uint16 if rows.max() > 255 else torch.uint8).numpy()).convert(mode)
    paths = root / "images" / split / f"{name}.jpg", root / "annotations" / split / f"{name}.png"
    for path, file in zip(paths, (image or Image.new("RGB", labels.size), labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        file.save(path, quality=95)


def labels(rows, mode=None):
    return lambda root: write_labelled(root, "training", "a", rows, mode=mode)


def files(**texts):
    return lambda root: [(root / f"{name}.txt").write_bytes(text) for name, text in texts.items()]


ROWS, FROM_1 = [[0, 1, 2, 3], [3, 2, 1, 255]], [[255, 0, 1, 2], [2, 1, 0, 255]]
THREE, LABELS, IMAGE = "--num-classes 3", "annotations/training/a.png", "images/training/a.jpg"
ADE20K = b"Idx\tRatio\tTrain\tVal\tName\n1\t0.16\t9\t1\twall\n2\t0.11\t8\t1\tbuilding, edifice\n"


@pytest.mark.parametrize("change, words, expected", [  # what is read of the labels or the classes, or the error
    (labels(ROWS), "--num-classes 3", FROM_1),                    # ADE20K: 0 is other, the rest move down
    (labels(ROWS, "P"), "--num-classes 3", FROM_1),               # a palette's numbers, not its colours
    (labels(ROWS), "--num-classes 4 --no-zero-is-ignore", ROWS),  # counted from 0
    (labels([[0, 2, 3, 1]]), "--num-classes 3 --no-zero-is-ignore --ignore-label 3", [[0, 2, 255, 1]]),
    (labels([[0, 255]]), "--num-classes 2", "have no class besides ignored pixels.*--no-zero-is-ignore"),
    (labels([[0, 255]]), "--num-classes 2 --no-zero-is-ignore", "have only 'label 0' besides"),
    (labels([[0, 1]]), "--num-classes 2", "have only 'label 1' besides"),
    (lambda root: ((root / LABELS).rename(root / LABELS.replace("a.png", "0.png")),  # one that several images share
                   (root / LABELS).symlink_to("0.png")), THREE, FROM_1),
    (labels(ROWS), "--num-classes 2", "a.png has a pixel of label 3; expected 1 to 2, or 0 or 255 to ignore it"),
    (labels([[7, 300]]), "--num-classes 150", "a.png has a pixel of label 300; expected 1 to 150"),
    (labels(ROWS, "RGB"), "--num-classes 3", "cannot read the label map .*a.png: it has the channels .*; expected one"),
    (lambda root: shutil.rmtree(root / "images/training"), "--num-classes 3", "No such file or .*'.*images/training'"),
    (lambda root: (root / IMAGE).unlink(), THREE, "images/training has no images in it"),
    (lambda root: (root / LABELS).rename(root / LABELS.replace("png", "jpg")), THREE,  # in a JPEG labels are blurred
     "a.jpg has no label map a.png in .*annotations/training$"),
    (lambda root: (root / LABELS).write_bytes(b"none"), THREE, "cannot read the label map .*a.png"),
    # Of these PIL's numbers are others than the file's.
    (lambda root: (root / LABELS).write_bytes(header(4, 1, 2, 0, b"\0\x1b")), THREE, "a.png: PIL does not read .*L;2"),
    (lambda root: (root / LABELS).write_bytes(b"P5 4 1 3\n\0\1\2\3"), THREE, "a.png: PIL does not read .*ppm"),
    (lambda root: Image.new("F", (4, 2), 1.9).save(root / LABELS, "TIFF"), THREE, "a.png: PIL does not .*F;32F"),
    (lambda root: Image.new("L", (16, 9)).save(root / LABELS, "TIFF", compression="jpeg"), THREE,
     "a.png: PIL does not read this pixel format"),
    (lambda root: shutil.copy(root / IMAGE, root / "images/training/a.webp"), THREE, "a.jpg and .*a.webp differ"),
    (lambda root: Image.new("L", (5, 2)).save(root / IMAGE), THREE, "a.png is 4 x 2 pixels and .*a.jpg 5 x 2"),
    (files(), "", "how many classes are there"),
    (files(), "--num-classes 2", ["label 1", "label 2"]),
    (files(objectInfo150=ADE20K), "", ["wall", "building, edifice"]),
    (files(objectInfo150=ADE20K, classes=b"sky\nroad\n\ncar\n"), "", ["sky", "road", "car"]),
    (files(classes=b"a\nb\nc"), "--num-classes 2", "classes.txt has 3 names, 3 of them distinct; expected 2 dis"),
    (files(classes=b"sky\nsky\n"), "", "classes.txt has 2 names, 1 of them distinct; expected 1 to 254 dis"),
    (files(classes="\ufeffciel\n\u00e9tang\n".encode()), "", ["ciel", "\u00e9tang"]),  # by Windows' editor
    (files(classes=b"sky\xff"), "", "cannot read .*classes.txt, text in UTF-8: 'utf-8' codec can't decode")])
def test_labels_and_class_names_are_read_by_the_rule_asked_for_or_the_fault_is_named(change, words, expected, tmp_path):
    write_labelled(tmp_path, "training", "a", ROWS)
    change(tmp_path)
    args = segment.parse_arguments(["--data", str(tmp_path), *words.split()])
    with pytest.raises(train.UserError, match=expected) if isinstance(expected, str) else contextlib.nullcontext():
        if isinstance(expected, list) and isinstance(expected[0], str):
            assert segment.class_names(args) == expected
        else:
            assert segment.open_data(args, ["training", "training"])[0][0][1].tolist() == expected


def crops(mask, factor, count, *more):
    """Training crops of a picture that shows its mask, and for each the number of those that were tried."""
    transform, tries = segment.TrainTransform(segment.parse_arguments([
        "--data", "x", "--crop-size", "32", "--scale", "1", "1", "--distort", "0", *map(str, more)])), []
    transform.crop.register_forward_hook(lambda *_: tries.append(1))
    for _ in range(count):
        tries.clear()
        yield *transform(v2.functional.to_pil_image(mask[None].expand(3, -1, -1) * factor), mask), len(tries)


def test_of_ten_crops_the_first_without_a_class_of_more_than_75_percent_is_taken_and_flipped():
    fits, mask = [], torch.zeros(32, 120, dtype=torch.uint8)
    mask[:, 100:] = 1  # a crop must begin at 76 or further right to have at least a quarter of each
    for x, y, tries in crops(mask, 200, 60, "--hflip", 1):
        assert x.shape == (3, 32, 32) and x.dtype == torch.uint8 and y.shape == (32, 32)
        assert torch.equal(x[0] > 0, y == 1) and y[0, 0] >= y[0, -1]  # cut alike, and both flipped
        fits.append(0.25 <= (y == 1).float().mean() <= 0.75)
        assert fits[-1] or tries == 10
    assert sum(fits) > 30  # by chance alone it were 9
    halves = torch.full((32, 32), 255, dtype=torch.uint8)
    halves[:2], halves[2:4] = 0, 1
    for special, expected in ((mask * 0 + 255, 10), (mask * 0, 10), (halves, 1)):  # what is ignored does not count
        for _, y, tries in crops(special, 1, 2):
            assert y.unique().tolist() == special.unique().tolist() and tries == expected


def test_images_for_training_have_the_size_of_crops_and_for_validation_the_shorter_side():
    mask = torch.arange(4, dtype=torch.uint8).repeat_interleave(5).expand(20, 20).contiguous()
    seen = set()
    for x, y, _ in crops(mask, 60, 20, "--short-side", 32, "--scale", 1, 0.5, "--distort", 1):
        assert x.shape == (3, 32, 32) and type(x) is type(y) is torch.Tensor
        seen |= set(y.unique().tolist())
    assert seen == {0, 1, 2, 3, 255}  # small ones are filled up with what is ignored; labels are not blurred
    x, y = segment.eval_transform(40)(Image.new("RGB", (20, 20)), mask)
    assert x.shape == (3, 40, 40) and y is mask  # the score is taken at the label map's own size
    for size, short, expected in (((683, 512), 512, (512, 683)), ((480, 360), 512, (512, 683)),
                                  ((5000, 1000), 512, (410, 2048)), ((3000, 1), 64, (1, 256)),
                                  ((1, 3000), 64, (256, 1)), ((1, 1), 64, (64, 64))):  # the longer up to four times it
        assert segment.eval_transform(short)(Image.new("RGB", size)).shape[1:] == expected
    sides = [min(segment.ShorterSide(20, 40)(Image.new("RGB", (50, 70))).size) for _ in range(200)]
    assert min(sides) in (20, 21) and max(sides) in (39, 40) and 28 < sum(sides) / 200 < 32


def test_scores_of_a_confusion_matrix_worked_out_by_hand():
    #           taken for  a  b  c  d
    confusion = torch.tensor([[6, 2, 0, 2],     # a: 10 pixels, 6 right
                              [1, 3, 0, 0],     # b: 4 pixels, 3 right
                              [0, 0, 0, 0],     # c: none, and none predicted: it counts nowhere
                              [0, 0, 0, 0]], dtype=torch.float64)  # d: none, but predicted: its IoU counts as 0
    result = segment.scores(confusion, "abcd")
    assert result["iou"] == {"a": pytest.approx(600 / 11), "b": pytest.approx(300 / 6), "c": None, "d": 0}
    assert result["acc"] == {"a": pytest.approx(60), "b": pytest.approx(75), "c": None, "d": None}
    assert [result[name] for name in ("miou", "mean_acc", "pixel_acc")] == pytest.approx(
        [(600 / 11 + 50 + 0) / 3, (60 + 75) / 2, 900 / 14])
    assert segment.score_table(result).splitlines()[-2:] == ["c          -      -", "d       0.00      -"]


class Oracle(torch.nn.Module):
    """Reads the class of a pixel, one of four, from its red channel."""
    num_classes = 4

    def forward(self, x):
        return F.one_hot(x[:, 0].round().long().clamp(0, 3), 4).permute(0, 3, 1, 2).float()


def test_evaluation_counts_each_known_pixel_once_at_the_label_maps_size_and_windows_cover_every_pixel():
    def evaluated(*masks):
        return segment.evaluate(Oracle(), [(image, mask) for mask in masks], train.Distributed(), lambda images: images)
    mask = torch.randint(0, 4, (1, 37, 50), dtype=torch.uint8)
    image = mask.float().expand(1, 3, -1, -1).clone()
    image[..., 0, :10] = (image[..., 0, :10] + 1) % 4  # ten mistakes
    mask[:, 1] = 255
    confusion = evaluated(mask, mask)
    assert confusion.sum() == 2 * 36 * 50 and confusion.sum() - confusion.diag().sum() == 20
    thrice = mask.repeat_interleave(3, 1).repeat_interleave(3, 2)  # the image's size
    assert evaluated(thrice).sum() == 9 * 36 * 50
    assert_refused("all pixels of the validation set are ignored", evaluated, mask * 0 + 255)
    logits = torch.randn(1, 7, 4, 3)  # the argmax is that of the enlarged logits
    assert torch.equal(segment.label_map(*logits, (9, 8)), F.interpolate(logits, (9, 8), mode="bilinear").argmax(1)[0])
    for height, width in ((10, 40), (64, 64), (65, 97), (150, 33)):
        image = torch.randint(0, 4, (1, 3, height, width)).float()
        for window in (0, 32, 64):
            assert torch.equal(segment.class_logits(Oracle(), image, window), Oracle()(image)[0])
    model, seen = Oracle(), []
    model.register_forward_hook(lambda _, inputs, y: seen.append(inputs[0].shape) or torch.full_like(y, len(seen)))
    logits = segment.class_logits(model, torch.zeros(1, 3, 32, 53), window=32)
    assert seen == [(1, 3, 32, 32)] * 2  # columns 0-31 and 21-52: the mean over the third of each that is in both
    assert logits[0, 0].tolist() == [1] * 21 + [1.5] * 11 + [2] * 21


def test_the_loss_is_a_mean_over_all_pixels_and_none_of_a_crop_without_labels():
    logits, masks = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 4, 4))
    masks[0] = 255
    by_hand = -logits.log_softmax(1).gather(1, masks.clamp(max=2)[:, None])[1].sum() / 32
    assert_close(segment.segmentation_loss((logits, logits), masks), 1.4 * by_hand)
    data = type("Data", (list,), {"classes": "abc"})([(None, torch.tensor([0] * 99 + [255] * 9 + [1] * 24))])
    weights = segment.balanced_weights(data, 0.5)
    assert_close(weights, torch.tensor([0.1, 0.2, 1.0]) * 126 / (100 * 0.1 + 25 * 0.2 + 1))
    scaled = segment.segmentation_loss((logits, logits), masks.clamp(min=2), weights)  # class 2 and ignored alone
    assert_close(scaled, weights[2] * segment.segmentation_loss((logits, logits), masks.clamp(min=2)))
    nothing = segment.segmentation_loss((logits, logits), torch.full_like(masks, 255))
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().max() == 0


@process
def test_the_scripts_compile_parts_of_one_shape_once_and_validate_without(monkeypatch, capsys):
    plain = torch.nn.Module.compile  # autograd's part of it takes time; for all but the head it is tested elsewhere
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **kw: plain(
        part, backend="aot_eager" if isinstance(part, FCNHead) else "eager", **kw))
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    stats.clear()
    eager, compiled = (UPerNet(VisionGRU(5, 8, (2, 2, 2, 2)), 4, 8, 8) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    train.compile_parts(compiled, print)
    assert "13 parts" in capsys.readouterr().out
    x, results = torch.randn(2, 3, 32, 32), []
    for model in (eager, compiled):
        torch.manual_seed(1)  # the decoder's dropout
        logits, auxiliary = model(x)
        results.append([logits, *torch.autograd.grad((logits + auxiliary).square().mean(), list(model.parameters()))])
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert stats["unique_graphs"] == 9  # a stem, a block for each stage, three downsamplings, the auxiliary head
    loader = [(torch.randn(1, 3, 40, 72), torch.zeros(1, 40, 72).byte())]
    segment.evaluate(compiled, loader, train.Distributed(), lambda images: images)
    assert stats["unique_graphs"] == 9


# Whole runs of both scripts, on small pictures in three colours -------------------------------------------------------

def picture_folder(root, train_classes, val_classes):
    """A data set of so many pictures of each class, which has a colour. After the 17th they come again."""
    for split, classes in (("train", train_classes), ("val", val_classes)):
        (root / split).mkdir(parents=True)
        for k, (name, count) in enumerate(classes.items()):
            (root / split / name).mkdir()
            for i in range(count):
                chance = torch.Generator().manual_seed(100 * k + i % 17)
                pixels = torch.randint(0, 150, (40, 36, 3), generator=chance, dtype=torch.uint8)
                pixels[..., k] += 100
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"), dict(ant=17, bee=17, cat=17), dict(ant=5, bee=4, cat=4))


@pytest.fixture(scope="session")
def streets(tmp_path_factory):
    """Images in which a pixel's colour says its class; 9 to train on and 5, of several sizes, to validate."""
    root = tmp_path_factory.mktemp("streets")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    for split, i in [*(("training", i) for i in range(9)), *(("validation", i) for i in range(5))]:
        generator = torch.Generator().manual_seed(i)
        height, width = (40, 48) if split == "training" else (40 + 8 * i, 48 + 5 * i)
        edges = torch.randint(8, 20, (2,), generator=generator)
        classes = torch.bucketize(torch.arange(width), edges.cumsum(0)).repeat(height, 1)
        pixels = F.one_hot(classes, 3) * 150 + torch.randint(0, 100, (height, width, 3), generator=generator)
        classes[:2] = -1
        write_labelled(root, split, i, classes + 1, Image.fromarray(pixels.to(torch.uint8).numpy()))
    return root


def arguments(data, out, *more, recipe="--img-size 32 --epochs 2 --batch-size 8 --warmup-epochs 0.5 "
                                       "--model-ema-decay 0.9"):
    shared = "--model nano --lr 1e-3 --drop-path 0.2 --device cpu --workers 0"
    return [str(word) for word in ("--data", data, "--out", out, *shared.split(), *recipe.split(), *more)]


seg_arguments = functools.partial(arguments, recipe="--channels 16 --aux-channels 8 --crop-size 32 --short-side 40 "
                                                    "--iters 6 --eval-every 3 --warmup-iters 2 --batch-size 4")


def started(command):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen([*map(str, command)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def torchrun(processes, *words, name="train.py", options=("--standalone",)):
    """The command that runs a script, with the model that it has for users, in so many processes."""
    launcher = "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *options
    return [sys.executable, *launcher, HERE / name, *words]


def end_of(process):
    """What a process that ends well has printed."""
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return stdout + stderr


START_METHOD = multiprocessing.get_start_method()
FORKS = multiprocessing.get_context("forkserver")  # processes forked from one that has imported all this
FORKS.set_forkserver_preload([__name__])


def forked(main, words):
    """A script, main(words), in a process of its own, without the seconds that its imports would take."""
    (stdout, to_stdout), (stderr, to_stderr) = FORKS.Pipe(False), FORKS.Pipe(False)
    process = FORKS.Process(target=run_forked, args=(main, words, to_stdout, to_stderr))
    process.start()
    to_stdout.close(), to_stderr.close()
    process.stdout, process.stderr = (open(os.dup(pipe.fileno())) for pipe in (stdout, stderr))
    process.poll = lambda: process.exitcode  # as of subprocess.Popen
    return process


def run_forked(main, words, stdout, stderr):
    os.dup2(stdout.fileno(), 1), os.dup2(stderr.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for its background jobs,
    train.STOP_SIGNALS[:] = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # and nohup the last of these
    multiprocessing.set_start_method(START_METHOD, force=True)  # of data-loading workers
    train.run_main(lambda: main(words))


def history(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def runs(pictures, streets, tmp_path_factory):
    """For each script the folder of a run left alone, with the whole recipe: every kind of randomness is on."""
    outs = {module: tmp_path_factory.mktemp(module.__name__) / "run" for module in (train, segment)}
    assert train.main(arguments(pictures, outs[train])) == segment.main(seg_arguments(streets, outs[segment])) == 0
    return outs


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture(params=[train, segment], ids=["train", "segment"])
def module(request):
    """Both scripts, unless the test chooses."""
    return request.param


@pytest.fixture
def words(module, pictures, streets, out):
    """The arguments of such a run of the script `module`, to which a test adds its own."""
    return functools.partial(*{train: (arguments, pictures), segment: (seg_arguments, streets)}[module], out)


# A model that trains in a moment, in place of every one that the scripts know in this process and forked ones.
micro_model = functools.partial(VisionGRU, dim=8, depths=(1, 1, 1, 1))
train.MODELS.update(dict.fromkeys(train.MODELS, micro_model))


@process
def test_a_run_learns_and_leaves_a_log_checkpoints_and_a_command(module, words, out, monkeypatch, capsys):
    clock = itertools.count(0, 25)  # seconds from one look to the next
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    assert train.peak_memory(torch.device("cpu")) == {}
    monkeypatch.setattr(torch.cpu, "max_memory_allocated", lambda: 3 * 2**29, raising=False)  # as accelerators have
    steps, gently, classes, keys = {
        train: ([6, 12, 18, 24, 30, 36], "--epochs 6 --lr 4e-3 --mixup 0 --cutmix 0 --randaug 0 0 --reprob 0",
                ["ant", "bee", "cat"], {"top1", "top5", "ema_top1", "ema_top5"}),
        segment: ([25, 50], "--iters 50 --eval-every 25 --lr 4e-3 --distort 0 --batch-size 8 --grad-accum-steps 2 "
                  "--save-every 7 --slide", ["red", "green", "blue"], {"miou", "mean_acc", "pixel_acc"})}[module]
    monkeypatch.chdir(out.parent)  # where the scripts are not
    assert module.main(words("--drop-path", 0, *gently.split())) == 0
    assert [(number, signal.getsignal(number)) for number, _ in HANDLERS] == HANDLERS
    printed, log, best = capsys.readouterr().out, history(out), train.load_checkpoint(out / "best.pt")
    assert [entry["step"] for entry in log] == steps and keys | {"loss", "lr", "images_per_s"} <= log[0].keys()
    assert all(entry["GiB"] == 1.5 for entry in log)
    if module is train:
        assert [entry["epoch"] for entry in log] == [1, 2, 3, 4, 5, 6] and max(entry["top1"] for entry in log) > 90
        better = load_weights(micro_model(num_classes=3), best[best["better"]])
        assert same(load_weights(micro_model(num_classes=3), out / "best.pt"), better.state_dict())
    else:
        assert best["best"] == max(entry["miou"] for entry in log) > 80
        assert list(log[0]["iou"]) == list(log[0]["acc"]) == classes
    assert best["config"]["classes"] == classes and best["config"]["model"] == "nano" and "optimizer" not in best
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    told = re.findall(rf"^step (\d+) of {steps[-1]}: loss \d\.\d+, lr .* images/s$", printed, re.MULTILINE)
    assert 1 < len(told) < steps[-1] and [*map(int, told)] == sorted({*map(int, told)})  # once in a minute
    _, script, *command = printed.splitlines()[-1].split()
    assert script == module.__file__ and command[0] == "--eval" and ("--slide" in command) == (module is segment)
    assert module.main([*command, "--device", "cpu"]) == 0
    assert f"{best['best']:.2f}" in printed.splitlines()[-2] and f"{best['best']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("module, more, prefix", [
    (train, "--epochs 1 --weights", ""), (segment, "--iters 1 --backbone-weights", "backbone.")])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_fine_tuning_in_fp16_or_bf16_starts_from_a_classifier(module, more, prefix, amp, words, out, tmp_path, capsys):
    torch.manual_seed(1)  # not the run's, from which it would have the same weights
    start, weights = micro_model(num_classes=10).state_dict(), tmp_path / "ten.pt"
    torch.save(start, weights)
    assert module.main(words("--amp", amp, "--lr", 0, *more.split(), weights)) == 0
    said = capsys.readouterr().out.count("a classifier for 10 classes instead of 3")
    assert said == (module is train) and math.isfinite(history(out)[0]["loss"])
    last = train.load_checkpoint(out / "last.pt")
    assert bool(last["scaler"]) == (amp == "fp16")
    assert all(torch.equal(last["model"][prefix + name], start[name]) for name in start if not name.startswith("head."))
    weights.unlink()  # a resumed run has weights of its own, and the model's size
    again = words("--amp", amp, "--lr", 0, *more.split(), weights, "--resume", "auto")
    at = again.index("--model")
    assert module.main(again[:at] + again[at + 2:]) == 0


@process
def test_distributed_validation_of_an_odd_number_of_images_is_that_of_one_process(streets, out, monkeypatch, capsys):
    monkeypatch.setitem(train.MODELS, "nano", visiongru_nano)
    more = "--batch-size", 8, "--grad-accum-steps", 2, "--slide", "--lr", 0.01
    printed = end_of(started(torchrun(2, *seg_arguments(streets, out, *more), name="segment.py")))
    assert printed.count("step      3/6") == 1 and train.load_checkpoint(out / "last.pt")["step"] == 6
    words = ["--eval", "--slide", "--weights", str(out / "last.pt"), "--data", str(streets), "--device", "cpu"]
    assert segment.main(words) == 0
    by_one = capsys.readouterr().out
    assert f"{segment.summary(history(out)[-1])} (5 images)" in by_one and "red" in by_one


# -k options: the user's mistakes --------------------------------------------------------------------------------------

def test_folders_give_each_image_once_and_none_that_is_hidden_and_say_what_they_leave_out(tmp_path, capsys):
    root = picture_folder(tmp_path, dict(a=2, b=1), dict(a=1, b=1)) / "train"
    for name, target in ("self", "."), ("same", "."), ("up", "../.."), ("c.png", "0.png"), ("../b/a", "../a"):
        (root / "a" / name).symlink_to(target)
    for name in "a/.hidden.png", ".ipynb_checkpoints/d.png", "a/camera.jfif", "b/deep/a.gif", "loose.png", "a/text.txt":
        (root / name).parent.mkdir(exist_ok=True)
        two_colours("RGB").save(root / name, "PNG")
    args, split = train.parse_arguments(["--data", str(tmp_path)]), ["train"]
    images = [(str(Path(path).relative_to(root)), label) for path, label in train.open_data(args, split)[0].samples]
    assert images == [("a/0.png", 0), ("a/1.png", 0), ("a/camera.jfif", 0), ("b/0.png", 1), ("b/deep/a.gif", 1)]
    notes = "note: 1 .*a/text.txt\nnote: 1 .*skipped, the same file as another: .*a/c.png\nnote: 1 .*/loose.png\n"
    assert re.fullmatch(notes, capsys.readouterr().out)
    for make in os.mkfifo, lambda path: path.symlink_to("absent"):
        make(bad := root / "a" / "x.png")
        assert_refused("a/x.png is a pipe, a device or a broken link; expected a file", train.open_data, args, split)
        assert_refused("cannot read the image .*a/x.png: ", train.read_image, bad)
        bad.unlink()


def test_options_that_let_a_run_learn_little_are_noted(pictures, out, tmp_path, monkeypatch, capsys):
    weights, config = tmp_path / "weights.pt", {"classes": ["ant", "fly", "cat"]}
    torch.save({"model": micro_model(num_classes=3).state_dict(), "config": config}, weights)
    more = "--batch-size", 64, "--epochs", 1, "--weights", weights
    clock = itertools.count(0, 100)
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    assert train.main(arguments(pictures, out, *more)) == 0
    notes = [
        f"{weights}: its classifier is kept, though the classes differ ('fly' where the data has 'bee')",
        "note: the learning rate never exceeds 0.00e+00 in this run of 1 steps: is the warm-up too long",
        "note: --batch-size 64 is more than the 51 training images", "step 1 of 1: loss 1."]
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(note) for line in lines) for note in notes)


def test_names_are_escaped_for_the_terminal_and_quoted_for_the_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    evil, folder = "a\x1b]0;b\x07\x1b[2J\n\u202e", tmp_path / "b ;$(touch c)'d"
    data, out = picture_folder(folder / "data", {evil: 8, "b": 8}, {evil: 1, "b": 1}), folder / "run"
    (data / "train" / evil / "0.png").rename(data / "train" / evil / os.fsdecode(b"\xe9.png"))  # not UTF-8
    assert train.main(arguments(data, out, "--epochs", 1)) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:5] == ["python", "train.py", "--eval", "--weights", str(out / "best.pt")]
    assert train.main(["--predict", f"{data}/val/{evil}/0.png", evil, "--weights", command[4], "--device", "cpu"]) == 2
    printed = "".join(capsys.readouterr())
    assert not re.search("[\x07\x1b\u202e]", printed) and printed.count(r"a\x1b]0;b\x07\x1b[2J\n\u202e") == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_stop_the_run_with_their_path(workers, out, tmp_path, capsys):
    data = picture_folder(tmp_path / "data", {"a": 8, "b": 8}, {"a": 1, "b": 1})
    (data / "train" / "b" / "3.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="2"):
        train.run_main(lambda: train.main(arguments(data, out, "--workers", workers)))
    assert re.fullmatch("error: cannot read the image .*3.png: .*\n", capsys.readouterr().err)


BACKBONE, TRAINED, SEGMENTED = "{finished}/best.pt", "--resume {finished}/last.pt", "--resume {segmented}/last.pt"
FOLDERS = {  # by the names in the table below: how many pictures of each class there are to train on and to validate
    "two": (dict(ant=9, bee=9), dict(ant=1, bee=1)), "three": (dict(ant=9, bee=9, cat=9), dict(ant=1, bee=1, cat=1)),
    "none": ({}, {}), "no_b": (dict(a=4, b=0), dict(a=1, b=1)), "one": (dict(train=9), dict(train=9)),
    "others": (dict(a=9, b=9), dict(a=1, c=1)), "no_val": (dict(a=9, b=9), dict(a=0, b=0)),
}


@pytest.mark.parametrize("module, more, message", [  # `more` follows the arguments of a run, or "only"
    (train, "--data absent", r"expected \{train,val\}/<class>/<images> in it: .*absent/train"),
    (train, "--data {none}", r"expected \{train,val\}/<class>/<images> in it: there are no images in train"),
    (train, "--data {no_b}", "there are no images in b"),
    (train, "--data {one}", "train is the only class; are the class folders inside it"),
    (train, "--data {others}", "different classes .*; in one of them only: b, c"),
    (train, "--data {no_val}", "there are no images in val"),
    (train, "--grad-accum-steps 3",
     r"--batch-size 8: expected a multiple of 6, 1 process\(es\) x 3 micro-batch\(es\) x 2"),
    (train, "--device cuda:99", "--device cuda:99: "),
    (train, "--lr nan", "--lr: expected a number of at least 0, not 'nan'"),
    (train, "--weights absent.pt", "cannot open the checkpoint absent.pt: No such file"),
    (train, f"--resume {BACKBONE}", "only weights.*; resume a last.pt, or start a new run with --weights"),
    (train, f"{TRAINED} --seed 3", "seed was 0 and is now 3.*; keep it, or start a new run with --weights"),
    (train, TRAINED + " --data {two}", "trained on 3 classes and the data has 2"),
    (train, TRAINED + " --data {three}", "train-images was 51 and is now 27"),
    (train, f"only --eval --weights {BACKBONE} --data {{two}} --device cpu", "on 3 classes and the data has 2"),
    (train, "only --eval --device cpu", "need a checkpoint: --weights FILE"),
    (train, "only --eval --weights x --lr 1", "--lr: has no effect with --eval"),
    (train, "only --predict x.png --weights {segmented}/best.pt", "best.pt has no classifier"),
    (segment, "--batch-size 4 --grad-accum-steps 4", "a micro-batch would be one image, and BatchNorm needs two"),
    (segment, "--weights a --backbone-weights b", "--weights and --backbone-weights: give one of the two"),
    (segment, f"--weights {BACKBONE}", "have no decoder"),
    (segment, TRAINED, "last.pt was trained on other classes than the data's: 'ant' where it has 'red'"),
    (segment, f"{SEGMENTED} --no-zero-is-ignore", "last.pt: zero-is-ignore was True and is now False"),
    (segment, f"only --predict x --weights {BACKBONE}", "has no decode_head.conv_seg.weight; expected a check"),
    (segment, "only --predict a/1.jpg b/1.jpg --weights {segmented}/best.pt", "a/1.jpg and b/1.jpg would be written"),
    (segment, "only --num-classes 3", "--num-classes"),  # without --data
    (train, "--data {three} --out {three}/train/run", "--out .*/three/train/run is inside the data, .*/three/train;")])
def test_options_that_make_no_sense_are_refused(module, more, message, words, out, runs, tmp_path):
    folders = {name: picture_folder(tmp_path / name, *counts) for name, counts in FOLDERS.items()}
    given = more.format(finished=runs[train], segmented=runs[segment], **folders).split()
    assert_refused(message, module.main, given[1:] if given[0] == "only" else words(*given))
    assert not out.exists()


@pytest.mark.parametrize("variables, message", [
    ({"WORLD_SIZE": "2"}, "cannot join the other processes: .* RANK expected, but not set; start with torchrun, or"),
    ({"RANK": "1"}, "cannot join .* WORLD_SIZE expected"), ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR expected"),
    ({"WORLD_SIZE": "two"}, "the environment variable WORLD_SIZE is 'two'; expected a number"),
    ({"LOCAL_WORLD_SIZE": "-1"}, "the environment variable LOCAL_WORLD_SIZE is '-1'")])
def test_environments_that_torchrun_has_not_set_up_are_refused(variables, message, pictures, out, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = "--data", str(pictures), "--out", str(out), "--device", "cpu", "--batch-size", "2"
    assert_refused(message, train.main, words)


@pytest.mark.parametrize("error, advice", [
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n 1\nRuntimeError: unable "
                  "to allocate shared memory(shm) for </torch_1_2_3>: No space left on device (28)"), "--shm-size=8g"),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that dataloader's workers "
                  "are out of shared memory."), "--shm-size=8g"),
    (OSError(24, "Too many open files"), "ulimit -n 4096"), (MemoryError(), "MemoryError: out of memory?"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), "use --no-compile"),
    (RuntimeError("CppCompileError: C++ compile error\n\nCommand:\ng++"), "with Python's headers? Or use --no-compile"),
    (PermissionError(13, "Permission denied", "/a"), "Permission denied: '/a'\n")])
def test_environments_that_lack_something_are_named_in_one_line_with_a_way_out(error, advice, capsys):
    assert train.report_error(error) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and advice in message and message.count("\n") == 1


def test_environments_with_too_few_file_descriptors_are_refused_before_they_hang():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    train.make_loader(range(9), 2, train.Distributed())
    assert_refused(r"--workers 999999 needs \d+ open files, but the limit is \d+", train.make_loader, range(9),
                   999_999, train.Distributed())
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


# -k "resume or signals or pipes": a run that is killed, stopped or cut off --------------------------------------------

def wait_for(found, process):
    """What found() is once it is true."""
    deadline = time.monotonic() + 100
    while not (result := found()):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError((process.stdout.read(), process.stderr.read()))
        time.sleep(0.005)
    return result


def wait_for_next(path, process):
    """Until the file is written, or written again."""
    before = path.exists() and path.stat().st_mtime_ns
    wait_for(lambda: path.exists() and path.stat().st_mtime_ns != before, process)


def crash(main, words, out, moments):
    """Start the script, end it, resume it, end it, ...; then let it go on to its own end. From the first checkpoint on
    there is always one, and the script goes on from it.

    A moment is "start", as soon as the process says something; a number, after so many more checkpoints; "writing", in
    the midst of writing one; all three with SIGKILL. Or it is the name of a signal, sent after one more checkpoint.
    """
    words = [*words, "--resume", "auto"]
    last, steps = out / "last.pt", 0
    for moment in moments:
        process = forked(main, words)
        said = process.stdout.readline()
        assert said.endswith(f"; resumed at step {steps}\n" if steps else f"in {out}\n"), (said, process.stderr.read())
        for _ in range({"start": 0, "writing": 0, "SIGINT": 1, "SIGHUP": 1}.get(moment, moment)):
            wait_for_next(last, process)
        if moment == "writing":
            os.mkfifo(out / "last.pt.tmp")  # what is written there waits until somebody reads it
            reader = os.open(out / "last.pt.tmp", os.O_RDONLY | os.O_NONBLOCK)
            wait_for(lambda: select.select([reader], [], [], 0)[0] and os.read(reader, 1000), process)
        number = getattr(signal, str(moment), signal.SIGKILL)
        os.kill(process.pid, number)
        process.join(100)
        assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number)
        if number != signal.SIGKILL:
            stdout, stderr = process.stdout.read(), process.stderr.read()
            assert "saved and stopped; to continue, add --resume auto to the same command" in stdout
            assert "stopping and saving; a second signal stops at once" in stderr and "Traceback" not in stderr
        if steps or last.exists():
            before, steps = steps, train.load_checkpoint(last)["step"]
            assert steps >= before
    assert main(words) == 0


def comparable(thing):
    """A checkpoint or log, bit by bit, without what may differ from run to run."""
    if isinstance(thing, torch.Tensor):
        return thing.dtype, thing.shape, thing.numpy().tobytes()
    if isinstance(thing, dict):
        differing = {"out", "resume", "save_every", "workers", "images_per_s", "seconds"}
        return {key: comparable(thing[key]) for key in thing.keys() - differing}
    return [comparable(x) for x in thing] if isinstance(thing, (list, tuple)) else (type(thing), thing)


def assert_same_end(out, alone):
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    for name, read in (("last.pt", train.load_checkpoint), ("best.pt", train.load_checkpoint), ("", history)):
        assert comparable(read(out / name)) == comparable(read(alone / name)), name


def contents(folder):
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("module, moments", [(train, [2, "SIGINT", "writing"]), (segment, [1, "SIGHUP"])])
@process
def test_resume_after_kills_and_signals_anywhere_ends_with_the_same_bits(module, moments, words, runs, out):
    crash(module.main, words("--save-every", 1, "--workers", 1), out, moments)
    assert_same_end(out, runs[module])


@pytest.mark.slow
@pytest.mark.parametrize("module, words", [
    (train, "--epochs 1 --batch-size 200 --save-every 1 --workers 1"),
    (segment, "--iters 80 --eval-every 40 --warmup-iters 10 --batch-size 8 --save-every 1")])
def test_resume_after_twenty_kills_on_the_built_in_set(module, words, out, tmp_path):
    words = [*words.split(), "--device", "cpu", "--out"]
    assert module.main([*words, str(tmp_path / "alone")]) == 0
    chance = random.Random(1)
    moments = ["writing" if i % 3 == 0 else chance.choice(["start", 1, 2, 3, 4]) for i in range(20)]
    crash(module.main, [*words, str(out)], out, moments)
    assert_same_end(out, tmp_path / "alone")


def test_resume_or_refuse_never_overwrites_an_earlier_run_or_what_is_left_of_one(runs, pictures, tmp_path):
    for name, *auto in ("last.pt",), ("best.pt", ("--resume", "auto")), ("log.jsonl", ("--resume", "auto")):
        out = tmp_path / name / "run"
        out.mkdir(parents=True)
        (out / name).write_bytes(b"dear")
        for resume in (), ("--resume", runs[train] / "last.pt"), *auto:
            advice = "add --resume auto to continue from .*last.pt" if name == "last.pt" else "move it away"
            assert_refused(f"{name} already exists: {advice}, or choose another --out",
                           train.main, arguments(pictures, out, *resume))
        assert contents(out) == {out / name: b"dear"}


def test_resume_or_refuse_of_two_runs_in_one_folder_the_second_until_the_first_is_killed(pictures, tmp_path):
    out = tmp_path / "new" / "run"
    ready, say = os.pipe()
    if not (first := os.fork()):
        with train.locked_folder(out):
            os.write(say, b"locked")
            signal.pause()
    os.read(ready, 6)
    for resume in ((), ("--resume", "auto")):
        assert_refused(rf"--out {out} is in use by another run \(process {first} on .*\); stop",
                       train.main, arguments(pictures, out, *resume))
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert_refused("--data", train.main, arguments(tmp_path / "absent", out))
    assert not list(out.iterdir())


@pytest.mark.parametrize("name, harm, message", [
    ("best.pt", lambda path, other: path.write_text("<html>"),
     "use the checkpoint .*best.pt: .* damaged; repair .*best.pt"),
    ("best.pt", lambda path, other: path.symlink_to("/absent/b.pt"),
     "open the checkpoint /absent/b.pt: .*; repair .*best.pt"),
    ("best.pt", lambda path, other: shutil.copy(other, path), "best.pt was trained on other classes"),
    ("last.pt", lambda path, other: path.symlink_to("/absent/l.pt"), "cannot open the checkpoint /absent/l.pt: No "),
], ids=["damaged", "not mounted", "another run's", "last.pt not mounted"])
def test_resume_knows_what_best_pt_holds_and_where_links_lead(name, harm, message, runs, pictures, out):
    shutil.copytree(runs[train], out)
    (out / name).unlink()
    harm(out / name, runs[segment] / "best.pt")
    before = contents(out)
    assert_refused(message, train.main, arguments(pictures, out, "--resume", "auto"))
    assert contents(out) == before


def test_resume_without_best_pt_and_with_other_files(module, words, runs, out, pictures, streets, tmp_path, capsys):
    data, kind, names, keys, said = {
        train: (pictures, "training", "train/ant/*", ["top1", "ema_top1"], "has top-1 {:.2f} %."),
        segment: (streets, "validation", "annotations/validation/*", ["miou"], "has mIoU {:.2f}.")}[module]
    shutil.copytree(data, copy := tmp_path / "data")
    shutil.copytree(runs[module], out)
    (out / "best.pt").unlink()
    words = words("--resume", "auto", "--data", copy)
    assert module.main(words) == 0  # the same files elsewhere: it validates again
    assert comparable(history(out)) == comparable(history(runs[module]))
    best, score = train.load_checkpoint(out / "best.pt"), max(history(out)[-1][key] for key in keys)
    assert best["best"] == score and said.format(score) in capsys.readouterr().out
    first, second, *_ = copy.glob(names)
    first.rename(tmp_path / "first"), second.rename(first), (tmp_path / "first").rename(second)
    changed = f"the contents of {kind} files are not those that {out}/last.pt was trained with"
    assert_refused(f"{changed}; restore them, or accept these: --resume {out}/last.pt$", module.main, words)
    assert module.main([*words, "--resume", f"{out}/last.pt"]) == 0 and f"note: {changed}" in capsys.readouterr().out


def test_resume_with_other_iters_and_validations_goes_on_from_the_last_step(streets, out):
    for iters, eval_every, validated in (5, 3, [3, 5]), (5, 2, [3, 5]), (9, 2, [3, 5, 6, 8, 9]):
        more = "--iters", iters, "--eval-every", eval_every, "--resume", "auto"
        assert segment.main(seg_arguments(streets, out, *more)) == 0
        assert [line["step"] for line in history(out)] == validated
        torch.save(train.load_checkpoint(out / "best.pt") | {"best": 200.0}, out / "best.pt")
    assert train.load_checkpoint(out / "last.pt")["best"] == 200  # and nothing is better


def test_resume_to_more_epochs_in_fp16_takes_their_rates_and_skips_overflow(runs, pictures, out, tmp_path, monkeypatch):
    rates, scales, train_step, before = {}, [], train.train_step, train.load_checkpoint(runs[train] / "last.pt")
    monkeypatch.setattr(train, "train_step", lambda run, *rest: (
        rates.setdefault(run.step, run.optimizer.param_groups[0]["lr"]), scales.append(run.scaler.get_scale()),
        train_step(run, *rest)))
    torch.save(before | {"scaler": {"scale": 2.0**30, "_growth_tracker": 0}}, tmp_path / "from.pt")
    words = "--amp", "fp16", "--epochs", 6, "--resume", tmp_path / "from.pt"
    assert train.main(arguments(pictures, out, *words)) == 0
    assert rates == {step: 1e-3 * train.warmup_cosine(step, 36, 3) for step in range(12, 36)}
    after = train.load_checkpoint(out / "last.pt")
    assert scales[0] == 2.0**30 and 2.0**8 < after["scaler"]["scale"] < 2.0**28  # some steps were skipped, not all
    assert not torch.equal(after["model"]["head.weight"], before["model"]["head.weight"])
    assert all(value.isfinite().all() for value in [*after["model"].values(), *after["ema"].values()])
    assert len(history(out)) == 6 and (out / "best.pt").exists()


def test_signals_during_a_step_and_during_validation_stop_them_and_are_resumed(module, words, runs, out, monkeypatch):
    train_step, eval_transform, seen = train.train_step, module.eval_transform, []

    def told(*args, **kw):
        transform = eval_transform(*args, **kw)
        return lambda *item: (seen.append(1), signal.raise_signal(signal.SIGTERM), transform(*item))[2]
    monkeypatch.setattr(train, "train_step", lambda run, *rest: (
        run.step == 1 and signal.raise_signal(signal.SIGTERM), train_step(run, *rest)))
    assert module.main(words()) == 128 + signal.SIGTERM
    assert train.load_checkpoint(out / "last.pt")["step"] in (2, 3)  # at most one more is taken
    monkeypatch.setattr(module, "eval_transform", told)
    monkeypatch.setattr(train.os, "_exit", lambda status: None)  # the signal comes again for each image of a batch
    assert module.main(words("--resume", "auto")) == 128 + signal.SIGTERM
    assert len(seen) == {train: 8, segment: 1}[module] and not (out / "log.jsonl").exists()  # one batch
    monkeypatch.setattr(module, "eval_transform", eval_transform)
    assert module.main(words("--resume", "auto")) == 0  # begins with the validation
    assert_same_end(out, runs[module])


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@process
def test_pipes_a_run_goes_on_without_its_reader_and_ends_with_an_error_without_its_loader(pictures, out):
    process = forked(train.main, arguments(pictures, out, "--workers", 1, "--save-every", 1, "--epochs", 999))
    process.stdout.readline()
    process.stdout.close()
    wait_for((out / "log.jsonl").exists, process)
    wait_for_next(out / "log.jsonl", process)  # it had something to say after the first validation
    for loader in children(process):
        os.kill(loader, signal.SIGKILL)
    process.join(100)
    err = process.stderr.read()
    assert process.exitcode == 2 and "out of memory? Try more --grad-accum-steps" in err and "Traceback" not in err, err
    assert train.load_checkpoint(out / "last.pt")["step"] > 6


@pytest.mark.parametrize("module, use", [(train, "--eval --data {pictures}"), (segment, "--eval --data {streets}"),
                                         (train, "--predict {pictures}/val/ant/0.png")])
def test_pipes_a_result_that_cannot_be_written_is_an_error(module, use, runs, pictures, streets, monkeypatch, capsys):
    use = use.format(pictures=pictures, streets=streets).split()
    with open("/dev/full", "w") as full, monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.setattr(sys, "stdout", full)
        train.run_main(lambda: module.main([*use, "--weights", f"{runs[module]}/best.pt", "--device", "cpu"]))
    assert capsys.readouterr().err == "error: cannot write the result to the standard output: No space left on device\n"


@process
def test_pipes_closed_from_the_start_keep_no_run_from_training(pictures, out):
    words = arguments(pictures, out, "--epochs", 1, "--workers", 1, "--batch-size", 50)
    end_of(started(["sh", "-c", f"exec {sys.executable} {HERE / 'train.py'} {shlex.join(words)} <&- >&- 2>&-"]))
    assert len(history(out)) == 1


def train_for_ever(words):
    train.read_image = lambda path: time.sleep(60)
    return train.main(words)


@pytest.mark.parametrize("workers", [0, 1])
@process
def test_signals_given_twice_stop_at_once(workers, pictures, out):
    process = forked(train_for_ever, arguments(pictures, out, "--workers", workers))
    while "training and" not in process.stdout.readline():  # after this line nothing but steps is to be done
        assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    while "stopping and saving" not in process.stderr.readline():
        assert process.is_alive()
    time.sleep(0.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    again = time.monotonic()
    assert "Traceback" not in process.stderr.read() and time.monotonic() - again < 30  # its workers have ended too
    process.join(100)
    assert process.exitcode == 130


# -k distributed: several processes and hosts --------------------------------------------------------------------------

@pytest.fixture(scope="session")
def pair(pictures, tmp_path_factory):
    """A run of two processes on one host, left alone; without drop-path, which depends on the number of processes."""
    out = tmp_path_factory.mktemp("pair") / "run"
    more = "--drop-path", 0, "--grad-accum-steps", 2, "--workers", 1
    printed = end_of(started(torchrun(2, *arguments(pictures, out, *more))))
    assert printed.count("epoch   1/2") == 1 and "\r" not in printed  # one line an epoch, of one process; no bars
    return out


def ranks(launcher):
    """The processes that torchrun has started, by their ranks."""
    found = {}
    for child in children(launcher):
        with contextlib.suppress(OSError, TypeError):  # it has just ended, or is none of them
            found[int(re.search(r"\0RANK=(\d)\0", Path(f"/proc/{child}/environ").read_text())[1])] = child
    return found


@process
def test_distributed_a_dead_rank_is_started_again_and_the_run_ends_as_if_undisturbed(pair, pictures, out):
    steps, dead = [], set()
    more = "--drop-path", 0, "--grad-accum-steps", 2, "--save-every", 1, "--resume", "auto"
    process = started(torchrun(2, *arguments(pictures, out, *more), options=("--standalone", "--max-restarts=3")))
    for rank in (1, 0):
        wait_for(lambda: len({*ranks(process).values()} - dead) == 2, process)
        pids = ranks(process)
        wait_for_next(out / "last.pt", process)
        steps.append(train.load_checkpoint(out / "last.pt")["step"])
        os.kill(pids[rank], signal.SIGKILL)
        dead |= {*pids.values()}
    assert end_of(process).count("resumed at step") == 2 and steps == sorted(set(steps))
    assert_same_end(out, pair)


@process
def test_distributed_an_error_is_one_line_whether_one_process_meets_it_or_all(pictures, out, tmp_path):
    shutil.copytree(pictures, data := tmp_path / "data")
    (data / "val/ant/1.png").write_text("no picture")  # of rank 1's share
    one = started(torchrun(2, *arguments(data, out, "--epochs", 1, "--batch-size", 48)))
    both = started(torchrun(2, "--data", tmp_path / "absent", "--device", "cpu"))
    for process, message in (one, "error: cannot read the image"), (both, "error: --data"):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1 and err.count(message) == 1 and "train.py\", line" not in err


def test_distributed_processes_that_read_different_checkpoints_are_refused(runs, pictures, monkeypatch):
    monkeypatch.setattr(train.Distributed, "all_gather", lambda self, read: [read, (read[0] + 1, read[1])])
    message = "last.pt differs between processes: --out must be on storage shared by all"
    assert_refused(message, train.main, arguments(pictures, runs[train], "--resume", "auto"))


# Two hosts with a cable between them: two network, host name and mount namespaces, made without a privilege.
HOSTS = """
mount --bind {hosts} /etc/hosts && ip link set lo up && hostname first || exit 9
unshare -nu sh -c 'hostname second; ip link set lo up; until ip addr add 10.99.0.2/24 dev right; do sleep 0.1; done
                   ip link set right up; exec {command}' 2> {hosts}.second &
while [ "$(readlink /proc/$!/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done  # not yet unshared
ip link add left type veth peer name right netns $! && ip addr add 10.99.0.1/24 dev left && ip link set left up
{command}; status=$?
wait $! && exit $status
"""
CABLE = shutil.which("unshare") and subprocess.run(
    ["unshare", "-rnum", "ip", "link", "add", "left", "type", "veth"], capture_output=True).returncode == 0


@process
def test_distributed_two_hosts_end_with_the_weights_of_one(pair, pictures, out, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.99.0.1 first\n10.99.0.2 second\n")
    endpoint = f"--rdzv_endpoint={'first' if CABLE else 'localhost'}:29567"
    agent = torchrun(1, *arguments(pictures, out, "--drop-path", 0, "--resume", "auto"),
                     options=("--nnodes=2", "--rdzv_backend=c10d", endpoint))
    lines = HOSTS.format(hosts=tmp_path / "hosts", command=shlex.join(map(str, agent)))
    # Where namespaces are forbidden, two agents meet on the loopback device.
    commands = [["unshare", "-rnum", "sh", "-c", lines]] if CABLE else [agent, agent]
    for process in [started(command) for command in commands]:
        end_of(process)
    ours, theirs = (train.load_checkpoint(folder / "last.pt") for folder in (out, pair))
    for kind in "model", "ema":
        assert_close(ours[kind], theirs[kind], rtol=0, atol=1e-5)


# -k cuda --------------------------------------------------------------------------------------------------------------

one_gpu, two_gpus = (pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs CUDA devices: {count}")
                     for count in (1, 2))


@one_gpu
@each_way
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_a_mingru_in_bf16_is_as_near_to_float64_as_on_a_cpu(compiled, with_h0, reverse, device="cuda"):
    gru, given = MinGRU(16), [torch.randn(2, 3136, 16), torch.rand(2, 32)][:1 + with_h0]

    def results(device, dtype, amp, network=lambda gru: gru):
        module = copy.deepcopy(gru).to(device, dtype)
        inputs = [t.to(device, dtype).requires_grad_() for t in given]
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            values = with_gradients(network(module)(*inputs, reverse=reverse), [*inputs, *module.parameters()])
        return [value.double().cpu() for value in values]
    exact, half = results("cpu", torch.float64, False), results("cpu", torch.float32, True)
    seen = results(device, torch.float32, True, torch.compile if compiled else lambda gru: gru)
    for value, other, reference in zip(seen, half, exact, strict=True):
        assert (value - reference).norm() <= 2 * (other - reference).norm()


@one_gpu
@process
def test_cuda_compiled_run_in_bf16_has_the_losses_of_a_cpu(module, words, tmp_path, monkeypatch, capsys, device="cuda"):
    monkeypatch.setitem(train.MODELS, "nano", visiongru_nano)
    same_images = ("--drop-path", 0) if module is segment else ("--drop-path", 0, "--reprob", 0)
    for name, more in ("cpu", ()), ("other", ("--device", device, "--amp", "bf16", "--compile")):
        assert module.main(words("--out", tmp_path / name, *same_images, *more)) == 0
    losses = [[entry["loss"] for entry in history(tmp_path / name)] for name in ("cpu", "other")]
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and "compiling" in capsys.readouterr().out
    weights = "--weights", str(tmp_path / "other" / "best.pt")
    assert module.main(["--eval", *weights, *words()[:2], "--device", "cpu"]) == 0


@two_gpus
@process
def test_cuda_distributed_two_devices_train_as_one_with_batchnorm_synchronized(module, words, tmp_path, device="cuda"):
    more = ("--lr", 0) if module is segment else ()  # dropout differs, and only what comes before it is compared
    for count in 1, 2:
        of_run = words("--out", tmp_path / str(count), "--device", device, "--drop-path", 0, *more)
        end_of(started(torchrun(count, *of_run, name=f"{module.__name__}.py")))
    if module is train:
        one, two = ([entry["loss"] for entry in history(tmp_path / name)] for name in "12")
        assert two == pytest.approx(one, rel=0.01)
    else:
        one, two = (train.load_checkpoint(tmp_path / name / "last.pt")["model"] for name in "12")
        for name in [name for name in one if "running_" in name]:  # of batches of 4 images, not of 2
            assert_close(two[name], one[name], rtol=0.01, atol=1e-4)


# -k reproducible: the same result in any shape of the machine ---------------------------------------------------------

def largest_difference(out, alone):
    """Of the losses of two runs, whose rates and scores are the same."""
    pairs = list(zip(history(out), history(alone), strict=True))
    assert all(ours[key] == theirs[key] for ours, theirs in pairs for key in ("lr", "top1"))
    return max(abs(ours[key] - theirs[key]) for ours, theirs in pairs for key in ("loss", "val_loss", "ema_val_loss"))


# In both the whole recipe is on: random crops, RandAugment, erasing, mixup and cutmix; drop-path is not.
@process
def test_reproducible_losses_of_two_processes_in_micro_batches_and_with_workers(pair, pictures, out, monkeypatch):
    monkeypatch.setitem(train.MODELS, "nano", visiongru_nano)
    assert train.main(arguments(pictures, out, "--drop-path", 0)) == 0
    assert largest_difference(pair, out) < 1e-5


@pytest.mark.slow
def test_reproducible_losses_over_fifty_steps_in_all_27_shapes_of_the_machine(tmp_path):
    data = picture_folder(tmp_path / "data", dict(ant=107, bee=107, cat=107), dict(ant=5, bee=4, cat=4))
    differences = []
    for count, accum, workers in itertools.product((1, 2, 4), (1, 2, 4), (0, 1, 4)):
        more = "--grad-accum-steps", accum, "--workers", workers, "--batch-size", 32, "--epochs", 5, "--drop-path", 0
        out = tmp_path / f"{count}-{accum}-{workers}"
        end_of(started(torchrun(count, *arguments(data, out, *more))))
        differences.append(largest_difference(out, tmp_path / "1-1-0"))
    print(f"largest difference of a loss: {max(differences):.1e}")
    assert len(differences) == 27 and max(differences) < 1e-5


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@process
def test_reproducible_images_augmented_and_mixed_alike_in_any_shape_of_the_machine(module, words):
    seen, shapes = {}, [(p, a, 0) for p in (1, 2, 4) for a in (1, 2, 4)] + [(1, 1, 1), (1, 1, 4), (2, 1, 1), (1, 4, 4)]
    for count, accum, workers in shapes:
        more = "--batch-size", 32, "--grad-accum-steps", accum, "--workers", workers
        args = module.parse_arguments(words(*more))
        data, = module.open_data(args, ["train" if module is train else "training"])
        data.transform = train.train_transform(args) if module is train else segment.TrainTransform(args)
        augment = train.augment_batch if module is train else lambda images, masks, *_: (images, masks)
        normalize = train.normalizer(torch.device("cpu"))
        items = []
        for rank in range(count):
            loader = train.training_loader(data, range(5, 7), args, train.Distributed(rank, count))
            for number, (images, targets) in enumerate(loader):
                step, first = 5 + number // accum, (rank * accum + number % accum) * len(images)
                images, targets = augment(normalize(images), targets, first, step, 3, args)
                items += [(step, *(tensor.numpy().tobytes() for tensor in pair)) for pair in zip(images, targets)]
        seen[count, accum, workers] = sorted(items)
    assert len(seen[1, 1, 0]) == len({image for _, image, _ in seen[1, 1, 0]}) == 64
    assert all(items == seen[1, 1, 0] for items in seen.values())


# -k disk --------------------------------------------------------------------------------------------------------------

def test_disk_a_file_size_limit_ends_the_run_with_an_error_and_leaves_the_checkpoint(module, words, runs, out, capsys):
    shutil.copytree(runs[module], out)
    before, longer = contents(out), {train: ("--epochs", 3), segment: ("--iters", 9)}[module]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))  # in bytes, as with `ulimit -f`
    try:
        with pytest.raises(SystemExit, match="2"):
            train.run_main(lambda: module.main(words("--resume", "auto", "--save-every", 1, *longer)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search("^error: cannot write .*last.pt: File too large", capsys.readouterr().err, re.MULTILINE)
    assert contents(out) == before


def test_disk_full_is_named_and_what_was_there_stays(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"dear")
    (tmp_path / "file.tmp").symlink_to("/dev/full")  # a device on which there is never any space
    message = "cannot write .*file: No space left on device; .* is unchanged"
    assert_refused(message, train.atomic_write, path, bytes(10**6))
    assert contents(tmp_path) == {path: b"dear"}


def test_disk_predictions_replace_nothing(runs, pictures, tmp_path):
    use = f"--predict {pictures}/val/ant/0.png --weights {runs[segment]}/best.pt --device cpu --out {tmp_path}".split()
    assert segment.main(use) == 0
    labels, overlay = tmp_path / "0_labels.png", tmp_path / "0_overlay.png"
    before = labels.read_bytes()
    for prepare in (lambda: None, overlay.unlink, lambda: (labels.unlink(), labels.symlink_to("absent"))):
        prepare()
        assert_refused(f"{labels} already exists; move it, or choose another --out", segment.main, use)
        assert labels.is_symlink() or labels.read_bytes() == before


def test_disk_a_folder_that_cannot_be_written_to_is_found_before_training(runs, pictures, streets, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "sealed").mkdir(mode=0o500)
    outs = [tmp_path / "file", tmp_path / "file" / "run"]  # and /sys is one where not even root can write
    outs += [tmp_path / "sealed", tmp_path / "sealed" / "run"] if os.geteuid() else [Path("/sys"), Path("/proc/run")]
    predict = ["--predict", "x", "--weights", f"{runs[segment]}/best.pt"]
    for out in outs:
        message = f"--out {out}: cannot write in this folder: "
        assert_refused(message, train.main, arguments(pictures, out))
        assert_refused(message, segment.main, seg_arguments(streets, out))
        assert_refused(message, segment.main, [*predict, "--out", str(out)])
    assert not list((tmp_path / "sealed").iterdir())


# -k "images or checkpoints": hostile and broken files -----------------------------------------------------------------

def grey_ramp(mode):
    """0, 1/4, 1/2 and 3/4 of white, a column each, and white, in 16 bits."""
    ramp = torch.tensor([0, 16384, 32768, 49152, 65535]).expand(4, 5).contiguous()
    return Image.fromarray(ramp.to({"I;16": torch.uint16, "I": torch.int32, "F": torch.float32}[mode]).numpy())


def two_colours(mode, size=(40, 20)):
    """Red above, blue below."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0], size[1] // 2))
    return image.convert(mode)


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def header(width, height, bits=8, kind=2, rows=b""):
    """A PNG file that is nothing but its beginning, or has these rows."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


JPEG = bytes(train.encoded(two_colours("RGB").save, format="JPEG", quality=95))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
# PIL's reader of IPTC opens what lies in the last field with all its readers, and that of EPS runs Ghostscript.
IPTC = b"".join(struct.pack(">BBBH", 28, *field, len(data)) + data for field, data in [
    ((3, 60), b"\1\0"), ((3, 20), b"\x09"), ((3, 30), b"\x09"), ((3, 120), b"\5"), ((8, 10), EPS)])
GLASS = Image.new("RGBA", (4, 4), (0, 0, 0, 191))  # a quarter of the way from black to the paper, and the paper
GLASS.paste((0, 0, 0, 0), (0, 0, 2, 4))
RED, BLUE, WHITE = (254, 0, 0), (0, 0, 254), (255, 255, 255)
FRAMES = dict(save_all=True, append_images=2 * [Image.new("RGB", (40, 20), "green")])
UPRIGHT, TURNED = ((40, 20), {(5, 5): RED, (5, 15): BLUE}), ((40, 20), {(5, 5): BLUE, (5, 15): RED})
RAMP = ((5, 4), {(column, 1): (grey,) * 3 for column, grey in enumerate((0, 64, 128, 192, 255))})
ON_WHITE = ((4, 4), {(0, 0): WHITE, (3, 0): (64, 64, 64)})
# What is in the file: an image with the options to save it, or bytes; and what is made of it: a size and some pixels,
# or why it is refused.
IMAGES = {
    "plain.png":           (two_colours("RGB"), {}, *UPRIGHT),
    "another.jpg":         (two_colours("RGB"), {"quality": 95}, *UPRIGHT),
    "palette.png":         (two_colours("P"), {}, *UPRIGHT),
    "grey.png":            (two_colours("L"), {}, (40, 20), {(5, 5): (76, 76, 76), (5, 15): (29, 29, 29)}),
    "black and white.png": (Image.new("1", (3, 3), 1), {}, (3, 3), {(1, 1): (255, 255, 255)}),
    "cmyk.jpg":            (two_colours("CMYK"), {"quality": 95}, *UPRIGHT),
    # What is transparent lies on white.
    "rgba.png":            (GLASS, {}, *ON_WHITE),
    "grey and alpha.png":  (GLASS.convert("LA"), {}, *ON_WHITE),
    "one colour out.png":  (two_colours("RGB"), {"transparency": (0, 0, 255)}, (40, 20), {(5, 5): RED, (5, 15): WHITE}),
    "palette, alpha.png":  (two_colours("P"), {"transparency": bytes([0] * 256)}, (40, 20), {(5, 5): (255, 255, 255)}),
    # 16 bits are cut to 8: a ramp stays a ramp.
    "16-bit.png":          (grey_ramp("I;16"), {}, *RAMP),
    "16-bit page.tif":     (grey_ramp("I;16"), {}, *RAMP),
    "16-bit map.pgm":      (grey_ramp("I"), {}, *RAMP),
    "int32.tif":           (grey_ramp("I"), {}, "its pixels are 32-bit numbers", None),
    "float.tif":           (grey_ramp("F"), {}, "its pixels are 32-bit numbers", None),
    # Upright, as the camera noted.
    "turned 6.jpg":        (two_colours("RGB"), {"exif": exif(6), "quality": 95}, (20, 40),
                            {(15, 5): RED, (5, 5): BLUE}),
    "turned 3.png":        (two_colours("RGB"), {"exif": exif(3)}, *TURNED),
    "mirrored 4.jpg":      (two_colours("RGB"), {"exif": exif(4), "quality": 95}, *TURNED),
    "bad exif.jpg":        (two_colours("RGB"), {"exif": b"Exif\0\0" + bytes(range(60))}, (40, 20), {(5, 5): RED}),
    # Of an animation the first frame.
    **{name: (two_colours("RGB"), FRAMES, *UPRIGHT) for name in ("gif.gif", "animated.png", "pages.tif")},
    "webp.webp":           (two_colours("RGB"), {**FRAMES, "lossless": True}, *UPRIGHT),
    # Any size that memory can hold.
    "one pixel.png":       (Image.new("RGB", (1, 1), "red"), {}, (1, 1), {(0, 0): RED}),
    "long.png":            (two_colours("RGB", (5000, 8)), {}, (5000, 8), {(4999, 0): RED, (0, 7): BLUE}),
    "tall.png":            (two_colours("RGB", (2, 60_000)), {}, (2, 60_000), {(0, 9): RED, (1, 59_999): BLUE}),
    "line.jpg":            (Image.new("RGB", (65_500, 1), "red"), {}, (65_500, 1), {(9, 0): RED}),
    "huge.png":            (header(60_000, 60_000), None, r"3600000000 pixels\) exceeds limit", None),
    "empty.jpg":           (b"", None, "cannot identify image file", None),
    "text.jpg":            (b"a holiday picture\n" * 9, None, "cannot identify image file", None),
    "half.jpg":            (JPEG[:len(JPEG) // 2], None, "truncated|Truncated", None),
    "header alone.png":    (header(40, 20), None, "truncated|broken|unrecognized|not enough", None),
    # A list says which formats are read; some of PIL's others hold programs.
    "program.jpg":         (EPS, None, "cannot identify image file", None),
    "program inside.jpg":  (IPTC, None, "cannot identify image file", None),
    "camera.jfif":         (JPEG, None, *UPRIGHT),
    "targa.tga":           (two_colours("RGB"), {}, "cannot identify image file", None),
}


def write_image(name, folder):
    content, options, *_ = IMAGES[name]
    (folder / name).write_bytes(content) if options is None else content.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_read_as_a_person_sees_them_or_refused_with_path_and_reason(name, tmp_path):
    path, (_, _, expected, pixels) = write_image(name, tmp_path), IMAGES[name]
    if isinstance(expected, str):
        message = f"^cannot read the image {re.escape(str(path))}: .*({expected})"
        return assert_refused(message, train.read_image, path)
    image = train.read_image(path)
    assert image.mode == "RGB" and image.size == expected
    for place, colour in pixels.items():
        assert image.getpixel(place) == pytest.approx(colour, abs=3)


@process
def test_images_that_can_be_read_can_be_trained_on_and_predicted(runs, tmp_path, capsys):
    args, whole = (train.parse_arguments(arguments("x", "x", "--crop-scale", share)) for share in (0.08, 1))
    seg_args, out = segment.parse_arguments(seg_arguments("x", "x")), tmp_path / "out"
    refused = [str(write_image(name, tmp_path)) for name, row in IMAGES.items() if row[3] is None]
    paths = [str(write_image(name, tmp_path)) for name, row in IMAGES.items() if row[3]]
    for image in map(train.read_image, paths):
        for transform in (train.train_transform(args), train.train_transform(whole), train.eval_transform(32, 37)):
            assert transform(image).shape == (3, 32, 32)
        mask = torch.zeros(image.height, image.width, dtype=torch.uint8)
        assert segment.TrainTransform(seg_args)(image, mask)[0].shape == (3, 32, 32)
    checkpoint, weights, seen = train.load_checkpoint(runs[segment] / "best.pt"), str(tmp_path / "segmented.pt"), set()
    checkpoint["model"]["decode_head.conv_seg.bias"].zero_()  # then it finds every class somewhere
    torch.save(checkpoint, weights)
    use = ["--device", "cpu", "--weights"]
    for module, more in (segment, [weights, "--out", str(out)]), (train, [f"{runs[train]}/best.pt"]):
        assert module.main(["--predict", *refused, *paths, *use, *more]) == 2
        printed, err = capsys.readouterr()
        assert all(f"cannot read the image {path}: " in err for path in refused)  # which keeps it not from the others
    lines = printed.splitlines()
    assert lines[::4] == paths and len(lines) == 4 * len(paths)
    for shares in (lines[i + 1:i + 4] for i in range(0, len(lines), 4)):
        assert {line.split("% ")[1].strip() for line in shares} == {"ant", "bee", "cat"}
        assert sum(float(line.split("%")[0]) for line in shares) == pytest.approx(100, abs=0.02)
    slide = [*use, weights, "--slide", "--out", f"{out}/slide"]
    assert segment.main(["--predict", *paths[:5], *slide]) == 0 and "5 label maps" in capsys.readouterr().out
    for path in paths:
        picture, name = train.read_image(path), Path(path).stem
        with Image.open(out / f"{name}_labels.png") as labels, Image.open(out / f"{name}_overlay.png") as page:
            assert labels.mode == "P" and labels.size == picture.size
            colours = list(zip(*[iter(labels.getpalette())] * 3))
            occurring = {label for _, label in labels.getcolors()}
            seen |= occurring
            assert colours[0] == (0, 0, 0) and len(set(colours)) > 151
            half = Image.blend(picture, labels.convert("RGB"), 0.5)
            assert page.crop((0, 0, *picture.size)).tobytes() == half.tobytes()
            legend = {colour for _, colour in page.crop((0, picture.height, *page.size)).getcolors(10**6)}
            assert {label for label in (1, 2, 3) if colours[label] in legend} == occurring
    assert seen == {1, 2, 3}  # as in the training masks


def test_a_legend_tells_classes_apart_whose_names_the_font_lacks(monkeypatch):
    labels = Image.new("P", (90, 60), 1)
    labels.paste(2, (0, 0, 40, 60))
    labels.putpalette(segment.palette(1))
    texts = []
    monkeypatch.setattr(segment.ImageDraw.ImageDraw, "text", lambda self, place, text, *rest, **kw: texts.append(text))
    segment.overlay(Image.new("RGB", labels.size), labels, {1: "\u4eba", 2: "\u8def"})
    assert texts == ["1: \u4eba 55.6 %", "2: \u8def 44.4 %"]


class Trap:
    def __reduce__(self):  # unpickled, it makes a folder
        return os.mkdir, ("trap",)


DAMAGED = 3 * ["not written by torch.save, or it is damaged"]
CODE = 3 * ["holds Python objects, and loading those executes code.*keep its tensors"]
NONE = 3 * ["is neither a checkpoint of these scripts nor a state dict"]
DENSE, FINITE = 3 * ["expected a dense tensor"], 3 * ["head.weight is not a dense tensor of finite floating-point"]
N = len(micro_model().state_dict())
SHORT = {"step": torch.ones(()), "exp_avg": torch.zeros(7), "exp_avg_sq": torch.zeros(7)}
NESTED = functools.reduce(lambda inner, _: [inner, inner], range(60), [])  # whose text would fill any memory


def configured(**entries):
    return lambda data, c: saved({**c, "config": c["config"] | entries})


def with_head(change):
    return lambda data, c: saved({**c, "better": "ema",
                                  "ema": c["ema"] | {"head.weight": change(c["ema"]["head.weight"])}})


# What is made of the bytes and of the contents of a good checkpoint, and why it is then refused with --resume, with
# --weights for training, and with --weights for predicting; None: it is used.
CHECKPOINTS = {
    "truncated":         (lambda data, c: data[:len(data) // 2], DAMAGED),
    "without its end":   (lambda data, c: data[:-30], DAMAGED),
    "empty":             (lambda data, c: b"", DAMAGED),
    "text":              (lambda data, c: b"learning rate 3\n", DAMAGED),
    "a list":            (lambda data, c: saved([1, 2]), NONE),
    "a program":         (lambda data, c: saved({**c, "more": Trap()}), CODE),
    "an old program":    (lambda data, c: saved(Trap(), _use_new_zipfile_serialization=False), CODE),
    "another model":     (lambda data, c: saved({**c, "model": VisionGRU(3, **SMALL).state_dict(), "better": "model"}),
                          ["does not fit: .* in loading state_dict", *2 * ["do not fit this VisionGRU"]]),
    "another optimizer": (lambda data, c: saved({**c, "optimizer": {"state": {}, "param_groups": []}}),
                          [r"does not fit: .*its optimizer knows 0 parameters of \d+", None, None]),
    "short moments":     (lambda data, c: saved({**c, "optimizer": {"state": dict.fromkeys(range(N), SHORT)}}),
                          ["does not fit: .*exp_avg of parameter 0 is not finite torch.float32", None, None]),
    "no log":            (lambda data, c: saved({key: c[key] for key in c if key != "log"}),
                          ["does not fit: KeyError: 'log'", None, None]),
    "no settings":       (lambda data, c: saved({**c, "config": {}}), ["KeyError: 'classes'", None, None]),
    "strange settings":  (lambda data, c: saved({**c, "config": 7}), NONE),
    "an unknown model":  (lambda data, c: saved({**c, "config": {**c["config"], "model": "vast"}}),
                          ["model was vast and is now nano", None, "a model called 'vast'; expected one of nano"]),
    **{f"{key} {value}": (configured(**{key: value}), 3 * [f"{key} is .*; expected {words}"]) for key, value, words in [
        ("img_size", "x", "an integer from 32"), ("img_size", -5, "an integer"), ("val_resize", None, "an integer"),
        ("mean", [0.5, 0.5], "three numbers"), ("std", [1, 1, 0], "three numbers above 0"),
        ("classes", 3, "a list"), ("classes", ["a", "a"], "a list of different names")]},
    "nested classes":    (configured(classes=NESTED), 3 * ["classes is .*; expected a list"]),
    "two classes":       (configured(classes=["a", "b"]), ["trained on 2 classes", None, "for each of its 2 class"]),
    "nested seed":       (configured(seed=NESTED), ["seed was .* and is now 0", None, None]),
    "nested log":        (lambda data, c: saved({**c, "log": [{"top1": NESTED}]}), 3 * ["log is .*; expected a list"]),
    "nested names":      (lambda data, c: saved({"model": c["model"], "better": NESTED}), 3 * ["better is .*; exp"]),
    "a head of no size": (with_head(lambda head: head[0, 0]), [*2 * ["head.weight"], r"classifier has shape \(\)"]),
    "a head of NaN":     (with_head(lambda head: head * math.nan), FINITE),
    "a whole head":      (with_head(lambda head: head.long()), FINITE),
    "a sparse head":     (with_head(lambda head: head.to_sparse()), DENSE),
    "a meta head":       (with_head(lambda head: head.to("meta")), DENSE),
    "an 8-bit head":     (with_head(lambda head: head.to(torch.float8_e5m2)), DENSE),
    "an expanded head":  (with_head(lambda head: head.new_zeros(1).expand(10**7, 10**6)), DENSE),
    "weights alone":     (lambda data, c: saved(c["model"]), ["only weights.*; resume a last.pt", None, None]),
}


def saved(thing, **how):
    return bytes(train.encoded(functools.partial(torch.save, thing), **how))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_are_used_or_refused_with_path_and_reason(kind, runs, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, reasons = CHECKPOINTS[kind]
    content = train.load_checkpoint(runs[train] / "last.pt")
    Path("bad.pt").write_bytes(make((runs[train] / "last.pt").read_bytes(), content))
    model = ("--model", "nano") if kind in ("weights alone", "no settings") else ()
    uses = (arguments(pictures, "resumed", "--resume", "bad.pt"),
            arguments(pictures, "begun", "--weights", "bad.pt", "--lr", 0, "--epochs", 1),
            ["--predict", str(pictures / "val/ant/0.png"), "--weights", "bad.pt", *model, "--device", "cpu"])
    for words, reason in zip(uses, reasons):
        if reason:
            assert_refused(f"bad.pt(.|\n)*{reason}", train.main, words)
        else:
            assert train.main(words) == 0
    assert not Path("trap").exists()


def test_checkpoints_with_a_flipped_bit_are_refused_or_unharmed(tmp_path):
    content = {"model": VisionGRU(3, **SMALL).state_dict(), "step": 3, "args": {"lr": 0.1}}
    data, chance, found = saved(content), random.Random(0), 0
    for _ in range(300):
        flipped, place = bytearray(data), chance.randrange(len(data))
        flipped[place] ^= 0x10
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            assert comparable(train.load_checkpoint(tmp_path / "flipped.pt")) == comparable(content)
        except train.UserError as error:
            assert re.search("flipped.pt: .*damaged", str(error))
            found += 1
    assert found > 250


# -k finite ------------------------------------------------------------------------------------------------------------

@each_scan
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_no_scan_and_no_mingru_gives_nan_at_saturated_gates(scan, dtype):
    def chosen(values, *shape):
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape)].requires_grad_()
    gru = MinGRU(2, expansion=1, scan=scan)
    gru.in_proj = torch.nn.Identity()
    least, most = torch.finfo(dtype).tiny, min(torch.finfo(dtype).max, 1e30)
    for T, reverse in itertools.product((1, 64, 1009), (False, True)):
        cases = [(gru, [chosen([-most, -90.0, -0.0, 0.0, 90.0, 6e4], 2, T, 4)])]
        # Gates closed, open, a mix of both, or as small as the type knows.
        for gates, b, with_h0 in itertools.product(([1.0], [0.0], [0.0, 1.0], [least]), (0.0, 100.0), (0, 1)):
            inputs = [chosen(gates, 2, T, 3), chosen([b], 2, T, 3)] + with_h0 * [chosen([1.0], 2, 3)]
            cases.append((visiongru.SCANS[scan], inputs))
        for function, inputs in cases:
            outputs = function(*inputs, reverse=reverse)
            outputs = outputs if function is gru else [outputs]
            grads = torch.autograd.grad(sum(t.float().mean() for t in outputs), inputs)
            assert not any(t.isnan().any() for t in (*outputs, *grads)), (T, reverse, inputs)


def test_finite_logits_or_no_class_is_named(module, words, runs, pictures, tmp_path, monkeypatch, capsys):
    name, number = ("head.weight", 3e38) if module is train else ("decode_head.bottleneck.1.running_var", -1)
    checkpoint, bad = train.load_checkpoint(runs[module] / "best.pt"), tmp_path / "bad.pt"
    for state in filter(None, (checkpoint["model"], checkpoint["ema"])):
        state[name].fill_(number)
    torch.save(checkpoint, bad)
    use = ["--weights", str(bad), "--device", "cpu"]
    assert_refused("the validation images: the model's output is not finite", module.main,
                   ["--eval", *words()[:2], *use])
    images = [str(pictures / "val/ant" / f"{i}.png") for i in range(3)]
    read = train.read_image
    monkeypatch.setattr(train, "read_image", lambda path: bytes(2**62) if path == images[1] else read(path))
    more = ["--out", str(tmp_path)] if module is segment else []
    assert module.main(["--predict", *images, *use, *more]) == 2
    err = capsys.readouterr().err
    assert err.count("is not finite") == 2 and f"{images[1]}: out of memory" in err and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("more, unsound, reason", [
    (["--lr", 1e39], lambda model: None, "the weights are no longer finite after step 2"),
    (["--lr", 1e4, "--warmup-epochs", 0, "--amp", "fp16"], lambda model: None, "(the loss is .*|finite after) step "),
    (["--model-ema-decay", 0],
     lambda model: model.head.register_forward_hook(lambda head, x, logits: logits * math.nan),
     "the loss is nan at step 1 of 12, learning rate"),
    (["--amp", "fp16", "--epochs", 8], lambda model: model.head.weight.register_hook(lambda grad: grad * math.nan),
     "its gradients are not finite at any scale, at step 36 of 48")])
def test_finite_or_else_the_run_ends_and_nothing_is_saved(more, unsound, reason, pictures, out, monkeypatch):
    def make(**kw):
        model = micro_model(**kw)
        unsound(model)
        return model
    monkeypatch.setitem(train.MODELS, "nano", make)
    with pytest.raises(train.UserError, match=f"{reason}.*in a new run with another --out") as error:
        train.main(arguments(pictures, out, "--save-every", 1, *more))
    step = int(re.search(r"step (\d+)", str(error.value))[1])
    last = out / "last.pt"
    start = out / "best.pt" if (out / "best.pt").exists() else last
    assert (f"from the unchanged {start}: --weights {start}" in str(error.value)) == start.exists()
    saved = train.load_checkpoint(last) if last.exists() else {"step": 0, "model": {}}
    assert saved["step"] == step - 1 and all(value.isfinite().all() for value in saved["model"].values())


# -k options: any command line -----------------------------------------------------------------------------------------

NUMBERS = ["0", "0", "1", "0.5", "0.5", "-1", "2", "nan", "inf", "-inf", "1e-300", "1e300", "", "x", "1_0", "0x10",
           "10" * 20]
PIXELS = ["32", "33", "40", "31", "1000000", "-1", "x"]
VALUES = {  # for the options that take other things than NUMBERS, or can take long; the test makes the files
    "data": ["pictures", "streets", "empty", "absent", "file", ""], "model": ["nano", "tiny", "base", "vast", ""],
    "weights": ["classifier.pt", "segmenter.pt", "weights.pt", "broken.pt", "absent.pt", "empty", ""],
    "backbone-weights": ["classifier.pt", "segmenter.pt", "broken.pt"],
    "resume": ["auto", "classifier.pt", "segmenter.pt", "broken.pt", "absent.pt", ""],
    "out": ["new", "file", "file/new", "classifier", "segmenter", ""],
    "predict": ["file", "plain.png", "plain.png half.jpg", "absent.png", "empty", "plain.png plain.png"],
    "batch-size": ["4", "2", "1", "3", *NUMBERS], "grad-accum-steps": ["2", "1", "3", *NUMBERS],
    "epochs": ["1", "2", "0", "-1", "x"], "iters": ["1", "2", "0", "-1", "x"], "workers": ["0", "1", "-1", "x"],
    "num-classes": ["3", "2", *NUMBERS], "ignore-label": ["255", "3", *NUMBERS],
    "img-size": PIXELS, "val-resize": PIXELS, "crop-size": PIXELS, "short-side": PIXELS,
    "opt-betas": ["0.9 0.99", "0 0", "1 1", "0.9", "nan 0", "x y"],
    "randaug": ["0 0", "2 9", "1 30", "1 31", "-1 0", "2"],
    "scale": ["1 1", "0.5 2", "2 1", "0 1", "nan 1", "1 inf", "1e300 1e300", "1e-300 1"],
    "device": ["cpu", "cpu:1", "cuda", "cuda:-1", "cuda:7", "tpu", "meta", "", "auto"],
    "amp": ["", "auto", "bf16", "fp16", "off", "fp8"],
}


def command_line(module, chance):
    options = {"--eval": [""], "--predict": VALUES["predict"], "--nonsense": ["1"], "stray": [""]}
    for name, option in module.options().items():
        if option.argument is train.FLAG:
            options |= {f"--{name}": [""], f"--no-{name}": [""]}
        else:
            options[f"--{name}"] = VALUES.get(name, NUMBERS)
    words = []
    for option in chance.sample(sorted(options), chance.choice([1, 1, 1, 2, 4])):
        words += [option, *chance.choice(options[option]).split(" ")] if options[option] != [""] else [option]
    return words


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
@process
def test_options_any_command_line_ends_with_0_or_2(module, count, pictures, streets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind in train.Shapes, segment.Scenes:
        monkeypatch.setattr(kind, "__len__", lambda self: 32)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **kw: None)  # minutes, and no matter of the arguments
    Path("pictures").symlink_to(pictures), Path("streets").symlink_to(streets)
    Path("empty").mkdir(), Path("file").touch(), write_image("plain.png", Path()), write_image("half.jpg", Path())
    assert train.main(arguments("pictures", "classifier", "--epochs", 1)) == 0
    assert segment.main(seg_arguments("streets", "segmenter", "--iters", 3)) == 0
    shutil.copy("classifier/last.pt", "classifier.pt"), shutil.copy("segmenter/last.pt", "segmenter.pt")
    torch.save(micro_model(num_classes=3).state_dict(), "weights.pt")
    Path("broken.pt").write_bytes(Path("classifier.pt").read_bytes()[:9999])
    run, use = {train: (arguments("pictures", "new", "--epochs", 1, "--batch-size", 16), "classifier.pt"),
                segment: (seg_arguments("streets", "new", "--iters", 1), "segmenter.pt")}[module]
    chance, statuses = random.Random(count), []
    for _ in range(count):
        words = command_line(module, chance)
        base = ["--weights", use, "--device", "cpu"] if {"--eval", "--predict"} & {*words} else run
        words = [*(base if chance.random() < 0.8 else base[2:]), *words]
        with pytest.raises(SystemExit) as end:
            train.run_main(lambda: module.main(words))  # with 1 for an error that it does not know
        err = capsys.readouterr().err
        statuses.append(end.value.code)
        assert end.value.code in (0, 2) and "Traceback" not in err, f"{words}\n{err}"
        assert end.value.code == 0 or "error: " in err, words
        shutil.rmtree("new", ignore_errors=True)
    print(f"{count} command lines, {statuses.count(0)} of them accepted")
    assert 0.1 < statuses.count(0) / count < 0.9
