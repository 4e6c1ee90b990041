"""models/families.py: each family of timm, converted, is itself at init, and the papers' update of its branches."""

import copy
import functools
import inspect
import pickle

import pytest
import timm
import torch
from conftest import randomize
from timm.models import davit, focalnet, hiera, metaformer, mlp_mixer, nest, sequencer
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

from hcvision.connections.base import Connection
from hcvision.connections.names import parse_connection
from hcvision.models.blocks import ConnectedBlock
from hcvision.models.conversion import convert
from hcvision.models.families import BLOCKS, MODELS
from hcvision.models.names import create_model
from hcvision.models.stages import find_columns, find_family

COLUMN = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
STAGES = {"depths": (1, 2, 2, 1), "dims": (16, 32, 48, 64), "num_classes": 10}
WINDOWS = {
    "img_size": 64,
    "embed_dim": 24,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 2, 4),
    "window_size": 4,
    "num_classes": 10,
}
MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_blocks": 3, "num_classes": 10}
SAM = COLUMN | {"img_size": 64, "patch_size": 16, "window_size": 3, "global_attn_indexes": (1,)}
METAFORMER = {"depths": (1, 2, 2, 1), "dims": (16, 32, 64, 64), "num_classes": 10, "layer_scale_init_values": 0.1}

