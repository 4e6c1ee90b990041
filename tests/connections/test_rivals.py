"""hcvision.connections: rivals of Hyper-Connections are what their papers write down, from the formulas alone."""

import functools
import itertools
import math
import warnings

import pytest
import timm
import torch

import hcvision
from hcvision.connections.names import build_connection
from hcvision.connections.orthogonal import OrthogonalConnection
from hcvision.training.connections import freeze_connections

DIM = 24


def random_connection(name, dim=DIM, layer_index=1, **options):
    torch.manual_seed(0)
    connection = build_connection(name, dim, layer_index, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.normal_(std=0.6)
    return connection


# the formulas


def channelwise(connection, p, x, branch):
    """SiHC: view[c] = sum_s read[s, c] X[s, c]; X[s, c] + write[s, c] branch(view)[c], stream by stream."""
    streams = x.chunk(connection.rate, dim=-1)
    out = branch(sum(p["read_weight"][s] * streams[s] for s in range(connection.rate)))
    return torch.cat([streams[s] + p["write_weight"][s] * out for s in range(connection.rate)], dim=-1)


def gated(connection, p, x, branch):
    """GR, eq. 30-34 with a branch that has its own norm: every stream is normalised by itself, gates by matrices."""
    n, streams = connection.rate, x.chunk(connection.rate, dim=-1)
    normed = torch.cat([s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt() for s in streams], dim=-1)
    hidden = normed @ p["gate_down"].T / n
    hidden = hidden / (1 + (-hidden).exp())
    gates = (2 / (1 + (-(hidden @ p["gate_up"].T)).exp())).chunk(n, dim=-1)
    out = branch(sum(p["gain"][i] * gates[i] * streams[i] for i in range(n)))
    write = 2 / (1 + (-(normed @ p["write_fn"].T) / n).exp())
    return torch.cat([streams[i] + write[..., i, None] * out for i in range(n)], dim=-1)


def orthogonal(connection, p, x, branch):
    """ORU: of the branch output what is at right angles to x, token by token."""
    out = branch(x)
    return x + out - torch.einsum("...c,...c->...", x, out)[..., None] / (x.pow(2).sum(-1, keepdim=True) + 1e-6) * x


def laurel(connection, p, x, branch):
    """LAuReL eq. 5."""
    alpha, beta = (2 / (1 + torch.exp(-p[f"logit_{name}"])) for name in ("alpha", "beta"))
    return alpha * branch(x) + beta * (torch.einsum("dr,re,...e->...d", p["low_rank_b"], p["low_rank_a"], x) + x)


def mix_permutations(logits, n):
    """mHC-lite: permutations in lexicographic order, row i of a permutation matrix takes stream p[i]."""
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    matrices = [torch.eye(n, dtype=logits.dtype)[list(p)] for p in itertools.permutations(range(n))]
    return torch.einsum("...r,rij->...ij", weights, torch.stack(matrices))


def mix_factors(logits, n):
    """KromHC: the Kronecker product of p I + q swap, factor by factor and token by token."""
    pairs = logits.unflatten(-1, (-1, 2))
    kept = 1 / (1 + (pairs[..., 1] - pairs[..., 0]).exp())
    swap = torch.tensor([[0, 1], [1, 0]], dtype=logits.dtype)

    def multiply(token):
        return functools.reduce(torch.kron, [p * torch.eye(2, dtype=p.dtype) + (1 - p) * swap for p in token])

    return torch.stack([multiply(token) for token in kept.reshape(-1, kept.shape[-1])]).reshape(*kept.shape[:-1], n, n)


def doubly_stochastic(connection, p, x, branch):
    """mHC, eq. 7-9, with another mixing matrix, whose row i makes the next stream i."""
    n, streams = connection.rate, x.chunk(connection.rate, dim=-1)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    pre, post, res = (p[f"scale_{k}"] * (normed @ p[f"phi_{k}"]) + p[f"bias_{k}"] for k in ("pre", "post", "res"))
    mix = (mix_permutations if connection.name.startswith("mhclite") else mix_factors)(res, n)
    assert (mix.sum(-1) - 1).abs().max() < 1e-12
    assert (mix.sum(-2) - 1).abs().max() < 1e-12
    out = branch(sum(streams[i] / (1 + (-pre[..., i, None]).exp()) for i in range(n)))
    following = [sum(mix[..., i, j, None] * streams[j] for j in range(n)) for i in range(n)]
    return torch.cat([following[i] + 2 / (1 + (-post[..., i, None]).exp()) * out for i in range(n)], dim=-1)


WRITTEN = {"sihc2": channelwise, "sihc3": channelwise, "gr1": gated, "gr3": gated, "oru": orthogonal, "laurel": laurel}
WRITTEN |= dict.fromkeys(("mhclite2", "mhclite3", "mhclite4", "krom2", "krom4", "krom8"), doubly_stochastic)


@pytest.mark.parametrize("tokens", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("name", WRITTEN)
def test_papers(name, tokens):
    """Forward and every gradient, with random parameters."""
    connection = random_connection(name)
    p = dict(connection.named_parameters())
    x = torch.randn(*tokens, connection.width, dtype=torch.float64, requires_grad=True)
    weight = (torch.randn(DIM, DIM, dtype=torch.float64) / 5).requires_grad_()
    ours = connection(x, lambda v: torch.tanh(v @ weight))
    theirs = WRITTEN[name](connection, p, x, lambda v: torch.tanh(v @ weight))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    seed, leaves = torch.randn_like(ours), {"x": x, "branch": weight, **p}
    gradients = [torch.autograd.grad(out, list(leaves.values()), seed) for out in (ours, theirs)]
    for leaf, a, b in zip(leaves, *gradients, strict=True):
        assert b.abs().max() > 1e-6, f"the gradient of {leaf} says nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, leaf=leaf: f"{leaf}: {m}")


# at init


@pytest.mark.parametrize("name", ["sihc2", "sihc3", "sihc8", "gr2", "gr3", "laurel"])
def test_at_init_they_are_the_residual_add(name):
    """To the bit, in every sub-layer and for all streams; each sub-layer reads another stream."""
    for k in range(4):
        connection = build_connection(name, DIM, k)
        x = torch.randn(2, 3, DIM)
        after = connection(torch.cat([x] * connection.streams, dim=-1), lambda v: torch.tanh(3 * v))
        assert torch.equal(after, torch.cat([x + torch.tanh(3 * x)] * connection.streams, dim=-1))
        view, _ = connection.width_connection(torch.arange(connection.width, dtype=torch.float32))
        assert torch.equal(view, torch.arange(DIM) + DIM * (k % connection.streams))


@pytest.mark.parametrize("name", ["mhclite2", "mhclite3", "mhclite4", "krom2", "krom8"])
def test_doubly_stochastic_ones_at_init(name):
    """Up to rounding; the mixing is almost the identity, and rows and columns sum to 1 in float32, as mHC's do not."""
    for k in range(3):
        connection = build_connection(name, DIM, k)
        n, x = connection.rate, torch.randn(2, 3, DIM)
        after = connection(torch.cat([x] * n, dim=-1), lambda v: torch.tanh(3 * v))
        torch.testing.assert_close(after, torch.cat([x + torch.tanh(3 * x)] * n, dim=-1), rtol=1e-5, atol=2e-6)
        alpha, beta = connection.weights(torch.randn(5, connection.width))
        kept = {"mhclite2": 1, "mhclite3": 4, "mhclite4": 18, "krom2": 1, "krom8": 3}[name] * math.exp(-8)
        assert (1 - alpha[:, range(n), range(1, n + 1)] - kept).abs().max() < 0.01 * kept
        assert torch.equal(beta, torch.ones(5, n))
    alpha, _ = random_connection(name, dtype=torch.float32).weights(torch.randn(500, connection.width))
    for axis in (-1, -2):
        assert (alpha[..., 1:].sum(axis) - 1).abs().max() < 1e-6


def test_parameters():
    """n numbers for every channel, to read and to write each; what decays is in test_connections.py."""
    assert {key: tuple(p.shape) for key, p in build_connection("sihc3", DIM).named_parameters()} == {
        "read_weight": (3, DIM),
        "write_weight": (3, DIM),
    }


def test_an_orthogonal_update():
    """What is added has no part along x, however large or small; at x = 0 the output is added as it is."""
    connection, x = build_connection("oru", DIM), torch.randn(4, DIM, dtype=torch.float64)
    added = connection(x, lambda v: 3 * v.roll(1, -1) + v) - x
    assert ((added * x).sum(-1) / added.norm(dim=-1) / x.norm(dim=-1)).abs().max() < 1e-6
    assert torch.equal(connection(torch.zeros(2, DIM), lambda v: v + 1), torch.ones(2, DIM))
    with pytest.raises(ValueError, match="the weights of oru depend on the branch output"):
        connection.weights(x)
    with pytest.raises(ValueError, match="oru has one stream, got rate=2"):
        OrthogonalConnection(DIM, 2)


def test_conversion_to_another_function_warns():
    """In one line; a model that computed nothing before is made without, and pretrained weights are not."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0)
    message = "^oru is not the residual add at the start: what this VisionTransformer computes changes$"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm.create_model("vit_tiny_patch16_224_oru", depth=1, img_size=32)
        assert hcvision.register("deit_tiny_patch16_224", "oru", "laurel") == [
            "deit_tiny_patch16_224_oru",
            "deit_tiny_patch16_224_laurel",
        ]
    with pytest.warns(UserWarning, match=message):
        hcvision.convert(model, "oru")
    with pytest.raises(ValueError, match="connection1 of a Block is no residual add at any values, and taking it away"):
        hcvision.convert(model, "residual")
    with pytest.raises(
        ValueError, match="connection_freeze='depth' needs connections with parameters of it, oru has no"
    ):
        freeze_connections(model, "depth")
    assert hcvision.set_stream_dtype(model.bfloat16(), "float32")(torch.randn(1, 3, 32, 32).bfloat16()).dtype == (
        torch.bfloat16
    )


def test_low_rank_at_init():
    """The paper's footnote: 1 / sqrt(r D) where i mod r = j, so that the rows of A are orthogonal; B is zero."""
    connection = build_connection("laurel", 40)
    expected = [[(16 * 40) ** -0.5 if i % 16 == j else 0.0 for i in range(40)] for j in range(16)]
    torch.testing.assert_close(connection.low_rank_a.detach(), torch.tensor(expected), rtol=1e-6, atol=0)
    assert not connection.low_rank_b.any()
    assert build_connection("laurel", 8).low_rank_a.shape == (8, 8)


def test_gates_start_somewhere():
    """What makes the gates is drawn from a seed of its own: another one in each sub-layer, PyTorch's is left alone."""
    state = torch.random.get_rng_state()
    one, again, other = (build_connection("gr2", DIM, k) for k in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.gate_down, again.gate_down)
    assert 0.7 < one.gate_down.std() * DIM**0.5 < 1.3
    assert not torch.equal(one.gate_down, other.gate_down)
    assert {key: tuple(p.shape) for key, p in one.named_parameters()} == {
        "gain": (2, DIM),
        "gate_down": (3, 2 * DIM),
        "gate_up": (2 * DIM, 3),
        "write_fn": (2, 2 * DIM),
    }


@pytest.mark.parametrize("name", ["gr3", "sihc3", "oru", "laurel"])
def test_backward_keeps_the_streams_and_the_output(name):
    """Nothing else of their size: gates are computed again."""
    connection = random_connection(name, 256, dtype=torch.float32)
    x = torch.randn(2, 64, connection.width, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        view, carried = connection.width_connection(x)
        out = view.detach().clone().requires_grad_()
        connection.depth_connection(out, carried)
    for tensor in (x, out, *connection.parameters()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    joined = ("gate_down", "write_fn", "low_rank_a", "low_rank_b")  # copied into one tensor
    made = 4 * sum(p.numel() for key, p in connection.named_parameters() if key in joined)
    assert sum(saved.values()) - made < 0.1 * x.untyped_storage().nbytes()


@pytest.mark.parametrize("name", ["sihc4", "gr2", "oru", "laurel"])
def test_no_kernels(name):
    with pytest.raises(ValueError, match=f"backend='native' has no kernels for {name}; backend='auto' takes PyTorch"):
        build_connection(name, DIM, backend="native")
