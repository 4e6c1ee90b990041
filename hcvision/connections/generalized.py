"""Generalized Hyper-Connections (arXiv 2511.11238): streams of a fraction of the model's width."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision.connections import layout, reference
from hcvision.connections.base import check_count
from hcvision.connections.frac import check_fractions
from hcvision.connections.streams import MixingConnection


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
    takes_scaled = False
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

    def rule(self) -> reference.Rule:
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
            x = F.layer_norm(layout.split_last(x, self.groups), (x.shape[-1] // self.groups,), eps=1e-6).flatten(-2)
        return F.linear(x, self.weight)
