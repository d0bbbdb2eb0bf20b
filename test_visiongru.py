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
from pathlib import Path

import pytest
import torch
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
SMALL = dict(dim=4, depths=(1, 1, 1, 1))
HANDLERS = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

each_scan = pytest.mark.parametrize("scan", visiongru.SCANS)
each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
each_gate = pytest.mark.parametrize("gates", [-8, 0, 8], ids=["nearly closed", "typical", "nearly open"])
each_way = pytest.mark.parametrize("with_h0, reverse", list(itertools.product((False, True), repeat=2)))


@pytest.fixture(autouse=True)
def repeatable():
    torch.manual_seed(0)
    yield
    for number, handler in HANDLERS:  # pytest's own, which a run of ours replaces
        signal.signal(number, handler)


def with_gradients(outputs, inputs):
    """The outputs, and the gradients of their weighted sum, in which no two numbers weigh the same, for the inputs."""
    loss = sum((y * torch.arange(y.numel()).cos().view_as(y)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, [t for t in inputs if t is not None])]


# The recurrence ------------------------------------------------------------------------------------------------------

def coefficients(T, with_h0):
    """Random a, b and, if wanted, h0. Neither a nor b is contiguous in memory."""
    a, b = torch.rand(T, 2, 3, dtype=torch.float64).transpose(0, 1), torch.rand(2, T, 6, dtype=torch.float64)[..., 3:]
    h0 = torch.rand(2, 3, dtype=torch.float64).requires_grad_() if with_h0 else None
    return [a.requires_grad_(), b.add_(0.1).requires_grad_(), h0]


@each_way
def test_the_scans_are_the_loop_at_every_length_reversed_the_loop_over_the_flipped_sequence(with_h0, reverse):
    around_powers_of_row = [length + i for length in (16**2, 16**3) for i in (-1, 0, 1)]
    for T in [*range(1, 301), 1009, *around_powers_of_row]:
        a, b, h0 = inputs = coefficients(T, with_h0)
        copies = [t.clone() for t in inputs if t is not None]
        h = scan_sequential(a.flip(1), b.flip(1), h0).flip(1) if reverse else scan_sequential(*inputs)
        expected = with_gradients([h], inputs)
        for scan, tolerance in ((scan_sequential, 1e-11), (scan_parallel, 1e-11), (scan_log, 1e-6)):
            if scan is scan_log and T > 1009:  # log-space loses digits with T, in float64 too
                continue
            torch.testing.assert_close(with_gradients([scan(*inputs, reverse=reverse)], inputs), expected,
                                       rtol=tolerance, atol=tolerance, msg=lambda m: f"T = {T}, {scan.__name__}: {m}")
        assert all(map(torch.equal, [t for t in inputs if t is not None], copies))  # nothing is written to them


@each_way
def test_scan_and_mingru_have_the_right_first_and_second_derivatives(with_h0, reverse):
    gru = MinGRU(2, 2).double()
    of_gru = [torch.randn(2, 7, 2, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)][:1 + with_h0]
    cases = [(gru, [t.requires_grad_() for t in of_gru])]
    cases += [(scan_parallel, [t for t in coefficients(T, with_h0) if t is not None]) for T in (1, 2, 5, 8)]
    for function, inputs in cases:
        assert torch.autograd.gradcheck(lambda *t: function(*t, reverse=reverse), inputs)
        assert torch.autograd.gradgradcheck(lambda *t: function(*t, reverse=reverse), inputs)


@each_scan
def test_no_images_give_no_results_a_sequence_of_no_elements_no_states_and_mingru_refuses_it(scan):
    y, h = MinGRU(4, scan=scan)(torch.zeros(0, 5, 4))
    assert y.shape == (0, 5, 4) and h.shape == (0, 8)
    maps = VisionGRU(5, **SMALL, scan=scan).features(torch.zeros(0, 3, 64, 64))
    assert [m.shape for m in maps] == [(0, 4, 16, 16), (0, 8, 8, 8), (0, 16, 4, 4), (0, 32, 2, 2)]
    a = torch.rand(2, 0, 3)
    for h0 in (None, torch.rand(2, 3)):
        assert visiongru.SCANS[scan](a, a, h0).shape == (2, 0, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 0, 4\); expected \(B, T, dim\) with T of at least 1"):
        MinGRU(4, scan=scan)(torch.rand(2, 0, 4))


class Given(torch.nn.Module):
    """In place of in_proj: the gate and candidate are the input itself."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("reverse", [False, True])
@each_gate
def test_float32_keeps_its_accuracy_over_65536_steps_and_log_space_does_not(gates, reverse):
    u, gru, error = torch.randn(1, 65_537, 4), MinGRU(1), {}  # a prime: no row divides the sequence
    u[..., 2:] += gates  # candidates first, then gates
    gru.in_proj = Given()
    exact = scan_sequential(*gru.coefficients(u.double()), reverse=reverse)
    torch.testing.assert_close(scan_parallel(*gru.coefficients(u.double()), reverse=reverse), exact)
    for scan in (scan_parallel, scan_log):
        error[scan] = ((scan(*gru.coefficients(u), reverse=reverse) - exact).abs() / exact).max()
    assert error[scan_parallel] < 1e-5
    assert error[scan_log] > 1e-4 or gates < 0  # with closed gates log A_t hardly grows, and log-space does better


def test_gradients_of_the_float32_scan_are_accurate_too():
    a, b, weight = torch.randn(1, 16_384, 2).sigmoid(), torch.rand(1, 16_384, 2), torch.rand(1, 16_384, 2)
    inputs, exact = ([t.to(dtype, copy=True).requires_grad_() for t in (a, b)] for dtype in (a.dtype, torch.float64))
    torch.autograd.backward([scan_parallel(*inputs), scan_sequential(*exact)], [weight, weight.double()])
    for value, expected in zip(inputs, exact):
        torch.testing.assert_close(value.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)


# minGRU and 2DGRU ----------------------------------------------------------------------------------------------------

@each_scan
@pytest.mark.parametrize("expansion", [1, 2, 1.5])
def test_mingru_computes_its_equations_at_once_step_by_step_and_in_two_parts(expansion, scan):
    gru, E = MinGRU(6, expansion, scan).double(), int(6 * expansion)
    W_h, W_z = gru.in_proj.weight[:E], gru.in_proj.weight[E:]
    x, h, state = torch.randn(3, 13, 6, dtype=torch.float64), torch.zeros(3, E, dtype=torch.float64), None
    y, h_13 = gru(x)
    for x_t, y_t in zip(x.unbind(1), y.unbind(1)):
        z, u = torch.sigmoid(x_t @ W_z.T), x_t @ W_h.T
        h = (1 - z) * h + z * torch.where(u >= 0, u + 0.5, torch.sigmoid(u))
        expected = h if expansion == 1 else h @ gru.out_proj.weight.T
        y_step, state = gru.step(x_t, state)
        torch.testing.assert_close((y_t, y_step, state), (expected, expected, h))
    torch.testing.assert_close(h_13, h)
    first, h_5 = gru(x[:, :5])
    rest, h_13 = gru(x[:, 5:], h_5)
    torch.testing.assert_close((torch.cat([first, rest], 1), h_13), (y, h))


@pytest.mark.parametrize("piece", [2**21, 1000, 1], ids=["in one piece", "in pieces", "in small pieces"])
@each_way
def test_mingru_is_the_loop_in_value_and_gradient_at_zero_input_too(with_h0, reverse, piece, monkeypatch):
    monkeypatch.setattr(visiongru, "PIECE", piece)  # numbers
    gru, loop = MinGRU(3, 2).double(), MinGRU(3, 2, "sequential").double()
    gru.load_state_dict(loop.state_dict())
    for T, size in ((1, 1), (2, 1), (3, 1), (3, 0), (12, 1), (37, 1), (1009, 1)):
        x = (size * torch.randn(2, T, 3, dtype=torch.float64)).requires_grad_()
        h0 = torch.rand(2, 6, dtype=torch.float64, requires_grad=True) if with_h0 else None
        y, h = loop(x.flip(1), h0) if reverse else loop(x, h0)
        expected = with_gradients([y.flip(1) if reverse else y, h], [x, h0, *loop.parameters()])
        for gru.scan, tolerance in (("sequential", 1e-11), ("parallel", 1e-11), ("log", 1e-6)):
            torch.testing.assert_close(with_gradients(gru(x, h0, reverse), [x, h0, *gru.parameters()]), expected,
                                       rtol=tolerance, atol=tolerance, msg=lambda m: f"T = {T}, {gru.scan}: {m}")


@each_gate
def test_mingrus_float32_gradients_are_as_accurate_as_the_loops(gates):
    u, grad = torch.randn(1, 4096, 8), torch.randn(1, 4096, 4)
    u[..., 4:] += gates

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


def test_torch_func_maps_over_scans_and_gives_per_sample_gradients():
    a, b, h0 = torch.rand(3, 2, 37, 4), torch.rand(3, 2, 37, 4), torch.rand(3, 2, 4)
    for dim, reverse in itertools.product((0, 1), (False, True)):
        mapped = torch.func.vmap(lambda *t: scan_parallel(*t, reverse=reverse), in_dims=dim, out_dims=dim)(a, b, h0)
        torch.testing.assert_close(mapped, scan_parallel(a, b, h0, reverse=reverse))
    model = VisionGRU(5, **SMALL).double()
    x, y = torch.randn(3, 3, 40, 48, dtype=torch.float64), torch.tensor([0, 1, 2])
    weights = dict(model.named_parameters())

    def loss(weights, image, label):
        return F.cross_entropy(torch.func.functional_call(model, weights, (image[None],)), label[None])
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for i in range(3):
        alone = torch.autograd.grad(F.cross_entropy(model(x[i:i + 1]), y[i:i + 1]), weights.values())
        torch.testing.assert_close([gradient[i] for gradient in mapped.values()], list(alone))


def test_2dgru_is_the_papers_two_triangular_matrices_and_every_pixel_reaches_every_other():
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
    reach = torch.autograd.functional.jacobian(gru, x).view(12, 3, 12, 3).abs().amax(dim=(1, 3))
    assert (reach > 0).all()


@each_half
@each_scan
def test_2dgru_and_model_stay_finite_under_autocast_however_large_the_input(dtype, scan):
    for network, shape, sizes in ((GRU2D(8, scan=scan), (2, 6, 7, 8), (0.0, 1e-6, 1.0, 1e3, 3e4)),
                                  (VisionGRU(5, **SMALL, scan=scan), (2, 3, 64, 64), (0.0, 1.0, 1e3))):
        for size in sizes:
            x = (size * torch.randn(shape)).clamp(-6e4, 6e4).requires_grad_()
            with torch.autocast("cpu", dtype):
                y = network(x)
            # The model normalises its input: its logits, and their gradients, do not grow with it.
            (y.float() / (1 if y.ndim == 2 else 1 + size)).mean().backward()
            assert all(t.isfinite().all() for t in [y, x.grad, *(p.grad for p in network.parameters())])


@each_half
def test_the_recurrence_accumulates_in_float32_under_autocast_and_in_half_models(dtype):
    gru, x = MinGRU(4), torch.randn(1, 50, 4)
    with torch.autocast("cpu", dtype):
        (a, b), (y, h) = gru.coefficients(x), gru(x)
    assert a.dtype == b.dtype == h.dtype == torch.float32 and y.dtype == dtype
    y, h = gru.to(dtype)(x.to(dtype))
    assert h.dtype == torch.float32 and y.dtype == dtype


# The whole model -----------------------------------------------------------------------------------------------------

def release_names(model):
    """The names that the authors' release gives to the parameters of `model`, in the same order."""
    names = "\n".join(model.state_dict())
    for ours, theirs in {"gru.left": "min_gru_1", "gru.right": "min_gru_2", "in_proj": "to_hidden_and_gate",
                         "out_proj": "to_out", "dwconv": "dw_conv", "ffn.0": "projection1", "ffn.2": "projection2",
                         "stages": "snake_gru.layers", "stem": "tokenizer", "head": "fc"}.items():
        names = names.replace(ours, theirs)
    names = re.sub(r"(layers.*)\.norm1", r"\1.norm", names)
    return re.sub(r"downsamples\.(.)\.(\w+)", lambda m: f"snake_gru.{m[2]}{int(m[1]) + 1}", names).split("\n")


