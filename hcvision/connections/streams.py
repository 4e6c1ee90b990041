"""Connections that carry streams: their two steps, and static or dynamic weights."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from hcvision.connections import layout, recomputation, reference, steps, timing
from hcvision.connections.base import Connection, check_count
from hcvision.connections.timing import TimeTerm

BACKENDS = ("auto", "torch", "triton", "native")


class StreamConnection(Connection):
    """What all connections with streams have in common: the two steps, and their weights alpha and beta.

    Subclasses say where the weights come from (``read``). Mixing is elementwise and in float32 at least, whatever
    autocast says: the streams are the model's memory, and a matmul in bfloat16 would round them in every sub-layer.

    Between the steps go the carried streams in four parts: the streams that were read (..., S, E), alpha (..., S, V+S),
    beta (..., S), and a placeholder (..., S, E) for the carried streams in the graph of gradients.
    """

    has_kernels = True  # whether any step has a kernel
    mixes = True  # whether carried streams are mixtures of streams
    stream_dtype: Optional[torch.dtype]
    __jit_unused_properties__ = ["name"]  # noqa: RUF012 - TorchScript
    __constants__ = ["mixes"]  # noqa: RUF012 - TorchScript
    parts: Any = {"width": ("alpha",), "depth": ("beta",)}  # what parameters of a part have in their names  # noqa: RUF012

    def __init__(self, dim: int, rate: int, streams: int, views: int, layer_index: int, backend: str):
        super().__init__(dim, streams, views)
        self.rate, self.layer_index = rate, layer_index
        self.stream_dim = dim // views
        self.recompute = False  # the streams that are read are computed again in backward; see ``recompute_streams``
        self.records = False  # and those that are written: how they can be goes with them
        self.stream_dtype = None
        self.time = False  # whether the coefficients see the time of a diffusion model too, by a ``TimeTerm``
        self.backend = "auto"
        self.choose_backend(backend)

    @property
    def name(self) -> str:
        """The name that ``build_connection`` makes such a connection from."""
        raise NotImplementedError

    def add_time_term(self, dim: int | None, sizes: dict[str, int], device: Any, dtype: Any) -> None:
        """Have the coefficients see time embeddings of ``dim`` numbers, or none (None); see ``TimeTerm``."""
        if dim is not None:
            check_count("time_dim", dim, 1)
            self.time_term = TimeTerm(dim, sizes, device, dtype)
        self.time = dim is not None

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

    def read_at(self, streams: Tensor, time: Optional[Tensor]) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``read``, with the embedded times (B, D) of the images where the connection sees them and they are given."""
        if torch.jit.is_scripting():
            pass
        elif self.time and time is not None:
            return self.read_timed(streams, self.time_term(time, streams))
        return self.read(streams)

    @torch.jit.ignore
    def read_timed(self, streams: Tensor, terms: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``read`` with the terms (B, 1, ..., K) of the images' times; see ``TimeTerm``."""
        raise NotImplementedError

    def parameter_dtype(self) -> torch.dtype:
        """The type of the parameters, which is that of the model."""
        raise NotImplementedError

    def hand_over(self, view: Tensor) -> Tensor:
        """The branch input in the type of the model, where streams are stored in another."""
        return view if self.stream_dtype is None else view.to(self.parameter_dtype())

    def weights(self, x: Tensor, time: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """What the connection does with x, in float32 at least.

        Args:
            x: the streams, (..., S*E).
            time: embeddings of the images' times, (B, D), for connections that see them.

        Returns:
            alpha (..., S, V+S): row i says how much of stream i goes into each of the V views, then
            into each of the S carried streams. beta (..., S): how much of the branch output each
            stream takes; of GHC (..., S, V): of each view. Both have one more axis where every channel has weights of
            its own (SiHC): (..., E, S, V+S) and (..., E, S), and axes of size 1 where all tokens have the same.

        Raises:
            ValueError: x is not S*E wide.
        """
        streams, alpha, beta, _ = self.width_connection(x, time)[1]
        return self.whole_weights(streams, alpha, beta, None)

    @torch.jit.ignore
    def show_streams(self, carried: Tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """The streams (..., S, E) of what goes from step to step."""
        return carried[0]

    @torch.jit.ignore
    def show_carried(
        self, carried: Tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor | None = None
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """The streams of what goes from step to step, and what ``whole_weights`` says of it."""
        streams, alpha, beta, _ = carried
        return streams, *self.whole_weights(streams, alpha, beta, output)

    @torch.jit.ignore
    def whole_weights(
        self, streams: Tensor, alpha: Tensor, beta: Tensor, output: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What ``weights`` returns, of what goes from step to step, and of the branch output if that is known."""
        return alpha, beta

    def width_connection(
        self, x: Tensor, time: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor, Tensor]]:
        """First step: the branch input, and what the second step makes the carried streams of.

        Args:
            x: the streams, (..., S*E).
            time: embeddings of the images' times, (B, D), for connections that see them.

        Returns:
            The branch input, (..., V*E), in the dtype of x, or in that of the model where ``stream_dtype`` is set, and
            the carried streams for ``depth_connection``, which forms them; alpha and beta are in float32 at least.

        Raises:
            ValueError: x is not S*E wide, or the backend's kernels cannot take it.
        """
        if self.stream_dtype is not None:
            x = x.to(self.stream_dtype)
        streams = layout.split_streams(x, self.streams, self.stream_dim)
        if torch.jit.is_scripting():
            pass
        elif self.recompute:
            with recomputation.keep_recipe(x, streams):
                view, streams, alpha, beta, placeholder = self.read_at(streams, time)
            return self.hand_over(view), (streams, alpha, beta, placeholder)
        view, streams, alpha, beta, placeholder = self.read_at(streams, time)
        return self.hand_over(view), (streams, alpha, beta, placeholder)

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
        streams, alpha, beta, placeholder = carried
        output = layout.split_output(branch_output, streams, self.views)
        if torch.jit.is_scripting():
            pass
        elif records and torch.is_grad_enabled():
            return recomputation.depth_connection(self.update, streams, output, alpha, beta, placeholder)
        return self.update(streams, output, alpha, beta, placeholder)

    def update(self, streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, placeholder: Tensor) -> Tensor:
        """The next streams (..., S*E), from the branch output (..., V, E) and the carried streams in four parts.

        A block calls it of the connection behind the one whose parameters count (``join``): these are in the parts.
        """
        return steps.depth_connection(streams, output, alpha, beta, placeholder, self.backend)

    def join(
        self,
        branch_output: Tensor,
        carried: Tuple[Tensor, Tensor, Tensor, Tensor],
        time: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The second step of the sub-layer before, and the first step of this one; some have kernels that do both.

        Args:
            branch_output: of the sub-layer before, (..., V*E).
            carried: what its ``width_connection`` returned beside the branch input.
            time: as for ``width_connection``.

        Returns:
            What ``width_connection`` returns for the next streams.

        Raises:
            ValueError: branch_output is not shaped like the branch input.
        """
        return self.width_connection(self.write(branch_output, carried, self.recompute), time)

    def carry(self, x: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor]) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Between the steps, for blocks that scale x in their add: carry these streams, (..., S*E), instead.

        Raises:
            ValueError: x is not S*E wide.
        """
        _, alpha, beta, _ = carried
        streams = layout.split_streams(x, self.streams, self.stream_dim)
        if self.mixes:
            return streams, alpha, beta, steps.carry_streams(streams, alpha, beta, self.views)
        return streams, alpha, beta, streams


def carry_unmixed(read: Tensor) -> Tensor:
    """alpha (..., S, 1+S) of a read (..., S) of one view, where every stream is carried as it is."""
    same = torch.eye(read.shape[-1], dtype=read.dtype, device=read.device)
    return torch.cat([read[..., None], same.expand(*read.shape, -1)], dim=-1)


class MixingConnection(StreamConnection):
    """The weights of HC, FC and GHC, which differ in S and V, in the norm and in the initial values.

    Static weights are parameters; dynamic ones add to them what each stream says of itself (HC eq.
    10-14, FC eq. 8-12)::

        alpha = static_alpha + dynamic_alpha_scale * tanh(norm(H) @ dynamic_alpha_fn)
        beta  = static_beta  + dynamic_beta_scale  * tanh(norm(H) @ dynamic_beta_fn)

    ``static_alpha`` (S, V+S) is the papers' [A_m | A_r], ``static_beta`` (S,) is B,
    ``dynamic_alpha_fn`` (E, V+S) is [W_m | W_r], ``dynamic_beta_fn`` (E, 1) is W_beta, and the
    scales (1,) are s_alpha and s_beta. With a ``time_dim`` each image's time adds to the static ones; see ``TimeTerm``.
    """

    __constants__ = ["mixes", "center_norm"]  # noqa: RUF012 - TorchScript
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
        time_dim: int | None = None,
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
        self.add_time_term(time_dim, {"alpha": rate * mixtures, "beta": rate}, device, dtype)

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
        if self.time:
            self.time_term.reset_parameters()

    def rule(self) -> reference.Rule:
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

    def parameter_dtype(self) -> torch.dtype:
        """See ``StreamConnection``."""
        return self.static_alpha.dtype

    def options(self) -> reference.Options:
        """norm, center, tanh and backend."""
        return self.norm, self.center_norm, self.tanh, self.backend

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Streams (..., S, E) -> the branch input (..., V*E), and the carried streams in four parts."""
        return steps.width_connection(streams, self.rule(), self.options())

    @torch.jit.ignore
    def read_timed(self, streams: Tensor, terms: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See ``StreamConnection``."""
        alpha, beta = timing.mix_at(streams, terms, self.rule(), self.options())
        return steps.read_streams(streams, alpha, beta, self.views)

    def join(
        self,
        branch_output: Tensor,
        carried: Tuple[Tensor, Tensor, Tensor, Tensor],
        time: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor, Tensor]]:
        """See ``StreamConnection``."""
        if torch.jit.is_scripting():
            pass
        elif self.recompute or (self.time and time is not None):
            return self.width_connection(self.write(branch_output, carried, self.recompute), time)
        streams, alpha, beta, placeholder = carried
        output = layout.split_output(branch_output, streams, self.views)
        view, streams, alpha, beta, placeholder = steps.join_connections(
            streams, output, alpha, beta, placeholder, self.rule(), self.options()
        )
        return self.hand_over(view), (streams, alpha, beta, placeholder)

    def extra_repr(self) -> str:
        options = "".join(f", {name}=False" for name in ("tanh", "norm") if not getattr(self, name))
        return f"dim={self.dim}, rate={self.rate}, layer_index={self.layer_index}, dynamic={self.dynamic}{options}"
