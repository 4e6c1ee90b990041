"""The entries of a history: taken from x and put together, mixed and scored, each kept once for backward.

Torch FX takes each function as one node, where it is called by way of this module (``entries.mix_entries``).
"""

from typing import Any, List

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from hcvision.connections import reference
from hcvision.connections.functions import skip_binding
from hcvision.connections.modes import needs_operations, needs_operations_backward, without_autocast

ENTRIES: Any = WeakTensorKeyDictionary()  # of x, and the version of x that they make


@torch.fx.wrap
def recall_entries(x: Tensor, count: int, dim: int) -> List[Tensor]:
    """The entries (..., D) of a history x (..., S*D).

    They are those that x was put together from, as long as x is what it was and nobody waits for its gradient: so
    backward keeps each entry once, not every x. Else they are parts of x.

    Raises:
        ValueError: x is not S*D wide.
    """
    if not torch.jit.is_tracing() and x.shape[-1] != count * dim:
        raise ValueError(
            f"x must have {count} entries of {dim} on its last axis, {count * dim} in all, got shape {list(x.shape)}"
        )
    if torch.jit.is_scripting():
        return list(x.split(dim, dim=-1))
    else:
        if count == 1:
            return [x]
        if not needs_operations() and x in ENTRIES and not x._backward_hooks and not x.retains_grad:
            entries, version = ENTRIES[x]
            if x._version == version:
                return list(entries)
        return list(x.split(dim, dim=-1))


@torch.fx.wrap
def join_entries(entries: List[Tensor]) -> Tensor:
    """Entries (..., D) side by side, in the type of the first: (..., S*D)."""
    x = torch.cat([entry.to(entries[0].dtype) for entry in entries], dim=-1)
    if torch.jit.is_scripting():
        return x
    else:
        if x.requires_grad and not needs_operations():  # else there is no backward that would keep them
            ENTRIES[x] = tuple(entries), x._version
        return x


@torch.fx.wrap
def write_entry(entries: List[Tensor], output: Tensor, view: Tensor, count: int, keeps_view: bool) -> List[Tensor]:
    """The entries with an output: one entry more, or the newest one with it added, so that there are ``count``.

    Raises:
        ValueError: the output is not shaped like the view.
    """
    if not torch.jit.is_tracing() and output.shape != view.shape:
        raise ValueError(f"the branch must return the shape it was given, {list(view.shape)}, got {list(output.shape)}")
    if count > len(entries):
        return entries + [view + output if keeps_view else output]  # noqa: RUF005 - TorchScript
    return entries[:-1] + [entries[-1] + output]  # noqa: RUF005


@torch.fx.wrap
def newest(entries: List[Tensor]) -> Tensor:
    """The last one."""
    return entries[-1]


@torch.fx.wrap
def take_newest(entries: List[Tensor]) -> Tensor:
    """0, ..., 0, 1 in float32 at least: (S,)."""
    dtype = torch.promote_types(entries[0].dtype, torch.float32)
    weights = torch.zeros(len(entries), dtype=dtype, device=entries[0].device)
    weights[-1] = 1
    return weights


@torch.fx.wrap
def widen(weights: Tensor) -> Tensor:
    """In float32 at least."""
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


@torch.fx.wrap
def mix_entries(entries: List[Tensor], weights: Tensor) -> Tensor:
    """sum_j weights_j v_j in the type of the first entry, by additions in their order: (..., D)."""
    dtype = entries[0].dtype
    if torch.jit.is_scripting():
        return add_entries(entries, weights).to(dtype)
    else:
        with without_autocast(weights.device.type):
            if needs_operations():
                return add_entries(entries, weights).to(dtype)
            return Mix.apply(weights, *entries).to(dtype)


@torch.fx.wrap
def mix_ways(entries: List[Tensor], weights: Tensor) -> List[Tensor]:
    """``mix_entries`` by weights (..., W, S): W mixtures."""
    return [mix_entries(entries, weights[..., way, :]) for way in range(weights.shape[-2])]


@torch.fx.wrap
def join_ways(views: List[Tensor]) -> Tensor:
    """All mixtures but the last one side by side: (..., (W-1) D)."""
    return torch.cat(views[:-1], dim=-1)


