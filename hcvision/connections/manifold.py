"""Manifold-constrained Hyper-Connections (mHC, arXiv 2512.24880): a doubly stochastic mixing matrix."""

from typing import TYPE_CHECKING, Any, List, Optional, Tuple

import torch
from torch import Tensor, nn

from hcvision.connections import layout, reference, steps
from hcvision.connections.base import check_count
from hcvision.connections.entry import EnteredConnection
from hcvision.connections.functions import skip_binding
from hcvision.connections.modes import needs_operations

ITERATIONS = 20


class ManifoldConnection(EnteredConnection):
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
    too, but then all streams get the same gradients and stay equal for good: one stream, whatever n. With ``entry``
    ``scaled`` streams start different, and reads are 1/n each; see ``ScaledCopies``.

    It costs parameters, dim * n * (n^2 + 2n) a sub-layer, about 4 % of a ViT-S at n = 4, since the
    weights see all streams at once.

    Args:
        dim: width of the model, which is E.
        rate: expansion rate n.
        layer_index: k, counted from 0 over sub-layers.
        backend: ``auto``, ``torch``, ``triton`` or ``native``, in which the write is a kernel, or an error; see
            ``HyperConnection``.
        time_dim: width D of a time embedding that the coefficients see too, None for none; see ``TimeTerm``.
        entry: ``copies``, streams start equal; or ``scaled``.

    Raises:
        ValueError: rate < 2 (sigmoid < 1 cannot read all of one stream), layer_index < 0, an unknown backend or entry.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    parts = {"width": ("_pre", "_res"), "depth": ("_post",)}  # noqa: RUF012
    undecayed = (*(f"{what}_{part}" for what in ("scale", "bias") for part in ("pre", "post", "res")), "scaled.scale")
    dynamic = True

    def __init__(
        self,
        dim: int,
        rate: int,
        layer_index: int = 0,
        *,
        backend: str = "auto",
        time_dim: int | None = None,
        entry: str = "copies",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count("rate", rate, 2)
        check_count("layer_index", layer_index, 0)
        super().__init__(dim, rate, layer_index, backend, entry)
        sizes = {"pre": rate, "post": rate}
        if self.mixes:
            sizes["res"] = len(self.first_mixing())
        shapes = {"phi": lambda size: (rate * dim, size), "scale": lambda size: (1,), "bias": lambda size: (size,)}
        for what, shape in shapes.items():
            for part, size in sizes.items():
                setattr(self, f"{what}_{part}", nn.Parameter(torch.empty(shape(size), device=device, dtype=dtype)))
        self.add_time_term(time_dim, sizes, device, dtype)
        self.reset_parameters()

    @property
    def name(self) -> str:
        """``mhc4``, ..."""
        return f"mhc{self.rate}"

    def first_mixing(self) -> Tensor:
        """The initial logits of the mixing, one-dimensional, float32, on the CPU."""
        return 8 * torch.eye(self.rate).flatten()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        for name, parameter in self.named_parameters():
            parameter.fill_(0.01 if name.startswith("scale") else 0.0)
        read = torch.full((self.rate,), 1 / self.rate)
        if not self.has_entry:
            read /= 2
            read[self.layer_index % self.rate] += 0.5
        self.bias_pre.copy_(read.logit())
        self.reset_entry()
        if self.mixes:
            self.bias_res.copy_(self.first_mixing())

    def rule(self) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """phi, the scales and the biases: of the read, of the write, of the mixing."""
        return (
            [self.phi_pre, self.phi_post, self.phi_res],
            [self.scale_pre, self.scale_post, self.scale_res],
            [self.bias_pre, self.bias_post, self.bias_res],
        )

    def parameter_dtype(self) -> torch.dtype:
        """See ``StreamConnection``."""
        return self.bias_pre.dtype

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See ``StreamConnection``."""
        alpha, beta = self.mixture(streams)
        return steps.read_streams(streams, alpha, beta, 1)

    @torch.jit.ignore
    def read_timed(self, streams: Tensor, terms: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See ``StreamConnection``; the terms are added to the biases."""
        alpha, beta = self.mixture(streams, terms)
        return steps.read_streams(streams, alpha, beta, 1)

    def mixture(self, streams: Tensor, terms: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """alpha (..., S, 1+S) and beta (..., S) of streams (..., S, E)."""
        phi, scale, bias = self.rule()
        return manifold_weights(streams, phi, scale, bias, terms)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rate={self.rate}, layer_index={self.layer_index}"


@torch.fx.wrap
def manifold_weights(
    streams: Tensor, phi: List[Tensor], scale: List[Tensor], bias: List[Tensor], terms: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor]:
    """alpha (..., S, 1+S) and beta (..., S) of streams (..., S, E), or alpha (..., S) if there is no third of each.

    Terms (B, 1, ..., K) are added to the biases.
    """
    read, write, logits = find_logits(streams, phi, scale, bias, terms)
    if len(phi) == 2:
        return read, write
    return join_mixing(read, sinkhorn(layout.split_last(logits, streams.shape[-2]))), write


def find_logits(
    streams: Tensor, phi: List[Tensor], scale: List[Tensor], bias: List[Tensor], terms: Optional[Tensor]
) -> Tuple[Tensor, Tensor, Tensor]:
    """Read and write (..., S) of streams (..., S, E), and the logits of the mixing, if there is a third of each."""
    dtype = torch.promote_types(streams.dtype, torch.float32)
    count = streams.shape[-2]
    x, rows = streams.flatten(-2), torch.cat([part.transpose(-1, -2) for part in phi]).to(dtype)
    if torch.jit.is_scripting():  # noqa: SIM108 - TorchScript would compile both parts of an expression
        projected = reference.project(x, rows)
    else:
        projected = steps.project(x, rows)
    scales = torch.cat([s.expand(b.shape[0]) for s, b in zip(scale, bias, strict=True)]).to(dtype)
    logits = torch.addcmul(torch.cat(bias).to(dtype), scales, projected)
    if terms is not None:
        logits = logits + terms
    read, write = logits[..., :count].sigmoid(), 2 * logits[..., count : 2 * count].sigmoid()
    return read, write, logits[..., 2 * count :]


def join_mixing(read: Tensor, mix: Tensor) -> Tensor:
    """alpha (..., S, 1+S) of a read (..., S) and a mixing matrix (..., S, S), whose row i is the next stream i."""
    return torch.cat([read[..., None], mix.transpose(-1, -2)], dim=-1)


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
        scaled = scale_in_turn(logits, iterations)[0][-1]
    else:
        scaled = scale_in_turn(logits, iterations)[0][-1] if needs_operations() else Sinkhorn.apply(logits, iterations)
    return scaled.movedim([0, 1], [last - 1, last])


def scale_in_turn(logits: Tensor, iterations: int) -> Tuple[List[Tensor], List[Tensor]]:
    """The matrices (n, n, ...) after each column and each row, and the sums that the third and later came by."""
    columns = logits.log_softmax(0)
    steps, sums = [columns.exp(), columns.softmax(1)], [logits, logits]
    for _ in range(iterations - 1):
        for dim in range(2):
            sums.append(steps[-1].sum(dim, keepdim=True))
            steps.append(steps[-1] / sums[-1])
    return steps, sums


@skip_binding
class Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(logits, iterations):
        return scale_in_turn(logits, iterations)[0][-1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, ctx.iterations = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        steps, sums = scale_in_turn(logits, ctx.iterations)
        grad = grad.contiguous()
        for k in reversed(range(2, len(steps))):
            grad = (grad - (grad * steps[k]).sum(k % 2, keepdim=True)) / sums[k]  # of a column i, or of a row
        grad = steps[1] * (grad - (grad * steps[1]).sum(1, keepdim=True))  # softmax of logarithms
        return grad - steps[0] * grad.sum(0, keepdim=True), None  # log_softmax
