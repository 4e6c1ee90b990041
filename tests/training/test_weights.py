"""hcvision.training.weights: other people's files of weights, their names and wrappers, and weights that almost fit."""

import pytest
import timm
import torch
from conftest import TINY, randomize
from safetensors.torch import save_file

import hcvision
from hcvision.training.classification import ImageClassifier
from hcvision.training.generation import ImageGenerator
from hcvision.training.weights import pick_weights

NAME = "vit_tiny_patch16_224"
SMALL = {**TINY, "depth": 1}


def source(name=NAME, **changes):
    return randomize(timm.create_model(name, num_classes=3, **{**SMALL, **changes})).state_dict()


def start(path, content, **kwargs):
    """A classifier that starts from what a file holds."""
    torch.save(content, path)
    kwargs = {"model": NAME, "connection": "dhc2", "num_classes": 3, "model_args": dict(SMALL), **kwargs}
    return ImageClassifier(init_from=str(path), **kwargs)


def below(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def compiled_blocks(state):
    return {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in state.items()}


CONTENTS = {
    **{
        prefix: lambda state, prefix=prefix: below(prefix, state)
        for prefix in (
            "", "model.", "module.", "_orig_mod.", "model._orig_mod.", "net.", "backbone.", "encoder.", "student.",
            "model.model.", "_forward_module.", "_forward_module._orig_mod.model.", "module.base_encoder.", "trunk.v.",
        )
    },
    **{
        key: lambda state, key=key: {"epoch": 3, key: state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
        for key in ("model_state_dict", "teacher", "params", "state_dict_ema", "ema", "state_dict", "net", "weights")
    },
    "two keys": lambda state: {"checkpoint": {"model": below("module.", state)}},
    "blocks that were compiled": compiled_blocks,
    "other parts beside it": lambda state: below("encoder.", state) | below("decoder.", {"weight": torch.ones(3)}),
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
def test_names(content, tmp_path):
    """Whatever stands before the names of the trunk, or around the weights, it is these weights."""
    state = source()
    model = start(tmp_path / "w.pth", CONTENTS[content](state))
    own = model.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert all(".connection" in name for name in model.untouched)


def test_averaged_weights_come_first(tmp_path):
    """Of several sets of weights, in one dictionary or in two, the average is taken."""
    raw, average = source(), {name: value + 1 for name, value in source().items()}
    for content in (
        {**below("student.backbone.", raw), **below("teacher.backbone.", average)},
        {"state_dict": raw, "state_dict_ema": average},
        {"model": raw, "ema": average},
        {"state_dict": average, "current_model_state": raw},  # Lightning's
    ):
        model = start(tmp_path / "w.pth", content)
        assert torch.equal(model.model.state_dict()["cls_token"], average["cls_token"])


def test_published_files_go_to_timm(tmp_path):
    """Where no name is the model's, the weights are handed to timm, which knows the published forms."""
    mixer = {"fc.weight": torch.ones(2), "layers.0.weight": torch.ones(3)}
    assert pick_weights({"state_dict": mixer, "optimizer": {"a": torch.ones(1)}}, {"cls_token"}) == mixer


def test_safetensors(tmp_path):
    save_file(below("module.", source()), tmp_path / "w.safetensors")
    model = ImageClassifier(NAME, num_classes=3, model_args=dict(SMALL), init_from=str(tmp_path / "w.safetensors"))
    assert torch.equal(model.model.state_dict()["cls_token"], source()["cls_token"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: source(depth=2), r"blocks\.1\..* is not in this model"),
        (lambda: source(embed_dim=96), r"(cls_token|pos_embed) has shape \[.*96\], not \[.*48\]"),
        (lambda: source(class_token=False, global_pool="avg"), "cls_token is missing"),
        (lambda: timm.create_model("resnet10t", num_classes=3).state_dict(), "cls_token is missing; there are 'conv1"),
        (lambda: below("q.", {"a": torch.ones(1), "b": torch.ones(1)}), "cls_token is missing; there are 'q.a', 'q.b'"),
        (lambda: {"epoch": 3}, "cls_token is missing"),
        (lambda: randomize(hcvision.create_model(NAME, "dhc4", num_classes=3, **SMALL)).state_dict(), "has shape"),
    ],
    ids=["deeper", "wider", "no class token", "another family", "other names", "no weights", "another connection"],
)  # fmt: skip
def test_weights_of_another_model(content, words, tmp_path):
    with pytest.raises(ValueError, match=rf"w\.pth are of another architecture: .*{words}"):
        start(tmp_path / "w.pth", content())


def test_connections_of_another_depth(tmp_path):
    """Checkpoints of a model with connections that has fewer blocks."""
    state = hcvision.create_model(NAME, "dhc2", num_classes=3, **SMALL).state_dict()
    with pytest.raises(
        ValueError, match=r"of another architecture: .*the checkpoint has 12 of 24 connection parameters"
    ):
        start(tmp_path / "w.pth", state, model_args={**SMALL, "depth": 2})


@pytest.mark.parametrize("channels", [1, 4])
def test_channels(channels, tmp_path):
    """RGB weights in a model of other images are what timm makes of them, and it is said."""
    model = start(tmp_path / "rgb.pth", source(), model_args={**SMALL, "in_chans": channels})
    overlay = {"file": str(tmp_path / "rgb.pth"), "num_classes": 3}
    timms = timm.create_model(NAME, True, None, overlay, num_classes=3, in_chans=channels, **SMALL)
    own = model.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in timms.state_dict().items())
    many = "s" * (channels > 1)
    assert model.adapted == f"its RGB weights of patch_embed.proj are adapted to {channels} channel{many}"
    assert start(tmp_path / "rgb.pth", source()).adapted == ""


def test_another_patch_size(tmp_path):
    """Patches of another size are resampled, as timm does it."""
    model = start(tmp_path / "w.pth", source(), model_args={**SMALL, "patch_size": 16})
    assert model.model.state_dict()["patch_embed.proj.weight"].shape[-1] == 16
    assert torch.equal(model.model.state_dict()["cls_token"], source()["cls_token"])


def test_generator(tmp_path):
    """The official files of DiT, with an average, and any prefix."""
    sizes = {"img_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    state = randomize(timm.create_model("dit_s_patch2_256", num_classes=5, **sizes)).state_dict()
    torch.save({"model": below("module.", state), "ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "dit.pt")
    model = ImageGenerator("dit_s_patch2_256", num_classes=5, model_args=sizes, init_from=str(tmp_path / "dit.pt"))
    assert torch.equal(model.model.state_dict()["final_layer.linear.bias"], state["final_layer.linear.bias"] + 1)
