"""models/conversion.py: the converted transformer is the timm one at init, and the papers' with random parameters."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import time

import pytest
import timm
import torch
from conftest import randomize
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import DiffParallelScalingBlock, VisionTransformer
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

import hcvision
from hcvision.connections.base import Connection
from hcvision.connections.frac import FracConnection
from hcvision.connections.hyper import HyperConnection
from hcvision.connections.names import parse_connection
from hcvision.connections.recomputation import Recipe
from hcvision.connections.streams import StreamConnection
from hcvision.models.conversion import convert
from hcvision.models.names import checkpoint_filter_fn, create_model
from hcvision.studies.measuring import TensorMemory

BASE = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
FOUR = ("shc2", "dhc2", "sfc2", "dfc2")


def vit(connection=None, dtype=None, **kwargs):
    """A tiny random timm ViT, its own parameters random, its connections (if any) at init."""
    torch.manual_seed(0)
    model = randomize(timm.create_model(BASE, **(TINY | kwargs))).to(dtype).eval()
    return model if connection is None else convert(model, connection)


def images(batch=2, size=(32, 32), dtype=None):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2)).to(dtype)


def connections(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Connection)}


def connection_keys(model):
    return {f"{prefix}.{key}" for prefix, module in connections(model).items() for key in module.state_dict()}


# at init the model is the timm model

MODELS = {
    "class token": {},
    "no_embed_class": {"no_embed_class": True},
    "registers": {"reg_tokens": 2},
    "avg, fc_norm": {"class_token": False, "global_pool": "avg"},
    "avg, norm": {"global_pool": "avg", "fc_norm": False},
    "map": {"global_pool": "map"},
    "qk_norm": {"qk_norm": True},
    "layer scale": {"init_values": 0.1},
    "pre_norm": {"pre_norm": True},
    "no final norm": {"final_norm": False},
    "patch drop": {"patch_drop_rate": 0.5},
    "dynamic size": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("kwargs", MODELS.values(), ids=MODELS)
def test_same_as_timm(kwargs):
    """FC to the bit, HC with 2 or 4 streams too (their mean is exact), others to a rounding; all in float64.

    Without a class token timm's tokens have the memory layout of the convolution. FC keeps it; HC streams are
    contiguous, and the mean over tokens that follows adds them in another order: the tokens are equal to the bit.
    """
    x = images(size=(24, 40) if "dynamic_img_size" in kwargs else (32, 32))
    for dtype in (torch.float32, torch.float64):
        plain = vit(dtype=dtype, **kwargs)
        tokens, logits = plain.forward_features(x.to(dtype)), plain(x.to(dtype))
        for connection in ("shc1", "shc2", "dhc2", "dhc4", "shc3", "dhc8", "sfc2", "dfc3", "sfc8"):
            ours = vit(connection, dtype, **kwargs)
            error = (ours(x.to(dtype)) - logits).norm() / logits.norm()
            assert error < (1e-6 if dtype == torch.float32 else 1e-12), connection
            if connection not in ("shc3", "dhc8"):
                assert torch.equal(ours.forward_features(x.to(dtype)), tokens), connection
                assert error == 0 or ("hc" in connection and not plain.has_class_token), connection


@pytest.mark.parametrize("connection", FOUR)
def test_same_as_timm_masked(connection):
    """attn_mask and is_causal reach the attention."""
    plain, ours, x = vit(), vit(connection), images()
    mask = torch.rand(17, 17, generator=torch.Generator().manual_seed(0)) < 0.7
    mask.fill_diagonal_(True)
    for kwargs in ({"attn_mask": mask}, {"is_causal": True}):
        assert torch.equal(ours(x, **kwargs), plain(x, **kwargs))
        assert not torch.equal(plain(x, **kwargs), plain(x))


@pytest.mark.parametrize("connection", FOUR)
def test_same_training_step(connection):
    """With dropout, patch dropout and stochastic depth: same seed, same loss, and timm's gradients."""
    kwargs = {"proj_drop_rate": 0.2, "pos_drop_rate": 0.1, "patch_drop_rate": 0.3, "drop_path_rate": 0.4}
    gradients = []
    for model in (vit(dtype=torch.float64, **kwargs), vit(connection, torch.float64, **kwargs)):
        torch.manual_seed(3)
        model.train()(images(4, dtype=torch.float64)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("connection", ["shc2", "dhc4", "sfc2", "dfc4"])
def test_autocast(connection):
    """Under bf16 autocast, and cast to bfloat16, the model at init is its residual twin bit for bit."""
    plain, ours, x = vit(init_values=0.1), vit(connection, init_values=0.1), images()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), plain(x))
        assert torch.equal(ours.forward_features(x), plain.forward_features(x))
    low, low_plain = ours.to(torch.bfloat16), plain.to(torch.bfloat16)
    logits = low(x.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, low_plain(x.bfloat16()))
    randomize(low)(x.bfloat16()).float().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in low.parameters())


# with random parameters it is the papers' model


