"""Streams that are entered with a scale for each: the residual function at the start, and then the formula."""

import copy
import math

import pytest
import timm
import torch
from conftest import randomize

import hcvision
from hcvision.connections.entry import ScaledCopies
from hcvision.connections.names import build_connection
from hcvision.models.stages import stages
from hcvision.studies.insight.diversity import effective_rank
from hcvision.studies.insight.unfolding import unfold, unfolded_matrix, watch

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
SWIN = {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "num_classes": 10}
KINDS = ("mhc2", "mhc4", "ihc4", "mhclite3", "krom4", "sihc3", "gr2")
NAME = "vit_tiny_patch16_224"


def images(size=32, dtype=torch.float64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)


def passages(model, x):
    seen = []
    (blocks,) = stages(model)
    with torch.no_grad(), watch(blocks, seen.append):
        logits = model(x)
    return seen, logits


def test_initial_scales_by_hand():
    """1.6 where a channel is the stream's own, 0.8 elsewhere: 1 on average, and as many directions as streams."""
    entry = ScaledCopies(8, 4, dtype=torch.float64)
    assert entry.scale[1].tolist() == pytest.approx([0.8, 1.6, 0.8, 0.8] * 2)
    assert entry.scale.mean(0).tolist() == pytest.approx([1] * 8)
    assert ScaledCopies(4, 2).scale.tolist() == [pytest.approx([1.6, 0.4] * 2), pytest.approx([0.4, 1.6] * 2)]
    x = torch.ones(3, 8, dtype=torch.float64)
    # S x S products are 8 * (1 + 0.12) and 8 * (1 - 0.04): eigenvalues 32 and 1.28 three times
    values = torch.tensor([math.sqrt(32), *[math.sqrt(1.28)] * 3], dtype=torch.float64)
    shares = values / values.sum()
    expected = math.exp(-(shares * shares.log()).sum())
    assert effective_rank(entry(x).unflatten(-1, (4, 8))).tolist() == pytest.approx([expected] * 3)


@pytest.mark.parametrize("connection", KINDS)
@pytest.mark.parametrize(
    ("name", "small"),
    [(NAME, TINY), ("eva02_tiny_patch14_224", TINY), ("swin_tiny_patch4_window7_224", SWIN)],
)
def test_the_residual_function(name, small, connection):
    """At the start, whatever the weights of the trunk are; the streams are different ones all the while."""
    plain = randomize(timm.create_model(name, **small)).double().eval()
    ours = hcvision.convert(copy.deepcopy(plain), connection, entry="scaled")
    x = images(small["img_size"])
    expected = plain(x)
    assert (ours(x) - expected).abs().max() < 1e-6 * expected.abs().max()
    rate = int(connection[-1])
    scales = [key for key in ours.state_dict() if key.endswith("scaled.scale")]
    assert len(scales) == len(stages(ours))
    if name == NAME:
        seen, _ = passages(ours, x)
        assert scales == ["blocks.0.connection1.scaled.scale"]
        assert effective_rank(seen[0].streams).mean() > 1.4
        assert effective_rank(seen[-1].after).mean() > 1.05
        assert seen[0].streams.shape[-2] == rate


def test_streams_are_told_apart_from_the_first_step_on():
    """Reads of equal streams have equal gradients; of scaled ones not. Scales have equal ones, too."""
    gradients = {}
    for entry in ("copies", "scaled"):
        model = hcvision.create_model(NAME, "mhc4", **TINY, connection_entry=entry).double()
        randomize(model, std=0.1)
        for module in model.modules():
            if hasattr(module, "bias_pre"):
                module.reset_parameters()
                if entry == "copies":
                    torch.nn.init.constant_(module.bias_pre, math.log(1 / 3))  # 1/4 of each, as with scales
        model(images())[:, 0].sum().backward()
        gradients[entry] = model.blocks[1].connection1.phi_pre.grad
    spread = {entry: (g - g.mean(1, keepdim=True)).abs().max() / g.abs().max() for entry, g in gradients.items()}
    assert spread["copies"] < 1e-9
    assert spread["scaled"] > 1e-2
    scale = model.blocks[0].connection1.scaled.scale
    assert (scale.grad - scale.grad.mean(0)).abs().max() < 1e-9 * scale.grad.abs().max()


