"""Frac-Connections (arXiv 2503.14125): the hidden state in m parts."""

import torch
from torch import Tensor

from hcvision.connections.base import check_count
from hcvision.connections.streams import MixingConnection


class FracConnection(MixingConnection):
    """Frac-Connection: the hidden state cut into m streams, m views (FC, arXiv 2503.14125).

    It needs no entry and no exit, and is bit-identical to the residual add at init. The norm before
    the dynamic projection is RMSNorm with a weight.

    Args:
        dim: width of the model; a stream has E = dim / m.
        rate: frac rate m.
        layer_index: index of the sub-layer; every frac-connection starts alike.
        dynamic: weights depend on the input (DFC) or not (SFC).
        tanh: squash the dynamic part.
        norm: normalise the streams before the dynamic projection.
        backend: ``torch``, ``triton``, ``native`` or ``auto``; see ``HyperConnection``.

    Raises:
        ValueError: rate < 1, layer_index < 0, a dim that the rate does not divide, an unknown backend.
    """

    center_norm = False

    def __init__(
        self,
        dim: int,
        rate: int,
        layer_index: int = 0,
        *,
        dynamic: bool = True,
        tanh: bool = True,
        norm: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count("rate", rate, 1)
        check_count("layer_index", layer_index, 0)
        check_fractions(dim, rate)
        super().__init__(dim, rate, rate, layer_index, dynamic, tanh, norm, backend, device, dtype)
        self.reset_parameters()

    @property
    def name(self) -> str:
        """``sfc2``, ``dfc4``, ..."""
        return f"{'d' if self.dynamic else 's'}fc{self.rate}"

    def initial_weights(self) -> tuple[Tensor, Tensor]:
        """[I_m | I_m] and ones (FC eq. 13); see ``StreamConnection``."""
        eye = torch.eye(self.rate)
        return torch.cat([eye, eye], dim=1), torch.ones(self.rate)


def check_fractions(dim: int, rate: int) -> None:
    if dim % rate:
        fitting = ", ".join(str(m) for m in range(1, min(dim, 16) + 1) if dim % m == 0)
        raise ValueError(
            f"dim must be divisible by the frac rate, got dim={dim} and rate={rate} (rates that fit: {fitting})"
        )
