"""Hyper-Connections (arXiv 2409.19606): n copies of the hidden state."""

import torch
from torch import Tensor

from hcvision.connections.base import check_count
from hcvision.connections.streams import MixingConnection

ARRANGEMENTS = ("sequential", "parallel")


class HyperConnection(MixingConnection):
    """Hyper-Connection: n streams as wide as the model, one view (HC, arXiv 2409.19606, eq. 10-14).

    ::

        A_m, A_r, B = static ones + scales * tanh(LayerNorm(H) @ projections)   # of H, (n, dim)
        H = B^T branch(A_m^T H) + A_r^T H

    ``static_alpha`` (n, 1+n) is [A_m | A_r], ``static_beta`` (n,) is B, ``dynamic_alpha_fn`` [W_m | W_r],
    ``dynamic_beta_fn`` W_beta, and the scales are s_alpha and s_beta; the LayerNorm has no parameters. Enter with
    ``expand_streams`` and leave with ``reduce_streams``.

    At init (eq. 15) A_m is column k mod n of the identity in sub-layer k, A_r the identity and B ones: each reads one
    stream and writes to all, so that each stream is the Pre-Norm residual stream exactly. Projections start at 0 and
    scales at 0.01.

    Args:
        dim: width of the model, which is E.
        rate: expansion rate n.
        layer_index: k, counted from 0 over sub-layers: attention of block i is 2i, its MLP 2i + 1.
        dynamic: weights depend on the input (DHC) or not (SHC).
        tanh: squash the dynamic part.
        norm: normalise the streams before the dynamic projection.
        arrangement: ``sequential``, or ``parallel``: sub-layers start out in groups of n that read
            the same input (HC fig. 4, eq. 53-55).
        backend: ``torch``; the kernels (``connections/kernels/``), which raise where they cannot run: ``triton`` on a
            GPU, ``native`` on a CPU, for float32, where there is a C compiler; or ``auto``, which takes them for
            tensors that they can take.
        time_dim: width D of a time embedding that the coefficients see too; see ``TimeTerm``. The read then runs in
            PyTorch, and the write in a kernel where it can. None for none.

    Raises:
        ValueError: rate < 1, layer_index < 0, an unknown arrangement or backend.
    """

    def __init__(
        self,
        dim: int,
        rate: int,
        layer_index: int = 0,
        *,
        dynamic: bool = True,
        tanh: bool = True,
        norm: bool = True,
        arrangement: str = "sequential",
        backend: str = "auto",
        time_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count("rate", rate, 1)
        check_count("layer_index", layer_index, 0)
        if arrangement not in ARRANGEMENTS:
            raise ValueError(f"arrangement must be one of {', '.join(ARRANGEMENTS)}, got {arrangement!r}")
        super().__init__(dim, rate, 1, layer_index, dynamic, tanh, norm, backend, device, dtype, time_dim=time_dim)
        self.arrangement = arrangement
        self.reset_parameters()

    @property
    def name(self) -> str:
        """``shc2``, ``dhc4``, ..."""
        return f"{'d' if self.dynamic else 's'}hc{self.rate}"

    def initial_weights(self) -> tuple[Tensor, Tensor]:
        """HC eq. 15, or eq. 53-55 for the parallel arrangement; see ``StreamConnection``."""
        n, place = self.rate, self.layer_index % self.rate
        one, eye = torch.eye(n)[place], torch.eye(n)
        if self.arrangement == "sequential":
            read, carry, write = one, eye, torch.ones(n)
        elif place == 0:
            read, carry, write = torch.ones(n), torch.ones(n, n), one
        else:
            read, carry, write = one, eye, one
        return torch.cat([read[:, None], carry], dim=1), write
