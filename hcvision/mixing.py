"""The steps of connections as functions of tensors, and the choice of how they run.

Torch FX takes each function as one node. Where ``hcvision.kernels`` has one and it runs, a kernel does the work;
elsewhere the operations of ``hcvision.plain``, in eager mode with a backward that keeps less than autograd would.
Letters in shapes are those of ``hcvision.connections``.
"""

import inspect
import types
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hcvision import kernels, plain
from hcvision.plain import Rule

MOST_COEFFICIENTS = 80  # of a token, for the kernels in Triton that auto takes: dhc8, dfc5

Options = Tuple[bool, bool, bool, str]


@torch.fx.wrap
def average_streams(x: Tensor, rate: int) -> Tensor:
    """(..., n*E) -> (..., E), in float32 at least, in the dtype of x."""
    parts = list(plain.split_last(x, rate).to(torch.promote_types(x.dtype, torch.float32)).unbind(-2))
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
    return plain.split_last(x, streams)


@torch.fx.wrap
def split_output(branch_output: Tensor, streams: Tensor, views: int) -> Tensor:
    """(..., V*E) -> (..., V, E). Raises ValueError when it is not shaped as the branch input was."""
    if not torch.jit.is_tracing():
        expected = list(streams.shape[:-2]) + [views * streams.shape[-1]]  # noqa: RUF005 - TorchScript
        if list(branch_output.shape) != expected:
            raise ValueError(
                f"the branch must return the shape it was given, {expected}, got {list(branch_output.shape)}"
            )
    return plain.split_last(branch_output, views)


