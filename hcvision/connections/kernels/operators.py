"""The kernels as operators of PyTorch with gradients: those in Triton, and those in C.

Both have the same two. ``forward`` is the depth-connection of a sub-layer, the width-connection of the next one, or
both joined; ``backward`` goes back through the same. Bytes they move, per token, in vectors of E numbers (S streams,
V views)::

                 forward              backward
    width        S + V                3S + V
    depth        2S + V               S + 2V
    joined       2S + 2V              3S + 3V

What they keep for backward are the streams and the branch output: the coefficients are computed again
from the streams. Arithmetic and coefficients are float32; streams of any width E, at rates 1 to 8. Sums over tokens
are taken in a fixed order: the same input gives the same bits, always.

Here they are operators of PyTorch with a gradient, so that torch.compile, DDP, FSDP, gradient checkpointing and CUDA
graphs take them as they take any other. A second derivative is that of PyTorch's operations. Their names end in a
key of this chapter's source (``torch.ops.hcvision.width_1a2b3c4d``): what torch.compile keeps on disk from one process
to the next knows an operator by its name, and would run an older release's backward.

Between the two steps of a connection runs a ``placeholder``, a tensor without memory that stands for the
carried streams alpha^T @ H: its gradient is theirs, which the backward of the width-connection takes
back to H in the pass in which it reads H anyway.

Letters in shapes: T tokens, S streams, V views, E stream width, K = V + S + 1 coefficients of a stream.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hcvision.connections import reference
from hcvision.connections.functions import skip_binding
from hcvision.connections.kernels import native, triton
from hcvision.connections.modes import needs_operations_backward

DTYPES = triton.DTYPES  # that the branch output may have
MOST_STREAMS = 8


def hash_sources(folder: Path) -> str:
    """Eight hexadecimal digits that change with every file of Python or C in a folder and in those within it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


KEY = hash_sources(Path(__file__).parents[1])


def find_obstacle(streams: Tensor, views: int, kernel: str) -> str | None:
    """Why the kernels, ``native`` or ``triton``, cannot take these streams (..., S, E), or None."""
    if streams.shape[-2] > MOST_STREAMS:
        return f"they take rates up to {MOST_STREAMS}, got {streams.shape[-2]}"
    return (native if kernel == "native" else triton).find_obstacle(streams, views)


def take_type(output: Tensor, streams: Tensor) -> Tensor:
    """The branch output itself, which may have a type of its own, as under autocast, or in that of the streams."""
    return output if output.dtype in DTYPES else output.to(streams.dtype)


def _sizes(streams: Tensor, views: int) -> tuple[int, int, int, int]:
    """T, S, V, E."""
    S, E = streams.shape[-2:]
    return streams.numel() // (S * E) if S * E else 0, S, views, E


