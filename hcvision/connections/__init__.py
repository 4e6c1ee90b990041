"""Connections: what stands where a transformer had the residual add ``x = x + branch(x)``. Needs torch alone.

A connection carries S streams of width E side by side on the last axis of x, and gives the
branch V mixtures of them, the views::

    H = x.unflatten(-1, (S, E))
    alpha, beta = connection.weights(x)                       # (..., S, V+S), (..., S)
    views, carried = (alpha^T @ H).split((V, S), dim=-2)      # width_connection(x)
    x = beta * branch(views) + carried                        # depth_connection(branch(views), carried)

=========================  =============  =========  =======  =======  =====================================
class                      name           streams S  views V  width E  source
=========================  =============  =========  =======  =======  =====================================
``Residual``               ``residual``   1          1        dim      He et al. 2015, arXiv 1512.03385
``HyperConnection``        ``shc2 dhc4``  n          1        dim      Hyper-Connections, arXiv 2409.19606
``FracConnection``         ``sfc2 dfc4``  m          m        dim / m  Frac-Connections, arXiv 2503.14125
``ManifoldConnection``     ``mhc4``       n          1        dim      mHC, arXiv 2512.24880
``IdentityConnection``     ``ihc4``       n          1        dim      mHC that never mixes its streams
``GeneralizedConnection``  ``ghc2x3``     n          m        dim / m  Virtual Width Networks, arXiv 2511.11238
``ChannelwiseConnection``  ``sihc4``      n          1        dim      SiHC, arXiv 2609.33895
``GatedConnection``        ``gr4``        n          1        dim      Gated Residual, arXiv 2608.30320
``OrthogonalConnection``   ``oru``        1          1        dim      Orthogonal residual update, arXiv 2505.11881
``LaurelConnection``       ``laurel``     1          1        dim      LAuReL, arXiv 2411.07501
``PermutationConnection``  ``mhclite4``   n          1        dim      mHC-lite, arXiv 2601.05732
``KroneckerConnection``    ``krom4``      n          1        dim      KromHC, arXiv 2601.21579
=========================  =============  =========  =======  =======  =====================================

``base.py`` is the seam and ``streams.py`` what all connections with streams share; each kind has a file of its own;
``names.py`` builds one from its name. How a step runs is chosen in ``steps.py`` alone: as kernels (``kernels/``), or as
the operations of ``reference.py``, which every other form has to equal.

Letters in shapes: B batch, N tokens, S streams, V views, E stream width, K mixtures.
"""

from hcvision.connections import layout
from hcvision.connections.base import Connection, Residual, check_count, expand_streams, has_hooks, reduce_streams
from hcvision.connections.frac import FracConnection
from hcvision.connections.generalized import GeneralizedConnection
from hcvision.connections.history import HistoryConnection, Place
from hcvision.connections.hyper import HyperConnection
from hcvision.connections.identity import IdentityConnection
from hcvision.connections.manifold import ITERATIONS, ManifoldConnection
from hcvision.connections.names import NAMES, NEED_TIME, TIMED, build_connection, has_history, parse_connection
from hcvision.connections.streams import BACKENDS, StreamConnection

__all__ = [
    "BACKENDS",
    "ITERATIONS",
    "NAMES",
    "NEED_TIME",
    "TIMED",
    "Connection",
    "FracConnection",
    "GeneralizedConnection",
    "HistoryConnection",
    "HyperConnection",
    "IdentityConnection",
    "ManifoldConnection",
    "Place",
    "Residual",
    "StreamConnection",
    "build_connection",
    "check_count",
    "expand_streams",
    "has_history",
    "has_hooks",
    "layout",
    "parse_connection",
    "reduce_streams",
]
