import csv
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
import yaml
from conftest import randomize

import hcvision
from hcvision.cli.main import run
from hcvision.connections.base import Connection
from hcvision.connections.reference import open_gates
from hcvision.connections.streams import carry_unmixed
from hcvision.data.module import ImageData
from hcvision.models.stages import stages
from hcvision.studies.insight.callback import LogConnections
from hcvision.studies.insight.diversity import StreamDiversity, effective_rank, mean_cosine
from hcvision.studies.insight.figures import draw_classes, draw_fractions, draw_matrix, draw_similarity, draw_streams
from hcvision.studies.insight.inspection import inspect, write_stage
from hcvision.studies.insight.notes import StageNotes
from hcvision.studies.insight.tables import class_rows, similarity_rows, weight_names, weight_rows
from hcvision.studies.insight.unfolding import by_image, join_fractions, look_inside, unfold, unfolded_matrix, watch
from hcvision.training.classification import ImageClassifier
from hcvision.training.loading import load_module


def build(connection, tiny, depth=3, **kwargs):
    """A float64 ViT whose parameters are all random."""
    model = hcvision.create_model(
        "vit_tiny_patch16_224", connection, num_classes=5, **{**tiny, "depth": depth}, **kwargs
    )
    return randomize(model.double()).eval()


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@torch.no_grad()
def passages(model, x):
    seen = []
    with look_inside(model) as (inner, columns), watch(columns[0], seen.append):
        inner(x)
    return seen