def _forward(
    streams: Tensor,
    views: int,
    depth: Optional[Tuple[Tensor, Tensor, Tensor]],
    width: Optional[Tuple[Tensor, Optional[Tensor], Optional[Tensor], bool, bool, bool]],
    native_code: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward kernel writes: the next streams, and their views, alpha and beta."""
    output, alpha, beta = (part.contiguous() for part in depth) if depth else (None,) * 3
    static, rows, scale, *flags = width or (None, None, None, False, False, False)
    following = torch.empty(streams.shape if depth else (0,), dtype=streams.dtype, device=streams.device)
    read = [streams.contiguous(), output, alpha, beta, static, rows, scale]
    written = [following, *(_forward_outputs(streams, views) if width else (following,) * 3)]
    (native if native_code else triton).forward(read + written, _sizes(streams, views), flags)
    return written[0], written[1], written[2], written[3]


def _forward_outputs(streams: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Empty views (..., V, E), alpha (..., S, V+S) and beta (..., S)."""
    *lead, S, E = streams.shape
    return (
        torch.empty((*lead, views, E), dtype=streams.dtype, device=streams.device),
        torch.empty((*lead, S, views + S), dtype=torch.float32, device=streams.device),
        torch.empty((*lead, S), dtype=torch.float32, device=streams.device),
    )


def _backward(
    grad_carried: Tensor,
    views: int,
    depth: Optional[Tuple[Tensor, Tensor]],
    width: Optional[Tuple[Any, ...]],
    native_code: bool,
) -> list[Tensor]:
    """What the backward kernel writes: the gradients of streams, static, rows, scale, output and beta."""
    output, beta = (part.contiguous() for part in depth) if depth else (None, None)
    streams = grad_views = grad_alpha = grad_beta = static = rows = scale = None
    flags = [False, False, False]
    if width:
        streams, grad_views, grad_alpha, grad_beta, static, rows, scale, *flags = width
        streams, grad_views, grad_beta = streams.contiguous(), grad_views.contiguous(), grad_beta.contiguous()
        grad_alpha = _dense(grad_alpha)
    read = [streams, grad_views, grad_carried.contiguous(), grad_alpha, grad_beta, static, rows, scale, output, beta]
    written = [None if part is None else torch.empty_like(part) for part in (streams, output, beta)]
    sums = (native if native_code else triton).backward(read, written, _sizes(grad_carried, views), flags)
    grads = [written[0], *sums] if width else []
    grads += written[1:] if depth else []
    return [grad_carried.new_empty(0, dtype=torch.float32) if part is None else part for part in grads]


def _make_placeholder(streams: Tensor) -> Tensor:
    """As large as the streams, without memory."""
    return torch.empty((), dtype=streams.dtype, device=streams.device).expand(streams.shape)


# Operators


class Operator:
    """An operator of PyTorch, with a gradient where one is registered.

    In plain eager mode, where nobody watches operators, the same functions run as a function of autograd: calling an
    operator that is written in Python takes as long as a small kernel does.
    """

    function: Callable
    differentiable: Any = None

    def __init__(self, function: Callable, fake: Callable):
        functools.update_wrapper(self, function)
        self.function = function
        self.operator = torch.library.custom_op(f"hcvision::{function.__name__}_{KEY}", function, mutates_args=())
        self.operator.register_fake(fake)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        self.operator.register_autograd(backward, setup_context=setup_context)
        parts = {"forward": self.function, "setup_context": setup_context, "backward": backward}
        name = self.function.__name__.capitalize()
        self.differentiable = skip_binding(
            type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in parts.items()})
        )

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or type(inputs[0]) is not Tensor or torch._C._len_torch_dispatch_stack():
            return self.operator(*inputs)
        if self.differentiable is None or not torch.is_grad_enabled():
            return self.function(*inputs)
        return self.differentiable.apply(*inputs)


def _operator(fake: Callable) -> Callable[[Callable], Operator]:
    return functools.partial(Operator, fake=fake)


def _fake_width(streams, static, rows, scale, norm, center, tanh, native_code):
    return *_forward_outputs(streams, static.shape[1] - static.shape[0] - 1), _make_placeholder(streams)