@torch.fx.wrap
def width_connection(streams: Tensor, rule: Rule, options: Options) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The branch input (..., V*E) of streams (..., S, E), and the carried streams in four parts.

    These are the streams (..., S, E), alpha (..., S, V+S), beta (..., S) and the link (..., S, E). The
    parameters and options are those of ``StreamConnection``.
    """
    norm, center, tanh, backend = options
    views, alone = rule[0].shape[1] - rule[0].shape[0], rule[1].dim() == 1
    if torch.jit.is_scripting():
        static, rows, scale = plain.prepare(rule, center and norm, streams.dtype)
        mixed, alpha, beta, _ = plain.read(streams, views, alone, static, rows, scale, norm, center, tanh)
        link = streams
    else:
        with plain.no_autocast(streams.device.type):
            chosen = _kernels(streams, views, backend, alone)
            if chosen:
                prepared = _prepare_at_once(rule, center and norm, streams.dtype)
                mixed, alpha, beta, link = kernels.width(streams, *prepared, norm, center, tanh, chosen == "native")
            elif plain.is_plain():
                static, rows, scale = plain.prepare(rule, center and norm, streams.dtype)
                mixed, alpha, beta, _ = plain.read(streams, views, alone, static, rows, scale, norm, center, tanh)
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
        mixed = plain.mix(streams, columns[..., :views], None, None)
    else:
        with plain.no_autocast(streams.device.type):
            if plain.is_plain():
                mixed = plain.mix(streams, columns[..., :views], None, None)
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
        return streams if plain.is_plain() else _Weighed.apply(streams, columns, views)[1]


@torch.fx.wrap
def depth_connection(
    streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, link: Tensor, backend: str
) -> Tensor:
    """The next streams (..., S*E) from the branch output (..., V, E) and the four parts of the carried streams."""
    carried: Optional[Tensor] = None
    if alpha.dim() == streams.dim():
        carried = alpha[..., output.shape[-2] :]
    if torch.jit.is_scripting():
        mixed = plain.write(streams, carried, output, beta)
    else:
        plainly = link is streams  # as the plain operations leave it
        chosen = "" if plainly else _kernels(streams, output.shape[-2], backend, alpha.dim() > beta.dim())
        with plain.no_autocast(streams.device.type):
            if chosen:
                parts = (link, streams.detach(), _for_kernels(output, streams), alpha.detach(), beta)
                mixed = kernels.depth(*parts, chosen == "native")
            elif plainly or plain.is_plain():
                mixed = plain.write(streams, carried, output, beta)
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
    elif link is not streams:
        chosen = _kernels(streams, output.shape[-2], backend, alpha.dim() > beta.dim())
        if chosen:
            prepared = _prepare_at_once(rule, center and norm, streams.dtype)
            parts = (link, streams.detach(), _for_kernels(output, streams), alpha.detach(), beta)
            joined = kernels.join(*parts, *prepared, norm, center, tanh, chosen == "native")
            streams, views, alpha, beta, link = joined
            return views.flatten(-2), streams, alpha, beta, link
    x = depth_connection(streams, output, alpha, beta, link, backend)
    return width_connection(plain.split_last(x, streams.shape[-2]), rule, options)


def _prepare_at_once(rule: Rule, center: bool, dtype: torch.dtype) -> Any:
    """``plain.prepare`` with one node in the graph of gradients."""
    return plain.prepare(rule, center, dtype) if plain.is_plain() else _Prepare.apply(center, dtype, *rule)


def _kernels(streams: Tensor, views: int, backend: str, fits: bool) -> str:
    """Which kernels run this connection: ``triton``, ``native`` or none.

    They take mixed streams (it fits), and for each of them one number of beta. Where somebody else takes the operations
    apart, as a trace, torch.export or torch.func do, none run, whatever the backend.
    """
    if backend == "torch" or torch.jit.is_tracing() or plain.is_exporting() or plain.is_transformed():
        return ""
    chosen = backend
    if backend == "auto":
        chosen = "triton" if streams.is_cuda else "native"
        number = streams.shape[-2] * (views + streams.shape[-2] + 1)
        if number > MOST_COEFFICIENTS if streams.is_cuda else not streams.is_contiguous():
            return ""
        if torch.compiler.is_compiling() and not streams.is_cuda:  # Inductor's code keeps less, and is as quick
            return ""
    why_not = kernels.why_not(streams, views, chosen == "native") if fits else "there are none for this kind"
    if why_not and backend != "auto":
        raise ValueError(f"backend={backend!r} cannot run the kernels: {why_not}; backend='auto' takes PyTorch there")
    return "" if why_not else chosen


def _for_kernels(output: Tensor, streams: Tensor) -> Tensor:
    """The branch output itself, which may have a type of its own, as under autocast."""
    return output if output.dtype in kernels.DTYPES else output.to(streams.dtype)


def project(x: Tensor, rows: Tensor) -> Tensor:
    """RMSNorm(x) @ rows^T: (..., C), (K, C) -> (..., K), in the dtype of the rows."""
    if torch.jit.is_scripting():
        return plain.projections(x.to(rows.dtype), rows, True, False)[0]
    else:
        with plain.no_autocast(x.device.type):
            return (
                plain.projections(x.to(rows.dtype), rows, True, False)[0]
                if plain.is_plain()
                else _Project.apply(x, rows)[0]
            )


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
        grad_streams = plain.mix(grad_carried, to_carried.mT, None, None).contiguous()
        grads = [streams @ grad_carried.mT]
    else:
        grad_streams, grads = grad_carried.clone(), [to_carried]
    if grad_views is None:
        return grad_streams, [torch.zeros_like(to_views), *grads]
    grad_views = grad_views.to(alpha.dtype)
    grads.insert(0, streams @ grad_views.mT)
    if views == 1:
        grad_streams.addcmul_(to_views, grad_views)
    elif not plain.exact_matmul(grad_views):
        grad_streams.add_(plain.mix(grad_views, to_views.mT, None, None))
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
    """Those of the parameters, from those of what ``plain.prepare`` makes of them."""
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
    """``plain.prepare``."""

    @staticmethod
    def forward(center, dtype, *rule):
        return plain.prepare(rule, center, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.center, _, *rule = inputs
        ctx.save_for_backward(*rule)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *_prepared_gradients(ctx.saved_tensors, ctx.center, *grads)


def _kept(made: List[Tensor], norm: bool, center: bool, tanh: bool) -> List[Optional[Tensor]]:
    """Of what ``plain.coefficients`` made, what its gradient needs."""
    projected, dynamic, rstd, mean = made or (None, None, None, None)
    return [projected, dynamic if tanh else None, rstd if norm else None, mean if norm and center else None]


class _Width(torch.autograd.Function):
    """``plain.prepare``, ``plain.read`` and the streams, saving the streams and what the coefficients are made of."""

    @staticmethod
    def forward(streams, norm, center, tanh, *rule):
        views, alone = rule[0].shape[1] - rule[0].shape[0], rule[1].dim() == 1
        prepared = plain.prepare(rule, center and norm, streams.dtype)
        mixed, alpha, beta, made = plain.read(streams, views, alone, *prepared, norm, center, tanh)
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
        if plain.wants_operations((grad_views, grad_carried, grad_alpha, grad_beta)):

            def read(streams, *rule):
                prepared = plain.prepare(rule, center, streams.dtype)
                return plain.read_and_carry(
                    streams, views, rule[1].dim() == 1, *prepared, ctx.norm, ctx.center, ctx.tanh
                )

            grads = [grad_views, grad_alpha, grad_beta, grad_carried]
            grad_streams, *grads = plain.gradients(read, (streams, *rule), grads)
            return grad_streams, None, None, None, *grads
        with plain.no_autocast(streams.device.type):
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

    @staticmethod
    def forward(x, rows):
        return plain.projections(x.to(rows.dtype), rows, True, False)[:2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, rows, projected, rstd = ctx.saved_tensors
        if plain.wants_operations([grad]):
            return tuple(plain.gradients(_Project.forward, (x, rows), (grad, None)))
        x = x.to(rows.dtype)
        grad_x = x.new_zeros(x.shape)
        with plain.no_autocast(x.device.type):
            grad_rows = _projected_gradients(grad_x, x, rows, projected, grad, rstd, None)
        return grad_x, grad_rows


class _Weighed(torch.autograd.Function):
    """The views of streams by given weights, and the streams, for alpha^T @ streams that are about to be formed."""

    @staticmethod
    def forward(streams, alpha, views):
        return plain.mix(streams, alpha[..., :views], None, None), streams.view_as(streams)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.views = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_views, grad_carried):
        streams, alpha = ctx.saved_tensors
        if plain.wants_operations((grad_views, grad_carried)):

            def read(streams, alpha):
                to_views, to_carried = alpha[..., : ctx.views], alpha[..., ctx.views :]
                carried = plain.mix(streams, to_carried, None, None) if to_carried.shape[-1] else streams
                return plain.mix(streams, to_views, None, None), carried

            return *plain.gradients(read, (streams, alpha), (grad_views, grad_carried)), None
        with plain.no_autocast(streams.device.type):
            grads = _mixed_gradients(streams.to(alpha.dtype), alpha, ctx.views, grad_views, grad_carried)
            return grads[0], torch.cat(grads[1], dim=-1), None


class _Depth(torch.autograd.Function):
    """``plain.write``, saving the branch output and beta. The carried streams have the gradient of the next ones."""

    @staticmethod
    def forward(streams, alpha, output, beta):
        return plain.write(streams, alpha, output, beta)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, grad):
        output, beta = ctx.saved_tensors
        with plain.no_autocast(grad.device.type):
            if beta.dim() == grad.dim():  # every output went to every stream
                grad_output = plain.mix(grad, beta, None, None)
                grad_beta = grad @ output.to(grad.dtype).mT
            elif output.shape[-2] == 1:  # one output went to every stream (HC)
                grad_output = plain.mix(grad, beta[..., None], None, None)
                grad_beta = (grad @ output.to(grad.dtype).mT).squeeze(-1)
            else:  # or each its own (FC)
                grad_output = beta[..., None] * grad
                grad_beta = torch.linalg.vecdot(output.to(grad.dtype), grad)
        return grad, None, grad_output, grad_beta


class _AsGiven(inspect.Signature):
    """Takes arguments as they come. PyTorch binds them to ``forward`` in every call, for defaults, which ours lack."""

    def bind(self, *args: Any) -> Any:
        return types.SimpleNamespace(args=args, kwargs={}, apply_defaults=lambda: None)


_operators = [operator.differentiable for operator in (kernels.width, kernels.depth, kernels.join)]
for _function in (_Prepare, _Width, _Project, _Weighed, _Depth, *_operators):
    _function.forward.__signature__ = _AsGiven()  # type: ignore[attr-defined,union-attr]