def release_state(model):
    """A state dict under the release's names, each value made from its parameter's name: what the golden numbers are
    the authors' code's answer to."""
    state = {}
    for name, value in zip(release_names(model), model.state_dict().values()):
        t = torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + sum(map(ord, name))).view(value.shape)
        scale = 0.1 if value.ndim == 1 else math.sqrt(2 / value[0].numel())
        offset = 1 if value.ndim == 1 and not name.endswith("bias") else 0
        state[name] = (offset + scale * t).float()
    return state


def golden_input(batch, channels, height, width):
    i = torch.arange(batch * channels * height * width, dtype=torch.float64)
    return (torch.sin(0.013 * i) + torch.cos(0.00071 * i)).float().double().view(batch, channels, height, width)


# What the authors' code computes in float64 for `release_state` and `golden_input`: mean, standard deviation, and the
# values at eight places spread evenly over the flat result.
GOLDEN = {  # for the model, its classes (None: the four stages' maps in place of the logits) and the images' shape
    ("micro", 10, (2, 3, 64, 64)): [(-0.5298888471021985, 3.0196351280583666,
      [-0.67586685, -4.52903495, 4.07260504, -1.78723826, -0.22247772, -2.39091867, 3.86477214, -3.56821593])],
    ("tiny", 1000, (2, 3, 224, 224)): [(-0.01587227750460631, 13.256386728134858,
      [-5.20928662, 14.33675563, 15.34964491, 15.21583853, -14.04120462, -17.26901239, -16.42623919, -15.35342967])],
    ("micro", None, (1, 3, 64, 96)): [
     (-0.5574175141402794, 4.324003190871255,
      [0.28058976, 4.66954953, -3.72635808, -1.74178658, 1.29087471, -3.76566649, 7.44073194, -4.63236582]),
     (0.07394817516809009, 1.5207645505314056,
      [0.47272146, -0.65424548, 1.13986439, 0.09063206, -2.99123092, -0.62857121, 1.45286008, -0.25424899]),
     (0.025183171823039238, 2.1066113501786115,
      [-0.40703334, 1.00960823, -0.7041401, 3.41740596, -2.40441824, 4.34581302, -1.62380396, -0.59183792]),
     (0.04958580355607739, 1.413403399221964,
      [0.18470168, -0.13016827, 0.7348603, 3.5301678, 0.09837994, -0.14368315, 2.03450633, 0.22849192])],
    ("micro", None, (1, 3, 97, 130)): [
     (-0.48031192371672965, 4.191852413339776,
      [1.40295812, 5.37192554, -5.23825164, -4.34640276, 2.52739868, -2.39653152, 7.80932854, -3.19847745]),
     (0.06088725475003266, 1.573518085492458,
      [0.84024928, -2.13358507, 0.50177435, -0.15797584, -1.74140918, -0.29992642, 1.299246, 1.88847796]),
     (0.025134150230442215, 1.3713471146280665,
      [-0.27466969, 1.69453144, 0.97902019, 0.32652303, 0.70256762, 0.23794745, 1.08376165, -2.09677174]),
     (0.04534745757522718, 1.2598352212755997,
      [-1.80409974, -1.00858184, 1.37076848, -0.11614387, 1.47763797, 2.32157229, -0.42101272, 0.42585867])],
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_the_authors_weights_give_the_authors_logits_and_features(case):
    name, classes, shape = case
    model = VisionGRU(classes or 1000, **(MICRO if name == "micro" else {})).double()
    load_weights(model, release_state(model))
    images = golden_input(*shape)
    with torch.no_grad():
        results = [model(images)] if classes else model.features(images)
    assert len(results) == len(GOLDEN[case])
    for result, (mean, std, values) in zip(results, GOLDEN[case]):
        flat = result.flatten()
        at = [k * (len(flat) - 1) // 7 for k in range(8)]
        torch.testing.assert_close(flat[at], torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=1e-8)
        assert [flat.mean().item(), flat.std().item()] == pytest.approx([mean, std], rel=1e-6)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_the_named_models_have_the_papers_parameters_and_take_the_arguments_of_visiongru():
    with torch.device("meta"):
        assert parameters(visiongru_tiny()) == 30_216_952
        assert parameters(visiongru_base()) == 86_907_352
        assert 1e6 < parameters(visiongru_nano()) < 3e6
        assert parameters(VisionGRU(10, **MICRO)) == 157_778
        model = visiongru_nano(num_classes=7, drop_path=0.1, scan="log")
    assert model.num_classes == 7 and model.stages[3][0].gru.left.scan == "log"


def test_multiply_adds_of_figure_1():
    for size, giga in ((224, 4.87), (512, 25.6), (640, 40.0), (1024, 102.3), (1248, 151.9)):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model, x = visiongru_tiny(), torch.empty(1, 3, size, size)
            model(x) if size == 224 else model.features(x)
        assert counter.get_total_flops() / 2 / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (40, 56), (32, 500), (97, 64), (131, 131)])
def test_any_size_and_aspect_with_any_scan_the_same_result(height, width):
    model, x = VisionGRU(5, **SMALL), torch.randn(2, 3, height, width)
    assert [m.shape for m in model.features(x)] == [
        (2, 4 * 2**i, math.ceil(height / 2**(i + 2)), math.ceil(width / 2**(i + 2))) for i in range(4)]
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model, x = model.double(), x.double()
    for scan in ("log", "sequential"):
        other = VisionGRU(5, **SMALL, scan=scan).double()
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_float_types_are_taken_as_they_come(dtype):
    model, x = VisionGRU(5, **SMALL), torch.randn(1, 3, 32, 32)
    assert model(x.to(dtype)).dtype == torch.float32
    y = model.to(dtype)(x)
    assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("make, arguments, message", [
    (MinGRU, [dict(dim=4, scan="fast")], "expected one of 'parallel', 'log', 'sequential'"),
    (GRU2D, [dict(dim=4, scan=None)], "expected one of"),
    (MinGRU, [dict(dim=0), dict(dim=5, expansion=1.5), dict(dim=4, expansion=math.inf)], "positive whole numbers"),
    (VisionGRU, [dict(dim=7), dict(dim=-8), dict(dim=72.0)], "expected an even number"),
    (VisionGRU, [dict(depths=(2, 2)), dict(depths=(2, 2, 0, 2)), dict(depths=(2, 2, 8.0, 2))],
     "expected four whole numbers of at least 1"),
    (VisionGRU, [dict(num_classes=0), dict(mlp_ratio=0), dict(drop_path=1.0), dict(scan="quick")], "expected"),
])
def test_sizes_that_make_no_sense_are_refused_by_name(make, arguments, message):
    for given in arguments:
        name, value = list(given.items())[-1]
        with pytest.raises(ValueError, match=rf"{name} (is )?{re.escape(repr(value))}.*{message}"):
            make(**given)


