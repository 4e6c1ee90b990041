"""Connections with a history: what their papers write down, the residual model at the start, and entries kept once."""

import copy
import gc
import weakref

import pytest
import timm
import torch
from conftest import randomize
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import hcvision
from hcvision.connections import entries as history
from hcvision.connections.history import Place
from hcvision.connections.names import build_connection
from hcvision.models.borders import connections_of
from hcvision.models.dit import DiT
from hcvision.training.connections import choose_backend, freeze_connections

DIM = 12
NAMES = ("dense", "attnres", "attnres2", "attnres3", "mudd")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "init_values": 0.1, **options})
    return model if name is None else hcvision.convert(model, name)


def read_by_attention(entries, query):
    """AttnRes, with as many times the softmax as there are entries."""
    keys = torch.stack([v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() for v in entries])
    weights = F.softmax((keys @ query) / len(query) ** 0.5, dim=0) * len(entries)
    return (weights[..., None] * torch.stack(entries)).sum(0)


def read_by_token(entries, read):
    """MUDD: the weights of each way, from the newest entry."""
    newest = entries[-1]
    hidden = F.gelu(newest / (newest.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ read.dynamic_down)
    ways = len(read.static)
    weights = (hidden @ read.dynamic_up).unflatten(-1, (ways, len(entries))) + read.static
    return [sum(weights[..., way, j, None] * v for j, v in enumerate(entries)) for way in range(ways)]


def attend_by_hand(attention, queries, keys, values):
    """Attention with inputs of their own for queries, keys and values."""
    heads = []
    for row, x in enumerate((queries, keys, values)):
        at = slice(row * x.shape[-1], (row + 1) * x.shape[-1])
        y = F.linear(x, attention.qkv.weight[at], attention.qkv.bias[at])
        heads.append(y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
    return attention.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def run_mudd_by_hand(model, images):
    entries = [model._pos_embed(model.patch_embed(images))]
    for block in model.blocks:
        queries, keys, values, x = read_by_token(entries, block.connection1.read) if entries[1:] else entries * 4
        norm = [F.layer_norm(v, (48,), block.norm1.weight, block.norm1.bias, 1e-6) for v in (queries, keys, values)]
        x = x + block.ls1(attend_by_hand(block.attn, *norm))
        entries.append(x + block.ls2(block.mlp(block.norm2(x))))
    (x,) = read_by_token(entries, model.blocks[-1].connection2.exit)
    return model.head(model.norm(x)[:, 0])


def run_by_hand(model, name, images):
    """The ViT as the papers write it: every entry in a list of its own, and the read-out behind the last block."""
    if name == "mudd":
        return run_mudd_by_hand(model, images)
    entries, group = [model._pos_embed(model.patch_embed(images))], []
    layers = 0
    for number, block in enumerate(model.blocks):
        first, second = block.connection1, block.connection2
        parts = ((first, block.norm1, block.attn, block.ls1), (second, block.norm2, block.mlp, block.ls2))
        if name == "dense":
            x = sum(a * v for a, v in zip(first.read.weights, entries, strict=True)) if number else entries[0]
            for _, norm, branch, scale in parts:
                x = x + scale(branch(norm(x)))
            entries.append(x)
            continue
        size = int(name.removeprefix("attnres") or 1)
        for connection, norm, branch, scale in parts:
            seen = [*entries, sum(group)] if group else entries
            x = read_by_attention(seen, connection.read.query) if layers else entries[0]
            group.append(scale(branch(norm(x))))
            layers += 1
            if len(group) == size:
                entries, group = [*entries, sum(group)], []
    last = model.blocks[-1].connection2.exit
    if name == "dense":
        x = sum(a * v for a, v in zip(last.weights, entries, strict=True))
    else:
        x = read_by_attention([*entries, sum(group)] if group else entries, last.query)
    return model.head(model.norm(x)[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_by_hand(name):
    """With random parameters in float64: logits and the gradient of every parameter, to 1e-11."""
    model = randomize(build(name)).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ours, theirs = model(images), run_by_hand(model, name, images)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    seed = torch.randn_like(ours)
    gradients = [torch.autograd.grad(out, list(model.parameters()), seed) for out in (ours, theirs)]
    for (key, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        assert b.abs().max() > 1e-13, f"{key} has no gradient"
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_the_start_is_the_residual_model(name, precision):
    """To the bit where every entry is one output; groups add their outputs up in another order."""
    model, images = build(None).eval(), torch.randn(2, 3, 32, 32)
    twin = hcvision.convert(copy.deepcopy(model), name)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        ours, theirs = (one.forward_features(images) for one in (twin, model))
    if name in ("dense", "attnres", "mudd"):
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if precision == "float32" else 0.05)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_that_a_model_has(name):
    """DenseFormer has L (L + 3) / 2 numbers, attention a query for each sub-layer but the first, and for the end."""
    model = build(name)
    added = sum(p.numel() for block in model.blocks for c in connections_of(block) for p in c.parameters())
    sizes = [4 * 2, 4 * 3, 4]  # the mixtures of the blocks but the first, and of the end
    expected = {"dense": 3 * 6 // 2, "mudd": sum(size + 48 * size + size * size for size in sizes)}
    assert added == expected.get(name, 6 * 48)
    keys = {key for key in model.state_dict() if "connection" in key}
    ends = (".weights", ".query") if name != "mudd" else (".static", ".dynamic_down", ".dynamic_up")
    assert keys
    assert all(key.endswith(ends) for key in keys)
    assert {key for key in keys if "dynamic" not in key} == {k for k in model.no_weight_decay() if "connection" in k}


@pytest.mark.parametrize(
    ("build_model", "size"),
    [
        (lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2, num_classes=3), 28),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, num_classes=3), 56),
        (lambda: timm.create_model("convnext_atto", num_classes=3), 32),
        (lambda: timm.create_model("xcit_nano_12_p16_224", depth=2, num_classes=3), 32),
        (lambda: timm.create_model("hiera_tiny_224", img_size=64, num_classes=3), 64),
    ],
    ids=["eva", "swin", "convnext", "xcit", "hiera"],
)
@pytest.mark.parametrize("name", ["dense", "attnres"])
def test_families(name, build_model, size):
    """Blocks of one to three adds, in stages and in columns: the same outputs, to the bit, there and back."""
    torch.manual_seed(0)
    model, images = build_model().eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(images)
        keys = set(model.state_dict())
        hcvision.convert(model, name)
        assert torch.equal(model(images), expected)
        assert set(model.state_dict()) > keys
        hcvision.convert(model, "residual")
        assert torch.equal(model(images), expected)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["dense", "attnres2"])
def test_dit(name):
    """The gate belongs to the branch; gates that are open."""
    torch.manual_seed(0)
    model = randomize(DiT(8, 2, 4, 10, embed_dim=24, depth=3, num_heads=2)).double().eval()
    x, t, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 7]), torch.tensor([0, 10])
    expected = model(x, t, y)
    twin = hcvision.convert(copy.deepcopy(model), name)
    torch.testing.assert_close(twin(x, t, y), expected, rtol=0, atol=1e-12)
    assert (randomize(twin)(x, t, y) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dar", "dar2"])
def test_dit_by_hand(name):
    """DAR with random parameters: each query is the learned one and a number times the time's embedding."""
    model = randomize(hcvision.convert(DiT(8, 2, 4, 10, embed_dim=24, depth=2, num_heads=2), name)).double()
    x, t, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 700]), torch.tensor([0, 10])
    expected = model(x, t, y)
    time = model.t_embedder(t)
    c = time + model.y_embedder(y)
    entries, group, layers, size = [model.x_embedder(x) + model.pos_embed], [], 0, int(name[3:] or 1)
    for block in model.blocks:
        for connection, branch in ((block.connection1, block.branch1), (block.connection2, block.branch2)):
            seen = [*entries, sum(group)] if group else entries
            if layers:
                queries = connection.read.query + connection.read.time_scale * time
                rows = [read_by_attention([v[i] for v in seen], query) for i, query in enumerate(queries)]
                group.append(branch(torch.stack(rows), c))
            else:
                group.append(branch(entries[0], c))
            layers += 1
            if len(group) == size:
                entries, group = [*entries, sum(group)], []
    read_out = read_by_attention(entries, model.blocks[-1].connection2.exit.query)
    out = model.final_layer(read_out, c)
    out = out.unflatten(-1, (2, 2, 8)).unflatten(1, (4, 4)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(expected, out, rtol=0, atol=1e-11)
    seed = torch.randn_like(out)
    gradients = [torch.autograd.grad(one, list(model.parameters())[1:], seed) for one in (expected, out)]
    for (key, _), a, b in zip(list(model.named_parameters())[1:], *gradients, strict=True):
        assert b.abs().max() > 1e-13, f"{key} has no gradient"
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def test_dar_needs_a_time():
    with pytest.raises(ValueError, match="dar4 needs a model that embeds a time, a DiT, got a VisionTransformer"):
        hcvision.convert(build(None), "dar4")
    assert "dit_s_patch2_256_dar4" in timm.list_models("dit_*")
    assert not timm.is_model("vit_small_patch16_224_dar4")
    model = hcvision.convert(randomize(DiT(8, 2, 4, 10, embed_dim=24, depth=2, num_heads=2)), "dar4")
    twin = hcvision.convert(copy.deepcopy(model), "residual")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 700]), torch.tensor([0, 10])
    torch.testing.assert_close(model(x, t, y), twin(x, t, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "attnres", "attnres2"])
