"""Connections: what stands where a transformer had the residual add ``x = x + branch(x)``.

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
=========================  =============  =========  =======  =======  =====================================

The first three and the seam are here; the successors, which differ in how their weights come about, are in
``hcvision.successors``, the update rule itself in ``hcvision.mixing``.

Letters in shapes: B batch, N tokens, S streams, V views, E stream width, K mixtures.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Tuple

import torch
from torch import Tensor, nn

from hcvision import mixing, recomputation

KINDS = ("shc", "dhc", "sfc", "dfc", "mhc", "ihc", "ghc")
NAMES = (*(f"{kind}{rate}" for kind in KINDS[:4] for rate in (2, 4, 8)), "mhc4", "ihc4", "ghc2x3")  # timm names end so
ARRANGEMENTS = ("sequential", "parallel")
BACKENDS = ("auto", "torch", "triton", "native")


def parse_connection(name: str) -> tuple[str, Any]:
    """Split a connection's name into kind and rate: ``"dhc4"`` gives ``("dhc", 4)``, ``"ghc2x3"`` ``("ghc", (2, 3))``.

    ``"residual"`` gives ``("residual", 1)``. Every other spelling raises ValueError.
    """
    if name == "residual":
        return "residual", 1
    match = re.fullmatch(rf"({'|'.join(KINDS)})([1-9]\d*)(?:x([1-9]\d*))?", name) if isinstance(name, str) else None
    if match is None or (match[1] == "ghc") != (match[3] is not None):
        raise ValueError(
            f"connection must be 'residual' or one of {', '.join(KINDS[:-1])} followed by a rate of at least 1, such "
            f"as 'dhc2', or ghc followed by fractions x segments, such as 'ghc2x3', got {name!r}"
        )
    return match[1], (int(match[2]), int(match[3])) if match[3] else int(match[2])


def build_connection(name: str, dim: int, layer_index: int = 0, **options) -> "Connection":
    """Build a connection from its name.

    Args:
        name: ``residual``; static/dynamic + hyper/frac + rate: ``shc2``, ``dhc4``, ``sfc2``, ``dfc4``; or a
            successor: ``mhc4``, ``ihc4``, ``ghc2x3``.
        dim: width of the model (timm's embed_dim).
        layer_index: index of the sub-layer, counted from 0 over attention and MLP alike.
        **options: keyword arguments of the class: ``tanh``, ``norm``, ``backend``, ``device``, ``dtype``, and
            for hyper-connections ``arrangement``. ``residual`` has no parameter and ignores them.

    Raises:
        ValueError: an unknown name, a dim that the frac rate does not divide, an option out of range.
        TypeError: an option that the connection does not have.
    """
    kind, rate = parse_connection(name)
    if kind == "residual":
        return Residual(dim)
    return BUILDERS[kind](dim, rate, layer_index, **options)


def expand_streams(x: Tensor, rate: int) -> Tensor:
    """Enter the streams: n copies of x side by side (HC alg. 2). (..., E) -> (..., n*E)."""
    return torch.cat([x] * rate, dim=-1) if rate > 1 else x


def reduce_streams(x: Tensor, rate: int) -> Tensor:
    """Leave the streams: their mean. (..., n*E) -> (..., E).

    The paper takes the sum (HC alg. 2). The final norm that follows makes the two equal up to its
    eps, and only the mean makes a converted pretrained model exactly itself.
    """
    return mixing.average_streams(x, rate) if rate > 1 else x


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks wait for a call of the module: its own, or those of every module."""
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(own) or nn.modules.module._has_any_global_hook()


class Connection(nn.Module):
    """What all connections have: ``dim``, ``streams`` S, ``views`` V, and ``width`` = S * dim / V.

    ``width`` is the size of the last axis of x, the tensor between blocks.
    """

    copies: int  # of x that are entered, 1 where x is its own streams
    undecayed: tuple[str, ...] = ()  # parameters that must not decay
    has_exit = False  # whether ``leave`` has parameters

    def __init__(self, dim: int, streams: int, views: int):
        super().__init__()
        self.dim = dim
        self.streams = streams
        self.views = views
        self.width = streams * (dim // views)
        self.copies = streams // views

    @torch.jit.ignore
    def forward(
        self,
        x: Tensor,
        branch: Callable[[Tensor], Tensor],
        carry: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Do what ``x + branch(x)`` did, or ``carry(x) + branch(x)``.

        Args:
            x: the streams, (..., S*E).
            branch: the sub-layer with its pre-norm, (..., V*E) -> (..., V*E).
            carry: what the add does to x itself, (..., S*E) -> (..., S*E); see the method of that name.

        Returns:
            The next streams, (..., S*E), in the dtype of x.

        Raises:
            ValueError: x is not S*E wide, or the branch returned another shape than it was given.
        """
        branch_input, carried = self.width_connection(x)
        if carry is not None:
            carried = self.carry(carry(x), carried)
        return self.depth_connection(branch(branch_input), carried)

    def enter(self, x: Tensor, rate: int) -> Tensor:
        """Before the first sub-layer: the streams of x, (..., dim) -> (..., width); x itself at a rate of 1."""
        return expand_streams(x, rate)

    def leave(self, x: Tensor, rate: int) -> Tensor:
        """Behind the last one: what ``enter`` does undone, (..., width) -> (..., dim)."""
        return reduce_streams(x, rate)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay: it would erode A_r, which starts as I."""
        return {name for name, _ in self.named_parameters() if name in self.undecayed}

    def width_connection(self, x: Tensor) -> Tuple[Tensor, Any]:
        raise NotImplementedError

    def depth_connection(self, branch_output: Tensor, carried: Any) -> Tensor:
        raise NotImplementedError

    def carry(self, x: Tensor, carried: Any) -> Any:
        raise NotImplementedError

    def join(self, branch_output: Tensor, carried: Any) -> Tuple[Tensor, Any]:
        raise NotImplementedError


class Residual(Connection):
    """The residual add itself, ``x + branch(x)`` on (..., dim), without a parameter."""

    def __init__(self, dim: int):
        super().__init__(dim, streams=1, views=1)

    def weights(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """alpha = [[1, 1]] and beta = [1] for every token: (..., 1, 2) and (..., 1)."""
        beta = torch.ones_like(mixing.split_streams(x, 1, self.dim)[..., 0])
        return torch.stack([beta, beta], dim=-1), beta

    def width_connection(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """The branch input is x, and x is carried."""
        x = mixing.split_streams(x, 1, self.dim).squeeze(-2)
        return x, x

    def depth_connection(self, branch_output: Tensor, carried: Tensor) -> Tensor:
        """carried + branch_output, both (..., dim)."""
        return carried + mixing.split_output(branch_output, carried.unsqueeze(-2), 1).squeeze(-2)

    def carry(self, x: Tensor, carried: Tensor) -> Tensor:
        """x."""
        return mixing.split_streams(x, 1, self.dim).squeeze(-2)

    def join(self, branch_output: Tensor, carried: Tensor) -> Tuple[Tensor, Tensor]:
        """The add of the sub-layer before, and what this one reads."""
        return self.width_connection(self.depth_connection(branch_output, carried))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class StreamConnection(Connection):
    """What all connections with streams have in common: the two steps, and their weights alpha and beta.

    Subclasses say where the weights come from (``read``). Mixing is elementwise and in float32 at least, whatever
    autocast says: the streams are the model's memory, and a matmul in bfloat16 would round them in every sub-layer.
    """

    has_kernels = True  # whether any step has a kernel
    __jit_unused_properties__ = ["name"]  # noqa: RUF012 - TorchScript
    parts: Any = {"width": ("alpha",), "depth": ("beta",)}  # what parameters of a part have in their names  # noqa: RUF012

    def __init__(self, dim: int, rate: int, streams: int, views: int, layer_index: int, backend: str):
        super().__init__(dim, streams, views)
        self.rate, self.layer_index = rate, layer_index
        self.stream_dim = dim // views
        self.recompute = False  # the streams that are read are computed again in backward; see ``recompute_streams``
        self.records = False  # and those that are written: how they can be goes with them
        self.backend = "auto"
        self.choose_backend(backend)

    @property
    def name(self) -> str:
        """The name that ``build_connection`` makes such a connection from."""
        raise NotImplementedError

    @torch.jit.ignore
    def choose_backend(self, backend: str) -> None:
        """Run by ``auto``, ``torch``, ``triton`` or ``native``; see ``HyperConnection``.

        Raises:
            ValueError: there is no such backend, or no kernel for this connection.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if backend in ("triton", "native") and not self.has_kernels:
            raise ValueError(f"backend={backend!r} has no kernels for {self.name}; backend='auto' takes PyTorch")
        self.backend = backend

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Streams (..., S, E) -> the branch input (..., V*E), and the carried streams in four parts."""
        raise NotImplementedError

    def weights(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """What the connection does with x, in float32 at least.

        Args:
            x: the streams, (..., S*E).

        Returns:
            alpha (..., S, V+S): row i says how much of stream i goes into each of the V views, then
            into each of the S carried streams. beta (..., S): how much of the branch output each
            stream takes; of GHC (..., S, V): of each view.

        Raises:
            ValueError: x is not S*E wide.
        """
        _, alpha, beta, _ = self.width_connection(x)[1]
        return self.whole_alpha(alpha), beta

    @torch.jit.ignore
    def whole_alpha(self, alpha: Tensor) -> Tensor:
        """(..., S, V+S) of the alpha that goes from step to step."""
        return alpha

    def width_connection(self, x: Tensor) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor, Tensor]]:
        """First step: the branch input, and what the second step makes the carried streams of.

        Args:
            x: the streams, (..., S*E).

        Returns:
            The branch input, (..., V*E), in the dtype of x, and the carried streams for
            ``depth_connection``, which forms them: the streams (..., S, E), alpha (..., S, V+S) and beta
            (..., S), the coefficients in float32 at least, and the link (..., S, E), which stands for the
            carried streams in the graph of gradients.

        Raises:
            ValueError: x is not S*E wide, or the backend's kernels cannot take it.
        """
        streams = mixing.split_streams(x, self.streams, self.stream_dim)
        if torch.jit.is_scripting():
            pass
        elif self.recompute:
            with recomputation.keep_recipe(x, streams):
                view, streams, alpha, beta, link = self.read(streams)
            return view, (streams, alpha, beta, link)
        view, streams, alpha, beta, link = self.read(streams)
        return view, (streams, alpha, beta, link)

    def depth_connection(self, branch_output: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Second step: the next streams. The carried streams are formed here, and only here.

        Args:
            branch_output: (..., V*E).
            carried: what ``width_connection`` returned beside the branch input.

        Returns:
            The next streams, (..., S*E), in the dtype of x.

        Raises:
            ValueError: branch_output is not shaped like the branch input.
        """
        return self.write(branch_output, carried, self.records)

    def write(self, branch_output: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor], records: bool) -> Tensor:
        """``depth_connection``; ``records`` says whether the next streams can be computed again."""
        streams, alpha, beta, link = carried
        output = mixing.split_output(branch_output, streams, self.views)
        if torch.jit.is_scripting():
            pass
        elif records and torch.is_grad_enabled():
            return recomputation.recomputable(streams, output, alpha, beta, link, self.backend)
        return mixing.depth_connection(streams, output, alpha, beta, link, self.backend)

    def join(
        self, branch_output: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The second step of the sub-layer before, and the first step of this one; some have kernels that do both.

        Args:
            branch_output: of the sub-layer before, (..., V*E).
            carried: what its ``width_connection`` returned beside the branch input.

        Returns:
            What ``width_connection`` returns for the next streams.

        Raises:
            ValueError: branch_output is not shaped like the branch input.
        """
        return self.width_connection(self.write(branch_output, carried, self.recompute))

    def carry(self, x: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor]) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Between the steps, for blocks that scale x in their add: carry these streams, (..., S*E), instead.

        Raises:
            ValueError: x is not S*E wide.
        """
        _, alpha, beta, _ = carried
        streams = mixing.split_streams(x, self.streams, self.stream_dim)
        return streams, alpha, beta, mixing.carry_streams(streams, alpha, self.views)


class MixingConnection(StreamConnection):
    """The weights of HC, FC and GHC, which differ in S and V, in the norm and in the initial values.

    Static weights are parameters; dynamic ones add to them what each stream says of itself (HC eq.
    10-14, FC eq. 8-12)::

        alpha = static_alpha + dynamic_alpha_scale * tanh(norm(H) @ dynamic_alpha_fn)
        beta  = static_beta  + dynamic_beta_scale  * tanh(norm(H) @ dynamic_beta_fn)

    ``static_alpha`` (S, V+S) is the papers' [A_m | A_r], ``static_beta`` (S,) is B,
    ``dynamic_alpha_fn`` (E, V+S) is [W_m | W_r], ``dynamic_beta_fn`` (E, 1) is W_beta, and the
    scales (1,) are s_alpha and s_beta.
    """

    __constants__ = ["center_norm"]  # noqa: RUF012 - TorchScript
    center_norm = True  # the dynamic weights see LayerNorm (True) or RMSNorm (False) of a stream
    first_scale = 0.01
    undecayed = ("static_alpha", "static_beta", "dynamic_alpha_scale", "dynamic_beta_scale", "norm_weight")

    def __init__(
        self,
        dim: int,
        rate: int,
        views: int,
        layer_index: int,
        dynamic: bool,
        tanh: bool,
        norm: bool,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        is_general: bool = False,
    ):
        super().__init__(dim, rate, rate, views, layer_index, backend)
        self.dynamic, self.tanh, self.norm = dynamic, tanh, norm
        mixtures = views + rate

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        beta = (rate, views) if is_general else (rate,)
        self.static_alpha: Any = parameter(True, rate, mixtures)
        self.static_beta: Any = parameter(True, *beta)
        self.dynamic_alpha_fn: Any = parameter(dynamic, self.stream_dim, mixtures)
        self.dynamic_beta_fn: Any = parameter(dynamic, self.stream_dim, views if is_general else 1)
        self.dynamic_alpha_scale: Any = parameter(dynamic, *((rate, mixtures) if is_general else (1,)))
        self.dynamic_beta_scale: Any = parameter(dynamic, *(beta if is_general else (1,)))
        self.norm_weight: Any = parameter(dynamic and norm and not self.center_norm, self.stream_dim)

    def initial_weights(self) -> tuple[Tensor, Tensor]:
        """``static_alpha`` (S, V+S) and ``static_beta`` at init, float32, on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        alpha, beta = self.initial_weights()
        self.static_alpha.copy_(alpha)
        self.static_beta.copy_(beta)
        if self.dynamic:
            self.dynamic_alpha_fn.zero_()
            self.dynamic_beta_fn.zero_()
            self.dynamic_alpha_scale.fill_(self.first_scale)
            self.dynamic_beta_scale.fill_(self.first_scale)
        if self.norm_weight is not None:
            self.norm_weight.fill_(1.0)

    def rule(self) -> mixing.Rule:
        """The parameters, for the functions below."""
        return (
            self.static_alpha,
            self.static_beta,
            self.dynamic_alpha_fn,
            self.dynamic_beta_fn,
            self.dynamic_alpha_scale,
            self.dynamic_beta_scale,
            self.norm_weight,
        )

    def options(self) -> mixing.Options:
        """norm, center, tanh and backend."""
        return self.norm, self.center_norm, self.tanh, self.backend

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Streams (..., S, E) -> the branch input (..., V*E), and the carried streams in four parts."""
        return mixing.width_connection(streams, self.rule(), self.options())

    def join(
        self, branch_output: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor, Tensor]]:
        """See ``StreamConnection``."""
        if torch.jit.is_scripting():
            pass
        elif self.recompute:
            return self.width_connection(self.write(branch_output, carried, True))
        streams, alpha, beta, link = carried
        output = mixing.split_output(branch_output, streams, self.views)
        view, streams, alpha, beta, link = mixing.join_connections(
            streams, output, alpha, beta, link, self.rule(), self.options()
        )
        return view, (streams, alpha, beta, link)

    def extra_repr(self) -> str:
        options = "".join(f", {name}=False" for name in ("tanh", "norm") if not getattr(self, name))
        return f"dim={self.dim}, rate={self.rate}, layer_index={self.layer_index}, dynamic={self.dynamic}{options}"


class HyperConnection(MixingConnection):
    """Hyper-Connection: n streams as wide as the model, one view (HC, arXiv 2409.19606).

    Enter with ``expand_streams`` and leave with ``reduce_streams``. At init sub-layer k reads stream
    k mod n and writes to all streams, so that each stream is the Pre-Norm residual stream exactly.
    The norm before the dynamic projection is LayerNorm without parameters.

    Args:
        dim: width of the model, which is E.
        rate: expansion rate n.
        layer_index: k, counted from 0 over sub-layers: attention of block i is 2i, its MLP 2i + 1.
        dynamic: weights depend on the input (DHC) or not (SHC).
        tanh: squash the dynamic part.
        norm: normalise the streams before the dynamic projection.
        arrangement: ``sequential``, or ``parallel``: sub-layers start out in groups of n that read
            the same input (HC fig. 4, eq. 53-55).
        backend: ``torch``; the kernels of ``hcvision.kernels``, which raise where they cannot run: ``triton`` on a
            GPU, ``native`` on a CPU, for float32, where there is a C compiler; or ``auto``, which takes them for
            tensors that they can take.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count("rate", rate, 1)
        check_count("layer_index", layer_index, 0)
        if arrangement not in ARRANGEMENTS:
            raise ValueError(f"arrangement must be one of {', '.join(ARRANGEMENTS)}, got {arrangement!r}")
        super().__init__(dim, rate, 1, layer_index, dynamic, tanh, norm, backend, device, dtype)
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


BUILDERS: dict[str, Callable[..., Connection]] = {  # by kind, called with dim, rate, layer_index and options
    "shc": functools.partial(HyperConnection, dynamic=False),
    "dhc": functools.partial(HyperConnection, dynamic=True),
    "sfc": functools.partial(FracConnection, dynamic=False),
    "dfc": functools.partial(FracConnection, dynamic=True),
}


def check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_fractions(dim: int, rate: int) -> None:
    if dim % rate:
        fitting = ", ".join(str(m) for m in range(1, min(dim, 16) + 1) if dim % m == 0)
        raise ValueError(
            f"dim must be divisible by the frac rate, got dim={dim} and rate={rate} (rates that fit: {fitting})"
        )
