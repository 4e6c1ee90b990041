"""models/names.py: what timm knows of our names, the weights they bring, and names that are registered on request."""

import json
import re
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from conftest import randomize
from test_families import FAMILIES, distance
from timm.data import resolve_data_config
from timm.models import get_arch_pretrained_cfgs, group_parameters, save_for_hf
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import hcvision
from hcvision.connections.base import Connection
from hcvision.models.families import MODELS
from hcvision.models.names import create_model

BASE = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
IN1K, IN21K = "augreg_in21k_ft_in1k", "augreg_in21k"
NAMED = {base: small for base, small in FAMILIES.values() if isinstance(base, str)}  # the last of several rows
TAGGED = [base for base in NAMED if any(cfg.has_weights for cfg in get_arch_pretrained_cfgs(base).values())]
PLACES = ("url", "hf_hub_id", "hf_hub_filename", "custom_load")


def images(size=32, chans=3):
    return torch.randn(2, chans, size, size, generator=torch.Generator().manual_seed(2))


def residual(base, **small):
    return randomize(timm.create_model(base, **small)).eval()


def saved(model, path):
    torch.save(model.state_dict(), path)
    return {"file": str(path)}


def config(model, folder):
    save_for_hf(model, folder, safe_serialization=True)
    return json.loads((folder / "config.json").read_text())


# weights by tag


@pytest.mark.parametrize("base", TAGGED)
def test_tags(base):
    """timm lists the tags of the base, in its order, with its addresses and its view of images, and what they are."""
    (name,) = hcvision.register(base, "dhc2")
    theirs, ours = (list(get_arch_pretrained_cfgs(model).items()) for model in (base, name))
    assert len(ours) == len(theirs) > 0
    for (key, cfg), (base_key, base_cfg) in zip(ours, theirs, strict=True):
        assert key == base_key.replace(base, name)
        note = f"initial weights: those of {base_key}, trained without connections"
        expected = base_cfg.to_dict() | {"architecture": name}
        if base_cfg.has_weights:
            assert timm.is_model_pretrained(key)
            expected["notes"] = (*(base_cfg.notes or ()), note)
        assert cfg.to_dict() == expected
        assert resolve_data_config({}, pretrained_cfg=cfg.to_dict()) == resolve_data_config(
            {}, pretrained_cfg=base_cfg.to_dict()
        )
    assert timm.list_pretrained(name) == [key.replace(base, name) for key in timm.list_pretrained(base)]
    assert timm.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(base).tag
    assert timm.is_model_pretrained(name) == timm.is_model_pretrained(base)
    with pytest.raises(RuntimeError, match=rf"Invalid pretrained tag \(nonsense\) for {name}"):
        timm.get_pretrained_cfg(f"{name}.nonsense")


def test_lists():
    """Sixty names, each with its base's tags; DiTs have no weights to list."""
    listed = timm.list_models("vit_base_patch16_224_dhc2", pretrained=True)
    assert "vit_base_patch16_224_dhc2.augreg2_in21k_ft_in1k" in listed
    for name in hcvision.vit_names:
        base = name.rpartition("_")[0]
        assert len(timm.list_models(name, pretrained=True)) == len(timm.list_models(base, pretrained=True)) > 0
    assert not any(timm.is_model_pretrained(name) for name in hcvision.dit_names)


@pytest.mark.parametrize("connection", ["dfc2", "dhc2"])
@pytest.mark.parametrize("base", TAGGED)
def test_weights_of_a_file(base, connection, tmp_path):
    """timm's output for weights that its own model loads from that file: to the bit, or what kernels round."""
    small = NAMED[base]
    (name,) = hcvision.register(base, connection)
    overlay = saved(residual(base, **small), tmp_path / "weights.pth") | {"num_classes": small.get("num_classes", 1000)}
    plain, ours = (
        timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **small).eval()
        for model in (base, name)
    )
    x = images(small.get("img_size", 64))
    assert torch.equal(ours(x), plain(x)) if connection == "dfc2" else distance(ours(x), plain(x)) < 1e-6
    assert ours.connection == connection


