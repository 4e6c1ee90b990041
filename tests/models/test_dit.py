"""models/dit.py: the published sizes and keys, the forward by hand, and connections that start as residual adds."""

import argparse
import copy
import math

import pytest
import timm
import torch
from conftest import randomize
from torch.nn import functional as F

import hcvision
from hcvision.connections.base import Connection
from hcvision.connections.names import NAMES as CONNECTIONS
from hcvision.connections.names import parse_connection
from hcvision.models import dit
from hcvision.models.conversion import convert

TINY = {"img_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}


def build(connection=None, dtype=torch.float64, **kwargs):
    """A tiny DiT, gates and output open, connections at init."""
    torch.manual_seed(0)
    model = randomize(timm.create_model("dit_s_patch2_256", **(TINY | kwargs))).to(dtype).eval()
    return model if connection is None else convert(model, connection)


def inputs(dtype=torch.float64, batch=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0, 17, 999])[:batch], torch.tensor([0, 4, 5])[:batch]


# the published model


def test_published_sizes():
    """Parameters to the published digit, and 8 for each of the 56 sub-layers with shc2."""

    def millions(name):
        return sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) / 1e6

    for size, count in {"xl": 675, "l": 458, "b": 130, "s": 33}.items():
        assert int(millions(f"dit_{size}_patch2_256") + 0.05) == count
    assert millions("dit_xl_patch2_256") == 675.129632
    assert millions("dit_xl_patch2_256_shc2") == 675.129632 + 448e-6


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_names(size, patch):
    """Twelve sizes with each connection, on the meta device; no classification model among them."""
    name = f"dit_{size}_patch{patch}_256"
    model = timm.create_model(name, device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert model.x_embedder.num_patches == (32 // patch) ** 2
    for connection in ("shc2", "dhc4", "sfc2", "dfc8"):
        assert timm.is_model(f"{name}_{connection}")
    assert timm.create_model(f"{name}_dhc4", device="meta").connection == "dhc4"
    assert name not in hcvision.vit_names


def test_official_checkpoint(tmp_path):
    """The published key list and shapes load as they are: strictly, with only connections missing, and from a file."""
    depth, dim, patches = 28, 1152, 256
    shapes = {
        "pos_embed": (1, patches, dim),
        "x_embedder.proj.weight": (dim, 4, 2, 2), "x_embedder.proj.bias": (dim,),
        "t_embedder.mlp.0.weight": (dim, 256), "t_embedder.mlp.0.bias": (dim,),
        "t_embedder.mlp.2.weight": (dim, dim), "t_embedder.mlp.2.bias": (dim,),
        "y_embedder.embedding_table.weight": (1001, dim),
        "final_layer.linear.weight": (32, dim), "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * dim, dim), "final_layer.adaLN_modulation.1.bias": (2 * dim,),
    }  # fmt: skip
    for i in range(depth):
        for key, rows, columns in (
            ("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim),
            ("adaLN_modulation.1", 6 * dim, dim),
        ):  # fmt: skip
            shapes[f"blocks.{i}.{key}.weight"], shapes[f"blocks.{i}.{key}.bias"] = (rows, columns), (rows,)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    timm.create_model("dit_xl_patch2_256", device="meta").load_state_dict(state, strict=True, assign=True)
    twin = timm.create_model("dit_xl_patch2_256_shc2", device="meta")
    result = twin.load_state_dict(state, strict=False, assign=True)
    assert not result.unexpected_keys
    assert len(result.missing_keys) == 2 * 56
    assert all("connection" in key for key in result.missing_keys)


@pytest.mark.parametrize("training", [False, True], ids=["weights", "training checkpoint"])
@pytest.mark.parametrize("connection", ["shc2", "dhc4", "dfc2"])
def test_checkpoint_file(connection, training, tmp_path):
    """A file of a residual DiT into a connected one: the same function. Of a training checkpoint it is the average."""
    plain = build(dtype=torch.float32)
    state = plain.state_dict()
    other = {key: value + 1 for key, value in state.items()}
    torch.save(
        {"ema": state, "model": other, "opt": {}, "args": argparse.Namespace(lr=1)} if training else state,
        tmp_path / "dit.pt",
    )
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "dit.pt")}}
    x, t, y = inputs(torch.float32)
    for name in ("dit_s_patch2_256", f"dit_s_patch2_256_{connection}"):
        model = timm.create_model(name, **TINY, **overlay).eval()
        assert torch.equal(model(x, t, y), plain(x, t, y))


