"""Connections that see the time of a diffusion model: the update by hand, its gradients, and the start."""

import copy

import pytest
import torch
from test_connections import random_branch, random_connection
from torch.nn import functional as F

from hcvision.connections.manifold import ITERATIONS
from hcvision.connections.names import TIMED, build_connection, parse_connection

NAMES = ("shc2", "dhc3", "sfc3", "dfc2", "mhc3", "ihc2")
TIME = 7


def build(name, dim=12):
    return random_connection(name, dim, layer_index=1, time_dim=TIME)


def by_hand(name, p, x, e, branch):
    """Stream by stream from the papers' equations, with the term of the time in the place of its coefficient."""
    kind, n = parse_connection(name)
    views = n if kind.endswith("fc") else 1
    width = x.shape[-1] // n
    streams = [x[..., i * width : (i + 1) * width] for i in range(n)]
    silu = e / (1 + torch.exp(-e))

    def term(what, place):  # (B, 1): one number for each image
        return (silu @ p[f"time_term.fn_{what}"][:, place])[:, None]

    def projected(what):
        along = torch.cat(streams, dim=-1)
        along = along / (along.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return p[f"scale_{what}"] * (along @ p[f"phi_{what}"]) + p[f"bias_{what}"]

    if kind in ("mhc", "ihc"):
        pre, post = projected("pre"), projected("post")
        read = [[torch.sigmoid(pre[..., i] + term("pre", i))] for i in range(n)]
        write = [2 * torch.sigmoid(post[..., i] + term("post", i)) for i in range(n)]
        carry = [[torch.ones(()) if i == j else torch.zeros(()) for j in range(n)] for i in range(n)]
        if kind == "mhc":
            res = projected("res")
            rows = [[(res[..., i * n + j] + term("res", i * n + j)).exp() for j in range(n)] for i in range(n)]
            mixing = torch.stack([torch.stack(row, -1) for row in rows], -2)
            for _ in range(ITERATIONS):
                mixing = mixing / mixing.sum(-2, keepdim=True)
                mixing = mixing / mixing.sum(-1, keepdim=True)
            carry = [[mixing[..., j, i] for j in range(n)] for i in range(n)]  # from stream i into the next stream j
    else:
        read, write, carry = [], [], []
        for i, h in enumerate(streams):
            alpha = [p["static_alpha"][i, j] + term("alpha", i * (views + n) + j) for j in range(views + n)]
            beta = p["static_beta"][i] + term("beta", i)
            if kind[0] == "d":
                if kind == "dhc":
                    z = F.layer_norm(h, (width,), eps=1e-6)
                else:
                    z = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["norm_weight"]
                seen = torch.tanh(z @ p["dynamic_alpha_fn"])
                alpha = [a + p["dynamic_alpha_scale"] * seen[..., j] for j, a in enumerate(alpha)]
                beta = beta + p["dynamic_beta_scale"] * torch.tanh(z @ p["dynamic_beta_fn"])[..., 0]
            read.append(alpha[:views])
            carry.append(alpha[views:])
            write.append(beta)
    view = torch.cat([sum(read[i][v][..., None] * streams[i] for i in range(n)) for v in range(views)], dim=-1)
    out = branch(view).unflatten(-1, (views, -1))
    after = []
    for j in range(n):
        kept = sum(carry[i][j][..., None] * streams[i] for i in range(n))
        after.append(write[j][..., None] * out[..., j if views > 1 else 0, :] + kept)
    return torch.cat(after, dim=-1)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name, recompute):
    """Forward and every gradient, that of the time too, with random parameters in float64; joined sub-layers too."""
    connection = build(name)
    connection.recompute = recompute
    x = torch.randn(2, 3, connection.width, dtype=torch.float64, requires_grad=True)
    e = torch.randn(2, TIME, dtype=torch.float64, requires_grad=True)
    weight, branch = random_branch(12)
    p = dict(connection.named_parameters())
    view, carried = connection.width_connection(x, e)
    view, carried = connection.join(branch(view), carried, e)
    ours = connection.depth_connection(branch(view), carried)
    theirs = by_hand(name, p, by_hand(name, p, x, e, branch), e, branch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    torch.testing.assert_close(connection(x, branch, time=e), by_hand(name, p, x, e, branch), rtol=0, atol=1e-12)
    leaves, seed = {"x": x, "time": e, "branch": weight, **p}, torch.randn_like(ours)
    for leaf, a, b in zip(
        leaves,
        torch.autograd.grad(ours, list(leaves.values()), seed),
        torch.autograd.grad(theirs, list(leaves.values()), seed),
        strict=True,
    ):
        assert b.abs().max() > 1e-6, f"the gradient of {leaf} says nothing"
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda m, leaf=leaf: f"gradient of {leaf}: {m}")