def test_families_with_weights():
    """The page names those that are compared above, and no other."""
    page = (Path(__file__).parents[2] / "docs" / "index.md").read_text()
    said = re.search(r"for (\d+) architectures, of (\d+)\nfamilies .*?: (.*?)\n\n", page, re.DOTALL)
    families = {timm.model_entrypoint(base).__module__.rpartition(".")[2] for base in TAGGED}
    assert re.findall(r"`(\w+)`", said[3]) == sorted(families)
    assert (int(said[1]), int(said[2])) == (len(TAGGED), len(families))


def test_weights_of_the_hub(tmp_path, monkeypatch):
    """A tag's weights come from its place in the hub's cache, without a network; the bare name is the default tag."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    plain = {}
    for tag, classes in ((IN1K, 1000), (IN21K, 21843)):
        plain[tag] = randomize(timm.create_model(BASE, **TINY, num_classes=classes), seed=classes).eval()
        place = tmp_path / f"models--timm--{BASE}.{tag}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        save_for_hf(plain[tag], place / "snapshots" / ("0" * 40), safe_serialization=True)
    for name, tag in ((f"{BASE}_dhc2", IN1K), (f"{BASE}_dhc2.{IN1K}", IN1K), (f"{BASE}_sfc2.{IN21K}", IN21K)):
        ours = timm.create_model(name, pretrained=True, cache_dir=tmp_path, **TINY).eval()
        assert torch.equal(ours(images()), plain[tag](images()))
        assert ours.pretrained_cfg["tag"] == tag
    ours = create_model(f"{BASE}.{IN21K}", "dfc2", pretrained=True, cache_dir=tmp_path, **TINY).eval()
    assert torch.equal(ours(images()), plain[IN21K](images()))
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
        timm.create_model(f"{BASE}_dhc2", pretrained=True, cache_dir=tmp_path / "elsewhere", **TINY)


def test_weights_are_adapted(tmp_path):
    """One channel for three, another head, features alone: what timm makes of the base's weights."""
    overlay = saved(residual(BASE, **TINY), tmp_path / "weights.pth")
    for changes in ({"in_chans": 1, "num_classes": 5}, {"features_only": True}, {"num_classes": 0}):
        plain, ours = (
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **TINY, **changes).eval()
            for name in (BASE, f"{BASE}_dhc2")
        )
        trunk = plain.state_dict()
        for key in trunk:
            if "num_classes" not in changes or not key.startswith("head."):
                assert torch.equal(ours.state_dict()[key], trunk[key]), key
    assert isinstance(timm.create_model(f"{BASE}_dhc2", features_only=True, **TINY), FeatureGetterNet)


