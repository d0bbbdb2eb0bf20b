"""VisionGRU in one file: an image model in which a recurrence, minGRU, carries information across the picture.

    Yin et al., "VisionGRU: A Linear-Complexity RNN Model for Efficient Image Analysis", arXiv 2412.18178
    Feng et al., "Were RNNs All We Needed?" (minGRU), arXiv 2410.01201
    Xiao et al., "Unified Perceptual Parsing for Scene Understanding" (UPerNet), arXiv 1807.10221
    Heinsen, "Efficient Parallelization of a Ubiquitous Sequential Computation" (log-space scan), arXiv 2311.06281

Read it from top to bottom. Each part uses only the parts above it; within a part, what others call comes first:

    1. the linear recurrence h_t = a_t h_{t-1} + b_t, computed in three ways that agree
    2. MinGRU, a recurrent layer whose gates do not look at the state, so that it is such a recurrence
    3. GRU2D, one MinGRU over the pixels in raster order and another over them in reverse
    4. Block, Stem, Downsample: the layers around GRU2D
    5. VisionGRU, the hierarchy of four stages, and its named sizes
    6. UPerNet, which turns the four stages' maps into a class for every pixel
    7. load_weights, for our checkpoints and those of the paper's authors

Letters, in the code and in the papers:

    B        images, or sequences, in a batch
    T        length of a sequence; for an image T = H W, its pixels row after row (raster order)
    H, W     height and width of a feature map, or of an image where it says so
    C, dim   channels of a feature map (the paper's D at stage 1, then 2D, 4D, 8D)
    K        classes, of images or of pixels
    E        hidden width of a minGRU, E = expansion * dim
    z        the gate in (0, 1): how much of the new candidate is taken in
    h~       the candidate, never negative
    u        what both are made of: W_h x and W_z x side by side, (B, T, 2E)
    a, b     the recurrence's coefficients: in minGRU a = 1 - z (how much is kept) and b = z * h~
    h, h0    the state, and the state before the first element
    G        the gradient that a state receives, directly and through all later ones

Feature maps are (B, H, W, C) inside the blocks: LayerNorm, the linear layers and the scan want the channels last. Seen
as (B, C, H, W), the same memory is in the channels_last format that convolutions like. Every permute below is a view.
"""

import os
import re
import warnings
import zipfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import Conv2dNormActivation, StochasticDepth


# 1. The linear recurrence h_t = a_t h_{t-1} + b_t ---------------------------------------------------------------------
#
# Three functions with one signature: a and b are (B, T, E), h0 is (B, E) or None for zero, and the result holds every
# h_t, (B, T, E). With reverse=True time runs from the last element to the first, h_t = a_t h_{t+1} + b_t, and h0 is
# the state beyond the last element. B stands for any number of leading dimensions, or none.

def _in_time(a, b, reverse):
    """The pairs (a_t, b_t), each (B, E), first in time first."""
    pairs = list(zip(a.unbind(-2), b.unbind(-2)))
    return pairs[::-1] if reverse else pairs


def scan_sequential(a, b, h0=None, reverse=False):
    """The definition, one step after another: T steps, each on (B, E)."""
    if b.shape[-2] == 0:
        return b.clone()
    h = torch.zeros_like(b.select(-2, 0)) if h0 is None else h0
    states = []
    for a_t, b_t in _in_time(a, b, reverse):
        h = torch.addcmul(b_t, a_t, h)                                          # a_t h + b_t
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, dim=-2)


ROW = 16  # A row has at most 16 elements. torch.compile does not fuse the steps of a longer one into one kernel.


def scan_parallel(a, b, h0=None, reverse=False):
    """A recursion: cut the sequence into rows of a few elements. If s is the state before a row, the state after it is
    product * s + end, where `product` is the product of the row's a_t, and `end` the state after the row if s is 0.

        1. Compute product and end, of all rows at once.
        2. The states after the rows obey the same recurrence, with a = product and b = end, in a sequence as many
           times shorter as a row is long. Scan it in the same way.
        3. Now each row knows its s. Step through all rows at once again, and keep every h_t.

    The work is O(T), in O(log T) operations one after another: 100 for T = 3,136. With 0 <= a <= 1, b >= 0 and h0 >= 0
    nothing overflows and nothing cancels: in float32 it keeps the accuracy of the sequential form at any length.
    (Forward-mode differentiation, torch.func.jvp, is not implemented.)
    """
    return _ParallelScan.apply(a, b, h0, reverse)