@pytest.mark.parametrize("connection", ["mhc4", "ihc4"])
def test_the_formula(connection):
    """With random weights: H_j = scale_j x, then what the connections say of themselves, and the mean."""
    model = randomize(hcvision.create_model(NAME, connection, **TINY, connection_entry="scaled").double()).eval()
    x = images()
    seen, logits = passages(model, x)
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        scale = model.blocks[0].connection1.scaled.scale
        h = torch.stack([tokens * row for row in scale], dim=-2)
        torch.testing.assert_close(seen[0].streams, h, rtol=0, atol=1e-12)
        for passage in seen:
            alpha, beta = passage.mixing.alpha, passage.mixing.beta
            view = torch.einsum("...s,...se->...e", alpha[..., 0], h)
            torch.testing.assert_close(passage.view.squeeze(-2), view, rtol=0, atol=1e-12)
            h = torch.einsum("...st,...se->...te", alpha[..., 1:], h) + beta[..., None] * passage.output
        expected = model.forward_head(model.norm(h.mean(-2)))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("connection", ["mhc4", "ihc2", "sihc3", "gr2"])
def test_who_reads_whom(connection):
    """The unfolded matrix, channel by channel, gives every input of a sub-layer back."""
    model = randomize(hcvision.create_model(NAME, connection, **TINY, connection_entry="scaled").double()).eval()
    x = images()
    seen, _ = passages(model, x)
    c = unfold([passage.mixing for passage in seen])[..., 0, :, 0]  # (B, N, E, L+1, L+1), N of 1 for all tokens alike
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    outputs = torch.stack([tokens, *(passage.output.squeeze(-2) for passage in seen)], dim=-1)  # (B, N, E, L+1)
    for k, passage in enumerate(seen):
        torch.testing.assert_close((c[..., k, :] * outputs).sum(-1), passage.view.squeeze(-2), rtol=0, atol=1e-11)
    torch.testing.assert_close(unfolded_matrix(model, x), c.mean((0, 1, 2)), rtol=0, atol=1e-12)


def test_where_the_scales_are(tmp_path):
    """In front of every run of blocks with connections; saved, loaded, decayed and named as parameters of ours."""
    model = hcvision.create_model(NAME, "mhc4", **TINY, connection_entry="scaled", connection_blocks="1:")
    assert [key for key in model.state_dict() if "scaled" in key] == ["blocks.1.connection1.scaled.scale"]
    assert "blocks.1.connection1.scaled.scale" in model.no_weight_decay()
    randomize(model)
    timm.models.save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    x = images(dtype=torch.float32)
    assert torch.equal(again.eval()(x), model.eval()(x))
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)
    small = {key: value for key, value in TINY.items() if key != "num_classes"}
    features = timm.create_model(f"{NAME}_mhc4", features_only=True, connection_entry="scaled", **small)
    assert features(x)[-1].shape == (2, 48, 4, 4)


def test_residual_weights_are_loaded(tmp_path):
    """As into any model with connections; as long as these are new, they can be taken away again."""
    plain = randomize(timm.create_model(NAME, **TINY)).eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    ours = hcvision.create_model(
        NAME, "ihc4", pretrained=True, pretrained_cfg_overlay=overlay, **TINY, connection_entry="scaled"
    ).eval()
    x = images(dtype=torch.float32)
    expected = plain(x)
    assert (ours(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(hcvision.convert(copy.deepcopy(ours), "residual")(x), expected)
    with torch.no_grad():
        ours.blocks[0].connection1.scaled.scale[0, 0] += 1
    with pytest.raises(ValueError, match="it has left its initial values"):
        hcvision.convert(ours, "residual")


def test_bfloat16():
    """Multiplied in float32 and rounded once; a model of bfloat16 runs."""
    entry = ScaledCopies(8, 4)
    x = torch.randn(5, 8)
    assert torch.equal(entry.to(torch.bfloat16)(x), (x.unsqueeze(-2) * entry.scale.float()).flatten(-2))
    model = hcvision.create_model(NAME, "mhc4", **TINY, connection_entry="scaled").to(torch.bfloat16)
    assert model(images(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_entries_that_are_not_there():
    with pytest.raises(ValueError, match="entry must be copies or scaled, got 'scale'"):
        build_connection("mhc4", 24, entry="scale")
    for one in ("sihc1", "gr1"):
        with pytest.raises(ValueError, match="rate must be an integer of at least 2, got 1"):
            build_connection(one, 24, entry="scaled")
    with pytest.raises(TypeError, match="entry"):
        build_connection("dhc4", 24, entry="scaled")