@pytest.mark.parametrize("part", [0, 1])
def test_gradients(name, part):
    """First and second derivatives of both steps, by differences."""
    torch.manual_seed(0)
    place = Place(layer=2 + part, block=1, part=part)
    connection = build_connection(name, 3, place=place, dtype=torch.float64)
    for parameter in connection.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, connection.width, dtype=torch.float64, requires_grad=True)
    leaves = list(connection.parameters())

    def step(x, *_):
        return connection(x, torch.tanh)

    assert gradcheck(step, (x, *leaves))
    assert gradgradcheck(step, (x, *leaves))


def count_kept(model, images):
    """Numbers that backward keeps of the tensors between sub-layers, each storage once."""
    kept = {}

    def pack(tensor):
        if tensor.shape[:2] == (2, 17) and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).sum()
    return sum(kept.values()), loss


@pytest.mark.parametrize("name", ["dense", "attnres", "attnres3"])
def test_entries_are_kept_once(name):
    """Beside what the residual model keeps: a tensor for each sub-layer, and for each pair of them numbers alone."""
    images, depth = torch.randn(2, 3, 32, 32), 6
    (plain, _), (more, _) = (count_kept(build(one, depth=depth), images) for one in (None, name))
    tokens, pairs = 2 * 17, (2 * depth) * (2 * depth + 1) // 2
    assert more - plain < (2 * depth + 2) * 48 * tokens + 4 * pairs * tokens < pairs * 48 * tokens / 3