def test_weights_from_an_address(monkeypatch):
    """A url is asked for through timm's own functions, an .npz goes to the model's own loader."""
    state, asked = residual("vit_small_patch16_224", **TINY, num_classes=0).state_dict(), []
    monkeypatch.setattr(
        timm.models._builder,
        "load_state_dict_from_url",
        lambda url, **kwargs: asked.append((url, kwargs["model_dir"])) or state,
    )
    name = "vit_small_patch16_224_dhc2.dino"
    ours = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"hf_hub_id": ""}, cache_dir="here", **TINY)
    assert asked == [(timm.get_pretrained_cfg(name).url, "here")]
    assert asked[0][0].endswith("dino_deitsmall16_pretrain.pth")
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in state.items())

    monkeypatch.setattr(timm.models._builder, "download_cached_file", lambda url, **kwargs: url)
    monkeypatch.setattr(
        timm.models.vision_transformer.VisionTransformer, "load_pretrained", lambda self, path: asked.append(path)
    )
    timm.create_model(f"{BASE}_dhc2", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": ""}, **TINY)
    assert asked[1:] == [timm.get_pretrained_cfg(BASE).url]
    assert asked[1].endswith(".npz")


# what is said of them


def test_origin(tmp_path, monkeypatch):
    """A saved folder says where the weights came from: a tag only if they were its, nothing if there were none."""
    name, note = f"{BASE}_dhc2", "initial weights: those of {}, trained without connections"
    plain = residual(BASE, **TINY)
    file = saved(plain, tmp_path / "weights.pth")
    own = saved(randomize(timm.create_model(name, **TINY)), tmp_path / "own.pth")
    state = plain.state_dict()
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *args, **kwargs: dict(state))

    def said(model, folder):
        cfg = config(model, tmp_path / folder)["pretrained_cfg"]
        assert not any(cfg.get(key) for key in PLACES)
        return cfg.get("tag"), cfg.get("notes", [])

    of_a_tag = timm.create_model(name, pretrained=True, **TINY)
    assert said(of_a_tag, "tag") == (IN1K, [note.format(f"{BASE}.{IN1K}")])
    assert said(timm.create_model(name, **TINY), "new") == (None, [])
    assert said(timm.create_model(f"{name}.{IN21K}", num_classes=10, **TINY), "new too") == (None, [])
    of_a_file = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, **TINY)
    assert said(of_a_file, "file") == (None, [f"initial weights: of a residual {BASE}"])
    named = timm.create_model(f"{name}.{IN1K}", pretrained=True, pretrained_cfg_overlay=file, **TINY)
    assert said(named, "named") == (IN1K, [f"initial weights: of a residual {BASE}"])
    trained = timm.create_model(f"{name}.{IN1K}", pretrained=True, pretrained_cfg_overlay=own, **TINY)
    assert said(trained, "own") == (None, [])

    again = timm.create_model(f"local-dir:{tmp_path / 'tag'}", pretrained=True)
    assert said(again, "again") == (IN1K, [note.format(f"{BASE}.{IN1K}")])
    config(plain, tmp_path / "plain")
    of_a_folder = create_model(f"local-dir:{tmp_path / 'plain'}", "dhc2", pretrained=True)
    assert said(of_a_folder, "of a folder")[0] == IN1K  # timm says so of its own model


# registered on request


def test_register():
    """By pattern, several connections at a time, in timm's order; once more changes nothing and warns of nothing."""
    bases = timm.list_models("swin_s3_*")
    assert len(bases) == 3
    names = hcvision.register("swin_s3_*", "dhc3", "dfc4")
    assert names == [f"{base}_{connection}" for base in bases for connection in ("dhc3", "dfc4")]
    assert set(timm.list_models("swin_s3_*_dfc4")) == set(names[1::2])
    entrypoint = timm.model_entrypoint(names[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hcvision.register("swin_s3_*", "dhc3", "dfc4") == names
        assert hcvision.register("swin_s3_tiny_224", "dhc3") == ["swin_s3_tiny_224_dhc3"]
    assert timm.model_entrypoint(names[0]) is entrypoint
    model = timm.create_model("swin_s3_tiny_224_dfc4", device="meta")
    assert model.connection == "dfc4"
    assert model.pretrained_cfg["architecture"] == "swin_s3_tiny_224_dfc4"


def test_register_what_can_be():
    """A pattern leaves out what cannot be converted, a connection at a time."""
    assert set(timm.list_models("*_s12")) >= {"fastvit_s12", "poolformer_s12", "poolformerv2_s12"}
    assert hcvision.register("*_s12", "dhc3") == ["poolformer_s12_dhc3", "poolformerv2_s12_dhc3"]
    assert not timm.is_model("fastvit_s12_dhc3")
    atto = ["convnext_atto_dfc5", "convnext_atto_ols_dfc5", "convnext_atto_rms_dfc5"]  # of 40, 80, 160, 320 channels
    femto = ["convnext_femto_dfc3", "convnext_femto_ols_dfc3"]  # of 48, 96, 192, 384
    assert hcvision.register("convnext_[af]*", "dfc5", "dfc3") == atto + femto


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("swinn_*", "dhc2"), "no timm name matches 'swinn_*'"),
        (("resnet18", "dhc2"), "resnet18 does not take dhc2: cannot convert a ResNet with blocks of class BasicBlock"),
        (
            ("resnet1?", "dhc2"),
            "nothing that matches 'resnet1?' can be converted; resnet18 with dhc2, for one: cannot ",
        ),
        (
            ("swin_tiny_patch4_window7_224", "dhc5", "dfc7"),
            "swin_tiny_patch4_window7_224 does not take dfc7: dim must ",
        ),
        (("swin_*",), "register('swin_*') needs a connection, such as 'dhc2'"),
        (("swin_*", "residual"), "register('swin_*') needs a connection, such as 'dhc2', got 'residual'"),
        (("swin_*", "dhx"), "connection must be 'residual', "),
        ((f"{BASE}_dhc2", "dhc2"), f"what matches '{BASE}_dhc2' has connections already"),
        ((f"{BASE}_in21k", "dhc2"), f"no timm name matches '{BASE}_in21k': timm calls it {BASE}.{IN21K} now"),
    ],
)
def test_register_errors(arguments, message):
    """In one line, and nothing is registered."""
    before = timm.list_models()
    with pytest.raises(ValueError, match="^" + re.escape(message)) as refused:
        hcvision.register(*arguments)
    assert "\n" not in str(refused.value)
    assert timm.list_models() == before