def textbook(model, kind, rate, x):
    """A ViT by hand: timm's branches, the papers' update of streams (B, N, S, E), timm's head."""
    x = model._pos_embed(model.patch_embed(x))
    hyper = kind.endswith("hc")
    H = x[:, :, None].expand(-1, -1, rate, -1) if hyper else x.unflatten(-1, (rate, -1))
    views = 1 if hyper else rate
    for block in model.blocks:
        for c, norm, branch, scale in (
            (block.connection1, block.norm1, block.attn, block.ls1),
            (block.connection2, block.norm2, block.mlp, block.ls2),
        ):
            alpha, beta = c.static_alpha, c.static_beta
            if kind[0] == "d":
                width = H.shape[-1]
                Hn = F.layer_norm(H, (width,), eps=1e-6) if hyper else F.rms_norm(H, (width,), c.norm_weight, eps=1e-6)
                alpha = alpha + c.dynamic_alpha_scale * torch.tanh(Hn @ c.dynamic_alpha_fn)
                beta = beta + c.dynamic_beta_scale * torch.tanh(Hn @ c.dynamic_beta_fn).squeeze(-1)
            mix = alpha.mT @ H
            out = scale(branch(norm(mix[:, :, :views].flatten(-2)))).unflatten(-1, (views, -1))
            H = beta[..., None] * out + mix[:, :, views:]
    x = H.mean(2) if hyper else H.flatten(-2)
    x = F.layer_norm(x, (x.shape[-1],), model.norm.weight, model.norm.bias, model.norm.eps)
    return model.head(x[:, 0])


@pytest.mark.parametrize("connection", ["shc2", "dhc3", "dhc4", "sfc4", "dfc2", "dfc3"])
def test_textbook(connection):
    """Logits and the gradient of every parameter, all parameters random; no gradient is zero."""
    model = randomize(vit(connection, torch.float64, init_values=0.1, reg_tokens=1)).train()
    x, names = images(dtype=torch.float64), [name for name, _ in model.named_parameters()]
    ours, theirs = model(x), textbook(model, *parse_connection(connection), x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    seed = torch.randn_like(ours)
    for name, a, b in zip(
        names,
        torch.autograd.grad(ours, list(model.parameters()), seed),
        torch.autograd.grad(theirs, list(model.parameters()), seed),
        strict=True,
    ):
        assert a.abs().max() > 1e-9, f"{name} has no gradient"
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("connection", ["shc3", "dhc4", "sfc2", "dfc3"])
def test_layer_index(connection):
    """Attention of block i is sub-layer 2i, its MLP 2i + 1, and HC reads stream k mod n there."""
    kind, rate = parse_connection(connection)
    for i, block in enumerate(vit(connection).blocks):
        for k, c in ((2 * i, block.connection1), (2 * i + 1, block.connection2)):
            assert isinstance(c, HyperConnection if kind.endswith("hc") else FracConnection)
            assert (c.dim, c.rate, c.layer_index, c.dynamic) == (48, rate, k, kind[0] == "d")
            if kind.endswith("hc"):
                assert c.static_alpha[:, 0].tolist() == [float(j == k % rate) for j in range(rate)]


@pytest.mark.parametrize("connection", ["shc2", "dhc3", "dfc3"])
def test_drop_path(connection):
    """With both branches of a block dropped only the carried streams are left: A_r2^T A_r1^T H."""
    model = randomize(vit(connection, torch.float64, drop_path_rate=0.5)).train()
    block = model.blocks[-1]
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1.0
    x = torch.randn(2, 5, block.connection1.width, dtype=torch.float64)
    expected = x
    for c in (block.connection1, block.connection2):
        carry = c.weights(expected)[0][..., c.views :]
        expected = (carry.mT @ expected.unflatten(-1, (c.streams, -1))).flatten(-2)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    model.eval()
    assert (block(x) - expected).abs().max() > 1e-3


# checkpoints


@pytest.mark.parametrize("connection", FOUR)
def test_state_dict(connection):
    """timm's keys are a strict subset, the rest are exactly the connections', and a timm checkpoint loads."""
    plain, ours = vit(), randomize(vit(connection), seed=5)
    for c in connections(ours).values():
        c.reset_parameters()
    assert set(ours.state_dict()) - set(plain.state_dict()) == connection_keys(ours)
    result = ours.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == connection_keys(ours)
    assert result.unexpected_keys == []
    assert len(connections(ours)) == 6
    assert torch.equal(ours(images()), plain(images()))


@pytest.mark.parametrize("num_classes", [10, 7])
@pytest.mark.parametrize("connection", ["dhc2", "sfc2"])
def test_pretrained_residual(connection, num_classes, tmp_path):
    """A residual checkpoint into connections, by both create_models: its features, and its head if it fits."""
    plain, path = vit(), tmp_path / "residual.pth"
    torch.save({"state_dict": plain.state_dict()}, path)
    kwargs = TINY | {
        "num_classes": num_classes,
        "pretrained": True,
        "pretrained_cfg_overlay": {"file": str(path), "num_classes": 10},
    }
    for model in (
        timm.create_model(f"{BASE}_{connection}", **kwargs),
        create_model(BASE, connection, **kwargs),
        create_model(f"{BASE}.augreg_in21k", connection, **kwargs),
    ):
        model.eval()
        features = plain.forward_features(images())
        assert torch.equal(model.forward_features(images()), features)
        head = plain.head if num_classes == 10 else model.head
        assert torch.equal(model(images()), head(features[:, 0]))
    assert model.pretrained_cfg["architecture"] == f"{BASE}_{connection}"
    assert model.pretrained_cfg["tag"] == "augreg_in21k"


def test_pretrained_connections(tmp_path):
    """A checkpoint with connections brings its own; with half of them it is an error, not a mixture."""
    trained, path = randomize(vit("dhc2")), tmp_path / "dhc2.pth"
    kwargs = TINY | {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 10}}
    torch.save(trained.state_dict(), path)
    loaded = timm.create_model(f"{BASE}_dhc2", **kwargs).eval()
    assert torch.equal(loaded(images()), trained(images()))
    keys = sorted(connection_keys(trained))
    half = {key: value for key, value in trained.state_dict().items() if key not in keys[::2]}
    torch.save(half, path)
    with pytest.raises(RuntimeError, match=r"the checkpoint has 18 of 36 connection parameters; missing: blocks\.0\."):
        timm.create_model(f"{BASE}_dhc2", **kwargs)
    with pytest.raises(RuntimeError, match=r"missing: blocks\.2\.connection2\.static_beta$"):
        checkpoint_filter_fn(
            {key: None for key in connection_keys(trained) if "2.connection2.static_b" not in key}, trained
        )


