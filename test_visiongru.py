"""What VisionGRU promises, each promise on the smallest case that could break it. `pytest` runs all of it."""

import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import segment
import train
import visiongru
from visiongru import (GRU2D, MinGRU, UPerNet, VisionGRU, load_weights, scan_log, scan_parallel, scan_sequential,
                       visiongru_base, visiongru_nano, visiongru_tiny)

HERE = Path(__file__).parent
MICRO = dict(dim=8, depths=(1, 1, 2, 1))


HANDLERS = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(autouse=True)
def repeatable():
    torch.manual_seed(0)
    yield
    for number, handler in HANDLERS:  # pytest's own, which a run of ours replaces
        signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# The recurrence
# ---------------------------------------------------------------------------------------------------------------------

def coefficients(T, with_h0, dtype=torch.float64):
    a, b = torch.rand(2, T, 3, dtype=dtype), torch.rand(2, T, 3, dtype=dtype) + 0.1
    h0 = torch.rand(2, 3, dtype=dtype) if with_h0 else None
    return [t.requires_grad_() if t is not None else None for t in (a, b, h0)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 9, 12, 35, 37, 1009])
def test_the_three_scans_agree_in_value_and_gradient(T, with_h0, reverse):
    inputs = coefficients(T, with_h0)
    weight = torch.randn(2, T, 3, dtype=torch.float64)
    results = []
    for scan in (scan_sequential, scan_parallel, scan_log):
        h = scan(*inputs, reverse=reverse)
        grads = torch.autograd.grad((h * weight).sum(), [t for t in inputs if t is not None])
        results.append([h, *grads])
    for result, tolerance in zip(results[1:], (1e-11, 1e-6)):  # log-space has fewer digits left, in float64 too
        for value, expected in zip(result, results[0]):
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


POWERS_OF_ROW = [length + i for length in (16**2, 16**3) for i in (-1, 0, 1)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_h0", [False, True])
def test_the_parallel_scan_is_the_loop_at_every_length(with_h0, reverse):
    for T in [*range(1, 301), *POWERS_OF_ROW]:
        inputs = [None if t is None else t[:1, ..., :1].detach().requires_grad_() for t in coefficients(T, with_h0)]
        weight = torch.randn(1, T, 1, dtype=torch.float64)
        results = []
        for scan in (scan_sequential, scan_parallel):
            h = scan(*inputs, reverse=reverse)
            results.append([h, *torch.autograd.grad((h * weight).sum(), [t for t in inputs if t is not None])])
        for expected, value in zip(*results):
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11, msg=lambda m: f"T = {T}: {m}")


def test_a_sequence_of_no_elements_has_no_states_and_mingru_refuses_it():
    a = torch.rand(2, 0, 3)
    for scan in (scan_sequential, scan_parallel, scan_log):
        for h0 in (None, torch.rand(2, 3)):
            assert scan(a, a, h0).shape == (2, 0, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 0, 4\); expected \(B, T, dim\) with T of at least 1"):
        MinGRU(4)(torch.rand(2, 0, 4))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("T", [1, 2, 5, 8])
def test_the_parallel_scan_has_the_right_first_and_second_derivatives(T, with_h0, reverse):
    inputs = [t for t in coefficients(T, with_h0) if t is not None]
    assert torch.autograd.gradcheck(lambda *t: scan_parallel(*t, reverse=reverse), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: scan_parallel(*t, reverse=reverse), inputs)


def test_a_long_scan_agrees_with_the_loop_in_both_directions():
    a, b = torch.rand(1, 20_011, 2, dtype=torch.float64), torch.rand(1, 20_011, 2, dtype=torch.float64)
    for reverse in (False, True):
        torch.testing.assert_close(scan_parallel(a, b, reverse=reverse), scan_sequential(a, b, reverse=reverse))


def test_reverse_is_the_flipped_sequence():
    a, b, h0 = coefficients(11, True)
    for scan in (scan_sequential, scan_parallel, scan_log):
        torch.testing.assert_close(scan(a, b, h0, reverse=True), scan(a.flip(1), b.flip(1), h0).flip(1))


def test_the_parallel_scan_reads_views_and_writes_no_input():
    a, b = torch.rand(2, 24, 3), torch.rand(2, 24, 3)
    views = a.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([b, b], dim=2)[..., 3:]
    copies = [v.clone() for v in views]
    torch.testing.assert_close(scan_parallel(*views), scan_sequential(a, b))
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies))


class Given(torch.nn.Module):
    """In place of in_proj: the gate and candidate are the input itself."""

    def forward(self, x):
        return x


def relative_error(scan, u, reverse):
    gru = MinGRU(1, expansion=2, scan=scan)
    gru.in_proj = Given()
    a, b = gru.coefficients(u)
    exact = scan_sequential(*gru.coefficients(u.double()), reverse=reverse)
    return ((visiongru.SCANS[scan](a, b, reverse=reverse) - exact).abs() / exact).max().item()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gates", [-8, 0, 8], ids=["nearly closed", "typical", "nearly open"])
def test_float32_keeps_its_accuracy_over_65536_steps_and_log_space_does_not(gates, reverse):
    u = torch.randn(1, 65_536, 4)
    u[..., 2:] += gates  # candidates first, then gates
    assert relative_error("parallel", u, reverse) < 1e-5
    if gates >= 0:  # with closed gates log A_t hardly grows, and log-space does better
        assert relative_error("log", u, reverse) > 1e-4


def test_gradients_of_the_float32_scan_are_accurate_too():
    a, b = torch.sigmoid(torch.randn(1, 16_384, 2)), torch.rand(1, 16_384, 2)
    weight = torch.rand(1, 16_384, 2)
    grads = []
    for dtype, scan in ((torch.float32, scan_parallel), (torch.float64, scan_sequential)):
        inputs = [a.to(dtype, copy=True).requires_grad_(), b.to(dtype, copy=True).requires_grad_()]
        grads.append(torch.autograd.grad((scan(*inputs) * weight).sum(), inputs))
    for value, exact in zip(*grads):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# minGRU and 2DGRU
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("expansion", [1, 2, 1.5])
def test_mingru_computes_its_equations(expansion):
    gru = MinGRU(6, expansion).double()
    E = int(6 * expansion)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    W_h, W_z = gru.in_proj.weight[:E], gru.in_proj.weight[E:]
    h, outputs = torch.zeros(2, E, dtype=torch.float64), []
    for x_t in x.unbind(1):
        z, u = torch.sigmoid(x_t @ W_z.T), x_t @ W_h.T
        h = (1 - z) * h + z * torch.where(u >= 0, u + 0.5, torch.sigmoid(u))
        outputs.append(h if expansion == 1 else h @ gru.out_proj.weight.T)
    y, h_T = gru(x)
    torch.testing.assert_close(y, torch.stack(outputs, 1))
    torch.testing.assert_close(h_T, h)


@pytest.mark.parametrize("scan", visiongru.SCANS)
def test_step_equals_the_whole_sequence_and_the_state_carries(scan):
    gru = MinGRU(4, scan=scan).double()
    x = torch.randn(3, 13, 4, dtype=torch.float64)
    y, h_T = gru(x)
    h, steps = None, []
    for x_t in x.unbind(1):
        y_t, h = gru.step(x_t, h)
        steps.append(y_t)
    torch.testing.assert_close(torch.stack(steps, 1), y)
    torch.testing.assert_close(h, h_T)
    first, h_5 = gru(x[:, :5])
    rest, h_13 = gru(x[:, 5:], h_5)
    torch.testing.assert_close(torch.cat([first, rest], 1), y)
    torch.testing.assert_close(h_13, h_T)


@pytest.mark.parametrize("piece", [2**21, 1000, 1], ids=["in one piece", "in pieces", "in small pieces"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3, 12, 37, 1009])
def test_mingru_in_parallel_is_the_loop_in_value_and_gradient(T, with_h0, reverse, piece, monkeypatch):
    monkeypatch.setattr(visiongru, "PIECE", piece)  # numbers
    loop, ours = MinGRU(3, 2, "sequential").double(), MinGRU(3, 2, "parallel").double()
    ours.load_state_dict(loop.state_dict())
    x = torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)
    h0 = torch.rand(2, 6, dtype=torch.float64, requires_grad=True) if with_h0 else None
    weight = torch.randn(2, T, 3, dtype=torch.float64)
    results = []
    for gru in (loop, ours):
        y, h = gru(x, h0, reverse)
        wanted = [x, *gru.parameters()] + ([h0] if with_h0 else [])
        results.append([y, h, *torch.autograd.grad((y * weight).sum() + h.square().sum(), wanted)])
    for value, expected in zip(*results):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


def test_at_zero_input_both_forms_have_the_same_gradient():
    expected = None
    gru = MinGRU(1, 1)
    for gru.scan in visiongru.SCANS:
        x = torch.zeros(1, 3, 1, requires_grad=True)
        grad, = torch.autograd.grad(gru(x)[0].sum(), x)
        expected = grad if expected is None else expected
        torch.testing.assert_close(grad, expected)


def test_torch_func_maps_over_scans_and_gives_per_sample_gradients():
    a, b, h0 = torch.rand(3, 2, 37, 4), torch.rand(3, 2, 37, 4), torch.rand(3, 2, 4)
    for reverse in (False, True):
        def scan(*inputs):
            return scan_parallel(*inputs, reverse=reverse)
        torch.testing.assert_close(torch.func.vmap(scan)(a, b, h0), scan(a, b, h0))
        torch.testing.assert_close(torch.func.vmap(scan, in_dims=1, out_dims=1)(a, b, h0), scan(a, b, h0))
    model = VisionGRU(5, **MICRO).double()
    x, y = torch.randn(3, 3, 40, 48, dtype=torch.float64), torch.tensor([0, 1, 2])
    names, weights = zip(*model.named_parameters())

    def loss(weights, image, label):
        logits = torch.func.functional_call(model, dict(zip(names, weights)), (image[None],))
        return F.cross_entropy(logits, label[None])
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for i in range(3):
        alone = torch.autograd.grad(F.cross_entropy(model(x[i:i + 1]), y[i:i + 1]), weights)
        for gradient, expected in zip(mapped, alone):
            torch.testing.assert_close(gradient[i], expected)