# A timm name, or a class where the name fixes its sizes, and what makes it small.
FAMILIES = {
    "vision_transformer": ("vit_tiny_patch16_224", COLUMN | {"init_values": 0.1}),
    "vision_transformer res-post": (
        "vit_tiny_patch16_224",
        COLUMN | {"block_fn": timm.models.vision_transformer.ResPostBlock},
    ),
    "vision_transformer parallel": ("vit_small_patch16_18x2_224", COLUMN),
    "vision_transformer xp": ("vit_base_patch16_xp_224", COLUMN | {"init_values": 0.1}),
    "vision_transformer xp fused": (
        "vit_tiny_patch16_224",
        COLUMN
        | {"block_fn": functools.partial(timm.models.vision_transformer.ParallelScalingBlock, fuse_out_proj=True)},
    ),
    "deit3": ("deit3_small_patch16_224", COLUMN),
    "deit distilled": ("deit_tiny_distilled_patch16_224", COLUMN),
    "hybrid": (
        "vit_tiny_r_s16_p8_224",
        {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10},
    ),
    "naflexvit": ("naflexvit_base_patch16_gap", {k: v for k, v in COLUMN.items() if k != "img_size"}),
    "eva": ("eva_giant_patch14_224", COLUMN | {"init_values": 0.1}),
    "eva post-norm": ("eva_giant_patch14_clip_224", COLUMN | {"use_post_norm": True}),
    "eva02": ("eva02_tiny_patch14_224", COLUMN),
    "dinov3": ("vit_small_patch16_dinov3", COLUMN),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", COLUMN),
    "beit": ("beit_base_patch16_224", COLUMN | {"init_values": 0.1}),
    "beit no scale": ("beit_base_patch16_224", COLUMN | {"init_values": None, "use_shared_rel_pos_bias": True}),
    "relpos": ("vit_relpos_small_patch16_224", COLUMN),
    "relpos shared": ("vit_srelpos_small_patch16_224", COLUMN),
    "relpos res-post": ("vit_relpos_base_patch32_plus_rpn_256", COLUMN),
    "deepseek_vit": ("deepseek_vit_412m", COLUMN),
    "deepseek_vit encoder": (
        "deepseek_vit_412m_enc",
        {k: v for k, v in COLUMN.items() if k != "num_classes"} | {"out_features": 8},
    ),
    "qwen3_vit": ("qwen3_vit_88m", COLUMN),
    "qwen3_vit encoder": ("qwen3_vit_88m_enc", {k: v for k, v in COLUMN.items() if k != "num_classes"}),
    "deepseek_vit align": ("deepseek_vit_412m_align", COLUMN | {"out_features": 96}),
    "qwen3_vit merge": ("qwen3_vit_88m_merge", COLUMN | {"out_features": 96}),
    "convit": ("convit_tiny", COLUMN | {"local_up_to_layer": 2}),
    "cait": ("cait_xxs24_224", COLUMN | {"init_values": 0.1}),
    "xcit": ("xcit_nano_12_p8_224", COLUMN | {"eta": 0.1}),
    "mixer": (mlp_mixer.MlpMixer, MIXER),
    "resmlp": (
        mlp_mixer.MlpMixer,
        MIXER
        | {
            "block_layer": functools.partial(mlp_mixer.ResBlock, init_values=0.1),
            "mlp_ratio": 4,
            "norm_layer": mlp_mixer.Affine,
        },
    ),
    "gmlp": (
        mlp_mixer.MlpMixer,
        MIXER | {"block_layer": mlp_mixer.SpatialGatingBlock, "mlp_ratio": 6, "mlp_layer": timm.layers.GatedMlp},
    ),
    "sam": ("samvit_base_patch16_224", SAM),
    "sam neck": ("samvit_base_patch16", SAM | {"neck_chans": 96}),
    "pit": ("pit_ti_224", {"img_size": 64, "num_classes": 10}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", WINDOWS),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", WINDOWS),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", WINDOWS),
    "pvt_v2": ("pvt_v2_b0", {"embed_dims": (16, 32, 40, 48), "depths": (1, 2, 1, 1), "num_classes": 10}),
    "hiera": (
        hiera.Hiera,
        {
            "img_size": (64, 64),
            "embed_dim": 24,
            "num_heads": 1,
            "stages": (1, 2, 3, 1),
            "num_classes": 10,
            "init_values": 0.1,
        },
    ),
    "davit": (
        davit.DaVit,
        {
            "embed_dims": (24, 48, 48, 96),
            "depths": (1, 1, 2, 1),
            "num_heads": (1, 2, 2, 4),
            "num_classes": 10,
            "cpe_act": True,
        },
    ),
    "metaformer": (
        metaformer.MetaFormer,
        METAFORMER
        | {
            "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
            "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
            "res_scale_init_values": (None, 0.8, 0.9, 1.1),
        },
    ),
    "poolformer": (
        metaformer.MetaFormer,
        METAFORMER | {"token_mixers": metaformer.Pooling, "res_scale_init_values": None},
    ),
    "convnext": ("convnext_tiny", STAGES),
    "convnext conv_mlp": ("convnext_atto", STAGES),
    "convnextv2": ("convnextv2_atto", STAGES),
    "inception_next": ("inception_next_atto", STAGES),
    "focalnet": (
        focalnet.FocalNet,
        {"depths": (1, 2, 2, 1), "embed_dim": 16, "num_classes": 10, "layerscale_value": 0.1},
    ),
    "focalnet post-norm": (
        focalnet.FocalNet,
        {"depths": (1, 2, 2, 1), "embed_dim": 16, "num_classes": 10, "use_post_norm": True},
    ),
    "sequencer": (
        sequencer.Sequencer2d,
        {
            "layers": (1, 2),
            "patch_sizes": (7, 2),
            "embed_dims": (24, 48),
            "hidden_sizes": (6, 12),
            "mlp_ratios": (3, 3),
            "num_rnn_layers": 1,
            "img_size": 56,
            "num_classes": 10,
        },
    ),
    "nest": (
        nest.Nest,
        {
            "img_size": 64,
            "embed_dims": (24, 48, 48),
            "num_heads": (1, 2, 2),
            "depths": (1, 1, 2),
            "num_classes": 10,
            "drop_path_rate": 0.0,
        },
    ),
}
VARIANTS = {  # of blocks and models that stand above already
    *("deit3", "deit distilled", "hybrid", "relpos shared", "beit no scale", "vision_transformer xp fused", "pit"),
    *(
        "deepseek_vit encoder",
        "qwen3_vit encoder",
        "convnext conv_mlp",
        "convnextv2",
        "poolformer",
        "focalnet post-norm",
    ),
}
FOUR = ("dhc2", "shc3", "dfc2", "sfc4")


