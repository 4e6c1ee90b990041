"""What the time of a diffusion model adds to the coefficients of a connection."""

from typing import Any, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision.connections import eager, reference
from hcvision.connections.modes import needs_operations, without_autocast
from hcvision.connections.reference import Options, Rule


class TimeTerm(nn.Module):
    """A term of each image beside the static coefficients, by the embedding e of its time, (B, D)::

        static_alpha + SiLU(e) @ fn_alpha,    static_beta + SiLU(e) @ fn_beta          # HC, FC
        bias_pre + SiLU(e) @ fn_pre, and so on                                         # mHC, iHC, inside the sigmoids

    The matrices start at zero, so that the start is the residual model. In DAR (arXiv 2605.20708) a time embedding that
    is added to the queries of depth attention gives most of what that gains in a diffusion transformer; SiLU and a
    linear map are how a DiT gives conditions to its blocks (adaLN). There is a row of D numbers for each static
    coefficient: D * n (n + 2) a sub-layer for HC and mHC of n streams, D * m (2m + 1) for FC, D * 2n for iHC.

    Args:
        dim: D.
        sizes: names of the matrices, and how many coefficients each of them is for.
    """

    def __init__(self, dim: int, sizes: dict[str, int], device: Any = None, dtype: Any = None):
        super().__init__()
        self.dim = dim
        for name, size in sizes.items():
            self.register_parameter(f"fn_{name}", nn.Parameter(torch.zeros(dim, size, device=device, dtype=dtype)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value, zero."""
        for parameter in self.parameters():
            parameter.zero_()

    def forward(self, time: Tensor, streams: Tensor) -> Tensor:
        """Time embeddings (B, D) and streams (B, ..., S, E) to the terms (B, 1, ..., K), in float32 at least."""
        return see_time(time, streams, list(self.parameters()))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


@torch.fx.wrap
def see_time(time: Tensor, streams: Tensor, maps: List[Tensor]) -> Tensor:
    """See ``TimeTerm.forward``. Raises ValueError when the embedding is not (B, D)."""
    dtype = torch.promote_types(streams.dtype, torch.float32)
    if time.dim() != 2 or time.shape != (streams.shape[0], maps[0].shape[0]):
        raise ValueError(
            f"the time embedding must be (B, {maps[0].shape[0]}) for streams of {streams.shape[0]} images, "
            f"got {tuple(time.shape)}"
        )
    with without_autocast(streams.device.type):
        terms = F.silu(time.to(dtype)) @ torch.cat(maps, dim=1).to(dtype)
    return terms.view(len(terms), *[1] * (streams.dim() - 3), -1)


@torch.fx.wrap
def mix_at(streams: Tensor, terms: Tensor, rule: Rule, options: Options) -> Tuple[Tensor, Tensor]:
    """alpha (..., S, V+S) and beta (..., S) of HC and FC for streams (..., S, E), with terms (B, 1, ..., K) of images.

    The terms are those of alpha, row by row, and then those of beta. Backward keeps the streams, and computes the rest
    again.
    """
    norm, center, tanh, _ = options
    count, columns = rule[0].shape

    def compute(streams: Tensor, terms: Tensor, *rule: Any) -> Tuple[Tensor, Tensor]:
        static, rows, scale = reference.prepare(rule, center and norm, streams.dtype)  # type: ignore[arg-type]
        numbers, _ = reference.coefficients(streams, static, rows, scale, norm, center, tanh)
        of_alpha, of_beta = terms.split([count * columns, count], dim=-1)
        added = torch.cat([of_alpha.unflatten(-1, (count, columns)), of_beta[..., None]], dim=-1)
        _, alpha, beta = reference.split_coefficients(numbers + added, True)
        return alpha, beta.contiguous()

    with without_autocast(streams.device.type):
        if needs_operations():
            return compute(streams, terms, *rule)
        return eager.KeepInputs.apply(compute, streams, terms, *rule)
