"""hcvision.connections: the update rule and its gradients, its values at init, its numerics and memory."""

import copy
import io

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from hcvision.connections.base import Residual, expand_streams, reduce_streams
from hcvision.connections.frac import FracConnection
from hcvision.connections.hyper import HyperConnection
from hcvision.connections.names import build_connection, parse_connection

KINDS = ("shc", "dhc", "sfc", "dfc")
RATES = (1, 2, 3, 4, 8)
DIM = 24  # every rate divides it
FOUR = ("shc2", "dhc2", "sfc2", "dfc2")
EVERY = (*FOUR, "mhc2", "ihc2", "ghc2x3", "sihc2", "gr2", "oru", "laurel", "mhclite3", "krom4")
STEPS = {  # of kinds that have some of their own
    "mhc2": ("read_streams", "depth_connection"),
    "ihc2": ("read_streams", "depth_connection"),
    "mhclite3": ("read_streams", "depth_connection"),
    "krom4": ("read_streams", "depth_connection"),
    "sihc2": ("read_channels", "write_channels"),
    "gr2": ("read_gated", "depth_connection"),
    "oru": ("read_whole", "update_orthogonal"),
    "laurel": ("read_low_rank", "update_low_rank"),
}
DYNAMIC = ("dhc2", "dfc2")