def build(family, dtype=torch.float64, **kwargs):
    """The timm model, every parameter of it random, its norms in the dtype of the model."""
    base, small = FAMILIES[family]
    torch.manual_seed(0)
    kwargs = small | kwargs
    model = timm.create_model(base, **kwargs) if isinstance(base, str) else base(**kwargs)
    for module in model.modules():
        if type(module) is timm.layers.RmsNormFp32:
            module.__class__ = torch.nn.RMSNorm
    return randomize(model).to(dtype).eval()


def images(family, dtype=torch.float64, batch=2):
    size = FAMILIES[family][1].get("img_size", 64)
    size = size[0] if isinstance(size, tuple) else size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)


def blocks(model):
    return [block for column in find_columns(model, find_family(model)) for block in column]


def connections(model):
    return [module for module in model.modules() if isinstance(module, Connection)]


def flat(output):
    """Every tensor of an output, as one."""
    return torch.cat(
        [leaf.flatten() for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    )


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def rounding(model, x):
    """How far two orders of its sums may take a model in float64 from each other: by what float32 makes of it.

    Random connections enlarge rounding errors, those of the deep davit ten thousand times.
    """
    low = copy.deepcopy(model).float()
    return distance(flat(low(x.float())).double(), flat(model(x))) * torch.finfo(x.dtype).eps / torch.finfo().eps


def test_every_row_is_tested():
    """Each block class and each model class of the tables stands for a family above."""
    models = [build(family) for family in FAMILIES]
    assert {type(model) for model in models} == {cls for cls in MODELS if cls.__module__.startswith("timm.")}
    found = {type(block) for model in models for block in blocks(model)}
    assert found == {cls for cls in BLOCKS if cls.__module__.startswith("timm.")}


# at init


@pytest.mark.parametrize("family", FAMILIES)
def test_same_at_init(family):
    """FC to the bit in both precisions; HC to a rounding; timm's keys stay, and each add has a connection."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        plain, x = build(family, dtype), images(family, dtype)
        expected = plain(x)
        for connection in FOUR:
            kind, rate = parse_connection(connection)
            ours = convert(copy.deepcopy(plain), connection)
            assert isinstance(ours, type(plain))
            if kind.endswith("fc"):
                assert torch.equal(ours(x), expected), connection
                assert all(c.views == rate for c in connections(ours))
            else:
                assert distance(ours(x), expected) < tolerance, connection
            keys = set(ours.state_dict()) - set(plain.state_dict())
            assert set(plain.state_dict()) < set(ours.state_dict())
            assert all(".connection" in key for key in keys)
            adds = sum(block.adds for block in blocks(ours) if isinstance(block, ConnectedBlock))
            assert len(connections(ours)) == adds > 0
            indices = [c.layer_index for c in connections(ours)]
            assert indices == sorted(set(indices))


@pytest.mark.parametrize("connection", ["dhc2", "dfc2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_gradients(family, connection):
    """timm's gradients of a training step at init, and with random connections a gradient for every parameter."""
    plain, x = build(family), images(family)
    ours = convert(copy.deepcopy(plain), connection)
    for model in (plain, ours):
        torch.manual_seed(3)
        flat(model.train()(x)).square().sum().backward()
    own = dict(ours.named_parameters())
    scale = max(p.grad.abs().max().item() for p in plain.parameters() if p.grad is not None)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-9, atol=1e-10 * scale)
    for c in connections(ours):
        randomize(c, std=0.5)
    ours.zero_grad()
    flat(ours(x)).square().sum().backward()
    last = {id(c) for c in connections(ours)[-1:]}
    for c in connections(ours):
        for name, parameter in c.named_parameters():
            if id(c) not in last:  # a class token alone may leave the last one nothing to carry
                assert parameter.grad.abs().max() > 0, name
    assert all(own[name].grad is not None for name, parameter in plain.named_parameters() if parameter.grad is not None)


