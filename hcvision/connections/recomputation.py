"""Streams that are computed again in backward instead of being kept (mHC, arXiv 2512.24880, section 4.3).

What the depth-connection makes follows from what was there before and the branch output, which is kept anyway. A
recipe says so, and lives as long as the tensor that it describes, or as autograd keeps it in the place of the streams.
A compiler is told to do the same by way of a checkpoint around the rule. ``hcvision.recompute_streams`` chooses where.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from hcvision.connections import layout
from hcvision.connections.modes import is_exporting, needs_operations

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # of streams, by their connection


class Recipe:
    """How streams (..., S, E) follow from those before them. Calling it gives them."""

    def __init__(
        self, before: "Tensor | Recipe", ingredients: tuple[Tensor, Tensor, Tensor], update: Update, version: int
    ):
        self.before, self.ingredients, self.update = before, ingredients, update
        self.version = version  # of the streams that were made; who changes them in place makes others
        self.known: Tensor | None = None  # on the way to later streams, for the one who asks next

    @torch.no_grad()
    def __call__(self) -> Tensor:
        pending: list[Recipe] = []
        start: Tensor | Recipe = self
        while isinstance(start, Recipe) and start.known is None:
            pending.append(start)
            start = start.before
        streams = start.known if isinstance(start, Recipe) else start
        assert streams is not None
        for recipe in reversed(pending):
            output, alpha, beta = recipe.ingredients
            following = recipe.update(streams, output, alpha, beta, streams.detach())
            streams = layout.split_last(following, streams.shape[-2])
            recipe.known = streams
        self.known = None
        return streams


RECIPES: Any = WeakTensorKeyDictionary()


def depth_connection(
    update: Update, streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, placeholder: Tensor
) -> Tensor:
    """``update``, the second step of a connection, whose outcome need not be kept for backward."""
    if torch.compiler.is_compiling() and not is_exporting():
        return checkpoint(
            update, streams, output, alpha, beta, placeholder, use_reentrant=False, preserve_rng_state=False
        )
    x = update(streams, output, alpha, beta, placeholder)
    record(x, streams, output, alpha, beta, update)
    return x


def record(x: Tensor, streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, update: Update) -> None:
    """Note on x, (..., S*E), how it follows from the streams before it."""
    if isinstance(x, torch.fx.Proxy) or needs_operations():
        return
    before = RECIPES.get(streams, streams.detach())
    ingredients = (output.detach(), alpha.detach(), beta.detach())
    RECIPES[x] = Recipe(before, ingredients, update, x._version)


@contextlib.contextmanager
def keep_recipe(x: Tensor, streams: Tensor) -> Iterator[None]:
    """Let autograd keep the recipe of x, if it has one, wherever it would keep the streams (..., S, E), a view of x."""
    if isinstance(x, torch.fx.Proxy) or needs_operations():
        yield
        return
    recipe = RECIPES.get(x)
    if recipe is None or recipe.version != x._version:
        yield
        return
    RECIPES[streams] = recipe
    place = (streams.data_ptr(), streams.shape)

    def pack(tensor: Tensor) -> Tensor | Recipe:
        return recipe if (tensor.data_ptr(), tensor.shape) == place else tensor.detach()

    def unpack(kept: Tensor | Recipe) -> Tensor:
        return kept() if isinstance(kept, Recipe) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