KINDS = ["shc1", "shc2", "dhc2", "dhc3", "dhc4", "sfc2", "dfc2", "dfc3", "residual", "half dhc3", "half dfc2"]
KINDS += ["mhc4", "ihc3", "ghc2x3", "ghc3x4", "oru", "half oru", "mhclite3", "krom4"]
KINDS += ["dense", "attnres", "attnres3", "half dense", "half attnres"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_rebuilds_every_input(kind, tiny):
    """From the embedding and the branch outputs, token by token, to 1e-12 (SPEC 2.6); ``half``: some blocks alone."""
    half = kind.startswith("half")
    model = build(None if kind == "residual" or half else kind, tiny)
    if half:
        randomize(hcvision.convert(model, kind.split()[1], blocks="1:2"), seed=2)
    taken = []
    hook = model.norm.register_forward_pre_hook(lambda module, arguments: taken.append(arguments[0]))
    seen = passages(model, images())
    views = seen[0].view.shape[-2]
    sources = torch.stack([seen[0].streams[..., :views, :], *(p.output for p in seen)], dim=-3)  # (B, N, L+1, V, E)
    inputs = torch.stack([p.view for p in seen], dim=-3)
    rebuilt = torch.einsum("bnkvjq,bnjqe->bnkve", unfold([p.mixing for p in seen]), sources)
    assert len(seen) == 6
    assert (rebuilt[:, :, :-1] - inputs).abs().max() < 1e-12 * inputs.abs().max()
    with torch.no_grad():
        model(images())
    hook.remove()
    out = taken[-1] if kind != "residual" else taken[-1][..., : inputs.shape[-1]]
    out = out.unflatten(-1, (-1, views, sources.shape[-1])).mean(-3)  # a history has been left already
    if kind[0] != "g":  # there a linear map reads out
        assert (rebuilt[:, :, -1] - out).abs().max() < 1e-12 * out.abs().max()


def take_apart(passage, connection):
    """The mixing of a gated connection, every channel's own."""
    _, hidden, _, _ = connection.width_connection(passage.streams.flatten(-2))[1]
    alpha = carry_unmixed(open_gates(hidden, connection.gate_up, connection.gain).mT)
    return replace(passage.mixing, alpha=alpha, beta=passage.mixing.beta.unsqueeze(-2), by_channel=True)


@pytest.mark.parametrize("kind", ["sihc3", "half sihc2", "sihc2 and dhc3", "gr3"])
def test_the_matrix_of_weights_by_channel(kind, tiny):
    """Channel by channel it rebuilds every input; what is shown is the mean over channels of these matrices."""
    model = build(None if " " in kind else kind, tiny)
    if kind.startswith("half"):
        randomize(hcvision.convert(model, kind.split()[1], blocks="1:2"), seed=2)
    elif " and " in kind:
        hcvision.convert(hcvision.convert(model, "sihc2", blocks=":1"), "dhc3", blocks="1:")
        randomize(model, seed=2)
    seen = passages(model, images())
    sources = torch.stack([seen[0].streams[..., 0, :], *(p.output[..., 0, :] for p in seen)], dim=-2)  # (B, N, L+1, E)
    inputs = torch.stack([p.view[..., 0, :] for p in seen], dim=-2)
    mixings = [p.mixing for p in seen]
    if kind == "gr3":  # shown by the means of its reads, which come to the same: all channels are written alike
        own = [module for module in model.modules() if isinstance(module, Connection)]
        mixings = [take_apart(*pair) for pair in zip(seen, own, strict=True)]
    each = unfold(mixings).squeeze((-1, -3)).expand(4, sources.shape[1], 48, 7, 7)  # (B, N, E, ...)
    rebuilt = torch.einsum("bnekj,bnje->bnke", each, sources)
    assert (rebuilt[:, :, :-1] - inputs).abs().max() < 1e-12 * inputs.abs().max()
    torch.testing.assert_close(unfolded_matrix(model, images()), each.mean((0, 1, 2)), rtol=0, atol=1e-12)


def test_the_matrix_of_laurel(tiny):
    """Products of the paper's alpha and beta; a low-rank map that is a multiple of the identity is all of it shown."""
    model = build("laurel", tiny)
    layers = [module for module in model.modules() if isinstance(module, Connection)]
    factors = torch.rand(len(layers), dtype=torch.float64)
    with torch.no_grad():
        for layer, factor in zip(layers, factors, strict=True):  # of rank 16, 3 times factor in 16 of 48 channels
            layer.low_rank_a.copy_(torch.eye(16, 48))
            layer.low_rank_b.copy_(3 * factor * torch.eye(48, 16, dtype=torch.float64))
    alpha, beta = (torch.cat([2 * getattr(one, f"logit_{n}").sigmoid() for one in layers]) for n in ("alpha", "beta"))
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for k in range(7):
        for j in range(k + 1):
            kept = (beta * (1 + factors))[j:k].prod()
            expected[k, j] = kept * (alpha[j - 1] if j else 1)
    torch.testing.assert_close(unfolded_matrix(model, images(1)), expected.detach(), rtol=1e-12, atol=1e-12)


def test_static_weights_by_the_formula_of_the_paper(tiny):
    """c[k, j] = B^j (prod A_r) A_m^k, and the mean at the end, multiplied out."""
    model = build("shc3", tiny)
    layers = [module for module in model.modules() if isinstance(module, Connection)]
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for k in range(7):
        read = layers[k].static_alpha[:, 0] if k < 6 else torch.full((3,), 1 / 3, dtype=torch.float64)
        for j in range(k + 1):
            row = torch.ones(3, dtype=torch.float64) if j == 0 else layers[j - 1].static_beta
            for layer in layers[j:k]:
                row = row @ layer.static_alpha[:, 1:]
            expected[k, j] = row @ read
    torch.testing.assert_close(unfolded_matrix(model, images(1)), expected.detach(), rtol=0, atol=1e-12)


def test_fractions_by_hand(tiny):
    """Two sub-layers of a static FC: the same products, with the fractions apart."""
    model = build("sfc2", tiny, depth=1)
    (first, second) = [m for m in model.modules() if isinstance(m, Connection)]
    eye = torch.eye(2, dtype=torch.float64)
    a_m, a_r = (first.static_alpha[:, :2].T, second.static_alpha[:, :2].T), first.static_alpha[:, 2:].T
    end = second.static_alpha[:, 2:].T
    with torch.no_grad():
        write = [torch.diag(layer.static_beta) for layer in (first, second)]
        rows = [[a_m[0] @ eye], [a_m[1] @ a_r, a_m[1] @ write[0]], [end @ a_r, end @ write[0], write[1]]]
    whole = unfolded_matrix(model, images(1), per_fraction=True)  # input, fraction, output, fraction
    joined = unfolded_matrix(model, images(1))
    assert whole.shape == (3, 2, 3, 2)
    for k, row in enumerate(rows):
        for j, block in enumerate(row):
            torch.testing.assert_close(whole[k, :, j], block, rtol=0, atol=1e-12)
            torch.testing.assert_close(joined[k, j], block.sum(1).mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["dhc3", "mhc4", "ghc2x3", "dfc2", "ihc2", "sihc2", "gr2", "mhclite3", "krom4"])
def test_mixing_and_its_product(kind, tiny, tmp_path):
    """Row i of a mixing matrix makes the next stream i; products go from the first sub-layer on, token by token."""
    model = build(kind, tiny)
    stage, seen = StageNotes(model.blocks), []
    with watch(model.blocks, stage.note), watch(model.blocks, seen.append), torch.no_grad():
        model(images())
    product = None
    for k, passage in enumerate(seen):
        views = passage.view.shape[-2]
        own = passage.mixing.mixing_matrix
        product = own if product is None else own @ product
        written = passage.after - own @ passage.streams  # beta times the output
        if kind not in ("ghc2x3", "dfc2", "sihc2"):
            torch.testing.assert_close(written, passage.mixing.beta[..., None] * passage.output, rtol=0, atol=1e-10)
        torch.testing.assert_close(stage.products[k][0].double(), product.mean(1), rtol=1e-4, atol=1e-4)
        sums = [part.abs().sum(dim).amax(-1).mean(1) for part in (own, product) for dim in (-1, -2)]
        torch.testing.assert_close(stage.gains[k][0].double(), torch.stack(sums, dim=-1), rtol=1e-4, atol=1e-4)
    if kind in ("mhc4", "mhclite3", "krom4"):
        assert (torch.cat(stage.gains[-1]) - 1).abs().max() < 0.05  # doubly stochastic, and so is the product
    write_stage(tmp_path, stage, None, torch.tensor([0, 1, 1, 0]), ["a", "b"])
    rows = read(tmp_path / "mixing.csv")
    count = seen[0].streams.shape[-2]
    assert len(rows) == 6 * count**2
    part = "fraction" if views > 1 else "stream"
    assert [*rows[0]] == ["sub-layer", f"next {part}", f"of {part}", "weight", "std", "product"]
    last = {(int(row[f"next {part}"]), int(row[f"of {part}"])): float(row["product"]) for row in rows[-(count**2) :]}
    expected = product.mean((0, 1))
    assert all(abs(last[i, j] - expected[i, j]) < 1e-3 for i in range(count) for j in range(count))
    assert [*read(tmp_path / "gains.csv")[0]] == [
        "sub-layer",
        "forward",
        "backward",
        "forward, product",
        "backward, product",
    ]
    assert len(read(tmp_path / "weights.csv")) == 6 * count * (views + count + (views if kind[0] == "g" else 1))
    assert (tmp_path / "mixing.png").exists()


@pytest.mark.parametrize("kind", ["oru", "laurel"])
def test_files_of_one_stream(kind, tiny, tmp_path):
    """No mixing to show; weights of what is carried, read and written, of oru as its tokens came to."""
    model = build(kind, tiny)
    stage, seen = StageNotes(model.blocks), []
    with watch(model.blocks, stage.note), watch(model.blocks, seen.append), torch.no_grad():
        model(images())
    write_stage(tmp_path, stage, None, torch.tensor([0, 1, 1, 0]), ["a", "b"])
    assert not (tmp_path / "mixing.csv").exists()
    assert (tmp_path / "matrix.png").exists()
    if kind == "oru":
        x, output = seen[2].streams[:, :, 0], seen[2].output[:, :, 0]
        along = (x * output).sum(-1) / (x.square().sum(-1) + 1e-6)
        torch.testing.assert_close(stage.alphas[2][0][:, 0, 1], 1 - along.mean(1).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [None, "shc1", "dhc2", "dhc4", "sfc4", "dfc2", "ghc2x3", "dense", "attnres"])
def test_at_init_every_model_is_residual(kind, tiny):
    model = hcvision.create_model("vit_tiny_patch16_224", kind, num_classes=5, **tiny)
    matrix = unfolded_matrix(model, torch.randn(2, 3, 32, 32))
    assert torch.equal(matrix, torch.ones(5, 5).tril())
    assert model.training
    assert not any("width_connection" in vars(module) for module in model.modules())


def test_dynamic_weights_are_averaged_after_unfolding(tiny):
    """Over tokens, then images; the product of averages is something else."""
    model = build("dhc2", tiny)
    each = torch.stack([unfolded_matrix(model, image[None]) for image in images()])
    matrix = unfolded_matrix(model, images())
    torch.testing.assert_close(matrix, each.mean(0), rtol=0, atol=1e-12)
    mixings = [p.mixing for p in passages(model, images())]
    tokens = join_fractions(unfold(mixings))  # (B, N, L+1, L+1)
    torch.testing.assert_close(matrix, tokens.mean((0, 1)), rtol=0, atol=1e-12)
    for mixing in mixings:
        mixing.alpha, mixing.beta = mixing.alpha.mean((0, 1), True), mixing.beta.mean((0, 1), True)
    assert (join_fractions(unfold(mixings))[0, 0] - matrix).abs().max() > 1e-3


def test_what_it_takes(tiny, tiny_dit):
    """A Lightning module, a DiT with its three arguments, one stage of several; and what it refuses."""
    module = ImageClassifier("vit_tiny_patch16_224", connection="dhc2", num_classes=5, model_args=tiny)
    assert unfolded_matrix(module, torch.randn(1, 3, 32, 32)).shape == (5, 5)
    dit = timm.create_model("dit_tiny_patch4_pixel_dfc2", num_classes=3, **tiny_dit)
    arguments = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 3])
    assert unfolded_matrix(dit, arguments).shape == (5, 5)
    sizes = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 1, 1), "num_heads": (1, 2, 4)}
    swin = hcvision.create_model("swin_tiny_patch4_window7_224", "dhc2", num_classes=3, **sizes)
    x = torch.randn(2, 3, 64, 64)
    assert [len(stage) for stage in stages(swin)] == [2, 1, 1]
    assert [unfolded_matrix(swin, x, stage=number).shape[0] for number in range(3)] == [5, 3, 3]
    for wrong in (None, 3):
        with pytest.raises(ValueError, match=rf"stage must be one of 0 to 2, .*SwinTransformer, got {wrong}"):
            unfolded_matrix(swin, x, stage=wrong)
    with pytest.raises(ValueError, match="cannot convert a ResNet"):
        unfolded_matrix(timm.create_model("resnet18"), x)
    mixed = hcvision.convert(hcvision.create_model("vit_tiny_patch16_224", **tiny), "dfc2", blocks=":1")
    hcvision.convert(mixed, "dhc2", blocks="1:")
    with pytest.raises(ValueError, match="sub-layers with 1 and 2 views have no matrix in common"):
        unfolded_matrix(mixed, torch.randn(1, 3, 32, 32))
    pool = hcvision.create_model("poolformer_s12", "dfc2", num_classes=3)
    assert unfolded_matrix(pool, torch.randn(1, 3, 64, 64), stage=0).shape == (5, 5)
    scaled = randomize(hcvision.create_model("caformer_s18", "dhc2", num_classes=3))
    with pytest.raises(ValueError, match="a block that scales its streams itself cannot be looked into"):
        unfolded_matrix(scaled, torch.randn(1, 3, 64, 64), stage=3)
    assert not any("width_connection" in vars(module) for module in scaled.modules())