def test_pretrained_errors():
    """A base without weights has none for its twin, and asking for them says so."""
    with pytest.raises(RuntimeError, match="No pretrained weights exist for dit_tiny_patch4_pixel_dhc2"):
        timm.create_model("dit_tiny_patch4_pixel_dhc2", pretrained=True, depth=1)


@pytest.mark.parametrize("options", [{}, {"connection_tanh": False, "connection_arrangement": "parallel"}], ids=str)
def test_hub_folder(options, tmp_path):
    """Saved by timm for the Hugging Face hub and built again from the folder alone, options included."""
    model = randomize(timm.create_model(f"{BASE}_dhc2", **TINY, **options)).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))
    assert repr(loaded) == repr(model)
    for c in connections(loaded).values():
        c.reset_parameters()
    for c in connections(model).values():
        c.reset_parameters()
    assert torch.equal(loaded(images()), model(images()))


def test_copies(tmp_path):
    """deepcopy, pickle here and in a process that has not imported hcvision, torch.save of a state dict."""
    models = [randomize(vit(connection)) for connection in FOUR]
    models.append(convert(timm.create_model(BASE, features_only=True, out_indices=(1, 2), **TINY), "dhc2").eval())
    record = []
    for model in models:
        with torch.no_grad():
            expected = torch.cat([out.flatten() for out in model(images())])
        record.append((model, images(), expected))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
            assert torch.equal(torch.cat([out.flatten() for out in other(images())]), expected)
            first = next(other.parameters())
            assert first.data_ptr() != next(model.parameters()).data_ptr()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        fresh = randomize(copy.deepcopy(model), seed=9)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(torch.cat([out.flatten() for out in fresh(images())]), expected)
    path = tmp_path / "models.pkl"
    path.write_bytes(pickle.dumps(record))
    code = (
        f"import pickle, torch\nfor model, x, expected in pickle.load(open({str(path)!r}, 'rb')):\n"
        "    got = torch.cat([out.flatten() for out in model(x)])\n"
        "    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)\n"
        "    assert isinstance(getattr(model, 'model', model), __import__('timm').models.VisionTransformer)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# initialisation and training


def initial(model, connection, arrangement=None):
    """True if every connection of the model has the values it would be built with."""
    options = {"arrangement": arrangement} if arrangement else {}
    for c in connections(model).values():
        fresh = hcvision.build_connection(connection, c.dim, c.layer_index, **options).state_dict()
        if any(not torch.equal(value, fresh[key]) for key, value in c.state_dict().items()):
            return False
    return bool(connections(model))


@pytest.mark.parametrize("mode", ["", "jax", "jax_nlhb", "moco", "reset"])
@pytest.mark.parametrize("connection", ["dhc4", "dfc2"])
def test_init_weights(connection, mode):
    """timm's initialisation does not destroy the connections' own, at construction or called later."""
    model = timm.create_model(f"{BASE}_{connection}", weight_init=mode if mode != "reset" else "skip", **TINY)
    assert initial(model, connection)
    randomize(model)
    assert not initial(model, connection)
    model.init_weights(mode, needs_reset=False)
    assert not initial(model, connection)
    model.init_weights(mode)
    assert initial(model, connection)


@pytest.mark.parametrize("connection", FOUR)
def test_meta_device(connection):
    """Built on the meta device, emptied onto the CPU and initialised: at init, and finite."""
    arrangement = "parallel" if "hc" in connection else None
    options = {"connection_arrangement": arrangement} if arrangement else {}
    model = create_model(BASE, connection, device="meta", **options, **TINY)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    assert initial(model, connection, arrangement)
    assert model(images()).isfinite().all()
    low = create_model(BASE, connection, dtype=torch.bfloat16, device="cpu", **TINY)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("connection", FOUR)
def test_weight_decay(connection):
    """Every parameter in one group; the dynamic projections decay, all else of a connection does not."""
    model, plain = vit(connection), vit()
    names = {name for name, _ in model.named_parameters()}
    fixed = {name for name in connection_keys(model) if not name.endswith("_fn")}
    assert model.no_weight_decay() - plain.no_weight_decay() == fixed
    assert model.no_weight_decay() & plain.no_weight_decay() == plain.no_weight_decay()
    assert fixed < names

    optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.3)
    group = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(group) == len(names)
    plain_decayed = {name for name, p in plain.named_parameters() if p.ndim > 1} - plain.no_weight_decay()
    decayed = {name for name, p in model.named_parameters() if group[id(p)] == 0.3}
    assert decayed == plain_decayed | {name for name in connection_keys(model) if name.endswith("_fn")}
    assert {group[id(p)] for p in model.parameters()} == {0.0, 0.3}


def test_layer_decay():
    """The connections of a block learn at the rate of their block, the last one fastest."""
    model = vit("dhc2")
    optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.3, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert len(scale) == len(list(model.parameters()))
    scales = [{scale[id(p)] for p in block.parameters()} for block in model.blocks]
    assert [len(s) for s in scales] == [1, 1, 1]
    first, second, third = (s.pop() for s in scales)
    assert second == 2 * first
    assert third == 2 * second