def _scan(a, b, h0, reverse):
    """What `scan_parallel` computes, without the gradient that `_ParallelScan` gives it."""
    T = b.shape[-2]
    # T is a symbol in torch.export for images of any size. (torch.compile may fix it, and compile another length anew.)
    if isinstance(T, torch.SymInt) and not torch.compiler.is_dynamo_compiling():
        return _doubling_scan(a, b, h0, reverse)
    if T <= ROW:
        return scan_sequential(a, b, h0, reverse)
    # The longest row, of 16 to 4 elements, that divides T. If none does, the last row is filled with a = 1 and b = 0,
    # which leave a state as it is.
    row = next((R for R in range(ROW, 3, -1) if T % R == 0), ROW)
    if T % row:
        fill = (0, 0, 0, -T % row)
        return _scan(F.pad(a, fill, value=1.0), F.pad(b, fill), h0, reverse)[..., :T, :]

    a, b = (x.unflatten(-2, (-1, row)) for x in (a, b))                         # (B, T, E) -> (B, rows, row, E)
    (product, end), *rest = _in_time(a, b, reverse)                             # (B, rows, E)
    for a_t, b_t in rest:
        product, end = a_t * product, torch.addcmul(b_t, a_t, end)
    after = _scan(product, end, h0, reverse)                                    # the state after each row
    return scan_sequential(a, b, _before(after, h0, reverse), reverse).flatten(-3, -2)


def _before(h, h0, reverse):
    """The state before each element: h (B, T, E), shifted by one in time, with h0 (B, E) or zero before the first."""
    start = torch.zeros_like(h[..., :1, :]) if h0 is None else h0.unsqueeze(-2)
    return torch.cat([h[..., 1:, :], start] if reverse else [start, h[..., :-1, :]], dim=-2)


class _ParallelScan(torch.autograd.Function):
    """Let grad_t be the gradient that h_t receives directly, and G_t all of it, through the later states too. Then

        G_t = grad_t + a_{t+1} G_{t+1},    dL/db_t = G_t,    dL/da_t = G_t h_{t-1},    dL/dh_0 = a_1 G_1:

    the gradient of a scan is the same scan, run backwards. Only a, h and h0 are kept for it, and it can itself be
    differentiated.
    """

    generate_vmap_rule = True  # for torch.vmap and torch.func

    forward = staticmethod(_scan)

    @staticmethod
    def setup_context(ctx, inputs, h):
        a, _, h0, ctx.reverse = inputs
        ctx.save_for_backward(a, h, h0)

    @staticmethod
    def backward(ctx, grad):
        a, h, h0 = ctx.saved_tensors
        a_next = _before(a, None, not ctx.reverse)  # the next in time comes before it in the backward scan
        G = scan_parallel(a_next, grad, None, not ctx.reverse)
        return G * _before(h, h0, ctx.reverse), G, _gradient_of_h0(a, G, h0, ctx.reverse), None


def _gradient_of_h0(a, G, h0, reverse):
    first = -1 if reverse else 0
    return None if h0 is None else a[..., first, :] * G[..., first, :]


def _doubling_scan(a, b, h0, reverse):
    """The same in a fixed number of operations, for a program that must run at any T (Hillis and Steele, 1986).

    After k rounds a_t and b_t stand for the 2^k steps that end at t; the next round joins them to the 2^k steps before.
    16 rounds reach back over 65,536 steps, stage 1 of an image of 1024 x 1024 pixels. What lies further back is lost.
    """
    T = b.shape[-2]

    def earlier(x, steps, value):  # x moved to later places in time, `value` before it
        steps = torch.sym_min(steps, T)
        filled = F.pad(x, (0, 0, 0, steps) if reverse else (0, 0, steps, 0), value=value)
        return filled[..., steps:, :] if reverse else filled[..., :T, :]

    for k in range(16):
        a, b = a * earlier(a, 2**k, 1.0), torch.addcmul(b, a, earlier(b, 2**k, 0.0))
    return b if h0 is None else torch.addcmul(b, a, h0.unsqueeze(-2))