def test_init():
    """At init the output is zero, whatever the connection; embeddings and gates are the paper's."""
    x, t, y = inputs(torch.float32)
    for name in ("dit_s_patch2_256", "dit_s_patch2_256_dhc2"):
        torch.manual_seed(0)
        model = timm.create_model(name, **TINY)
        assert model(x, t, y).abs().max() == 0
        assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
        bound = math.sqrt(6 / (48 + 4 * 48))
        assert model.blocks[0].mlp.fc1.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
        assert not model.pos_embed.requires_grad
    grid = torch.arange(4.0)
    position = model.pos_embed[0].view(4, 4, 48)
    rates = 10000 ** (-torch.arange(12) / 12)
    for row in range(4):
        for column in range(4):
            expected = [f(grid[place] * rates) for place in (column, row) for f in (torch.sin, torch.cos)]
            torch.testing.assert_close(position[row, column], torch.cat(expected))


# the forward


def by_hand(model, connection, x, t, y):
    """DiT from the paper, the papers' streams, nothing of ours but the weights."""
    w = dict(model.named_parameters())
    kind, rate = parse_connection(connection) if connection else ("residual", 1)
    dim, heads, side = model.embed_dim, model.blocks[0].attn.num_heads, model.patch_size

    def linear(key, x):
        return x @ w[f"{key}.weight"].T + w[f"{key}.bias"]

    x = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=side).flatten(2).mT + w["pos_embed"]
    rates = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t[:, None].to(x.dtype) * rates
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])

    def attention(block, x):
        q, k, v = linear(f"{block}.attn.qkv", x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(dim // heads)).softmax(-1)
        return linear(f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))

    def mlp(block, x):
        return linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", x), approximate="tanh"))

    hyper = kind.endswith("hc")
    H = x[:, :, None].expand(-1, -1, rate, -1) if hyper else x.unflatten(-1, (rate, -1))
    for i, block in enumerate(model.blocks):
        chunks = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, dim=1)
        for k, branch in ((0, attention), (1, mlp)):
            shift, scale, gate = (chunk[:, None] for chunk in chunks[3 * k : 3 * k + 3])
            views = 1 if hyper else rate
            if connection:
                connection_k = getattr(block, f"connection{k + 1}")
                alpha, beta = connection_k.weights(H.flatten(-2))
            else:
                alpha, beta = torch.ones(1, 2, dtype=x.dtype), torch.ones(1, dtype=x.dtype)
            mix = alpha.mT @ H
            z = F.layer_norm(mix[:, :, :views].flatten(-2), (dim,), eps=1e-6) * (1 + scale) + shift
            out = (gate * branch(f"blocks.{i}", z)).unflatten(-1, (views, -1))
            H = beta[..., None] * out + mix[:, :, views:]
    x = H.mean(2) if hyper else H.flatten(-2)
    shift, scale = (part[:, None] for part in linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1))
    x = linear("final_layer.linear", F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale) + shift)
    grid = model.img_size[0] // side
    return torch.einsum("bhwpqc->bchpwq", x.view(len(x), grid, grid, side, side, -1)).reshape(
        len(x), -1, *model.img_size
    )