# with random connections


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
@pytest.mark.parametrize("connection", ["dhc3", "dfc2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_update(family, connection, dropped):
    """A block is the papers' two steps around its branches, and with stochastic depth at 1 the streams it carries."""
    ours = convert(build(family, **({"drop_path_rate": 0.5} if dropped else {})), connection)
    for c in connections(ours):
        randomize(c, std=0.5)
    if dropped:
        for module in ours.modules():
            if isinstance(module, timm.layers.DropPath):
                module.train().drop_prob = 1.0
    calls = []
    for block in blocks(ours):
        if isinstance(block, ConnectedBlock):
            block.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    ours(images(family))
    assert len(calls) == sum(isinstance(block, ConnectedBlock) for block in blocks(ours))
    for block, args, kwargs, output in calls:
        seen = []
        hooks = [part.register_forward_hook(lambda part, *_: seen.append(part)) for part in connections(block)]  # noqa: B023
        torch.testing.assert_close(block.forward(*args, **kwargs), output, rtol=1e-10, atol=1e-11)
        assert seen == [getattr(block, f"connection{k}") for k in range(1, block.adds + 1)]
        for hook in hooks:
            hook.remove()
        call = inspect.signature(block.forward).bind(*args, **kwargs)
        x = call.arguments.pop("x")
        x = x.movedim(1, -1) if block.channels_first else x
        dim, n = block.connection1.dim, block.connection1.streams
        H = (
            x.unflatten(-1, (-1, dim)).expand(*x.shape[:-1], n, dim)
            if connection == "dhc3"
            else x.unflatten(-1, (n, -1))
        )
        for k in range(1, block.adds + 1):
            c, branch = getattr(block, f"connection{k}"), getattr(block, f"branch{k}")
            alpha, beta = c.weights(H.flatten(-2))
            mix = alpha.mT @ H
            extra = {
                name: call.arguments[name] for name in inspect.signature(branch).parameters if name in call.arguments
            }
            y = branch(mix[..., : c.views, :].flatten(-2).contiguous(), **extra).unflatten(-1, (c.views, -1))
            if dropped and any(
                module.drop_prob == 1 for module in block.modules() if isinstance(module, timm.layers.DropPath)
            ):
                assert "davit" in family or y.abs().max() == 0
            scale = getattr(getattr(block, f"res_scale{k}", None), "scale", torch.ones(dim, dtype=x.dtype))
            carried = alpha[..., c.views :].mT @ (H.flatten(-2).unflatten(-1, (-1, dim)) * scale).reshape(H.shape)
            H = beta[..., None] * y + carried
        x = H.flatten(-2) if output.numel() == H.numel() else H.mean(-2)
        torch.testing.assert_close(output.movedim(1, -1) if block.channels_first else output, x, rtol=1e-10, atol=1e-11)


def textbook(connection, blocks, x, views_to_branches):
    """The papers' streams through a list of blocks, branches given by the caller; returns the mean of the streams."""
    kind, rate = parse_connection(connection)
    hyper = kind.endswith("hc")
    H = x.unsqueeze(-2).expand(*x.shape[:-1], rate, x.shape[-1]) if hyper else x.unflatten(-1, (rate, -1))
    for block in blocks:
        for k, branch in enumerate(views_to_branches(block), 1):
            c, width = getattr(block, f"connection{k}"), H.shape[-1]
            Hn = F.layer_norm(H, (width,), eps=1e-6) if hyper else F.rms_norm(H, (width,), c.norm_weight, eps=1e-6)
            alpha = c.static_alpha + c.dynamic_alpha_scale * torch.tanh(Hn @ c.dynamic_alpha_fn)
            beta = c.static_beta + c.dynamic_beta_scale * torch.tanh(Hn @ c.dynamic_beta_fn).squeeze(-1)
            mix = alpha.mT @ H
            views = 1 if hyper else rate
            out = branch(mix[..., :views, :].flatten(-2)).unflatten(-1, (views, -1))
            H = beta[..., None] * out + mix[..., views:, :]
    return H.mean(-2) if hyper else H.flatten(-2)


def textbook_eva(model, connection, x):
    x, rope = model._pos_embed(model.patch_embed(x))

    def branches(b):
        yield (
            lambda y: (
                b.gamma_1 * b.attn(b.norm1(y), rope=rope) if b.gamma_1 is not None else b.attn(b.norm1(y), rope=rope)
            )
        )
        yield lambda y: b.gamma_2 * b.mlp(b.norm2(y)) if b.gamma_2 is not None else b.mlp(b.norm2(y))

    x = textbook(connection, model.blocks, x, branches)
    return model.forward_head(F.layer_norm(x, x.shape[-1:], model.norm.weight, model.norm.bias, model.norm.eps)
                              if isinstance(model.norm, torch.nn.LayerNorm) else x)  # fmt: skip


def textbook_beit(model, connection, x):
    x = model.patch_embed(x)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    if model.pos_embed is not None:
        x = x + model.pos_embed

    def branches(b):
        yield lambda y: b.gamma_1 * b.attn(b.norm1(y))
        yield lambda y: b.gamma_2 * b.mlp(b.norm2(y))

    x = textbook(connection, model.blocks, x, branches)
    return model.head(model.fc_norm(x[:, 1:].mean(1)))


def textbook_swin(model, connection, x):
    x = model.patch_embed(x)
    for stage in model.layers:
        x = stage.downsample(x)

        def branches(b):
            yield lambda y: b._attn(b.norm1(y))
            yield lambda y: b.mlp(b.norm2(y))

        x = textbook(connection, stage.blocks, x, branches)
    return model.head(model.norm(x))


@pytest.mark.parametrize("connection", ["dhc2", "dhc4", "dfc3"])
@pytest.mark.parametrize(
    ("family", "forward"),
    [("eva", textbook_eva), ("eva02", textbook_eva), ("beit", textbook_beit), ("swin_transformer", textbook_swin)],
)
def test_textbook(family, forward, connection):
    """A forward written out by hand, all parameters random: logits and every gradient (ViT: test_conversion.py)."""
    model, x = randomize(convert(build(family), connection)), images(family)
    ours, theirs = model(x), forward(model, connection, x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    parameters = dict(model.named_parameters())
    seed = torch.randn_like(ours)
    found = torch.autograd.grad(ours, list(parameters.values()), seed, allow_unused=True)
    expected = torch.autograd.grad(theirs, list(parameters.values()), seed, allow_unused=True)
    for name, a, b in zip(parameters, found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


# everything timm does with a model


def both(family, connection, dtype=torch.float64):
    plain = build(family, dtype)
    return plain, convert(copy.deepcopy(plain), connection), images(family, dtype)


@pytest.mark.parametrize("connection", ["dhc2", "dfc2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_intermediates(family, connection):
    """Taps, taps up to a block, and the models pruned to them."""
    plain, ours, x = both(family, connection)
    expected, found = plain.forward_intermediates(x), ours.forward_intermediates(x)
    assert distance(flat(found), flat(expected)) < 1e-12
    assert [tap.shape for tap in found[1]] == [tap.shape for tap in expected[1]]
    expected, found = (model.forward_intermediates(x, indices=[0, 1], stop_early=True) for model in (plain, ours))
    assert distance(flat(found), flat(expected)) < 1e-12
    for prune_norm in (False, True):
        expected, found = [], []
        for model, out in ((plain, expected), (ours, found)):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([1], prune_norm=prune_norm) == [1]
            out += [pruned.forward_features(x), pruned.forward_intermediates(x, indices=[1], intermediates_only=True)]
        assert distance(flat(found), flat(expected)) < 1e-12


@pytest.mark.parametrize("family", [family for family in FAMILIES if find_family(build(family)).exit])
def test_normed_taps(family):
    """With random connections every tap with norm=True is the final norm of the mean over streams."""
    plain, ours, x = both(family, "dhc3")
    for c in connections(ours):
        randomize(c, std=0.5)
    outputs = []
    for block in blocks(ours):
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    taps = ours.forward_intermediates(x, norm=True, intermediates_only=True)
    norm = plain.get_submodule(find_family(plain).exit)
    assert len(taps) == len(outputs) > 0
    for out, tap in zip(outputs, taps, strict=True):
        mean = out.unflatten(-1, (-1, plain.embed_dim)).mean(-2)
        if out.dim() == 4:  # SAM
            expected = norm(mean.permute(0, 3, 1, 2))
        else:
            expected = norm(mean)[:, -tap[0, 0].numel() :].mT.reshape(tap.shape)
        assert distance(tap, expected) < 1e-12


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_hiera_taps(coarse, output_fmt):
    """Hiera taps inside its stages too; with random connections a tap is the mean of the streams."""
    ours, x = convert(build("hiera"), "dhc3"), images("hiera")
    for c in connections(ours):
        randomize(c, std=0.5)
    taps = ours.forward_intermediates(x, coarse=coarse, output_fmt=output_fmt, intermediates_only=True)
    outputs = []
    for block in ours.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    ours(x)
    at = ours.stage_ends if coarse else range(len(ours.blocks))
    assert len(taps) == len(at)
    for tap, i in zip(taps, at, strict=True):
        block, out = ours.blocks[i], outputs[i]
        mean = out.unflatten(-1, (-1, block.dim_out)).mean(-2)
        expected = ours.reroll(mean, i)
        torch.testing.assert_close(tap.movedim(1, -1) if output_fmt == "NCHW" else tap, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_only(family):
    """timm's wrapper around a converted model, and a converted wrapper where timm's is the getter."""
    plain, ours, x = both(family, "dhc2")
    expected, found = (FeatureGetterNet(model, out_indices=[0, 1])(x) for model in (plain, ours))
    assert distance(flat(found), flat(expected)) < 1e-12
    wrapper = FeatureGetterNet(build(family), out_indices=[0, 1])
    assert distance(flat(convert(wrapper, "dhc2")(x)), flat(expected)) < 1e-12


@pytest.mark.parametrize("connection", ["dhc2", "dfc2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_grad_checkpointing(family, connection):
    """The same gradients to the bit."""
    if family in ("convit", "pit", "sequencer"):  # no more than timm's own
        for model in both(family, connection)[:2]:
            with pytest.raises(AssertionError, match="gradient checkpointing not supported"):
                model.set_grad_checkpointing(True)
        return
    gradients = []
    for enable in (False, True):
        ours = convert(build(family), connection).train()
        for c in connections(ours):
            randomize(c, std=0.5)
        ours.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        flat(ours(images(family))).square().sum().backward()
        gradients.append([p.grad for p in ours.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("family", FAMILIES)
def test_reshaped(family):
    """A new head, no head, another image size."""
    plain, ours, x = both(family, "dhc2")

    if "encoder" not in family:  # those have no head
        for model in (plain, ours):
            model.reset_classifier(7)
            randomize(model.get_submodule("head"), seed=3)
            randomize(getattr(model, "head_dist", None) or torch.nn.Identity(), seed=4)
        assert ours(x).shape == (2, 7)
        assert distance(ours(x), plain(x)) < 1e-12
    if hasattr(plain, "set_input_size"):
        for model in (plain, ours):
            model.set_input_size((64, 64))
        wide = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        assert distance(flat(ours(wide)), flat(plain(wide))) < 1e-12


@pytest.mark.filterwarnings("ignore:The tensor attributes", "ignore:The TorchScript type system")  # timm's code
@pytest.mark.parametrize("way", ["compile", "export", "script"])
@pytest.mark.parametrize(
    "family",
    [
        family if family in ("vision_transformer", "eva", "convnext") else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
        if family not in VARIANTS
    ],
)
def test_compiled(family, way):
    """torch.compile in one graph, torch.export and TorchScript, where timm's own model has them."""
    x = images(family)

    def run(model):
        if way == "compile":
            return torch.compile(model, fullgraph=True, backend="eager")(x)
        return torch.export.export(model, (x,)).module()(x) if way == "export" else torch.jit.script(model)(x)

    if (family, way) in {("naflexvit", "script"), ("hiera", "script"), ("sequencer", "compile")}:
        with pytest.raises(
            (RuntimeError, torch.jit.frontend.FrontendError)
        ):  # timm's own does not: once it does, ours has to
            run(build(family))
        return
    ours = convert(build(family), "dfc2" if way == "export" else "dhc2")
    for c in connections(ours):
        randomize(c, std=0.5)
    expected = flat(ours(x))
    assert distance(flat(run(ours)), expected) < max(1e-12, 8 * rounding(ours, x))


@pytest.mark.parametrize("family", FAMILIES)
def test_copies(family):
    """deepcopy and pickle."""
    ours, x = randomize(convert(build(family), "dhc2"), std=0.1), images(family)
    expected = flat(ours(x))
    assert torch.equal(flat(copy.deepcopy(ours)(x)), expected)
    assert torch.equal(flat(pickle.loads(pickle.dumps(ours))(x)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_optimizer_groups(family):
    """Every parameter in one group; connections learn at their block's rate; only their projections decay."""
    ours = convert(build(family), "dhc2")
    layers = hasattr(ours, "group_matcher")
    assert layers == (family not in ("pit", "metaformer", "poolformer"))
    optimizer = create_optimizer_v2(ours, "adamw", weight_decay=0.3, layer_decay=0.5 if layers else None)
    group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert len(group) == sum(p.requires_grad for p in ours.parameters())
    for block in blocks(ours):
        if not isinstance(block, ConnectedBlock):
            continue
        scales = {group[id(p)].get("lr_scale") for p in block.parameters() if p.requires_grad}
        assert len(scales) == 1
        for c in block.children():
            if isinstance(c, Connection):
                for name, parameter in c.named_parameters():
                    assert group[id(parameter)]["weight_decay"] == (0.3 if name.endswith("_fn") else 0.0), name


# names


NAMES = (
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "convit_tiny",
    "cait_xxs24_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "convnext_atto",
)


def small(name):
    return next((kwargs for base, kwargs in FAMILIES.values() if base == name), {})


@pytest.mark.parametrize("name", NAMES)
def test_hub_folder(name, tmp_path):
    """Saved by timm for the hub, built again by one call, whether made by create_model or by convert."""
    kwargs = {key: value for key, value in small(name).items() if key != "use_post_norm"}
    size = kwargs.get("img_size", 64)
    x = torch.randn(2, 3, size, size)
    made = create_model(name, "dhc3", connection_tanh=False, **kwargs)
    converted = convert(timm.create_model(name, **kwargs), "dhc3", tanh=False)
    for i, model in enumerate((made, converted)):
        randomize(model).eval()
        timm.models.save_for_hf(model, tmp_path / str(i), safe_serialization=True)
        loaded = create_model(f"local-dir:{tmp_path / str(i)}", pretrained=True).eval()
        assert torch.equal(loaded(x), model(x))
        assert loaded.connection == "dhc3"
        assert all(not c.tanh for c in connections(loaded))
        features = create_model(f"local-dir:{tmp_path / str(i)}", pretrained=True, features_only=True).eval()
        assert len(features(x)) >= 3
    residual = timm.create_model(name, **kwargs).eval()
    timm.models.save_for_hf(residual, tmp_path / "residual", safe_serialization=True)
    tuned = create_model(f"local-dir:{tmp_path / 'residual'}", "dfc2", pretrained=True).eval()
    assert torch.equal(tuned(x), residual(x))
    assert tuned.connection == "dfc2"


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_file(name, tmp_path):
    """Both steps in one call: timm loads the residual weights as it always does, and the outputs are theirs."""
    kwargs = small(name)
    residual = randomize(timm.create_model(name, **kwargs)).eval()
    path = tmp_path / "weights.pth"
    torch.save(residual.state_dict(), path)
    cfg = {"file": str(path), "num_classes": residual.num_classes}
    size = kwargs.get("img_size", 64)
    x = torch.randn(2, 3, size, size)
    model = create_model(name, "dfc2", pretrained=True, pretrained_cfg_overlay=cfg, **kwargs).eval()
    assert torch.equal(model(x), residual(x))
    torch.save(randomize(model, seed=4).state_dict(), path)  # with connections that have learned
    again = create_model(name, "dfc2", pretrained=True, pretrained_cfg_overlay=cfg, **kwargs).eval()
    assert torch.equal(again(x), model(x))
    assert not torch.equal(again(x), residual(x))