def scan_log(a, b, h0=None, reverse=False):
    """The minGRU paper's parallel form (arXiv 2410.01201, appendix B): with A_t = a_1 a_2 ... a_t and b_1 + a_1 h_0 in
    place of b_1,

        h_t = A_t sum_{s<=t} b_s / A_s = exp(log A_t + logcumsumexp_{s<=t}(log b_s - log A_s)).

    It needs a >= 0, b >= 0 and h0 >= 0. It is kept for comparison: |log A_t| grows with t, and float32 rounds it to one
    part in 10^7. The error of the logarithm is the relative error of h_t, about 1e-2 at T = 65,536.
    """
    if reverse:
        return scan_log(a.flip(-2), b.flip(-2), h0).flip(-2)
    if h0 is not None:
        b = torch.cat([torch.addcmul(b[..., :1, :], a[..., :1, :], h0.unsqueeze(-2)), b[..., 1:, :]], dim=-2)
    # In float32 at least: float16 cannot hold log A_t.
    dtype, a, b = b.dtype, *(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    tiny = torch.finfo(a.dtype).tiny  # in place of 0, whose logarithm would make inf - inf
    log_A = a.clamp_min(tiny).log().cumsum(dim=-2)
    return (log_A + torch.logcumsumexp(b.clamp_min(tiny).log() - log_A, dim=-2)).exp().to(dtype)


SCANS = {"parallel": scan_parallel, "log": scan_log, "sequential": scan_sequential}


# 2. minGRU ------------------------------------------------------------------------------------------------------------

class MinGRU(nn.Module):
    """minGRU (arXiv 2410.01201): a GRU whose gate and candidate depend on the input alone.

        z_t  = sigmoid(W_z x_t)
        h~_t = g(W_h x_t),    g(v) = v + 1/2 for v >= 0, sigmoid(v) for v < 0
        h_t  = (1 - z_t) * h_{t-1} + z_t * h~_t
        y_t  = W_o h_t        (y_t = h_t where expansion = 1)

    The rows of `in_proj` are W_h, then W_z; `out_proj` is W_o. None has a bias. The recurrence is computed in float32
    at least, whatever the inputs' type, under autocast too; the state that is returned keeps that type.

    Args:
        dim: width of the inputs and outputs.
        expansion: hidden width E as a multiple of dim.
        scan: "parallel", "log" or "sequential": how the recurrence is computed. The results agree up to rounding.
    Raises ValueError for an unknown scan, or a width that is not a positive whole number.
    """

    def __init__(self, dim, expansion=2, scan="parallel"):
        super().__init__()
        if scan not in SCANS:
            raise ValueError(f"scan is {scan!r}; expected one of {', '.join(map(repr, SCANS))}")
        hidden = dim * expansion
        if not isinstance(dim, int) or dim < 1 or hidden < 1 or hidden % 1:
            raise ValueError(f"dim is {dim} and expansion {expansion}; expected dim and dim * expansion to be "
                             f"positive whole numbers")
        self.scan, self.hidden = scan, int(hidden)
        self.in_proj = nn.Linear(dim, 2 * self.hidden, bias=False)
        self.out_proj = nn.Identity() if expansion == 1 else nn.Linear(self.hidden, dim, bias=False)

    def forward(self, x, h0=None, reverse=False):
        """x (B, T, dim), h0 (B, E) or None for zero -> y (B, T, dim) and the state after the last element, (B, E).

        With reverse=True the sequence is read from its end, h0 is the state beyond the end, and the state returned is
        the one at the first element.
        """
        if x.ndim < 2 or x.shape[-2] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, T, dim) with T of at least 1")
        if self.scan != "parallel":
            h = SCANS[self.scan](*self.coefficients(x), h0, reverse)
            return self.out_proj(h.to(x.dtype)), h[..., 0 if reverse else -1, :].clone()
        # Piece after piece, each from the state after the one before; of whole rows, so that only the last needs fill.
        pieces = _pieces(x, -2, x[..., 0, 0].numel() * 2 * self.hidden, multiple=ROW)
        state, y = h0, []
        for piece in reversed(pieces) if reverse else pieces:
            h, state = _ParallelMinGRU.apply(self.in_proj(piece), state, reverse)
            y.append(self.out_proj(h.to(x.dtype)))
        return y[0] if len(y) == 1 else torch.cat(y[::-1] if reverse else y, dim=-2), state

    def step(self, x_t, h=None):
        """One element of a stream: x_t (B, dim), h (B, E) or None for zero -> y_t (B, dim), h (B, E)."""
        a, b = self.coefficients(x_t)
        h = b if h is None else a * h + b
        return self.out_proj(h.to(x_t.dtype)), h

    def coefficients(self, x):
        """x (..., dim) -> a = 1 - z and b = z * h~, both (..., E) and in float32 at least."""
        a, z, candidate = _gates(self.in_proj(x))
        return a, z * candidate


