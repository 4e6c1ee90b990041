"""hcvision.connections: mHC, iHC and GHC are what their papers write down, from the formulas alone, in any model."""

import copy
import math

import pytest
import timm
import torch
from conftest import randomize
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import hcvision
from hcvision.connections.manifold import ITERATIONS, sinkhorn
from hcvision.connections.names import build_connection
from hcvision.models.blocks import ConnectedBlock
from hcvision.studies.insight.unfolding import watch
from hcvision.training.connections import choose_backend, freeze_connections

DIM = 24
THREE = ("mhc4", "ihc4", "ghc2x3")
EVERY = (*THREE, "sihc4", "gr4", "oru", "laurel", "mhclite3", "krom4")
EXACT = ("ghc2x3", "sihc4", "gr4", "laurel")  # converted models are what they were, to the bit
MANIFOLD = ("mhc2", "mhc3", "mhc4", "ihc2", "ihc4")
GENERAL = ("ghc1x2", "ghc2x3", "ghc2x4", "ghc3x4", "ghc4x6")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}


def random_connection(name, dim=DIM, layer_index=1, **options):
    torch.manual_seed(0)
    connection = build_connection(name, dim, layer_index, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.normal_(std=0.6)
    return connection


# the formulas


def balance(logits):
    """Sinkhorn by potentials of the entropic transport problem: M_ij = exp(L_ij - f_i - g_j), columns first."""
    f = torch.zeros_like(logits[..., 0])
    for _ in range(20):
        g = torch.logsumexp(logits - f[..., :, None], dim=-2)
        f = torch.logsumexp(logits - g[..., None, :], dim=-1)
    return (logits - f[..., :, None] - g[..., None, :]).exp()


def manifold(connection, x, branch):
    """mHC eq. 7-9, stream by stream; without phi_res nothing is mixed."""
    p, n = dict(connection.named_parameters()), connection.rate
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def weights(part):
        return p[f"scale_{part}"] * (normed @ p[f"phi_{part}"]) + p[f"bias_{part}"]

    pre, post = 1 / (1 + (-weights("pre")).exp()), 2 / (1 + (-weights("post")).exp())
    mix = balance(weights("res").unflatten(-1, (n, n))) if "phi_res" in p else torch.eye(n, dtype=x.dtype)
    streams = x.chunk(n, dim=-1)
    out = branch(sum(pre[..., i, None] * streams[i] for i in range(n)))
    following = [sum(mix[..., i, j, None] * streams[j] for j in range(n)) + post[..., i, None] * out for i in range(n)]
    return torch.cat(following, dim=-1)


def general(connection, x, branch):
    """VWN eq. 10-14, segment by segment."""
    p, m, n = dict(connection.named_parameters()), connection.views, connection.streams
    segments, root = x.chunk(n, dim=-1), math.sqrt(connection.dim / m)
    alphas, betas = [], []
    for i, segment in enumerate(segments):
        normed = segment / (segment.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["norm_weight"]
        for weights, part in ((alphas, "alpha"), (betas, "beta")):
            dynamic = torch.tanh(normed @ p[f"dynamic_{part}_fn"] / root)
            weights.append(p[f"dynamic_{part}_scale"][i] * dynamic + p[f"static_{part}"][i])
    mixed = [sum(alphas[i][..., k, None] * segments[i] for i in range(n)) for k in range(m + n)]
    outs = branch(torch.cat(mixed[:m], dim=-1)).chunk(m, dim=-1)
    following = [mixed[m + i] + sum(betas[i][..., v, None] * outs[v] for v in range(m)) for i in range(n)]
    return torch.cat(following, dim=-1)


@pytest.mark.parametrize("tokens", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("name", [*MANIFOLD, *GENERAL])
def test_papers(name, tokens):
    """Forward and every gradient, with random parameters."""
    connection = random_connection(name)
    x = torch.randn(*tokens, connection.width, dtype=torch.float64, requires_grad=True)
    weight = (torch.randn(DIM, DIM, dtype=torch.float64) / 5).requires_grad_()
    written = general if name[0] == "g" else manifold
    ours, theirs = (f(x, lambda v: torch.tanh(v @ weight)) for f in (connection, lambda *a: written(connection, *a)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    seed, leaves = torch.randn_like(ours), {"x": x, "branch": weight, **dict(connection.named_parameters())}
    gradients = [torch.autograd.grad(out, list(leaves.values()), seed) for out in (ours, theirs)]
    for leaf, a, b in zip(leaves, *gradients, strict=True):
        assert b.abs().max() > 1e-6, f"the gradient of {leaf} says nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, leaf=leaf: f"{leaf}: {m}")


def leave(model, x):
    """The streams of the last block, as its connections leave them: for GHC a norm of every dim numbers and a map."""
    last = model.blocks[-1].connection2
    if last.name[0] != "g":
        return x.unflatten(-1, (last.rate, -1)).mean(-2)
    if last.width % last.dim == 0:
        parts = x.unflatten(-1, (-1, last.dim))
        x = (
            (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        ).flatten(-2)
    return x @ last.exit.weight.T


@pytest.mark.parametrize("name", [*THREE, "ghc2x4"])
def test_a_model_by_hand(name):
    """A ViT with random parameters: entry, every sub-layer, exit; logits and all gradients."""
    model = randomize(
        timm.create_model(f"vit_tiny_patch16_224_{name}", init_values=0.1, **TINY)
        if name in THREE
        else hcvision.create_model("vit_tiny_patch16_224", name, init_values=0.1, **TINY)
    ).double()
    images, written = torch.randn(2, 3, 32, 32, dtype=torch.float64), general if name[0] == "g" else manifold
    first = model.blocks[0].connection1
    x = model._pos_embed(model.patch_embed(images))
    x = torch.cat([x] * first.copies, dim=-1)[..., : first.width]
    for block in model.blocks:
        for c, norm, branch, scale in (
            (block.connection1, block.norm1, block.attn, block.ls1),
            (block.connection2, block.norm2, block.mlp, block.ls2),
        ):
            x = written(c, x, lambda v, norm=norm, branch=branch, scale=scale: scale(branch(norm(v))))
    theirs, ours = model.head(model.norm(leave(model, x))[:, 0]), model(images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    seed = torch.randn_like(ours)
    for (key, _), a, b in zip(
        model.named_parameters(),
        *(torch.autograd.grad(o, list(model.parameters()), seed) for o in (ours, theirs)),
        strict=True,
    ):
        has_none = ("blocks.0.connection1.", "blocks.2.connection2.")  # equal streams, or their mean, mix into the same
        if not (key.startswith(has_none) and key.endswith("_res")):
            assert a.abs().max() > 1e-13, f"{key} has no gradient"
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


# Sinkhorn


@pytest.mark.parametrize("n", [2, 4, 8])
def test_sinkhorn_is_doubly_stochastic(n):
    """Float32, 20 iterations: rows to the last bits; columns within 1e-4 at init, behind it, and of random logits.

    Not of all: what is near a permutation converges slowly (8 I + noise of 1 stays 1 % off), in float64 as well.
    """
    torch.manual_seed(0)
    noise = torch.randn(500, n, n)
    for logits, share in ((8 * torch.eye(n)[None], 1.0), (8 * torch.eye(n) + 0.01 * noise, 0.995), (noise, 0.95)):
        matrix = sinkhorn(logits)
        assert (matrix >= 0).all()
        assert (matrix.sum(-1) - 1).abs().max() < 1e-6
        assert ((matrix.sum(-2) - 1).abs().amax(-1) < 1e-4).float().mean() >= share
        torch.testing.assert_close(matrix.double(), balance(logits.double()), rtol=1e-5, atol=1e-6)
    assert ITERATIONS == 20
    assert sinkhorn(8 * torch.eye(4)).diagonal().tolist() == pytest.approx([1 / (1 + 3 * math.exp(-8))] * 4, rel=1e-6)


def test_columns_are_scaled_first():
    """Where it has not converged the order shows: rows sum to 1, columns do not."""
    logits = torch.tensor([[9.0, 0.0], [9.0, 9.0]], dtype=torch.float64)
    matrix = sinkhorn(logits)
    torch.testing.assert_close(matrix, balance(logits), rtol=0, atol=1e-14)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-15)
    assert (matrix.sum(-2) - 1).abs().max() > 1e-3
    torch.testing.assert_close(sinkhorn(logits, 1), (logits.softmax(0) / logits.softmax(0).sum(1, keepdim=True)))


def test_sinkhorn_derivatives():
    torch.manual_seed(0)
    logits = (2 * torch.randn(2, 3, 3, dtype=torch.float64)).requires_grad_()
    for iterations in (1, 2, 20):
        assert gradcheck(lambda x, k=iterations: sinkhorn(x, k), (logits,))
    assert gradgradcheck(lambda x: sinkhorn(x, 3), (logits,))


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_logits(size):
    """Rows and columns whose every exponential is zero, or infinite: finite values and gradients, rows of sum 1."""
    torch.manual_seed(0)
    cases = [size * torch.randn(50, 4, 4), torch.full((1, 4, 4), size), -size * torch.eye(4)[None]]
    row = torch.zeros(1, 4, 4)
    row[:, 1] = -size
    for logits in (*cases, row, row.mT):
        logits = logits.clone().requires_grad_()
        matrix = sinkhorn(logits)
        (matrix * torch.randn(4, 4)).sum().backward()
        assert torch.isfinite(matrix).all()
        assert torch.isfinite(logits.grad).all()
        assert (matrix.sum(-1) - 1).abs().max() < 1e-6


def test_sinkhorn_gradients_in_float32():
    """Against float64: as good as autograd through the same iterations, up to a factor of two."""
    torch.manual_seed(0)
    logits, seed = 2 * torch.randn(200, 4, 4), torch.randn(200, 4, 4)

    def gradient(function, dtype):
        x = logits.to(dtype).requires_grad_()
        return torch.autograd.grad(function(x), x, seed.to(dtype))[0].double()

    exact = gradient(balance, torch.float64)
    ours, theirs = ((gradient(f, torch.float32) - exact).square().mean().sqrt() for f in (sinkhorn, balance))
    assert ours <= 2 * theirs
    torch.testing.assert_close(gradient(sinkhorn, torch.float64), exact, rtol=0, atol=1e-12)


def test_sinkhorn_keeps_its_input_alone():
    saved = []
    logits = torch.randn(10, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        sinkhorn(logits)
    assert sum(saved) == logits.numel()


# at init


@pytest.mark.parametrize("name", ["mhc2", "mhc4", "mhc8", "ihc4"])
def test_first_weights_of_mhc(name):
    """The write is 1, the read is 1 in all, and the mixing is Sinkhorn of 8 I, whatever the input."""
    for k in (0, 3):
        connection = build_connection(name, DIM, k)
        n = connection.rate
        alpha, beta = connection.weights(torch.randn(5, connection.width))
        read = [0.5 / n + 0.5 * (i == k % n) for i in range(n)]
        assert (alpha[:, :, 0] - torch.tensor(read)).abs().max() < 1e-7
        assert torch.equal(beta, torch.ones(5, n))
        mix = balance(8 * torch.eye(n, dtype=torch.float64)) if name[0] == "m" else torch.eye(n)
        torch.testing.assert_close(alpha[:, :, 1:], mix.float().expand(5, n, n), rtol=0, atol=1e-6)
        assert {name: p.item() for name, p in connection.named_parameters() if name.startswith("scale")} == {
            f"scale_{part}": pytest.approx(0.01) for part in ("pre", "post", *(("res",) if name[0] == "m" else ()))
        }
        assert not any(p.any() for name, p in connection.named_parameters() if name.startswith("phi"))


def test_first_weights_of_ghc():
    connection = build_connection("ghc2x5", DIM)
    assert connection.static_alpha.tolist() == [
        [float(i == j) for j in range(2)] + [float(i == j) for j in range(5)] for i in range(5)
    ]
    assert connection.static_beta.T.tolist() == [[float(j % 2 == i) for j in range(5)] for i in range(2)]
    assert not connection.dynamic_alpha_fn.any()
    assert not connection.dynamic_beta_fn.any()
    assert connection.dynamic_alpha_scale.tolist() == [[1.0] * 7] * 5
    assert connection.dynamic_beta_scale.tolist() == [[1.0] * 2] * 5
    assert connection.width == 60


def test_what_they_cost():
    """mHC adds about 4 % to a ViT-S, GHC at 1.5 widths 1 %, most of that in the map at its end."""
    count = {
        name: sum(p.numel() for p in hcvision.create_model("vit_small_patch16_224", name, device="meta").parameters())
        for name in ("residual", *THREE)
    }
    more = {name: value - count["residual"] for name, value in count.items()}
    assert more["mhc4"] == 24 * (4 * 384 * 24 + 24 + 3)
    assert more["ihc4"] == 24 * (4 * 384 * 8 + 8 + 2)
    assert more["ghc2x3"] == 24 * (2 * 3 * 7 + 192 * 8) + 576 * 384
    assert 0.039 < more["mhc4"] / count["residual"] < 0.041
    assert 0.0115 < more["ghc2x3"] / count["residual"] < 0.012


def train(model, steps=20):
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    torch.manual_seed(1)
    for _ in range(steps):
        images = torch.randn(8, 3, 32, 32)
        loss = F.cross_entropy(model(images), images.mean((1, 2, 3)).mul(50).long().remainder(10))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen = []
    with torch.no_grad(), watch(model.blocks, seen.append):
        model(images)
    return seen[-1].after


@pytest.mark.parametrize("name", ["mhc2", "ihc4"])
def test_streams_part(name):
    """Reads that are alike leave all streams alike for good, in PyTorch to the bit: which is why ours are not."""
    torch.manual_seed(0)
    model = hcvision.create_model("vit_tiny_patch16_224", name, **TINY)
    alike = copy.deepcopy(model)
    for block in alike.blocks:
        for connection in (block.connection1, block.connection2):
            nn.init.constant_(connection.bias_pre, -math.log(connection.rate - 1))
            connection.choose_backend("torch")
    after = train(alike)
    assert torch.equal(after, after[..., :1, :].expand_as(after))
    after = train(model)
    assert (after - after[..., :1, :]).abs().max() > 5e-3


# in models


def build(family, name=None, **kwargs):
    torch.manual_seed(0)
    if family == "dit":
        sizes = {"img_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
        model = randomize(hcvision.create_model("dit_s_patch2_256", **{**sizes, **kwargs}))
        inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 4]))
    else:
        base, sizes = {
            "vit": ("vit_tiny_patch16_224", TINY),
            "eva": ("eva02_tiny_patch14_224", {**TINY, "num_heads": 2}),
            "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "embed_dim": 24,
                                                      "depths": (2, 2), "num_heads": (2, 2), "num_classes": 10}),
        }[family]  # fmt: skip
        model = timm.create_model(base, **{**sizes, **kwargs})
        inputs = (torch.randn(2, 3, *[64 if family == "swin" else 32] * 2),)
    model.eval()
    return hcvision.convert(model, name) if name else model, inputs


@pytest.mark.parametrize("name", [*EVERY, "ghc2x4"])
@pytest.mark.parametrize("family", ["vit", "eva", "dit", "swin"])
def test_convert(family, name):
    """The outputs stay; every parameter gets a gradient and the weights go through a file; and back again."""
    plain, inputs = build(family)
    ours, _ = build(family, name)
    if name in EXACT:
        assert torch.equal(ours(*inputs), plain(*inputs))
    elif name == "oru":
        assert not torch.equal(ours(*inputs), plain(*inputs))
    elif name != "ghc2x4":
        torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=1e-5, atol=2e-5)
    elif family == "swin":  # a normalised stage is another model; behind the last block of the others a norm follows
        assert not torch.allclose(ours(*inputs), plain(*inputs), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)
    assert ours.connection == name
    again, _ = build(family, name)
    randomize(ours)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(*inputs), ours(*inputs))
    ours(*inputs).square().mean().backward()
    missing = [key for key, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [key for key in missing if ".connection" in key], missing
    exits = [key for key in ours.state_dict() if key.endswith("exit.weight")]
    assert len(exits) == (0 if name[:3] != "ghc" else 2 if family == "swin" else 1)
    with pytest.raises(ValueError, match=r"no residual add (any more|at any values)"):
        hcvision.convert(ours, "residual")
    back, _ = build(family, name)
    if name == "oru":
        return
    hcvision.convert(back, "residual")
    assert torch.equal(back(*inputs), plain(*inputs))
    assert not any(isinstance(block, ConnectedBlock) for block in back.modules())


def test_a_trained_exit_is_no_residual_add():
    model, _ = build("vit", "ghc2x3")
    with torch.no_grad():
        model.blocks[-1].connection2.exit.weight[0, 0] += 0.5
    with pytest.raises(ValueError, match="no residual add any more"):
        hcvision.convert(model, "residual")


@pytest.mark.parametrize("name", [*EVERY, "ghc3x5"])
def test_taps_and_cut_models(name):
    """Features of any block are the mean over copies, the last one's what the blocks give; a cut model has an exit."""
    plain, (images,) = build("vit")
    ours, _ = build("vit", name)
    for a, b in zip(*(m.forward_intermediates(images, intermediates_only=True) for m in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0.5 if name == "oru" else 2e-5)
    randomize(ours)
    streams = []
    hook = ours.blocks[0].register_forward_hook(lambda module, arguments, output: streams.append(output))
    tap = ours.forward_intermediates(images, indices=[0], output_fmt="NLC", intermediates_only=True)[0]
    hook.remove()
    expected = torch.zeros(48)
    copies, first = streams[0][:, 1:], ours.blocks[0].connection1
    for channel in range(48):
        expected[channel] = copies[0, 0, channel::48].mean()
    assert copies.shape[-1] == first.width
    torch.testing.assert_close(tap[0, 0], expected, rtol=1e-5, atol=1e-6)
    ours.prune_intermediate_layers([1])
    assert ours(images).shape[-1] == 48
    assert [key for key in ours.state_dict() if "exit" in key] == (
        ["blocks.1.connection2.exit.weight"] if name[:3] == "ghc" else []
    )
    features = timm.create_model("vit_tiny_patch16_224_ghc2x3", features_only=True, **{**TINY, "num_classes": 0})
    assert [f.shape[1] for f in features(images)] == [48] * 3


def test_some_blocks():
    """Side by side with other connections, each run enters and leaves for itself."""
    plain, (images,) = build("vit", depth=6)
    model, _ = build("vit", depth=6)
    for blocks, name in ((":1", "ghc2x3"), ("1:2", "ghc3x4"), ("2:4", "dhc4"), ("4:5", "mhc4"), ("5:", "ihc4")):
        hcvision.convert(model, name, blocks=blocks)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=2e-5)
    rates = [(block.entry_rate, block.exit_rate) for block in model.blocks]
    assert rates == [(2, 2), (2, 2), (4, 1), (1, 1), (1, 1), (1, 1)]  # dhc4, mhc4 and ihc4 share their streams
    assert model.connection == "ghc2x3+ghc3x4+dhc4+mhc4+ihc4"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("way", ["compile", "export", "script", "checkpointing", "bfloat16", "autocast"])
def test_ways(way, name):
    model, (images,) = build("vit", name, depth=1)
    randomize(model)
    expected = model(images)
    if way == "compile":
        ours = torch.compile(model, fullgraph=True, backend="aot_eager")
    elif way == "export":
        ours = torch.export.export(model, (images,)).module()
    elif way == "script":
        ours = torch.jit.script(model)
    elif way == "checkpointing":
        model.set_grad_checkpointing()
        ours = model.train()
    else:
        ours = model
        if way == "bfloat16":
            ours, images = copy.deepcopy(model).bfloat16(), images.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            low = ours(images)
        low.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in ours.parameters())
        assert (low - expected).abs().max() < 0.15 * expected.abs().max()
        return
    actual = ours(images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    if way != "export":
        seed = torch.randn_like(expected)
        leaves = list(model.parameters())
        for a, b in zip(*(torch.autograd.grad(o, leaves, seed) for o in (actual, model(images))), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_recompute(name):
    """Streams that are computed again are the same to the bit, and so are all gradients."""
    gradients = []
    for every in (0, 2):
        model, (images,) = build("vit", name, depth=4)
        hcvision.recompute_streams(randomize(model), every)
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["mhc4", "ihc4", "ghc2x3"])
def test_memory(name):
    """Of the size of x only x itself and the branch output are kept for backward."""
    connection = build_connection(name, 256)
    x = torch.randn(2, 64, connection.width, dtype=torch.bfloat16, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        views, carried = connection.width_connection(x)
        out = views.detach().clone().requires_grad_()
        connection.depth_connection(out, carried)
    for tensor in (x, out):
        assert saved.pop(tensor.untyped_storage().data_ptr())
    parameters = {p.untyped_storage().data_ptr() for p in connection.parameters()}
    rest = sum(size for place, size in saved.items() if place not in parameters)
    made = 4 * sum(p.numel() for key, p in connection.named_parameters() if "phi" in key)  # of the phi, one matrix
    assert rest - made < 0.5 * x.untyped_storage().nbytes()


# kernels, parts, errors


@pytest.mark.parametrize("parameter", ["x", "branch output", "phi_res"])
def test_the_write_of_mhc_is_a_kernel(parameter):
    ours, theirs = (random_connection("mhc4", dtype=torch.float32, backend=b) for b in ("triton", "torch"))
    x, out = torch.randn(3, 5, 4 * DIM), torch.randn(3, 5, DIM)
    seed, results = torch.randn(3, 5, 4 * DIM), []
    for connection in (ours, theirs):
        leaves = [x.clone().requires_grad_(), out.clone().requires_grad_()]
        _, carried = connection.width_connection(leaves[0])
        following = connection.depth_connection(leaves[1], carried)
        leaf = {"x": leaves[0], "branch output": leaves[1], "phi_res": connection.phi_res}[parameter]
        results.append((following, *torch.autograd.grad(following, leaf, seed)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(results[0][0], torch.zeros_like(seed))


@pytest.mark.parametrize("name", ["ihc4", "ghc2x3"])
def test_no_kernels(name):
    message = f"backend='triton' has no kernels for {name}; backend='auto' takes PyTorch"
    with pytest.raises(ValueError, match=message):
        build_connection(name, DIM, backend="triton")
    model, _ = build("vit", name)
    with pytest.raises(ValueError, match=message):
        choose_backend(model, "triton")
    choose_backend(model, "torch")
    assert model.blocks[0].connection1.backend == "torch"


@pytest.mark.parametrize(
    ("name", "part", "still"),
    [
        ("mhc4", "width", {f"{what}_{part}" for what in ("phi", "scale", "bias") for part in ("pre", "res")}),
        ("ihc4", "depth", {"phi_post", "scale_post", "bias_post"}),
        ("ghc2x3", "depth", {"static_beta", "dynamic_beta_fn", "dynamic_beta_scale"}),
    ],
)
def test_frozen_parts(name, part, still):
    model, _ = build("vit", name)
    freeze_connections(model, part)
    assert {key for key, p in model.blocks[0].connection1.named_parameters() if not p.requires_grad} == still


@pytest.mark.parametrize(
    ("name", "dim", "message"),
    [
        ("mhc1", 8, "rate must be an integer of at least 2, got 1"),
        ("ihc1", 8, "rate must be an integer of at least 2, got 1"),
        ("mhclite5", 8, "mhclite mixes 2 to 4 streams by their n! permutations, got 5"),
        ("mhclite1", 8, "mhclite mixes 2 to 4 streams by their n! permutations, got 1"),
        ("krom6", 8, "krom mixes 2, 4, 8, ... streams, a power of 2, got 6"),
        ("krom1", 8, "krom mixes 2, 4, 8, ... streams, a power of 2, got 1"),
        ("ghc2x2", 8, "ghc must carry more segments than the model has fractions, got 2 fractions and 2 segments"),
        ("ghc3x2", 8, "as many is what dfc3 does"),
        ("ghc3x4", 8, "dim must be divisible by the frac rate, got dim=8 and rate=3"),
    ],
)
def test_errors(name, dim, message):
    with pytest.raises(ValueError, match=message):
        build_connection(name, dim)


def test_blocks_that_scale_x_take_no_fraction_of_it():
    model = timm.create_model("poolformerv2_s12", device="meta")
    with pytest.raises(ValueError, match="ghc2x3 cannot take the adds of a MetaFormerBlock, which scales x itself"):
        hcvision.convert(model, "ghc2x3")
    assert not any(isinstance(block, ConnectedBlock) for block in model.modules())
    hcvision.convert(model, "mhc2")
