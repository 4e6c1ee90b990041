"""hcvision.models.vit: the names registered with timm, and that each is its timm twin."""

import subprocess
import sys
from itertools import product

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import hcvision
from hcvision.connections.names import build_connection, parse_connection

CONNECTIONS = [f"{kind}{rate}" for kind, rate in product(("shc", "dhc", "sfc", "dfc"), (2, 4, 8))]
CONNECTIONS += [
    "mhc4",
    "ihc4",
    "ghc2x3",
    "sihc4",
    "gr4",
    "oru",
    "laurel",
    "mhclite4",
    "krom4",
    "dense",
    "attnres",
    "attnres4",
]
CONNECTIONS += ["mudd"]
TWINS = [(f"vit_{size}_patch16_224", name) for size in ("tiny", "small", "base", "large") for name in CONNECTIONS]
SHAPES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}


def test_names():
    """Four sizes, four kinds at three rates and some successors, known to timm, none of them timm's own."""
    names = [f"{base}_{connection}" for base, connection in TWINS]
    assert sorted(hcvision.vit_names) == sorted(names)
    assert len(set(names)) == len(names)
    assert set(names) <= set(timm.list_models("vit_*"))
    assert not set(names) & set(timm.list_models(module="vision_transformer"))
    for name in names:
        assert timm.model_entrypoint(name).__name__ == name


def test_registered_by_import():
    """import hcvision registers, nothing before it does, and a second import of its parts changes nothing."""
    code = (
        "import timm\n"
        "before = set(timm.list_models())\n"
        "import hcvision\n"
        "new = set(timm.list_models()) - before\n"
        "own = {*hcvision.vit_names, *hcvision.dit_names, 'hcvision_converted'}\n"
        "assert new == own, new\n"
        "entrypoint = timm.model_entrypoint(hcvision.vit_names[0])\n"
        "import importlib, hcvision.models.vit\n"
        "importlib.reload(hcvision.models.vit)\n"
        "assert timm.model_entrypoint(hcvision.vit_names[0]) is entrypoint\n"
        "assert set(timm.list_models()) - before == new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("base", "connection"), TWINS)
def test_twin(base, connection):
    """The name's own parameters are those of timm's model under the same seed, and so are its logits."""
    torch.manual_seed(0)
    plain = timm.create_model(base, **TINY).eval()
    torch.manual_seed(0)
    twin = timm.create_model(f"{base}_{connection}", **TINY).eval()
    assert twin.connection == connection
    for key, value in plain.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value)
    x = torch.randn(2, 3, 32, 32)
    if connection in ("shc8", "dhc8", "mhc4", "ihc4", "mhclite4", "krom4", "attnres4"):  # means and sums that may round
        torch.testing.assert_close(twin(x), plain(x), rtol=1e-6, atol=1e-6)
    elif connection == "oru":  # the one that is not the residual function
        assert not torch.equal(twin(x), plain(x))
    else:
        assert torch.equal(twin(x), plain(x))


@pytest.mark.parametrize(("base", "connection"), TWINS)
def test_config(base, connection):
    """The pretrained cfg is the base's, weights included (test_names.py), and preprocessing is the same."""
    ours = timm.get_pretrained_cfg(f"{base}_{connection}").to_dict()
    theirs = timm.get_pretrained_cfg(base).to_dict()
    note = f"initial weights: those of {base}.{theirs['tag']}, trained without connections"
    assert ours == theirs | {"architecture": f"{base}_{connection}", "notes": (note,)}
    assert {"num_classes", "input_size", "pool_size", "fixed_input_size", "license"} <= ours.keys()


@pytest.mark.parametrize("size", SHAPES)
def test_full_size(size):
    """At full size, two connections a block on top of timm's parameters; preprocessing as the base's."""
    dim, depth = SHAPES[size]
    base = f"vit_{size}_patch16_224"
    plain = timm.create_model(base, device="meta")
    for kind, rate in (("shc", 4), ("dhc", 2), ("sfc", 8), ("dfc", 4)):
        model = timm.create_model(f"{base}_{kind}{rate}", device="meta")
        width = dim if kind.endswith("hc") else dim // rate
        mixtures = (1 if kind.endswith("hc") else rate) + rate
        count = rate * mixtures + rate
        if kind[0] == "d":
            count += width * mixtures + width + 2 + (width if kind == "dfc" else 0)
        extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
        assert extra == 2 * depth * count
        assert resolve_model_data_config(model) == resolve_model_data_config(plain)
        assert isinstance(model.blocks[-1].connection2, type(build_connection(f"{kind}{rate}", dim)))
        assert model.blocks[-1].connection2.layer_index == 2 * depth - 1


def test_full_size_logits():
    """One real model at its real resolution: the logits of timm's, to the bit."""
    x, logits = torch.randn(1, 3, 224, 224), []
    for suffix in ("", "_shc2", "_dfc4"):
        torch.manual_seed(0)
        model = timm.create_model(f"vit_tiny_patch16_224{suffix}").eval()
        with torch.no_grad():
            logits.append(model(x))
    assert torch.equal(logits[1], logits[0])
    assert torch.equal(logits[2], logits[0])


@pytest.mark.parametrize("kwargs", [{"foo": 1}, {"connection_foo": 1}, {"connection": "dhc2"}], ids=str)
def test_unknown_argument(kwargs):
    """An argument nobody takes is an error, not ignored."""
    with pytest.raises(
        TypeError, match=f"unexpected keyword argument '{next(iter(kwargs)).removeprefix('connection_')}'"
    ):
        timm.create_model("vit_tiny_patch16_224_dhc2", **kwargs)


@pytest.mark.parametrize("name", hcvision.vit_names[:12])
def test_options(name):
    """connection_tanh, connection_norm and connection_arrangement reach every connection, and are plain values."""
    hyper = parse_connection(name.rsplit("_", 1)[1])[0].endswith("hc")
    options = {"connection_tanh": False, "connection_norm": False}
    if hyper:
        options["connection_arrangement"] = "parallel"
    model = timm.create_model(name, **options, **TINY)
    for block in model.blocks:
        for c in (block.connection1, block.connection2):
            assert (c.tanh, c.norm) == (False, False)
            assert not hyper or c.arrangement == "parallel"


@pytest.mark.parametrize("connection", ["dhc2", "sfc2"])
def test_out_indices(connection):
    """out_indices as timm's ViTs take it: the last three by default, and harmless without features_only."""
    base, kwargs = "vit_tiny_patch16_224", TINY | {"depth": 4}
    for given in ({}, {"out_indices": (0, 3)}):
        plain, ours = (
            timm.create_model(name, features_only=True, **given, **kwargs) for name in (base, f"{base}_{connection}")
        )
        assert ours.feature_info.out_indices == plain.feature_info.out_indices
        assert ours.feature_info.channels() == plain.feature_info.channels()
        assert ours.feature_info.reduction() == plain.feature_info.reduction()
    assert timm.create_model(f"{base}_{connection}", out_indices=(0, 3), **kwargs).num_classes == 10