def test_a_model_in_training_is_looked_at_as_in_evaluation(tiny):
    model = build("dhc2", tiny, drop_path_rate=0.5)
    expected = unfolded_matrix(model, images())
    model.train()
    model.norm.eval()
    state = torch.get_rng_state()
    assert torch.equal(unfolded_matrix(model, images()), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module for module in model.modules() if not module.training] == [model.norm]


def test_watching_inside_watching(tiny):
    """Each counts what passes meanwhile; at the end nothing is left in the model."""
    model, seen = build("dhc2", tiny), []
    expected = unfolded_matrix(model, images())
    (blocks,) = stages(model)
    with torch.no_grad(), watch(blocks, seen.append):
        assert torch.equal(unfolded_matrix(model, images()), expected)
        assert len(seen) == 6
        model(images())
        assert len(seen) == 12
    for half in (seen[:6], seen[6:]):
        assert torch.equal(join_fractions(unfold([p.mixing for p in half], by_image).mean(0)), expected)
    model(images())
    assert len(seen) == 12
    assert not any({"width_connection", "depth_connection"} & {*vars(module)} for module in model.modules())


def test_autocast_does_not_round_the_matrix(tiny):
    """The weights are those of the forward pass in bfloat16, what is made of them is float32."""
    model, x, seen = build("dhc2", tiny).float(), images().float(), []
    plain = unfolded_matrix(model, x)
    with torch.autocast("cpu", torch.bfloat16), watch(stages(model)[0], seen.append):
        matrix = unfolded_matrix(model, x)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, join_fractions(unfold([p.mixing for p in seen], by_image).mean(0)))
    assert not torch.equal(matrix, plain)
    torch.testing.assert_close(matrix, plain, rtol=0.05, atol=0.05)


