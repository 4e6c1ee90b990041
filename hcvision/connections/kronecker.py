"""KromHC (arXiv 2601.21579): a doubly stochastic mixing matrix that is a Kronecker product of 2 x 2 matrices."""

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from hcvision.connections import layout, manifold
from hcvision.connections.manifold import ManifoldConnection


class KroneckerConnection(ManifoldConnection):
    """KromHC: mHC whose mixing matrix is a Kronecker product of doubly stochastic 2 x 2 matrices (arXiv 2601.21579).

    ::

        [p_k, q_k] = softmax(scale_res * x' @ phi_res + bias_res)[k]       # for each of K factors, n = 2^K
        U_k  = p_k I + q_k [[0, 1], [1, 0]]
        mix  = U_1 (x) U_2 (x) ... (x) U_K                                  # H_res, (n, n): row i is the next stream i

    These are the paper's eq. 10 and 14 with factors of two streams, all of the same scale. Doubly stochastic up to the
    rounding of products, with 2 log2(n) numbers in the place of n^2. x', read, write and their initial values are those
    of ``ManifoldConnection``, whose arguments these are; ``bias_res`` starts as [0, -8] for each factor, as in the
    paper's code: at n = 4 the mixing keeps all but 0.07 % of a stream. The residual model up to rounding.

    It costs parameters, dim * n * (2n + 2 log2(n)) a sub-layer.

    Raises:
        ValueError: a rate that is no power of 2 or less than 2, layer_index < 0, an unknown backend.
    """

    def __init__(self, dim: int, rate: int, layer_index: int = 0, **options):
        if not isinstance(rate, int) or rate < 2 or rate & (rate - 1):
            raise ValueError(f"krom mixes 2, 4, 8, ... streams, a power of 2, got {rate!r}")
        super().__init__(dim, rate, layer_index, **options)

    @property
    def name(self) -> str:
        """``krom4``, ..."""
        return f"krom{self.rate}"

    def first_mixing(self) -> Tensor:
        """See ``ManifoldConnection``."""
        return torch.tensor([0.0, -8.0]).repeat(self.rate.bit_length() - 1)

    def mixture(self, streams: Tensor, terms: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """See ``ManifoldConnection``."""
        phi, scale, bias = self.rule()
        return kronecker_weights(streams, phi, scale, bias, terms)


@torch.fx.wrap
def kronecker_weights(
    streams: Tensor, phi: List[Tensor], scale: List[Tensor], bias: List[Tensor], terms: Optional[Tensor]
) -> Tuple[Tensor, Tensor]:
    """alpha (..., S, 1+S) and beta (..., S) of streams (..., S, E)."""
    read, write, logits = manifold.find_logits(streams, phi, scale, bias, terms)
    weights = layout.split_last(logits, logits.shape[-1] // 2).softmax(-1)
    return manifold.join_mixing(read, multiply_factors(weights)), write


def multiply_factors(weights: Tensor) -> Tensor:
    """The Kronecker product of [[p, q], [q, p]]: (..., K, 2) -> (..., 2^K, 2^K)."""
    factors = torch.stack([weights, weights.flip(-1)], dim=-2)  # (..., K, 2, 2)
    product = factors[..., 0, :, :]
    for k in range(1, weights.shape[-2]):
        shape = list(product.shape)
        product = product[..., :, None, :, None] * factors[..., k, None, :, None, :]
        product = product.reshape(shape[:-2] + [2 * shape[-2], 2 * shape[-1]])  # noqa: RUF005 - TorchScript
    return product
