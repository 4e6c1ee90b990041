"""The kernels as operators of PyTorch with gradients: those in Triton, and those in C.

Both have the same two. ``forward`` is the depth-connection of a sub-layer, the width-connection of the next one, or
both joined; ``backward`` goes back through the same. Bytes they move, per token, in vectors of E numbers (S streams,
V views)::

                 forward              backward
    width        S + V                3S + V
    depth        2S + V               S + 2V
    joined       2S + 2V              3S + 3V

What they keep for backward are the streams and the branch output: the coefficients are computed again
from the streams. Parameters of a connection go in as they are, and so do their gradients come out; between are
**packed parameters**, what a token needs of them (``_forward_outputs``). Arithmetic and coefficients are float32;
streams of any width E, at rates 1 to 8. Sums over tokens are taken in a fixed order: the same input gives the same
bits, always.

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
from hcvision.connections.reference import Rule

DTYPES = triton.DTYPES  # that the branch output may have
MOST_STREAMS = 8
NO_RULE: Any = (None,) * 7


def hash_sources(folder: Path) -> str:
    """Eight hexadecimal digits that change with every file of Python or C in a folder and in those within it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".h")):
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
    width: Optional[Tuple[Rule, bool, bool, bool]],
    native_code: bool,
) -> Any:
    """What the forward kernel writes: the next streams, their views, alpha and beta, and the packed parameters."""
    output, alpha, beta = (part.contiguous() for part in depth) if depth else (None,) * 3
    rule, *flags = width or (NO_RULE, False, False, False)
    following = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device) if depth else None
    outputs = _forward_outputs(streams, views, rule) if width else (None,) * 4
    kernels = native if native_code else triton
    read = [streams.contiguous(), output, alpha, beta]
    kernels.forward(read, [following, *outputs], rule, _sizes(streams, views), flags)
    return following, *outputs


def _forward_outputs(streams: Tensor, views: int, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty views (..., V, E), alpha (..., S, V+S) and beta (..., S), and what becomes the packed parameters.

    These are what a kernel needs of the parameters of a connection, in float32, one after the other: the projections as
    rows (K, E), weighted and centered, static alpha and beta side by side (S, K), and the scales (K,); of static
    weights the second part.
    """
    *lead, S, E = streams.shape
    K = views + S + 1
    make = functools.partial(torch.empty, dtype=torch.float32, device=streams.device)
    return (
        torch.empty((*lead, views, E), dtype=streams.dtype, device=streams.device),
        make((*lead, S, views + S)),
        make((*lead, S)),
        make((S * K if rule[2] is None else (E + S + 1) * K,)),
    )


def _backward(
    grad_carried: Tensor,
    views: int,
    depth: Optional[Tuple[Tensor, Tensor]],
    width: Optional[Tuple[Any, ...]],
    native_code: bool,
) -> list[Tensor]:
    """What the backward kernel writes: the gradients of streams, parameters, output and beta."""
    output, beta = (part.contiguous() for part in depth) if depth else (None, None)
    streams = grad_views = grad_alpha = grad_beta = packed = None
    rule, flags = NO_RULE, [False, False, False]
    if width:
        streams, grad_views, grad_alpha, grad_beta, packed, rule, *flags = width
        streams, grad_views, grad_beta = streams.contiguous(), grad_views.contiguous(), grad_beta.contiguous()
        grad_alpha = None if grad_alpha is None else grad_alpha.contiguous()
    read = [streams, grad_views, grad_carried.contiguous(), grad_alpha, grad_beta, packed, output, beta]
    written = [None if part is None else torch.empty_like(part) for part in (streams, output, beta)]
    grads = _rule_like(rule)
    (native if native_code else triton).backward(read, written, rule, grads, _sizes(grad_carried, views), flags)
    found = [written[0], *grads] if width else []
    found += written[1:] if depth else []
    return [grad_carried.new_empty(0) if part is None else part for part in found]


def _rule_like(rule: Rule) -> list[Optional[Tensor]]:
    """Empty tensors laid out as parameters are: DDP warns of gradients that it has to copy."""
    return [None if part is None else torch.empty_like(part, memory_format=torch.contiguous_format) for part in rule]


def _make_placeholder(streams: Tensor) -> Tensor:
    """As large as the streams, in the memory of one number."""
    return streams.new_empty_strided(streams.shape, (0,) * streams.dim())


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


def _fake_width(streams, static_alpha, *rest):
    views, alpha, beta, packed = _forward_outputs(streams, _views(static_alpha), (static_alpha, *rest))
    return views, alpha, beta, _make_placeholder(streams), packed


def _views(static_alpha: Tensor) -> int:
    return static_alpha.shape[1] - static_alpha.shape[0]


@_operator(_fake_width)
def width(
    streams: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    alpha_fn: Optional[Tensor],
    beta_fn: Optional[Tensor],
    alpha_scale: Optional[Tensor],
    beta_scale: Optional[Tensor],
    norm_weight: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
    native_code: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Width-connection.

    Args:
        streams: (..., S, E).
        static_alpha, ..., norm_weight: the parameters of the connection; those of dynamic weights may be None.
        norm, center: whether streams are normalised before, and centered.
        tanh: whether the dynamic part is squashed.
        native_code: whether ``native.py`` runs it, or Triton.

    Returns:
        Views (..., V, E), alpha (..., S, V+S), beta (..., S), the placeholder, and the packed parameters.
    """
    rule = (static_alpha, static_beta, alpha_fn, beta_fn, alpha_scale, beta_scale, norm_weight)
    width = (rule, norm, center, tanh)
    _, views, alpha, beta, packed = _forward(streams, _views(static_alpha), None, width, native_code)
    return views, alpha, beta, _make_placeholder(streams), packed


def _fake_depth(placeholder, streams, output, alpha, beta, native_code):
    return torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)


