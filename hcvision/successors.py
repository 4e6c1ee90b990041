"""The successors of Hyper-Connections on the same seam: what they change is where alpha and beta come from.

=========================  ===========================================  =====================================
class                      alpha = [read | carry], beta                  at init, in a converted model
=========================  ===========================================  =====================================
``ManifoldConnection``     sigmoid | Sinkhorn, 2 sigmoid                the residual model, up to rounding
``IdentityConnection``     sigmoid | I, 2 sigmoid                       the residual model, up to rounding
``GeneralizedConnection``  as ``FracConnection``, beta mixes the views  the residual model to the bit
=========================  ===========================================  =====================================

What runs where (``backend``): the write of mHC has a kernel, its weights are PyTorch's; iHC needs none,
its write is one addcmul; GHC is PyTorch's. torch.compile fuses what is PyTorch's.

Letters in shapes: T tokens, S streams (n), V views (m), E stream width.
"""

from typing import TYPE_CHECKING, Any, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision import mixing, plain
from hcvision.connections import BUILDERS, MixingConnection, StreamConnection, check_count, check_fractions

ITERATIONS = 20


class ManifoldConnection(StreamConnection):
    """mHC: n streams with a doubly stochastic mixing matrix, all weights from all streams (arXiv 2512.24880, eq. 7-9).

    ::

        x' = RMSNorm(x)                                            # over all n * dim numbers
        read  = sigmoid(scale_pre * x' @ phi_pre + bias_pre)       # H_pre, (n,)
        write = 2 sigmoid(scale_post * x' @ phi_post + bias_post)  # H_post, (n,)
        mix   = sinkhorn(scale_res * x' @ phi_res + bias_res)      # H_res, (n, n): row i is the next stream i

    phi starts at 0 and the scales at 0.01. The papers leave the biases open; here the write starts as 1, the mixing as
    ``sinkhorn(8 I)``, which keeps all but 0.1 % of a stream (n = 4), and the read takes (1 + 1/n) / 2 of stream
    layer_index mod n and 1 / 2n of each other: 1 in all. As long as the streams are equal, as they are in a converted
    model, each is the residual stream, up to rounding (relative 1e-6 in float32). Reads of 1/n each would be that,
    too, but then all streams get the same gradients and stay equal for good: one stream, whatever n.

    It costs parameters, dim * n * (n^2 + 2n) a sub-layer, about 4 % of a ViT-S at n = 4, since the
    weights see all streams at once.

    Args:
        dim: width of the model, which is E.
        rate: expansion rate n.
        layer_index: k, counted from 0 over sub-layers.
        backend: ``auto``, ``torch``, ``triton`` or ``native``, in which the write is a kernel, or an error; see
            ``HyperConnection``.

    Raises:
        ValueError: rate < 2 (sigmoid < 1 cannot read all of one stream), layer_index < 0, an unknown backend.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    parts = {"width": ("_pre", "_res"), "depth": ("_post",)}  # noqa: RUF012
    undecayed = tuple(f"{what}_{part}" for what in ("scale", "bias") for part in ("pre", "post", "res"))
    dynamic = True
    mixes = True  # has H_res

    def __init__(
        self,
        dim: int,
        rate: int,
        layer_index: int = 0,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count("rate", rate, 2)
        check_count("layer_index", layer_index, 0)
        super().__init__(dim, rate, rate, 1, layer_index, backend)
        sizes = {"pre": rate, "post": rate, "res": rate * rate} if self.mixes else {"pre": rate, "post": rate}
        shapes = {"phi": lambda size: (rate * dim, size), "scale": lambda size: (1,), "bias": lambda size: (size,)}
        for what, shape in shapes.items():
            for part, size in sizes.items():
                setattr(self, f"{what}_{part}", nn.Parameter(torch.empty(shape(size), device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def name(self) -> str:
        """``mhc4``, ..."""
        return f"mhc{self.rate}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        for name, parameter in self.named_parameters():
            parameter.fill_(0.01 if name.startswith("scale") else 0.0)
        read = torch.full((self.rate,), 0.5 / self.rate)
        read[self.layer_index % self.rate] += 0.5
        self.bias_pre.copy_(read.logit())
        if self.mixes:
            self.bias_res.copy_(8 * torch.eye(self.rate).flatten())

    def rule(self) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """phi, the scales and the biases: of the read, of the write, of the mixing."""
        return (
            [self.phi_pre, self.phi_post, self.phi_res],
            [self.scale_pre, self.scale_post, self.scale_res],
            [self.bias_pre, self.bias_post, self.bias_res],
        )

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See ``StreamConnection``."""
        phi, scale, bias = self.rule()
        alpha, beta = manifold_weights(streams, phi, scale, bias)
        return mixing.read_streams(streams, alpha, beta, 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rate={self.rate}, layer_index={self.layer_index}"


class IdentityConnection(ManifoldConnection):
    """iHC: mHC whose streams are never mixed, H_res = I; read and write depend on the input.

    2 / (n + 2) of the parameters of ``ManifoldConnection``, the same initial values and arguments. The carried
    streams are the streams, so that no step but the write touches them, and that is one addcmul: there is
    no kernel, and backends ``triton`` and ``native`` are errors.
    """

    has_kernels = False
    mixes = False

    @property
    def name(self) -> str:
        """``ihc4``, ..."""
        return f"ihc{self.rate}"

    @torch.jit.ignore
    def whole_alpha(self, alpha: Tensor) -> Tensor:
        """(..., S, 1+S) of the read (..., S)."""
        same = torch.eye(self.streams, dtype=alpha.dtype, device=alpha.device)
        return torch.cat([alpha[..., None], same.expand(*alpha.shape, -1)], dim=-1)

    def rule(self) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """phi, the scales and the biases: of the read, of the write."""
        return (
            [self.phi_pre, self.phi_post],
            [self.scale_pre, self.scale_post],
            [self.bias_pre, self.bias_post],
        )


class GeneralizedConnection(MixingConnection):
    """GHC: n streams of width dim / m, m of which are as wide as the model (arXiv 2511.11238, eq. 10-16).

    Wider than the model by n / m, with views as in ``FracConnection``, and each stream takes of each view of the branch
    output::

        A = static_alpha + dynamic_alpha_scale * tanh(norm(H) @ dynamic_alpha_fn / sqrt(E))
        B = static_beta  + dynamic_beta_scale  * tanh(norm(H) @ dynamic_beta_fn / sqrt(E))
        H = B @ branch(A[:, :m]^T @ H) + A[:, m:]^T @ H

    ``static_alpha`` (n, m+n) is [A_o | A_hat], ``static_beta`` (n, m) is the paper's B transposed, the scales
    have their shapes and start at 1. The norm is RMSNorm with a weight. x enters as its m segments, over and over.
    Behind the last sub-layer a linear map brings the streams back to dim, after a normalisation of every dim
    numbers, which the paper leaves out at n / m = 1.5, and so do we. The map starts as the one that takes the
    first m segments. At init these are the residual model to the bit, and so is a converted model (with the
    normalisation, where the model normalises behind it, up to the eps of the two).

    Args:
        dim: width of the model.
        rate: (m, n), fractions of the model's width and segments that are carried.
        layer_index: of the sub-layer; every one starts alike.
        dynamic: weights depend on the input.
        tanh: squash the dynamic part.
        norm: normalise the streams before the dynamic projection.
        backend: ``torch`` or ``auto``, which is the same here; there is no kernel.

    Raises:
        ValueError: not 1 <= m < n, layer_index < 0, a dim that m does not divide, backend ``triton`` or ``native``.
    """

    center_norm = False
    has_kernels = False
    has_exit = True
    first_scale = 1.0

    def __init__(
        self,
        dim: int,
        rate: tuple[int, int],
        layer_index: int = 0,
        *,
        dynamic: bool = True,
        tanh: bool = True,
        norm: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        fractions, segments = rate
        check_count("fractions", fractions, 1)
        check_count("layer_index", layer_index, 0)
        if segments <= fractions:
            raise ValueError(
                f"ghc must carry more segments than the model has fractions, got {fractions} fractions and "
                f"{segments} segments; as many is what dfc{fractions} does"
            )
        check_fractions(dim, fractions)
        super().__init__(
            dim, segments, fractions, layer_index, dynamic, tanh, norm, backend, device, dtype, is_general=True
        )
        self.copies = -(-segments // fractions)
        self.exit: Any = nn.Identity()
        self.reset_parameters()

    @property
    def name(self) -> str:
        """``ghc2x3``, ..."""
        return f"ghc{self.views}x{self.streams}"

    def initial_weights(self) -> tuple[Tensor, Tensor]:
        """[I_m 0; 0 | I_n], and 1 where view and stream are the same segment of x."""
        m, n = self.views, self.streams
        beta = torch.eye(m).repeat(self.copies, 1)[:n]
        return torch.cat([torch.eye(n)[:, :m], torch.eye(n)], dim=1), beta

    def rule(self) -> mixing.Rule:
        """The parameters, the projections over sqrt(E)."""
        alpha_fn, beta_fn = self.dynamic_alpha_fn, self.dynamic_beta_fn
        if alpha_fn is not None and beta_fn is not None:
            alpha_fn, beta_fn = over_root(alpha_fn, self.stream_dim), over_root(beta_fn, self.stream_dim)
        return (
            self.static_alpha,
            self.static_beta,
            alpha_fn,
            beta_fn,
            self.dynamic_alpha_scale,
            self.dynamic_beta_scale,
            self.norm_weight,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        super().reset_parameters()
        if isinstance(self.exit, Reduction):
            self.exit.reset_parameters()

    @torch.jit.ignore
    def place_exit(self, wanted: bool) -> None:
        """Make the linear map behind the last sub-layer, or take it away; what is there and wanted stays."""
        if not wanted:
            self.exit = nn.Identity()
        elif isinstance(self.exit, nn.Identity):
            self.exit = Reduction(self.dim, self.width, like=self.static_alpha)

    def enter(self, x: Tensor, rate: int) -> Tensor:
        """The segments of x, over and over: (..., dim) -> (..., n * dim / m); x itself at a rate of 1."""
        return torch.cat([x] * rate, dim=-1)[..., : self.width] if rate > 1 else x

    def leave(self, x: Tensor, rate: int) -> Tensor:
        """(..., n * dim / m) -> (..., dim) by the linear map; x itself at a rate of 1."""
        return self.exit(x) if rate > 1 else x


@torch.fx.wrap
def over_root(fn: Tensor, number: int) -> Tensor:
    """fn / sqrt(number), in float32 at least."""
    return fn.to(torch.promote_types(fn.dtype, torch.float32)) * number**-0.5


class Reduction(nn.Linear):
    """Behind the last sub-layer of GHC: a normalisation of every ``dim`` numbers and a linear map (VWN, alg. 1).

    Where dim does not divide the width, as at 1.5 dim, there is no normalisation. The map starts as the one that takes
    the first dim numbers.
    """

    def __init__(self, dim: int, width: int, like: Tensor):
        self.groups = width // dim if width % dim == 0 else 0
        super().__init__(width, dim, bias=False, device=like.device, dtype=like.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """[I | 0]."""
        self.weight.copy_(torch.eye(*self.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., dim)."""
        if self.groups > 0:
            x = F.layer_norm(plain.split_last(x, self.groups), (x.shape[-1] // self.groups,), eps=1e-6).flatten(-2)
        return F.linear(x, self.weight)


BUILDERS.update(mhc=ManifoldConnection, ihc=IdentityConnection, ghc=GeneralizedConnection)


# The weights of mHC and iHC as functions of tensors, as in ``hcvision.mixing``.


@torch.fx.wrap
def manifold_weights(
    streams: Tensor, phi: List[Tensor], scale: List[Tensor], bias: List[Tensor]
) -> Tuple[Tensor, Tensor]:
    """alpha (..., S, 1+S) and beta (..., S) of streams (..., S, E), or alpha (..., S) if there is no third of each."""
    dtype = torch.promote_types(streams.dtype, torch.float32)
    count = streams.shape[-2]
    projected = mixing.project(streams.flatten(-2), torch.cat([part.transpose(-1, -2) for part in phi]).to(dtype))
    scales = torch.cat([s.expand(b.shape[0]) for s, b in zip(scale, bias, strict=True)]).to(dtype)
    logits = torch.addcmul(torch.cat(bias).to(dtype), scales, projected)
    read, write = logits[..., :count].sigmoid(), 2 * logits[..., count : 2 * count].sigmoid()
    if len(phi) == 2:
        return read, write
    mix = sinkhorn(plain.split_last(logits[..., 2 * count :], count))
    return torch.cat([read[..., None], mix.transpose(-1, -2)], dim=-1), write


def sinkhorn(logits: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """The matrices that exp(logits), (..., n, n), become when columns and rows are scaled to sum 1 in turn (mHC eq. 9).

    Doubly stochastic in the limit; the rows sum to 1 in any case, the columns to within 1e-4 for most logits, but near
    a permutation 20 iterations are few (8 I + noise of 1, n = 4: 0.3 % off, at worst 2 %). Backward goes through the
    same iterations, and keeps the logits alone. The first column and row are scaled as logarithms: from there on every
    row and column has a number of at least 1 / n^2, so that logits of any size are safe.
    """
    last = logits.dim() - 1  # counted from the front: ONNX has no other names
    logits = logits.movedim([last - 1, last], [0, 1]).contiguous()  # with the tokens last sums over 4 numbers are quick
    if torch.jit.is_scripting():
        scaled = _scale_in_turn(logits, iterations)[0][-1]
    else:
        scaled = _scale_in_turn(logits, iterations)[0][-1] if plain.is_plain() else _Sinkhorn.apply(logits, iterations)
    return scaled.movedim([0, 1], [last - 1, last])


def _scale_in_turn(logits: Tensor, iterations: int) -> Tuple[List[Tensor], List[Tensor]]:
    """The matrices (n, n, ...) after each column and each row, and the sums that the third and later came by."""
    columns = logits.log_softmax(0)
    steps, sums = [columns.exp(), columns.softmax(1)], [logits, logits]
    for _ in range(iterations - 1):
        for dim in range(2):
            sums.append(steps[-1].sum(dim, keepdim=True))
            steps.append(steps[-1] / sums[-1])
    return steps, sums


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(logits, iterations):
        return _scale_in_turn(logits, iterations)[0][-1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, ctx.iterations = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        steps, sums = _scale_in_turn(logits, ctx.iterations)
        grad = grad.contiguous()
        for k in reversed(range(2, len(steps))):
            grad = (grad - (grad * steps[k]).sum(k % 2, keepdim=True)) / sums[k]  # of a column i, or of a row
        grad = steps[1] * (grad - (grad * steps[1]).sum(1, keepdim=True))  # softmax of logarithms
        return grad - steps[0] * grad.sum(0, keepdim=True), None  # log_softmax