@pytest.mark.parametrize("connection", [None, "shc2", "dhc3", "sfc4", "dfc2"])
def test_by_hand(connection):
    """Every parameter random: the prediction and the gradient of every parameter."""
    model, (x, t, y) = randomize(build(connection)), inputs()
    ours, theirs = model(x, t, y), by_hand(model, connection, x, t, y)
    assert ours.shape == (3, 8, 8, 8)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)  # float32 sinusoids
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    seed = torch.randn_like(ours)
    for name, a, b in zip(
        parameters,
        torch.autograd.grad(ours, list(parameters.values()), seed),
        torch.autograd.grad(theirs, list(parameters.values()), seed),
        strict=True,
    ):
        assert a.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}, {"learn_sigma": False}, {"img_size": (8, 12)}], ids=str)
def test_same_at_init(kwargs):
    """Gates and output open: FC is the residual DiT to the bit, HC to a rounding."""
    x, t, y = inputs()
    x = torch.cat([x, x], dim=3)[..., : 12 if "img_size" in kwargs else 8]
    plain = build(**kwargs)
    expected = plain(x, t, y)
    assert expected.shape == (3, 4 if "learn_sigma" in kwargs else 8, *x.shape[2:])
    for connection in ("shc2", "dhc2", "dhc4", "shc3", "sfc2", "dfc4"):
        found = convert(copy.deepcopy(plain), connection)(x, t, y)
        if "fc" in connection:
            assert torch.equal(found, expected)
        assert (found - expected).norm() / expected.norm() < 1e-13


@pytest.mark.parametrize("connection", ["dhc2", "dfc2"])
def test_ways_to_run(connection):
    """torch.compile in one graph, torch.export, gradient checkpointing; a bfloat16 model; autocast at init."""
    model, (x, t, y) = randomize(build(connection)), inputs()
    expected = model(x, t, y)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(x, t, y)
    torch.testing.assert_close(compiled, expected, rtol=1e-10, atol=1e-10)
    exported = torch.export.export(model, (x, t, y)).module()(x, t, y)
    torch.testing.assert_close(exported, expected, rtol=1e-10, atol=1e-10)
    gradients = []
    for enable in (False, True):
        model.train().set_grad_checkpointing(enable)
        model.zero_grad()
        model(x, t, y).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    plain, ours = build(dtype=torch.float32), build(connection, dtype=torch.float32)
    low = x.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(low, t, y), plain(low, t, y))
    assert ours.bfloat16()(x.bfloat16(), t, y).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "connection",
    [
        "residual",
        "dhc2",
        "dfc2",
        "mhc4",
        "ihc4",
        "ghc2x3",
        "sihc4",
        "gr4",
        "oru",
        "laurel",
        "mhclite3",
        "krom2",
        "dense",
        "attnres",
    ],
)
def test_forward_mode(connection):
    """The derivative along x and t, which MeanFlow trains on, is that of one backward after the other."""
    model, (x, t, y) = build(depth=1), inputs(batch=1)
    randomize(convert(model, connection))
    for block in model.blocks:
        block.attn.fused_attn = False  # it has no such derivative

    def run(x, t):
        return model(x, t, y)

    tangents = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    _, along = torch.func.jvp(run, (x, t.double()), tangents)
    _, expected = torch.autograd.functional.jvp(run, (x, t.double()), tangents)  # by a second derivative
    torch.testing.assert_close(along, expected, rtol=1e-9, atol=1e-12)


# the time, seen by connections


@pytest.mark.parametrize("connection", ["dhc2", "dfc2", "mhc4", "ihc4"])
def test_time_starts_as_the_residual_model(connection):
    plain, (x, t, y) = build(), inputs()
    expected = plain(x, t, y)
    found = convert(copy.deepcopy(plain), connection, time=True)(x, t, y)
    if connection == "dfc2":
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4 if connection == "mhc4" else 1e-10, atol=1e-6)
    low = convert(copy.deepcopy(plain).float(), connection, time=True)
    if connection in ("dhc2", "dfc2"):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(low(x.float(), t, y), copy.deepcopy(plain).float()(x.float(), t, y))