def test_what_was_put_together_is_let_go():
    """The tensors between blocks do not outlive the step: what knows their entries holds no hold of them."""
    model, seen = build("attnres"), []
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    before = len(history.ENTRIES)
    loss = model(torch.randn(2, 3, 32, 32)).sum()
    gc.collect()
    assert seen[0]() is None
    assert len(history.ENTRIES) == before
    loss.backward()


@pytest.mark.parametrize("name", ["dense", "attnres2", "mudd"])
@pytest.mark.parametrize("kind", ["replaced", "changed", "hooked", "retained", "backward hook"])
def test_who_looks_between_blocks(name, kind):
    """What stands between two blocks is what the next one reads, and its gradient is the whole one."""
    model, plain = (randomize(build(name, init_values=None)).double() for _ in range(2))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    seen = []

    def put(module, args, out):
        if kind == "replaced":
            return out * 1.5
        if kind == "changed":
            with torch.no_grad():
                out.mul_(1.5)
        elif kind == "hooked":
            out.register_hook(seen.append)
        elif kind == "retained":
            out.retain_grad()
            seen.append(out)
        return None

    if kind == "backward hook":
        model.blocks[1].register_full_backward_hook(lambda module, given, got: seen.append(got[0]))
    else:
        model.blocks[1].register_forward_hook(put)
    out = model(images)
    if kind in ("replaced", "changed"):
        torch.testing.assert_close(out, scale_by_hand(plain, images, 1.5), rtol=0, atol=1e-10)
        return
    torch.testing.assert_close(out, plain(images), rtol=0, atol=1e-12)
    out.square().sum().backward()
    (gradient,) = [one.grad if kind == "retained" else one for one in seen]
    leaf = {}

    def cut(module, args, out):
        leaf["x"] = out.detach().requires_grad_()
        return leaf["x"]

    plain.blocks[1].register_forward_hook(cut)
    plain(images).square().sum().backward()
    torch.testing.assert_close(gradient, leaf["x"].grad, rtol=1e-9, atol=1e-12)