def random_connection(name, dim=DIM, dtype=torch.float64, **options):
    """A connection whose parameters are all random and of order one."""
    torch.manual_seed(0)
    connection = build_connection(name, dim, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.normal_(std=0.6)
    return connection


def random_branch(width, dtype=torch.float64):
    """A branch that is not linear, mixes the channels, and has a weight."""
    weight = (torch.randn(width, width, dtype=dtype) / width**0.5).requires_grad_()
    return weight, lambda views: torch.tanh(views @ weight)


def reference_weights(kind, rate, parameters, x, tanh=True, norm=True):
    """One alpha row (..., V+S) and one beta (...) per stream: HC eq. 10-14, FC eq. 8-12."""
    width, alphas, betas = x.shape[-1] // rate, [], []
    for i in range(rate):
        alpha, beta = parameters["static_alpha"][i], parameters["static_beta"][i]
        if kind[0] == "d":
            h = x[..., i * width : (i + 1) * width]
            if norm and kind == "dhc":
                mean = h.sum(-1, keepdim=True) / width
                h = (h - mean) / (((h - mean) ** 2).sum(-1, keepdim=True) / width + 1e-6).sqrt()
            elif norm:
                h = h / ((h**2).sum(-1, keepdim=True) / width + 1e-6).sqrt() * parameters["norm_weight"]
            for_alpha = torch.einsum("...e,ek->...k", h, parameters["dynamic_alpha_fn"])
            for_beta = torch.einsum("...e,e->...", h, parameters["dynamic_beta_fn"][:, 0])
            if tanh:
                for_alpha, for_beta = torch.tanh(for_alpha), torch.tanh(for_beta)
            alpha = alpha + parameters["dynamic_alpha_scale"][0] * for_alpha
            beta = beta + parameters["dynamic_beta_scale"][0] * for_beta
        alphas.append(alpha)
        betas.append(beta)
    return alphas, betas


def reference(kind, rate, parameters, x, branch, tanh=True, norm=True):
    """Both papers' algorithm with loops over the streams: HC alg. 1-3, FC alg. 1."""
    alphas, betas = reference_weights(kind, rate, parameters, x, tanh, norm)
    views, width = 1 if kind[1:] == "hc" else rate, x.shape[-1] // rate
    streams = [x[..., i * width : (i + 1) * width] for i in range(rate)]
    mixed = [sum(alphas[i][..., k, None] * streams[i] for i in range(rate)) for k in range(views + rate)]
    out = branch(torch.cat(mixed[:views], dim=-1))
    outs = [out] * rate if views == 1 else [out[..., i * width : (i + 1) * width] for i in range(rate)]
    return torch.cat([betas[i][..., None] * outs[i] + mixed[views + i] for i in range(rate)], dim=-1)


def check_against_reference(name, dim=DIM, tokens=(2, 3), **options):
    kind, rate = parse_connection(name)
    connection = random_connection(name, dim, **options)
    x = torch.randn(*tokens, connection.width, dtype=torch.float64, requires_grad=True)
    weight, branch = random_branch(dim)
    parameters = dict(connection.named_parameters())
    ours, theirs = connection(x, branch), reference(kind, rate, parameters, x, branch, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    seed, leaves = torch.randn_like(ours), [x, weight, *parameters.values()]
    for name, a, b in zip(
        ("x", "branch", *parameters),
        torch.autograd.grad(ours, leaves, seed),
        torch.autograd.grad(theirs, leaves, seed),
        strict=True,
    ):
        assert b.abs().max() > 1e-5, f"the gradient of {name} says nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, name=name: f"gradient of {name}: {m}")


# the rule


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", KINDS)
def test_papers(kind, rate):
    """Forward and every gradient are the papers', with random parameters (an identity hides a transpose)."""
    check_against_reference(f"{kind}{rate}")


@pytest.mark.parametrize("options", [{"tanh": False}, {"norm": False}, {"tanh": False, "norm": False}], ids=str)
@pytest.mark.parametrize("name", ["shc3", "dhc1", "dhc3", "dfc1", "dfc3"])
def test_papers_options(name, options):
    """The same without tanh, without norm, without both."""
    check_against_reference(name, **options)


@pytest.mark.parametrize("tokens", [(), (5,), (2, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", ["shc2", "dhc2", "sfc2", "dfc2", "dfc8"])
def test_papers_leading_dims(name, tokens):
    """Any number of leading dims, none included; dfc8 of dim 8 has streams one number wide."""
    check_against_reference(name, dim=8, tokens=tokens)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights(kind, rate):
    """weights(x) is alpha (..., S, V+S), row i for stream i, and beta (..., S)."""
    connection = random_connection(f"{kind}{rate}")
    x = torch.randn(2, 3, connection.width, dtype=torch.float64)
    alphas, betas = reference_weights(kind, rate, dict(connection.named_parameters()), x)
    views = 1 if kind[1:] == "hc" else rate
    expected_alpha = torch.stack([row.expand(2, 3, -1) for row in alphas], dim=-2)
    expected_beta = torch.stack([one.expand(2, 3) for one in betas], dim=-1)
    alpha, beta = connection.weights(x)
    assert alpha.shape == (2, 3, rate, views + rate)
    assert beta.shape == (2, 3, rate)
    torch.testing.assert_close(alpha, expected_alpha, rtol=0, atol=1e-12)
    torch.testing.assert_close(beta, expected_beta, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in EVERY] + [(name, {"tanh": False, "norm": False}) for name in (*FOUR, "ghc2x3")],
)
def test_derivatives(name, options):
    """First and second derivatives against finite differences, in forward mode and in batches too."""
    connection = random_connection(name, 4, **options)
    names, values = [*dict(connection.named_parameters())], [*connection.parameters()]

    def run(x, *values):
        return functional_call(connection, dict(zip(names, values, strict=True)), (x, lambda v: v.sin() * v))

    inputs = (torch.randn(2, connection.width, dtype=torch.float64, requires_grad=True), *values)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)
    batches = {"check_batched_grad": True, "fast_mode": True}
    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_forward_grad=True, **batches)
    assert gradgradcheck(run, inputs, check_fwd_over_rev=True, **batches)


@pytest.mark.parametrize("name", EVERY)
def test_width_outputs_alone(name):
    """The coefficients are differentiable by themselves, and so is the branch input."""
    connection = random_connection(name, 4)
    x = torch.randn(2, connection.width, dtype=torch.float64, requires_grad=True)
    if name in DYNAMIC:
        assert gradcheck(connection.weights, (x,))
    assert gradcheck(lambda x: connection.width_connection(x)[0], (x,))


@pytest.mark.parametrize("name", ["residual", *EVERY])
def test_forward_is_both_steps(name):
    connection = random_connection(name) if name != "residual" else Residual(DIM)
    x = torch.randn(2, 3, connection.width, dtype=torch.float64)
    _, branch = random_branch(DIM)
    views, carried = connection.width_connection(x)
    assert torch.equal(connection(x, branch), connection.depth_connection(branch(views), carried))


@pytest.mark.parametrize("name", EVERY)
def test_frozen_parts(name):
    """Freezing any parameter leaves the other gradients as they are."""
    connection = random_connection(name)
    x = torch.randn(2, 3, connection.width, dtype=torch.float64)
    _, branch = random_branch(DIM)

    def gradients():
        connection.zero_grad()
        connection(x, branch).square().sum().backward()
        return {name: p.grad for name, p in connection.named_parameters()}

    free = gradients()
    for frozen, parameter in connection.named_parameters():
        parameter.requires_grad_(False)
        for other, value in gradients().items():
            assert value is None if other == frozen else torch.equal(value, free[other])
        parameter.requires_grad_(True)


def test_streams():
    """Stream j of x is x[..., j*E:(j+1)*E]; one enters as n copies and leaves as their mean."""
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.equal(expand_streams(x, 3), torch.cat([x, x, x], dim=-1))
    y = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(reduce_streams(y, 3), (y[..., :4] + y[..., 4:8] + y[..., 8:]) / 3, rtol=0, atol=1e-15)


# parameters


@pytest.mark.parametrize(("name", "count"), [("dhc4", 394_048), ("dfc4", 165_056)])
def test_olmo_1b(name, count):
    """The papers' own counts for OLMo-1B: width 2048, 16 blocks of two sub-layers."""
    connections = [build_connection(name, 2048, k) for k in range(32)]
    assert sum(p.numel() for c in connections for p in c.parameters()) == count


@pytest.mark.parametrize("rate", RATES)
def test_parameters(rate):
    """Names, shapes and counts of the table."""

    def shapes(name, **options):
        return {key: tuple(p.shape) for key, p in build_connection(name, DIM, **options).state_dict().items()}

    n, width = rate, DIM // rate
    hyper = {"static_alpha": (n, 1 + n), "static_beta": (n,)}
    frac = {"static_alpha": (n, 2 * n), "static_beta": (n,)}
    scales = {"dynamic_alpha_scale": (1,), "dynamic_beta_scale": (1,)}
    dynamic_hyper = {**hyper, **scales, "dynamic_alpha_fn": (DIM, 1 + n), "dynamic_beta_fn": (DIM, 1)}
    dynamic_frac = {**frac, **scales, "dynamic_alpha_fn": (width, 2 * n), "dynamic_beta_fn": (width, 1)}
    assert shapes(f"shc{n}") == hyper
    assert shapes(f"sfc{n}") == frac
    assert shapes(f"dhc{n}") == dynamic_hyper
    assert shapes(f"dfc{n}") == {**dynamic_frac, "norm_weight": (width,)}
    assert shapes(f"dfc{n}", norm=False) == dynamic_frac

    def count(name):
        return sum(p.numel() for p in build_connection(name, DIM).parameters())

    assert count(f"shc{n}") == n * (n + 2)
    assert count(f"dhc{n}") == DIM * (n + 2) + n * (n + 2) + 2
    assert count(f"sfc{n}") == n * (2 * n + 1)
    assert count(f"dfc{n}") == width + width * (2 * n + 1) + n * (2 * n + 1) + 2


@pytest.mark.parametrize("layer_index", range(5))
@pytest.mark.parametrize("rate", RATES)
def test_initial_values(rate, layer_index):
    """HC: [one_hot(k mod n) | I]; FC: [I | I]; ones; zero fn; scales of 0.01; norm weight of ones."""
    for kind in KINDS:
        state = build_connection(f"{kind}{rate}", DIM, layer_index).state_dict()
        eye = [[float(i == j) for j in range(rate)] for i in range(rate)]
        read = [[float(i == layer_index % rate)] for i in range(rate)] if kind[1:] == "hc" else eye
        assert state.pop("static_alpha").tolist() == [a + b for a, b in zip(read, eye, strict=True)]
        assert state.pop("static_beta").tolist() == [1.0] * rate
        for key, value in state.items():
            expected = 0.01 if key.endswith("scale") else 1.0 if key == "norm_weight" else 0.0
            assert torch.equal(value, torch.full_like(value, expected)), key


def test_pre_norm_is_rate_one():
    """[[0, B], [A_m, A_r]] of HC n=1 is [[0, 1], [1, 1]]: the residual add."""
    for name in ("shc1", "dhc1"):
        connection = build_connection(name, 4)
        assert connection.static_alpha.tolist() == [[1.0, 1.0]]
        assert connection.static_beta.tolist() == [1.0]
        x = torch.randn(2, 3, 4)
        assert torch.equal(connection(x, torch.sin), x + x.sin())


@pytest.mark.parametrize(
    ("rate", "layer_index", "matrix"),
    [
        (2, 0, [[0, 1, 0], [1, 1, 1], [1, 1, 1]]),
        (2, 1, [[0, 0, 1], [0, 1, 0], [1, 0, 1]]),
        (2, 2, [[0, 1, 0], [1, 1, 1], [1, 1, 1]]),
        (3, 0, [[0, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        (3, 4, [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]),
        (3, 5, [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]),
    ],
)
def test_parallel_matrices(rate, layer_index, matrix):
    """[[0, B], [A_m, A_r]] of the parallel arrangement (HC eq. 54, 55)."""
    connection = HyperConnection(4, rate, layer_index, dynamic=False, arrangement="parallel")
    assert connection.static_alpha.tolist() == [[float(v) for v in row] for row in matrix[1:]]
    assert connection.static_beta.tolist() == [float(v) for v in matrix[0][1:]]


@pytest.mark.parametrize("rate", [2, 3])
def test_parallel_groups(rate):
    """n sub-layers read the same sum s; the next group reads n copies of s and their outputs (HC eq. 53)."""
    inputs, outputs = [], []
    weights = torch.randn(3 * rate, 4, 4, dtype=torch.float64)
    x = torch.randn(5, rate * 4, dtype=torch.float64)
    for k in range(3 * rate):
        connection = HyperConnection(4, rate, k, arrangement="parallel", dtype=torch.float64)

        def branch(views, k=k):
            inputs.append(views)
            outputs.append(torch.tanh(views @ weights[k]))
            return outputs[-1]

        shared = x.unflatten(-1, (rate, 4)).sum(-2) if k % rate == 0 else shared  # noqa: F821
        x = connection(x, branch)
        torch.testing.assert_close(inputs[k], shared, rtol=0, atol=1e-12)
    for start in range(rate, 3 * rate, rate):
        expected = rate * inputs[start - 1] + sum(outputs[start - rate : start])
        torch.testing.assert_close(inputs[start], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_reset_and_meta(name):
    """reset_parameters restores the initial values, also after a start on the meta device."""
    options = {"arrangement": "parallel"} if name in ("shc2", "dhc2") else {}
    fresh = build_connection(name, 4, 3, **options)
    used = random_connection(name, 4, dtype=torch.float32, layer_index=3, **options)
    meta = build_connection(name, 4, 3, device="meta", **options)
    assert all(p.is_meta for p in meta.parameters())
    empty = meta.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(float("nan"))
    for connection in (used, empty):
        connection.reset_parameters()
        for key, value in fresh.state_dict().items():
            assert torch.equal(connection.state_dict()[key], value), key
    for dtype in (torch.float64, torch.bfloat16):
        cast = build_connection(name, 4, 3, device="cpu", dtype=dtype, **options)
        for key, value in fresh.state_dict().items():
            is_small = value.dtype == torch.float32 and value.numel() == 1 and "scale" in key
            expected = torch.tensor(0.01, dtype=dtype).expand(1) if is_small else value.to(dtype)
            assert torch.equal(cast.state_dict()[key], expected), key


@pytest.mark.parametrize("name", EVERY)
def test_no_weight_decay(name):
    """Decay would erode A_r = I: only the dynamic projections take it."""
    connection = build_connection(name, 4)
    decayed = {key for key, _ in connection.named_parameters()} - connection.no_weight_decay()
    others = {
        "mhc2": {"phi_pre", "phi_post", "phi_res"},
        "ihc2": {"phi_pre", "phi_post"},
        "mhclite3": {"phi_pre", "phi_post", "phi_res"},
        "krom4": {"phi_pre", "phi_post", "phi_res"},
        "gr2": {"gate_down", "gate_up", "write_fn"},
        "laurel": {"low_rank_a", "low_rank_b"},
    }
    assert decayed == others.get(name, {"dynamic_alpha_fn", "dynamic_beta_fn"} if name[0] in "dg" else set())
    assert connection.no_weight_decay() <= {key for key, _ in connection.named_parameters()}


# at init


def sublayer(dim, dtype=torch.float32):
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)).to(dtype)


@pytest.mark.parametrize("kind", ["shc", "dhc"])
@pytest.mark.parametrize("rate", RATES)
def test_hyper_at_init(rate, kind):
    """Every stream is the Pre-Norm residual stream, exactly, over 2n+1 sub-layers."""
    torch.manual_seed(0)
    residual = torch.randn(2, 3, DIM)
    x = expand_streams(residual, rate)
    for k in range(2 * rate + 1):
        branch = sublayer(DIM)
        x, residual = build_connection(f"{kind}{rate}", DIM, k)(x, branch), residual + branch(residual)
        for stream in x.unflatten(-1, (rate, DIM)).unbind(-2):
            assert torch.equal(stream, residual)


@pytest.mark.parametrize("kind", ["sfc", "dfc"])
@pytest.mark.parametrize("rate", RATES)
def test_frac_at_init(rate, kind):
    """Bit-identical to the residual add."""
    torch.manual_seed(0)
    residual = x = torch.randn(2, 3, DIM)
    for k in range(4):
        branch = sublayer(DIM)
        x, residual = build_connection(f"{kind}{rate}", DIM, k)(x, branch), residual + branch(residual)
        assert torch.equal(x, residual)


@pytest.mark.parametrize("name", DYNAMIC)
def test_first_gradients(name):
    """At step 0 the scales get exactly zero (their tanh is 0), the projections do not; after a step all do."""
    torch.manual_seed(0)
    connection = build_connection(name, DIM, dtype=torch.float64)
    x = torch.randn(2, 3, connection.width, dtype=torch.float64)
    _, branch = random_branch(DIM)
    connection(x, branch).square().sum().backward()
    for key, parameter in connection.named_parameters():
        still = key in ("dynamic_alpha_scale", "dynamic_beta_scale", "norm_weight")
        assert bool((parameter.grad == 0).all()) == still, key
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter -= 0.01 * parameter.grad
    connection.zero_grad()
    connection(x, branch).square().sum().backward()
    assert all((parameter.grad != 0).all() for parameter in connection.parameters())


def test_residual():
    """The true baseline: no parameter, x + branch(x); rate 1 is something else and has parameters."""
    residual = build_connection("residual", 4, 7, tanh=False, arrangement="parallel")
    assert isinstance(residual, Residual)
    assert not residual.state_dict()
    assert list(build_connection("shc1", 4).parameters())
    assert list(build_connection("sfc1", 4).parameters())
    x = torch.randn(2, 3, 4)
    assert torch.equal(residual(x, torch.sin), x + x.sin())
    alpha, beta = residual.weights(x)
    assert torch.equal(alpha, torch.ones(2, 3, 1, 2))
    assert torch.equal(beta, torch.ones(2, 3, 1))


@pytest.mark.parametrize("name", ["shc3", "dhc3", "dhc1"])
def test_unfolding(name):
    """HC eq. 20, 27: c[k,j] = B^j A_r^(j+1) .. A_r^(k-1) A_m^k rebuilds every input, and the read-out, per token."""
    _, rate = parse_connection(name)
    torch.manual_seed(0)
    embedding = torch.randn(2, 5, DIM, dtype=torch.float64)
    x, outputs = expand_streams(embedding, rate), [embedding]
    write, carry, read, inputs = [torch.ones(2, 5, rate, dtype=torch.float64)], [None], [None], [None]
    for k in range(6):
        connection = random_connection(name, layer_index=k)
        _, branch = random_branch(DIM)
        alpha, beta = connection.weights(x)
        views, carried = connection.width_connection(x)
        x = connection.depth_connection(branch(views), carried)
        outputs.append(branch(views))
        inputs.append(views)
        read.append(alpha[..., 0])
        carry.append(alpha[..., 1:])
        write.append(beta)
    inputs.append(reduce_streams(x, rate))
    read.append(torch.full((2, 5, rate), 1 / rate, dtype=torch.float64))
    for k in range(1, len(inputs)):
        rebuilt = 0
        for j in range(k):
            row = write[j]
            for t in range(j + 1, k):
                row = torch.einsum("...i,...ij->...j", row, carry[t])
            rebuilt = rebuilt + (row * read[k]).sum(-1, keepdim=True) * outputs[j]
        torch.testing.assert_close(rebuilt, inputs[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["shc3", "dhc3", "sfc3", "dfc3"])
def test_drop_path(name):
    """A dropped branch leaves the carried streams, A_r^T H, not H."""
    connection = random_connection(name)
    x = torch.randn(2, 3, connection.width, dtype=torch.float64)
    alpha, _ = connection.weights(x)
    streams = x.unflatten(-1, (3, -1))
    carried = torch.einsum("...ij,...ie->...je", alpha[..., connection.views :], streams).flatten(-2)
    dropped = nn.Sequential(nn.Linear(DIM, DIM, dtype=torch.float64), DropPath(1.0)).train()
    torch.testing.assert_close(connection(x, dropped), carried, rtol=0, atol=1e-12)
    assert (carried - x).abs().max() > 0.1


# bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["shc2", "dhc2", "dhc4", "sfc2", "dfc2", "dfc4", "sihc2", "sihc4", "gr2", "laurel"])
def test_autocast_at_init(name, dtype):
    """Under bf16 autocast a connection at init is the residual add bit for bit, on every stream."""
    torch.manual_seed(0)
    copies = build_connection(name, DIM).copies
    branch = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM))
    residual = torch.randn(2, 3, DIM).to(dtype)
    x = expand_streams(residual, copies)
    with torch.autocast("cpu", torch.bfloat16):
        for k in range(3):
            assert branch(residual).dtype == torch.bfloat16
            x, residual = build_connection(name, DIM, k)(x, branch), residual + branch(residual)
            assert x.dtype == dtype
            assert torch.equal(x, expand_streams(residual, copies))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_autocast_changes_nothing(name, dtype):
    """With random parameters autocast changes neither coefficients, nor mixtures, nor any gradient."""
    connection = random_connection(name, dtype=torch.float32)
    x = torch.randn(2, 3, connection.width).to(dtype).requires_grad_()

    def run(enabled):
        connection.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            views, carried = connection.width_connection(x)
            out = connection.depth_connection(views.sin(), carried)
            out.float().square().sum().backward()
        return views, *carried[1:3], out, x.grad, *(p.grad for p in connection.parameters())

    plain, under = run(False), run(True)
    assert plain[1].dtype == torch.float32
    assert [t.dtype for t in plain] == [t.dtype for t in under]
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


@pytest.mark.parametrize("name", FOUR)
def test_autocast_does_not_round(name):
    """Identity weights under autocast give the streams back as they were, and the branch its view."""
    connection = build_connection(name, DIM, 1)
    x = torch.randn(2, 3, connection.width)
    with torch.autocast("cpu", torch.bfloat16):
        views, carried = connection.width_connection(x)
        assert torch.equal(connection.depth_connection(torch.zeros_like(views), carried), x)
    assert torch.equal(views, x[..., -DIM:])  # sub-layer 1 of HC reads stream 1; the views of FC are x


@pytest.mark.parametrize("name", EVERY)
def test_bfloat16(name):
    """A bfloat16 connection stays bfloat16 and is one rounding away from float32 on the same values."""
    low = random_connection(name, dtype=torch.bfloat16, backend="torch")
    high = copy.deepcopy(low).float()
    x = torch.randn(2, 3, low.width, dtype=torch.bfloat16, requires_grad=True)
    x_high = x.detach().float().requires_grad_()

    def close(a, b):
        assert a.dtype == torch.bfloat16
        assert ((a.float() - b).abs() <= 2**-8 * b.abs()).all()

    views, carried = low.width_connection(x)
    views_high, carried_high = high.width_connection(x_high)
    for one, other in zip(carried[1:3], carried_high[1:3], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    close(views, views_high)
    out = torch.randn_like(views)
    new = low.depth_connection(out, carried)
    new_high = high.depth_connection(out.float(), carried_high)
    close(new, new_high)

    new.float().square().sum().backward()
    new_high.square().sum().backward()
    for a, b in zip((x, *low.parameters()), (x_high, *high.parameters()), strict=True):
        assert a.grad.dtype == torch.bfloat16
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=0.02, atol=0.02 * b.grad.abs().max().item())


# memory, shapes, extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["shc4", "dhc4", "sfc4", "dfc4", "sihc4"])
def test_memory(name, dtype):
    """Of the size of x only x itself and the branch output are kept for backward."""
    connection = random_connection(name, 64 if "hc" in name else 256, dtype=torch.float32)
    x = torch.randn(2, 64, connection.width).to(dtype).requires_grad_()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        views, carried = connection.width_connection(x)
    if name[0] == "d":
        assert x.untyped_storage().data_ptr() in saved
    out = views.detach().clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        connection.depth_connection(out, carried)
    for tensor in (x, out):
        assert saved.pop(tensor.untyped_storage().data_ptr())
    alpha, beta = carried[1].numel(), carried[2].numel()  # projected and squashed; beta, a mean and a deviation
    rest = 4 * (2 * (alpha + beta) + 3 * beta) + sum(4 * p.numel() for p in connection.parameters()) * 3
    assert sum(saved.values()) <= rest
    assert rest < 4 * x.numel()


@pytest.mark.parametrize("name", ["residual", *EVERY])
def test_layouts(name):
    """A transposed or expanded x, and a branch that returns a transposed tensor, change no value or gradient."""
    connection = random_connection(name) if name != "residual" else Residual(DIM)

    def run(x, branch):
        x = x.detach().requires_grad_()
        connection.zero_grad()
        out = connection(x, branch)
        out.square().sum().backward()
        return out, x.grad, *(p.grad for p in connection.parameters())

    def compare(a, b):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)

    mix = torch.randn(5, 5, dtype=torch.float64)
    for x in (
        torch.randn(connection.width, 5, 2, dtype=torch.float64).permute(2, 1, 0),
        torch.randn(2, 1, connection.width, dtype=torch.float64).expand(2, 5, -1),
        torch.randn(2, 5, 2 * connection.width, dtype=torch.float64)[..., ::2],
    ):
        assert not x.is_contiguous()
        compare(run(x, torch.tanh), run(x.contiguous(), torch.tanh))
        compare(
            run(x, lambda v: (v.transpose(1, 2) @ mix).transpose(1, 2)), run(x, lambda v: (mix.mT @ v).contiguous())
        )


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("name", ["residual", *EVERY])
def test_empty(name, shape):
    """No token: empty outputs, and gradients of zero."""
    connection = build_connection(name, DIM)
    x = torch.randn(*shape, connection.width, requires_grad=True)
    out = connection(x, torch.tanh)
    assert out.shape == x.shape
    places = (*shape[:1], *(1 for _ in shape[1:]), DIM) if name == "sihc2" else shape  # the same for all tokens
    weights = [] if name == "oru" else connection.weights(x)  # there they depend on the branch output
    assert not weights or [tuple(w.shape) for w in weights] == [
        (*places, connection.streams, connection.views + connection.streams),
        (*places, connection.streams, *((connection.views,) if name == "ghc2x3" else ())),
    ]
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in connection.parameters())


@pytest.mark.parametrize("name", DYNAMIC)
def test_large_mean(name):
    """Streams with mean/std = 100 in float32 give the coefficients of float64."""
    connection = random_connection(name, 128, dtype=torch.float32)
    x = 100 + torch.randn(2, 16, connection.width)
    exact = copy.deepcopy(connection).double().weights(x.double())
    for one, other in zip(connection.weights(x), exact, strict=True):
        assert (one - other).abs().max() < 5e-3


@pytest.mark.parametrize("script", [False, True])
@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("value", [0.0, 3.7, -1e4])
def test_constant_streams(name, value, script):
    """Variance 0: values and gradients stay finite, and LayerNorm leaves nothing but the static weights."""
    connection = Sublayer(name, DIM, random_connection(name, dtype=torch.float32))
    run = torch.jit.script(connection) if script else connection
    x = torch.full((2, 3, connection.connection.width), value, requires_grad=True)
    out = run(x)
    out.sum().backward()
    for tensor in (out, x.grad, *(p.grad for p in connection.connection.parameters())):
        assert tensor.isfinite().all()
    if name == "dhc2":
        exact = connection.connection.double()
        alpha, beta = exact.weights(x.double())
        torch.testing.assert_close(alpha, exact.static_alpha.expand_as(alpha), rtol=0, atol=1e-7)
        torch.testing.assert_close(beta, exact.static_beta.expand_as(beta), rtol=0, atol=1e-7)


# torch's transformations


class Sublayer(nn.Module):
    """A sub-layer as a model writes it: width-connection, branch, depth-connection."""

    def __init__(self, name, dim, connection=None):
        super().__init__()
        self.connection = connection or (Residual(dim) if name == "residual" else random_connection(name, dim))
        self.branch = nn.Linear(dim, dim)
        self.to(next(self.connection.parameters(), torch.empty(0, dtype=torch.float64)).dtype)

    def forward(self, x: Tensor) -> Tensor:
        views, carried = self.connection.width_connection(x)
        return self.connection.depth_connection(F.gelu(self.branch(views)), carried)


def values_and_gradients(run, module, x):
    x = x.detach().requires_grad_()
    out = run(x)
    return out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])