def test_names_on_request(tmp_path):
    """hcvision.create_model takes names that nobody registered, tags included, and timm knows them then."""
    base, small = "swinv2_tiny_window8_256", NAMED["swinv2_tiny_window8_256"]
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"{base}_dhc5")
    plain = residual(base, **small)
    overlay = saved(plain, tmp_path / "weights.pth") | {"num_classes": 10}
    ours = create_model(f"{base}_dhc5.ms_in1k", pretrained=True, pretrained_cfg_overlay=overlay, **small).eval()
    torch.testing.assert_close(ours(images(64)), plain(images(64)), rtol=1e-6, atol=1e-6)
    assert ours.connection == "dhc5"
    assert timm.is_model(f"{base}_dhc5")
    with pytest.raises(RuntimeError, match=r"Unknown model \(no_such_vit_dhc2\)"):
        create_model("no_such_vit_dhc2")
    with pytest.raises(RuntimeError, match=rf"Unknown model \({BASE}_in21k\): timm calls it {BASE}\.{IN21K} now"):
        create_model(f"{BASE}_in21k", "dhc2")


# what timm and torchvision do with a name


OTHERS = (  # names of the families above whose rows are classes
    *("mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "hiera_tiny_224", "davit_tiny", "caformer_s18"),
    *("poolformer_s12", "focalnet_tiny_srf", "nest_tiny", "sequencer2d_s"),
)
SMALL = NAMED | {base: {} for base in OTHERS} | {"sequencer2d_s": {"layers": (1, 1, 1, 1)}}
SMALL["vit_tiny_r_s16_p8_224"] = SMALL["vit_tiny_r_s16_p8_224"] | {"depth": 3}
FOUR_STAGES = {  # their strides are 4, 8, 16 and 32
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "pvt_v2_b0", "hiera_tiny_224"),
    *("davit_tiny", "caformer_s18", "poolformer_s12", "convnext_tiny", "convnext_atto", "convnextv2_atto"),
    *("inception_next_atto", "focalnet_tiny_srf"),
}


def pair(base, **kwargs):
    """timm's model and its twin under a name of ours, without memory for weights."""
    (name,) = hcvision.register(base, "dhc2")
    return [timm.create_model(model, device="meta", **SMALL[base], **kwargs) for model in (base, name)]


def meta_images(model, base):
    size = model.pretrained_cfg["input_size"][1:]
    size = [SMALL[base].get("img_size", side) for side in size]
    return torch.empty(2, 3, *size, device="meta")


def test_every_family_has_a_name():
    modules = {timm.model_entrypoint(base).__module__ for base in SMALL}
    rows = {cls.__module__ for cls in MODELS if cls.__module__.startswith("timm.")}
    assert {module.rpartition(".")[2] for module in rows} <= {module.rpartition(".")[2] for module in modules}