def scale_by_hand(model, images, factor):
    """The model with the tensor between blocks 1 and 2 scaled, block by block."""
    x = model._pos_embed(model.patch_embed(images))
    for number, block in enumerate(model.blocks):
        x = block(x.clone())
        x = x * factor if number == 1 else x
    return model.head(model.norm(x)[:, 0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["dense", "attnres", "attnres2", "mudd"])
@pytest.mark.parametrize("way", ["checkpointing", "compile", "script", "fx", "vmap"])
def test_ways_to_run(name, way):
    """Values and gradients, with random parameters, are those of the plain run."""
    model = randomize(build(name)).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model(images).square().sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    twin.zero_grad()
    if way == "checkpointing":
        twin.set_grad_checkpointing()
        twin.train()
        run = twin
    elif way == "compile":
        run = torch.compile(twin, backend="aot_eager")
    elif way == "script":
        run = torch.jit.script(twin)
    elif way == "fx":
        run = torch.fx.symbolic_trace(twin)
    else:
        run = torch.func.vmap(lambda one: torch.func.functional_call(twin, {}, one[None])[0])
    out = run(images)
    torch.testing.assert_close(out, model(images), rtol=0, atol=1e-11)
    out.square().sum().backward()
    for key, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, key=key: key + m)


@pytest.mark.parametrize("name", ["dense", "attnres", "mudd"])
def test_features(name):
    """Taps between blocks are the model's state there: at the start those of the residual model, also pruned."""
    model, images = build(None).eval(), torch.randn(2, 3, 32, 32)
    twin = hcvision.convert(copy.deepcopy(model), name)
    for norm in (False, True):
        ours, theirs = (one.forward_intermediates(images, indices=[0, 1, 2], norm=norm)[1] for one in (twin, model))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for one in (twin, model):
        one.prune_intermediate_layers([0, 1])
    assert torch.equal(twin(images), model(images))
    getter = timm.create_model(f"vit_tiny_patch16_224_{name}", features_only=True, **{**TINY, "num_classes": 0})
    assert [tuple(part.shape) for part in getter(images)] == [(2, 48, 4, 4)] * 3


@pytest.mark.parametrize("name", ["dense", "attnres2", "mudd"])
def test_some_of_the_blocks(name):
    """Runs of blocks have histories of their own; fractions and residual adds may stand beside them."""
    model, images = build(None, depth=6).eval(), torch.randn(2, 3, 32, 32)
    twin = hcvision.convert(copy.deepcopy(model), name, blocks=[1, 2, 4, 5])
    hcvision.convert(twin, "dfc2", blocks=[3])
    torch.testing.assert_close(twin(images), model(images), rtol=0, atol=1e-6)
    assert twin.connection == f"{name}+dfc2"
    again = timm.create_model("vit_tiny_patch16_224", **{**TINY, "depth": 6, "init_values": 0.1})
    assert [step["connection"] for step in twin._model_args["connection_more"]] == ["dfc2"]
    hcvision.convert(again, name, blocks=[1, 2, 4, 5])
    hcvision.convert(again, "dfc2", blocks=[3])
    randomize(twin)
    again.load_state_dict(twin.state_dict())
    assert torch.equal(again.eval()(images), twin(images))


