"""The update rule of connections as functions of tensors.

Torch FX takes each as one node; TorchScript, torch.compile and torch.export see the plain operations. Where
``hcvision.kernels`` has one and it runs, a kernel takes their place. Letters in shapes are those of
``hcvision.connections``.
"""

import contextlib
import inspect
import types
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hcvision import kernels

MOST_COEFFICIENTS = 80  # of a token, for the kernels that auto takes: dhc8, dfc5

Rule = Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]
Options = Tuple[bool, bool, bool, str]


@torch.fx.wrap
def average_streams(x: Tensor, rate: int) -> Tensor:
    """(..., n*E) -> (..., E), in float32 at least, in the dtype of x."""
    parts = x.unflatten(-1, (rate, -1)).to(torch.promote_types(x.dtype, torch.float32)).unbind(-2)
    while len(parts) > 1:  # in pairs: 2, 4 or 8 equal streams add up without rounding
        last = parts[len(parts) // 2 * 2 :]
        parts = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)] + list(last)
    return (parts[0] / rate).to(x.dtype)


@torch.fx.wrap
def split_streams(x: Tensor, streams: int, stream_dim: int) -> Tensor:
    """(..., S*E) -> (..., S, E). Raises ValueError when the last axis of x is not S*E wide."""
    width = streams * stream_dim
    if not torch.jit.is_tracing() and x.shape[-1] != width:
        hint = f"; expand_streams(x, {streams}) enters the streams" if x.shape[-1] == stream_dim else ""
        raise ValueError(
            f"x must have {streams} streams of {stream_dim} on its last axis, {width} in all, "
            f"got shape {list(x.shape)}{hint}"
        )
    return x.unflatten(-1, (streams, stream_dim))


@torch.fx.wrap
def split_output(branch_output: Tensor, streams: Tensor, views: int) -> Tensor:
    """(..., V*E) -> (..., V, E). Raises ValueError when it is not shaped as the branch input was."""
    if not torch.jit.is_tracing():
        expected = list(streams.shape[:-2]) + [views * streams.shape[-1]]  # noqa: RUF005 - TorchScript
        if list(branch_output.shape) != expected:
            raise ValueError(
                f"the branch must return the shape it was given, {expected}, got {list(branch_output.shape)}"
            )
    return branch_output.unflatten(-1, (views, streams.shape[-1]))


@torch.fx.wrap
def width_connection(streams: Tensor, rule: Rule, options: Options) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The branch input (..., V*E) of streams (..., S, E), and the carried streams in four parts.

    These are the streams (..., S, E), alpha (..., S, V+S), beta (..., S) and the link (..., S, E). The
    parameters and options are those of ``StreamConnection``.
    """
    norm, center, tanh, backend = options
    views, alone = rule[0].shape[1] - rule[0].shape[0], rule[1].dim() == 1
    if torch.jit.is_scripting():
        static, rows, scale = _prepare(rule, center and norm, streams.dtype)
        mixed, alpha, beta, _ = _read(streams, views, alone, static, rows, scale, norm, center, tanh)
        link = streams
    else:
        with no_autocast(streams.device.type):
            if _takes_kernels(streams, views, backend, alone):
                static, rows, scale = _prepare_at_once(rule, center and norm, streams.dtype)
                mixed, alpha, beta, link = kernels.width(streams, static, rows, scale, norm, center, tanh)
            elif is_plain():
                static, rows, scale = _prepare(rule, center and norm, streams.dtype)
                mixed, alpha, beta, _ = _read(streams, views, alone, static, rows, scale, norm, center, tanh)
                link = streams
            else:
                mixed, link, alpha, beta = _Width.apply(streams, norm, center, tanh, *rule)[:4]
    return mixed.flatten(-2).to(streams.dtype), streams, alpha, beta, link


@torch.fx.wrap
def read_streams(
    streams: Tensor, alpha: Tensor, beta: Tensor, views: int
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``width_connection`` by weights that are there already: alpha (..., S, V+S) and beta.

    An alpha (..., S) is that of one view, and carries the streams as they are.
    """
    link = streams
    columns = alpha[..., None] if alpha.dim() < streams.dim() else alpha
    if torch.jit.is_scripting():
        mixed = _mix(streams, columns[..., :views], None, None)
    else:
        with no_autocast(streams.device.type):
            if is_plain():
                mixed = _mix(streams, columns[..., :views], None, None)
            else:
                mixed, link = _Weighed.apply(streams, columns, views)
    return mixed.flatten(-2).to(streams.dtype), streams, alpha, beta, link


