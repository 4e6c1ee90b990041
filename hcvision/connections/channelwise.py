"""SiHC (arXiv 2609.33895): every channel reads and writes streams by weights of its own, and none are mixed."""

from typing import Tuple

import torch
from torch import Tensor, nn

from hcvision.connections import steps
from hcvision.connections.base import check_count
from hcvision.connections.entry import EnteredConnection
from hcvision.connections.streams import carry_unmixed


class ChannelwiseConnection(EnteredConnection):
    """SiHC: n streams, static weights for every channel of every stream, no mixing (arXiv 2609.33895).

    ::

        view[c] = sum_s read[s, c] X[s, c]
        X[s, c] = X[s, c] + write[s, c] branch(view)[c]

    ``read`` (n, dim) is the paper's alpha and ``write`` (n, dim) its beta, both transposed; the equations are those of
    its stage recurrence, one event per sub-layer (the variant that its code calls sublayer-wise). In the paper the
    streams hold different parts of a patch; here they are entered as copies, and the paper's initial values, which
    belong to its parts, are replaced by those of Hyper-Connections: ``read`` is stream k mod n in every channel, and
    ``write`` is 1. Each stream is then the residual stream, to the bit, and what the streams read differs from the
    first update on.

    Args:
        dim: width of the model, which is E.
        rate: n.
        layer_index: k, counted from 0 over sub-layers.
        backend: ``torch`` or ``auto``, which is the same here; there is no kernel.
        entry: ``copies``, streams start equal; or ``scaled``, they start different, and reads are 1/n each: the
            residual model up to rounding. See ``ScaledCopies``.

    Raises:
        ValueError: rate < 1, layer_index < 0, backend ``triton`` or ``native``, an unknown entry.
    """

    has_kernels = False
    mixes = False
    dynamic = False
    undecayed = ("read_weight", "write_weight", "scaled.scale")
    parts = {"width": ("read",), "depth": ("write",)}  # noqa: RUF012

    def __init__(
        self,
        dim: int,
        rate: int,
        layer_index: int = 0,
        *,
        backend: str = "auto",
        entry: str = "copies",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count("rate", rate, 1)
        check_count("layer_index", layer_index, 0)
        super().__init__(dim, rate, layer_index, backend, entry)
        self.read_weight = nn.Parameter(torch.empty(rate, dim, device=device, dtype=dtype))
        self.write_weight = nn.Parameter(torch.empty(rate, dim, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def name(self) -> str:
        """``sihc4``, ..."""
        return f"sihc{self.rate}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        self.read_weight.fill_(1 / self.rate if self.has_entry else 0.0)
        if not self.has_entry:
            self.read_weight[self.layer_index % self.rate] = 1.0
        self.reset_entry()
        self.write_weight.fill_(1.0)

    def parameter_dtype(self) -> torch.dtype:
        """See ``StreamConnection``."""
        return self.read_weight.dtype

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See ``StreamConnection``; alpha and beta are the read and the write (n, dim) here."""
        return steps.read_channels(streams, self.read_weight, self.write_weight)

    def update(self, streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, placeholder: Tensor) -> Tensor:
        """See ``StreamConnection``."""
        return steps.write_channels(streams, output, beta, placeholder)

    @torch.jit.ignore
    def whole_weights(
        self, streams: Tensor, alpha: Tensor, beta: Tensor, output: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """alpha (B, 1, ..., dim, n, 1+n) and beta (B, 1, ..., dim, n): the same for all tokens."""
        tokens = (*streams.shape[:1], *(1 for _ in streams.shape[1:-2])) if streams.dim() > 2 else ()
        read, write = (alpha.mT, beta.mT)
        whole = carry_unmixed(read)
        return whole.expand(*tokens, *whole.shape), write.expand(*tokens, *write.shape)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rate={self.rate}, layer_index={self.layer_index}"