def assert_same(run, module, x, other=None):
    """Values and gradients of run(x) are those of module(x)."""
    ours = values_and_gradients(run, other or module, x)
    for a, b in zip(ours, values_and_gradients(module, module, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def sublayer_and_input(name):
    module = Sublayer(name, 8)
    return module, torch.randn(2, 3, module.connection.width, dtype=torch.float64)


@pytest.mark.parametrize("name", ["residual", *EVERY, "dhc1", "dfc4"])
def test_script(name):
    """TorchScript, saved and loaded."""
    module, x = sublayer_and_input(name)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert_same(loaded, module, x, loaded)
    assert_same(loaded, module, x[0], loaded)


@pytest.mark.parametrize("name", ["residual", *EVERY])
def test_trace(name):
    """torch.jit.trace, run on another number of tokens."""
    module, x = sublayer_and_input(name)
    traced = torch.jit.trace(module, (x,))
    assert_same(traced, module, torch.randn(1, 7, x.shape[-1], dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:The TorchScript type system")  # of the test's own branch
@pytest.mark.parametrize("name", ["residual", *EVERY])
def test_fx(name):
    """Symbolic tracing takes each step as one node, and what it gives goes through TorchScript."""
    module, x = sublayer_and_input(name)
    traced = torch.fx.symbolic_trace(module)
    assert_same(traced, module, x)
    assert_same(torch.jit.script(traced), module, x)
    if name != "residual":
        called = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
        steps = STEPS.get(name, ("width_connection", "depth_connection"))
        assert [n for n in called if n in steps] == list(steps)


@pytest.mark.parametrize("name", ["residual", *EVERY])
def test_export(name):
    """torch.export with a free batch size."""
    module, x = sublayer_and_input(name)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    assert_same(exported, module, torch.randn(5, 3, x.shape[-1], dtype=torch.float64), exported)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["residual", *EVERY])
def test_vmap(name):
    """vmap over tokens, and per-sample gradients, are the loop."""
    module, x = sublayer_and_input(name)
    parameters = dict(module.named_parameters())
    torch.testing.assert_close(vmap(module)(x), module(x), rtol=0, atol=1e-12)

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).square().sum()

    for batch in (x, x[0]):
        per_sample = vmap(grad(loss), (None, 0))(parameters, batch)
        for b in range(len(batch)):
            for key, value in grad(loss)(parameters, batch[b : b + 1]).items():
                torch.testing.assert_close(per_sample[key][b], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("shc2", "aot_eager"), ("dhc2", "inductor"), ("sfc2", "aot_eager"), ("dfc2", "inductor")]
    + [(name, "aot_eager") for name in ("sihc2", "gr2", "oru", "laurel", "mhclite3", "krom4")],
)
def test_compile(name, backend):
    """torch.compile in one graph, forward and backward."""
    module, x = sublayer_and_input(name)
    assert_same(torch.compile(module, fullgraph=True, backend=backend), module, x)


def test_compile_autocast():
    """Compiled under bf16 autocast at init it is still the residual add bit for bit."""
    connection = build_connection("dhc2", DIM)
    x = torch.randn(2, 3, DIM)

    def run(streams):
        views, carried = connection.width_connection(streams)
        return connection.depth_connection(views.bfloat16(), carried)

    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(run, fullgraph=True, backend="aot_eager")(expand_streams(x, 2))
    assert torch.equal(out, expand_streams(x + x.bfloat16(), 2))


# errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FracConnection(384, 5), r"dim must be divisible by the frac rate, got dim=384 and rate=5"),
        (lambda: FracConnection(10, 4), r"rates that fit: 1, 2, 5, 10\)"),
        *(
            (lambda cls=cls, rate=rate: cls(8, rate), rf"rate must be an integer of at least 1, got {rate}")
            for cls in (HyperConnection, FracConnection)
            for rate in (0, -1, True, 2.5)
        ),
        (lambda: HyperConnection(8, 2, -1), "layer_index must be an integer of at least 0, got -1"),
        (lambda: FracConnection(8, 2, -1), "layer_index must be an integer of at least 0, got -1"),
        (lambda: HyperConnection(8, 2, arrangement="both"), "arrangement must be one of .*parallel, got 'both'"),
        (lambda: build_connection("nope2", 8), "got 'nope2'"),
        (lambda: build_connection("dfc3", 8), "got dim=8 and rate=3"),
    ],
)
def test_construction_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("options", [{"arrangement": "parallel"}, {"heads": 2}])
def test_unknown_option(options):
    """An option that the connection does not have is not swallowed."""
    with pytest.raises(TypeError):
        build_connection("dfc2", 8, **options)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("residual", ("residual", 1)),
        ("shc2", ("shc", 2)),
        ("dhc16", ("dhc", 16)),
        ("sfc1", ("sfc", 1)),
        ("mhc4", ("mhc", 4)),
        ("ihc8", ("ihc", 8)),
        ("ghc2x3", ("ghc", (2, 3))),
        ("sihc16", ("sihc", 16)),
        ("mhclite3", ("mhclite", 3)),
        ("krom8", ("krom", 8)),
        ("oru", ("oru", 1)),
        ("laurel", ("laurel", 1)),
    ],
)
def test_parse(name, parsed):
    assert parse_connection(name) == parsed