def test_a_wrapper_that_gives_features(tiny):
    name, tiny["depth"] = "vit_tiny_patch16_224", 3
    features = randomize(hcvision.create_model(name, "dhc2", features_only=True, **tiny))
    model = hcvision.create_model(name, "dhc2", num_classes=5, **tiny)
    missing, unexpected = model.load_state_dict(features.model.state_dict(), strict=False)
    assert not unexpected
    assert {key.partition(".")[0] for key in missing} <= {"norm", "head"}
    x = images().float()
    assert torch.equal(unfolded_matrix(features, x), unfolded_matrix(model, x))


def test_stages_end_where_streams_do(tiny):
    """At ConViT's class token, at Hiera's wider blocks, which have no connections, and at any change of width."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "local_up_to_layer": 2}
    convit = timm.create_model("convit_tiny", **small)
    assert stages(convit) == [[*convit.blocks[:2]], [convit.blocks[2]]]
    depths = {"stages": (2, 3, 2, 1), "embed_dim": 16, "num_heads": 1, "img_size": (64, 64)}
    hiera = timm.create_model("hiera_tiny_224", **depths)
    assert stages(hiera) == [[*hiera.blocks[:2]], [*hiera.blocks[3:5]], [hiera.blocks[6]]]
    vit = timm.create_model("vit_tiny_patch16_224", **tiny)
    wide = timm.create_model("vit_tiny_patch16_224", **{**tiny, "embed_dim": 96})
    vit.blocks.extend([*wide.blocks])
    assert stages(vit) == [[*vit.blocks[:2]], [*vit.blocks[2:]]]


def test_notes_of_a_stage(tiny):
    """Cosines, norms, likeness and weights against the definition, over batches of different sizes."""
    model = build("dhc2", tiny, depth=2)
    x = images(5)
    seen = passages(model, x)
    (blocks,) = stages(model)
    notes = StageNotes(blocks)
    with torch.no_grad(), watch(blocks, notes.note):
        for batch in x.split(2):
            model(batch)
    assert notes.names == ["attention 0", "MLP 0", "attention 1", "MLP 1"]
    inputs = [p.view.squeeze(-2) for p in seen]
    for k in range(3):
        cosine = (inputs[k] * inputs[k + 1]).sum(-1) / inputs[k].norm(dim=-1) / inputs[k + 1].norm(dim=-1)
        levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
        expected = cosine.flatten().quantile(levels).float()
        torch.testing.assert_close(notes.similarity()[k], expected, rtol=0, atol=1e-4)
    rows = notes.stream_rows()
    streams = [p.streams for p in seen] + [seen[-1].after]
    for number, row in enumerate(rows):
        h = streams[number // 2]
        assert row["norm"] == pytest.approx(h[..., number % 2, :].norm(dim=-1).mean().item(), rel=1e-5)
        unit = h / h.norm(dim=-1, keepdim=True)
        assert row["cosine between streams"] == pytest.approx(
            (unit[..., 0, :] * unit[..., 1, :]).sum(-1).mean().item(), abs=1e-5
        )
        p = torch.linalg.svdvals(h)
        p = p / p.sum(-1, keepdim=True)
        rank = (-p * p.log()).sum(-1).exp().mean().item()
        assert row["effective rank"] == pytest.approx(rank, abs=1e-5)
        assert 1 < rank < 2
    each = join_fractions(unfold([p.mixing for p in seen], by_image))
    mean, spread = notes.matrix()
    torch.testing.assert_close(mean, each.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(spread, each.std(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(notes.betas[2]).double(), seen[2].mixing.beta.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat(notes.alphas[3]).double(), seen[3].mixing.alpha.mean(1), rtol=0, atol=1e-6)


def test_names_of_weights():
    """In the order of alpha (S, V+S), row by row, and beta (S,)."""
    assert weight_names(2, 1) == [
        "stream 0 -> view", "stream 0 -> stream 0", "stream 0 -> stream 1",
        "stream 1 -> view", "stream 1 -> stream 0", "stream 1 -> stream 1", "output -> stream 0", "output -> stream 1",
    ]  # fmt: skip
    assert weight_names(2, 2)[:3] == ["stream 0 -> view 0", "stream 0 -> view 1", "stream 0 -> stream 0"]


LABELS = torch.tensor([4, 0, 2, 0, 2, 2, 2])


def noted(kind, tiny):
    """Notes of a model with random weights on images of three classes, and what they were made from."""
    model, x = build(kind, tiny, depth=2), images(7)
    notes = StageNotes(stages(model)[0])
    with torch.no_grad(), watch(notes.blocks, notes.note):
        model(x)
    return notes, [(p.mixing.alpha.mean(1), p.mixing.beta.mean(1)) for p in passages(model, x)]


def close(given, expected, atol=1e-5):
    given = torch.as_tensor(np.asarray(given), dtype=torch.float64)
    torch.testing.assert_close(given, torch.as_tensor(expected).double(), rtol=0, atol=atol)


def labels_of(axes, which):
    """Texts and colours of tick labels."""
    found = getattr(axes, f"get_{which}ticklabels")()
    return [label.get_text() for label in found], [label.get_color() for label in found]


def test_rows_of_weights(tiny):
    """Mean and standard deviation over images, of all and of each class, by their definition."""
    notes, weights = noted("dhc2", tiny)
    rows, by_class = weight_rows(notes), class_rows(notes, LABELS, ["a", "b", "c", "d", "e"])
    assert len(rows) == 4 * 8
    assert len(by_class) == 3 * len(rows)
    for k, (alpha, beta) in enumerate(weights):
        each = torch.cat([alpha.flatten(1), beta], dim=1)
        mine = [row for row in rows if row["sub-layer"] == notes.names[k]]
        assert [row["weight"] for row in mine] == weight_names(2, 1)
        close([float(row["mean"]) for row in mine], each.mean(0))
        close([float(row["std"]) for row in mine], (each - each.mean(0)).square().sum(0).div(6).sqrt())
        for name, label, count in (("a", 0, 2), ("c", 2, 4), ("e", 4, 1)):
            mine = [row for row in by_class if (row["sub-layer"], row["class"]) == (notes.names[k], name)]
            assert {row["images"] for row in mine} == {count}
            own = each[label == LABELS]
            close([float(row["mean"]) for row in mine], own.mean(0))
            spread = (own - own.mean(0)).square().sum(0).div(max(count - 1, 1)).sqrt()
            close([float(row["std"]) for row in mine], spread)
    assert max(float(row["std"]) for row in rows) > 1e-3


@pytest.mark.parametrize("kind", ["dhc2", "dfc2"])
def test_classes_as_drawn(kind, tiny):
    """Class minus mean over classes, each counted once; of a fraction the view that is its own."""
    notes, weights = noted(kind, tiny)
    written, read = [], []
    for alpha, beta in weights:
        for values, panel in ((beta, written), (alpha, read)):
            means = torch.stack([values[label == LABELS].mean(0) for label in (0, 2, 4)])
            panel.append(means - means.mean(0))
    own = [[0, 0], [1, 1]] if kind == "dfc2" else [[0, 0], [1, 0]]  # stream and view
    read = [values[:, stream, view, None] for values in read for stream, view in own]
    above, below, *_ = draw_classes(notes, LABELS, ["a", "c", "e$"]).axes
    for axes, panel, title in ((above, written, "take of an output"), (below, read, "branch reads")):
        (picture,) = axes.images
        expected = torch.cat(panel, dim=1)
        close(picture.get_array(), expected)
        top = expected.abs().max().item()
        assert picture.get_clim() == pytest.approx((-top, top), abs=1e-5)
        assert is_blue(picture, top)
        assert is_red(picture, -top)
        assert title in axes.get_title()
        assert labels_of(axes, "y")[0] == ["a", "c", r"e\$"]
    assert labels_of(below, "x") == (notes.names, ["#d1495b", "#00798c"] * 2)
    assert [*below.get_xticks()] == [0, 2, 4, 6]


def is_blue(picture, value):
    red, _, blue, _ = picture.to_rgba(value)
    return blue > 2 * red


def is_red(picture, value):
    red, _, blue, _ = picture.to_rgba(value)
    return red > 2 * blue


def test_the_matrix_as_drawn(tiny):
    """Red below zero, blue above, white above the diagonal; the spread from white to black."""
    notes, _ = noted("dhc2", tiny)
    mean, spread = notes.matrix()
    figure = draw_matrix(mean, spread, notes.names)
    left, right = (axes for axes in figure.axes if axes.images)
    for axes, values in ((left, mean), (right, spread)):
        (picture,) = axes.images
        shown = picture.get_array()
        lower = torch.ones(5, 5).tril().bool()
        assert (torch.tensor(shown.mask.tolist()) == ~lower).all()
        close(shown.filled(0), values.tril())
        top = values.tril().abs().max().item()
        assert picture.get_clim() == pytest.approx((-top if axes is left else 0, top))
        texts = {(round(t.get_position()[1]), round(t.get_position()[0])): float(t.get_text()) for t in axes.texts}
        assert {*texts} == {(k, j) for k in range(5) for j in range(k + 1)}
        assert all(texts[k, j] == pytest.approx(values[k, j].item(), abs=6e-3) for k, j in texts)
        colors = ["#d1495b", "#00798c"] * 2
        assert labels_of(axes, "x") == (["embedding", *notes.names], ["black", *colors])
        assert labels_of(axes, "y") == ([*notes.names, "read-out"], [*colors, "black"])
    (signed,), (grey,) = left.images, right.images
    assert is_blue(signed, signed.get_clim()[1])
    assert is_red(signed, signed.get_clim()[0])
    assert [sum(grey.to_rgba(value)[:3]) for value in grey.get_clim()] == pytest.approx([3, 0], abs=0.05)
    assert (left.get_xlabel(), left.get_ylabel()) == ("output of", "input of")


def test_fractions_as_drawn(tiny):
    notes, _ = noted("dfc2", tiny)
    axes = draw_fractions(notes.fractions, notes.names).axes[0]
    shown = axes.images[0].get_array()
    for k, v, j, q in itertools.product(range(5), range(2), range(5), range(2)):
        value = shown[2 * k + v, 2 * j + q]
        assert value is np.ma.masked if j > k else value == pytest.approx(notes.fractions[k, v, j, q].item())
    assert [*axes.get_xticks()] == [*axes.get_yticks()] == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert labels_of(axes, "x")[0] == ["embedding", *notes.names]
    assert labels_of(axes, "y")[0] == [*notes.names, "read-out"]


def test_similarity_as_drawn(tiny):
    """The median as a line and 5 to 95 % as a band, of the model and of its twin."""
    notes, twin = noted("dhc2", tiny)[0], noted("shc1", tiny)[0]
    (axes,) = draw_similarity(notes, twin).axes
    for line, band, looked in zip(axes.lines, axes.collections, (notes, twin), strict=True):
        low, median, high = looked.similarity().T.tolist()
        assert [*line.get_xdata()] == [1, 2, 3]
        close(line.get_ydata(), median)
        points = [tuple(point) for point in band.get_paths()[0].vertices.tolist()]
        for place in (1, 2, 3):
            heights = [y for x, y in points if x == place]
            assert (min(heights), max(heights)) == pytest.approx((low[place - 1], high[place - 1]))
        assert all(a < b < c for a, b, c in zip(low, median, high, strict=True))
    assert [line.get_color() for line in axes.lines] == ["#00798c", "#444444"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["with connections", "residual twin"]
    assert labels_of(axes, "x") == (notes.names[1:], ["#00798c", "#d1495b", "#00798c"])
    rows = similarity_rows(notes, twin)
    assert [row["and"] for row in rows] == notes.names[1:]
    for prefix, looked in (("", notes), ("residual ", twin)):
        given = [[float(row[f"{prefix}{level}"]) for level in ("5 %", "median", "95 %")] for row in rows]
        close(given, looked.similarity())


def test_effective_rank_by_hand():
    """1 of equal streams and of zeros, S of orthogonal ones of a length; exp of the entropy of 3/4 and 1/4."""
    one = torch.ones(3, 4) * torch.tensor([[1.0], [2.0], [-3.0]])
    assert effective_rank(one).item() == pytest.approx(1, abs=1e-6)
    assert effective_rank(0 * one).item() == 1
    assert effective_rank(5 * torch.eye(3, 4)).item() == pytest.approx(3, abs=1e-6)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    rows = turn @ torch.tensor([[3.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)  # singular values 3 and 1
    expected = (4 / 3) ** 0.75 * 4**0.25
    assert effective_rank(torch.stack([rows, 7 * rows])).tolist() == pytest.approx([expected] * 2, abs=1e-12)
    assert mean_cosine(one).item() == pytest.approx((1 - 1 - 1) / 3, abs=1e-6)


def test_streams_in_the_end(tiny, trainer_args, image_folder):
    """Means over all tokens of what is behind the last connection, whatever the batches; 1 without connections."""
    for connection, size in (("dhc2", 8), ("dfc2", 39), (None, 8)):
        model = ImageClassifier("vit_tiny_patch16_224", connection=connection, num_classes=3, model_args=tiny)
        randomize(model.model, std=0.3)
        data = ImageData(root=str(image_folder), batch_size=size, num_workers=0)
        diversity = StreamDiversity()
        pl.Trainer(**trainer_args, callbacks=[diversity]).validate(model, data, verbose=False)
        if connection is None:
            assert (diversity.rank, diversity.cosine) == (1, None)
            continue
        images = torch.cat([batch.images for batch in data.evaluation_loader("val", model.data_config)])
        (blocks,) = stages(model.model)
        notes = StageNotes(blocks)
        with torch.no_grad(), watch(blocks, notes.note):
            model.model.eval()(images)
        last = notes.stream_rows()[-1]
        assert diversity.rank == pytest.approx(last["effective rank"], abs=1e-4)
        assert diversity.cosine == pytest.approx(last[f"cosine between {notes.part}s"], abs=1e-4)
        assert not any("depth_connection" in vars(part) for block in blocks for part in block.children())


def test_streams_as_drawn(tiny):
    notes, _ = noted("dhc2", tiny)
    rows = notes.stream_rows()
    norms, alike, ranks = draw_streams(notes).axes
    for stream, line in enumerate(norms.lines):
        assert line.get_label() == f"stream {stream}"
        assert [*line.get_xdata()] == [0, 1, 2, 3, 4]
        close(line.get_ydata(), [row["norm"] for row in rows if row["stream"] == stream])
    (line,) = alike.lines
    known = [row["cosine between streams"] for row in rows if row["stream"] == 0]
    close(line.get_ydata(), known)
    assert [*line.get_xdata()] == [0, 1, 2, 3, 4]
    close(ranks.lines[0].get_ydata(), [row["effective rank"] for row in rows if row["stream"] == 0])
    for axes in (norms, alike, ranks):
        assert labels_of(axes, "x")[0] == [*notes.names, "end"]


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """Runs of a residual, a dhc2 and a dfc2 ViT, and of a DiT, with random weights."""
    place = tmp_path_factory.mktemp("runs")
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    dit = {"img_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}
    kinds = {
        "residual": ("classify", "vit_tiny_patch16_224", tiny),
        "dhc2": ("classify", "vit_tiny_patch16_224", tiny),
        "dfc2": ("classify", "vit_tiny_patch16_224", tiny),
        "shc2": ("generate", "dit_tiny_patch4_pixel", dit),
    }
    for connection, (task, name, arguments) in kinds.items():
        config = {
            "task": task,
            "run": str(place / connection),
            "model": {"model": name, "model_args": arguments, "connection": connection, "lr": 1e-2},
            "data": {"dataset": "folder", "root": str(image_folder), "batch_size": 24, "num_workers": 0},
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        }
        if connection == "dfc2":
            config["model"]["ema_decay"] = 0.5
        if task == "classify":
            config["trainer"]["callbacks"] = [{"class_path": "hcvision.studies.LogConnections"}]
        (place / f"{connection}.yaml").write_text(yaml.safe_dump(config))
        run(["fit", "--config", str(place / f"{connection}.yaml")])
    return place


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def spread_images(module, image_folder, count):
    """So many of the 39 validation images, evenly spread."""
    data = ImageData(dataset="folder", root=str(image_folder), num_workers=0)
    data.setup("validate")
    base, indices = data.stages["val"]
    data.stages["val"] = (base, [indices[i * 39 // count] for i in range(count)])
    pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False).validate(
        module, data, verbose=False
    )
    return next(iter(data.val_dataloader()))


def read_matrix(path):
    return torch.tensor([[float(value) for value in [*row.values()][1:]] for row in read(path)])


def test_inspect_writes_what_it_promises(runs, tmp_path, capsys, image_folder):
    run(
        [
            "inspect",
            str(runs / "dhc2"),
            f"--out={tmp_path / 'x'}",
            f"--twin={runs / 'residual'}",
            "--images=20",
            "--batch_size=8",
        ]
    )
    said = capsys.readouterr().out
    assert "20 validation images, 4 sub-layers" in said
    assert "in the residual twin" in said
    names = {"matrix", "similarity", "streams", "classes", "mixing"}
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        *(f"{name}.png" for name in names), *(f"{name}.csv" for name in {*names, "matrix_spread", "weights", "gains"})
    }  # fmt: skip
    module = ImageClassifier.load_from_checkpoint(runs / "dhc2" / "checkpoints" / "best.ckpt", weights_only=True).eval()
    batch = spread_images(module, image_folder, 20)
    expected = unfolded_matrix(module, batch.images)
    rows = read(tmp_path / "x" / "matrix.csv")
    assert [row["input"] for row in rows] == ["attention 0", "MLP 0", "attention 1", "MLP 1", "read-out"]
    given = torch.tensor([[float(value) for value in list(row.values())[1:]] for row in rows])
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)
    assert (given - torch.ones(5, 5).tril()).abs().max() > 1e-3, "it has learned nothing"
    classes = read(tmp_path / "x" / "classes.csv")
    assert {row["class"] for row in classes} == {"left-out", "müller straße", "zebra"}
    alpha, beta = module.model.blocks[1].connection2.weights(torch.zeros(1, 96))  # what they are without their input
    weights = {(row["sub-layer"], row["weight"]): float(row["mean"]) for row in read(tmp_path / "x" / "weights.csv")}
    assert weights["MLP 1", "stream 1 -> view"] == pytest.approx(alpha[0, 1, 0].item(), abs=0.02)
    assert weights["MLP 1", "output -> stream 1"] == pytest.approx(beta[0, 1].item(), abs=0.02)
    per_class = [float(r["mean"]) for r in classes if (r["sub-layer"], r["weight"]) == ("MLP 1", "output -> stream 1")]
    assert [*classes[0]] == ["class", "images", "sub-layer", "weight", "mean", "std"]
    counts = [len([label for label in batch.targets.tolist() if label == k]) for k in range(3)]
    mean = sum(count * value for count, value in zip(counts, per_class, strict=True)) / 20
    assert mean == pytest.approx(weights["MLP 1", "output -> stream 1"], abs=1e-5)
    twin = read(tmp_path / "x" / "similarity.csv")
    assert [*twin[0]] == [
        "inputs of",
        "and",
        "5 %",
        "median",
        "95 %",
        "residual 5 %",
        "residual median",
        "residual 95 %",
    ]
    assert twin[0]["median"] != twin[0]["residual median"]


def test_inspect_fractions_and_diffusion(runs, tmp_path):
    inspect(str(runs / "dfc2"), str(tmp_path / "f"), images=8)
    rows = read(tmp_path / "f" / "fractions.csv")
    assert len(rows) == 15 * 4  # the lower triangle of 5 x 5, by 2 x 2
    assert (tmp_path / "f" / "fractions.png").is_file()
    assert "cosine between fractions" in read(tmp_path / "f" / "streams.csv")[0]
    inspect(str(runs / "shc2"), str(tmp_path / "d"), images=8)
    assert {path.stem for path in (tmp_path / "d").iterdir()} == {
        *("matrix", "similarity", "streams", "weights", "mixing", "gains")
    }
    inspect(
        str(runs / "residual"), images=4, data={"dataset": "folder", "root": str(read_root(runs)), "num_workers": 0}
    )
    rows = read(runs / "residual" / "inspect" / "matrix.csv")
    assert [float(value) for value in list(rows[2].values())[1:]] == [1, 1, 1, 0, 0]


def read_root(runs):
    return yaml.safe_load((runs / "residual" / "config.yaml").read_text())["data"]["root"]


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_inspect_takes_the_weights_that_it_is_asked_for(weights, runs, tmp_path, image_folder):
    checkpoint = torch.load(runs / "dfc2" / "checkpoints" / "best.ckpt", weights_only=True)
    module, _ = load_module(runs / "dfc2" / "checkpoints" / "best.ckpt")
    batch = spread_images(module, image_folder, 8)
    given = {}
    for name, key in (("ema", "state_dict"), ("raw", "current_model_state")):
        module.load_state_dict(checkpoint[key])
        given[name] = unfolded_matrix(module, batch.images)
    assert (given["ema"] - given["raw"]).abs().max() > 1e-3
    run(["inspect", str(runs / "dfc2"), f"--out={tmp_path / 'x'}", "--images=8", f"--weights={weights}"])
    torch.testing.assert_close(read_matrix(tmp_path / "x" / "matrix.csv"), given[weights], rtol=0, atol=1e-5)


def test_a_checkpoint_alone(runs, tmp_path, image_folder, tiny):
    """What it holds is written beside it; with other blocks it is nobody's twin, which is said before any writing."""
    module = ImageClassifier("vit_tiny_patch16_224", num_classes=3, model_args={**tiny, "depth": 3})
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    module.trainer = trainer
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "alone.ckpt")
    data = {"dataset": "folder", "root": str(image_folder)}
    inspect(str(tmp_path / "alone.ckpt"), images=4, data=data)
    assert {path.name for path in tmp_path.iterdir()} == {"alone.ckpt", "alone.inspect"}
    assert torch.equal(read_matrix(tmp_path / "alone.inspect" / "matrix.csv"), torch.ones(7, 7).tril())
    with pytest.raises(ValueError, match=r"alone\.ckpt is no residual twin of .*residual: other blocks, or"):
        inspect(str(runs / "residual"), str(tmp_path / "new"), twin=str(tmp_path / "alone.ckpt"), data=data)
    assert not (tmp_path / "new").exists()