def test_what_does_not_go():
    model = build("attnres", depth=4)
    with pytest.raises(
        ValueError, match="blocks=':2' takes attnres from blocks whose outputs later ones read; take it"
    ):
        hcvision.convert(model, "residual", blocks=":2")
    hcvision.convert(model, "residual", blocks="3:")
    with pytest.raises(ValueError, match="cannot put attnres beside the attnres that this VisionTransformer has"):
        hcvision.convert(model, "attnres", blocks="3:")
    with pytest.raises(ValueError, match=r"cannot put dhc2 beside the attnres .*: attnres takes all its blocks in one"):
        hcvision.convert(model, "dhc2", blocks="3:")
    with pytest.raises(ValueError, match="cannot put dense beside the dhc2 "):
        hcvision.convert(hcvision.convert(build(None), "dhc2", blocks=":1"), "dense", blocks="1:")
    with pytest.raises(
        ValueError, match="dense cannot take the adds of a MetaFormerBlock, which scales x itself; conn"
    ):
        hcvision.convert(timm.create_model("caformer_s18", num_classes=2), "dense")
    with pytest.raises(ValueError, match="backend='native' has no kernels for a history; backend='auto' takes PyTorch"):
        choose_backend(model, "native")
    with pytest.raises(ValueError, match="connection_freeze='depth' needs connections with parameters of it, attnres"):
        freeze_connections(model, "depth")
    freeze_connections(model, "width")
    assert not any(p.requires_grad for b in model.blocks for c in connections_of(b) for p in c.parameters())
    with pytest.raises(ValueError, match="mudd needs blocks of a ViT whose attention has one linear map"):
        hcvision.convert(timm.create_model("swin_tiny_patch4_window7_224", num_classes=2), "mudd")
    connection = build_connection("attnres", DIM, 2)
    with pytest.raises(
        ValueError, match=r"x must have 3 entries of 12 on its last axis, 36 in all, got shape \[2, 12\]"
    ):
        connection.width_connection(torch.randn(2, DIM))
    with pytest.raises(ValueError, match=r"the branch must return the shape it was given, \[2, 12\], got \[2, 5\]"):
        connection(torch.randn(2, 3 * DIM), lambda x: x[:, :5])
    plain = build(None)
    with pytest.raises(ValueError, match="recompute=1 is for connections that carry streams, and dense reads"):
        hcvision.convert(plain, "dense", recompute=1)
    with pytest.raises(ValueError, match="stream_dtype=bfloat16 is for connections that carry streams, and"):
        hcvision.convert(plain, "dense", stream_dtype="bfloat16")
    assert not any(connections_of(block) for block in plain.blocks)
    with pytest.raises(ValueError, match="recompute=1 needs a model with connections that carry streams, not this Vis"):
        hcvision.recompute_streams(model, 1)
    with pytest.raises(ValueError, match="stream_dtype=float16 needs a model with connections that carry streams, not"):
        hcvision.set_stream_dtype(model, "float16")


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients(name):
    """Nothing is noted of tensors that have none, and inference mode has no versions to note."""
    model, images = randomize(build(name)), torch.randn(2, 3, 32, 32)
    expected, before = model(images), len(history.ENTRIES)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(images), expected)
        assert len(history.ENTRIES) == before


@pytest.mark.parametrize("name", ["dense", "attnres", "mudd"])
def test_half_precision(name):
    """A model of bfloat16 alone runs in it; under autocast reads are in float32 and entries are kept as they are."""
    model, images = build(name, init_values=None).bfloat16(), torch.randn(2, 3, 32, 32).bfloat16()
    out = model(images)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    entries = [torch.randn(2, 5, DIM), torch.randn(2, 5, DIM).bfloat16()]
    weights = torch.randn(2, 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = history.mix_entries(entries, weights)
        scores = history.score_entries(entries, torch.ones(DIM))
    exact = weights[..., :1] * entries[0] + weights[..., 1:] * entries[1].float()
    torch.testing.assert_close(mixed, exact, rtol=1e-6, atol=1e-6)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[..., 1], F.rms_norm(entries[1].float(), (DIM,), eps=1e-6).sum(-1) / DIM**0.5)