@pytest.mark.parametrize("base", SMALL)
def test_fine_tuning(base):
    """Of a name: timm's own parameters decay and learn as in the base, connections as their block; a new head."""
    plain, ours = pair(base)
    theirs = dict(plain.named_parameters())
    own = {
        f"{prefix}.{name}": name
        for prefix, module in ours.named_modules()
        if isinstance(module, Connection)
        for name, _ in module.named_parameters()
    }
    assert set(dict(ours.named_parameters())) == set(theirs) | set(own)
    skipped = set(plain.no_weight_decay()) if hasattr(plain, "no_weight_decay") else set()
    assert ours.no_weight_decay() == skipped | {key for key, name in own.items() if not name.endswith("_fn")}

    layered = hasattr(plain, "group_matcher")
    groups = []
    for model in (plain, ours):
        optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.3, layer_decay=0.5 if layered else None)
        settings = {id(p): (g["weight_decay"], g.get("lr_scale")) for g in optimizer.param_groups for p in g["params"]}
        groups.append({key: settings[id(p)] for key, p in model.named_parameters() if p.requires_grad})
    for key, setting in groups[0].items():
        assert groups[1][key] == setting, key
    for key, name in own.items():
        decay, scale = groups[1][key]
        assert decay == (0.3 if name.endswith("_fn") else 0.0)
        block = key.rpartition(".connection")[0] + "."
        assert {groups[0][k][1] for k in groups[0] if k.startswith(block)} == {scale}, key
    if layered:
        for coarse in (False, True):
            layers = [
                group_parameters(model, model.group_matcher(coarse=coarse), reverse=True) for model in (plain, ours)
            ]
            assert all(layers[1][key] == layer for key, layer in layers[0].items())

    if not base.endswith("_enc") and base != "samvit_base_patch16":  # those have no head
        ours.reset_classifier(7)
        assert ours.num_classes == 7
        assert ours(meta_images(ours, base)).shape == (2, 7)


@pytest.mark.parametrize("base", SMALL)
def test_feature_maps(base):
    """features_only: the maps, strides and channels of the base, channels first; a pyramid where there are stages."""
    plain, ours = pair(base, features_only=True)
    count = len(plain.feature_info.channels())  # sequencer2d: timm leaves out the last stage, which has the same stride
    assert ours.feature_info.reduction()[:count] == plain.feature_info.reduction()
    assert ours.feature_info.channels()[:count] == plain.feature_info.channels()
    assert count == len(ours.feature_info.channels()) or base == "sequencer2d_s"
    if base in FOUR_STAGES:
        assert ours.feature_info.reduction() == [4, 8, 16, 32]
    images = meta_images(ours.model, base)
    for found, info in zip(ours(images), ours.feature_info.get_dicts(), strict=True):
        assert found.shape[:2] == (2, info["num_chs"])
        if base in FOUR_STAGES:
            assert [side * info["reduction"] for side in found.shape[2:]] == list(images.shape[2:])


class Pyramid(torch.nn.Module):
    out_channels = 16

    def __init__(self, name, **kwargs):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, **kwargs)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 16, LastLevelMaxPool())

    def forward(self, images):
        return self.fpn({str(level): maps for level, maps in enumerate(self.body(images))})


def test_detector():
    """torchvision's detector finds the same boxes around both, and its losses reach the connections."""
    small = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "feature_cls": "getter"}
    (name,) = hcvision.register("convnext_atto", "dfc2")
    plain, ours = (
        FasterRCNN(Pyramid(model, **small), num_classes=3, min_size=64, max_size=64).eval()
        for model in ("convnext_atto", name)
    )
    report = ours.load_state_dict(randomize(plain, std=0.1).state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(".connection" in key for key in report.missing_keys)
    image = images(64)[0]
    with torch.no_grad():
        (expected,), (found,) = plain([image]), ours([image])
    assert len(found["boxes"]) > 0
    assert all(torch.equal(found[key], expected[key]) for key in ("boxes", "labels", "scores"))
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    sum(ours.train()([image], [box]).values()).backward()
    gradients = {key: p.grad for key, p in ours.named_parameters() if key.endswith(("static_alpha", "static_beta"))}
    assert len(gradients) == 8
    assert all(grad.any() for grad in gradients.values())
