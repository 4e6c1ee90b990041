"""Gated Residual (arXiv 2608.30320): a token's gates read every channel of every stream, and none are mixed."""

from typing import Tuple

import torch
from torch import Tensor, nn

from hcvision.connections import reference, steps
from hcvision.connections.base import check_count
from hcvision.connections.entry import EnteredConnection
from hcvision.connections.streams import carry_unmixed


class GatedConnection(EnteredConnection):
    """GR: n streams, read by a gate for every channel of a token, written by a number a stream (arXiv 2608.30320).

    ::

        R^ = RMSNorm(R)                                                    # of each stream R_i
        G  = 2 sigmoid(gate_up @ SiLU(gate_down @ vec(R^) / n))            # (n, dim), by r = dim / 8 numbers
        s  = 2 sigmoid(write_fn @ vec(R^) / n)                             # (n,)
        view = sum_i gain_i * G_i * R_i
        R_i  = R_i + s_i branch(view)

    ``gate_down`` (r, n * dim), ``gate_up`` (n * dim, r) and ``write_fn`` (n, n * dim) are the paper's W_d, W_u and W_w
    (eq. 30 to 34), ``gain`` (n, dim) its gains gamma_i. There the read takes the place of the branch's norm; here a
    branch keeps its own, so that a model that is converted stays what it is, and the read takes the streams as they
    are: the gains, which the paper gives to the norm, are given to the read alone, and the paper's mean over streams
    and its sigmoid are in them and in a factor of 2.

    The paper leaves the initial values open. Here ``gain`` is stream k mod n in every channel, ``gate_up`` and
    ``write_fn`` are zeros, so that gates and writes are 1: every stream is the residual stream, to the bit.
    ``gate_down`` is drawn from a normal distribution of variance 1 / dim by a generator of its own, from the seed k: to
    convert a model draws nothing from PyTorch's.

    It costs parameters, dim * n * (2r + n + 1) a sub-layer, 17 % of a ViT-S at n = 4.

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
    dynamic = True
    undecayed = ("gain", "scaled.scale")
    parts = {"width": ("gain", "gate"), "depth": ("write",)}  # noqa: RUF012

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
        rank, width = max(1, dim // 8), rate * dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.gain = parameter(rate, dim)
        self.gate_down, self.gate_up = parameter(rank, width), parameter(width, rank)
        self.write_fn = parameter(rate, width)
        self.reset_parameters()

    @property
    def name(self) -> str:
        """``gr4``, ..."""
        return f"gr{self.rate}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        self.gain.fill_(1 / self.rate if self.has_entry else 0.0)
        if not self.has_entry:
            self.gain[self.layer_index % self.rate] = 1.0
        self.reset_entry()
        generator = torch.Generator().manual_seed(self.layer_index)
        self.gate_down.copy_(torch.randn(self.gate_down.shape, generator=generator) * self.dim**-0.5)
        self.gate_up.zero_()
        self.write_fn.zero_()

    def parameter_dtype(self) -> torch.dtype:
        """See ``StreamConnection``."""
        return self.gain.dtype

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See ``StreamConnection``; alpha is what the gates are made of, (..., r)."""
        return steps.read_gated(streams, self.gate_down, self.gate_up, self.gain, self.write_fn)

    @torch.jit.ignore
    def whole_weights(
        self, streams: Tensor, alpha: Tensor, beta: Tensor, output: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """alpha (..., n, 1+n), whose read is the mean over channels, and beta (..., n).

        Beside connections that write every channel alike the mean over channels may be taken before weights are
        multiplied out. Not where streams were entered with a scale for each channel: (..., dim, n, 1+n) and (..., 1, n)
        there.
        """
        gates = reference.open_gates(alpha, self.gate_up.to(alpha.dtype), self.gain.to(alpha.dtype))
        if self.has_entry:
            return carry_unmixed(gates.mT), beta[..., None, :]
        return carry_unmixed(gates.mean(-1)), beta

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rate={self.rate}, layer_index={self.layer_index}"