@torch.fx.wrap
def carry_streams(streams: Tensor, alpha: Tensor, views: int) -> Tensor:
    """The link of streams (..., S, E) that are to be carried, where they are not those that were read."""
    if torch.jit.is_scripting():
        return streams
    else:
        columns = alpha[..., None] if alpha.dim() < streams.dim() else alpha
        return streams if is_plain() else _Weighed.apply(streams, columns, views)[1]


@torch.fx.wrap
def depth_connection(
    streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, link: Tensor, backend: str
) -> Tensor:
    """The next streams (..., S*E) from the branch output (..., V, E) and the four parts of the carried streams."""
    carried: Optional[Tensor] = None
    if alpha.dim() == streams.dim():
        carried = alpha[..., output.shape[-2] :]
    if torch.jit.is_scripting():
        mixed = _write(streams, carried, output, beta)
    else:
        with no_autocast(streams.device.type):
            if link is streams:  # as the plain operations leave it
                mixed = _write(streams, carried, output, beta)
            elif _takes_kernels(streams, output.shape[-2], backend, alpha.dim() > beta.dim()):
                mixed = kernels.depth(link, streams.detach(), _for_kernels(output, streams), alpha.detach(), beta)
            else:
                mixed = _Depth.apply(link, None if carried is None else carried.detach(), output, beta)
    return mixed.flatten(-2).to(streams.dtype)