@pytest.mark.parametrize(
    "name",
    [
        "dhc",
        "xyz4",
        "dhc0",
        "dhc02",
        "",
        None,
        "hc2",
        "DHC2",
        "dhc2 ",
        "dhc-1",
        "dhc2.5",
        "residual1",
        "dhc2\n",
        4,
        "ghc2",
        "dhc2x3",
        "ghc2x",
        "ghcx3",
        "ghc0x3",
        "ghc2x03",
        "mhc",
        "oru1",
        "laurel2x3",
    ],
)
def test_parse_errors(name):
    message = (
        "must be 'residual', 'oru', 'laurel', .* or one of shc, dhc, sfc, dfc, mhc, ihc, sihc, gr, mhclite, krom follow"
    )
    with pytest.raises(ValueError, match=message):
        parse_connection(name)


@pytest.mark.parametrize("name", ["residual", *EVERY])
def test_call_errors(name):
    """x of another width, and a branch that does not return the shape it was given, name both shapes."""
    connection = build_connection(name, 8)
    x = torch.randn(2, 3, connection.width)
    with pytest.raises(ValueError, match=rf"{connection.width} in all, got shape \[2, 3, 9\]"):
        connection(torch.randn(2, 3, 9), torch.tanh)
    with pytest.raises(ValueError, match=r"in all, got shape \[2, 3, 9\]"):
        connection.weights(torch.randn(2, 3, 9))
    for wrong in (lambda v: v[:, :1], lambda v: v[..., :4], lambda v: v[0], lambda v: v[..., :1]):
        with pytest.raises(ValueError, match=r"must return the shape it was given, \[2, 3, 8\], got"):
            connection(x, wrong)


def test_entry_hint():
    """Streams that were never entered are the likely mistake, and the message says what to do."""
    with pytest.raises(ValueError, match=r"expand_streams\(x, 4\) enters the streams"):
        build_connection("dhc4", 8)(torch.randn(2, 3, 8), torch.tanh)


@pytest.mark.parametrize(
    ("connection", "text"),
    [
        (Residual(8), "Residual(dim=8)"),
        (build_connection("shc2", 8, 3), "HyperConnection(dim=8, rate=2, layer_index=3, dynamic=False)"),
        (
            build_connection("dfc4", 8, tanh=False),
            "FracConnection(dim=8, rate=4, layer_index=0, dynamic=True, tanh=False)",
        ),
    ],
)
def test_repr(connection, text):
    assert repr(connection) == text