def test_connections_see_the_time_and_not_the_class():
    """Coefficients of two images differ by their times alone; their number is said by the docstring."""
    model, (x, _, _) = randomize(convert(build(), "shc2", time=True)), inputs()
    count = sum(p.numel() for n, p in model.named_parameters() if "time_term" in n)
    assert count == 2 * 3 * 48 * 2 * 4  # sub-layers, D, n (n + 2)
    seen = []
    for block in model.blocks:
        for connection in (block.connection1, block.connection2):
            read = connection.read_timed
            connection.read_timed = lambda s, terms, read=read: (seen.append(terms.flatten(1)), read(s, terms))[1]
    model(x, torch.tensor([5, 5, 900]), torch.tensor([0, 3, 3]))
    assert len(seen) == 6
    for terms in seen:
        assert torch.equal(terms[0], terms[1])
        assert (terms[2] - terms[1]).abs().max() > 1e-3


@pytest.mark.parametrize("connection", ["dhc2", "mhc2"])
def test_ways_to_run_with_the_time(connection):
    """Hooks, torch.compile, checkpointed gradients, streams computed again: the same values and gradients."""
    model, (x, t, y) = randomize(convert(build(), connection, time=True)), inputs()

    def run(one):
        model.zero_grad()
        out = one(x, t, y)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    expected = run(model)
    assert all(part.abs().max() > 0 for part in expected)
    handle = model.blocks[1].connection1.register_forward_hook(lambda *_: None)
    hooked = run(model)
    handle.remove()
    model.set_grad_checkpointing()
    checkpointed = run(model)
    model.set_grad_checkpointing(False)
    hcvision.recompute_streams(model, 2)
    again = run(model)
    hcvision.recompute_streams(model, 0)
    compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for found in (hooked, checkpointed, again, compiled):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=max(1e-9 * b.abs().max().item(), 1e-12))


def test_the_time_has_a_name(tmp_path):
    """As an argument of timm's names, in a hub folder, and taken away again."""
    model = randomize(timm.create_model("dit_s_patch2_256_dhc2", **TINY, connection_time=True))
    x, t, y = inputs(torch.float32)
    timm.models.save_for_hf(model.eval(), tmp_path, safe_serialization=True)
    loaded = hcvision.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.blocks[0].connection1.time
    assert torch.equal(loaded(x, t, y), model(x, t, y))
    fresh = convert(build(), "dhc2", time=True)
    convert(fresh, "residual")
    assert fresh.state_dict().keys() == build().state_dict().keys()
    with pytest.raises(ValueError, match="time=True is for shc, dhc, sfc, dfc, mhc, ihc, mhclite, krom, got gr2"):
        convert(build(), "gr2", time=True)
    with pytest.raises(ValueError, match="needs a model that embeds a time, a DiT, got a VisionTransformer"):
        convert(timm.create_model("vit_tiny_patch16_224", depth=1), "dhc2", time=True)


def test_hub_folder(tmp_path):
    model = randomize(hcvision.create_model("dit_tiny_patch2_pixel", "dfc3", **TINY, in_chans=4))
    x, t, y = inputs(torch.float32)
    timm.models.save_for_hf(model.eval(), tmp_path, safe_serialization=True)
    loaded = hcvision.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_weight_decay():
    model = build("dhc2")
    assert {"pos_embed", "y_embedder.embedding_table.weight"} < model.no_weight_decay()
    names = {
        f"{prefix}.{n}" for prefix, m in model.named_modules() if isinstance(m, Connection) for n in m.no_weight_decay()
    }
    assert names < model.no_weight_decay()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"img_size": 9}, r"img_size must be a multiple of patch_size, got \(9, 9\) and 2"),
        ({"embed_dim": 50}, "embed_dim must be a multiple of 4 and of num_heads=3, got 50"),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("dit_s_patch2_256", **(TINY | kwargs))


def test_names_of_the_file():
    assert len(dit.NAMES) == 18 * (1 + len(CONNECTIONS) + 1)  # dar4 is for diffusion transformers alone
    assert all(timm.is_model(name) for name in dit.NAMES)