@pytest.mark.parametrize("name", ["mhclite3", "krom4"])
def test_terms_stand_beside_biases(name):
    """Of mHC with other mixing matrices too: one image's weights are those of biases that have its terms added."""
    timed = build(name)
    other = copy.deepcopy(timed)
    x, e = torch.randn(1, 5, timed.width, dtype=torch.float64), torch.randn(1, TIME, dtype=torch.float64)
    with torch.no_grad():
        for part in ("pre", "post", "res"):
            getattr(other, f"bias_{part}").add_((F.silu(e) @ getattr(other.time_term, f"fn_{part}"))[0])
    for a, b in zip(timed.weights(x, e), other.weights(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*NAMES, "mhclite3", "krom4"])
def test_at_init_it_says_nothing(name):
    """The same as without it, and without a time; after a step on its parameters it is something else."""
    plain, timed = (build_connection(name, 12, 1, **more) for more in ({}, {"time_dim": TIME}))
    x, e = torch.randn(2, 3, plain.width), torch.randn(2, TIME)
    _, branch = random_branch(12, torch.float32)
    expected = plain(x, branch)
    torch.testing.assert_close(timed(x, branch, time=e), expected, rtol=1e-6, atol=1e-6)  # one may be a kernel's
    torch.testing.assert_close(timed(x, branch), expected)
    for one, other in zip(timed.weights(x, e), plain.weights(x), strict=True):
        torch.testing.assert_close(one, other.expand_as(one), rtol=1e-6, atol=1e-6)
    timed(x, branch, time=e).square().sum().backward()
    for key, parameter in timed.named_parameters():
        if key.startswith("time_term."):
            assert parameter.grad.abs().max() > 0, key
            parameter.data -= parameter.grad
    assert (timed(x, branch, time=e) - expected).abs().max() > 1e-3
    timed.reset_parameters()
    torch.testing.assert_close(timed(x, branch, time=e), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "count"), [("dhc2", 8), ("dhc4", 24), ("dfc2", 10), ("mhc4", 24), ("ihc4", 8)])
def test_parameters(name, count):
    """A row of time_dim numbers for each static coefficient."""
    plain, timed = (build_connection(name, 16, **more) for more in ({}, {"time_dim": TIME}))
    sizes = [sum(p.numel() for p in connection.parameters()) for connection in (plain, timed)]
    assert sizes[1] - sizes[0] == TIME * count
    assert not any("time_term" in key for key in timed.no_weight_decay())


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_write_may_be_a_kernel(backend):
    """Both forms give the same; a backend that has none for the kind says so as ever."""
    timed = build("dhc2").float()
    timed.choose_backend(backend)
    x, e = torch.randn(2, 3, timed.width), torch.randn(2, TIME)
    _, branch = random_branch(12, torch.float32)
    exact = copy.deepcopy(timed).double()
    exact.choose_backend("torch")
    expected = exact(x.double(), lambda v: branch(v.float()).double(), time=e.double())
    torch.testing.assert_close(timed(x, branch, time=e), expected.float(), rtol=1e-5, atol=1e-5)


def test_bfloat16():
    """Coefficients are made in float32, whatever the type of the streams, of the time, and of autocast."""
    timed = build("dhc2").float()
    x, e = torch.randn(2, 3, timed.width), torch.randn(2, TIME)
    exact = timed.weights(x, e)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(timed.weights(x, e), exact, strict=True):
            assert torch.equal(a, b)
    assert timed.weights(x.bfloat16(), e.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["dhc2", "mhc2"])
def test_under_torch_func(name):
    """The derivative along the time, by plain operations."""
    timed = build(name)
    x, e = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((3, timed.width), (TIME,)))
    _, branch = random_branch(12)
    run = lambda e: timed(x, branch, time=e)  # noqa: E731
    direction = torch.randn_like(e)
    _, along = torch.func.jvp(run, (e,), (direction,))
    step = 1e-6
    torch.testing.assert_close(
        along, (run(e + step * direction) - run(e - step * direction)) / (2 * step), rtol=1e-6, atol=1e-7
    )


def test_errors():
    timed, x = build("dhc2"), torch.randn(2, 3, 24, dtype=torch.float64)
    for shape in ((2, TIME + 1), (3, TIME), (2, 3, TIME)):
        with pytest.raises(ValueError, match=rf"must be \(B, {TIME}\) for streams of 2 images, got \({shape[0]}, "):
            timed.weights(x, torch.randn(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="time_dim must be an integer of at least 1, got 0"):
        build_connection("dhc2", 12, time_dim=0)
    assert [build_connection(f"{kind}2", 12, time_dim=TIME).time for kind in TIMED] == [True] * 8
