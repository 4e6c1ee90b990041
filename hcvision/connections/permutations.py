"""mHC-lite (arXiv 2601.05732): a mixing matrix that is a mixture of all permutations, exactly doubly stochastic."""

import math
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from hcvision.connections import manifold
from hcvision.connections.manifold import ManifoldConnection

MOST = 4  # streams: five would have 120 permutations


class PermutationConnection(ManifoldConnection):
    """mHC-lite: mHC whose mixing matrix is a mixture of the n! permutation matrices (arXiv 2601.05732).

    ::

        weights = softmax(scale_res * x' @ phi_res + bias_res)     # (n!,)
        mix     = sum_r weights[r] P_r                             # H_res, (n, n): row i is the next stream i

    Every doubly stochastic matrix is such a mixture (Birkhoff and von Neumann), and such a mixture is one up to the
    rounding of a sum, while 20 iterations of Sinkhorn's come near one. Permutations are in lexicographic order, the
    identity first. x', read, write and their initial values are those of ``ManifoldConnection``, whose arguments these
    are; ``bias_res`` starts as 0 for the identity and -8 for the others, as in the paper's code: at n = 4 the mixing
    keeps all but 0.6 % of a stream. The residual model up to rounding.

    It costs parameters, dim * n * (2n + n!) a sub-layer.

    Raises:
        ValueError: rate not 2, 3 or 4, layer_index < 0, an unknown backend.
    """

    def __init__(self, dim: int, rate: int, layer_index: int = 0, **options):
        if rate not in range(2, MOST + 1):
            raise ValueError(f"mhclite mixes 2 to {MOST} streams by their n! permutations, got {rate!r}")
        super().__init__(dim, rate, layer_index, **options)

    @property
    def name(self) -> str:
        """``mhclite4``, ..."""
        return f"mhclite{self.rate}"

    def first_mixing(self) -> Tensor:
        """See ``ManifoldConnection``."""
        logits = torch.full((math.factorial(self.rate),), -8.0)
        logits[0] = 0.0
        return logits

    def mixture(self, streams: Tensor, terms: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """See ``ManifoldConnection``."""
        phi, scale, bias = self.rule()
        return permutation_weights(streams, phi, scale, bias, terms)


@torch.fx.wrap
def permutation_weights(
    streams: Tensor, phi: List[Tensor], scale: List[Tensor], bias: List[Tensor], terms: Optional[Tensor]
) -> Tuple[Tensor, Tensor]:
    """alpha (..., S, 1+S) and beta (..., S) of streams (..., S, E)."""
    read, write, logits = manifold.find_logits(streams, phi, scale, bias, terms)
    return manifold.join_mixing(read, mix_permutations(logits.softmax(-1), streams.shape[-2])), write


def mix_permutations(weights: Tensor, count: int) -> Tensor:
    """The sum of permutation matrices with these weights, in lexicographic order: (..., n!) -> (..., n, n).

    From the last rows up: a permutation of m rows is the column j of the first of them, and a permutation of the
    others among the columns that j leaves.
    """
    mixed = weights[..., None, None]  # (..., n!, 1, 1): of the last row
    for m in range(2, count + 1):
        shape = list(mixed.shape)
        mixed = mixed.reshape(shape[:-3] + [shape[-3] // m, m, m - 1, m - 1])  # noqa: RUF005 - TorchScript
        columns: List[Tensor] = []
        for c in range(m):
            behind = mixed[..., c + 1 :, :, min(c, m - 2)].sum(-2)  # j > c: column c is still the c-th
            before = mixed[..., :c, :, max(c - 1, 0)].sum(-2)
            columns.append(before + behind)
        first = mixed[..., 0, :].sum(-1)  # (..., m): all that has j there
        mixed = torch.cat([first[..., None, :], torch.stack(columns, dim=-1)], dim=-2)
    return mixed[..., 0, :, :]
