"""hcvision.connections: rivals of Hyper-Connections are what their papers write down, from the formulas alone."""

import pytest
import torch

from hcvision.connections.names import build_connection

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


WRITTEN = {"sihc2": channelwise, "sihc3": channelwise}


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


@pytest.mark.parametrize("name", ["sihc2", "sihc3", "sihc8"])
def test_at_init_they_are_the_residual_add(name):
    """To the bit, in every sub-layer and for all streams; each sub-layer reads another stream."""
    for k in range(4):
        connection = build_connection(name, DIM, k)
        x = torch.randn(2, 3, DIM)
        after = connection(torch.cat([x] * connection.streams, dim=-1), lambda v: torch.tanh(3 * v))
        assert torch.equal(after, torch.cat([x + torch.tanh(3 * x)] * connection.streams, dim=-1))
        view, _ = connection.width_connection(torch.arange(connection.width, dtype=torch.float32))
        assert torch.equal(view, torch.arange(DIM) + DIM * (k % connection.streams))


def test_parameters():
    """n numbers for every channel, to read and to write each; what decays is in test_connections.py."""
    assert {key: tuple(p.shape) for key, p in build_connection("sihc3", DIM).named_parameters()} == {
        "read_weight": (3, DIM),
        "write_weight": (3, DIM),
    }


@pytest.mark.parametrize("name", ["sihc4"])
def test_no_kernels(name):
    with pytest.raises(ValueError, match=f"backend='native' has no kernels for {name}; backend='auto' takes PyTorch"):
        build_connection(name, DIM, backend="native")