@pytest.mark.parametrize("images, message", [
    (torch.zeros(3, 64, 64), r"shape \(3, 64, 64\); expected \(B, 3, H, W\)"),
    (torch.zeros(1, 64, 64, 3), r"shape \(1, 64, 64, 3\)"),
    (torch.zeros(1, 1, 64, 64), r"shape \(1, 1, 64, 64\)"),
    (torch.zeros(1, 3, 31, 64), r"shape \(1, 3, 31, 64\); expected \(B, 3, H, W\), H and W at least 32"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8; expected floating point"),
])
def test_images_that_are_none_are_refused(images, message):
    model = VisionGRU(5, **SMALL)
    for call in (model, model.features):
        with pytest.raises(ValueError, match=message):
            call(images)


def test_stochastic_depth_grows_with_depth_acts_in_training_only_and_is_off_by_default():
    model, plain, x = VisionGRU(5, **MICRO, drop_path=0.4), VisionGRU(5, **MICRO), torch.randn(4, 3, 32, 32)
    rates = [block.drop_path.p for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert not torch.equal(model(x), model(x)) and torch.equal(plain(x), plain(x))
    model.eval()
    assert torch.equal(model(x), model(x))


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
        results.append(with_gradients([y], model.parameters()))
        kept.append(sum({t.untyped_storage().data_ptr(): t.numel() for t in tensors}.values()))
    assert all(torch.equal(value, expected) for value, expected in zip(*results))
    assert kept[1] < 0.5 * kept[0]


# Export and compile --------------------------------------------------------------------------------------------------

SIDES = {2: torch.export.Dim("height", min=33, max=1024), 3: torch.export.Dim("width", min=33, max=1024)}
EXPORTED = {  # Images for the two programs. At any size the sequences have 4 to 56 elements, and 117 to 3,200.
    "any batch": [(1, 3, 32, 40), (5, 3, 32, 40)],
    "any size": [(1, 3, 33, 50), (2, 3, 40, 64), (3, 3, 97, 130), (1, 3, 256, 200)],
}


def exported(model, x, sides={}):
    """The program of torch.export for any number of images, and for any height and width if these `sides` are given."""
    dynamic = {0: torch.export.Dim("batch"), **sides}
    return torch.export.export(model.eval(), (x,), dynamic_shapes=(dynamic,), strict=False)


class Scans(torch.nn.Module):
    def forward(self, a, b, h0, scan=scan_parallel):
        return [scan(a, b, start, reverse) for start in (None, h0) for reverse in (False, True)]


def test_an_exported_scan_of_any_length_is_the_loop_over_65536_steps_too():
    h0 = torch.ones(1, 1, dtype=torch.float64)

    def slow(T):  # what a state was at one end is still felt at the other
        return 1 - torch.rand(1, T, 1, dtype=torch.float64) / T, torch.rand(1, T, 1, dtype=torch.float64), h0
    length = {1: torch.export.Dim("T", min=2, max=65_536)}
    program = torch.export.export(Scans(), slow(40), dynamic_shapes=(length, length, None), strict=False).module()
    for T in (2, 63, 64, 65, 1009, 65_536):
        inputs = slow(T)
        torch.testing.assert_close(program(*inputs), Scans()(*inputs, scan_sequential))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Two models, their programs, a folder, and the process that runs the programs' .pt2 files there. It leaves the
    logits in the folder; meanwhile there is time for ONNX."""
    folder = tmp_path_factory.mktemp("elsewhere")
    models = {name: VisionGRU(5, **SMALL) for name in EXPORTED}
    for stage in models["any size"].stages[1:3]:  # The longest and the shortest scan are enough: each takes seconds.
        stage[0].gru = torch.nn.Identity()
    programs = {"any batch": exported(models["any batch"], torch.randn(2, 3, 32, 40)),
                "any size": exported(models["any size"], torch.randn(2, 3, 40, 64), SIDES)}
    for name, program in programs.items():
        torch.export.save(program, folder / f"{name}.pt2")
    torch.save({name: [torch.randn(shape) for shape in EXPORTED[name]] for name in EXPORTED}, folder / "images.pt")
    with subprocess.Popen([sys.executable, "-c", """if True:
        import sys, torch
        sys.modules["visiongru"] = None  # to import it is an error
        models = {name: torch.export.load(f"{name}.pt2").module() for name in ("any batch", "any size")}
        images = torch.load("images.pt")
        torch.save({name: [model(x) for x in images[name]] for name, model in models.items()}, "logits.pt")
        assert "torchvision" not in sys.modules
    """], cwd=folder) as process:
        yield models, programs, folder, process
        process.kill()


def assert_runs_as_onnx(model, program, shapes, folder):
    """The ONNX file's logits differ from the model's by less than 1e-4 of their deviation."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
    pytest.importorskip("onnxscript", reason="pip install -e '.[export]'")
    torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).save(folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    for images in map(torch.randn, shapes):
        with torch.no_grad():
            expected = model(images)
        logits = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
        assert logits.shape == expected.shape and (logits - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", EXPORTED)
def test_onnxruntime_gives_the_models_logits(name, elsewhere, tmp_path):
    models, programs, *_ = elsewhere
    assert_runs_as_onnx(models[name], programs[name], EXPORTED[name], tmp_path)


def test_pt2_files_run_where_visiongru_is_unknown(elsewhere):
    models, _, folder, process = elsewhere
    assert process.wait() == 0
    images, logits = torch.load(folder / "images.pt"), torch.load(folder / "logits.pt")
    for name, model in models.items():
        torch.testing.assert_close(logits[name], [model(x) for x in images[name]])


@pytest.mark.slow
@pytest.mark.parametrize("make", [visiongru_nano, visiongru_tiny, lambda: UPerNet(visiongru_nano(), 7, 64, 32)],
                         ids=["nano", "tiny", "upernet"])
def test_onnxruntime_gives_the_logits_at_224_px(make, tmp_path):
    model = make()
    program = exported(model, torch.randn(2, 3, 224, 224))
    assert_runs_as_onnx(model, program, [(1, 3, 224, 224), (3, 3, 224, 224)], tmp_path)


@pytest.mark.slow
def test_the_readmes_lines_on_taking_it_elsewhere_run(tmp_path, monkeypatch):
    section = (HERE / "README.md").read_text().split("## Taking it elsewhere")[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(section.split("```python")[1].split("```")[0], names)
    assert names["logits"].shape == (2, 1000) and (tmp_path / "tiny.onnx").stat().st_size > 1e6
    assert names["program"].module()(torch.randn(1, 3, 97, 130)).shape == (1, 1000)


def test_the_model_compiles_as_one_graph():
    model, x = VisionGRU(5, **SMALL), torch.randn(2, 3, 32, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [with_gradients([network(x)], model.parameters()) for network in (model, compiled)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("amp, T", [(False, 36), (True, 3136)], ids=["float32", "bf16"])  # bf16 has casts to fuse too
def test_a_compiled_mingru_is_the_eager_one_in_few_kernels(amp, T):
    gru = MinGRU(4)
    x, h0 = torch.randn(2, T, 4, requires_grad=True), torch.rand(2, 8, requires_grad=True)
    results = []
    for network in (gru, torch.compile(gru, fullgraph=True, dynamic=False)):
        torch._inductor.metrics.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y, h = network(x, h0)
        forward = torch._inductor.metrics.generated_kernel_count
        loss = y.float().square().mean() + h.square().mean()
        results.append([y, h, *torch.autograd.grad(loss, [x, h0, *gru.parameters()])])
    for value, expected in zip(*results):
        scale = expected.detach().float().abs().max()
        # bf16's products and sums round to 8 bits, and not the same ones
        torch.testing.assert_close(value / scale, expected / scale, rtol=0, atol=2**-6 if amp else 1e-6)
    assert 0 < forward <= 14 and torch._inductor.metrics.generated_kernel_count <= 32


# load_weights --------------------------------------------------------------------------------------------------------

def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def state_of(model, names="ours"):
    """A copy of the state dict of `model`, under our names or the release's."""
    keys = release_names(model) if names == "release" else model.state_dict()
    return {key: value.clone() for key, value in zip(keys, model.state_dict().values())}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "vig.", "backbone.vig.", "module._orig_mod.",
                                    "_orig_mod.module.vig."])
@pytest.mark.parametrize("names", ["ours", "release"])
def test_weights_load_with_any_prefix(names, prefix, tmp_path):
    source, path = VisionGRU(5, **MICRO), tmp_path / "w.pth"
    state = {prefix + key: value for key, value in state_of(source, names).items()}
    torch.save(state, path)
    for given in (state, path, str(path)):
        model = VisionGRU(5, **MICRO)
        assert load_weights(model, given) is model and same(model, source.state_dict())


@pytest.mark.parametrize("better", ["model", "ema"])
def test_of_a_checkpoint_the_better_of_model_and_ema_is_loaded_and_of_an_averaged_model_its_state(better):
    averaged, model = torch.optim.swa_utils.AveragedModel(VisionGRU(5, **MICRO)), VisionGRU(5, **MICRO)
    states = {"model": VisionGRU(5, **MICRO).state_dict(), "ema": averaged.module.state_dict()}
    for source, expected in (({**states, "better": better, "epoch": 3}, better), (states, "ema"),
                             ({**states, "ema": None, "better": "model"}, "model"), (averaged.state_dict(), "ema")):
        assert same(load_weights(model, source), states[expected])


@pytest.mark.parametrize("names, prefix, decoder, classes", [
    ("ours", "", False, 5), ("release", "", False, 5), ("ours", "", False, 0), ("ours", "backbone.", False, 0),
    ("ours", "backbone.vig.", False, 0), ("ours", "backbone.", True, 0), ("ours", "backbone.vig.", True, 0)])
def test_a_head_of_another_class_count_or_of_none_is_left_alone_with_one_message(names, prefix, decoder, classes):
    source, model = VisionGRU(5, **MICRO), VisionGRU(7, **MICRO)
    expected = state_of(source) | {key: value for key, value in state_of(model).items() if key.startswith("head.")}
    state = {prefix + key: value for key, value in state_of(source, names).items()
             if classes or not key.startswith("head.")}
    if decoder:
        state["decode_head.conv_seg.weight"] = torch.zeros(3, 4, 1, 1)
    difference = "a classifier for 5 classes and the model one for 7" if classes else "no classifier"
    with pytest.warns(UserWarning, match=f"has {difference}: head is left at its initial values") as caught:
        load_weights(model, state)
    assert len(caught) == 1 and same(model, expected)


def test_any_other_mismatch_names_a_few_keys_of_each_kind_counts_the_rest_and_changes_nothing():
    state, model = state_of(VisionGRU(5, **MICRO)), VisionGRU(5, **MICRO)
    state["extra.weight"] = state.pop("stem.conv1.bias")
    state["stages.0.0.norm1.weight"] = torch.zeros(9)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"missing: stem.conv1.bias\n *unexpected: extra.weight\n *"
                                         r"mis-shaped: stages.0.0.norm1.weight \(9,\) instead of \(8,\)"):
        load_weights(model, state)
    assert same(model, before)
    with torch.device("meta"):
        tiny, nano = visiongru_tiny(), visiongru_nano(num_classes=7)
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more\n.*mis-shaped: .* and \d+ more") as error:
        load_weights(tiny, nano.state_dict())
    assert len(str(error.value)) < 1000


def test_files_that_hold_no_weights_are_named(tmp_path):
    model = VisionGRU(5, **MICRO)
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    torch.save(Given(), tmp_path / "pickle.pt")
    for name in ("noise.pt", "dict.pt", "pickle.pt"):
        with pytest.raises(ValueError, match=name):
            load_weights(model, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "absent.pt")


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


@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_images_of_a_step_are_the_same_for_any_number_of_processes_and_micro_batches(count, accum):
    def batches(steps, accum=1, rank=0, count=1):
        args = train.argparse.Namespace(batch_size=12, accum=accum)
        return list(train.training_batches(steps, args, train.Processes(rank, count)))
    assert batches(range(3, 6)) == [list(range(12 * step, 12 * step + 12)) for step in range(3, 6)]
    shares = [batches(range(3, 6), accum, rank, count) for rank in range(count)]
    for step in range(3):
        micro_batches = [micro for share in shares for micro in share[step * accum:(step + 1) * accum]]
        assert len(micro_batches) == accum * count and {len(micro) for micro in micro_batches} == {12 // accum // count}
        assert sorted(sum(micro_batches, [])) == list(range(36 + 12 * step, 48 + 12 * step))


def test_a_stream_has_each_image_once_in_an_epoch_and_depends_on_seed_and_position_alone():
    data = [torch.tensor(i) for i in range(5)]

    class Noisy(list):
        def __getitem__(self, index):
            return int(data[index]), torch.rand(()).item()
    stream = train.Stream(Noisy(data), seed=1)
    items = [stream[position] for position in range(15)]
    for epoch in range(3):
        assert sorted(index for index, _ in items[5 * epoch:5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert len({chance for _, chance in items}) == 15 and items[:5] != items[5:10]
    assert [stream[position] for position in reversed(range(15))] == items[::-1]
    assert [train.Stream(Noisy(data), seed=2)[position] for position in range(15)] != items


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 7, 12])
def test_validation_counts_each_image_once(length, count):
    args = train.argparse.Namespace(workers=0)
    loaders = (train.evaluation_loader(range(length), 2, args, train.Processes(rank, count)) for rank in range(count))
    assert sorted(i for loader in loaders for batch in loader for i in batch.tolist()) == list(range(length))


def test_the_recipe_is_the_papers():
    args = train.parse_arguments(["--data", "somewhere"])
    assert (args.model, args.img_size, args.val_resize, args.epochs, args.batch_size) == ("tiny", 224, 256, 300, 1024)
    assert (args.lr, args.warmup, args.weight_decay, args.betas) == (1e-3, 20, 0.05, [0.9, 0.999])
    assert (args.randaug, args.erasing, args.mixup, args.cutmix, args.smoothing) == ([2, 9], 0.25, 0.8, 1.0, 0.1)
    assert (args.ema, args.drop_path, args.crop_scale) == (0.9999, 0.0, 0.08)
    assert train.parse_arguments(["--data", "somewhere", "--batch-size", "4096"]).lr == 4e-3
    rates = [train.warmup_cosine(step, 300, 20) for step in range(301)]
    assert rates[0] == 0 and rates[10] == 0.5 and rates[20] == 1 and rates[160] == pytest.approx(0.5)
    assert rates[300] == pytest.approx(0, abs=1e-12) and rates[20:] == sorted(rates[20:], reverse=True)


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
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def heed_signals():  # which nohup, and a shell in the background, have had ignored
        for number in signal.SIGINT, signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, *launcher, HERE / name, *map(str, words)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_signals, **kw)


def history(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):
    """A run left alone, with the whole recipe: every kind of randomness is on."""
    with one_thread():
        out = tmp_path_factory.mktemp("finished") / "run"
        assert train.main(arguments(pictures, out, "--drop-path", 0.2)) == 0
        return out


@contextlib.contextmanager
def one_thread():
    """As in `script`: a sum's order of terms depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_leaves_a_log_and_checkpoints_that_tell_all_and_evaluate_to_the_same(finished, pictures, capsys):
    log, best = history(finished), train.load_checkpoint(finished / "best.pt")
    assert [entry["epoch"] for entry in log] == [1, 2] and log[0]["top5"] == 100
    assert {"loss", "lr", "top1", "top5", "ema_top1", "ema_top5", "images_per_s"} <= log[0].keys()
    assert best["settings"]["classes"] == ["ant", "bee", "cat"] and best["settings"]["model"] == "nano"
    assert best["settings"]["img_size"] == 32 and "optimizer" not in best
    better = load_weights(visiongru_nano(num_classes=3), best[best["better"]])
    assert same(load_weights(visiongru_nano(num_classes=3), finished / "best.pt"), better.state_dict())
    assert sorted(path.name for path in finished.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    assert train.main(["--eval", "--weights", f"{finished}/best.pt", "--data", str(pictures), "--device", "cpu"]) == 0
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
def test_predict_and_eval_take_bare_weights_too(wrap, pictures, tmp_path, capsys):
    torch.save(wrap(visiongru_nano(num_classes=3).state_dict()), tmp_path / "weights.pth")
    words = ["--model", "nano", "--img-size", "64", "--weights", str(tmp_path / "weights.pth"), "--device", "cpu"]
    assert train.main(["--predict", str(pictures / "val" / "ant" / "0.png"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("%  class " in line for line in lines[1:])
    assert train.main(["--eval", "--data", str(pictures), *words]) == 0
    assert "(13 images)" in capsys.readouterr().out


def test_a_run_goes_on_in_another_folder_and_precision(finished, pictures, tmp_path, capsys):
    last = train.load_checkpoint(finished / "last.pt")
    last.update(validated=6, log=last["log"][:1])  # after the last step, before the last validation
    torch.save(last, tmp_path / "last.pt")
    words = arguments(pictures, tmp_path / "to", "--drop-path", 0.2, "--resume", tmp_path / "last.pt")
    assert train.main([*words, "--amp", "fp16"]) == 0
    assert [entry["epoch"] for entry in history(tmp_path / "to")] == [1, 2]
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
        assert train.load_checkpoint(tmp_path / "run" / "last.pt")["scaler"]["scale"] > 0


def test_fine_tuning_says_once_that_the_head_is_new(pictures, tmp_path, capsys):
    torch.save(visiongru_nano(num_classes=10).state_dict(), tmp_path / "ten.pt")
    words = arguments(pictures, tmp_path / "run", "--weights", tmp_path / "ten.pt", "--epochs", 1, "--lr", 0)
    assert train.main(words) == 0
    assert capsys.readouterr().out.count("a classifier for 10 classes and the model one for 3") == 1
    trained, start = (train.load_checkpoint(path) for path in (tmp_path / "run" / "last.pt", tmp_path / "ten.pt"))
    assert all(torch.equal(trained["model"][name], start[name]) for name in start if not name.startswith("head."))


def test_a_line_per_epoch_tells_an_accelerators_memory_and_the_share_of_its_arithmetic(monkeypatch):
    class Card:
        max_memory_allocated = staticmethod(lambda: 3 * 2**29)
        get_device_name = staticmethod(lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "get_device_module", lambda device: Card)
    model = VisionGRU(5, **MICRO)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    run = train.argparse.Namespace(processes=train.Processes(count=2), model=model, dtype=torch.bfloat16, rate=1e7,
                                   settings={"img_size": 64})
    expected = 3 * counter.get_total_flops() * 1e7 / (2 * 989e12)
    assert train.accelerator_use(run) == {"GiB": 1.5, "MFU": pytest.approx(expected)}


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
    ({}, {}, "data: expected {train,val}/<class>/<images> in it: Couldn't find any class folder"),
    ({"a": 4, "b": 0}, {"a": 1, "b": 1}, "no valid file for the classes b"),
    ({"a": 9, "b": 9}, {"a": 1, "c": 1}, "different classes; in one of them only: b, c"),
    ({"a": 9, "b": 9}, {"a": 0, "b": 0}, "there are no images in val"),
])
def test_folders_that_cannot_be_trained_on(train_classes, val_classes, message, tmp_path):
    data = picture_folder(tmp_path / "data", train_classes, val_classes)
    with pytest.raises(train.UserError, match=message):
        train.main(arguments(data, tmp_path / "run"))
    shutil.rmtree(data / "train")
    with pytest.raises(train.UserError, match=r"expected \{train,val\}/<class>/<images> in it: .*data/train"):
        train.main(arguments(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_run_with_its_path(workers, tmp_path):
    data = picture_folder(tmp_path / "data", {"a": 8, "b": 8}, {"a": 1, "b": 1})
    (data / "train" / "b" / "3.png").write_bytes(b"no picture")
    with pytest.raises(train.UserError, match="^cannot read the image .*3.png: ") as error:
        train.main(arguments(data, tmp_path / "run", "--workers", workers))
    assert "Traceback" not in str(error.value)


def test_a_loss_or_weights_that_are_not_finite_end_the_run_and_leave_the_checkpoint(finished, pictures, tmp_path):
    with pytest.raises(train.UserError, match="the weights are no longer finite after step 2; .* was not written over"):
        train.main(arguments(pictures, tmp_path / "run", "--lr", 1e39, "--save-every", 1))
    saved = train.load_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["step"] == 1 and all(value.isfinite().all() for value in saved["model"].values())
    last = train.load_checkpoint(finished / "last.pt")
    last.update(validated=0)
    last["scheduler"]["last_epoch"] = 3
    last["model"]["head.bias"][0] = math.nan
    torch.save(last, tmp_path / "nan.pt")
    with pytest.raises(train.UserError, match="the loss is nan, .* at step 4 of 12, learning rate"):
        train.main(arguments(pictures, tmp_path / "new", "--drop-path", 0.2, "--resume", tmp_path / "nan.pt"))
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("more, message", [
    (("--accum", 3), "--batch-size 8: expected a multiple of 6, for 1 processes x --accum 3 x the pairs of --mixup"),
    (("--accum", 3, "--mixup", 0, "--cutmix", 0), "--batch-size 8: expected a multiple of 3, for 1 processes x"),
    (("--device", "cuda:99"), "--device cuda:99: (torch sees no cuda here|each process needs a device of its own)"),
    (("--device", "abacus"), "--device abacus: "),
    (("--img-size", 31), "--img-size: expected 32 to 16384 pixels, not '31'"),
    (("--epochs", 0), "--epochs: expected a whole number of at least 1, not '0'"),
    (("--lr", "nan"), "--lr: expected a number of at least 0, not 'nan'"),
    (("--drop-path", 1), "--drop-path: expected a number from 0 to below 1, not '1'"),
    (("--amp", "fp8"), "--amp: invalid choice: 'fp8'"),
    (("--nonsense",), "unrecognized arguments: --nonsense"),
    (("--eval", "--weights", "x"), "does nothing with --eval"),
    (("--weights", "absent.pt"), "cannot open the checkpoint absent.pt: No such file"),
    (("--resume", "absent.pt"), "cannot open the checkpoint absent.pt: No such file"),
])
def test_arguments_that_make_no_sense_are_refused(more, message, pictures, tmp_path):
    with pytest.raises(train.UserError, match=message):
        train.main(arguments(pictures, tmp_path / "run", *more))


def test_nothing_is_begun_over_an_earlier_run_or_what_is_left_of_one(finished, pictures, tmp_path):
    before = (finished / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(before)
    for resume in (), ("--resume", tmp_path / "last.pt"):
        with pytest.raises(train.UserError, match="--resume auto goes on from its last.pt, another --out begins a new"):
            train.main(arguments(pictures, finished, "--drop-path", 0.2, *resume))
    assert (finished / "last.pt").read_bytes() == before
    for name in "best.pt", "log.jsonl":
        out = tmp_path / name / "run"
        out.mkdir(parents=True)
        (out / name).write_text("dear")
        for resume in (), ("--resume", "auto"):
            with pytest.raises(train.UserError, match=f"{name} is there from an earlier run: .* another --out begins"):
                train.main(arguments(pictures, out, *resume))
        assert (out / name).read_text() == "dear" and len(list(out.iterdir())) == 1


def test_resuming_with_another_recipe_or_other_data_is_refused(finished, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(train.MODELS, "tiny", visiongru_nano)  # which is made sooner
    def folder(name, *classes):
        return picture_folder(tmp_path / name, {label: 9 for label in classes}, {label: 1 for label in classes})
    recipe = ("--drop-path", 0.2, "--resume", "auto")
    for more, message in ((("--model", "tiny"), "model was nano and is now tiny"), (("--seed", 3), "seed was 0 and is"),
                          (("--batch-size", 4), "batch-size was 8 and is now 4"), (("--lr", 1), "lr was 0.001 and is"),
                          (("--ema", 0.5), "ema was 0.9 and is now 0.5")):
        with pytest.raises(train.UserError, match=f"{message}.*; go on as before, or begin a new run with --weights"):
            train.main(arguments(pictures, finished, *recipe, *more))
    with pytest.raises(train.UserError, match="weights only; resume a last.pt, or start from --weights"):
        train.main(arguments(pictures, tmp_path / "new", "--resume", finished / "best.pt"))
    for data, message in ((folder("fewer", "ant", "bee"), "trained on 3 classes and the data has 2"),
                          (folder("others", "ant", "bee", "cow"), "'cat' where it has 'cow'")):
        with pytest.raises(train.UserError, match=message):
            train.main(arguments(data, finished, *recipe))
        with pytest.raises(train.UserError, match=message):
            train.main(["--eval", "--weights", str(finished / "best.pt"), "--data", str(data), "--device", "cpu"])
    with pytest.raises(train.UserError, match="train-images was 51 and is now 27"):
        train.main(arguments(folder("same", "ant", "bee", "cat"), finished, *recipe))


def test_checkpoints_that_are_none_are_named(tmp_path, pictures):
    torch.save({"state_dict": {}, "history": Given()}, tmp_path / "objects.pth")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    torch.save(visiongru_nano(num_classes=3, dim=16).state_dict(), tmp_path / "narrow.pt")
    torch.save({"model": {"a": torch.ones(1)}, "settings": {"model": "base"}}, tmp_path / "no-classifier.pt")
    for name, message in (("objects.pth", "holds Python objects beside the tensors.*keep the tensors alone"),
                          ("noise.pt", "noise.pt is not a checkpoint, or a damaged one"),
                          ("no-classifier.pt", "no-classifier.pt has no classifier"),
                          ("narrow.pt", "narrow.pt does not fit this VisionGRU(.|\n)*mis-shaped")):
        with pytest.raises(train.UserError, match=message):
            train.main(["--predict", "x.png", "--model", "nano", "--weights", str(tmp_path / name), "--device", "cpu"])
    with pytest.raises(train.UserError, match="need a checkpoint: --weights FILE"):
        train.main(["--eval", "--device", "cpu"])
    with pytest.raises(train.UserError, match="narrow.pt does not fit this VisionGRU(.|\n)*mis-shaped"):
        train.main(arguments(pictures, tmp_path / "run", "--weights", tmp_path / "narrow.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# UPerNet
# ---------------------------------------------------------------------------------------------------------------------

def micro_upernet(num_classes=5):
    return UPerNet(VisionGRU(7, **MICRO), num_classes, channels=8, aux_channels=4)


def test_parameter_counts_of_upernet():
    model = UPerNet(visiongru_tiny(), 150)
    counts = [parameters(part) for part in (model, model.decode_head, model.auxiliary_head)]
    assert counts == [60_475_964, 30_133_398, 702_614]


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (97, 64), (131, 200)])
def test_upernet_gives_each_pixel_its_logits_at_any_size(height, width):
    model, x = micro_upernet(), torch.randn(2, 3, height, width)
    outputs = model(x)
    assert [y.shape for y in outputs] == 2 * [(2, 5, height, width)]
    sum(y.square().sum() for y in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert model(x).shape == (2, 5, height, width) and torch.equal(model(x), model(x))


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
    torch.testing.assert_close(head([m1, m2, m3, m4]), head.conv_seg(head.fpn_bottleneck(torch.cat(finest, 1))))


@pytest.mark.parametrize("sizes, message", [
    ((0,), "num_classes is 0"), ((2, 1.5), "channels is 1.5"), ((2, 8, -1), "aux_channels is -1")])
def test_upernet_refuses_sizes_that_make_no_sense(sizes, message):
    with pytest.raises(ValueError, match=message):
        UPerNet(VisionGRU(5, **MICRO), *sizes)


def test_weights_pass_between_classifiers_and_segmentation_models_of_other_classes_too():
    classifier, segmenter = VisionGRU(9, **MICRO), micro_upernet(5)
    assert same(load_weights(micro_upernet().backbone, classifier.state_dict()), classifier.state_dict())
    with pytest.raises(ValueError, match=r"no decoder; to start from its backbone: load_weights\(model.backbone"):
        load_weights(segmenter, classifier.state_dict())
    for model, count, message in ((classifier, 1, "no classifier: head is left at its initial values"),
                                  (micro_upernet(3), 2, "5 classes and the model one for 3")):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.warns(UserWarning, match=message) as caught:
            load_weights(model, segmenter.state_dict())
        assert len(caught) == count
        source = segmenter if isinstance(model, UPerNet) else segmenter.backbone
        new = {key: before[key] for key in before if re.search(r"\bconv_seg\.|^head\.", key)}
        assert same(model, source.state_dict() | new)


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
    assert {label for i in range(60) for label in data[i][1].unique().tolist()} == set(range(len(data.classes)))


def write_labelled(root, split, name, rows, image=None, mode=None):
    """An image NAME.jpg and its label map NAME.png, of these rows -> the paths of the two."""
    rows = torch.as_tensor(rows)
    labels = Image.fromarray(rows.to(torch.uint16 if rows.max() > 255 else torch.uint8).numpy()).convert(mode)
    paths = root / "images" / split / f"{name}.jpg", root / "annotations" / split / f"{name}.png"
    for path, file in zip(paths, (image or Image.new("RGB", labels.size), labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        file.save(path, quality=95)
    return paths


def assert_read(read, expected, root, words):
    """read(the data set in `root`) is `expected`, or if that is a str ends in an error with these words."""
    args = segment.parse_arguments(["--data", str(root), *words.split()])
    with pytest.raises(train.UserError, match=expected) if isinstance(expected, str) else contextlib.nullcontext():
        assert read(*segment.open_data(args, ["training"])) == expected


ROWS, FROM_1 = [[0, 1, 2, 3], [3, 2, 1, 255]], [[255, 0, 1, 2], [2, 1, 0, 255]]


@pytest.mark.parametrize("rows, mode, words, expected", [
    (ROWS, None, "--num-classes 3", FROM_1),                   # ADE20K: 0 is other, the rest move down
    (ROWS, "P", "--num-classes 3", FROM_1),                    # a palette's numbers, not its colours
    (ROWS, None, "--num-classes 4 --no-zero-is-ignore", ROWS),  # counted from 0
    ([[0, 2, 3]], None, "--num-classes 3 --no-zero-is-ignore --ignore-label 3", [[0, 2, 255]]),
    (ROWS, None, "--num-classes 2", "a.png has a pixel of label 3; expected 1 to 2, or 0 or 255 to ignore it"),
    (ROWS, None, "--num-classes 3 --no-zero-is-ignore", "a.png has .* label 3; expected 0 to 2, or 255 to ignore it"),
    ([[7, 300]], None, "--num-classes 150", "a.png has a pixel of label 300; expected 1 to 150"),
    (ROWS, "RGB", "--num-classes 3", "cannot read the label map .*a.png: it has the channels .*; expected one")])
def test_labels_are_read_by_the_rule_asked_for(rows, mode, words, expected, tmp_path):
    write_labelled(tmp_path, "training", "a", rows, mode=mode)
    assert_read(lambda data: data[0][1].tolist(), expected, tmp_path, words)


@pytest.mark.parametrize("damage, message", [
    (lambda image, labels: shutil.rmtree(image.parent), "in it.*No such file or directory: '.*images/training'"),
    (lambda image, labels: image.unlink(), "images/training has no images in it"),
    (lambda image, labels: labels.rename(labels.with_suffix(".jpg")),  # in which labels would be blurred
     "a.jpg has no label map a.png in .*annotations/training$"),
    (lambda image, labels: labels.write_bytes(b"no picture"), "cannot read the label map .*a.png"),
    (lambda image, labels: Image.new("L", (5, 2)).save(image), "a.png is 4 x 2 pixels and its image .*a.jpg 5 x 2")])
def test_every_other_fault_of_the_data_is_named_too(damage, message, tmp_path):
    damage(*write_labelled(tmp_path, "training", "a", ROWS))
    assert_read(lambda data: data[0], message, tmp_path, "--num-classes 3")


ADE20K = b"Idx\tRatio\tTrain\tVal\tName\n1\t0.16\t9\t1\twall\n2\t0.11\t8\t1\tbuilding, edifice\n"


@pytest.mark.parametrize("files, words, expected", [
    ({}, "", "how many classes are there"),
    ({}, "--num-classes 2", ["label 1", "label 2"]),
    ({}, "--num-classes 2 --no-zero-is-ignore", ["label 0", "label 1"]),
    ({"objectInfo150.txt": ADE20K}, "", ["wall", "building, edifice"]),
    ({"objectInfo150.txt": ADE20K, "classes.txt": b"sky\nroad\n\ncar\n"}, "", ["sky", "road", "car"]),
    ({"classes.txt": b"a\nb\nc"}, "--num-classes 2", "classes.txt has 3 names, 3 of them different; expected 2,"),
    ({"classes.txt": b"sky\nsky\n"}, "", "classes.txt has 2 names, 1 of them different; expected 1 to 254, all"),
    ({"classes.txt": "\ufeffciel\n\u00e9tang\n".encode()}, "", ["ciel", "\u00e9tang"]),  # by Windows' editor
    ({"classes.txt": b"sky\xff"}, "", "--data .*: expected .* text in UTF-8: 'utf-8' codec can't decode")])
def test_class_names_come_from_the_folder_or_are_counted(files, words, expected, tmp_path):
    write_labelled(tmp_path, "training", "a", ROWS)
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    assert_read(lambda data: data.classes, expected, tmp_path, words)


def cropping(*more):
    return segment.TrainTransform(segment.parse_arguments([
        "--data", "x", "--crop-size", "32", "--scale", "1", "1", "--distort", "0", *map(str, more)]))


def picture(mask, factor):
    return v2.functional.to_pil_image(mask[None].expand(3, -1, -1) * factor)


def test_of_ten_crops_the_first_without_a_class_of_more_than_75_percent_is_taken_and_flipped_with_its_mask():
    transform, tries, fits = cropping("--flip", 1), [], []
    transform.crop.register_forward_hook(lambda *_: tries.append(1))
    mask = torch.zeros(32, 120, dtype=torch.uint8)
    mask[:, 100:] = 1  # a crop must begin at 76 or further right to have at least a quarter of each
    for _ in range(60):
        tries.clear()
        x, y = transform(picture(mask, 200), mask)
        assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and y.shape == (32, 32)
        assert torch.equal(x[0] > 0, y == 1) and y[0, 0] >= y[0, -1]  # cut alike, and both flipped
        fits.append(0.25 <= (y == 1).float().mean() <= 0.75)
        assert fits[-1] or len(tries) == 10
    assert sum(fits) > 30  # by chance alone it were 9
    halves = torch.full((32, 32), 255, dtype=torch.uint8)
    halves[:2], halves[2:4] = 0, 1
    for special, expected in ((mask * 0 + 255, 10), (mask * 0, 10), (halves, 1)):  # what is ignored does not count
        tries.clear()
        x, y = transform(picture(special, 1), special)
        assert y.unique().tolist() == special.unique().tolist() and len(tries) == expected


def test_small_images_are_filled_up_with_ignore_and_scales_keep_masks_whole_numbers():
    mask = torch.arange(4, dtype=torch.uint8).repeat_interleave(5).expand(20, 20).contiguous()
    transform = cropping("--short-side", 32, "--scale", 1, 0.5, "--distort", 1)
    for x, y in (transform(picture(mask, 60), mask) for _ in range(20)):
        assert x.shape == (3, 32, 32) and set(y.unique().tolist()) <= {0, 1, 2, 3, 255}
        assert type(x) is type(y) is torch.Tensor
    x, y = segment.eval_transform(40)(picture(mask, 60), mask)
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
    """Reads the class of a pixel from its red channel."""

    num_classes = 4

    def forward(self, x):
        return F.one_hot(x[:, 0].round().long().clamp(0, 3), 4).permute(0, 3, 1, 2).float()


def test_evaluation_counts_each_known_pixel_once_at_the_label_maps_size_with_the_argmax_of_the_enlarged_logits():
    mask = torch.randint(0, 4, (1, 37, 50), dtype=torch.uint8)
    image = mask.float().expand(1, 3, -1, -1).clone()
    image[..., 0, :10] = (image[..., 0, :10] + 1) % 4  # ten mistakes
    mask[:, 1] = 255
    confusion = segment.evaluate(Oracle(), [(image, mask)] * 2, train.Processes())
    assert confusion.sum() == 2 * 36 * 50 and confusion.sum() - confusion.diag().sum() == 20
    large = mask.repeat_interleave(3, 1).repeat_interleave(3, 2)  # a label map of thrice the image's size
    assert segment.evaluate(Oracle(), [(image, large)], train.Processes()).sum() == 9 * 36 * 50
    with pytest.raises(train.UserError, match="no pixel with a label"):
        segment.evaluate(Oracle(), [(image, mask * 0 + 255)], train.Processes())
    logits = torch.randn(7, 9, 11)
    enlarged = F.interpolate(logits[None], (40, 31), mode="bilinear")[0]
    assert torch.equal(segment.label_map(logits, (40, 31)), enlarged.argmax(0))


def test_windows_cover_every_pixel_and_their_logits_are_averaged():
    for height, width in ((10, 40), (64, 64), (65, 97), (150, 33)):
        image = torch.randint(0, 4, (1, 3, height, width)).float()
        for window in (0, 32, 64):
            assert torch.equal(segment.class_logits(Oracle(), image, window), Oracle()(image)[0])
    model, seen = Oracle(), []
    model.register_forward_hook(lambda _, inputs, y: seen.append(inputs[0].shape) or torch.full_like(y, len(seen)))
    logits = segment.class_logits(model, torch.zeros(1, 3, 32, 53), window=32)
    assert seen == [(1, 3, 32, 32)] * 2  # columns 0-31 and 21-52: a third of each in both
    assert logits[0, 0].tolist() == [1] * 21 + [1.5] * 11 + [2] * 21


def test_the_segmentation_recipe_is_the_papers():
    args = vars(segment.parse_arguments(["--data", "ade"]))
    assert args == args | dict(model="tiny", channels=512, aux_channels=256, iters=160_000, batch_size=16, lr=6e-5,
                               weight_decay=0.01, warmup=1500, crop_size=512, short_side=512, scale=[0.5, 2.0],
                               zero_is_ignore=True, ignore_label=255)
    lr = [segment.warmup_linear(step, 160_000, 1500) for step in (0, 750, 1500, 80_750, 160_000)]
    assert lr == pytest.approx([1e-6, 0.5, 1, 0.5, 0], abs=1e-6)
    model = micro_upernet()
    decayed, free = ({id(p): group["weight_decay"] for p in group["params"]}
                     for group in segment.parameter_groups(model, 0.01))
    norms = {id(p) for module in model.modules() for p in module.parameters()
             if type(module).__name__ in ("LayerNorm", "BatchNorm2d")}
    assert free == dict.fromkeys(norms, 0) and len(norms) == 2 * (2 * 5 + 2 + 3 + 12 + 1)
    assert decayed == dict.fromkeys({id(p) for p in model.parameters()} - norms, 0.01)


def test_the_loss_is_a_mean_over_all_pixels_and_none_of_a_crop_without_labels():
    logits, masks = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 4, 4))
    masks[0] = 255
    by_hand = -logits.log_softmax(1).gather(1, masks.clamp(max=2)[:, None])[1].sum() / 32
    torch.testing.assert_close(segment.segmentation_loss((logits, logits), masks), 1.4 * by_hand)
    nothing = segment.segmentation_loss((logits, logits), torch.full_like(masks, 255))
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().max() == 0


def test_the_scripts_compile_parts_of_one_shape_once_and_validate_without(monkeypatch, capsys):
    def compile_part(part, **kw):  # autograd's part of it takes time; for all but the heads it is tested elsewhere
        return plain(part, backend="aot_eager" if "Head" in type(part).__name__ else "eager", **kw)
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_part)
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    stats.clear()
    eager, compiled = (UPerNet(VisionGRU(5, 8, (2, 2, 2, 2)), 4, 8, 8) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    train.compile_parts(compiled, print)
    assert "14 parts" in capsys.readouterr().out
    x, results = torch.randn(2, 3, 64, 64), []
    for model in (eager, compiled):
        torch.manual_seed(1)  # the decoder's dropout
        logits, auxiliary = model(x)
        results.append([logits, *torch.autograd.grad((logits + auxiliary).square().mean(), list(model.parameters()))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert stats["unique_graphs"] == 10  # a stem, a block for each stage, three downsamplings, two heads
    loader = [(torch.randn(1, 3, 40, 72), torch.zeros(1, 40, 72, dtype=torch.uint8))]
    segment.evaluate(compiled, loader, train.Processes())
    assert stats["unique_graphs"] == 10


# ---------------------------------------------------------------------------------------------------------------------
# segment.py: whole runs, on pictures of three colours side by side
# ---------------------------------------------------------------------------------------------------------------------

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


def seg_arguments(data, out, *more):
    return [str(word) for word in (
        "--data", data, "--out", out, "--model", "nano", "--channels", 16, "--aux-channels", 8, "--crop-size", 32,
        "--short-side", 40, "--iters", 6, "--eval-every", 3, "--warmup", 2, "--batch-size", 4, "--lr", 1e-3,
        "--device", "cpu", "--workers", 0, *more)]


@pytest.fixture(scope="session")
def segmented(streets, tmp_path_factory):
    """A run left alone, with the whole recipe: every kind of randomness is on."""
    with one_thread():
        out = tmp_path_factory.mktemp("segmented") / "run"
        assert segment.main(seg_arguments(streets, out, "--drop-path", 0.2)) == 0
        return out


def test_a_segmentation_run_leaves_a_log_and_checkpoints_that_tell_all(segmented, streets, capsys):
    log, best = history(segmented), train.load_checkpoint(segmented / "best.pt")
    assert [entry["step"] for entry in log] == [3, 6]
    assert {"loss", "lr", "miou", "mean_acc", "pixel_acc", "images_per_s"} <= log[0].keys()
    assert list(log[0]["iou"]) == list(log[0]["acc"]) == best["settings"]["classes"] == ["red", "green", "blue"]
    assert best["best"] == max(entry["miou"] for entry in log) and "optimizer" not in best
    assert sorted(path.name for path in segmented.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    words = ["--eval", "--weights", str(segmented / "best.pt"), "--data", str(streets), "--device", "cpu"]
    assert segment.main(words) == 0 and f"mIoU {best['best']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("more, first", [((), 1), (("--no-zero-is-ignore",), 0)])
def test_a_run_ends_with_a_command_that_works_as_printed(more, first, streets, tmp_path, capsys):
    data, out = shutil.copytree(streets, tmp_path / "data"), tmp_path / "run"
    (data / "classes.txt").unlink()
    assert segment.main(seg_arguments(data, out, "--iters", 1, "--num-classes", 5, "--slide", *more)) == 0
    printed, best = capsys.readouterr().out, train.load_checkpoint(out / "best.pt")["best"]
    assert f"has mIoU {best:.2f}" in printed
    assert ("the last label, 5; if labels count from 0" in printed) == (first == 1)  # for none has that label
    words = [*printed.splitlines()[-1].split()[2:], "--device", "cpu"]
    assert words[0] == "--eval" and words[-3] == "--slide" and segment.main(words) == 0
    evaluated = capsys.readouterr().out
    assert f"mIoU {best:.2f}" in evaluated and f"label {first + 4}" in evaluated
    (data / "classes.txt").write_text("red\ngreen\nblue\nblack\nwhite\n")
    with pytest.raises(train.UserError, match=f"best.pt was trained on .*'label {first}' where it has 'red'"):
        segment.main(words)


def test_two_processes_train_and_validate_an_odd_number_of_images_as_one_does(streets, tmp_path, capsys):
    out, halves = tmp_path / "run", []
    words = seg_arguments(streets, out, "--batch-size", 8, "--accum", 2, "--slide", "--lr", 0.01)
    process = script(*words, name="segment.py", launcher=torchrun("--standalone", "--nproc_per_node=2"))
    printed, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert printed.count("step      3/6") == 1 and train.load_checkpoint(out / "last.pt")["step"] == 6
    words = ["--eval", "--slide", "--weights", str(out / "last.pt"), "--data", str(streets), "--device", "cpu"]
    assert segment.main(words) == 0
    by_one = capsys.readouterr().out
    assert f"{segment.summary(history(out)[-1])} (5 images)" in by_one and "red" in by_one

    class Half(train.Processes):
        def sum(self, numbers, stop=None):
            halves.append(numbers)
            return [sum(pair) for pair in zip(*halves)]
    for rank in (1, 0):
        segment.evaluate_checkpoint(segment.parse_arguments(words), Half(rank, 2))
    assert capsys.readouterr().out == by_one


def test_segmentation_learns(streets, tmp_path, monkeypatch):
    monkeypatch.setitem(train.MODELS, "nano", lambda **kw: VisionGRU(dim=8, depths=(1, 1, 1, 1), **kw))
    words = seg_arguments(streets, tmp_path / "run", "--iters", 80, "--eval-every", 80, "--distort", 0, "--accum", 2,
                          "--save-every", 7, "--lr", 2e-3, "--batch-size", 8)
    assert segment.main(words) == 0
    assert history(tmp_path / "run")[-1]["miou"] > 80


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_segmentation_trains_in_mixed_precision_from_a_classifiers_weights(amp, finished, streets, tmp_path):
    more = "--amp", amp, "--iters", 1, "--lr", 0, "--backbone-weights", finished / "best.pt"
    assert segment.main(seg_arguments(streets, tmp_path / "run", *more)) == 0
    trained = train.load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    classifier = load_weights(visiongru_nano(num_classes=3), finished / "best.pt")
    classifier.head = torch.nn.Identity()
    assert same(classifier, {name.removeprefix("backbone."): value for name, value in trained.items()})


def test_pictures_of_any_size_become_label_maps_and_overlays_whatever_else_cannot_be_read(segmented, tmp_path, capsys):
    sizes = {"thin": (900, 1), "wide": (300, 8), "tiny": (1, 1), "photo": (131, 97), "grey": (50, 60)}
    for name, size in sizes.items():
        Image.new("L" if name == "grey" else "RGB", size, 120).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for names, more, status in (sizes, [], 0), (["bad", *sizes], ["--slide"], 2):
        out, images = tmp_path / str(status), [str(tmp_path / f"{name}.png") for name in names]
        words = ["--weights", str(segmented / "best.pt"), "--device", "cpu", "--out", str(out), *more]
        assert segment.main(["--predict", *images, *words]) == status
        printed, err = capsys.readouterr()
        assert "5 label maps" in printed and (f"cannot read the image {tmp_path}/bad.png: " in err) == (status == 2)
        for name, size in sizes.items():
            with Image.open(out / f"{name}_labels.png") as labels, Image.open(out / f"{name}_overlay.png") as page:
                assert labels.mode == "P" and labels.size == size and labels.getpalette()[:3] == [0, 0, 0]
                assert {label for _, label in labels.getcolors()} <= {1, 2, 3}  # as in the training masks
                assert page.width >= size[0] and page.height > size[1] and page.mode == "RGB"


def test_an_overlay_shows_the_picture_under_its_colours_and_a_legend_of_the_classes_that_occur():
    labels = Image.new("P", (200, 100), 1)
    labels.paste(3, (0, 50, 200, 100))
    labels.putpalette(segment.palette(True))
    colours = [tuple(colour) for colour in torch.tensor(segment.palette(True)).view(-1, 3).tolist()]
    page = segment.overlay(Image.new("RGB", (200, 100), (100, 200, 50)), labels, {1: "road", 2: "sky", 3: "a car"})
    for y, label in ((10, 1), (90, 3)):
        half = [(p + c) / 2 for p, c in zip((100, 200, 50), colours[label])]
        assert page.getpixel((5, y)) == pytest.approx(half, abs=1)
    legend = {colour for _, colour in page.crop((0, 100, *page.size)).getcolors(10**6)}
    assert {colours[1], colours[3]} <= legend and colours[2] not in legend and len(set(colours)) > 151


@pytest.mark.parametrize("more, message", [
    ("--crop-size 31", "--crop-size: expected 32 to 16384 pixels, not '31'"),
    ("--scale 0 1", "--scale: expected a number above 0, at most 16, not '0'"),
    ("--iters 0", "--iters: expected a whole number of at least 1, not '0'"),
    ("--num-classes 255", "--num-classes: expected 1 to 254 classes, not '255'"),
    ("--distort 3", "--distort: expected a number from 0 to 2, not '3'"),
    ("--batch-size 4 --accum 4", "--batch-size 4: a micro-batch would be one image, and BatchNorm needs two"),
    ("--batch-size 4 --accum 3", "--batch-size 4: expected a multiple of 3"),
    ("--weights a --backbone-weights b", "--weights and --backbone-weights: give one of the two"),
    ("--backbone-weights absent.pt", "cannot open the checkpoint absent.pt"),
    ("--weights {finished}/best.pt", "best.pt has no decoder; to start from its backbone: --backbone-weights"),
    ("--resume {finished}/last.pt", "last.pt was trained on other classes than the data's: 'ant' where it has 'red'"),
    ("--resume {segmented}/last.pt --channels 8", "last.pt: channels was 16 and is now 8; go on as before, or begin"),
    ("--resume {segmented}/last.pt --no-zero-is-ignore", "last.pt: zero-is-ignore was True and is now False"),
    ("--resume {segmented}/last.pt --ignore-label 9", "last.pt: ignore-label was 255 and is now 9"),
    ("--resume {segmented}/last.pt --batch-size 2", "last.pt: batch-size was 4 and is now 2"),
    ("--predict x.png --weights {finished}/best.pt", "best.pt has no decode_head.conv_seg.weight; expected a check"),
    ("--predict a/1.jpg b/1.jpg --weights {segmented}/best.pt", "a/1.jpg and b/1.jpg would be written to the same"),
])
def test_segmentation_does_not_begin_with_what_makes_no_sense(more, message, finished, segmented, streets, tmp_path):
    words = more.format(finished=finished, segmented=segmented).split()
    with pytest.raises(train.UserError, match=message):
        segment.main(words if "--predict" in words else seg_arguments(streets, tmp_path / "run", *words))


@pytest.mark.parametrize("words", [["--num-classes", "3"], ["--zero-is-ignore"], ["--ignore-label", "0"]])
def test_how_labels_are_read_is_not_asked_for_without_data(words):
    with pytest.raises(train.UserError, match=words[0]):
        segment.parse_arguments(words)


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot be lost: crashes and signals
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def either(request, pictures, streets, finished, segmented):
    """By the parameter "train" or "segment": the module, its arguments for a short run, and that run left alone."""
    if request.param == "train":
        return train, lambda out, *more: arguments(pictures, out, "--drop-path", 0.2, *more), finished
    return segment, lambda out, *more: seg_arguments(streets, out, "--drop-path", 0.2, *more), segmented


both_scripts = pytest.mark.parametrize("either", ["train", "segment"], indirect=True)


def kill(process, out, moment):
    """SIGKILL, at "start", as soon as the process says something; after so many more checkpoints; or, "writing", in the
    midst of writing the next one."""
    def written():
        return (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0
    assert process.stdout.readline(), process.communicate()
    for _ in range(moment if isinstance(moment, int) else 0):
        last = written()
        wait_for(lambda: written() != last, process)
    if moment == "writing":
        os.mkfifo(out / "last.pt.tmp")  # what is written there waits until somebody reads it
        reader = os.open(out / "last.pt.tmp", os.O_RDONLY | os.O_NONBLOCK)

        def bytes_of_a_checkpoint():
            with contextlib.suppress(BlockingIOError):
                return os.read(reader, 1000)
        wait_for(bytes_of_a_checkpoint, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def crash(name, words, out, moments):
    """Start the script, kill it, resume it, kill it, ...; then let it end. From the first checkpoint on there is one
    that can be loaded, and it never goes back."""
    steps = 0
    for moment in moments:
        kill(script(*words, "--resume", "auto", name=name), out, moment)
        if steps or (out / "last.pt").exists():
            before, steps = steps, train.load_checkpoint(out / "last.pt")["step"]
            assert steps >= before
    with one_thread():
        assert {"train.py": train, "segment.py": segment}[name].main([*map(str, words), "--resume", "auto"]) == 0


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"out", "resume", "save_every", "workers", "images_per_s", "seconds"}:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_end(out, alone):
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    for name in "last.pt", "best.pt":
        assert_same(*(train.load_checkpoint(folder / name) for folder in (out, alone)))
    assert_same(history(out), history(alone))


@pytest.mark.parametrize("either, moments", [("train", ["start", 2, "writing"]), ("segment", [1])],
                         indirect=["either"])
def test_a_run_killed_anywhere_ends_with_the_same_bits(either, moments, tmp_path):
    module, words, alone = either
    out = tmp_path / "run"
    crash(f"{module.__name__}.py", words(out, "--save-every", 1, "--workers", 1), out, moments)
    assert_same_end(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name, words", [
    ("train.py", ("--epochs", 1, "--batch-size", 200, "--save-every", 1, "--workers", 1)),
    ("segment.py", ("--iters", 80, "--eval-every", 40, "--warmup", 10, "--batch-size", 8, "--save-every", 1)),
])
def test_twenty_kills_on_the_built_in_set(name, words, tmp_path):
    words = ["--device", "cpu", *words]
    _, err = (process := script(*words, "--out", tmp_path / "alone", name=name)).communicate()
    assert process.returncode == 0, err
    chance = random.Random(1)
    moments = ["writing" if i % 3 == 0 else chance.choice(["start", 1, 2, 3, 4]) for i in range(20)]
    crash(name, [*words, "--out", tmp_path / "run"], tmp_path / "run", moments)
    assert_same_end(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("either, number", [("train", signal.SIGTERM), ("train", signal.SIGINT),
                                            ("segment", signal.SIGHUP)], indirect=["either"])
def test_a_run_that_is_told_to_stop_finishes_its_step_and_loses_none(either, number, tmp_path, capsys):
    module, words, alone = either
    out, words = tmp_path / "run", words(tmp_path / "run", "--save-every", 1, "--workers", 2)
    process = script(*words, name=f"{module.__name__}.py")
    wait_for((out / "last.pt").exists, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 128 + number, stderr
    assert "stopped by a signal, and saved: the same command with --resume auto goes on" in stdout
    assert "stopping after this step; once more stops at once" in stderr and "Traceback" not in stderr
    stopped = train.load_checkpoint(out / "last.pt")["step"]
    with one_thread():
        assert module.main([*words, "--resume", "auto"]) == 0
    assert f"resumed at step {stopped}\n" in capsys.readouterr().out
    assert_same_end(out, alone)


@both_scripts
def test_a_signal_during_validation_ends_it_and_a_resumed_run_begins_with_it(either, tmp_path, monkeypatch):
    module, words, alone = either
    plain, seen = module.eval_transform, []

    def told(*args, **kw):
        transform = plain(*args, **kw)
        return lambda *item: (seen.append(1), signal.raise_signal(signal.SIGTERM), transform(*item))[2]
    monkeypatch.setattr(module, "eval_transform", told)
    monkeypatch.setattr(train.os, "_exit", lambda status: None)  # the signal comes again for each image of a batch
    with one_thread():
        assert module.main(words(tmp_path / "run")) == 128 + signal.SIGTERM
        assert len(seen) <= 8 and not (tmp_path / "run" / "log.jsonl").exists()
        monkeypatch.setattr(module, "eval_transform", plain)
        assert module.main(words(tmp_path / "run", "--resume", "auto")) == 0
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
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    assert train.main(arguments(pictures, tmp_path / "run", "--epochs", 1)) == 0
    told = re.findall(r"^step (\d) of 6: loss \d\.\d+, lr .* images/s$", capsys.readouterr().out, re.MULTILINE)
    assert 1 < len(told) < 6 and told == sorted(set(told))


def test_only_what_the_user_can_put_right_is_told_without_a_traceback():
    assert train.explained(train.UserError("such and such")) == "such and such"
    assert "out of memory?" in train.explained(RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed."))
    assert train.explained(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback ...")) is None
    assert train.explained(BrokenPipeError(32, "Broken pipe")) is None


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_loader_that_is_killed_ends_the_run_with_an_error_that_says_so(pictures, tmp_path):
    process = script(*arguments(pictures, tmp_path / "run", "--workers", 1, "--save-every", 1, "--epochs", 999))
    wait_for((tmp_path / "run" / "last.pt").exists, process)
    for loader in children(process):
        os.kill(loader, signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "out of memory? A larger --accum" in err, err
    train.load_checkpoint(tmp_path / "run" / "last.pt")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_interrupt_stops_at_once(workers, tmp_path):
    data = picture_folder(tmp_path / "data", {"a": 8, "b": 8}, {"a": 1, "b": 1})
    (data / "train" / "b" / "3.png").unlink()
    os.mkfifo(data / "train" / "b" / "3.png")  # who reads it waits for ever: the step never ends
    process = script(*arguments(data, tmp_path / "run", "--workers", workers))

    def writer():
        with contextlib.suppress(OSError):  # nobody reads it yet
            return os.open(data / "train" / "b" / "3.png", os.O_WRONLY | os.O_NONBLOCK)
    writer = wait_for(writer, process)
    reader, = [process.pid] if workers == 0 else children(process)
    wait_for(lambda: "pipe" in Path(f"/proc/{reader}/wchan").read_text(), process)
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
    for child in children(launcher):
        with contextlib.suppress(OSError):  # it has just ended
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return child


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
    for rank in (1, 0):
        pids, before = wait_for(living, process), saved()
        wait_for(lambda: saved() != before, process)
        steps.append(train.load_checkpoint(out / "last.pt")["step"])
        os.kill(pids[rank], signal.SIGKILL)
        dead |= {*pids}
    stdout, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert stdout.count("resumed at step") == 2 and steps == sorted(set(steps))
    assert_same_end(out, pair)


def test_an_error_that_all_processes_meet_is_told_once(tmp_path):
    process = script("--data", tmp_path / "absent", "--device", "cpu",
                     launcher=torchrun("--standalone", "--nproc_per_node=2"))
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and err.count("error: --data") == 1


def test_processes_that_read_different_checkpoints_are_told(finished, pictures):
    class Two(train.Processes):
        def sum(self, numbers):  # of this process and of another, which is one step on
            return [2 * number + 1 for number in numbers]
    args = train.parse_arguments(arguments(pictures, finished, "--drop-path", 0.2, "--resume", "auto"))
    with pytest.raises(train.UserError, match="see different .*last.pt: --out must be a folder that all share"):
        train.train(args, Two(count=2))


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
    ours, theirs = (train.load_checkpoint(folder / "last.pt") for folder in (tmp_path / "run", pair))
    for kind in "model", "ema":
        for name, value in theirs[kind].items():
            torch.testing.assert_close(ours[kind][name], value, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot be lost: the same result whatever the shape of the machine
# ---------------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("shapes, epochs", [
    ([(4, 2, 1)], 1),
    pytest.param([(p, a, w) for p in (1, 2, 4) for a in (1, 2, 4) for w in (0, 1, 4)][1:], 5, marks=pytest.mark.slow)],
    ids=["ten steps, four processes", "fifty steps, all 27 shapes"])
def test_steps_have_the_same_losses_in_any_shape_of_the_machine(shapes, epochs, more_pictures, tmp_path):
    """The whole recipe is on: random crops, RandAugment, erasing, mixup and cutmix; drop-path is not."""
    largest = 0.0
    for count, accum, workers in [(1, 1, 0), *shapes]:
        out = tmp_path / f"{count}-{accum}-{workers}"
        process = script(*arguments(more_pictures, out, "--accum", accum, "--workers", workers, "--batch-size", 32,
                                    "--epochs", epochs),
                         launcher=torchrun("--standalone", f"--nproc_per_node={count}") if count > 1 else ())
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
@both_scripts
def test_every_shape_of_the_machine_sees_the_same_images_augmented_and_mixed_alike(either):
    module, words, _ = either
    seen = {}
    for count, accum, workers in SHAPES_OF_MACHINES:
        args = module.parse_arguments(words("out", "--batch-size", 32, "--accum", accum, "--workers", workers))
        data, = module.open_data(args, ["train" if module is train else "training"])
        data.transform = train.train_transform(args) if module is train else segment.TrainTransform(args)
        mix = train.batch_transform(args, 3) if module is train else lambda images, masks, step: (images, masks)
        items = []
        for rank in range(count):
            processes = train.Processes(rank, count)
            batches = train.training_batches(range(5, 7), args, processes)
            loader = train.make_loader(train.Stream(data, args.seed), workers, processes, batch_sampler=batches)
            for number, (images, targets) in enumerate(loader):
                step = 5 + number // accum
                images, targets = mix(images, targets, step)
                items += [(step, image.numpy().tobytes(), target.numpy().tobytes())
                          for image, target in zip(images, targets)]
        seen[count, accum, workers] = sorted(items)
    assert len(seen[1, 1, 0]) == len({image for _, image, _ in seen[1, 1, 0]}) == 64
    assert all(items == seen[1, 1, 0] for items in seen.values())


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_with_the_one_half_a_batch_on_and_labels_in_the_same_proportion(kind):
    args = train.parse_arguments(["--data", "x", "--mixup", "0", "--cutmix", "0", f"--{kind}", "1"])
    mix, images = train.batch_transform(args, 4), torch.arange(4.).view(4, 1, 1, 1).expand(4, 3, 20, 20)
    shares = set()
    for step in range(5):
        mixed, labels = mix(images, torch.arange(4), step)
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


@both_scripts
def test_a_file_size_limit_ends_the_run_and_leaves_the_checkpoint(either, tmp_path):
    module, words, alone = either
    out = tmp_path / "run"
    out.mkdir()
    last = train.load_checkpoint(alone / "last.pt") | {"validated": 0, "log": []}
    last["scheduler"]["last_epoch"] = 2
    torch.save(last, out / "last.pt")
    before = (out / "last.pt").read_bytes()
    with file_size_limit(), pytest.raises(train.UserError, match="cannot write .*last.pt: File too large"):
        module.main(words(out, "--resume", "auto", "--save-every", "1"))
    assert (out / "last.pt").read_bytes() == before and [path.name for path in out.iterdir()] == ["last.pt"]


def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path):
    (tmp_path / "file").write_text("dear")
    (tmp_path / "file.tmp").symlink_to("/dev/full")  # a device on which there is never any space
    with pytest.raises(train.UserError, match="cannot write .*file: No space left on device; one .* is still there"):
        train.write_whole(tmp_path / "file", bytes(10**6))
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "dear"


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
    for module, run, out in ((train, finished, []), (segment, segmented, ["--out", str(tmp_path / "out")])):
        words = ["--predict", *refused, *paths, "--weights", str(run / "best.pt"), "--device", "cpu", *out]
        assert module.main(words) == 2
        err = capsys.readouterr().err
        assert all(f"cannot read the image {path}: " in err for path in refused)  # which keeps it not from the others
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
NONE = everywhere("holds no checkpoint of these scripts, and no state dict")
# What is made of the bytes and of the contents of a good checkpoint, and why it is then refused with --resume, with
# --weights for training, and with --weights for predicting; None: it is used.
CHECKPOINTS = {
    "truncated":          (lambda data, c: data[:len(data) // 2], DAMAGED),
    "without its end":    (lambda data, c: data[:-30], DAMAGED),
    "empty":              (lambda data, c: b"", DAMAGED),
    "text":               (lambda data, c: b"learning rate 3\n", DAMAGED),
    "a bit flipped":      (lambda data, c: flipped(data, len(data) // 2), everywhere("check sum of .* is wrong")),
    "a list":             (lambda data, c: pickled([1, 2]), NONE),
    "a program":          (lambda data, c: another(c, more=Trap("trap")), CODE),
    "an old program":     (lambda data, c: pickled(Trap("trap")), CODE),
    "another model":      (lambda data, c: another(c, model=VisionGRU(3).state_dict(), ema=None, better="model"),
                           ("does not fit: .* in loading state_dict", *2 * ["does not fit this VisionGRU"])),
    "another optimizer":  (lambda data, c: another(c, optimizer={"state": {}, "param_groups": []}),
                           ("does not fit: .*loaded state dict has a different number of param", None, None)),
    "no log":             (lambda data, c: another({key: c[key] for key in c if key != "log"}),
                           ("does not fit: KeyError: 'log'", None, None)),
    "no settings":        (lambda data, c: another(c, settings={}),
                           ("does not fit: KeyError: 'classes'", None, "does not fit this VisionGRU")),
    "strange settings":   (lambda data, c: another(c, settings=7), NONE),
    "an unknown model":   (lambda data, c: another(c, settings={**c["settings"], "model": "vast"}),
                           ("model was vast and is now nano", None, "a model called 'vast'; expected one of nano")),
    "weights alone":      (lambda data, c: another(c["model"]), ("weights only; resume a last.pt", None, None)),
}


def pickled(thing):
    file = io.BytesIO()
    torch.save(thing, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_is_used_or_refused_with_its_path_and_the_reason(kind, finished, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, reasons = CHECKPOINTS[kind]
    content = train.load_checkpoint(finished / "last.pt")
    Path("bad.pt").write_bytes(make((finished / "last.pt").read_bytes(), content))
    model = ("--model", "nano") if kind == "weights alone" else ()
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


def scaled_run(out, alone, scale):
    """A folder with a run in fp16 that is about to begin, its loss scaled by `scale`."""
    last = train.load_checkpoint(alone / "last.pt") | {"validated": 0, "log": []}
    last["scheduler"]["last_epoch"] = 0
    last["scaler"] = {"scale": scale, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
                      "_growth_tracker": 0}
    out.mkdir()
    torch.save(last, out / "last.pt")
    return last


def test_gradients_that_overflow_in_fp16_are_skipped_until_the_scale_fits(finished, pictures, tmp_path):
    before = scaled_run(tmp_path / "run", finished, 2.0**30)
    assert train.main(arguments(pictures, tmp_path / "run", "--drop-path", 0.2, "--amp", "fp16", "--epochs", 6,
                                "--resume", "auto")) == 0
    after = train.load_checkpoint(tmp_path / "run" / "last.pt")
    assert 2.0**8 < after["scaler"]["scale"] < 2.0**28  # some steps were skipped, and others not
    assert not torch.equal(after["model"]["head.weight"], before["model"]["head.weight"])
    assert all(value.isfinite().all() for value in [*after["model"].values(), *after["ema"].values()])
    assert all(math.isfinite(entry["loss"]) for entry in history(tmp_path / "run"))


def test_an_exploding_loss_in_fp16_ends_the_run_and_leaves_the_checkpoint(finished, pictures, tmp_path):
    words = arguments(pictures, tmp_path / "run", "--amp", "fp16", "--lr", 1e4, "--warmup", 0, "--save-every", 1)
    with pytest.raises(train.UserError, match="(loss is|weights are no longer finite) .*last.pt was not written"):
        train.main(words)
    last = train.load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(value.isfinite().all() for value in last["model"].values())


def test_gradients_that_no_scale_makes_finite_end_the_run(finished, pictures, tmp_path, monkeypatch):
    scaled_run(tmp_path / "run", finished, 1e-5)
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def unsound(**kw):  # its loss is finite and its gradient is not
        model = visiongru_nano(**kw)
        model.head.weight.register_hook(lambda grad: grad * math.nan)
        return model
    monkeypatch.setitem(train.MODELS, "nano", unsound)
    words = arguments(pictures, tmp_path / "run", "--drop-path", 0.2, "--amp", "fp16", "--resume", "auto")
    with pytest.raises(train.UserError, match="gradients are not finite at any scale, at step 4 of 12"):
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
NUMBERS = ["0", "0", "1", "0.5", "0.5", "-1", "2", "nan", "inf", "-inf", "1e-300", "1e300", "", "x", "1_0", "0x10",
           "10" * 20]
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
    for option in chance.sample(sorted(options), chance.choice([1, 1, 1, 2, 4])):
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
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **kw: None)  # minutes, and no matter of the arguments
    Path("pictures").symlink_to(pictures), Path("streets").symlink_to(streets)
    Path("empty").mkdir(), Path("file").touch(), write_image("plain.png", Path()), write_image("half.jpg", Path())
    assert train.main(arguments("pictures", "classifier", "--epochs", 1)) == 0
    assert segment.main(seg_arguments("streets", "segmenter", "--iters", 3)) == 0
    shutil.copy("classifier/last.pt", "classifier.pt"), shutil.copy("segmenter/last.pt", "segmenter.pt")
    torch.save(small(num_classes=3).state_dict(), "weights.pt")
    Path("broken.pt").write_bytes(Path("classifier.pt").read_bytes()[:9999])
    chance, statuses = random.Random(count), []
    for _ in range(count):
        words, base = command_line(options, chance), make(data, "new", *{
            "train": ("--epochs", 1, "--batch-size", 16), "segment": ("--iters", 1)}[name])
        if {"--eval", "--predict"} & {*words}:
            base = ["--weights", {"train": "classifier.pt", "segment": "segmenter.pt"}[name], "--device", "cpu"]
        words = [*(base if chance.random() < 0.8 else base[2:]), *words]
        with pytest.raises(SystemExit) as end:
            train.run_script(lambda: module.main(words))  # with 1 for an error that it does not know
        captured = capsys.readouterr()
        statuses.append(end.value.code)
        assert end.value.code in (0, 2) and "Traceback" not in captured.err, f"{words}\n{captured.err}"
        assert end.value.code == 0 or "error: " in captured.err, words
        shutil.rmtree("new", ignore_errors=True)
    print(f"{count} command lines, {statuses.count(0)} of them accepted")
    assert 0.1 < statuses.count(0) / count < 0.9


@pytest.mark.parametrize("name, words, status", [
    ("train.py", ["--help"], 0), ("segment.py", ["--predict", "absent.png", "--weights", "absent.pt"], 2)])
def test_the_scripts_own_processes_end_so_too(name, words, status):
    process = script(*words, name=name)
    _, err = process.communicate(timeout=100)
    assert process.returncode == status and "Traceback" not in err