@torch.fx.wrap
def weigh(entries: List[Tensor], static: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """static (W, S) + GELU(RMSNorm(v) @ down) @ up of the newest entry v, in float32 at least: (..., [W,] S).

    RMSNorm has an eps of 1e-6 and no weight.
    """
    if torch.jit.is_scripting():
        return make_weights(entries[-1], static, down, up)
    else:
        with without_autocast(static.device.type):
            return make_weights(entries[-1], static, down, up)


@torch.fx.wrap
def score_entries(entries: List[Tensor], query: Tensor) -> Tensor:
    """query . RMSNorm(v_j) / sqrt(D) of a query (D,) or (B, 1, ..., D), in float32 at least: (..., S)."""
    if torch.jit.is_scripting():
        return project_entries(entries, query)
    else:
        with without_autocast(query.device.type):
            if needs_operations():
                return project_entries(entries, query)
            return Score.apply(query, *entries)


@torch.fx.wrap
def add_time(query: Tensor, scale: Tensor, time: Tensor, entries: List[Tensor]) -> Tensor:
    """The query (D,) and a number times the time embeddings (B, D), for entries (B, ..., D): (B, 1, ..., D).

    Raises:
        ValueError: the embeddings are not (B, D).
    """
    first = entries[0]
    expected = [first.shape[0], first.shape[-1]]
    if not torch.jit.is_tracing() and list(time.shape) != expected:
        raise ValueError(f"the time embedding must be {expected}, got {list(time.shape)}")
    wide = time.to(torch.promote_types(time.dtype, torch.float32))
    places = [first.shape[0]] + [1] * (first.dim() - 2) + [first.shape[-1]]
    return query + scale * wide.reshape(places)


@torch.fx.wrap
def attend(scores: Tensor) -> Tensor:
    """S times the softmax: (..., S), exactly 1 where scores are equal."""
    powers = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return powers / powers.mean(-1, keepdim=True)


def add_entries(entries: List[Tensor], weights: Tensor) -> Tensor:
    """``mix_entries`` in PyTorch's operations, in float32 at least."""
    mixture = weights[..., 0, None] * entries[0]
    for j in range(1, len(entries)):
        mixture = mixture + weights[..., j, None] * entries[j]
    return mixture


def project_entries(entries: List[Tensor], query: Tensor) -> Tensor:
    """``score_entries`` in PyTorch's operations."""
    scores: List[Tensor] = []
    for entry in entries:
        wide = entry.to(torch.promote_types(entry.dtype, torch.float32))
        scores.append((wide * query.to(wide.dtype)).sum(-1) * measure(wide).squeeze(-1))
    return torch.stack(scores, dim=-1)


def make_weights(entry: Tensor, static: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``weigh`` of the newest entry."""
    wide = entry.to(torch.promote_types(entry.dtype, torch.float32))
    hidden = F.gelu((wide * (measure(wide) * wide.shape[-1] ** 0.5)) @ down.to(wide.dtype))
    weights = (hidden @ up.to(wide.dtype)).reshape(list(entry.shape[:-1]) + list(static.shape)) + static
    return weights if static.shape[0] > 1 else weights[..., 0, :]


def measure(entry: Tensor) -> Tensor:
    """What RMSNorm, with an eps of 1e-6, and sqrt(D) multiply an entry (..., D) by: (..., 1)."""
    return (entry.square().sum(-1, keepdim=True) + 1e-6 * entry.shape[-1]).rsqrt()


@skip_binding
class Mix(torch.autograd.Function):
    """``add_entries``, which keeps the entries as they are, not what they are in float32."""

    @staticmethod
    def forward(weights, *entries):
        mixture = weights[..., 0, None] * entries[0]
        for j, entry in enumerate(entries[1:], 1):
            mixture.addcmul_(weights[..., j, None], entry)
        return mixture

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        weights, *entries = ctx.saved_tensors
        if needs_operations_backward([grad]):
            return tuple(reference.gradients(mix_operations, (weights, *entries), [grad]))
        with without_autocast(grad.device.type):
            grad_weights = torch.stack([(grad * entry).sum(-1) for entry in entries], dim=-1)
            grads = [(weights[..., j, None] * grad).to(entry.dtype) for j, entry in enumerate(entries)]
            return grad_weights.sum_to_size(weights.shape), *grads


@skip_binding
class Score(torch.autograd.Function):
    """``project_entries``, which keeps the entries as they are."""

    @staticmethod
    def forward(query, *entries):
        return project_entries(list(entries), query)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, grad):
        query, *entries, scores = ctx.saved_tensors
        if needs_operations_backward([grad]):
            return tuple(reference.gradients(score_operations, (query, *entries), [grad]))
        with without_autocast(grad.device.type):
            wide_query, grad_query, grads = query.to(grad.dtype), torch.zeros_like(query, dtype=grad.dtype), []
            for j, entry in enumerate(entries):
                wide = entry.to(grad.dtype)
                inverse = measure(wide)
                back, score = grad[..., j, None] * inverse, scores[..., j, None]
                grad_query += (back * wide).sum_to_size(query.shape)
                grads.append((back * (wide_query - wide * (score * inverse))).to(entry.dtype))
            return grad_query.to(query.dtype), *grads


def mix_operations(weights: Tensor, *entries: Tensor) -> tuple[Tensor]:
    return (add_entries(list(entries), weights),)


def score_operations(query: Tensor, *entries: Tensor) -> tuple[Tensor]:
    return (project_entries(list(entries), query),)