@_operator(_fake_width)
def width(
    streams: Tensor,
    static: Tensor,
    rows: Optional[Tensor],
    scale: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
    native_code: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Width-connection.

    Args:
        streams: (..., S, E).
        static: static alpha and beta side by side, (S, K), float32.
        rows: a projection per coefficient, (K, E), float32; None for static weights.
        scale: of the dynamic part of each coefficient, (K,), float32.
        norm, center: whether streams are normalised before, and centered.
        tanh: whether the dynamic part is squashed.
        native_code: whether ``native.py`` runs it, or Triton.

    Returns:
        Views (..., V, E), alpha (..., S, V+S), beta (..., S), and the placeholder.
    """
    V = static.shape[1] - static.shape[0] - 1
    width = (static.contiguous(), _dense(rows), _dense(scale), norm, center, tanh)
    outputs = _forward(streams, V, None, width, native_code)[1:]
    return *outputs, _make_placeholder(streams)


def _dense(tensor: Optional[Tensor]) -> Optional[Tensor]:
    return None if tensor is None else tensor.contiguous()


def _fake_depth(placeholder, streams, output, alpha, beta, native_code):
    return torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)


@_operator(_fake_depth)
def depth(
    placeholder: Tensor, streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, native_code: bool
) -> Tensor:
    """Depth-connection: beta * output + alpha_r^T streams, (..., S, E); ``placeholder`` as ``width`` returned it."""
    return _forward(streams, output.shape[-2], (output, alpha, beta), None, native_code)[0]


def _fake_join(placeholder, streams, output, alpha, beta, static, rows, scale, norm, center, tanh, native_code):
    following = _fake_depth(placeholder, streams, output, alpha, beta, native_code)
    return following, *_fake_width(following, static, rows, scale, norm, center, tanh, native_code)


@_operator(_fake_join)
def join(
    placeholder: Tensor,
    streams: Tensor,
    output: Tensor,
    alpha: Tensor,
    beta: Tensor,
    static: Tensor,
    rows: Optional[Tensor],
    scale: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
    native_code: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``depth`` and the ``width`` of the next sub-layer: the next streams, then what ``width`` returns."""
    width = (static.contiguous(), _dense(rows), _dense(scale), norm, center, tanh)
    following, *outputs = _forward(streams, output.shape[-2], (output, alpha, beta), width, native_code)
    return following, outputs[0], outputs[1], outputs[2], _make_placeholder(following)


def _fake_depth_backward(grad, output, beta, native_code):
    return torch.empty_like(output.contiguous()), torch.empty_like(beta.contiguous())


@_operator(_fake_depth_backward)
def depth_backward(grad: Tensor, output: Tensor, beta: Tensor, native_code: bool) -> Tuple[Tensor, Tensor]:
    """The gradients of output and beta, from that of the next streams, which is that of the placeholder too."""
    grad_output, grad_beta = _backward(grad, output.shape[-2], (output, beta), None, native_code)
    return grad_output, grad_beta


def _fake_width_backward(grad_views, grad_alpha, grad_beta, grad_placeholder, streams, static, rows, scale, *_):
    none = static.new_empty(0)
    parts = [static] + [none if part is None else part for part in (rows, scale)]
    return torch.empty_like(streams.contiguous()), *(torch.empty_like(part.contiguous()) for part in parts)


@_operator(_fake_width_backward)
def width_backward(
    grad_views: Tensor,
    grad_alpha: Optional[Tensor],
    grad_beta: Tensor,
    grad_placeholder: Tensor,
    streams: Tensor,
    static: Tensor,
    rows: Optional[Tensor],
    scale: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
    native_code: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of streams, static, rows and scale; the last two are empty for static weights."""
    width = (streams, grad_views, grad_alpha, grad_beta, static, _dense(rows), _dense(scale), norm, center, tanh)
    grads = _backward(grad_placeholder, grad_views.shape[-2], None, width, native_code)
    return grads[0], grads[1], grads[2], grads[3]


def _fake_join_backward(*inputs):
    *width, output, old_beta = inputs
    return *_fake_width_backward(*width), *_fake_depth_backward(width[3], output, old_beta, width[-1])


@_operator(_fake_join_backward)
def join_backward(
    grad_views: Tensor,
    grad_alpha: Optional[Tensor],
    grad_beta: Tensor,
    grad_placeholder: Tensor,
    streams: Tensor,
    static: Tensor,
    rows: Optional[Tensor],
    scale: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
    native_code: bool,
    output: Tensor,
    old_beta: Tensor,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``width_backward`` and, with the gradient of the streams that it gives, ``depth_backward``."""
    width = (streams, grad_views, grad_alpha, grad_beta, static, _dense(rows), _dense(scale), norm, center, tanh)
    grads = _backward(grad_placeholder, output.shape[-2], (output, old_beta), width, native_code)
    return grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]


def _keep_width(ctx: Any, inputs: Any, streams: Tensor) -> None:
    static, rows, scale, *ctx.options = inputs
    ctx.save_for_backward(streams, static, rows, scale)


def _or_zeros(grad: Optional[Tensor], streams: Tensor, *shape: int) -> Tensor:
    """Gradients that autograd leaves out."""
    return grad if grad is not None else streams.new_zeros((*streams.shape[:-2], *shape))


def _width_setup(ctx: Any, inputs: Any, output: Any) -> None:
    streams, *rest = inputs
    _keep_width(ctx, rest, streams)
    ctx.set_materialize_grads(False)


def _width_grads(grads: Any, streams: Tensor, static: Tensor) -> tuple[Tensor, Optional[Tensor], Tensor, Tensor]:
    """The gradients of what ``width`` returns, none of those missing that its backward wants."""
    grad_views, grad_alpha, grad_beta, grad_placeholder = grads
    S, E = streams.shape[-2:]
    V = static.shape[1] - S - 1
    views, placeholder = _or_zeros(grad_views, streams, V, E), _or_zeros(grad_placeholder, streams, S, E)
    return views, grad_alpha, _or_zeros(grad_beta, streams, S).float(), placeholder


def _width_backward(ctx: Any, *grads: Any) -> Any:
    streams, static, rows, scale = ctx.saved_tensors
    ready = _width_grads(grads, streams, static)
    to_streams, found = _back_to_width(ctx, ready, streams, static, rows, scale)
    return to_streams, *found, None, None, None, None


def _back_to_width(
    ctx: Any, grads: Any, streams: Tensor, static: Tensor, rows: Optional[Tensor], scale: Optional[Tensor]
) -> Any:
    """The gradient of the streams, and those of static, rows and scale."""
    if needs_operations_backward(grads):
        norm, center, tanh, _ = ctx.options
        to_streams, *found = reference.gradients(
            lambda streams, *rest: reference.read_and_carry(streams, True, *rest, norm, center, tanh),
            (streams, static, rows, scale),
            grads,
        )
        return to_streams, found
    to_streams, *found = width_backward(*grads, streams, static, rows, scale, *ctx.options)
    return to_streams, (found if rows is not None else (found[0], None, None))


width.register_autograd(_width_backward, _width_setup)


def _depth_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _placeholder, _streams, branch_output, _alpha, beta, ctx.native_code = inputs
    ctx.save_for_backward(branch_output, beta)


def _depth_backward(ctx: Any, grad: Any) -> Any:
    output, beta = ctx.saved_tensors
    return grad, None, *_back_to_output(grad, output, beta, ctx.native_code), None


def _back_to_output(grad: Tensor, output: Tensor, beta: Tensor, native_code: bool) -> Any:
    """The gradients of output, alpha (none) and beta."""
    if needs_operations_backward([grad]):
        grad_output, grad_beta = reference.gradients(
            lambda output, beta: [beta[..., None] * output], (output, beta), [grad]
        )
    else:
        grad_output, grad_beta = depth_backward(grad, output, beta, native_code)
    return grad_output, None, grad_beta


depth.register_autograd(_depth_backward, _depth_setup)


def _join_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _placeholder, _streams, branch_output, _alpha, beta, static, rows, scale, *ctx.options = inputs
    ctx.save_for_backward(output[0], static, rows, scale, branch_output, beta)
    ctx.set_materialize_grads(False)


def _join_backward(ctx: Any, grad_following: Any, *grads: Any) -> Any:
    following, static, rows, scale, output, beta = ctx.saved_tensors
    ready = _width_grads(grads, following, static)
    if grad_following is None and not needs_operations_backward(ready):
        to_streams, *found = join_backward(*ready, following, static, rows, scale, *ctx.options, output, beta)
        to_output = found[3], None, found[4]
        found = found[:3] if rows is not None else (found[0], None, None)
    else:  # somebody read the streams themselves too
        to_streams, found = _back_to_width(ctx, ready, following, static, rows, scale)
        if grad_following is not None:
            to_streams = to_streams + grad_following
        to_output = _back_to_output(to_streams, output, beta, ctx.options[-1])
    return to_streams, None, *to_output, *found, None, None, None, None


join.register_autograd(_join_backward, _join_setup)


# What PyTorch counts (torch.utils.flop_counter): two operations to a multiply-add, as of a matmul


def _width_flops(streams: Any, static: Any, rows: Any, *_: Any, **__: Any) -> int:
    *tokens, S, E = streams
    V, K = static[1] - S - 1, static[1]
    return 2 * math.prod(tokens) * S * E * (V + (K if rows is not None else 0))


def _depth_flops(placeholder: Any, streams: Any, *_: Any, **__: Any) -> int:
    *tokens, S, E = streams
    return 2 * math.prod(tokens) * S * E * (S + 1)


def _join_flops(placeholder: Any, streams: Any, output: Any, alpha: Any, beta: Any, *weights: Any, **_: Any) -> int:
    return _depth_flops(placeholder, streams) + _width_flops(streams, *weights)


def _width_backward_flops(
    views: Any, alpha: Any, beta: Any, placeholder: Any, streams: Any, *weights: Any, **_: Any
) -> int:
    static, rows = weights[:2]
    *tokens, S, E = streams
    return 2 * math.prod(tokens) * S * E * (2 * static[1] - 2 + (3 * static[1] if rows is not None else 0))


def _depth_backward_flops(grad: Any, *_: Any, **__: Any) -> int:
    return 2 * 2 * math.prod(grad)


def _join_backward_flops(views: Any, alpha: Any, beta: Any, placeholder: Any, *rest: Any, **_: Any) -> int:
    return _width_backward_flops(views, alpha, beta, placeholder, *rest) + _depth_backward_flops(placeholder)


_FORMULAS: dict[str, Any] = {
    "width": _width_flops,
    "depth": _depth_flops,
    "join": _join_flops,
    "width_backward": _width_backward_flops,
    "depth_backward": _depth_backward_flops,
    "join_backward": _join_backward_flops,
}
for _name, _formula in _FORMULAS.items():
    register_flop_formula(getattr(torch.ops.hcvision, f"{_name}_{KEY}"))(_formula)