@torch.fx.wrap
def join_connections(
    streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, link: Tensor, rule: Rule, options: Options
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``depth_connection``, and ``width_connection`` of the streams that it gives, with the next rule."""
    norm, center, tanh, backend = options
    if torch.jit.is_scripting():
        pass
    elif link is not streams and _takes_kernels(streams, output.shape[-2], backend, alpha.dim() > beta.dim()):
        static, rows, scale = _prepare_at_once(rule, center and norm, streams.dtype)
        carried = (link, streams.detach(), _for_kernels(output, streams), alpha.detach(), beta)
        streams, views, alpha, beta, link = kernels.join(*carried, static, rows, scale, norm, center, tanh)
        return views.flatten(-2), streams, alpha, beta, link
    x = depth_connection(streams, output, alpha, beta, link, backend)
    return width_connection(x.unflatten(-1, (streams.shape[-2], streams.shape[-1])), rule, options)


def _prepare(rule: Rule, center: bool, dtype: torch.dtype) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """Static alpha and beta (S, K), the dynamic projections as rows (K, E), and their scales (K,) or (S, K)."""
    static_alpha, static_beta, alpha_fn, beta_fn, alpha_scale, beta_scale, norm_weight = rule
    dtype = torch.promote_types(dtype, torch.float32)
    columns = static_beta if static_beta.dim() == 2 else static_beta[:, None]
    static = torch.cat([static_alpha, columns], dim=1).to(dtype)
    if alpha_fn is None or beta_fn is None or alpha_scale is None or beta_scale is None:
        return static, None, None
    rows = torch.cat([alpha_fn.mT, beta_fn.mT]).to(dtype)
    if alpha_scale.dim() == 1:
        alpha_scale = alpha_scale.expand(alpha_fn.shape[1])
    scale = torch.cat([alpha_scale, beta_scale], dim=-1).to(dtype)
    if norm_weight is not None:
        rows = rows * norm_weight.to(dtype)
    if center:
        rows = rows - rows.mean(1, keepdim=True)  # (H - mean(H)) @ row = H @ (row - mean(row))
    return static, rows, scale


def _prepare_at_once(rule: Rule, center: bool, dtype: torch.dtype) -> Any:
    """``_prepare`` with one node in the graph of gradients."""
    return _prepare(rule, center, dtype) if is_plain() else _Prepare.apply(center, dtype, *rule)


def _takes_kernels(streams: Tensor, views: int, backend: str, fits: bool) -> bool:
    """Whether this connection runs as kernels, which take mixed streams and for each of them one number of beta."""
    if backend == "torch" or torch.jit.is_tracing() or is_exporting():
        return False
    number = streams.shape[-2] * (views + streams.shape[-2] + 1)  # dfc6 and above take minutes to compile
    if backend == "auto" and (not streams.is_cuda or number > MOST_COEFFICIENTS):
        return False
    why_not = kernels.why_not(streams) if fits else "there are none for this kind"
    if why_not and backend == "triton":
        raise ValueError(f"backend='triton' cannot run the kernels: {why_not}; backend='auto' takes PyTorch there")
    return not why_not


def _for_kernels(output: Tensor, streams: Tensor) -> Tensor:
    """The branch output itself, which may have a type of its own, as under autocast."""
    return output if output.dtype in kernels.DTYPES else output.to(streams.dtype)


def is_plain() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def is_exporting() -> bool:
    flags: Any = torch.compiler  # is_exporting() itself says yes in every torch.compile of PyTorch 2.11
    return flags._is_exporting_flag


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _exact_matmul(tensor: Tensor) -> bool:
    """Whether a matmul may mix streams: on a CPU, where it is quick, if it multiplies float32 as it is."""
    backends: Any = torch.backends  # the innermost setting says what those above it do, where it has none of its own
    return tensor.device.type == "cpu" and backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


def _mix(streams: Tensor, alpha: Tensor, output: Optional[Tensor], beta: Optional[Tensor]) -> Tensor:
    """alpha^T @ streams (+ beta * output): (..., S, E), (..., S, K), (..., K or 1, E), (..., S) -> (..., K, E).

    An output without beta is added as it is.
    """
    if torch.jit.is_scripting():
        pass
    elif not is_plain() and alpha.shape[-1] > 1 and _exact_matmul(streams):
        mixed = _laid_out_like(streams, alpha.mT @ streams.to(alpha.dtype))
        if output is None:
            return mixed
        return mixed.add_(output) if beta is None else mixed.addcmul_(beta[..., None], output)
    first = 0
    if output is not None:
        mixed = output if beta is None else beta[..., None] * output
    else:
        mixed = alpha[..., 0, :, None] * streams[..., 0, None, :]
        first = 1
    if torch.jit.is_scripting():
        pass
    else:
        mixed = _laid_out_like(streams, mixed)
    for i in range(first, streams.shape[-2]):
        mixed.addcmul_(alpha[..., i, :, None], streams[..., i, None, :])
    return mixed


def _write(streams: Tensor, alpha: Optional[Tensor], output: Tensor, beta: Tensor) -> Tensor:
    """alpha^T @ streams (None: the streams) + beta * output, or + beta @ output for a beta (..., S, V)."""
    if alpha is None:
        return torch.addcmul(streams.to(beta.dtype), beta[..., None], output)
    if beta.dim() == streams.dim():
        return _mix(streams, alpha, _mix(output, beta.mT, None, None), None)
    return _mix(streams, alpha, output, beta)


def _laid_out_like(streams: Tensor, mixed: Tensor) -> Tensor:
    """Keep the memory layout of x, as ``x + branch(x)`` does: what follows may round by it."""
    if is_plain() or mixed.shape != streams.shape or mixed.stride() == streams.stride():
        return mixed
    return torch.empty_like(streams, dtype=mixed.dtype).copy_(mixed)


def _inverse_deviation(streams: Tensor, center: bool) -> Tuple[Tensor, Tensor]:
    """What LayerNorm (center) or RMSNorm multiplies a stream by, and the mean that LayerNorm takes: (..., S, 1)."""
    variance = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).square() / streams.shape[-1]
    mean = variance
    if center:
        mean = streams.mean(-1, keepdim=True)
        variance = (variance - mean.square()).clamp(min=0.0)
    return (variance + 1e-6).rsqrt(), mean


def _project(x: Tensor, rows: Tensor, norm: bool, center: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """norm(x) @ rows^T, 1 / deviation and mean, as far as there are any; rows are centered if x is to be."""
    projected = F.linear(x, rows)
    if not norm:
        return projected, projected, projected
    rstd, mean = _inverse_deviation(x, center)
    return projected * rstd, rstd, mean


def project(x: Tensor, rows: Tensor) -> Tensor:
    """RMSNorm(x) @ rows^T: (..., C), (K, C) -> (..., K), in the dtype of the rows."""
    if torch.jit.is_scripting():
        return _project(x.to(rows.dtype), rows, True, False)[0]
    else:
        with no_autocast(x.device.type):
            return _project(x.to(rows.dtype), rows, True, False)[0] if is_plain() else _Project.apply(x, rows)[0]


def _coefficients(
    streams: Tensor,
    static: Tensor,
    rows: Optional[Tensor],
    scale: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
) -> Tuple[Tensor, List[Tensor]]:
    """static + scale * tanh(norm(H) @ rows^T): (..., S, K), and what the dynamic part is made of.

    That is norm(H) @ rows^T (..., S, K), its tanh, 1 / deviation (..., S, 1) and the mean, as far as there are any.
    """
    if rows is None or scale is None:
        return static.expand(streams.shape[:-2] + static.shape), []
    projected, rstd, mean = _project(streams.to(rows.dtype), rows, norm, center)
    dynamic = projected.tanh() if tanh else projected
    return torch.addcmul(static, scale, dynamic), [projected, dynamic, rstd, mean]


def _read(
    streams: Tensor,
    views: int,
    alone: bool,
    static: Tensor,
    rows: Optional[Tensor],
    scale: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
) -> Tuple[Tensor, Tensor, Tensor, List[Tensor]]:
    """Views (..., V, E), alpha (..., S, V+S), beta (..., S), where one column of it stands alone, or (..., S, V).

    And what the coefficients are made of.
    """
    coefficients, made = _coefficients(streams, static, rows, scale, norm, center, tanh)
    last = views + static.shape[0]
    mixed = _mix(streams, coefficients[..., :views], None, None)
    beta = coefficients[..., last] if alone else coefficients[..., last:]
    return mixed, coefficients[..., :last], beta, made


# Eager mode takes the same operations with a backward of our own: autograd's would keep each intermediate
# that it needs, these keep their inputs and the coefficients. What runs between the two steps is the streams
# H themselves, for the carried streams alpha^T @ H that the second step is about to form; the gradient that
# comes back there is the one of the carried streams, so that one pass over H serves both steps.


def _mixed_gradients(
    streams: Tensor, alpha: Tensor, views: int, grad_views: Optional[Tensor], grad_carried: Optional[Tensor]
) -> Tuple[Tensor, List[Tensor]]:
    """Those of the streams and of alpha, in two parts, where views and carried streams are alpha^T @ H."""
    to_views, to_carried = alpha[..., :views], alpha[..., views:]
    grad_carried = torch.zeros_like(streams) if grad_carried is None else grad_carried.to(alpha.dtype)
    if to_carried.shape[-1]:
        grad_streams = _mix(grad_carried, to_carried.mT, None, None).contiguous()
        grads = [streams @ grad_carried.mT]
    else:
        grad_streams, grads = grad_carried.clone(), [to_carried]
    if grad_views is None:
        return grad_streams, [torch.zeros_like(to_views), *grads]
    grad_views = grad_views.to(alpha.dtype)
    grads.insert(0, streams @ grad_views.mT)
    if views == 1:
        grad_streams.addcmul_(to_views, grad_views)
    elif not _exact_matmul(grad_views):
        grad_streams.add_(_mix(grad_views, to_views.mT, None, None))
    else:
        parts = (part.reshape(-1, *part.shape[-2:]) for part in (to_views, grad_views))
        grad_streams.view(-1, *grad_streams.shape[-2:]).baddbmm_(*parts)
    return grad_streams, grads


def _projected_gradients(
    grad_x: Tensor,
    x: Tensor,
    rows: Tensor,
    projected: Tensor,
    grad: Tensor,
    rstd: Optional[Tensor],
    mean: Optional[Tensor],
) -> Tensor:
    """Add the gradient of x to grad_x, and return that of the rows, where projected is norm(x) @ rows^T."""
    back = rows
    if rstd is not None:
        grad = grad * rstd
        along = (grad * projected).sum(-1, keepdim=True) * rstd
        grad_x.addcmul_(x, along, value=-1 / rows.shape[1])
        if mean is not None:  # one more row takes along * (x - mean) instead of along * x
            grad = torch.cat([grad, along * mean * (1 / rows.shape[1])], dim=-1)
            back = torch.cat([back, back.new_ones(1, back.shape[1])])
    grad_x.view(-1, back.shape[1]).addmm_(grad.reshape(-1, len(back)), back)
    return grad[..., : len(rows)].reshape(-1, len(rows)).mT @ x.reshape(-1, rows.shape[1])


def _prepared_gradients(
    rule: Any, center: bool, grad_static: Optional[Tensor], grad_rows: Optional[Tensor], grad_scale: Optional[Tensor]
) -> List[Optional[Tensor]]:
    """Those of the parameters, from those of what ``_prepare`` makes of them."""
    static_alpha, static_beta, alpha_fn, beta_fn, alpha_scale, _, norm_weight = rule
    grads: List[Optional[Tensor]] = [None] * 7
    views = static_alpha.shape[1]
    if grad_static is not None:
        grads[0] = grad_static[:, :views]
        grads[1] = grad_static[:, views] if static_beta.dim() == 1 else grad_static[:, views:]
    if grad_rows is not None:
        if center:
            grad_rows = grad_rows - grad_rows.mean(1, keepdim=True)
        if norm_weight is not None:
            grads[6] = (grad_rows * torch.cat([alpha_fn.mT, beta_fn.mT])).sum(0)
            grad_rows = grad_rows * norm_weight
        # laid out as the parameters are: DDP warns of what it has to copy, and copies
        grads[2] = grad_rows[:views].mT.clone(memory_format=torch.contiguous_format)
        grads[3] = grad_rows[views:].mT.clone(memory_format=torch.contiguous_format)
    if grad_scale is not None:
        of_alpha, grads[5] = grad_scale[..., :views], grad_scale[..., views:]
        grads[4] = of_alpha.sum(0, keepdim=True) if alpha_scale.dim() == 1 else of_alpha
    return grads


class _Prepare(torch.autograd.Function):
    """``_prepare``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(center, dtype, *rule):
        return _prepare(rule, center, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.center, _, *rule = inputs
        ctx.save_for_backward(*rule)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *_prepared_gradients(ctx.saved_tensors, ctx.center, *grads)


def _kept(made: List[Tensor], norm: bool, center: bool, tanh: bool) -> List[Optional[Tensor]]:
    """Of what ``_coefficients`` made, what its gradient needs."""
    projected, dynamic, rstd, mean = made or (None, None, None, None)
    return [projected, dynamic if tanh else None, rstd if norm else None, mean if norm and center else None]


class _Width(torch.autograd.Function):
    """``_prepare``, ``_read`` and the streams, saving the streams and what the coefficients are made of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(streams, norm, center, tanh, *rule):
        views, alone = rule[0].shape[1] - rule[0].shape[0], rule[1].dim() == 1
        prepared = _prepare(rule, center and norm, streams.dtype)
        mixed, alpha, beta, made = _read(streams, views, alone, *prepared, norm, center, tanh)
        # beta is kept longer than alpha, which must not stay with it
        return mixed, streams.view_as(streams), alpha, beta.contiguous(), *prepared, *_kept(made, norm, center, tanh)

    @staticmethod
    def setup_context(ctx, inputs, output):
        streams, ctx.norm, ctx.center, ctx.tanh, *rule = inputs
        ctx.save_for_backward(streams, *rule, *output[4:])
        ctx.mark_non_differentiable(*(part for part in output[4:] if part is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_views, grad_carried, grad_alpha, grad_beta, *_):
        streams, *saved = ctx.saved_tensors
        rule, (static, rows, scale, projected, dynamic, rstd, mean) = saved[:7], saved[7:]
        center = ctx.center and ctx.norm
        views, last = rule[0].shape[1] - rule[0].shape[0], rule[0].shape[1]
        with no_autocast(streams.device.type):
            if torch.is_grad_enabled():  # for a second derivative: what was kept would be a constant there
                static, rows, scale = _prepare(rule, center, streams.dtype)
                coefficients, made = _coefficients(streams, static, rows, scale, ctx.norm, ctx.center, ctx.tanh)
                projected, dynamic, rstd, mean = _kept(made, ctx.norm, ctx.center, ctx.tanh)
            else:
                coefficients = static.expand(*streams.shape[:-2], *static.shape)
                if rows is not None:
                    coefficients = torch.addcmul(static, scale, projected if dynamic is None else dynamic)
            streams = streams.to(static.dtype)
            dynamic = projected if dynamic is None else dynamic
            grad_streams, through = _mixed_gradients(streams, coefficients[..., :last], views, grad_views, grad_carried)
            if grad_beta is None:
                grad_beta = torch.zeros_like(coefficients[..., last:])
            elif rule[1].dim() == 1:
                grad_beta = grad_beta[..., None]
            grad = torch.cat([*through, grad_beta], dim=-1)
            if grad_alpha is not None:
                grad = grad + F.pad(grad_alpha, (0, static.shape[1] - last))
            grad_static = grad.reshape(-1, *static.shape).sum(0)
            grad_rows = grad_scale = None
            if rows is not None:
                grad_scale = (grad * dynamic).reshape(-1, *scale.shape).sum(0)
                grad = grad * scale
                if ctx.tanh:
                    grad = torch.ops.aten.tanh_backward(grad, dynamic)
                grad_rows = _projected_gradients(grad_streams, streams, rows, projected, grad, rstd, mean)
            grads = _prepared_gradients(rule, center, grad_static, grad_rows, grad_scale)
        return grad_streams, None, None, None, *grads


class _Project(torch.autograd.Function):
    """RMSNorm(x) @ rows^T, keeping x in its own type."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, rows):
        return _project(x.to(rows.dtype), rows, True, False)[:2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, rows, projected, rstd = ctx.saved_tensors
        x = x.to(rows.dtype)
        if torch.is_grad_enabled():  # for a second derivative
            rstd, _ = _inverse_deviation(x, False)
        grad_x = x.new_zeros(x.shape)
        with no_autocast(x.device.type):
            grad_rows = _projected_gradients(grad_x, x, rows, projected, grad, rstd, None)
        return grad_x, grad_rows


class _Weighed(torch.autograd.Function):
    """The views of streams by given weights, and the streams, for alpha^T @ streams that are about to be formed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(streams, alpha, views):
        return _mix(streams, alpha[..., :views], None, None), streams.view_as(streams)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.views = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_views, grad_carried):
        streams, alpha = ctx.saved_tensors
        with no_autocast(streams.device.type):
            grads = _mixed_gradients(streams.to(alpha.dtype), alpha, ctx.views, grad_views, grad_carried)
            return grads[0], torch.cat(grads[1], dim=-1), None


class _Depth(torch.autograd.Function):
    """``_write``, saving the branch output and beta; the gradient of the carried streams is that of the next ones."""

    generate_vmap_rule = True

    @staticmethod
    def forward(streams, alpha, output, beta):
        return _write(streams, alpha, output, beta)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, grad):
        output, beta = ctx.saved_tensors
        with no_autocast(grad.device.type):
            if beta.dim() == grad.dim():  # every output went to every stream
                grad_output = _mix(grad, beta, None, None)
                grad_beta = grad @ output.to(grad.dtype).mT
            elif output.shape[-2] == 1:  # one output went to every stream (HC)
                grad_output = _mix(grad, beta[..., None], None, None)
                grad_beta = (grad @ output.to(grad.dtype).mT).squeeze(-1)
            else:  # or each its own (FC)
                grad_output = beta[..., None] * grad
                grad_beta = torch.linalg.vecdot(output.to(grad.dtype), grad)
        return grad, None, grad_output, grad_beta


class _AsGiven(inspect.Signature):
    """Takes arguments as they come. PyTorch binds them to ``forward`` in every call, for defaults, which ours lack."""

    def bind(self, *args: Any) -> Any:
        return types.SimpleNamespace(args=args, kwargs={}, apply_defaults=lambda: None)


for _function in (_Prepare, _Width, _Project, _Weighed, _Depth):
    _function.forward.__signature__ = _AsGiven()  # type: ignore[attr-defined,union-attr]
