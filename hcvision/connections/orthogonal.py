"""Orthogonal residual update (ORU, arXiv 2505.11881): of a branch output, what does not point along x is added."""

from typing import Tuple

import torch
from torch import Tensor

from hcvision.connections import steps
from hcvision.connections.base import check_alone, check_count
from hcvision.connections.streams import StreamConnection


class OrthogonalConnection(StreamConnection):
    """ORU: x + f(x) without the part of f(x) that points along x, in each token (arXiv 2505.11881, section 3).

    ::

        x = x + f(x) - (<x, f(x)> / (|x|^2 + 1e-6)) x

    The inner product is over the channels of a token, which the paper calls feature-wise and uses for ViTs. One stream,
    one view, no parameter. This is never the residual add: a model that is converted computes something else than
    before, of which ``convert`` warns.

    What a branch output adds depends on what it is. ``weights(x)``, which does not know it, is therefore an error,
    while ``hcvision inspect`` shows the weights that each token came to: 1 for the output, 1 - <x, f> / |x|^2 for x.

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
    starts_as_residual = False
    dynamic = True

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
        check_alone("oru", rate)
        check_count("layer_index", layer_index, 0)
        super().__init__(dim, 1, 1, 1, layer_index, backend)
        # nothing else here would know of a cast of the model
        self.register_buffer("empty", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @property
    def name(self) -> str:
        """``oru``."""
        return "oru"

    def reset_parameters(self) -> None:
        """There are none."""

    def parameter_dtype(self) -> torch.dtype:
        """See ``StreamConnection``."""
        return self.empty.dtype  # type: ignore[return-value]

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See ``StreamConnection``."""
        return steps.read_whole(streams)

    def update(self, streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, placeholder: Tensor) -> Tensor:
        """See ``StreamConnection``."""
        return steps.update_orthogonal(streams, output)

    @torch.jit.ignore
    def whole_weights(
        self, streams: Tensor, alpha: Tensor, beta: Tensor, output: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """alpha (..., 1, 2) and beta (..., 1) of a branch output (..., dim).

        Raises:
            ValueError: the output is not known.
        """
        if output is None:
            raise ValueError("the weights of oru depend on the branch output, of which x alone says nothing")
        x, output = streams.squeeze(-2).to(alpha.dtype), output.to(alpha.dtype)
        along = (x * output).sum(-1, keepdim=True) / (x.square().sum(-1, keepdim=True) + 1e-6)
        return torch.stack([alpha, 1 - along], dim=-1), beta

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