@pytest.mark.parametrize("connection", FOUR)
def test_grad_checkpointing(connection):
    """Recomputing the blocks gives the same gradients to the bit."""
    gradients = []
    for enable in (False, True):
        model = randomize(vit(connection)).train()
        model.set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# torch.func, forward-mode differentiation, batches of gradients


def small(connection, backend, dtype, recompute=0):
    """A ViT of two blocks whose attention has a forward-mode derivative, which the fused one lacks."""
    options = {} if backend == "auto" else {"connection_backend": backend}
    model = create_model(
        BASE, connection, img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3, dtype=dtype,
        connection_recompute=recompute, **options,
    )  # fmt: skip
    for block in model.blocks:
        block.attn.fused_attn = False
    return randomize(model).eval()


JACOBIANS = {
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "batched": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "jvp": lambda f, x: torch.func.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1], out_dims=-1)(
        torch.eye(x.numel()).view(-1, *x.shape)
    ).view(3, *x.shape),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("way", JACOBIANS)
@pytest.mark.parametrize(
    ("connection", "backend"),
    [
        (connection, "auto")
        for connection in (*FOUR, "mhc4", "ihc4", "ghc2x3", "sihc4", "gr4", "oru", "laurel", "mhclite3", "krom2")
    ]
    + [("dhc2", "torch"), ("dhc2", "native"), ("mhc4", "native")],
)
def test_jacobians(connection, backend, way, recompute):
    """They are those of one backward after the other, in double precision."""
    exact, x = small(connection, "torch", torch.float64), torch.randn(1, 3, 8, 8)
    expected = torch.autograd.functional.jacobian(lambda x: exact(x)[0], x.double())
    model = small(connection, backend, torch.float32, recompute)
    found = JACOBIANS[way](lambda x: model(x)[0], x)
    assert (found - expected).norm() < 1e-5 * expected.norm()


# hooks


def expected_calls(model, x):
    """The streams before and behind each sub-layer, by the steps of its connection."""
    x = model._pos_embed(model.patch_embed(x))
    calls = []
    for block in model.blocks:
        x = block.connection1.enter(x, block.entry_rate)
        for connection, branch in ((block.connection1, block.branch1), (block.connection2, block.branch2)):
            view, carried = connection.width_connection(x)
            after = connection.depth_connection(branch(view), carried)
            calls.append((x, after))
            x = after
        x = block.connection2.leave(x, block.exit_rate)
    return calls


@pytest.mark.parametrize(
    "connection", [*FOUR, "mhc4", "ihc4", "ghc2x3", "sihc4", "gr4", "oru", "laurel", "mhclite3", "krom2"]
)
def test_hooks(connection):
    """Hooks of a connection get the streams before and behind its sub-layer and their gradients; values stay."""
    model, x = randomize(vit(connection, torch.float64)), images(dtype=torch.float64)
    expected, output = expected_calls(model, x), model(x)
    parts, calls, gradients = list(connections(model).values()), [], []
    hooks = [part.register_forward_pre_hook(lambda part, args: calls.append([args[0]])) for part in parts]
    hooks += [part.register_forward_hook(lambda part, args, out: calls[-1].append(out)) for part in parts]
    hooks += [
        part.register_full_backward_hook(lambda part, into, out: gradients.append((into[0], out[0]))) for part in parts
    ]
    hooked = model(x)
    close(hooked, output)
    for pair, wanted in zip(calls, expected, strict=True):
        for one, other in zip(pair, wanted, strict=True):
            close(one, other)
    streams = [before for before, _ in calls] + [calls[-1][1]]
    wanted = torch.autograd.grad(hooked.sum(), streams, retain_graph=True)
    gradients.clear()
    hooked.sum().backward()
    for (into, out), before, after in zip(reversed(gradients), wanted[:-1], wanted[1:], strict=True):
        close(into, before)
        close(out, after)
    for hook in hooks:
        hook.remove()
    calls.clear()
    assert torch.equal(model(x), output)
    assert not calls


def test_other_hooks():
    """A hook may replace the streams; hooks of every module see connections; what prunes a module prunes them."""
    model, x = randomize(vit("dhc2", torch.float64)), images(dtype=torch.float64)
    output, last = model(x), model.blocks[-1].connection2
    hook = last.register_forward_hook(lambda part, args, out: 0 * out)
    close(model(x), model.head(model.norm(torch.zeros(2, 1, 48, dtype=torch.float64)))[:, 0])
    hook.remove()
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    close(model(x), output)
    hook.remove()
    assert all(part in seen for part in connections(model).values())
    torch.nn.utils.prune.random_unstructured(last, "static_alpha", 0.5)
    last.static_alpha_orig.data.mul_(2)
    pruned = model(x)
    assert torch.equal(last.static_alpha, last.static_alpha_orig * last.static_alpha_mask)
    torch.nn.utils.prune.remove(last, "static_alpha")
    close(model(x), pruned)


# recomputation


def deep(connection, recompute, blocks=None, depth=7):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=depth, num_heads=3)
    return randomize(hcvision.convert(model, connection, blocks=blocks, recompute=recompute)).train()


def outcome(model, x, again=False):
    """The output, and the gradients of the input and of every parameter."""
    torch.manual_seed(3)  # dropout
    x = x.detach().requires_grad_()
    out = model(x)
    out.square().sum().backward(retain_graph=again)
    if again:
        out.square().sum().backward()
    return out, x.grad, *(parameter.grad for parameter in model.parameters())