def _gates(u):
    """u = (W_h x, W_z x), (..., 2E) -> a = 1 - z, z and h~ = g(W_h x), each (..., E) and in float32 at least."""
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    candidate, gate = u.chunk(2, dim=-1)
    g_below, z = u.sigmoid().chunk(2, dim=-1)
    # g is the larger of its two branches. On a CPU torch.maximum takes a sixth of the time of torch.where.
    # a is sigmoid(-gate): 1 - z would lose the digits of a small a.
    return (-gate).sigmoid(), z, torch.maximum(candidate + 0.5, g_below)


# What makes it lean on memory: the gates are computed again for the gradient, and long inputs are cut.
class _ParallelMinGRU(torch.autograd.Function):
    """u (B, T, 2E), h0 (B, E) or None -> every h_t, (B, T, E), and the state after the last element, (B, E).

    The scan of the gates' coefficients, as `scan_parallel` computes it, but only u and h are kept for the gradient,
    which computes the gates again. With G_t as in `_ParallelScan`,

        dL/d(W_h x)_t = G_t z_t g'(W_h x_t),
        dL/d(W_z x)_t = G_t a_t z_t (h~_t - h_{t-1}) = G_t z_t (h~_t - h_t).

    (The last form needs no h_{t-1}. It loses digits only where a_t, and with it this gradient, is near zero.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(u, h0, reverse):
        a, z, candidate = _gates(u)
        h = _scan(a, z * candidate, h0, reverse)
        return h, h[..., 0 if reverse else -1, :].clone()  # no view: the outputs of a Function share no memory

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        u, h0, ctx.reverse = inputs
        ctx.save_for_backward(u, outputs[0], h0)

    @staticmethod
    def backward(ctx, grad, grad_after):
        u, h, h0 = ctx.saved_tensors
        a, z, candidate = _gates(u)
        # The backward scan starts from grad_after, with a factor of 1: the state after the last element is its h_t.
        a_next = _before(a, torch.ones_like(grad_after), not ctx.reverse)
        G = scan_parallel(a_next, grad, grad_after, not ctx.reverse)
        # g'(v) is 1 for v > 0, and h~ (1 - h~) for v < 0, where h~ < 1/2. With low = min(h~, 1/2), low (1 - low) is
        # right below zero, and 1/4 above, where 3/4 is to be added. At 0 half of that is added, as autograd would.
        low, sign = candidate.clamp(max=0.5), u.chunk(2, dim=-1)[0].to(z.dtype).sign()
        slope = torch.add(torch.addcmul(low, low, low, value=-1), sign + 1, alpha=0.375)
        G_z = G * z
        du = torch.stack([G_z * slope, G_z * (candidate - h)], dim=-2).flatten(-2).to(u.dtype)
        return du, _gradient_of_h0(a, G, h0, ctx.reverse), None


PIECE = 2**21  # numbers in u, (B, T, 2E). Measured on a CPU: smaller pieces take longer, larger ones more memory.


def _pieces(x, dim, cost, multiple=1):
    """x split along `dim` into pieces, of a multiple of `multiple` in length, whose u has at most about PIECE numbers,
    `cost` for each index of `dim`. On a CPU what is computed from a piece stays in the cache from one operation to the
    next. A GPU wants few launches, and torch.compile fuses all operations: they get x whole.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [x]
    return x.split(max(multiple, PIECE // max(cost, 1) // multiple * multiple), dim)


# 3. 2DGRU -------------------------------------------------------------------------------------------------------------

class GRU2D(nn.Module):
    """The paper's bidirectional 2DGRU (eq. 9-11): each position L of the raster order receives

        from the left    sum_{m <= L} [prod_{k=m+1..L} (1 - z_k)] z_m h~_m      through `left`, and
        from the right   sum_{m >= L} [prod_{k=L..m-1} (1 - z_k)] z_m h~_m      through `right`,

    each with gates and candidates of its own. The two outputs are added. x (B, H, W, C) -> (B, H, W, C), any H and W.
    """

    def __init__(self, dim, expansion=2, scan="parallel"):
        super().__init__()
        self.left = MinGRU(dim, expansion, scan)
        self.right = MinGRU(dim, expansion, scan)

    def forward(self, x):
        sequence = x.flatten(1, 2)                                              # (B, H*W, C), raster order
        # As many images at a time as make one piece. (If one is too large for that, minGRU cuts it.)
        y = [self.left(images)[0] + self.right(images, reverse=True)[0]
             for images in _pieces(sequence, 0, sequence.shape[1] * 2 * self.left.hidden)]
        return (y[0] if len(y) == 1 else torch.cat(y)).view_as(x)


# 4. Around it: block, stem, downsampling ------------------------------------------------------------------------------

def to_channels_first(x):
    return x.permute(0, 3, 1, 2)                                                # (B, H, W, C) -> (B, C, H, W)


def to_channels_last(x):
    return x.permute(0, 2, 3, 1)                                                # (B, C, H, W) -> (B, H, W, C)


class Block(nn.Module):
    """x = x + 2DGRU(DWConv3x3(LN(x))), then x = x + FFN(LN(x)). (B, H, W, C) -> (B, H, W, C).

    The depthwise convolution lets a pixel see its neighbours above and below before the scan, which walks along rows.
    `drop_path` is the probability that an image skips a residual branch in training (stochastic depth).
    """

    def __init__(self, dim, expansion=2, mlp_ratio=4, drop_path=0.0, scan="parallel"):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.gru = GRU2D(dim, expansion, scan)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.ffn = nn.Sequential(nn.Linear(dim, int(mlp_ratio * dim)), nn.GELU(), nn.Linear(int(mlp_ratio * dim), dim))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        y = to_channels_last(self.dwconv(to_channels_first(self.norm1(x))))
        x = x + self.drop_path(self.gru(y))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class Stem(nn.Module):
    """Two strided convolutions, one position for 4x4 pixels: (B, 3, H, W) -> (B, H/4, W/4, dim), rounded up."""

    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(dim // 2, eps=1e-6)
        self.conv2 = nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        x = F.gelu(self.norm1(to_channels_last(self.conv1(x))))
        return self.norm2(to_channels_last(self.conv2(to_channels_first(x))))


class Downsample(nn.Module):
    """Half the resolution, twice the channels: (B, H, W, C) -> (B, H/2, W/2, 2C), rounded up."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * dim, eps=1e-6)

    def forward(self, x):
        return self.norm(to_channels_last(self.conv(to_channels_first(x))))


# 5. VisionGRU ---------------------------------------------------------------------------------------------------------

class VisionGRU(nn.Module):
    """Four stages of blocks at 1/4, 1/8, 1/16 and 1/32 of the image's size, with dim, 2 dim, 4 dim, 8 dim channels.

    Args:
        num_classes: width of the classifier.
        dim: channels of the first stage, even (the paper's D).
        depths: blocks in each of the four stages.
        expansion: hidden width of the minGRUs as a multiple of their stage's channels.
        mlp_ratio: hidden width of the FFNs, likewise.
        drop_path: stochastic depth: the probability of the last block; it grows linearly from 0 at the first.
        scan: "parallel", "log" or "sequential", as in `MinGRU`; all have the same parameters and results.
        grad_checkpointing: in training, save only the inputs of stem, blocks and downsamplings, and recompute the rest
            in backward: about half the memory.
    Raises ValueError if an argument is out of range.
    """

    def __init__(self, num_classes=1000, dim=72, depths=(2, 2, 8, 2), expansion=2, mlp_ratio=4, drop_path=0.0,
                 scan="parallel", grad_checkpointing=False):
        super().__init__()
        if len(depths) != 4 or any(not isinstance(depth, int) or depth < 1 for depth in depths):
            raise ValueError(f"depths is {depths!r}; expected four whole numbers of at least 1, one for each stage")
        if not isinstance(dim, int) or dim < 2 or dim % 2:
            raise ValueError(f"dim is {dim}; expected an even number of at least 2 (the stem starts with half of it)")
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected a whole number of at least 1")
        if mlp_ratio * dim < 1:
            raise ValueError(f"mlp_ratio is {mlp_ratio}; expected mlp_ratio * dim to be at least 1")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path is {drop_path}; expected a probability of at least 0 and below 1")
        self.num_classes, self.grad_checkpointing = num_classes, grad_checkpointing
        self.dims = [dim * 2**stage for stage in range(4)]
        rates = (drop_path * i / (sum(depths) - 1) for i in range(sum(depths)))
        self.stem = Stem(dim)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, expansion, mlp_ratio, next(rates), scan) for _ in range(depth)))
            for width, depth in zip(self.dims, depths))
        self.downsamples = nn.ModuleList(Downsample(width) for width in self.dims[:-1])
        self.head = nn.Linear(self.dims[-1], num_classes)

    def features(self, x):
        """x (B, 3, H, W) -> the outputs of the four stages, (B, C_i, H_i, W_i) with C_i = dim, 2 dim, 4 dim, 8 dim and
        sizes of 1/4, 1/8, 1/16, 1/32 of the image, rounded up. They are not normalised.

        Any height and width of at least 32 pixels; any floating-point type, which is cast to the parameters' own.
        Raises ValueError for anything else.
        """
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] < 32 or x.shape[3] < 32:
            raise ValueError(f"images have shape {tuple(x.shape)}; expected (B, 3, H, W), H and W at least 32")
        if not x.is_floating_point():
            raise ValueError(f"images are {x.dtype}; expected floating point, scaled and normalised "
                             f"(for bytes: torchvision's to_dtype(x, torch.float32, scale=True), then normalize)")

        def run(part, x):
            return checkpoint(part, x, use_reentrant=False) if self.grad_checkpointing and self.training else part(x)

        x = run(self.stem, x.to(self.stem.conv1.weight.dtype))
        maps = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = run(self.downsamples[i - 1], x)
            for block in stage:
                x = run(block, x)
            maps.append(to_channels_first(x))
        return maps

    def forward(self, x):
        """x (B, 3, H, W), as for `features` -> logits (B, num_classes): a linear layer on the last map's mean."""
        return self.head(self.features(x)[-1].mean(dim=(2, 3)))


def visiongru_nano(**kw):
    """Not in the paper; for laptops and tests: 2.0 M parameters."""
    return VisionGRU(**{"dim": 24, "depths": (1, 1, 4, 1), **kw})


def visiongru_tiny(**kw):
    """The paper's VisionGRU-Ti: 30.2 M parameters, 4.87 G multiply-adds at 224 px."""
    return VisionGRU(**{"dim": 72, "depths": (2, 2, 8, 2), **kw})


def visiongru_base(**kw):
    """The paper's VisionGRU-B: 86.9 M parameters."""
    return VisionGRU(**{"dim": 104, "depths": (2, 2, 15, 2), **kw})


# 6. UPerNet: semantic segmentation ------------------------------------------------------------------------------------

def resize_to(x, size):
    """x (B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """The decoder of UPerNet (arXiv 1807.10221): the four stages' maps -> logits (B, K, H/4, W/4), rounded up.

        pyramid pooling   the last map, averaged over grids of 1x1, 2x2, 3x3 and 6x6, sees the scene as a whole
        top-down path     from the coarsest map to the finest, each is enlarged and added to the next (FPN)
        fusion            all four are enlarged to the finest one's size, concatenated and convolved

    The layers have mmsegmentation's names, so that the authors' checkpoints load.
    """

    def __init__(self, dims, num_classes, channels=512):
        super().__init__()
        def conv(inputs, kernel_size):  # without bias, then BatchNorm and ReLU
            return Conv2dNormActivation(inputs, channels, kernel_size)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(grid), conv(dims[-1], 1)) for grid in (1, 2, 3, 6))
        self.bottleneck = conv(dims[-1] + 4 * channels, 3)
        self.lateral_convs = nn.ModuleList(conv(dim, 1) for dim in dims[:-1])
        self.fpn_convs = nn.ModuleList(conv(channels, 3) for _ in dims[:-1])
        self.fpn_bottleneck = conv(4 * channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, maps):
        *finer, last = maps
        pooled = [resize_to(pool(last), last.shape[2:]) for pool in self.psp_modules]
        pyramid = [self.bottleneck(torch.cat([last, *pooled], dim=1))]
        for lateral, x in zip(reversed(self.lateral_convs), reversed(finer)):
            pyramid.insert(0, lateral(x) + resize_to(pyramid[0], x.shape[2:]))
        pyramid[:-1] = [conv(x) for conv, x in zip(self.fpn_convs, pyramid)]
        x = self.fpn_bottleneck(torch.cat([resize_to(x, pyramid[0].shape[2:]) for x in pyramid], dim=1))
        return self.conv_seg(self.dropout(x))


class FCNHead(nn.Module):
    """A second, small classifier of pixels, on one map (B, C, H, W) -> logits (B, K, H, W). Used in training only."""

    def __init__(self, dim, num_classes, channels=256):
        super().__init__()
        self.convs = nn.Sequential(Conv2dNormActivation(dim, channels, 3))
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, x):
        return self.conv_seg(self.dropout(self.convs(x)))


class UPerNet(nn.Module):
    """UPerNet on VisionGRU, with an auxiliary FCN head on stage 3, as the paper segments ADE20K.

    The backbone, a VisionGRU, becomes a part of this model and loses its classifier, which has no use here. A pixel has
    one of `num_classes`; `channels` and `aux_channels` are the widths of the decoder and of the auxiliary head. Raises
    ValueError if one of them is below 1.
    """

    def __init__(self, backbone, num_classes, channels=512, aux_channels=256):
        super().__init__()
        for name, value in ("num_classes", num_classes), ("channels", channels), ("aux_channels", aux_channels):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}; expected a whole number of at least 1")
        self.num_classes = num_classes
        backbone.head = nn.Identity()
        self.backbone = backbone
        self.decode_head = UPerHead(backbone.dims, num_classes, channels)
        self.auxiliary_head = FCNHead(backbone.dims[2], num_classes, aux_channels)

    def forward(self, x):
        """x (B, 3, H, W), as for `VisionGRU.features` -> logits (B, K, H, W); in training a pair of such, the second
        from the auxiliary head. A batch to train on must hold two images or more: the coarsest pooling leaves one
        number per image and channel, of which BatchNorm takes the variance.
        """
        maps = self.backbone.features(x)
        logits = resize_to(self.decode_head(maps), x.shape[2:])
        if not self.training:
            return logits
        return logits, resize_to(self.auxiliary_head(maps[2]), x.shape[2:])


# 7. Loading weights ---------------------------------------------------------------------------------------------------

# (a pattern in the release's names, ours), applied in this order. min_gru_1 reads forward; to_hidden_and_gate has the
# candidate's rows first, as our in_proj has.
_RELEASE_NAMES = [
    (r"\b(module|_orig_mod|model|vig)\.", ""),  # prefixes that wrappers add
    (r"\btokenizer\.", "stem."),
    (r"\bsnake_gru\.layers\.", "stages."),
    (r"\.min_gru_1\.", ".gru.left."),
    (r"\.min_gru_2\.", ".gru.right."),
    (r"\.to_hidden_and_gate\.", ".in_proj."),
    (r"\.to_out\.", ".out_proj."),
    (r"\b(stages\.\d+\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.dw_conv\.", ".dwconv."),
    (r"\.projection1\.", ".ffn.0."),
    (r"\.projection2\.", ".ffn.2."),
    (r"\bsnake_gru\.(conv|norm)([123])\.", lambda m: f"downsamples.{int(m[2]) - 1}.{m[1]}."),
    (r"\bfc\.", "head."),
    (r"^(decode_head|auxiliary_head)\.(.+)\.conv\.", r"\1.\2.0."),
    (r"^(decode_head|auxiliary_head)\.(.+)\.bn\.", r"\1.\2.1."),
]


def read_checkpoint(path: str | os.PathLike) -> object:
    """What torch.save wrote to a file, with its checksums verified and no code in it executed.

    Raises OSError if the file cannot be opened; ValueError if it was not written by torch.save, is damaged, or holds
    objects other than tensors and plain containers. The message does not repeat the path.
    """
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch.load ignores the checksums
            raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        if "unsupported global" in str(error).lower():
            raise ValueError("it holds Python objects, and loading those executes code. If you trust the file, keep "
                             "its tensors: torch.save(torch.load(FILE, weights_only=False)[KEY], NEW_FILE), where KEY "
                             "is usually 'model' or 'state_dict'") from None
        raise ValueError("it was not written by torch.save, or it is damaged") from None


def extract_state_dict(checkpoint: object) -> dict[str, Tensor]:
    """The weights in a checkpoint, under this file's parameter names.

    `checkpoint` is a state dict, of this file's models or of the authors' release, or a dict that holds one as "ema"
    (the moving average), "model" or "state_dict", or under the key that its entry "better" names. Raises ValueError if
    there are no weights, or if one is anything but a dense tensor of finite floating-point numbers.
    """
    state = checkpoint if isinstance(checkpoint, dict) else {}
    keys = str(state.get("better")), "ema", "model", "state_dict"
    state = next((state[key] for key in keys if isinstance(state.get(key), dict)), state)
    state = {str(key): value for key, value in state.items() if isinstance(value, Tensor) and key != "n_averaged"}
    if not state:
        raise ValueError("it holds no weights; expected a dict of parameter names and tensors")
    for key, value in state.items():
        number = value.is_floating_point() or key.endswith("num_batches_tracked")  # BatchNorm's counter
        if not number or value.layout != torch.strided or not value.isfinite().all():
            raise ValueError(f"{key} is not a dense tensor of finite floating-point numbers")
    for pattern, ours in _RELEASE_NAMES:
        state = {re.sub(pattern, ours, key): value for key, value in state.items()}
    if all(key.startswith("backbone.") for key in state):  # a wrapper's prefix, unless there is a decoder beside it
        state = {key.removeprefix("backbone."): value for key, value in state.items()}
    return state


def load_weights(model: nn.Module, source: str | os.PathLike | dict) -> nn.Module:
    """Load weights into `model`, one of this file's models, and return it.

    `source` is a path, or what torch.load returned for it; see `extract_state_dict`. For fine-tuning, a classifier for
    another number of classes, or none, leaves the model's classifier at its initial values, with a warning. A VisionGRU
    takes the backbone of a segmentation model, and the `.backbone` of a UPerNet takes a classification model.

    Raises OSError or ValueError as `read_checkpoint` and `extract_state_dict` do, and ValueError if the weights do not
    fit: the message lists what is missing, unexpected and of another shape. The model is then unchanged.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            return load_weights(model, read_checkpoint(source))
        except ValueError as error:
            raise ValueError(f"{os.fspath(source)}: {error}") from None

    state, expected = extract_state_dict(source), model.state_dict()
    if "stem.conv1.weight" in expected and "backbone.stem.conv1.weight" in state:  # a segmentation model's backbone
        state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    elif "backbone.stem.conv1.weight" in expected and "stem.conv1.weight" in state:
        raise ValueError("these weights have no decoder; for the backbone alone: load_weights(model.backbone, ...)")
    if "head.weight" not in expected:  # segmentation models have no classifier of images
        state = {key: value for key, value in state.items() if not re.match(r"(backbone\.)?head\.", key)}
    for head in "head", "decode_head.conv_seg", "auxiliary_head.conv_seg":
        ours, theirs = expected.get(f"{head}.weight"), state.get(f"{head}.weight")
        if ours is None or (theirs is None and head != "head"):
            continue
        if theirs is None:
            found = "no classifier"
        elif theirs.shape[1:] == ours.shape[1:] and len(theirs) != len(ours):
            found = f"a classifier for {len(theirs)} classes instead of {len(ours)}"
        else:
            continue
        warnings.warn(f"these weights have {found}: {head} keeps its initial values", stacklevel=2)
        state.update((key, value) for key, value in expected.items() if key.startswith(f"{head}."))

    problems = {"missing": [key for key in expected if key not in state],
                "unexpected": [key for key in state if key not in expected],
                "of another shape": [f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
                                     for key, value in expected.items()
                                     if key in state and state[key].shape != value.shape]}
    if any(problems.values()):
        lists = [f"{problem}: {', '.join(keys[:4])}" + f" and {len(keys) - 4} more" * (len(keys) > 4)
                 for problem, keys in problems.items() if keys]
        raise ValueError("\n  ".join([f"the weights do not fit this {type(model).__name__}", *lists]))
    model.load_state_dict(state)
    return model