def test_mingru_can_be_differentiated_twice():
    gru = MinGRU(2, 2).double()
    x, h0 = torch.randn(2, 7, 2, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    for reverse in (False, True):
        for inputs in ((x,), (x, h0)):
            inputs = [t.requires_grad_() for t in inputs]
            assert torch.autograd.gradcheck(lambda *t: gru(*t, reverse=reverse), inputs)
            assert torch.autograd.gradgradcheck(lambda *t: gru(*t, reverse=reverse), inputs)


@pytest.mark.parametrize("gates", [-8, 0, 8], ids=["nearly closed", "typical", "nearly open"])
def test_mingrus_float32_gradients_are_as_accurate_as_the_loops(gates):
    u = torch.randn(1, 4096, 8)
    u[..., 4:] += gates
    grad = torch.randn(1, 4096, 4)

    def gradient(scan, dtype):
        v = u.to(dtype).requires_grad_()
        return torch.autograd.grad(scan(v), v, grad.to(dtype))[0].double()

    def loop(v):
        a, z, candidate = visiongru._gates(v)
        return scan_sequential(a, z * candidate, reverse=True)
    exact = gradient(loop, torch.float64)
    for half in (slice(0, 4), slice(4, 8)):  # of the candidates, and of the gates
        error, of_loop = ((gradient(scan, torch.float32) - exact)[..., half].abs().max() / exact[..., half].abs().max()
                          for scan in (lambda v: visiongru._ParallelMinGRU.apply(v, None, True)[0], loop))
        assert error < 3 * of_loop + 1e-6


def test_mingru_reversed_returns_the_state_at_the_first_element():
    gru = MinGRU(4).double()
    x, h0 = torch.randn(2, 7, 4, dtype=torch.float64), torch.rand(2, 8, dtype=torch.float64)
    y, h = gru(x, h0, reverse=True)
    flipped, h_flipped = gru(x.flip(1), h0)
    torch.testing.assert_close(y, flipped.flip(1))
    torch.testing.assert_close(h, h_flipped)


def test_2dgru_is_the_papers_two_triangular_matrices():
    gru = GRU2D(3, expansion=1).double()
    x = torch.randn(1, 3, 4, 3, dtype=torch.float64)
    expected = torch.zeros(12, 3, dtype=torch.float64)
    for direction in (gru.left, gru.right):
        a, b = (t[0] for t in direction.coefficients(x.flatten(1, 2)))
        for L in range(12):
            for m in (range(L + 1) if direction is gru.left else range(L, 12)):
                between = a[m + 1:L + 1] if direction is gru.left else a[L:m]
                expected[L] += between.prod(0) * b[m]
    torch.testing.assert_close(gru(x).view(12, 3), expected)


def test_every_pixel_reaches_every_other():
    gru = GRU2D(3).double()
    x = torch.randn(1, 4, 5, 3, dtype=torch.float64)
    for i, j in ((0, 0), (1, 3), (3, 4)):
        changed = x.clone()
        changed[0, i, j] += 1
        assert ((gru(changed) - gru(x)).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scan", visiongru.SCANS)
def test_extreme_inputs_stay_finite_under_autocast(dtype, scan):
    gru = GRU2D(8, scan=scan)
    for size in (0.0, 1e-6, 1.0, 1e3, 3e4):
        x = (size * torch.randn(2, 6, 7, 8)).clamp(-6e4, 6e4).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = gru(x)
        (y.float() / (1 + size)).mean().backward()
        assert y.isfinite().all()
        assert all(p.grad.isfinite().all() for p in [x, *gru.parameters()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_recurrence_accumulates_in_float32_under_autocast_and_in_half_models(dtype):
    gru = MinGRU(4)
    x = torch.randn(1, 50, 4)
    with torch.autocast("cpu", dtype):
        a, b = gru.coefficients(x)
        y, h = gru(x)
    assert a.dtype == b.dtype == h.dtype == torch.float32 and y.dtype == dtype
    y, h = gru.to(dtype)(x.to(dtype))
    assert h.dtype == torch.float32 and y.dtype == dtype


@pytest.mark.parametrize("make, message", [
    (lambda: MinGRU(4, scan="fast"), "scan is 'fast'; expected one of 'parallel', 'log', 'sequential'"),
    (lambda: GRU2D(4, scan=None), "scan is None"),
    (lambda: MinGRU(0), "dim is 0"),
    (lambda: MinGRU(5, 1.5), "expansion 1.5"),
    (lambda: VisionGRU(depths=(2, 2)), r"depths is \(2, 2\); expected four"),
    (lambda: VisionGRU(depths=(2, 2, 0, 2)), "expected four whole numbers of at least 1"),
    (lambda: VisionGRU(dim=7), "dim is 7; expected an even number"),
    (lambda: VisionGRU(dim=-8), "dim is -8"),
    (lambda: VisionGRU(num_classes=0), "num_classes is 0"),
    (lambda: VisionGRU(dim=72.0), "dim is 72.0"),
    (lambda: VisionGRU(depths=(2, 2, 8.0, 2)), "expected four whole numbers"),
    (lambda: MinGRU(4, math.inf), "expansion inf"),
    (lambda: VisionGRU(mlp_ratio=0), "mlp_ratio is 0"),
    (lambda: VisionGRU(drop_path=1.0), "drop_path is 1.0"),
    (lambda: VisionGRU(scan="quick"), "scan is 'quick'"),
])
def test_sizes_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# The whole model
# ---------------------------------------------------------------------------------------------------------------------

def release_names(model):
    """The names that the authors' release gives to the parameters of `model`, in the same order."""
    names = []
    for name in model.state_dict():
        part = name.split(".")
        if part[0] == "stages":
            layer = f"snake_gru.layers.{part[1]}.{part[2]}"
            rest = ".".join(part[3:])
            for ours, theirs in {"gru.left": "min_gru_1", "gru.right": "min_gru_2", "in_proj": "to_hidden_and_gate",
                                 "out_proj": "to_out", "norm1": "norm", "dwconv": "dw_conv", "ffn.0": "projection1",
                                 "ffn.2": "projection2"}.items():
                rest = rest.replace(ours, theirs)
            names.append(f"{layer}.{rest}")
        elif part[0] == "downsamples":
            names.append(f"snake_gru.{part[2]}{int(part[1]) + 1}.{part[3]}")
        else:
            names.append({"stem": "tokenizer", "head": "fc"}[part[0]] + name[len(part[0]):])
    return names


def release_state(model):
    """A state dict under the release's names, each value made from its parameter's name: what the golden numbers are
    the authors' code's answer to."""
    state = {}
    for name, value in zip(release_names(model), model.state_dict().values()):
        t = torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + sum(map(ord, name))).view(value.shape)
        if name.endswith("bias"):
            weight = 0.1 * t
        elif value.ndim == 1:
            weight = 1 + 0.1 * t
        else:
            weight = t * math.sqrt(2 / value[0].numel())
        state[name] = weight.float()
    return state


def golden_input(batch, height, width):
    i = torch.arange(batch * 3 * height * width, dtype=torch.float64)
    return (torch.sin(0.013 * i) + torch.cos(0.00071 * i)).float().double().view(batch, 3, height, width)


# What the authors' code computes in float64 for `release_state` and `golden_input`: mean, standard deviation, and the
# values at eight places spread evenly over the flat result.
GOLDEN_LOGITS = {
    (8, (1, 1, 2, 1), 10, 64): (-0.5298888471021985, 3.0196351280583666,
        [-0.67586685, -4.52903495, 4.07260504, -1.78723826, -0.22247772, -2.39091867, 3.86477214, -3.56821593]),
    (72, (2, 2, 8, 2), 1000, 224): (-0.01587227750460631, 13.256386728134858,
        [-5.20928662, 14.33675563, 15.34964491, 15.21583853, -14.04120462, -17.26901239, -16.42623919, -15.35342967]),
}
GOLDEN_FEATURES = {  # of the micro model, for each image size: shape, mean, deviation, values
    (64, 96): [
        ((8, 16, 24), -0.5574175141402794, 4.324003190871255,
         [0.28058976, 4.66954953, -3.72635808, -1.74178658, 1.29087471, -3.76566649, 7.44073194, -4.63236582]),
        ((16, 8, 12), 0.07394817516809009, 1.5207645505314056,
         [0.47272146, -0.65424548, 1.13986439, 0.09063206, -2.99123092, -0.62857121, 1.45286008, -0.25424899]),
        ((32, 4, 6), 0.025183171823039238, 2.1066113501786115,
         [-0.40703334, 1.00960823, -0.7041401, 3.41740596, -2.40441824, 4.34581302, -1.62380396, -0.59183792]),
        ((64, 2, 3), 0.04958580355607739, 1.413403399221964,
         [0.18470168, -0.13016827, 0.7348603, 3.5301678, 0.09837994, -0.14368315, 2.03450633, 0.22849192]),
    ],
    (97, 130): [
        ((8, 25, 33), -0.48031192371672965, 4.191852413339776,
         [1.40295812, 5.37192554, -5.23825164, -4.34640276, 2.52739868, -2.39653152, 7.80932854, -3.19847745]),
        ((16, 13, 17), 0.06088725475003266, 1.573518085492458,
         [0.84024928, -2.13358507, 0.50177435, -0.15797584, -1.74140918, -0.29992642, 1.299246, 1.88847796]),
        ((32, 7, 9), 0.025134150230442215, 1.3713471146280665,
         [-0.27466969, 1.69453144, 0.97902019, 0.32652303, 0.70256762, 0.23794745, 1.08376165, -2.09677174]),
        ((64, 4, 5), 0.04534745757522718, 1.2598352212755997,
         [-1.80409974, -1.00858184, 1.37076848, -0.11614387, 1.47763797, 2.32157229, -0.42101272, 0.42585867]),
    ],
}


def assert_golden(result, mean, std, values):
    flat = result.flatten()
    at = [k * (len(flat) - 1) // 7 for k in range(8)]
    torch.testing.assert_close(flat[at], torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    assert flat.mean().item() == pytest.approx(mean, rel=1e-6)
    assert flat.std().item() == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize("case", GOLDEN_LOGITS, ids=["micro", "tiny"])
def test_the_authors_weights_give_the_authors_logits(case):
    dim, depths, num_classes, size = case
    model = VisionGRU(num_classes, dim, depths).double()
    load_weights(model, release_state(model))
    with torch.no_grad():
        assert_golden(model(golden_input(2, size, size)), *GOLDEN_LOGITS[case])


@pytest.mark.parametrize("size", GOLDEN_FEATURES)
def test_the_authors_weights_give_the_authors_features(size):
    model = VisionGRU(**MICRO).double()
    load_weights(model, release_state(model))
    with torch.no_grad():
        maps = model.features(golden_input(1, *size))
    assert len(maps) == 4
    for result, (shape, *golden) in zip(maps, GOLDEN_FEATURES[size]):
        assert result.shape == (1, *shape)
        assert_golden(result, *golden)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        assert parameters(visiongru_tiny()) == 30_216_952
        assert parameters(visiongru_base()) == 86_907_352
        assert 1e6 < parameters(visiongru_nano()) < 3e6
        assert parameters(VisionGRU(10, **MICRO)) == 157_778


@pytest.mark.parametrize("size, giga", [(224, 4.87), (512, 25.6), (640, 40.0), (1024, 102.3), (1248, 151.9)])
def test_multiply_adds_of_figure_1(size, giga):
    with torch.device("meta"):
        model, x = visiongru_tiny(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x) if size == 224 else model.features(x)
    assert counter.get_total_flops() / 2 / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("scan", ["log", "sequential"])
def test_the_choice_of_scan_changes_neither_parameters_nor_result(scan):
    model, other = VisionGRU(5, **MICRO).double(), VisionGRU(5, **MICRO, scan=scan).double()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (32, 500), (97, 64), (131, 131)])
def test_any_size_and_aspect(height, width):
    model = VisionGRU(5, **MICRO)
    x = torch.randn(2, 3, height, width)
    maps = model.features(x)
    assert [m.shape for m in maps] == [(2, 8 * 2**i, math.ceil(height / 2**(i + 2)), math.ceil(width / 2**(i + 2)))
                                       for i in range(4)]
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_float_types_are_taken_as_they_come():
    model = VisionGRU(5, **MICRO)
    x = torch.randn(1, 3, 32, 32)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert model(x.to(dtype)).dtype == torch.float32
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        y = VisionGRU(5, **MICRO).to(dtype)(x)
        assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_model_stays_finite_under_autocast(dtype):
    model = VisionGRU(5, **MICRO)
    for size in (0.0, 1.0, 1e3):
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(size * torch.randn(2, 3, 64, 64)).float(), torch.tensor([0, 1]))
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("images, message", [
    (torch.zeros(3, 64, 64), r"shape \(3, 64, 64\); expected \(B, 3, H, W\)"),
    (torch.zeros(1, 64, 64, 3), r"shape \(1, 64, 64, 3\)"),
    (torch.zeros(1, 1, 64, 64), r"shape \(1, 1, 64, 64\)"),
    (torch.zeros(1, 3, 31, 64), r"shape \(1, 3, 31, 64\); expected \(B, 3, H, W\), H and W at least 32"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8; expected floating point"),
])
def test_images_that_are_none_are_refused(images, message):
    model = VisionGRU(5, **MICRO)
    for call in (model, model.features):
        with pytest.raises(ValueError, match=message):
            call(images)


def test_stochastic_depth_grows_with_depth_acts_in_training_only_and_is_off_by_default():
    model = VisionGRU(5, **MICRO, drop_path=0.4)
    rates = [block.drop_path.p for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    plain = VisionGRU(5, **MICRO)
    assert torch.equal(plain(x), plain(x))


def test_activation_checkpointing_changes_memory_and_nothing_else():
    plain, saving = VisionGRU(5, **MICRO, drop_path=0.4), VisionGRU(5, **MICRO, drop_path=0.4, checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 64, 64)
    results, kept = [], []
    for model in (plain, saving):
        torch.manual_seed(1)
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
        kept.append(sum({t.untyped_storage().data_ptr(): t.numel() for t in tensors}.values()))
    assert all(torch.equal(value, expected) for value, expected in zip(*results))
    assert kept[1] < 0.5 * kept[0]


def exported(model, x, **sizes):
    """The program of torch.export, with any batch size, and of any height and width if `sizes` gives their dims."""
    dynamic = {0: torch.export.Dim("batch"), **{{"height": 2, "width": 3}[name]: dim for name, dim in sizes.items()}}
    return torch.export.export(model.eval(), (x,), dynamic_shapes=(dynamic,), strict=False)


SIDES = {name: torch.export.Dim(name, min=33, max=1024) for name in ("height", "width")}
BATCHES = [(1, 3, 40, 64), (5, 3, 40, 64)]
SIZES = [(1, 3, 33, 50), (2, 3, 40, 64), (3, 3, 97, 130), (1, 3, 256, 200)]


@pytest.mark.parametrize("sides, shapes", [({}, BATCHES), (SIDES, SIZES)], ids=["any batch", "any size"])
def test_a_pt2_file_runs_where_visiongru_is_unknown(sides, shapes, tmp_path):
    model = VisionGRU(5, **MICRO)
    torch.export.save(exported(model, torch.randn(2, 3, 40, 64), **sides), tmp_path / "model.pt2")
    images = [torch.randn(shape) for shape in shapes]
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "run.py").write_text("""if True:
        import sys, torch
        sys.modules["visiongru"] = None  # to import it is an error
        model = torch.export.load("model.pt2").module()
        torch.save([model(x) for x in torch.load("images.pt")], "logits.pt")
        assert "torchvision" not in sys.modules
    """)
    subprocess.run([sys.executable, "run.py"], cwd=tmp_path, check=True)
    for x, logits in zip(images, torch.load(tmp_path / "logits.pt")):
        torch.testing.assert_close(logits, model(x))


def assert_runs_as_onnx(model, x, shapes, folder, sides={}):
    """The ONNX file's logits differ from the model's by less than 1e-4 of their deviation."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
    pytest.importorskip("onnxscript", reason="pip install -e '.[export]'")
    program = torch.onnx.export(exported(model, x, **sides), dynamo=True, optimize=False, verbose=False)
    program.save(folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    for shape in shapes:
        images = torch.randn(shape)
        with torch.no_grad():
            expected = model(images)
        logits = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
        assert logits.shape == expected.shape and (logits - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("sides, shapes", [({}, BATCHES), (SIDES, SIZES)], ids=["any batch", "any size"])
def test_onnxruntime_gives_the_models_logits(sides, shapes, tmp_path):
    assert_runs_as_onnx(VisionGRU(5, **MICRO), torch.randn(2, 3, 40, 64), shapes, tmp_path, sides)


@pytest.mark.slow
@pytest.mark.parametrize("make", [visiongru_nano, visiongru_tiny, lambda: UPerNet(visiongru_nano(), 7, 64, 32)],
                         ids=["nano", "tiny", "upernet"])
def test_onnxruntime_gives_the_logits_at_224_px(make, tmp_path):
    began = time.perf_counter()
    assert_runs_as_onnx(make(), torch.randn(2, 3, 224, 224), [(1, 3, 224, 224), (3, 3, 224, 224)], tmp_path)
    print(f"{time.perf_counter() - began:.0f} s")


@pytest.mark.slow
def test_the_readmes_lines_on_taking_it_elsewhere_run(tmp_path, monkeypatch):
    section = (HERE / "README.md").read_text().split("## Taking it elsewhere")[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(section.split("```python")[1].split("```")[0], names)
    assert names["logits"].shape == (2, 1000) and (tmp_path / "tiny.onnx").stat().st_size > 1e6
    assert names["program"].module()(torch.randn(1, 3, 97, 130)).shape == (1, 1000)


def test_the_named_models_take_the_arguments_of_visiongru():
    with torch.device("meta"):
        model = visiongru_nano(num_classes=7, drop_path=0.1, scan="log")
    assert model.num_classes == 7 and model.stages[3][0].gru.left.scan == "log"


# ---------------------------------------------------------------------------------------------------------------------
# load_weights
# ---------------------------------------------------------------------------------------------------------------------

def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "vig.", "backbone.vig.", "module._orig_mod.",
                                    "_orig_mod.module.vig."])
@pytest.mark.parametrize("names", ["ours", "release"])
def test_weights_load_with_any_prefix(names, prefix, tmp_path):
    source, model = VisionGRU(5, **MICRO), VisionGRU(5, **MICRO)
    keys = release_names(source) if names == "release" else source.state_dict()
    state = {prefix + key: value for key, value in zip(keys, source.state_dict().values())}
    assert load_weights(model, state) is model and same(model, source.state_dict())
    torch.save(state, tmp_path / "w.pth")
    for path in (tmp_path / "w.pth", str(tmp_path / "w.pth")):
        model = load_weights(VisionGRU(5, **MICRO), path)
        assert same(model, source.state_dict())


@pytest.mark.parametrize("better", ["model", "ema"])
def test_of_a_checkpoint_the_better_of_model_and_ema_is_loaded(better):
    states = {name: VisionGRU(5, **MICRO).state_dict() for name in ("model", "ema")}
    model = load_weights(VisionGRU(5, **MICRO), {**states, "better": better, "epoch": 3})
    assert same(model, states[better])
    assert same(load_weights(model, {"model": states["model"], "ema": None, "better": "model"}), states["model"])
    assert same(load_weights(model, states), states["ema"])


def test_an_averaged_models_own_state_dict_loads():
    model = VisionGRU(5, **MICRO)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert same(load_weights(VisionGRU(5, **MICRO), averaged.state_dict()), model.state_dict())


@pytest.mark.parametrize("names", ["ours", "release"])
def test_a_head_of_another_class_count_is_left_alone_with_one_message(names):
    source, model = VisionGRU(5, **MICRO), VisionGRU(7, **MICRO)
    keys = release_names(source) if names == "release" else source.state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="5 classes and the model one for 7") as caught:
        load_weights(model, dict(zip(keys, source.state_dict().values())))
    assert len(caught) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("head.") else source.state_dict()[name])


def test_any_other_mismatch_lists_what_is_wrong_and_changes_nothing():
    state = VisionGRU(5, **MICRO).state_dict()
    state["extra.weight"] = state.pop("stem.conv1.bias")
    state["stages.0.0.norm1.weight"] = torch.zeros(9)
    model = VisionGRU(5, **MICRO)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(model, state)
    assert "missing: stem.conv1.bias" in str(error.value)
    assert "unexpected: extra.weight" in str(error.value)
    assert "mis-shaped: stages.0.0.norm1.weight (9,) instead of (8,)" in str(error.value)
    assert same(model, before)


def test_a_mismatch_names_a_few_keys_of_each_kind_and_counts_the_rest():
    with pytest.raises(ValueError, match=r"mis-shaped: stem.conv1.weight .* and \d+ more") as error:
        load_weights(VisionGRU(5, 10, MICRO["depths"]), VisionGRU(7, **MICRO).state_dict())
    assert len(str(error.value)) < 400
    with torch.device("meta"):
        tiny, nano = visiongru_tiny(), visiongru_nano()
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more\n.*mis-shaped: .* and \d+ more") as error:
        load_weights(tiny, nano.state_dict())
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("prefix, decoder", [("", False), ("backbone.", False), ("backbone.vig.", False),
                                             ("backbone.", True), ("backbone.vig.", True)])
def test_a_backbone_without_a_classifier_loads_with_one_message_about_the_head(prefix, decoder):
    source, model = VisionGRU(5, **MICRO), VisionGRU(5, **MICRO)
    state = {prefix + key: value for key, value in source.state_dict().items() if not key.startswith("head.")}
    if decoder:
        state["decode_head.conv_seg.weight"] = torch.zeros(3, 4, 1, 1)
    expected = {**source.state_dict(), **{key: value.clone() for key, value in model.state_dict().items()
                                          if key.startswith("head.")}}
    with pytest.warns(UserWarning, match="has no classifier: head is left at its initial values") as caught:
        load_weights(model, state)
    assert len(caught) == 1 and same(model, expected)


def test_files_that_hold_no_weights_are_named(tmp_path):
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    torch.save(Given(), tmp_path / "pickle.pt")
    for name in ("noise.pt", "dict.pt", "pickle.pt"):
        with pytest.raises(ValueError, match=name):
            load_weights(VisionGRU(5, **MICRO), tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_weights(VisionGRU(5, **MICRO), tmp_path / "absent.pt")


def test_the_model_compiles_as_one_graph():
    model = VisionGRU(5, **MICRO)
    x = torch.randn(2, 3, 40, 48)
    results = []
    for network in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = network(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    for value, expected in zip(*results):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_the_scripts_compile_parts_of_one_shape_once_and_validate_without(monkeypatch, capsys):
    compile_part = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **kw: compile_part(part, backend="aot_eager", **kw))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, compiled = (UPerNet(VisionGRU(5, 8, (2, 2, 2, 2)), 4, 8, 8) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    train.compile_parts(compiled, print)
    assert "14 parts" in capsys.readouterr().out
    x = torch.randn(2, 3, 64, 64)
    results = []
    for model in (eager, compiled):
        torch.manual_seed(1)  # the decoder's dropout
        logits, auxiliary = model(x)
        results.append([logits, *torch.autograd.grad((logits + auxiliary).square().mean(), list(model.parameters()))])
    for value, expected in zip(*results):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 10  # a stem, a block for each stage, three downsamplings, two heads
    loader = [(torch.randn(1, 3, 40, 72), torch.zeros(1, 40, 72, dtype=torch.uint8))]
    segment.evaluate(compiled, loader, torch.device("cpu"))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
def test_a_compiled_mingru_is_the_eager_one_in_few_kernels(amp):
    gru = MinGRU(4)
    x, h0 = torch.randn(2, 3136, 4, requires_grad=True), torch.rand(2, 8, requires_grad=True)
    wanted = [x, h0, *gru.parameters()]
    results, kernels = [], []
    for network in (gru, torch.compile(gru, fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            torch._inductor.metrics.reset()
            y, h = network(x, h0)
            kernels.append(torch._inductor.metrics.generated_kernel_count)
        gradients = torch.autograd.grad(y.float().square().mean() + h.square().mean(), wanted)
        kernels.append(torch._inductor.metrics.generated_kernel_count)
        results.append([y, h, *gradients])
    for value, expected in zip(*results):
        scale = expected.detach().float().abs().max()
        # bf16's products and sums round to 8 bits, and not the same ones
        torch.testing.assert_close(value / scale, expected / scale, rtol=0, atol=2**-6 if amp else 1e-6)
    assert 0 < kernels[2] <= 14 and kernels[3] <= 32


# ---------------------------------------------------------------------------------------------------------------------
# train.py: the built-in set and the order of images
# ---------------------------------------------------------------------------------------------------------------------

def test_a_built_in_image_depends_on_its_index_alone_and_its_mask_shows_the_shape():
    data = train.Shapes("train", 20)
    image, label = data[7]
    assert label == 7 and image.size == (48, 48)
    assert image.tobytes() == train.Shapes("train", 500)[7][0].tobytes()
    assert image.tobytes() != train.Shapes("val", 20)[7][0].tobytes()
    for shape in range(len(train.SHAPES)):
        image, mask = train.draw_scene([shape], 64, torch.Generator().manual_seed(shape))
        assert image.shape == (3, 64, 64) and image.dtype == mask.dtype == torch.uint8
        assert set(mask.unique().tolist()) == {0, shape + 1} and 0.01 < (mask > 0).float().mean() < 0.6
        assert image[:, mask > 0].float().mean() > image[:, mask == 0].float().mean() + 30


def test_a_linear_classifier_on_pixels_stays_under_40_percent_on_the_built_in_set():
    def pixels(split, count):
        data = train.Shapes(split, count)
        items = [data[i] for i in range(count)]
        x = torch.stack([torch.tensor(list(image.tobytes()), dtype=torch.float32) for image, _ in items]) / 255 - 0.5
        return x, torch.tensor([label for _, label in items])
    x, y = pixels("train", 2500)
    x_val, y_val = pixels("val", 500)
    kernel, targets = x @ x.T, F.one_hot(y).float() - 0.1
    for ridge in (1.0, 30.0, 1000.0):  # least squares, from hardly to strongly regularised
        weights = torch.linalg.solve(kernel + ridge * torch.eye(len(x)), targets)
        assert ((x_val @ x.T @ weights).argmax(1) == y_val).float().mean() < 0.4


def processes(rank=0, count=1):
    return train.types.SimpleNamespace(rank=rank, count=count, device=torch.device("cpu"))


@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_images_of_a_step_are_the_same_for_any_number_of_processes_and_micro_batches(count, accum):
    alone = train.training_batches(100, 12, 1, processes(), seed=1, epoch=2)
    assert len(alone) == 8 and len({i for batch in alone for i in batch}) == 96
    shares = [train.training_batches(100, 12, accum, processes(rank, count), seed=1, epoch=2) for rank in range(count)]
    for step, batch in enumerate(alone):
        together = [i for share in shares for micro in share[step * accum:(step + 1) * accum] for i in micro]
        assert sorted(together) == sorted(batch)
    later = train.training_batches(100, 12, accum, processes(0, count), seed=1, epoch=2, first_step=5)
    assert later == shares[0][5 * accum:]
    assert alone != train.training_batches(100, 12, 1, processes(), seed=1, epoch=3)
    assert alone != train.training_batches(100, 12, 1, processes(), seed=2, epoch=2)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 7, 12])
def test_validation_counts_each_image_once(length, count):
    shares = [train.evaluation_batches(length, 2, processes(rank, count)) for rank in range(count)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(length))


def test_the_schedule_warms_up_from_0_and_ends_at_0():
    rates = [train.warmup_cosine(step, 300, 20) for step in range(301)]
    assert rates[0] == 0 and rates[10] == 0.5 and rates[20] == 1 and rates[160] == pytest.approx(0.5)
    assert rates[300] == pytest.approx(0, abs=1e-12) and rates[20:] == sorted(rates[20:], reverse=True)


def test_the_recipe_is_the_papers():
    args = train.parse_arguments(["--data", "somewhere"])
    assert (args.model, args.img_size, args.val_resize, args.epochs, args.batch_size) == ("tiny", 224, 256, 300, 1024)
    assert (args.lr, args.warmup, args.weight_decay, args.betas) == (1e-3, 20, 0.05, [0.9, 0.999])
    assert (args.randaug, args.erasing, args.mixup, args.cutmix, args.smoothing) == ([2, 9], 0.25, 0.8, 1.0, 0.1)
    assert (args.ema, args.drop_path, args.crop_scale) == (0.9999, 0.0, 0.08)
    assert train.parse_arguments(["--data", "somewhere", "--batch-size", "4096"]).lr == 4e-3


# ---------------------------------------------------------------------------------------------------------------------
# train.py: whole runs, on small pictures in three colours
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for split, counts in (("train", (17, 17, 17)), ("val", (5, 4, 4))):
        for k, (name, count) in enumerate(zip(("ant", "bee", "cat"), counts)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 150, (40, 36, 3), generator=torch.Generator().manual_seed(100 * k + i),
                                       dtype=torch.uint8)
                pixels[..., k] += 100
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return root


def arguments(data, out, *more):
    return [str(word) for word in (
        "--data", data, "--out", out, "--model", "nano", "--img-size", 32, "--epochs", 2, "--batch-size", 8,
        "--lr", 1e-3, "--warmup", 0.5, "--ema", 0.9, "--device", "cpu", "--workers", 0, *more)]




def script(*words, launcher=(), name="train.py", **kw):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def heed_signals():  # which nohup, and a shell in the background, have had ignored
        for number in signal.SIGINT, signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, *launcher, HERE / name, *words], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_signals, **kw)


def history(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):
    """A run left alone, with the whole recipe: every kind of randomness is on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in `script`: a sum's order of terms depends on the number of threads
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(arguments(pictures, out, "--drop-path", 0.2)) == 0
    torch.set_num_threads(threads)
    return out


def test_a_run_leaves_a_log_and_checkpoints_that_tell_all(finished, pictures, capsys):
    log = history(finished)
    assert [entry["epoch"] for entry in log] == [1, 2]
    assert {"loss", "lr", "top1", "top5", "ema_top1", "ema_top5", "images_per_s"} <= log[0].keys()
    assert log[0]["top5"] == 100
    best = torch.load(finished / "best.pt", weights_only=True)
    assert best["settings"]["classes"] == ["ant", "bee", "cat"] and best["settings"]["model"] == "nano"
    assert best["settings"]["img_size"] == 32 and "optimizer" not in best
    assert same(load_weights(visiongru_nano(num_classes=3), finished / "best.pt"), best[best["better"]])
    assert not list(finished.glob("*.tmp"))


def test_eval_repeats_the_figure_of_the_log(finished, pictures, capsys):
    best = torch.load(finished / "best.pt", weights_only=True)
    words = ["--eval", "--weights", finished / "best.pt", "--data", pictures, "--device", "cpu"]
    assert train.main([str(word) for word in words]) == 0
    assert f"top-1 {best['best']:.2f} %, top-5 100.00 %" in capsys.readouterr().out


def test_predict_needs_the_checkpoint_alone(finished, pictures, capsys):
    images = [str(pictures / "val" / name / "0.png") for name in ("ant", "cat")]
    assert train.main(["--predict", *images, "--weights", str(finished / "best.pt"), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[4]] == images and len(lines) == 8
    assert {line.split("% ")[1].strip() for line in lines[1:4]} == {"ant", "bee", "cat"}
    assert sum(float(line.split("%")[0]) for line in lines[1:4]) == pytest.approx(100, abs=0.02)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state},
                                  lambda state: {"state_dict": {"module." + key: state[key] for key in state}}])
def test_predict_takes_bare_weights_too(wrap, pictures, tmp_path, capsys):
    torch.save(wrap(visiongru_nano(num_classes=7).state_dict()), tmp_path / "weights.pth")
    assert train.main(["--predict", str(pictures / "val" / "ant" / "0.png"), "--model", "nano", "--img-size", "64",
                       "--weights", str(tmp_path / "weights.pth"), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all("%  class " in line for line in lines[1:])


def test_a_run_goes_on_in_another_folder_and_precision(finished, pictures, tmp_path, capsys):
    last = torch.load(finished / "last.pt", weights_only=True)
    last.update(epoch=1, step=6)  # after the last step, before the last validation
    (tmp_path / "from").mkdir()
    torch.save(last, tmp_path / "from" / "last.pt")
    words = arguments(pictures, tmp_path / "to", "--drop-path", 0.2, "--resume", tmp_path / "from" / "last.pt")
    assert train.main([*words, "--amp", "fp16"]) == 0
    assert "note: --amp was auto and is now fp16" in capsys.readouterr().out
    assert [entry["epoch"] for entry in history(tmp_path / "to")] == [2]
    assert (tmp_path / "to" / "best.pt").exists()


def test_training_learns(pictures, tmp_path):
    gently = "--mixup", 0, "--cutmix", 0, "--randaug", 0, 0, "--erasing", 0, "--epochs", 4
    assert train.main(arguments(pictures, tmp_path / "run", *gently)) == 0
    assert max(entry["top1"] for entry in history(tmp_path / "run")) > 90


def wait_for(found, process):
    """What found() is once it is true."""
    deadline = time.monotonic() + 100
    while not (result := found()):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.005)
    return result


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(amp, pictures, tmp_path):
    assert train.main(arguments(pictures, tmp_path / "run", "--amp", amp, "--epochs", 1)) == 0
    assert math.isfinite(history(tmp_path / "run")[0]["loss"])
    if amp == "fp16":
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["scaler"]["scale"] > 0


def test_fine_tuning_says_once_that_the_head_is_new(pictures, tmp_path, capsys):
    torch.save(visiongru_nano(num_classes=10).state_dict(), tmp_path / "ten.pt")
    words = arguments(pictures, tmp_path / "run", "--weights", tmp_path / "ten.pt", "--epochs", 1, "--lr", 0)
    assert train.main(words) == 0
    assert capsys.readouterr().out.count("a classifier for 10 classes and the model one for 3") == 1
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    start = torch.load(tmp_path / "ten.pt", weights_only=True)
    assert all(torch.equal(trained[name], start[name]) for name in start if not name.startswith("head."))


# ---------------------------------------------------------------------------------------------------------------------
# train.py: the user's mistakes
# ---------------------------------------------------------------------------------------------------------------------

def picture_folder(root, train_classes, val_classes):
    for split, classes in (("train", train_classes), ("val", val_classes)):
        (root / split).mkdir(parents=True)
        for name, count in classes.items():
            (root / split / name).mkdir()
            for i in range(count):
                Image.new("RGB", (32, 32)).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("train_classes, val_classes, message", [
    ({}, {}, "train has no class folders"),
    ({"a": 0, "b": 0}, {"a": 1, "b": 1}, "2 class folders and no images"),
    ({"a": 4, "b": 0}, {"a": 1, "b": 1}, "no images in the class folders b"),
    ({"a": 9, "b": 9}, {"a": 1, "c": 1}, "different classes; only in train: b; only in val: c"),
    ({"a": 9, "b": 9}, {"a": 0, "b": 0}, "val has 2 class folders and no images"),
    ({"a": 2, "b": 2}, {"a": 1, "b": 1}, "4 training images are fewer than one --batch-size of 8"),
])
def test_folders_that_cannot_be_trained_on(train_classes, val_classes, message, tmp_path):
    data = picture_folder(tmp_path / "data", train_classes, val_classes)
    with pytest.raises(train.UserError, match=message):
        train.main(arguments(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_train_or_val_is_said_so(tmp_path):
    with pytest.raises(train.UserError, match="there is no folder train in it"):
        train.main(arguments(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_run_with_its_path(workers, tmp_path):
    data = picture_folder(tmp_path / "data", {"a": 8, "b": 8}, {"a": 1, "b": 1})
    (data / "train" / "b" / "3.png").write_bytes(b"no picture")
    with pytest.raises(train.UserError) as error:
        train.main(arguments(data, tmp_path / "run", "--workers", workers))
    assert str(error.value).startswith("cannot read the image") and "3.png" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_weights_that_are_not_finite_are_not_saved(pictures, tmp_path):
    with pytest.raises(train.UserError, match="the weights are no longer finite after epoch 1, step 2"):
        train.main(arguments(pictures, tmp_path / "run", "--lr", 1e39, "--save-every", 1))
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["step"] == 1 and all(value.isfinite().all() for value in saved["model"].values())


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(finished, pictures, tmp_path):
    last = torch.load(finished / "last.pt", weights_only=True)
    last.update(epoch=0, step=3)
    last["model"]["head.bias"][0] = math.nan
    (tmp_path / "run").mkdir()
    torch.save(last, tmp_path / "run" / "last.pt")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(train.UserError, match="loss is nan at epoch 1, step 4 of 6, learning rate"):
        train.main(arguments(pictures, tmp_path / "run", "--drop-path", 0.2, "--resume", "auto", "--save-every", 1))
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("more, message", [
    (("--accum", 3), "--batch-size 8 does not divide by 1 processes x --accum 3; expected a multiple of 3"),
    (("--accum", 8), "mix images in pairs, and a micro-batch has 1; expected a --batch-size that is a multiple of 16"),
    (("--device", "cuda:99"), "GPU 99 was asked for and torch sees"),
    (("--device", "abacus"), "--device abacus: expected auto, cpu, cuda or cuda:N"),
    (("--img-size", 31), "--img-size 31: expected at least 32"),
    (("--epochs", 0), "--epochs 0"),
    (("--lr", "nan"), "--lr nan"),
    (("--drop-path", 1), "--drop-path 1.0"),
    (("--weights", "absent.pt"), "cannot open the checkpoint absent.pt: No such file"),
    (("--resume", "absent.pt"), "absent.pt"),
])
def test_arguments_that_make_no_sense_are_refused(more, message, pictures, tmp_path):
    with pytest.raises(train.UserError, match=message):
        train.main(arguments(pictures, tmp_path / "run", *more))


def test_nothing_is_begun_over_an_earlier_run(finished, pictures, tmp_path):
    before = (finished / "last.pt").read_bytes()
    with pytest.raises(train.UserError, match="--resume auto goes on with it, another --out begins a new one"):
        train.main(arguments(pictures, finished))
    assert (finished / "last.pt").read_bytes() == before
    (tmp_path / "last.pt").write_bytes(before)
    with pytest.raises(train.UserError, match="--resume auto goes on with it"):
        train.main(arguments(pictures, finished, "--drop-path", 0.2, "--resume", tmp_path / "last.pt"))
    assert (finished / "last.pt").read_bytes() == before


def test_resuming_with_another_model_batch_or_seed_is_refused(finished, pictures):
    for more, message in ((("--model", "tiny"), "--model was nano and is now tiny"),
                          (("--batch-size", 4), "--batch-size was 8 and is now 4"),
                          (("--seed", 3), "--seed was 0 and is now 3"), (("--lr", 1), "--lr was 0.001 and is now 1.0")):
        with pytest.raises(train.UserError, match=message):
            train.main(arguments(pictures, finished, "--resume", "auto", *more))
    with pytest.raises(train.UserError, match="weights only and cannot be resumed"):
        train.main(arguments(pictures, finished, "--resume", finished / "best.pt"))


def test_data_with_other_classes_than_the_checkpoints_is_refused(finished, tmp_path):
    fewer = picture_folder(tmp_path / "fewer", {"ant": 9, "bee": 9}, {"ant": 1, "bee": 1})
    others = picture_folder(tmp_path / "others", {"ant": 9, "bee": 9, "cow": 9}, {"ant": 1, "bee": 1, "cow": 1})
    for data, message in ((fewer, "trained on 3 classes and the data has 2"),
                          (others, "'cat' where the data has 'cow'")):
        with pytest.raises(train.UserError, match=message):
            train.main(arguments(data, finished, "--resume", "auto"))
        with pytest.raises(train.UserError, match=message):
            train.main(["--eval", "--weights", str(finished / "best.pt"), "--data", str(data), "--device", "cpu"])
    grown = picture_folder(tmp_path / "grown", {"ant": 19, "bee": 19, "cat": 19}, {"ant": 1, "bee": 1, "cat": 1})
    with pytest.raises(train.UserError, match="started on 51 training images and there are now 57"):
        train.main(arguments(grown, finished, "--drop-path", 0.2, "--resume", "auto"))


def test_images_are_read_upright(tmp_path):
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 40, 10))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: what is stored at the left is to be shown above
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = train.read_image(tmp_path / "turned.png")
    assert upright.size == (20, 40) and upright.getpixel((15, 0)) == (0, 0, 255)


def test_checkpoints_that_are_none_are_named(tmp_path, pictures):
    torch.save({"state_dict": {}, "history": Given()}, tmp_path / "objects.pth")
    with pytest.raises(train.UserError, match="holds Python objects beside the tensors.*keep the tensors alone"):
        train.main(["--predict", "x.png", "--weights", str(tmp_path / "objects.pth"), "--device", "cpu"])
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(train.UserError, match="noise.pt is not a checkpoint, or a damaged one"):
        train.main(["--predict", "x.png", "--weights", str(tmp_path / "noise.pt"), "--device", "cpu"])
    with pytest.raises(train.UserError, match="need a checkpoint: --weights FILE"):
        train.main(["--eval", "--device", "cpu"])
    torch.save(visiongru_nano(num_classes=3, dim=16).state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(train.UserError, match="narrow.pt does not fit this VisionGRU(.|\n)*mis-shaped"):
        train.main(arguments(pictures, tmp_path / "run", "--weights", tmp_path / "narrow.pt"))
    torch.save({"model": {"a": torch.ones(1)}, "settings": {"model": "base"}}, tmp_path / "base.pt")
    with pytest.raises(train.UserError, match="base.pt is of --model base. .*base.pt does not fit"):
        train.main(arguments(pictures, tmp_path / "run", "--weights", tmp_path / "base.pt"))


@pytest.mark.parametrize("words, message", [
    (("--data", "nowhere", "--device", "cpu"), "error: --data nowhere: no such folder"),
    (("--device", "cuda"), "error: --device cuda: GPU 0 was asked for and torch sees 0"),
])
def test_the_script_says_so_without_a_traceback_and_exits_with_2(words, message):
    process = script(*words)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and message in err and "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------------------
# UPerNet
# ---------------------------------------------------------------------------------------------------------------------

def micro_upernet(num_classes=5):
    return UPerNet(VisionGRU(7, **MICRO), num_classes, channels=8, aux_channels=4)


def test_parameter_counts_of_upernet():
    model = UPerNet(visiongru_tiny(), 150)
    assert parameters(model.decode_head) == 30_133_398
    assert parameters(model.auxiliary_head) == 702_614
    assert parameters(model) == 60_475_964


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (97, 64), (131, 200)])
def test_upernet_gives_each_pixel_its_logits_at_any_size(height, width):
    model = micro_upernet()
    x = torch.randn(2, 3, height, width)
    outputs = model(x)
    assert [y.shape for y in outputs] == 2 * [(2, 5, height, width)]
    sum(y.square().sum() for y in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert model(x).shape == (2, 5, height, width) and torch.equal(model(x), model(x))


def test_upernets_decoder_computes_what_its_docstring_says():
    torch.set_grad_enabled(False)
    head = UPerNet(VisionGRU(7, **MICRO).double(), 5, channels=8).double().eval().decode_head
    for norm in (m for m in head.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    maps = [torch.randn(1, c, h, w, dtype=torch.float64) for c, h, w in
            ((8, 12, 20), (16, 6, 10), (32, 3, 5), (64, 2, 3))]

    def conv(layer, x):  # convolution, BatchNorm, ReLU, from their definitions
        padding = layer[0].weight.shape[-1] // 2
        x = F.conv2d(x, layer[0].weight, padding=padding)
        mean, var, weight, bias = (t[:, None, None] for t in (layer[1].running_mean, layer[1].running_var,
                                                              layer[1].weight, layer[1].bias))
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp_min(0)

    def to(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear")
    pooled = [to(conv(head.psp_modules[i][1], F.adaptive_avg_pool2d(maps[3], grid)), maps[3])
              for i, grid in enumerate((1, 2, 3, 6))]
    p4 = conv(head.bottleneck, torch.cat([maps[3], *pooled], 1))
    p3 = conv(head.lateral_convs[2], maps[2]) + to(p4, maps[2])
    p2 = conv(head.lateral_convs[1], maps[1]) + to(p3, maps[1])
    p1 = conv(head.lateral_convs[0], maps[0]) + to(p2, maps[0])
    finest = [to(x, p1) for x in (*(conv(head.fpn_convs[i], x) for i, x in enumerate((p1, p2, p3))), p4)]
    expected = F.conv2d(conv(head.fpn_bottleneck, torch.cat(finest, 1)), head.conv_seg.weight, head.conv_seg.bias)
    torch.set_grad_enabled(True)
    torch.testing.assert_close(head(maps), expected)


def test_upernet_refuses_sizes_that_make_no_sense():
    for kw, message in (({"num_classes": 0}, "num_classes is 0"), ({"num_classes": 2, "channels": 1.5}, "channels is"),
                        ({"num_classes": 2, "aux_channels": -1}, "aux_channels is -1")):
        with pytest.raises(ValueError, match=message):
            UPerNet(VisionGRU(5, **MICRO), **kw)


def test_weights_pass_between_classifier_and_segmentation_model():
    classifier, segmenter = VisionGRU(9, **MICRO), micro_upernet()
    load_weights(segmenter.backbone, classifier.state_dict())
    assert all(torch.equal(value, classifier.state_dict()[name])
               for name, value in segmenter.backbone.state_dict().items())
    other = VisionGRU(9, **MICRO)
    head = other.head.weight.clone()
    load_weights(other, segmenter.state_dict())
    assert torch.equal(other.head.weight, head) and same(segmenter.backbone, other.state_dict())
    with pytest.raises(ValueError, match=r"no decoder; to start from its backbone: load_weights\(model.backbone"):
        load_weights(segmenter, classifier.state_dict())


def test_the_authors_segmentation_checkpoints_load_into_upernet_and_its_backbone():
    source = micro_upernet()
    keys = [f"backbone.vig.{key}" for key in release_names(source.backbone)]
    for key in source.state_dict():
        if not key.startswith("backbone."):
            key = re.sub(r"(psp_modules\.\d\.1|bottleneck|_convs\.\d|head\.convs\.0)\.0\.", r"\1.conv.", key)
            keys.append(re.sub(r"(psp_modules\.\d\.1|bottleneck|_convs\.\d|head\.convs\.0)\.1\.", r"\1.bn.", key))
    assert {"decode_head.psp_modules.3.1.conv.weight", "decode_head.fpn_bottleneck.bn.running_var",
            "auxiliary_head.convs.0.conv.weight", "decode_head.lateral_convs.2.bn.bias"} <= set(keys)
    state = {"state_dict": dict(zip(keys, source.state_dict().values(), strict=True))}
    assert same(load_weights(micro_upernet(), state), source.state_dict())
    assert same(load_weights(micro_upernet().backbone, state), source.backbone.state_dict())
    state["state_dict"]["backbone.vig.fc.weight"] = torch.zeros(1000, 64)  # of no use, and no harm
    assert same(load_weights(micro_upernet(), state), source.state_dict())


def test_segmenting_other_classes_starts_with_new_classifiers():
    source, model = micro_upernet(5), micro_upernet(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="5 classes and the model one for 3") as caught:
        load_weights(model, source.state_dict())
    assert len(caught) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if ".conv_seg." in name else source.state_dict())[name])


# ---------------------------------------------------------------------------------------------------------------------
# segment.py: scenes, label maps, crops, scores
# ---------------------------------------------------------------------------------------------------------------------

def test_a_built_in_scene_depends_on_its_index_alone_and_the_set_has_all_classes():
    data = segment.Scenes("training", 60)
    image, mask = data[7]
    assert image.size == (64, 64) and mask.shape == (64, 64) and mask.dtype == torch.uint8
    again = segment.Scenes("training", 999)[7]
    assert image.tobytes() == again[0].tobytes() and torch.equal(mask, again[1])
    assert image.tobytes() != segment.Scenes("validation", 60)[7][0].tobytes()
    seen = set().union(*(data[i][1].unique().tolist() for i in range(60)))
    assert seen == set(range(len(data.classes)))


def write_labelled(root, split, name, labels, image_size=None, mode=None):
    """One image, whose colour shows its labels, and its label map (a list of rows)."""
    labels = torch.tensor(labels)
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    grey = Image.fromarray((labels * 40 % 256).to(torch.uint8).numpy()).convert("RGB")
    grey.resize(image_size or grey.size).save(root / "images" / split / f"{name}.jpg")
    wide = labels.max() > 255
    mask = Image.fromarray(labels.to(torch.uint16 if wide else torch.uint8).numpy())
    (mask.convert(mode) if mode else mask).save(root / "annotations" / split / f"{name}.png")


ROWS = [[0, 1, 2, 3], [3, 2, 1, 255]]


@pytest.mark.parametrize("zero_is_ignore, ignore_label, classes, expected", [
    (True, 255, 3, [[255, 0, 1, 2], [2, 1, 0, 255]]),   # ADE20K: 0 is other, the rest move down
    (False, 255, 4, [[0, 1, 2, 3], [3, 2, 1, 255]]),    # counted from 0
    (False, 3, 256, [[0, 1, 2, 255], [255, 2, 1, 255]]),
])
def test_labels_are_read_by_the_rule_that_was_asked_for(zero_is_ignore, ignore_label, classes, expected, tmp_path):
    write_labelled(tmp_path, "training", "a", ROWS)
    data = segment.LabelledImages(tmp_path, "training", ["c"] * classes, zero_is_ignore, ignore_label)
    image, mask = data[0]
    assert len(data) == 1 and mask.tolist() == expected and image.size == (4, 2)


@pytest.mark.parametrize("rows, zero_is_ignore, classes, message", [
    (ROWS, True, 2, "a.png has a pixel of label 3; expected 1 to 2, or 0 or 255 to ignore it"),
    (ROWS, False, 3, "a.png has a pixel of label 3; expected 0 to 2, or 255 to ignore it"),
    ([[7, 300]], True, 150, "a.png has a pixel of label 300; expected 1 to 150"),
])
def test_a_label_outside_the_range_is_named_with_its_file(rows, zero_is_ignore, classes, message, tmp_path):
    write_labelled(tmp_path, "training", "a", rows)
    data = segment.LabelledImages(tmp_path, "training", ["c"] * classes, zero_is_ignore, 255)
    with pytest.raises(train.UserError, match=message):
        data[0]


def test_palette_masks_are_read_by_their_numbers_and_colour_masks_refused(tmp_path):
    write_labelled(tmp_path, "training", "a", ROWS, mode="P")
    write_labelled(tmp_path, "training", "b", ROWS, mode="RGB")
    data = segment.LabelledImages(tmp_path, "training", ["c"] * 3, True, 255)
    assert data[0][1].tolist() == [[255, 0, 1, 2], [2, 1, 0, 255]]
    with pytest.raises(train.UserError, match=r"b.png has 3 channels \(RGB\); expected one"):
        data[1]


def test_every_other_fault_of_the_data_is_named_too(tmp_path):
    def data():
        return segment.LabelledImages(tmp_path, "training", ["c"] * 3, True, 255)
    with pytest.raises(train.UserError, match="images/training: no such folder"):
        data()
    write_labelled(tmp_path, "training", "a", ROWS, image_size=(5, 2))
    with pytest.raises(train.UserError, match="a.png is 4 x 2 pixels and its image .*a.jpg 5 x 2"):
        data()[0]
    (tmp_path / "annotations/training/a.png").write_bytes(b"no picture")
    with pytest.raises(train.UserError, match="cannot read the label map .*a.png"):
        data()[0]
    (tmp_path / "annotations/training/a.png").rename(tmp_path / "annotations/training/a.jpg")  # its labels are blurred
    with pytest.raises(train.UserError, match="a.jpg has no label map; expected .*annotations/training/a.png$"):
        data()
    (tmp_path / "images/training/a.png").write_bytes(b"")
    with pytest.raises(train.UserError, match="a.jpg and a.png have the same name"):
        data()
    for path in (tmp_path / "images/training").iterdir():
        path.unlink()
    with pytest.raises(train.UserError, match="images/training has no images in it"):
        data()


def test_class_names_come_from_the_folder_or_are_counted(tmp_path):
    def names(*more):
        return segment.class_names(segment.parse_arguments(["--data", str(tmp_path), *more]))
    with pytest.raises(train.UserError, match="how many classes are there"):
        names()
    assert names("--num-classes", "2") == ["label 1", "label 2"]
    assert names("--num-classes", "2", "--no-zero-is-ignore") == ["label 0", "label 1"]
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.16\t9\t1\twall\n"
                                                "2\t0.11\t8\t1\tbuilding, edifice\n")
    assert names() == ["wall", "building, edifice"]
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ncar\n")
    assert names() == ["sky", "road", "car"]
    with pytest.raises(train.UserError, match="--num-classes 2: .*classes.txt names 3"):
        names("--num-classes", "2")
    (tmp_path / "classes.txt").write_text("sky\nsky\n")
    with pytest.raises(train.UserError, match="2 names, 1 of them different"):
        names()
    (tmp_path / "classes.txt").write_text("\ufeffciel\n\u00e9tang\n", encoding="utf-8")  # as Windows' editor saves it
    assert names() == ["ciel", "\u00e9tang"]
    (tmp_path / "classes.txt").write_bytes(b"sky\xff")
    with pytest.raises(train.UserError, match="cannot read .*classes.txt as text in UTF-8"):
        names()


def crop_arguments(*more):
    return segment.parse_arguments(["--data", "x", "--crop-size", "32", "--scale", "1", "1", "--distort", "0",
                                    *map(str, more)])


def test_of_ten_crops_the_first_without_a_class_of_more_than_75_percent_is_taken():
    mask = torch.zeros(32, 120, dtype=torch.uint8)
    mask[:, 100:] = 1  # a crop must begin at 76 or further right to have at least a quarter of each
    image = v2.functional.to_pil_image(mask[None].expand(3, -1, -1) * 200)
    transform = segment.TrainTransform(crop_arguments("--flip", 0))
    tries, shares = [], []

    class Counting(torch.nn.Module):
        def forward(self, *inputs):
            tries[-1] += 1
            return crop(*inputs)
    crop, transform.crop = transform.crop, Counting()
    for _ in range(60):
        tries.append(0)
        x, y = transform(image, mask)
        assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and y.shape == (32, 32)
        assert torch.equal(x[0] > 0, y == 1)  # image and mask were cut alike
        shares.append((y == 1).float().mean().item())
    fits = [0.25 <= share <= 0.75 for share in shares]
    assert all(fit or count == 10 for fit, count in zip(fits, tries))
    assert sum(fits) > 30 and min(tries) < 3  # by chance alone it were 9
    for void in (mask * 0 + 255, mask * 0):  # nothing to learn, or one class: it ends all the same
        tries.append(0)
        assert transform(image, void)[1].unique().tolist() == void.unique().tolist() and tries[-1] == 10


def test_ignored_pixels_do_not_count_in_the_crop_rule():
    mask = torch.full((32, 32), 255, dtype=torch.uint8)
    mask[:2], mask[2:4] = 0, 1
    transform = segment.TrainTransform(crop_arguments())
    transform.crop = lambda *inputs, calls=[]: calls.append(1) or (inputs if len(calls) < 2 else 1 / 0)
    transform(v2.functional.to_pil_image(mask[None].expand(3, -1, -1)), mask)  # taken at once: half and half


def test_small_images_are_filled_up_with_ignore_and_scales_keep_masks_whole_numbers():
    mask = torch.arange(4, dtype=torch.uint8).repeat_interleave(5).expand(20, 20).contiguous()
    image = v2.functional.to_pil_image(mask[None].expand(3, -1, -1) * 60)
    transform = segment.TrainTransform(crop_arguments("--short-side", 20 + 12, "--scale", 0.5, 1, "--distort", 1))
    for _ in range(20):
        x, y = transform(image, mask)
        assert x.shape == (3, 32, 32) and set(y.unique().tolist()) <= {0, 1, 2, 3, 255}
        assert type(x) is type(y) is torch.Tensor
    x, y = segment.eval_transform(40)(image, mask)
    assert x.shape == (3, 40, 40) and y is mask  # the score is taken at the label map's own size


@pytest.mark.parametrize("size, short, expected", [
    ((683, 512), 512, (512, 683)), ((480, 360), 512, (512, 683)), ((5000, 1000), 512, (410, 2048)),
    ((3000, 1), 64, (1, 256)), ((1, 3000), 64, (256, 1)), ((1, 1), 64, (64, 64))])
def test_the_shorter_side_is_as_asked_and_the_longer_at_most_four_times_that(size, short, expected):
    assert segment.eval_transform(short)(Image.new("RGB", size)).shape[1:] == expected


def test_the_shorter_side_varies_between_its_bounds():
    transform = segment.ShorterSide(20, 40)
    sides = [min(transform(Image.new("RGB", (50, 70))).size) for _ in range(200)]
    assert min(sides) in (20, 21) and max(sides) in (39, 40) and 28 < sum(sides) / 200 < 32


def test_image_and_mask_are_flipped_together():
    mask = (torch.arange(32) < 10).to(torch.uint8).expand(32, 32).contiguous()
    x, y = segment.TrainTransform(crop_arguments("--flip", 1))(
        v2.functional.to_pil_image(mask[None].expand(3, -1, -1) * 200), mask)
    assert torch.equal(y, mask.flip(1)) and torch.equal(x[0] > 0, y == 1)


def test_scores_of_a_confusion_matrix_worked_out_by_hand():
    #           taken for  a  b  c  d
    confusion = torch.tensor([[6, 2, 0, 0],     # a: 8 pixels, 6 right
                              [1, 3, 0, 0],     # b: 4 pixels, 3 right
                              [0, 0, 0, 0],     # c: none, and none predicted: it counts nowhere
                              [0, 0, 0, 0]], dtype=torch.float64)
    result = segment.scores(confusion)
    assert result["iou"][:2] == pytest.approx([600 / 9, 300 / 6]) and all(map(math.isnan, result["iou"][2:]))
    assert result["miou"] == pytest.approx((600 / 9 + 50) / 2)
    assert result["mean_acc"] == pytest.approx((75 + 75) / 2) and result["pixel_acc"] == pytest.approx(75)
    confusion[0, 3] = 2  # two pixels of a were taken for d, which does not occur
    result = segment.scores(confusion)
    assert result["iou"][3] == 0 and math.isnan(result["acc"][3])
    assert result["miou"] == pytest.approx((600 / 11 + 50 + 0) / 3)
    assert "d       0.00      -" in segment.score_table(result, ["a", "b", "c", "d"])


class Oracle(torch.nn.Module):
    """Reads the class of a pixel from its red channel."""

    num_classes = 4

    def forward(self, x):
        return F.one_hot(x[:, 0].round().long().clamp(0, 3), 4).permute(0, 3, 1, 2).float()


def test_evaluation_counts_each_known_pixel_once_at_the_label_maps_size():
    truth = torch.randint(0, 4, (37, 50))
    seen = truth.clone()
    seen[0, :10] = (seen[0, :10] + 1) % 4  # ten mistakes
    mask = truth.to(torch.uint8)
    mask[1] = 255
    item = torch.stack([seen.float()] * 3)[None], mask[None]
    confusion = segment.evaluate(Oracle(), [item, item], torch.device("cpu"))
    assert confusion.sum() == 2 * 36 * 50 and confusion.sum() - confusion.diag().sum() == 20
    with pytest.raises(train.UserError, match="no pixel with a label"):
        segment.evaluate(Oracle(), [(item[0], item[1] * 0 + 255)], torch.device("cpu"))
    large = mask.repeat_interleave(3, 0).repeat_interleave(3, 1)  # a label map of thrice the image's size
    assert segment.evaluate(Oracle(), [(item[0], large[None])], torch.device("cpu")).sum() == 9 * 36 * 50


@pytest.mark.parametrize("height, width", [(10, 40), (64, 64), (65, 97), (150, 33)])
def test_windows_cover_every_pixel_and_their_logits_are_averaged(height, width):
    image = torch.randint(0, 4, (1, 3, height, width)).float()
    for window in (None, 32, 64):
        logits = segment.class_logits(Oracle(), image, window=window)
        assert torch.equal(logits, Oracle()(image)[0])
    calls = []

    class Constant(Oracle):
        def forward(self, x):
            calls.append(x.shape)
            return torch.full_like(Oracle()(x), len(calls))
    logits = segment.class_logits(Constant(), torch.zeros(1, 3, 32, 48), window=32)
    assert calls == [(1, 3, 32, 32)] * 2  # columns 0-31 and 16-47
    assert logits[0, 0].tolist() == [1] * 16 + [1.5] * 16 + [2] * 16


def test_a_label_map_is_the_argmax_of_the_enlarged_logits():
    logits = torch.randn(7, 9, 11)
    expected = F.interpolate(logits[None], (40, 31), mode="bilinear")[0].argmax(0)
    assert torch.equal(segment.label_map(logits, (40, 31)), expected)


def test_the_segmentation_recipe_is_the_papers():
    args = segment.parse_arguments(["--data", "ade"])
    assert (args.model, args.channels, args.aux_channels, args.iters, args.batch_size, args.lr, args.weight_decay,
            args.warmup, args.crop_size, args.short_side, args.scale, args.zero_is_ignore, args.ignore_label) == (
        "tiny", 512, 256, 160_000, 16, 6e-5, 0.01, 1500, 512, 512, [0.5, 2.0], True, 255)
    lr = [segment.warmup_linear(step, 160_000, 1500) for step in (0, 750, 1500, 80_750, 160_000)]
    assert lr == pytest.approx([1e-6, 0.5, 1, 0.5, 0], abs=1e-6)
    model = micro_upernet()
    decayed, free = segment.parameter_groups(model, 0.01)
    assert decayed["weight_decay"] == 0.01 and free["weight_decay"] == 0
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    norms = {f"{name}.{kind}" for name, module in model.named_modules() for kind in ("weight", "bias")
             if type(module).__name__ in ("LayerNorm", "BatchNorm2d")}
    assert {name for name, p in model.named_parameters() if any(p is q for q in free["params"])} == norms
    assert len(norms) == 2 * (2 * 5 + 2 + 3 + 12 + 1)  # of blocks, stem, downsamplings, decoder, auxiliary head


def test_the_loss_is_a_mean_over_all_pixels_and_none_of_a_crop_without_labels():
    logits, masks = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 4, 4))
    masks[0] = 255
    by_hand = -logits.log_softmax(1).gather(1, masks.clamp(max=2)[:, None])[1].sum() / 32
    torch.testing.assert_close(segment.segmentation_loss((logits, logits), masks), 1.4 * by_hand)
    nothing = segment.segmentation_loss((logits, logits), torch.full_like(masks, 255))
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().max() == 0


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_has_the_same_images_for_any_number_of_processes_and_every_image_once_in_an_epoch(count, accum):
    mine = [segment.training_batches(3, 9, 8, accum, processes(rank, count)) for rank in range(count)]
    assert all(len(batches) == 6 * accum and len(batches[0]) == 8 // accum // count for batches in mine)
    steps = [sorted(p for batches in mine for batch in batches[i * accum:(i + 1) * accum] for p in batch)
             for i in range(6)]
    assert steps == [list(range(8 * s, 8 * s + 8)) for s in range(3, 9)]
    data = [(torch.tensor(i), 0) for i in range(5)]  # fewer than a batch
    stream = segment.Shuffled(data, lambda x, _: (x, torch.rand(())), seed=1)
    items = [stream[p] for p in range(15)]
    for epoch in range(3):
        assert sorted(int(x) for x, _ in items[5 * epoch:5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert len({float(r) for _, r in items}) == 15
    assert [(int(x), float(r)) for x, r in items[::-1]] == [(int(x), float(r)) for x, r in map(stream.__getitem__,
                                                                                             range(14, -1, -1))]


# ---------------------------------------------------------------------------------------------------------------------
# segment.py: whole runs, on pictures of three colours side by side
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def streets(tmp_path_factory):
    """Images in which a pixel's colour says its class; 9 to train on and 5, of several sizes, to validate."""
    root = tmp_path_factory.mktemp("streets")
    for split, count in (("training", 9), ("validation", 5)):
        for i in range(count):
            generator = torch.Generator().manual_seed(i)
            height, width = (40, 48) if split == "training" else (40 + 8 * i, 48 + 5 * i)
            edges = torch.randint(8, 20, (2,), generator=generator)
            labels = torch.bucketize(torch.arange(width), edges.cumsum(0)).expand(height, -1) + 1
            pixels = F.one_hot(labels - 1, 3) * 150 + torch.randint(0, 100, (height, width, 3), generator=generator)
            labels = labels.clone()
            labels[:2] = 0
            write_labelled(root, split, str(i), labels.tolist())
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / "images" / split / f"{i}.jpg", quality=95)
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root


def test_the_command_that_a_run_ends_with_works_as_printed(streets, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(streets, data)
    (data / "classes.txt").unlink()
    assert segment.main(seg_arguments(data, tmp_path / "run", "--iters", 1, "--num-classes", 3, "--slide")) == 0
    printed = capsys.readouterr().out
    words = printed.splitlines()[-1].split()[2:]
    assert words[0] == "--eval" and words[-1] == "--slide" and segment.main([*words, "--device", "cpu"]) == 0
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["best"]
    evaluated = capsys.readouterr().out
    assert f"has mIoU {best:.2f}" in printed and f"mIoU {best:.2f}" in evaluated and "label 3" in evaluated
    (data / "classes.txt").write_text("red\ngreen\ngrey\n")
    with pytest.raises(train.UserError, match="'label 1' where the data has 'red'"):
        segment.main([*words, "--device", "cpu"])


def seg_arguments(data, out, *more):
    return [str(word) for word in (
        "--data", data, "--out", out, "--model", "nano", "--channels", 16, "--aux-channels", 8, "--crop-size", 32,
        "--short-side", 40, "--iters", 6, "--eval-every", 3, "--warmup", 2, "--batch-size", 4, "--lr", 1e-3,
        "--device", "cpu", "--workers", 0, *more)]


@pytest.mark.parametrize("more, told", [(["--zero-is-ignore"], True), (["--no-zero-is-ignore"], False)])
def test_labels_that_may_count_from_0_are_pointed_out(more, told, tmp_path, capsys):
    for i in range(4):
        for split in "training", "validation":
            write_labelled(tmp_path / "data", split, str(i), [[0, 1, 2, 1]])
    (tmp_path / "data" / "classes.txt").write_text("road\nwall\nsky\n")
    assert segment.main(seg_arguments(tmp_path / "data", tmp_path / "run", "--iters", 1, *more)) == 0
    assert ("the last label, 3; if labels count from 0" in capsys.readouterr().out) == told


@pytest.fixture(scope="session")
def segmented(streets, tmp_path_factory):
    """A run left alone, with the whole recipe: every kind of randomness is on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("segmented") / "run"
    assert segment.main(seg_arguments(streets, out, "--drop-path", 0.2)) == 0
    torch.set_num_threads(threads)
    return out


def test_a_segmentation_run_leaves_a_log_and_checkpoints_that_tell_all(segmented):
    log = history(segmented)
    assert [entry["step"] for entry in log] == [3, 6]
    assert {"loss", "lr", "miou", "mean_acc", "pixel_acc", "images_per_s"} <= log[0].keys()
    assert list(log[0]["iou"]) == list(log[0]["acc"]) == ["red", "green", "blue"]
    best = torch.load(segmented / "best.pt", weights_only=True)
    assert best["settings"]["classes"] == ["red", "green", "blue"] and best["best"] == max(e["miou"] for e in log)
    assert "optimizer" not in best and not list(segmented.glob("*.tmp"))


def test_validation_of_an_odd_number_of_images_by_two_processes_is_that_by_one(segmented, streets):
    words = ["--eval", "--weights", str(segmented / "best.pt"), "--data", str(streets), "--device", "cpu"]
    outputs = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
        process = script(*words, launcher=launcher, name="segment.py")
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        outputs.append(out)
    assert outputs[0] == outputs[1] and "5 images" in outputs[0] and "red" in outputs[0]
    best = torch.load(segmented / "best.pt", weights_only=True)["best"]
    assert f"mIoU {best:.2f}" in outputs[0]  # the figure of the log


def test_two_processes_train_and_all_validate_the_model_that_is_saved(streets, tmp_path):
    out = tmp_path / "run"
    process = script(*seg_arguments(streets, out, "--batch-size", 8, "--accum", 2, "--slide", "--lr", 0.01),
                     name="segment.py", launcher=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])
    printed, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert printed.count("step      3/6") == 1
    last = torch.load(out / "last.pt", weights_only=True)
    process = script("--eval", "--slide", "--weights", str(out / "last.pt"), "--data", str(streets), "--device", "cpu",
                     name="segment.py")
    evaluated, err = process.communicate(timeout=100)
    assert last["step"] == 6 and f"{segment.summary(history(out)[-1])} on 5 images" in evaluated, err


def test_segmentation_learns(streets, tmp_path):
    words = seg_arguments(streets, tmp_path / "run", "--iters", 80, "--eval-every", 80, "--distort", 0, "--accum", 2,
                          "--save-every", 7, "--lr", 2e-3, "--batch-size", 8)
    assert segment.main(words) == 0
    assert history(tmp_path / "run")[-1]["miou"] > 80


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_segmentation_trains_in_mixed_precision_from_a_classifiers_weights(amp, finished, streets, tmp_path):
    words = seg_arguments(streets, tmp_path / "run", "--amp", amp, "--iters", 1, "--lr", 0, "--backbone-weights",
                          finished / "best.pt")
    assert segment.main(words) == 0
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    classifier = load_weights(visiongru_nano(num_classes=3), finished / "best.pt").state_dict()
    for name, value in classifier.items():
        assert name.startswith("head.") or torch.equal(trained[f"backbone.{name}"], value)


def test_pictures_of_any_size_become_label_maps_and_overlays(segmented, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    sizes = {"thin": (900, 1), "wide": (300, 8), "tiny": (1, 1), "photo": (131, 97), "grey": (50, 60)}
    for name, size in sizes.items():
        Image.new("L" if name == "grey" else "RGB", size, 120).save(tmp_path / "in" / f"{name}.png")
    images = [str(tmp_path / "in" / f"{name}.png") for name in sizes]
    words = ["--predict", *images, "--weights", str(segmented / "best.pt"), "--out", str(tmp_path / "out"),
             "--device", "cpu"]
    for more in ([], ["--slide"]):
        assert segment.main([*words, *more]) == 0
        assert "5 label maps" in capsys.readouterr().out
        for name, size in sizes.items():
            with Image.open(tmp_path / "out" / f"{name}_labels.png") as labels:
                assert labels.mode == "P" and labels.size == size
                assert {label for _, label in labels.getcolors()} <= {1, 2, 3}  # as in the training masks
                assert labels.getpalette()[:3] == [0, 0, 0]
            with Image.open(tmp_path / "out" / f"{name}_overlay.png") as page:
                assert page.width >= size[0] and page.height > size[1] and page.mode == "RGB"


def test_an_overlay_shows_the_picture_under_its_colours_and_a_legend_of_the_classes_that_occur():
    labels = Image.fromarray(torch.tensor([[1] * 200, [3] * 200]).to(torch.uint8).repeat_interleave(50, 0).numpy())
    labels = labels.convert("P")
    labels.putpalette(segment.palette(True))
    page = segment.overlay(Image.new("RGB", (200, 100), (100, 200, 50)), labels, {1: "road", 2: "sky", 3: "a car"})
    colours = [tuple(segment.palette(True)[3 * k:3 * k + 3]) for k in range(4)]
    assert len(set(map(tuple, zip(*[iter(segment.palette(False))] * 3)))) > 150
    for y, label in ((10, 1), (90, 3)):
        assert page.getpixel((5, y)) == pytest.approx([(p + c) / 2 for p, c in zip((100, 200, 50), colours[label])],
                                                      abs=1)
    legend = {colour for _, colour in page.crop((0, 100, *page.size)).getcolors(10**6)}
    assert {colours[1], colours[3]} <= legend and colours[2] not in legend


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(segmented, streets, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    words = ["--predict", str(tmp_path / "bad.jpg"), str(streets / "images/validation/1.jpg"), "--weights",
             str(segmented / "best.pt"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert segment.main(words) == 2
    captured = capsys.readouterr()
    assert "cannot read the image" in captured.err and "bad.jpg" in captured.err and "1 label maps" in captured.out
    assert (tmp_path / "out" / "1_labels.png").exists()


@pytest.mark.parametrize("more, message", [
    (("--crop-size", 31), "--crop-size 31: expected at least 32"),
    (("--scale", 2, 1), r"--scale \[2.0, 1.0\]: expected two numbers above 0, LOW first"),
    (("--iters", 0), "--iters 0"),
    (("--num-classes", 255), "--num-classes 255: expected 1 to 254"),
    (("--num-classes", 7), "--num-classes 7: .*classes.txt names 3"),
    (("--batch-size", 4, "--accum", 4), "one image at a time; BatchNorm needs two"),
    (("--batch-size", 4, "--accum", 3), "expected a multiple of 3"),
    (("--weights", "a", "--backbone-weights", "b"), "give one of the two"),
    (("--distort", 3), "--distort 3.0: expected a number from 0 to 2"),
    (("--backbone-weights", "absent.pt"), "cannot open the checkpoint absent.pt"),
])
def test_segmentation_arguments_that_make_no_sense_are_refused(more, message, streets, tmp_path):
    with pytest.raises(train.UserError, match=message):
        segment.main(seg_arguments(streets, tmp_path / "run", *more))


def test_segmentation_checkpoints_that_do_not_fit_are_refused(segmented, finished, streets, tmp_path):
    with pytest.raises(train.UserError, match="best.pt has no decode_head.conv_seg.weight; expected a checkpoint of"):
        segment.main(["--predict", "x.png", "--weights", str(finished / "best.pt"), "--device", "cpu"])
    with pytest.raises(train.UserError, match="this is a classifier's run, of train.py"):
        segment.main(seg_arguments(streets, tmp_path / "run", "--resume", finished / "last.pt"))
    for more, message in ((("--channels", 8), "--channels was 16 and is now 8"),
                          (("--no-zero-is-ignore",), "--zero-is-ignore was True and is now False"),
                          (("--ignore-label", 9), "--ignore-label was 255 and is now 9"),
                          (("--batch-size", 2), "--batch-size was 4 and is now 2")):
        with pytest.raises(train.UserError, match=message):
            segment.main(seg_arguments(streets, segmented, "--resume", "auto", *more))
    with pytest.raises(train.UserError, match="no decoder; to start from its backbone: --backbone-weights"):
        segment.main(seg_arguments(streets, tmp_path / "run", "--weights", finished / "best.pt"))
    for words in (["--num-classes", "3"], ["--zero-is-ignore"], ["--ignore-label", "0"]):
        with pytest.raises(train.UserError, match="there is no --data"):
            segment.parse_arguments(words)
    other = tmp_path / "a"
    other.mkdir()
    with pytest.raises(train.UserError, match=r"would be written to the same file"):
        segment.main(["--predict", str(streets / "images/validation/1.jpg"), str(other / "1.jpg"), "--weights",
                      str(segmented / "best.pt"), "--device", "cpu"])


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot be lost: crashes and signals
# ---------------------------------------------------------------------------------------------------------------------

def kill(process, out, saves, inside, delay):
    """SIGKILL after so many more checkpoints and then a delay in seconds, or `inside` the writing of the next one: its
    temporary file is there and not yet renamed. -> whether the run had not ended before."""
    def written():
        return (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0
    last = written()
    while saves and process.poll() is None:
        if written() != last:
            last, saves = written(), saves - 1
        time.sleep(0.002)
    time.sleep(delay)
    while inside and process.poll() is None:
        if list(out.glob("*.pt.tmp")):
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            if list(out.glob("*.pt.tmp")):
                break
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    process.kill()
    _, err = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), err
    return process.returncode != 0


def crash(name, words, out, moments):
    """Start the script, kill it, resume it, kill it, ...; then let it end. -> the kills and those inside a writing.

    From the first checkpoint on there is one that can be loaded, and it never goes back.
    """
    kills = inside = steps = 0
    for moment in moments:
        if not kill(script(*words, "--resume", "auto", name=name), out, *moment):
            break
        kills, inside = kills + 1, inside + bool(list(out.glob("*.pt.tmp")))
        if steps or (out / "last.pt").exists():
            before, steps = steps, train.load_checkpoint(out / "last.pt")["scheduler"]["last_epoch"]
            assert steps >= before
    process = script(*words, "--resume", "auto", name=name)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return kills, inside


def assert_same_end(out, alone):
    assert not list(out.glob("*.tmp"))
    for name in ("last.pt", "best.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (out, alone))
        for checkpoint in (ours, theirs):
            del checkpoint["args"]  # --out, --save-every and --workers are others
        assert_same(ours, theirs)
    for entry, expected in zip(history(out), history(alone), strict=True):
        assert entry | {"images_per_s": 0, "seconds": 0} == expected | {"images_per_s": 0, "seconds": 0}


FEW = [(1, True, 0), (0, False, 4), (2, False, 0.02), (0, True, 0)]  # as `kill` takes them


def test_a_run_killed_anywhere_ends_with_the_same_bits(finished, pictures, tmp_path):
    words = arguments(pictures, tmp_path / "run", "--drop-path", 0.2, "--save-every", 1, "--workers", 1)
    kills, inside = crash("train.py", words, tmp_path / "run", FEW)
    assert kills == 4 and inside >= 2
    assert_same_end(tmp_path / "run", finished)


def test_a_segmentation_run_killed_anywhere_ends_with_the_same_bits(segmented, streets, tmp_path):
    words = seg_arguments(streets, tmp_path / "run", "--drop-path", 0.2, "--save-every", 1)
    kills, inside = crash("segment.py", words, tmp_path / "run", FEW[:2])
    assert kills == 2 and inside >= 1
    assert_same_end(tmp_path / "run", segmented)


@pytest.mark.slow
@pytest.mark.parametrize("name, words", [
    ("train.py", ("--epochs", 1, "--batch-size", 200, "--save-every", 1, "--workers", 1)),
    ("segment.py", ("--iters", 80, "--eval-every", 40, "--warmup", 10, "--batch-size", 8, "--save-every", 1)),
])
def test_twenty_kills_on_the_built_in_set(name, words, tmp_path):
    words = [str(word) for word in ("--device", "cpu", *words)]
    _, err = (process := script(*words, "--out", tmp_path / "alone", name=name)).communicate()
    assert process.returncode == 0, err
    chance = random.Random(1)
    moments = [(chance.randrange(5), i % 3 == 0, chance.uniform(0, 3) * (i % 3 > 0)) for i in range(20)]
    kills, inside = crash(name, [*words, "--out", tmp_path / "run"], tmp_path / "run", moments)
    print(f"{kills} kills, {inside} of them inside the writing of a checkpoint")
    assert kills == 20 and inside >= 5
    assert_same_end(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("name, number", [("train.py", signal.SIGTERM), ("train.py", signal.SIGINT),
                                          ("segment.py", signal.SIGHUP)])
def test_a_run_that_is_told_to_stop_finishes_its_step_and_loses_none(name, number, finished, segmented, pictures,
                                                                     streets, tmp_path):
    out, alone = tmp_path / "run", finished if name == "train.py" else segmented
    words = (arguments if name == "train.py" else seg_arguments)(
        pictures if name == "train.py" else streets, out, "--drop-path", 0.2, "--save-every", 1, "--workers", 2)
    process = script(*words, name=name)
    wait_for((out / "last.pt").exists, process)
    before = train.load_checkpoint(out / "last.pt")["step"]
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 128 + number, stderr
    stopped = train.load_checkpoint(out / "last.pt")
    assert stopped["step"] >= before > 0
    assert f"after step {stopped['step']}, and saved: the same command with --resume auto goes on" in stdout
    assert "stopping after this step; once more stops at once" in stderr and "Traceback" not in stderr

    process = script(*words, "--resume", "auto", name=name)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert re.search(rf"resumed at .*step {stopped['step']}\n", stdout)
    assert_same_end(out, alone)


@pytest.mark.parametrize("module, make, data, alone", [
    (train, arguments, "pictures", "finished"), (segment, seg_arguments, "streets", "segmented")],
    ids=["train", "segment"])
def test_a_signal_during_validation_ends_it_and_a_resumed_run_begins_with_it(module, make, data, alone, tmp_path,
                                                                             request, monkeypatch):
    words = make(request.getfixturevalue(data), tmp_path / "run", "--drop-path", 0.2)
    alone = request.getfixturevalue(alone)
    seen = []

    def told(*args, **kw):
        transform = plain(*args, **kw)
        return lambda *item: (seen.append(1), signal.raise_signal(signal.SIGTERM), transform(*item))[2]
    plain = module.eval_transform
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(module, "eval_transform", told)
    monkeypatch.setattr(train.os, "_exit", lambda status: None)  # the signal comes again for each image of a batch
    assert module.main(words) == 128 + signal.SIGTERM
    assert len(seen) <= 8 and not (tmp_path / "run" / "log.jsonl").exists()
    monkeypatch.setattr(module, "eval_transform", plain)
    assert module.main([*words, "--resume", "auto"]) == 0
    torch.set_num_threads(threads)
    assert_same_end(tmp_path / "run", alone)


def test_a_run_goes_on_when_what_reads_its_output_is_gone(pictures, tmp_path):
    process = script(*arguments(pictures, tmp_path / "run", "--epochs", 1))
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=100) == 0 and "Error" not in err, err
    assert len(history(tmp_path / "run")) == 1


def test_a_run_without_a_terminal_says_once_a_minute_how_far_it_is(pictures, tmp_path, monkeypatch, capsys):
    clock = itertools.count(0, 25)  # seconds from one look to the next
    monkeypatch.setattr(train, "time", train.types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert train.main(arguments(pictures, tmp_path / "run", "--epochs", 1)) == 0
    told = re.findall(r"^epoch 1, step (\d) of 6: loss \d\.\d+, lr .* images/s$", capsys.readouterr().out, re.MULTILINE)
    assert 1 < len(told) < 6 and told == sorted(set(told))


def test_only_what_the_user_can_put_right_is_told_without_a_traceback():
    assert train.explained(train.UserError("such and such")) == "such and such"
    assert "out of memory?" in train.explained(RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed."))
    assert train.explained(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback ...")) is None
    assert train.explained(BrokenPipeError(32, "Broken pipe")) is None


def test_a_loader_that_is_killed_ends_the_run_with_an_error_that_says_so(pictures, tmp_path):
    process = script(*arguments(pictures, tmp_path / "run", "--workers", 1, "--save-every", 1, "--epochs", 99))
    wait_for((tmp_path / "run" / "last.pt").exists, process)
    while process.poll() is None:
        with contextlib.suppress(OSError):  # one that has just ended by itself
            for loader in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(loader), signal.SIGKILL)
        time.sleep(0.05)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "out of memory? A larger --accum" in err, err
    train.load_checkpoint(tmp_path / "run" / "last.pt")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_interrupt_stops_at_once(workers, tmp_path):
    data = picture_folder(tmp_path / "data", {"a": 8, "b": 8}, {"a": 1, "b": 1})
    (data / "train" / "b" / "3.png").unlink()
    os.mkfifo(data / "train" / "b" / "3.png")  # who reads it waits for ever: the step never ends
    process = script(*arguments(data, tmp_path / "run", "--workers", workers))
    writer = None
    while writer is None:
        try:
            writer = os.open(data / "train" / "b" / "3.png", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    while "stopping after this step" not in process.stderr.readline():
        pass
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    os.close(writer)
    assert process.returncode == 130 and "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot be lost: several processes and hosts
# ---------------------------------------------------------------------------------------------------------------------

def torchrun(*options):
    return ["-m", "torch.distributed.run", *options]


@pytest.fixture(scope="session")
def pair(pictures, tmp_path_factory):
    """A run of two processes on one host, left alone."""
    out = tmp_path_factory.mktemp("pair") / "run"
    process = script(*arguments(pictures, out), launcher=torchrun("--standalone", "--nproc_per_node=2"))
    stdout, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert stdout.count("epoch   1/2") == 1 and "\r" not in stdout + err  # one line an epoch, of one process; no bars
    return out


def pid_of_rank(launcher, rank):
    """The process that torchrun started for a rank."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has just ended
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)


def test_a_dead_rank_is_started_again_and_the_run_ends_as_if_undisturbed(pair, pictures, tmp_path):
    out = tmp_path / "run"
    process = script(*arguments(pictures, out, "--save-every", 1, "--resume", "auto"),
                     launcher=torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=3"))

    def living():
        pids = [pid_of_rank(process, rank) for rank in (0, 1)]
        return pids if None not in pids and not dead & {*pids} else None

    def saved():
        return (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0

    steps, dead = [], set()
    for rank in (0, 1, 0):
        pids, before = wait_for(living, process), saved()
        wait_for(lambda: saved() != before, process)
        steps.append(train.load_checkpoint(out / "last.pt")["scheduler"]["last_epoch"])
        os.kill(pids[rank], signal.SIGKILL)
        dead |= {*pids}
    stdout, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert stdout.count("resumed at epoch") == 3 and steps == sorted(set(steps))
    assert_same_end(out, pair)


def test_processes_that_read_different_checkpoints_are_told(monkeypatch, finished, pictures, tmp_path):
    args = train.parse_arguments(arguments(pictures, finished, "--resume", "auto"))
    sums = []

    def all_sum(numbers, device):  # of this process and of another, which has a checkpoint too, but one step on
        sums.append(numbers)
        return [2 * numbers[0] + (len(sums) == 2)]
    monkeypatch.setattr(train, "all_sum", all_sum)
    with pytest.raises(train.UserError, match="different checkpoints in .*last.pt: --out must be a folder that all"):
        train.open_run(args, processes(count=2))


@pytest.mark.parametrize("name", ["best.pt", "log.jsonl"])
def test_a_run_does_not_begin_over_what_is_left_of_another(name, pictures, tmp_path):
    (tmp_path / name).write_text("dear")
    for resume in [], ["--resume", "auto"]:
        with pytest.raises(train.UserError, match=f"{name} is there from an earlier run: another --out begins"):
            train.main(arguments(pictures, tmp_path, *resume))
    assert (tmp_path / name).read_text() == "dear" and len(list(tmp_path.iterdir())) == 1


def test_a_log_that_was_edited_badly_is_an_error_and_stays(tmp_path):
    (tmp_path / "log.jsonl").write_text("loss went down!\n")
    with pytest.raises(train.UserError, match="log.jsonl has a line that is not of this log"):
        train.append_log(tmp_path / "log.jsonl", {"epoch": 1}, lambda old: old["epoch"] < 1)
    assert (tmp_path / "log.jsonl").read_text() == "loss went down!\n"


def test_restarted_processes_do_not_find_each_other_by_what_the_dead_have_left():
    store = dist.HashStore()
    for rank in range(3):
        store.set(f"question {rank}", "of the dead")
    for _ in range(3):  # starts
        with ThreadPoolExecutor(3) as pool:
            parts = list(pool.map(lambda rank: train.fresh_part(store, rank, 3), range(3)))
        assert not parts[0].check(["address"])
        parts[0].set("address", "here")
        assert all(part.get("address") == b"here" for part in parts)


# Two hosts with a cable between them: two network, host name and mount namespaces, made without a privilege.
HOSTS = """
mount --bind {hosts} /etc/hosts && ip link set lo up && hostname first || exit 9
unshare -nu sh -c 'hostname second; ip link set lo up; until ip addr add 10.99.0.2/24 dev right; do sleep 0.1; done
                   ip link set right up; exec {command}' 2> {second} &
while [ "$(readlink /proc/$!/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done  # not yet unshared
ip link add left type veth peer name right netns $! && ip addr add 10.99.0.1/24 dev left && ip link set left up
{command}; status=$?
wait $! || exit 8
exit $status
"""


def test_two_hosts_end_with_the_weights_of_one(pair, pictures, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.99.0.1 first\n10.99.0.2 second\n")
    words = arguments(pictures, tmp_path / "run", "--resume", "auto")
    spaces = subprocess.run(["unshare", "-rnum", "sh", "-c", "ip link add left type veth peer name right"],
                            capture_output=True).returncode == 0
    first = "first" if spaces else "localhost"
    launcher = torchrun("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={first}:29567")
    if spaces:
        command = shlex.join(map(str, [sys.executable, *launcher, HERE / "train.py", *words]))
        lines = HOSTS.format(hosts=tmp_path / "hosts", command=command, second=tmp_path / "second.txt")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        agents = [subprocess.Popen(["unshare", "-rnum", "sh", "-c", lines], env=env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)]
    else:  # where namespaces are forbidden: two agents that meet on the loopback device
        agents = [script(*words, launcher=launcher) for _ in range(2)]
    for agent in agents:
        _, err = agent.communicate(timeout=300)
        assert agent.returncode == 0, err
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in (tmp_path / "run", pair))
    for kind in ("model", "ema"):
        for name, value in theirs[kind].items():
            torch.testing.assert_close(ours[kind][name], value, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot be lost: the same result whatever the shape of the machine
# ---------------------------------------------------------------------------------------------------------------------

def run_in_shape(data, out, count, accum, workers, *more):
    words = arguments(data, out, "--accum", accum, "--workers", workers, *more)
    launcher = torchrun("--standalone", f"--nproc_per_node={count}") if count > 1 else ()
    return script(*words, launcher=launcher)


@pytest.fixture(scope="session")
def more_pictures(pictures, tmp_path_factory):
    """321 to train on, ten steps of 32."""
    root = tmp_path_factory.mktemp("more")
    (root / "val").symlink_to(pictures / "val")
    for folder in (pictures / "train").iterdir():
        (root / "train" / folder.name).mkdir(parents=True)
        for i in range(107):
            os.link(folder / f"{i % 17}.png", root / "train" / folder.name / f"{i}.png")
    return root


@pytest.mark.parametrize("shapes", [
    [(4, 2, 1)],
    pytest.param([(p, a, w) for p in (1, 2, 4) for a in (1, 2, 4) for w in (0, 1, 4)][1:], marks=pytest.mark.slow)],
    ids=["one and four processes", "all 27 shapes"])
def test_fifty_steps_have_the_same_losses_in_any_shape_of_the_machine(shapes, more_pictures, tmp_path):
    """The whole recipe is on: random crops, RandAugment, erasing, mixup and cutmix; drop-path is not."""
    largest = 0.0
    for shape in [(1, 1, 0), *shapes]:
        out = tmp_path / "-".join(map(str, shape))
        process = run_in_shape(more_pictures, out, *shape, "--batch-size", 32, "--epochs", 5)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        for entry, expected in zip(history(out), history(tmp_path / "1-1-0"), strict=True):
            for key in ("loss", "val_loss", "ema_val_loss"):
                largest = max(largest, abs(entry[key] - expected[key]))
            assert entry["lr"] == expected["lr"] and entry["top1"] == expected["top1"]
    print(f"largest difference of a loss: {largest:.1e}")
    assert largest < 1e-5


SHAPES_OF_MACHINES = [(p, a, 0) for p in (1, 2, 4) for a in (1, 2, 4)] + [(1, 1, 1), (1, 1, 4), (2, 1, 1), (1, 4, 4)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_every_shape_of_the_machine_sees_the_same_images_augmented_and_mixed_alike(pictures):
    args = train.parse_arguments(arguments(pictures, "out", "--batch-size", 32))
    data = train.Seeded(train.image_folder(pictures, "train"), train.train_transform(args), args.seed, epoch=3)
    mix = train.batch_transform(args, 3)
    seen = {}
    for count, accum, workers in SHAPES_OF_MACHINES:
        items = []
        for rank in range(count):
            batches = train.training_batches(len(data), 32, accum, processes(rank, count), args.seed, epoch=3)
            for images, labels in train.make_loader(data, batches, workers, torch.device("cpu")):
                images, labels = mix(images, labels, 3, 0)
                items += [(image.numpy().tobytes(), tuple(soft.tolist())) for image, soft in zip(images, labels)]
        seen[count, accum, workers] = sorted(items)
    assert len(seen[1, 1, 0]) == len({image for image, _ in seen[1, 1, 0]}) == 32
    assert any(0 < max(soft) < 1 for _, soft in seen[1, 1, 0])  # mixed indeed
    assert all(items == seen[1, 1, 0] for items in seen.values())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_every_shape_of_the_machine_sees_the_same_crops(streets):
    args = segment.parse_arguments(seg_arguments(streets, "out"))
    seen = {}
    for count, accum, workers in SHAPES_OF_MACHINES:
        items = []
        for rank in range(count):
            stream = segment.Shuffled(segment.open_data(args, ["training"])[0], segment.TrainTransform(args), args.seed)
            batches = segment.training_batches(0, 2, 16, accum, processes(rank, count))
            for number, (images, masks) in enumerate(train.make_loader(stream, batches, workers, torch.device("cpu"))):
                items += [(number // accum, image.numpy().tobytes(), mask.numpy().tobytes())
                          for image, mask in zip(images, masks)]
        seen[count, accum, workers] = sorted(items)
    assert len(seen[1, 1, 0]) == 32 and all(items == seen[1, 1, 0] for items in seen.values())


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_with_the_one_half_a_batch_on_and_labels_in_the_same_proportion(kind):
    args = train.parse_arguments(["--data", "x", "--mixup", "0", "--cutmix", "0", f"--{kind}", "1"])
    mix, images = train.batch_transform(args, 4), torch.arange(4.).view(4, 1, 1, 1).expand(4, 3, 20, 20)
    shares = set()
    for step in range(5):
        mixed, labels = mix(images, torch.arange(4), 0, step)
        assert mixed.shape == images.shape and labels.shape == (4, 4)
        for i, partner in ((0, 2), (1, 3), (2, 0), (3, 1)):
            share = labels[i, i].item()
            assert labels[i, partner] == pytest.approx(1 - share, abs=1e-6)
            assert mixed[i].mean().item() == pytest.approx(share * i + (1 - share) * partner, abs=1e-5)
            shares.add(round(share, 5))
    assert len(shares) > 3  # by the step


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot be lost: disk trouble
# ---------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def file_size_limit():
    """Files of more than a megabyte cannot be written, as with `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("module, make, data, alone, place", [
    (train, arguments, "pictures", "finished", {"epoch": 1, "step": 3}),
    (segment, seg_arguments, "streets", "segmented", {"step": 4, "validated": 3})], ids=["train", "segment"])
def test_a_file_size_limit_ends_the_run_and_leaves_the_checkpoint(module, make, data, alone, place, tmp_path, request):
    out, words = tmp_path / "run", make(request.getfixturevalue(data), tmp_path / "run", "--drop-path", 0.2)
    out.mkdir()
    torch.save(torch.load(request.getfixturevalue(alone) / "last.pt", weights_only=True) | place, out / "last.pt")
    before = (out / "last.pt").read_bytes()
    with file_size_limit(), \
            pytest.raises(train.UserError, match="cannot write .*last.pt: File too large; the one .* is still there"):
        module.main([*words, "--resume", "auto", "--save-every", "1"])
    assert (out / "last.pt").read_bytes() == before and [path.name for path in out.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("write", [lambda path: train.save_checkpoint({"weight": torch.ones(10**6)}, path),
                                   lambda path: train.append_log(path, {"epoch": 1}, lambda old: True)], ids=["checkpoint", "log"])
def test_a_full_disk_is_named_and_what_was_there_stays(write, tmp_path):
    (tmp_path / "file").write_text('{"epoch": 0}\n')
    (tmp_path / "file.tmp").symlink_to("/dev/full")  # a device on which there is never any space
    with pytest.raises(train.UserError, match="cannot write .*file: No space left on device; the one .* still there"):
        write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == '{"epoch": 0}\n'


def test_a_script_that_cannot_save_says_so_and_exits_with_2(pictures, tmp_path):
    with file_size_limit():
        process = script(*arguments(pictures, tmp_path / "run", "--save-every", 1))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "last.pt: File too large" in err and "Traceback" not in err
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_that_cannot_be_written_to_is_found_before_training(segmented, finished, pictures, streets, tmp_path):
    sealed, model = tmp_path / "sealed", str(segmented / "best.pt")
    sealed.mkdir()
    sealed.chmod(0o500)
    (tmp_path / "file").touch()
    outs = [tmp_path / "file", tmp_path / "file" / "run"]
    outs += [sealed, sealed / "run"] if os.geteuid() else [Path("/sys"), Path("/proc/run")]  # not even for root
    for out in outs:
        for act in (lambda: train.main(arguments(pictures, out)), lambda: segment.main(seg_arguments(streets, out)),
                    lambda: segment.main(["--predict", "x.png", "--weights", model, "--out", str(out)])):
            with pytest.raises(train.UserError, match=f"--out {out}: cannot write in this folder: "):
                act()
    assert not list(sealed.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot be lost: hostile and broken files
# ---------------------------------------------------------------------------------------------------------------------

def grey_ramp(mode):
    """0, 1/4, 1/2 and 3/4 of white, a column each, and white, in 16 bits."""
    ramp = torch.tensor([0, 16384, 32768, 49152, 65535]).expand(4, 5).contiguous()
    return Image.fromarray(ramp.to({"I;16": torch.uint16, "I": torch.int32, "F": torch.float32}[mode]).numpy())


def two_colours(mode, size=(40, 20)):
    """Red above, blue below."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0], size[1] // 2))
    return image.convert(mode)


def transparent(mode):
    """A quarter of the way from black to the paper, and the paper."""
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 191))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    return image.convert(mode)


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def jpeg(quality=95, **kw):
    file = io.BytesIO()
    two_colours("RGB").save(file, "JPEG", quality=quality, **kw)
    return file.getvalue()


def header(width, height):
    """A PNG file that is nothing but its beginning."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


RED, BLUE, RAMP = (254, 0, 0), (0, 0, 254), [(k, k, k) for k in (0, 64, 128, 192, 255)]
FRAMES = dict(save_all=True, append_images=[Image.new("RGB", (40, 20), "green")] * 2)
# What is in the file: an image with the options to save it, or bytes; and what is made of it: a size and some pixels,
# or why it is refused.
IMAGES = {
    "plain.png":           (two_colours("RGB"), {}, (40, 20), {(5, 5): RED, (5, 15): BLUE}),
    "another.jpg":         (two_colours("RGB"), {"quality": 95}, (40, 20), {(5, 5): RED, (5, 15): BLUE}),
    "palette.png":         (two_colours("P"), {}, (40, 20), {(5, 5): RED, (5, 15): BLUE}),
    "grey.png":            (two_colours("L"), {}, (40, 20), {(5, 5): (76, 76, 76), (5, 15): (29, 29, 29)}),
    "black and white.png": (Image.new("1", (3, 3), 1), {}, (3, 3), {(1, 1): (255, 255, 255)}),
    "cmyk.jpg":            (two_colours("CMYK"), {"quality": 95}, (40, 20), {(5, 5): RED, (5, 15): BLUE}),
    # What is transparent lies on white.
    "rgba.png":            (transparent("RGBA"), {}, (4, 4), {(0, 0): (255, 255, 255), (3, 0): (64, 64, 64)}),
    "grey and alpha.png":  (transparent("LA"), {}, (4, 4), {(0, 0): (255, 255, 255), (3, 0): (64, 64, 64)}),
    "one colour out.png":  (two_colours("RGB"), {"transparency": (0, 0, 255)}, (40, 20),
                            {(5, 5): RED, (5, 15): (255, 255, 255)}),
    "palette, alpha.png":  (two_colours("P"), {"transparency": bytes([0] * 256)}, (40, 20), {(5, 5): (255, 255, 255)}),
    # 16 bits are cut to 8: a ramp stays a ramp.
    "16-bit.png":          (grey_ramp("I;16"), {}, (5, 4), {(k, 1): RAMP[k] for k in range(5)}),
    "16-bit page.tif":     (grey_ramp("I;16"), {}, (5, 4), {(k, 1): RAMP[k] for k in range(5)}),
    "16-bit map.pgm":      (grey_ramp("I"), {}, (5, 4), {(k, 1): RAMP[k] for k in range(5)}),
    "int32.tif":           (grey_ramp("I"), {}, "its pixels are 32-bit numbers", None),
    "float.tif":           (grey_ramp("F"), {}, "its pixels are 32-bit numbers", None),
    # Upright, as the camera noted.
    "turned 6.jpg":        (two_colours("RGB"), {"exif": exif(6), "quality": 95}, (20, 40),
                            {(15, 5): RED, (5, 5): BLUE}),
    "turned 3.png":        (two_colours("RGB"), {"exif": exif(3)}, (40, 20), {(5, 5): BLUE, (5, 15): RED}),
    "mirrored 4.jpg":      (two_colours("RGB"), {"exif": exif(4), "quality": 95}, (40, 20),
                            {(5, 5): BLUE, (5, 15): RED}),
    "bad exif.jpg":        (jpeg(exif=b"Exif\0\0" + bytes(range(60))), None, (40, 20), {(5, 5): RED}),
    # Of an animation the first frame.
    "gif.gif":             (two_colours("RGB"), FRAMES, (40, 20), {(5, 5): RED, (5, 15): BLUE}),
    "animated.png":        (two_colours("RGB"), FRAMES, (40, 20), {(5, 5): RED, (5, 15): BLUE}),
    "webp.webp":           (two_colours("RGB"), {**FRAMES, "lossless": True}, (40, 20), {(5, 5): RED, (5, 15): BLUE}),
    "pages.tif":           (two_colours("RGB"), FRAMES, (40, 20), {(5, 5): RED, (5, 15): BLUE}),
    # Any size that memory can hold.
    "one pixel.png":       (Image.new("RGB", (1, 1), "red"), {}, (1, 1), {(0, 0): RED}),
    "long.png":            (two_colours("RGB", (5000, 8)), {}, (5000, 8), {(4999, 0): RED, (0, 7): BLUE}),
    "tall.png":            (two_colours("RGB", (2, 60_000)), {}, (2, 60_000), {(0, 9): RED, (1, 59_999): BLUE}),
    "huge.png":            (header(60_000, 60_000), None, r"3600000000 pixels\) exceeds limit", None),
    "empty.jpg":           (b"", None, "cannot identify image file", None),
    "text.jpg":            (b"a holiday picture\n" * 9, None, "cannot identify image file", None),
    "half.jpg":            (jpeg()[:len(jpeg()) // 2], None, "truncated|Truncated", None),
    "header alone.png":    (header(40, 20), None, "truncated|broken|unrecognized|not enough", None),
    "program.jpg":         (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", None, "PostScript", None),
}


def write_image(name, folder):
    content, options = IMAGES[name][:2]
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        content.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_read_as_a_person_sees_it_or_refused_with_its_path_and_the_reason(name, tmp_path):
    path, (_, _, expected, pixels) = write_image(name, tmp_path), IMAGES[name]
    if isinstance(expected, str):
        with pytest.raises(train.UserError, match=f"^cannot read the image {re.escape(str(path))}: .*({expected})"):
            train.read_image(path)
        return
    image = train.read_image(path)
    assert image.mode == "RGB" and image.size == expected
    for place, colour in pixels.items():
        assert image.getpixel(place) == pytest.approx(colour, abs=3)


READABLE = [name for name, row in IMAGES.items() if not isinstance(row[2], str)]


def test_every_readable_image_can_be_trained_on_and_predicted(finished, segmented, tmp_path, capsys):
    args = train.parse_arguments(arguments("x", "x"))
    whole = train.parse_arguments(arguments("x", "x", "--crop-scale", 1))
    seg_args = segment.parse_arguments(seg_arguments("x", "x"))
    paths = [str(write_image(name, tmp_path)) for name in READABLE]
    refused = [str(write_image(name, tmp_path)) for name in IMAGES if name not in READABLE]
    for image in map(train.read_image, paths):
        for transform in (train.train_transform(args), train.train_transform(whole), train.eval_transform(32, 37)):
            assert transform(image).shape == (3, 32, 32)
        mask = torch.zeros(image.height, image.width, dtype=torch.uint8)
        assert segment.TrainTransform(seg_args)(image, mask)[0].shape == (3, 32, 32)
    for module, run in ((train, finished), (segment, segmented)):  # what is refused does not keep it from the others
        words = ["--predict", *refused, *paths, "--weights", str(run / "best.pt"), "--device", "cpu"]
        assert module.main([*words, "--out", str(tmp_path / "out")]) == 2
        printed, err = capsys.readouterr()
        assert all(f"cannot read the image {path}: " in err for path in refused)
    for path in paths:
        with Image.open(tmp_path / "out" / f"{Path(path).stem}_labels.png") as labels:
            assert labels.size == train.read_image(path).size


def test_of_a_very_long_image_the_middle_is_enlarged_and_not_the_whole():
    sizes = []
    transform = train.eval_transform(32, 40)
    transform.transforms[1].register_forward_hook(lambda *hook: sizes.append(hook[2].size))
    for size in ((60_000, 2), (2, 60_000), (300, 100)):
        transform(Image.new("RGB", size))
    assert sizes == [(160, 40), (40, 160), (120, 40)]


class Trap:
    """Unpickled, it makes the folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1:]


def another(checkpoint, **more):
    """The checkpoint with other contents, as bytes."""
    file = io.BytesIO()
    torch.save(checkpoint | more, file)
    return file.getvalue()


def everywhere(reason):
    return (reason,) * 3


DAMAGED = everywhere("is not a checkpoint, or a damaged one")
CODE = everywhere("holds Python objects .* to load those is to run code")
# What is made of the bytes and of the contents of a good checkpoint, and why it is then refused with --resume, with
# --weights for training, and with --weights for predicting; None: it is used.
CHECKPOINTS = {
    "truncated":          (lambda data, c: data[:len(data) // 2], DAMAGED),
    "without its end":    (lambda data, c: data[:-30], DAMAGED),
    "empty":              (lambda data, c: b"", DAMAGED),
    "text":               (lambda data, c: b"learning rate 3\n", DAMAGED),
    "a bit flipped":      (lambda data, c: flipped(data, len(data) // 2), everywhere("check sum of .* is wrong")),
    "a list":             (lambda data, c: pickled([1, 2]), everywhere("holds a list; expected a checkpoint")),
    "a program":          (lambda data, c: another(c, more=Trap("trap")), CODE),
    "an old program":     (lambda data, c: pickled(Trap("trap")), CODE),
    "another model":      (lambda data, c: another(c, model=VisionGRU(3).state_dict(), ema=None, better="model"),
                           ("does not fit: Error.* in loading state_dict", *2 * ["does not fit this VisionGRU"])),
    "another optimizer":  (lambda data, c: another(c, optimizer={"state": {}, "param_groups": []}),
                           ("does not fit: loaded state dict has a different number of param", None, None)),
    "no step":            (lambda data, c: another({key: c[key] for key in c if key != "step"}),
                           ("does not fit: it has no 'step'", None, None)),
    "no settings":        (lambda data, c: another(c, settings={}),
                           ("does not fit: it has no 'train_images'", None, "does not fit this VisionGRU")),
    "strange settings":   (lambda data, c: another(c, settings=7), ("does not fit", None, "no settings of a model")),
    "an unknown model":   (lambda data, c: another(c, settings={**c["settings"], "model": "vast"}),
                           (None, None, "a model called 'vast'; expected one of nano, tiny, base")),
    "weights alone":      (lambda data, c: another(c["model"]), ("weights only and cannot be resumed", None, None)),
}


def pickled(thing):
    file = io.BytesIO()
    torch.save(thing, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_is_used_or_refused_with_its_path_and_the_reason(kind, finished, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, reasons = CHECKPOINTS[kind]
    content = torch.load(finished / "last.pt", weights_only=True)
    Path("bad.pt").write_bytes(make((finished / "last.pt").read_bytes(), content))
    model = () if kind == "no settings" else ("--model", "nano")
    uses = (arguments(pictures, "resumed", "--drop-path", 0.2, "--resume", "bad.pt"),
            arguments(pictures, "begun", "--weights", "bad.pt", "--lr", 0, "--epochs", 1),
            ["--predict", str(pictures / "val/ant/0.png"), "--weights", "bad.pt", *model, "--device", "cpu"])
    for words, reason in zip(uses, reasons):
        if reason is None:
            assert train.main(words) == 0
        else:
            with pytest.raises(train.UserError, match=f"bad.pt(.|\n)*{reason}"):
                train.main(words)
    assert not Path("trap").exists()


def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path):
    content = {"model": VisionGRU(3, dim=4, depths=(1, 1, 1, 1)).state_dict(), "step": 3, "args": {"lr": 0.1}}
    data, chance, found = another(content), random.Random(0), 0
    for _ in range(300):
        place = chance.randrange(len(data))
        (tmp_path / "flipped.pt").write_bytes(flipped(data, place))
        try:
            assert_same(train.load_checkpoint(tmp_path / "flipped.pt"), content)
        except train.UserError as error:
            assert "flipped.pt is not a checkpoint, or a damaged one" in str(error)
            found += 1
    assert found > 250


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot be lost: numbers
# ---------------------------------------------------------------------------------------------------------------------

def saturated(kind, shape, dtype):
    """Gates fully closed, fully open, a mix of both, or as small as the type knows."""
    fill = {"closed": 1.0, "open": 0.0, "tiny": torch.finfo(dtype).tiny}
    values = torch.randint(0, 2, shape).to(dtype) if kind == "mixed" else torch.full(shape, fill[kind], dtype=dtype)
    return values.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scan", visiongru.SCANS)
def test_no_scan_gives_nan_at_saturated_gates(scan, dtype):
    for gates, T, with_h0, reverse in itertools.product(("closed", "open", "mixed", "tiny"), (1, 64, 1009),
                                                        (False, True), (False, True)):
        a = saturated(gates, (2, T, 3), dtype)
        for b in (torch.zeros_like(a), torch.full_like(a, 100.0)):
            inputs = [a, b.requires_grad_()] + ([torch.ones(2, 3, dtype=dtype, requires_grad=True)] if with_h0 else [])
            h = visiongru.SCANS[scan](*inputs, reverse=reverse)
            grads = torch.autograd.grad(h.float().mean(), inputs)
            assert not any(t.isnan().any() for t in (h, *grads)), (gates, T, with_h0, reverse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scan", visiongru.SCANS)
def test_no_mingru_gives_nan_at_saturated_gates_and_candidates(scan, dtype):
    gru = MinGRU(2, expansion=1, scan=scan)
    gru.in_proj = Given()
    top = min(torch.finfo(dtype).max, 1e30)
    for T, reverse in itertools.product((1, 64, 1009), (False, True)):
        choices = torch.tensor([-top, -90.0, -0.0, 0.0, 90.0, 6e4], dtype=dtype)
        u = choices[torch.randint(len(choices), (2, T, 4))].requires_grad_()
        y, h = gru(u, None, reverse)
        grad, = torch.autograd.grad(y.float().mean() + h.float().mean(), u)
        assert not any(t.isnan().any() for t in (y, h, grad))


def scaled_run(out, alone, scale, place):
    """A folder with a run in fp16 that is about to go on, its loss scaled by `scale`."""
    last = torch.load(alone / "last.pt", weights_only=True) | place
    last["scaler"] = {"scale": scale, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
                      "_growth_tracker": 0}
    last["args"]["amp"] = "fp16"
    out.mkdir()
    torch.save(last, out / "last.pt")
    return last


def test_gradients_that_overflow_in_fp16_are_skipped_until_the_scale_fits(finished, pictures, tmp_path):
    before = scaled_run(tmp_path / "run", finished, 2.0**30, {"epoch": 0, "step": 0})
    words = arguments(pictures, tmp_path / "run", "--drop-path", 0.2, "--amp", "fp16", "--epochs", 6, "--lr", 1e-3,
                      "--resume", "auto")
    assert train.main(words) == 0
    after = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert 2.0**8 < after["scaler"]["scale"] < 2.0**28  # some steps were skipped, and others not
    assert not torch.equal(after["model"]["head.weight"], before["model"]["head.weight"])
    assert all(value.isfinite().all() for value in [*after["model"].values(), *after["ema"].values()])
    assert all(math.isfinite(entry["loss"]) for entry in history(tmp_path / "run"))


def test_an_exploding_loss_in_fp16_ends_the_run_and_leaves_the_checkpoint(finished, pictures, tmp_path):
    words = arguments(pictures, tmp_path / "run", "--amp", "fp16", "--lr", 1e4, "--warmup", 0, "--save-every", 1)
    with pytest.raises(train.UserError, match="(loss is (nan|inf)|no longer finite) .*last.pt was not written"):
        train.main(words)
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in last["model"].values())


def test_gradients_that_no_scale_makes_finite_end_the_run(finished, pictures, tmp_path, monkeypatch):
    scaled_run(tmp_path / "run", finished, 1e-5, {"epoch": 0, "step": 0})
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def unsound(**kw):  # its loss is finite and its gradient is not
        model = visiongru_nano(**kw)
        model.head.weight.register_hook(lambda grad: grad * math.nan)
        return model
    monkeypatch.setitem(train.MODELS, "nano", unsound)
    words = arguments(pictures, tmp_path / "run", "--drop-path", 0.2, "--amp", "fp16", "--resume", "auto")
    with pytest.raises(train.UserError, match="gradients are no longer finite at epoch 1, step 4 of 6, at any scale"):
        train.main(words)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_mixed_precision_ends_within_a_point_of_float32_on_the_built_in_set(tmp_path):
    top1 = {}
    for amp in ("off", "bf16", "fp16"):
        process = script("--device", "cpu", "--amp", amp, "--out", str(tmp_path / amp))
        _, err = process.communicate()
        assert process.returncode == 0, err
        top1[amp] = torch.load(tmp_path / amp / "best.pt", weights_only=True)["best"]
    print(top1)
    assert abs(top1["bf16"] - top1["off"]) < 1 and abs(top1["fp16"] - top1["off"]) < 1


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot be lost: any command line
# ---------------------------------------------------------------------------------------------------------------------

# Values for every option that both scripts have, those that can be meant and others; the paths are made by the test.
NUMBERS = ["0", "1", "-1", "0.5", "2", "nan", "inf", "-inf", "1e-300", "1e300", "", "x", "1_0", "0x10", "10" * 20]
COMMON = {
    "--data": ["pictures", "streets", "empty", "absent", "file", ""], "--model": ["nano", "tiny", "base", "vast", ""],
    "--weights": ["classifier.pt", "segmenter.pt", "weights.pt", "broken.pt", "absent.pt", "empty", ""],
    "--resume": ["auto", "classifier.pt", "segmenter.pt", "broken.pt", "absent.pt", ""],
    "--out": ["new", "file", "file/new", "classifier", "segmenter", ""],
    "--batch-size": ["4", "2", "1", "3", *NUMBERS], "--accum": ["2", "1", "3", *NUMBERS], "--lr": NUMBERS,
    "--weight-decay": NUMBERS, "--warmup": NUMBERS, "--drop-path": NUMBERS, "--flip": NUMBERS, "--seed": NUMBERS,
    "--betas": ["0.9 0.99", "0 0", "1 1", "0.9", "nan 0", "x y"],
    "--device": ["cpu", "cpu:1", "cuda", "cuda:-1", "cuda:7", "tpu", "meta", "", "auto"],
    "--amp": ["auto", "bf16", "fp16", "off", "fp8"], "--checkpoint": [""], "--compile": [""],
    "--workers": ["0", "1", "-1", "x"], "--save-every": ["1", "0", "-1", "1e3"], "--eval": [""],
    "--predict": ["file", "plain.png", "plain.png half.jpg", "absent.png", "empty", "plain.png plain.png"],
    "--img-size": ["32", "33", "31", "1000000", "-1", "x"], "--nonsense": ["1"], "stray": [""],
}
FUZZED = {
    "train": (train, arguments, "pictures", COMMON | {
        "--epochs": ["1", "2", "0", "-1", "x"], "--val-resize": ["32", "40", "31", "0", "x"], "--crop-scale": NUMBERS,
        "--randaug": ["0 0", "2 9", "1 30", "1 31", "-1 0", "2"], "--erasing": NUMBERS, "--mixup": NUMBERS,
        "--cutmix": NUMBERS, "--smoothing": NUMBERS, "--ema": NUMBERS}),
    "segment": (segment, seg_arguments, "streets", COMMON | {
        "--iters": ["1", "2", "0", "-1", "x"], "--eval-every": ["1", "2", "0"], "--num-classes": ["3", "2", *NUMBERS],
        "--zero-is-ignore": [""], "--no-zero-is-ignore": [""], "--ignore-label": ["255", "0", "3", *NUMBERS],
        "--channels": ["8", "0", "x"], "--aux-channels": ["8", "-8"], "--short-side": ["32", "31", "100", "x"],
        "--scale": ["1 1", "0.5 2", "2 1", "0 1", "nan 1", "1 inf", "1e300 1e300", "1e-300 1"],
        "--crop-size": ["32", "40", "31", "1000000"], "--distort": NUMBERS, "--slide": [""],
        "--backbone-weights": ["classifier.pt", "segmenter.pt", "broken.pt"]}),
}


def command_line(options, chance):
    words = []
    for option in chance.sample(sorted(options), chance.choice([1, 1, 2, 3, 5])):
        words += [option, *chance.choice(options[option]).split(" ")] if options[option] != [""] else [option]
    return words


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUZZED)
def test_any_command_line_ends_with_0_or_2_and_never_a_traceback(name, count, finished, segmented, pictures, streets,
                                                                 tmp_path, monkeypatch, capsys):
    module, make, data, options = FUZZED[name]
    monkeypatch.chdir(tmp_path)

    def small(**kw):
        return VisionGRU(dim=4, depths=(1, 1, 1, 1), **kw)
    for size in train.MODELS:
        monkeypatch.setitem(train.MODELS, size, small)
    shapes, scenes = train.Shapes, segment.Scenes
    monkeypatch.setattr(train, "Shapes", lambda split, length: shapes(split, 32))
    monkeypatch.setattr(segment, "Scenes", lambda split, length: scenes(split, 32))
    monkeypatch.setattr(torch, "compile", lambda model, **kw: model)  # minutes, and no matter of the arguments
    Path("pictures").symlink_to(pictures), Path("streets").symlink_to(streets)
    Path("empty").mkdir(), Path("file").touch(), write_image("plain.png", Path()), write_image("half.jpg", Path())
    assert train.main(arguments("pictures", "classifier", "--epochs", 1)) == 0
    assert segment.main(seg_arguments("streets", "segmenter", "--iters", 3)) == 0
    shutil.copy("classifier/last.pt", "classifier.pt"), shutil.copy("segmenter/last.pt", "segmenter.pt")
    torch.save(small(num_classes=3).state_dict(), "weights.pt")
    Path("broken.pt").write_bytes(Path("classifier.pt").read_bytes()[:9999])
    chance, statuses = random.Random(count), []
    for _ in range(count):
        base = make(data, "new", *{"train": ("--epochs", 1, "--batch-size", 16), "segment": ("--iters", 1)}[name])
        words = [*(base if chance.random() < 0.8 else base[2:]), *command_line(options, chance)]
        with pytest.raises(SystemExit) as end:
            train.run(lambda: module.main(words))  # with 1 for an error that it does not know
        captured = capsys.readouterr()
        statuses.append(end.value.code)
        assert end.value.code in (0, 2) and "Traceback" not in captured.err, f"{words}\n{captured.err}"
        assert end.value.code == 0 or "error: " in captured.err, words
        shutil.rmtree("new", ignore_errors=True)
    print(f"{count} command lines, {statuses.count(0)} of them accepted")
    assert 0.1 < statuses.count(0) / count < 0.9


@pytest.mark.parametrize("name, words, status", [
    ("train.py", ["--help"], 0), ("segment.py", ["--help"], 0), ("train.py", ["--seed", "-1"], 2),
    ("segment.py", ["--predict", "absent.png", "--weights", "absent.pt"], 2)])
def test_the_scripts_own_processes_end_so_too(name, words, status):
    process = script(*words, name=name)
    _, err = process.communicate(timeout=100)
    assert process.returncode == status and "Traceback" not in err