@pytest.mark.parametrize("recompute", [1, 2, 3, 9])
@pytest.mark.parametrize("connection", [*FOUR, "dhc1"])
def test_recompute(connection, recompute):
    """The same values and gradients to the bit; no branch runs twice."""
    x = torch.randn(2, 3, 32, 32)
    kept, model = deep(connection, 0), deep(connection, recompute)
    for drop in [m for net in (kept, model) for m in net.modules() if isinstance(m, torch.nn.Dropout)]:
        drop.p = 0.1
    runs = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: runs.append(1))
    for again in (False, True):
        for one, other in zip(outcome(model, x, again), outcome(kept, x, again), strict=True):
            assert torch.equal(one, other)
    assert len(runs) == 2 * 7


@pytest.mark.parametrize("blocks", ["2:6", "::2"])
def test_recompute_of_some_blocks(blocks):
    x = torch.randn(2, 3, 32, 32)
    for one, other in zip(outcome(deep("dhc2", 2, blocks), x), outcome(deep("dhc2", 0, blocks), x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("connection", "streams", "weights"), [("dhc4", 4, 24), ("shc2", 2, 8), ("dfc2", 1, 10)])
def test_recompute_memory(connection, streams, weights):
    """Every third block of nine keeps its streams: what its other sub-layer and those in between had is not there."""

    def held(recompute):
        model = deep(connection, recompute, depth=9)
        with TensorMemory() as memory:
            out = model(torch.randn(2, 3, 32, 32))
            gc.collect()
            return memory.now, out

    size = 2 * 17 * 48 * 4 * streams  # bytes of the streams
    saved = held(0)[0] - held(3)[0]
    little = 18 * 2 * 17 * 4 * weights  # coefficients that recipes hold, at most
    assert 15 * size - little <= saved <= 15 * size


def test_recompute_lets_go():
    """Backward frees what recipes hold, while the output is still there."""
    out = deep("dhc2", 3)(torch.randn(2, 3, 32, 32))
    before = sum(type(thing) is Recipe for thing in gc.get_objects())
    out.sum().backward()
    assert before > sum(type(thing) is Recipe for thing in gc.get_objects()) == 0


def test_recompute_under_func():
    """torch.func sees a model that keeps its streams."""
    model, kept = deep("dhc2", 3, depth=2), deep("dhc2", 0, depth=2)
    x = torch.randn(2, 3, 32, 32)
    one, other = (torch.func.grad(lambda x, net=net: net(x).square().sum())(x) for net in (model, kept))
    assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile itself
@pytest.mark.parametrize("connection", ["dhc2", pytest.param("shc2", marks=pytest.mark.slow)])
def test_recompute_compiled(connection):
    """A compiled model keeps the streams of every other block alone too, and gives the same values and gradients."""
    x, kept = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    for recompute in (0, 2):
        model = deep(connection, recompute, depth=2).double()
        expected = outcome(model, x)
        model.zero_grad()
        model.compile(fullgraph=True, backend="aot_eager_decomp_partition")
        for one, other in zip(outcome(model, x), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        out = model(x)
        storages = {t.data_ptr(): t for t in (tensor.untyped_storage() for tensor in out.grad_fn.saved_tensors)}
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    streams = 2 * 17 * 2 * 48 * 8  # bytes
    assert 3 * streams <= kept[0] - kept[1] < 4 * streams  # of four: those before block 0 stay


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile itself
def test_recompute_and_one_compiled_block():
    """A block that is compiled by itself, in one graph, takes streams as they come."""
    model, x = deep("dhc2", 9, depth=4), torch.randn(2, 3, 32, 32)
    expected = outcome(deep("dhc2", 0, depth=4), x)
    model.blocks[2].compile(fullgraph=True, backend="aot_eager")
    for one, other in zip(outcome(model, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_recompute_and_saved_streams():
    """Streams that are written to a file are written alone."""
    files = []
    for recompute in (0, 9):
        taps = with_block_outputs(model := deep("dhc2", recompute))
        model(torch.randn(2, 3, 32, 32))
        torch.save(taps[-1], file := io.BytesIO())
        file.seek(0)
        assert torch.load(file, weights_only=True).shape == taps[-1].shape
        files.append(len(file.getvalue()))
    assert files[0] == files[1]


def test_recompute_and_checkpoint():
    """Beside gradient checkpointing it changes nothing."""
    x = torch.randn(2, 3, 32, 32)
    both = deep("dhc2", 3)
    both.set_grad_checkpointing()
    for one, other in zip(outcome(both, x), outcome(deep("dhc2", 0), x), strict=True):
        assert torch.equal(one, other)


def test_changed_streams_are_kept():
    """Streams that somebody changes in place, or replaces, are kept as they are."""
    x = torch.randn(2, 3, 32, 32)
    results = []
    for recompute in (0, 9):
        model = deep("dhc2", recompute)
        model.blocks[2].register_forward_hook(lambda module, args, out: out.mul_(1.5))
        model.blocks[4].register_forward_hook(lambda module, args, out: out.flip(0))
        results.append(outcome(model, x))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_recompute_errors():
    with pytest.raises(ValueError, match="recompute must be an integer of at least 0, got -1"):
        deep("dhc2", -1)
    with pytest.raises(ValueError, match="recompute=2 needs a model with connections that carry streams, not this V"):
        hcvision.recompute_streams(timm.create_model("vit_tiny_patch16_224", depth=1), 2)
    model = hcvision.recompute_streams(deep("dhc2", 3), 0)
    assert not any(part.records or part.recompute for part in model.modules() if isinstance(part, StreamConnection))


# features


def with_block_outputs(model):
    """The model, and a list that its next forward fills with what the blocks return."""
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    return outputs


def left(model, outputs, norm=False):
    """What the taps have to show of the blocks' outputs: the mean over HC streams, then perhaps the norm."""
    means = [sum(out.split(48, dim=-1)) / (out.shape[-1] // 48) for out in outputs]
    if norm and isinstance(model.norm, torch.nn.LayerNorm):
        means = [F.layer_norm(x, (48,), model.norm.weight, model.norm.bias, model.norm.eps) for x in means]
    return means


def close(a, b):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2, "global_pool": "avg"}], ids=["norm", "fc_norm"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("connection", ["dhc3", "shc1", "dfc2"])
def test_forward_intermediates(connection, norm, kwargs):
    """Every tap is the mean over the streams of what the block returned, in every format timm has."""
    model, x = randomize(vit(connection, torch.float64, **kwargs)), images(dtype=torch.float64)
    outputs = with_block_outputs(model)
    final, taps = model.forward_intermediates(x, norm=norm)
    expected, prefix = left(model, outputs, norm), model.num_prefix_tokens
    assert len(taps) == 3
    close(final, left(model, outputs, norm=True)[-1])
    for tap, tokens in zip(taps, expected, strict=True):
        close(tap, tokens[:, prefix:].mT.unflatten(-1, (4, 4)))

    pairs = model.forward_intermediates(
        x, [0, 2], return_prefix_tokens=True, norm=norm, output_fmt="NLC", intermediates_only=True
    )
    for (tap, first), tokens in zip(pairs, [expected[0], expected[2]], strict=True):
        close(tap, tokens[:, prefix:])
        close(first, tokens[:, :prefix])

    found = model.forward_intermediates(
        x, 2, return_prefix_tokens=True, norm=norm, output_fmt="NLC", output_dict=True, stop_early=True
    )
    close(found["image_features"], final)
    for i in (1, 2):
        close(found["image_intermediates"][i - 1], expected[i][:, prefix:])
        close(found["image_intermediates_prefix"][i - 1], expected[i][:, :prefix])

    (last,) = model.get_intermediate_layers(x, 1, reshape=True, norm=norm)
    close(last, expected[-1][:, prefix:].mT.unflatten(-1, (4, 4)))


@pytest.mark.parametrize("make", ["twin", "convert"])
@pytest.mark.parametrize("connection", ["dhc2", "sfc2"])
def test_features_only(connection, make):
    """timm's features_only wrapper, built under our name or converted."""
    if make == "twin":
        net = timm.create_model(f"{BASE}_{connection}", features_only=True, out_indices=(0, 2), **TINY)
    else:
        net = timm.create_model(BASE, features_only=True, out_indices=(0, 2), **TINY)
        assert convert(net, connection) is net
    assert isinstance(net, FeatureGetterNet)
    randomize(net.double())
    outputs = with_block_outputs(net.model)
    taps = net(images(dtype=torch.float64))
    assert net.feature_info.channels() == [48, 48]
    for tap, i in zip(taps, (0, 2), strict=True):
        close(tap, left(net.model, outputs)[i][:, 1:].mT.unflatten(-1, (4, 4)))


def test_features_only_traced():
    """Symbolically traced it gives the same taps: a Proxy in place of a tensor has streams to leave too."""
    net = convert(timm.create_model(BASE, features_only=True, out_indices=(0, 2), **TINY), "dhc2")
    randomize(net.double())
    traced, x = torch.fx.symbolic_trace(net), images(dtype=torch.float64)
    for ours, theirs in zip(net(x), traced(x), strict=True):
        close(theirs, ours)


@pytest.mark.parametrize("prune_norm", [False, True])
@pytest.mark.parametrize("connection", ["dhc3", "dfc2"])
def test_prune(connection, prune_norm):
    """Blocks, norm and head cut away, the features have still left the streams."""
    model, x = randomize(vit(connection, torch.float64)), images(dtype=torch.float64)
    outputs = with_block_outputs(model)
    model(x)
    expected = left(model, outputs, norm=not prune_norm)[1]
    assert model.prune_intermediate_layers([1], prune_norm=prune_norm) == [1]
    assert len(model.blocks) == 2
    close(model.forward_features(x), expected)
    close(copy.deepcopy(model).forward_features(x), expected)
    (tap,) = model.forward_intermediates(x, [1], norm=True, output_fmt="NLC", intermediates_only=True)
    close(tap, expected[:, 1:])


@pytest.mark.parametrize("connection", FOUR)
def test_reshaped(connection):
    """A new head, no head, another image size: as timm's model under the same calls."""
    models, size = (vit(), vit(connection)), (48, 24)
    for model in models:
        model.set_input_size(size)
        model.reset_classifier(5)
        with torch.no_grad():
            model.head.weight.fill_(0.1)
            model.head.bias.fill_(0.2)
    plain, ours = models
    assert torch.equal(ours(images(size=size)), plain(images(size=size)))
    for model in models:
        model.reset_classifier(0, "")
    assert ours(images(size=size)).shape == (2, 19, 48)
    assert torch.equal(ours(images(size=size)), plain(images(size=size)))


# compilers


@pytest.mark.parametrize(
    ("connection", "backend"),
    [pytest.param("dhc2", "inductor", marks=pytest.mark.slow), ("dhc2", "aot_eager"), ("dfc2", "aot_eager")],
)
def test_compile(connection, backend):
    """The whole model in one graph, forward and backward."""
    model = randomize(vit(connection, torch.float64, depth=2)).train()
    x, parameters = images(dtype=torch.float64), list(model.parameters())
    ours, theirs = torch.compile(model, fullgraph=True, backend=backend)(x), model(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), parameters),
        torch.autograd.grad(theirs.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("connection", ["dhc2", "dfc2"])
def test_export(connection):
    """torch.export, torch.fx and TorchScript of the whole model."""
    model, x = randomize(vit(connection, torch.float64)), images(dtype=torch.float64)
    expected = model(x)
    close(torch.export.export(model, (x,)).module()(x), expected)
    close(torch.fx.symbolic_trace(model)(x), expected)
    close(torch.jit.script(model)(x), expected)


# converting


@pytest.mark.parametrize("mode", [True, False])
def test_convert_in_place(mode):
    """The same object, class, modules and mode; new parameters where the old ones are; nothing for residual."""
    plain = vit(dtype=torch.float64).train(mode)
    before, modules = dict(plain.named_parameters()), dict(plain.named_modules())
    assert convert(plain, "residual") is plain
    assert type(plain) is VisionTransformer
    assert dict(plain.named_parameters()).keys() == before.keys()

    model = convert(plain, "dhc2")
    assert model is plain
    assert isinstance(model, VisionTransformer)
    assert model.connection == "dhc2"
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {module.training for module in model.modules()} == {mode}


def last_block_unsupported():
    model = vit()
    model.blocks[-1] = DiffParallelScalingBlock(48, 3)
    return model


def used(connection):
    """Its connections have left their initial values."""
    return randomize(vit(connection))


@pytest.mark.parametrize(
    ("build", "connection", "message"),
    [
        (vit, "dhc", "connection must be 'residual', "),
        (vit, "nope2", "got 'nope2'"),
        (vit, "dfc5", "got dim=48 and rate=5"),
        (lambda: vit("dhc2"), "dhc2", r"block 0 of this VisionTransformer has a connection already \(dhc2\)"),
        (lambda: vit("sfc2"), "dhc4", r"block 0 of this VisionTransformer has a connection already \(sfc2\)"),
        (lambda: used("sfc2"), "residual", "connection1 of a Block is no residual add any more"),
        (
            lambda: convert(vit(), "shc2", arrangement="parallel"),
            "residual",
            "connection1 of a Block is no residual add any more",
        ),
        (
            lambda: timm.create_model("resnet18", num_classes=2),
            "dhc2",
            "cannot convert a ResNet with blocks of class BasicBlock; the families that work: beit, .*vision_",
        ),
        (last_block_unsupported, "dhc2", "cannot convert blocks of class DiffParallelScalingBlock; .* Block"),
        (lambda: torch.nn.Linear(2, 2), "dhc2", "cannot convert a Linear"),
    ],
)
def test_convert_errors(build, connection, message):
    """The message names the class or the sizes, and the model is left as it was."""
    model = build()
    types, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        convert(model, connection)
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == keys


def test_convert_option_errors():
    """An option the connection lacks leaves the model as it was, too."""
    model = vit()
    for options in ({"heads": 2}, {"arrangement": "parallel"}):
        with pytest.raises(TypeError):
            convert(model, "dfc2", **options)
    with pytest.raises(ValueError, match="arrangement must be one of"):
        convert(model, "dhc2", arrangement="both")
    assert type(model) is VisionTransformer
    assert not connections(model)


def test_convert_twice_features_only():
    net = convert(timm.create_model(BASE, features_only=True, **TINY), "dhc2")
    with pytest.raises(ValueError, match="has a connection already"):
        convert(net, "dhc2")


@pytest.mark.parametrize("connection", ["dhc2", "dfc2"])
@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        (slice(1, None), {1, 2}),
        ("1:", {1, 2}),
        (":-1", {0, 1}),
        ("::2", {0, 2}),
        ([0, -1], {0, 2}),
        ([1], {1}),
        pytest.param(lambda i, block: i != 1 and isinstance(block, torch.nn.Module), {0, 2}, id="function"),
    ],
    ids=str,
)
def test_partial(connection, blocks, chosen):
    """Connections in the chosen blocks only, entry and exit around each run; layer_index as in the whole model."""
    plain = vit(dtype=torch.float64)
    ours, x = convert(copy.deepcopy(plain), connection, blocks=blocks), images(dtype=torch.float64)
    assert torch.equal(ours(x), plain(x))
    assert {i for i, block in enumerate(ours.blocks) if hasattr(block, "connection1")} == chosen
    for i in chosen:
        assert [ours.blocks[i].connection1.layer_index, ours.blocks[i].connection2.layer_index] == [2 * i, 2 * i + 1]
    for c in connections(ours).values():
        randomize(c, std=0.5)
    outputs = with_block_outputs(ours)
    final, taps = ours.forward_intermediates(x, norm=True)
    widths = [48 * 2 if connection == "dhc2" and {i, i + 1} <= chosen | {3} and i in chosen else 48 for i in range(3)]
    assert [out.shape[-1] for out in outputs] == widths
    for tap, tokens in zip(taps, left(ours, outputs, norm=True), strict=True):
        close(tap, tokens[:, 1:].mT.unflatten(-1, (4, 4)))
    close(final, left(ours, outputs, norm=True)[-1])
    ours.prune_intermediate_layers([1])
    close(ours.forward_features(x), left(ours, outputs, norm=True)[1])


def test_two_connections(tmp_path):
    """Two calls for two groups of blocks, other rates and options; the folder of the hub knows them both."""
    plain = vit(dtype=torch.float64)
    ours, x = copy.deepcopy(plain), images(dtype=torch.float64)
    convert(ours, "dhc2", blocks=":1")
    convert(ours, "dhc4", blocks=[1], tanh=False)
    convert(ours, "sfc3", blocks=lambda i, _: i == 2)
    assert ours.connection == "dhc2+dhc4+sfc3"
    assert torch.equal(ours(x), plain(x))
    randomize(ours)
    timm.models.save_for_hf(ours, tmp_path, safe_serialization=True)
    for loaded in (timm.create_model, create_model):
        again = loaded(f"local-dir:{tmp_path}", pretrained=True).double().eval()
        assert again.connection == ours.connection
        torch.testing.assert_close(again(x), ours(x), rtol=1e-12, atol=1e-12)
        assert [(c.rate, c.tanh) for c in connections(again).values()] == [(2, True)] * 2 + [(4, False)] * 2 + [
            (3, True)
        ] * 2


@pytest.mark.parametrize("connection", ["shc1", "dhc1", "sfc1", "dfc1", "dhc3", "sfc16"])
def test_connection_name(connection):
    """The model knows what it has, rate 1 included, and so does what timm saves of it."""
    model = vit(connection)
    assert model.connection == connection
    assert model.pretrained_cfg["architecture"] == f"{BASE}_{connection}"


@pytest.mark.parametrize("connection", ["dhc2", "sfc2"])
def test_undo(connection):
    """Connections that are residual adds still go away without a trace; some of them, too; others are refused."""
    plain = vit()
    ours = convert(copy.deepcopy(plain), connection)
    args = dict(ours._model_args)
    assert ours.pretrained_cfg["architecture"] == f"{BASE}_{connection}"
    convert(ours, "residual", blocks=[1])
    assert torch.equal(ours(images()), plain(images()))
    assert set(connections(ours)) == {f"blocks.{i}.connection{k}" for i in (0, 2) for k in (1, 2)}
    assert ours._model_args["connection_blocks"] == [0, 2]
    assert convert(ours, "residual") is ours
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert [sorted(vars(m)) for m in ours.modules()] == [sorted(vars(m)) for m in plain.modules()]
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert ours.pretrained_cfg == plain.pretrained_cfg
    assert ours._model_args == plain._model_args == args
    assert torch.equal(ours(images()), plain(images()))

    trained = convert(ours, connection)
    names = [name for name, _ in next(iter(connections(trained).values())).named_parameters()]
    for name in names:
        last = trained.blocks[2].connection2
        with torch.no_grad():
            last.get_parameter(name).view(-1)[-1] += 1e-3
        with pytest.raises(ValueError, match="connection2 of a Block is no residual add any more"):
            convert(trained, "residual")
        assert len(connections(trained)) == 6
        last.reset_parameters()
    convert(trained, "residual")
    assert not connections(trained)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("6", "blocks must look like '6:', ':6' or '::2', got '6'"),
        ("a:b", "blocks must look like"),
        ([3], "blocks must be indices below 3, the number of blocks, got 3"),
        (["1"], "blocks must be indices below 3, the number of blocks, got '1'"),
        ("5:", "blocks=.* chooses none of the 3 blocks"),
        ([], "chooses none of the 3 blocks"),
    ],
)
def test_partial_errors(blocks, message):
    model = vit()
    with pytest.raises(ValueError, match=message):
        convert(model, "dhc2", blocks=blocks)
    assert not connections(model)


def test_freeze():
    """timm's freeze takes the connections of a block with it, and only those."""
    model = vit("dhc2")
    timm.utils.freeze(model, ["blocks.0", "patch_embed"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(("blocks.0.", "patch_embed.")), name


def test_large():
    """A ViT-L takes connections sooner than it is built, and the weights stay where they are."""
    times = [time.process_time()]
    model = timm.create_model("vit_large_patch16_224", num_classes=0)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    times.append(time.process_time())
    convert(model, "dhc4")
    times.append(time.process_time())
    assert times[2] - times[1] < times[1] - times[0]
    after = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert before.items() < after.items()
    assert len(connections(model)) == 48


# create_model


@pytest.mark.parametrize("connection", [None, "residual"])
def test_create_residual(connection):
    """No connection is the timm model itself, class and all."""
    model = create_model(BASE, connection, **TINY)
    assert type(model) is VisionTransformer
    assert model.state_dict().keys() == vit().state_dict().keys()


def test_create_any_rate():
    """A rate outside the table gets its name with timm, once, and the options reach every connection."""
    model = create_model(
        BASE, "dhc3", connection_tanh=False, connection_norm=False, connection_arrangement="parallel", **TINY
    )
    assert timm.is_model(f"{BASE}_dhc3")
    assert model.pretrained_cfg["architecture"] == f"{BASE}_dhc3"
    assert len(connections(model)) == 6
    for c in connections(model).values():
        assert (c.rate, c.tanh, c.norm, c.arrangement) == (3, False, False, "parallel")
    assert initial(model, "dhc3", "parallel")
    entrypoint = timm.model_entrypoint(f"{BASE}_dhc3")
    again = create_model(f"{BASE}.augreg_in21k", "dhc3", **TINY)
    assert timm.model_entrypoint(f"{BASE}_dhc3") is entrypoint
    assert next(iter(connections(again).values())).tanh


@pytest.mark.parametrize(
    ("name", "connection", "kwargs", "error"),
    [
        (BASE, "dhc", {}, ValueError),
        (BASE, "dfc7", TINY, ValueError),
        ("resnet18", "dhc2", {}, ValueError),
        (BASE, "dhc2", {"foo": 1}, TypeError),
        (BASE, "dhc2", {"connection_foo": 1}, TypeError),
        (BASE, "dfc2", {"connection_arrangement": "parallel"}, TypeError),
        ("no_such_vit", "dhc2", {}, RuntimeError),
        ("no_such_vit", None, {}, RuntimeError),
    ],
)
def test_create_errors(name, connection, kwargs, error):
    with pytest.raises(error):
        create_model(name, connection, **kwargs)
