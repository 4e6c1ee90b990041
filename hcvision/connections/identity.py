"""Identity Hyper-Connections: mHC that never mixes its streams."""

from typing import List, Tuple

import torch
from torch import Tensor

from hcvision.connections.manifold import ManifoldConnection
from hcvision.connections.streams import carry_unmixed


class IdentityConnection(ManifoldConnection):
    """iHC: mHC whose streams are never mixed, H_res = I; read and write depend on the input.

    2 / (n + 2) of the parameters of ``ManifoldConnection``, the same initial values and arguments. The carried
    streams are the streams, so that no step but the write touches them, and that is one addcmul: there is
    no kernel, and backends ``triton`` and ``native`` are errors.
    """

    has_kernels = False
    mixes = False

    @property
    def name(self) -> str:
        """``ihc4``, ..."""
        return f"ihc{self.rate}"

    @torch.jit.ignore
    def whole_weights(
        self, streams: Tensor, alpha: Tensor, beta: Tensor, output: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """alpha (..., S, 1+S) of the read (..., S), and the write."""
        return carry_unmixed(alpha), beta

    def rule(self) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """phi, the scales and the biases: of the read, of the write."""
        return (
            [self.phi_pre, self.phi_post],
            [self.scale_pre, self.scale_post],
            [self.bias_pre, self.bias_post],
        )