def test_data_that_moved(runs, tmp_path, image_folder):
    """--data.root alone changes where the run's data are and nothing else of them; with a dataset they are others."""
    run = str(shutil.copytree(runs / "dhc2", tmp_path / "moved", ignore=shutil.ignore_patterns("inspect")))
    config = yaml.safe_load((tmp_path / "moved" / "config.yaml").read_text())
    config["data"] |= {"root": str(tmp_path / "gone"), "crop_pct": 0.5}
    (tmp_path / "moved" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"the data of .*moved are not known: .*gone.*; --data names some"):
        inspect(run, images=4)
    root = {"root": str(image_folder)}
    given = {
        "moved": root,
        "same": {"dataset": "folder", "crop_pct": 0.5, **root},
        "other": {"dataset": "folder", **root},
    }
    for name, data in given.items():
        inspect(run, str(tmp_path / "out" / name), images=4, data=data)
    moved, same, other = ((tmp_path / "out" / name / "similarity.csv").read_text() for name in given)
    assert moved == same != other


def test_the_callback_logs_the_matrix(runs):
    """After each epoch, of a model with connections; residual adds are nothing to log."""
    files = sorted(path.name for path in (runs / "dhc2" / "connections").iterdir())
    assert files == [f"stage0-step{step:06}.{kind}" for step in (3, 6) for kind in ("csv", "png")]
    first, last = (read(runs / "dhc2" / "connections" / name) for name in files[::2])
    assert first[-1]["embedding"] != last[-1]["embedding"]
    module = ImageClassifier.load_from_checkpoint(runs / "dhc2" / "checkpoints" / "last.ckpt", weights_only=True)
    assert float(last[-1]["MLP 1"]) == pytest.approx(
        module.model.blocks[1].connection2.static_beta.mean().item(), abs=0.02
    )
    with pytest.raises(ValueError, match="images and every_n_epochs must be at least 1, got 0 and 1"):
        LogConnections(images=0)


