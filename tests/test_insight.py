import csv
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import timm
import torch
import yaml
from conftest import randomize

import hcvision
from hcvision.cli import run
from hcvision.connections import Connection
from hcvision.convert import stages
from hcvision.data import ImageData
from hcvision.insight import (
    LogConnections,
    StageNotes,
    by_image,
    inspect,
    join_fractions,
    look_inside,
    unfold,
    unfolded_matrix,
    watch,
    weight_names,
)
from hcvision.training import ImageClassifier


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


@pytest.mark.parametrize("kind", ["shc1", "shc2", "dhc2", "dhc3", "dhc4", "sfc2", "dfc2", "dfc3", "residual", "half"])
def test_the_matrix_rebuilds_every_input(kind, tiny):
    """From the embedding and the branch outputs, token by token, to 1e-12 (SPEC 2.6); ``half``: some blocks alone."""
    model = build(None if kind in ("residual", "half") else kind, tiny)
    if kind == "half":
        randomize(hcvision.convert(model, "dhc3", blocks="1:2"), seed=2)
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
    out = out.unflatten(-1, (-1, views, sources.shape[-1])).mean(-3)
    assert (rebuilt[:, :, -1] - out).abs().max() < 1e-12 * out.abs().max()


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


@pytest.mark.parametrize("kind", [None, "shc1", "dhc2", "dhc4", "sfc4", "dfc2"])
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
        if task == "classify":
            config["trainer"]["callbacks"] = [{"class_path": "hcvision.insight.LogConnections"}]
        (place / f"{connection}.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "hcvision_command", "fit", "--config", str(place / f"{connection}.yaml")]
        subprocess.run(command, check=True, capture_output=True)
    return place


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


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
    names = {"matrix", "similarity", "streams", "classes"}
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        *(f"{name}.png" for name in names), *(f"{name}.csv" for name in {*names, "matrix_spread", "weights"})
    }  # fmt: skip
    # the matrix is that of the model on those images, evenly spread over the validation set
    module = ImageClassifier.load_from_checkpoint(runs / "dhc2" / "checkpoints" / "best.ckpt", weights_only=True).eval()
    data = ImageData(dataset="folder", root=str(image_folder), num_workers=0)
    data.setup("validate")
    base, indices = data.stages["val"]
    data.stages["val"] = (base, [indices[i * 39 // 20] for i in range(20)])
    pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False).validate(
        module, data, verbose=False
    )
    batch = next(iter(data.val_dataloader()))
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
    assert {path.stem for path in (tmp_path / "d").iterdir()} == {"matrix", "similarity", "streams", "weights"}
    inspect(
        str(runs / "residual"), images=4, data={"dataset": "folder", "root": str(read_root(runs)), "num_workers": 0}
    )
    rows = read(runs / "residual" / "inspect" / "matrix.csv")
    assert [float(value) for value in list(rows[2].values())[1:]] == [1, 1, 1, 0, 0]


def read_root(runs):
    return yaml.safe_load((runs / "residual" / "config.yaml").read_text())["data"]["root"]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no nowhere"),
        (["{runs}/dhc2", "--images=0"], "images and batch_size must be at least 1, got 0 and 64"),
        (["{runs}/dhc2", "--out={runs}"], "exists; --overwrite true writes into it"),
        (["{runs}/dhc2", "--twin={runs}/shc2", "--out={runs}/new"], "is no twin"),
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
