"""LAuReL (arXiv 2411.07501): learned weights of both terms of the add, and a low-rank map of x."""

from typing import Tuple

import torch
from torch import Tensor, nn

from hcvision.connections import steps
from hcvision.connections.base import check_alone, check_count
from hcvision.connections.streams import StreamConnection

RANK = 16


class LaurelConnection(StreamConnection):
    """LAuReL-RW+LR: weights of both terms, and a low-rank map of x (arXiv 2411.07501, eq. 5).

    ::

        x = alpha f(x) + beta (x + B A x)
        alpha, beta = 2 sigmoid(logit_alpha), 2 sigmoid(logit_beta)

    ``low_rank_a`` (r, dim) is A and ``low_rank_b`` (dim, r) is B; one stream, one view. Of the paper's three forms the
    third, which reads earlier activations, is left out: it needs more than x. The rank r is 16, that of the paper's
    experiment on ImageNet, or dim where that is less. The paper bounds alpha and beta by a sigmoid or a softmax and
    leaves open by which; here each is twice a sigmoid, whose logits start at 0, so that both start as 1. B starts as
    zeros and A as 1 / sqrt(r dim) where the channel mod r is the row, 0 elsewhere (the paper's footnote 2): the
    residual add, to the bit.

    Args:
        dim: width of the model.
        rate: 1.
        layer_index: of the sub-layer; every one starts alike.
        backend: ``torch`` or ``auto``, which is the same here; there is no kernel.

    Raises:
        ValueError: another rate, layer_index < 0, backend ``triton`` or ``native``.
    """

    has_kernels = False
    mixes = False
    dynamic = False
    undecayed = ("logit_alpha", "logit_beta")
    parts = {"width": ("logit_beta", "low_rank"), "depth": ("logit_alpha",)}  # noqa: RUF012

    def __init__(
        self,
        dim: int,
        rate: int = 1,
        layer_index: int = 0,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_alone("laurel", rate)
        check_count("layer_index", layer_index, 0)
        super().__init__(dim, 1, 1, 1, layer_index, backend)
        rank = min(RANK, dim)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.logit_alpha, self.logit_beta = parameter(1), parameter(1)
        self.low_rank_a, self.low_rank_b = parameter(rank, dim), parameter(dim, rank)
        self.reset_parameters()

    @property
    def name(self) -> str:
        """``laurel``."""
        return "laurel"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        self.logit_alpha.zero_()
        self.logit_beta.zero_()
        rank = len(self.low_rank_a)
        rows = torch.arange(self.dim) % rank == torch.arange(rank)[:, None]
        self.low_rank_a.copy_(rows * (rank * self.dim) ** -0.5)
        self.low_rank_b.zero_()

    def parameter_dtype(self) -> torch.dtype:
        """See ``StreamConnection``."""
        return self.low_rank_a.dtype

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See ``StreamConnection``; alpha is A and B^T here, (2, r, dim), and beta the paper's alpha and beta, (2,)."""
        return steps.read_low_rank(streams, self.logit_alpha, self.logit_beta, self.low_rank_a, self.low_rank_b)

    def update(self, streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, placeholder: Tensor) -> Tensor:
        """See ``StreamConnection``."""
        return steps.update_low_rank(streams, output, alpha, beta)

    @torch.jit.ignore
    def whole_weights(
        self, streams: Tensor, alpha: Tensor, beta: Tensor, output: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """alpha (..., 1, 2), [1, beta of the paper], and beta (..., 1), its alpha.

        Of the low-rank map, which mixes channels, the part that leaves each channel where it is counts, by its mean:
        beta (1 + trace(B A) / dim).
        """
        ones = torch.ones_like(streams[..., 0], dtype=beta.dtype)
        kept = beta[1] * (1 + (alpha[0] * alpha[1]).sum() / self.dim)
        return torch.stack([ones, kept * ones], dim=-1), beta[0] * ones

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={len(self.low_rank_a)}"