@_operator(_fake_depth)
def depth(
    placeholder: Tensor, streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, native_code: bool
) -> Tensor:
    """Depth-connection: beta * output + alpha_r^T streams, (..., S, E); ``placeholder`` as ``width`` returned it."""
    return _forward(streams, output.shape[-2], (output, alpha, beta), None, native_code)[0]


def _fake_join(placeholder, streams, output, alpha, beta, *rest):
    following = _fake_depth(placeholder, streams, output, alpha, beta, None)
    return following, *_fake_width(following, *rest)


@_operator(_fake_join)
def join(
    placeholder: Tensor,
    streams: Tensor,
    output: Tensor,
    alpha: Tensor,
    beta: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    alpha_fn: Optional[Tensor],
    beta_fn: Optional[Tensor],
    alpha_scale: Optional[Tensor],
    beta_scale: Optional[Tensor],
    norm_weight: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
    native_code: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``depth`` and the ``width`` of the next sub-layer: the next streams, then what ``width`` returns."""
    rule = (static_alpha, static_beta, alpha_fn, beta_fn, alpha_scale, beta_scale, norm_weight)
    width = (rule, norm, center, tanh)
    following, *rest, packed = _forward(streams, output.shape[-2], (output, alpha, beta), width, native_code)
    return following, rest[0], rest[1], rest[2], _make_placeholder(following), packed


def _fake_depth_backward(grad, output, beta, native_code):
    return torch.empty_like(output.contiguous()), torch.empty_like(beta.contiguous())


@_operator(_fake_depth_backward)
def depth_backward(grad: Tensor, output: Tensor, beta: Tensor, native_code: bool) -> Tuple[Tensor, Tensor]:
    """The gradients of output and beta, from that of the next streams, which is that of the placeholder too."""
    grad_output, grad_beta = _backward(grad, output.shape[-2], (output, beta), None, native_code)
    return grad_output, grad_beta


def _fake_width_backward(grad_views, grad_alpha, grad_beta, grad_placeholder, streams, packed, *rest):
    grads = [streams.new_empty(0) if part is None else part for part in _rule_like(rest[:7])]
    return torch.empty_like(streams.contiguous()), *grads


@_operator(_fake_width_backward)
def width_backward(
    grad_views: Tensor,
    grad_alpha: Optional[Tensor],
    grad_beta: Tensor,
    grad_placeholder: Tensor,
    streams: Tensor,
    packed: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    alpha_fn: Optional[Tensor],
    beta_fn: Optional[Tensor],
    alpha_scale: Optional[Tensor],
    beta_scale: Optional[Tensor],
    norm_weight: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
    native_code: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of streams and parameters, empty for those that are None."""
    rule = (static_alpha, static_beta, alpha_fn, beta_fn, alpha_scale, beta_scale, norm_weight)
    width = (streams, grad_views, grad_alpha, grad_beta, packed, rule, norm, center, tanh)
    return tuple(_backward(grad_placeholder, grad_views.shape[-2], None, width, native_code))  # type: ignore[return-value]


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
    packed: Tensor,
    static_alpha: Tensor,
    static_beta: Tensor,
    alpha_fn: Optional[Tensor],
    beta_fn: Optional[Tensor],
    alpha_scale: Optional[Tensor],
    beta_scale: Optional[Tensor],
    norm_weight: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
    native_code: bool,
    output: Tensor,
    old_beta: Tensor,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``width_backward`` and, with the gradient of the streams that it gives, ``depth_backward``."""
    rule = (static_alpha, static_beta, alpha_fn, beta_fn, alpha_scale, beta_scale, norm_weight)
    width = (streams, grad_views, grad_alpha, grad_beta, packed, rule, norm, center, tanh)
    return tuple(_backward(grad_placeholder, output.shape[-2], (output, old_beta), width, native_code))  # type: ignore[return-value]


def _keep_width(ctx: Any, inputs: Any, streams: Tensor, packed: Tensor, *more: Tensor) -> None:
    *rule, norm, center, tanh, native_code = inputs
    ctx.options = norm, center, tanh, native_code
    ctx.save_for_backward(streams, packed, *rule, *more)
    ctx.mark_non_differentiable(packed)
    ctx.set_materialize_grads(False)


def _or_zeros(grad: Optional[Tensor], streams: Tensor, *shape: int) -> Tensor:
    """Gradients that autograd leaves out."""
    return grad if grad is not None else streams.new_zeros((*streams.shape[:-2], *shape))


def _width_setup(ctx: Any, inputs: Any, output: Any) -> None:
    streams, *rest = inputs
    _keep_width(ctx, rest, streams, output[-1])


def _width_grads(grads: Any, streams: Tensor, rule: Any) -> tuple[Tensor, Optional[Tensor], Tensor, Tensor]:
    """The gradients of what ``width`` returns, none of those missing that its backward wants."""
    grad_views, grad_alpha, grad_beta, grad_placeholder, _ = grads
    S, E = streams.shape[-2:]
    views = _or_zeros(grad_views, streams, _views(rule[0]), E)
    placeholder = _or_zeros(grad_placeholder, streams, S, E)
    return views, grad_alpha, _or_zeros(grad_beta, streams, S).float(), placeholder


def _width_backward(ctx: Any, *grads: Any) -> Any:
    streams, packed, *rule = ctx.saved_tensors
    ready = _width_grads(grads, streams, rule)
    return *_back_to_width(ctx, ready, streams, packed, rule), None, None, None, None


def _back_to_width(ctx: Any, grads: Any, streams: Tensor, packed: Tensor, rule: Any) -> Any:
    """The gradients of the streams and of the parameters."""
    if needs_operations_backward(grads):
        norm, center, tanh, _ = ctx.options
        return reference.gradients(
            lambda streams, *rule: reference.read_and_carry(streams, rule, norm, center, tanh), (streams, *rule), grads
        )
    return _leave_out(width_backward(*grads, streams, packed, *rule, *ctx.options), rule)


def _leave_out(grads: Any, rule: Any) -> Any:
    """The gradient of the streams, and of the parameters, without those that there are not."""
    return [grads[0], *(grad if part is not None else None for grad, part in zip(grads[1:], rule, strict=True))]


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
    _placeholder, _streams, branch_output, _alpha, beta, *rest = inputs
    _keep_width(ctx, rest, output[0], output[-1], branch_output, beta)


def _join_backward(ctx: Any, grad_following: Any, *grads: Any) -> Any:
    following, packed, *rule, output, beta = ctx.saved_tensors
    ready = _width_grads(grads, following, rule)
    if grad_following is None and not needs_operations_backward(ready):
        *found, grad_output, grad_beta = join_backward(*ready, following, packed, *rule, *ctx.options, output, beta)
        to_streams, *to_rule = _leave_out(found, rule)
        to_output = grad_output, None, grad_beta
    else:  # somebody read the streams themselves too
        to_streams, *to_rule = _back_to_width(ctx, ready, following, packed, rule)
        if grad_following is not None:
            to_streams = to_streams + grad_following
        to_output = _back_to_output(to_streams, output, beta, ctx.options[-1])
    return to_streams, None, *to_output, *to_rule, None, None, None, None


join.register_autograd(_join_backward, _join_setup)


# What PyTorch counts (torch.utils.flop_counter): two operations to a multiply-add, as of a matmul


def _width_flops(streams: Any, static_alpha: Any, static_beta: Any, alpha_fn: Any, *_: Any, **__: Any) -> int:
    *tokens, S, E = streams
    V, K = static_alpha[1] - S, static_alpha[1] + 1
    return 2 * math.prod(tokens) * S * E * (V + (K if alpha_fn is not None else 0))


def _depth_flops(placeholder: Any, streams: Any, *_: Any, **__: Any) -> int:
    *tokens, S, E = streams
    return 2 * math.prod(tokens) * S * E * (S + 1)


def _join_flops(placeholder: Any, streams: Any, output: Any, alpha: Any, beta: Any, *weights: Any, **_: Any) -> int:
    return _depth_flops(placeholder, streams) + _width_flops(streams, *weights)


def _width_backward_flops(
    views: Any, alpha: Any, beta: Any, placeholder: Any, streams: Any, packed: Any, *rule: Any, **_: Any
) -> int:
    static_alpha, _static_beta, alpha_fn = rule[:3]
    *tokens, S, E = streams
    M = static_alpha[1]
    return 2 * math.prod(tokens) * S * E * (2 * M + (3 * (M + 1) if alpha_fn is not None else 0))


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