@pytest.fixture
def fit(image_folder, trainer_args):
    """Fit a module with the callback, three steps an epoch."""

    def fit(module, callback, epochs):
        data = ImageData(dataset="folder", root=str(image_folder), batch_size=24, num_workers=0)
        trainer = pl.Trainer(**trainer_args, max_epochs=epochs, num_sanity_val_steps=0, callbacks=[callback])
        trainer.fit(module, data)
        return trainer, next(iter(data.val_dataloader())).images

    return fit


def test_the_callback_logs_what_it_is_asked_for(fit, tiny, tmp_path):
    """Of three images, after every second epoch."""
    module = ImageClassifier("vit_tiny_patch16_224", connection="dhc2", num_classes=3, model_args=tiny, lr=1e-2)
    _, x = fit(module, LogConnections(images=3, every_n_epochs=2), 3)
    files = sorted(path.name for path in (tmp_path / "connections").glob("*.csv"))
    assert files == ["stage0-step000003.csv", "stage0-step000009.csv"]
    given = read_matrix(tmp_path / "connections" / files[-1])
    torch.testing.assert_close(given, unfolded_matrix(module, x[:3]), rtol=0, atol=2e-6)
    assert (given - unfolded_matrix(module, x)).abs().max() > 1e-5


def test_the_callback_says_once_that_there_is_no_matrix(fit, tiny, tmp_path, monkeypatch):
    """And training goes on; without blocks it does not begin."""
    module = ImageClassifier("vit_tiny_patch16_224", num_classes=3, model_args=tiny)
    hcvision.convert(hcvision.convert(module.model, "dfc2", blocks=":1"), "dhc2", blocks="1:")
    with pytest.warns(UserWarning, match="no matrix of connections is logged: sub-layers with 1 and 2 views") as said:
        trainer, _ = fit(module, LogConnections(), 2)
    assert len([one for one in said if "no matrix of connections" in str(one.message)]) == 1
    assert trainer.global_step == 6
    assert not (tmp_path / "connections").exists()
    assert not any("width_connection" in vars(part) for part in module.modules())
    monkeypatch.setattr(ImageClassifier, "training_step", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match="cannot convert a ResNet"):
        fit(ImageClassifier("resnet18", num_classes=3), LogConnections(), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no nowhere"),
        (["{runs}/dhc2", "--images=0"], "images and batch_size must be at least 1, got 0 and 64"),
        (["{runs}/dhc2", "--out={runs}"], "exists; --overwrite true writes into it"),
        (["{runs}/dhc2", "--twin={runs}/shc2", "--out={runs}/new"], "shc2 is no residual twin of "),
        (["{runs}/dhc2", "--twin={runs}/dfc2", "--out={runs}/new"], "dfc2 is no residual twin of "),
        (["{runs}/dhc2", "--device=quantum", "--out={runs}/new"], "device must be one that works here"),
        (["{runs}/dhc2/checkpoints/best.ckpt", "--data.dataset=folder", "--data.root=nowhere"], "there is no folder"),
    ],
)
def test_bad_input(arguments, message, runs, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["inspect", *(argument.format(runs=runs) for argument in arguments)])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hcvision: error")]
    assert message in line
    assert not (Path(runs) / "new").exists()
