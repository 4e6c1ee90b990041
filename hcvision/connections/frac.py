"""Frac-Connections (arXiv 2503.14125): the hidden state in m parts."""

import torch
from torch import Tensor

from hcvision.connections.base import check_count
from hcvision.connections.streams import MixingConnection


class FracConnection(MixingConnection):
    """Frac-Connection: the hidden state cut into m streams, m views (FC, arXiv 2503.14125, eq. 8-12).

    ::

        A_m, A_r, B = static ones + scales * tanh(RMSNorm(F) @ projections)    # of the fractions F, (m, dim / m)
        F = diag(B) branch(A_m^T F) + A_r^T F

    ``static_alpha`` (m, 2m) is [A_m | A_r], ``static_beta`` (m,) is B, ``dynamic_alpha_fn`` [W_m | W_r],
    ``dynamic_beta_fn`` W_beta, the scales are s_alpha and s_beta, and ``norm_weight`` is that of the RMSNorm.

    At init (eq. 13) both parts of A are identities and B is ones, in every sub-layer: bit-identical to the residual
    add. Projections start at 0 and scales at 0.01. There is no entry and no exit.

    Args:
        dim: width of the model; a stream has E = dim / m.
        rate: frac rate m.
        layer_index: index of the sub-layer; every frac-connection starts alike.
        dynamic: weights depend on the input (DFC) or not (SFC).
        tanh: squash the dynamic part.
        norm: normalise the streams before the dynamic projection.
        backend: ``torch``, ``triton``, ``native`` or ``auto``; see ``HyperConnection``.
        time_dim: width D of a time embedding that the coefficients see too; see ``TimeTerm``. The read then runs in
            PyTorch, and the write in a kernel where it can. None for none.

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
        time_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count("rate", rate, 1)
        check_count("layer_index", layer_index, 0)
        check_fractions(dim, rate)
        super().__init__(dim, rate, rate, layer_index, dynamic, tanh, norm, backend, device, dtype, time_dim=time_dim)
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
