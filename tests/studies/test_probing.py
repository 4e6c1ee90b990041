"""Probes of frozen features: votes of neighbours, the optimum of a regression, what a model hands to its head."""

import math

import numpy as np
import pytest
import timm
import torch
from conftest import randomize
from scipy.optimize import brentq
from torch.nn import functional as F

from hcvision.data.module import ImageData
from hcvision.models.conversion import convert
from hcvision.studies.probing import linear, neighbours
from hcvision.studies.probing.features import collect, open_model, pre_logits
from hcvision.studies.probing.linear import LinearProbe, Regression, fit_linear_probe
from hcvision.studies.probing.neighbours import predict_by_neighbours
from hcvision.studies.probing.protocol import Protocol
from hcvision.studies.records import tabulate


# Neighbours
def test_votes_by_hand():
    """One neighbour at cosine 0.9 against two at 0.8: exp(0.1 / T) against 2, whatever the vectors' lengths are."""
    bank = torch.tensor([[0.9, math.sqrt(0.19)], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.0]])
    bank *= torch.tensor([[9.0], [1.0], [5.0], [1.0]])
    labels, query = torch.tensor([0, 1, 1, 0]), torch.tensor([[3.0, 0.0]])

    def vote(k, temperature):
        return predict_by_neighbours(query, bank, labels, 2, (k,), temperature)[k].item()

    assert math.exp(0.1 / 0.07) > 2 > math.exp(0.1 / 0.2)
    assert [vote(3, 0.07), vote(3, 0.2), vote(1, 0.2), vote(2, 10)] == [0, 1, 0, 0]
    assert vote(4, 1e9) == 0  # two against two, the lower number
    assert vote(3, 1e-3) == 0  # exp(900) would be none


def test_votes_beside_a_transcription(monkeypatch):
    """Sums of exp(cosine / T) by class, in loops; in parts as at once."""
    generator = np.random.default_rng(0)
    bank, queries = generator.normal(size=(40, 6)), generator.normal(size=(25, 6))
    labels = generator.integers(4, size=40)
    expected = {}
    for k in (5, 11):
        expected[k] = []
        for q in queries:
            cosines = [float(q @ b / np.linalg.norm(q) / np.linalg.norm(b)) for b in bank]
            votes = [0.0] * 4
            for n in sorted(range(40), key=lambda n: -cosines[n])[:k]:
                votes[labels[n]] += math.exp(cosines[n] / 0.07)
            expected[k].append(votes.index(max(votes)))
    tensors = [torch.from_numpy(part) for part in (queries, bank, labels)]
    for most in (2**26, 90):  # two queries at a time
        monkeypatch.setattr(neighbours, "MOST_COSINES", most)
        found = predict_by_neighbours(*tensors, 4, (5, 11))
        assert {k: predicted.tolist() for k, predicted in found.items()} == expected
    with pytest.raises(ValueError, match=r"neighbours must be 1 to 40, the training images, got \[5, 41\]"):
        predict_by_neighbours(*tensors, 4, (5, 41))


# Linear probe
def test_a_regression_by_hand():
    """N images of two classes at c - 1 and c + 1: weights -v and v, where v = N sigmoid(-2v) / l2."""
    features = torch.tensor([[4.0], [6.0]] * 5, dtype=torch.float64)
    targets = torch.tensor([0, 1] * 5)
    for l2 in (0.3, 40.0):
        v = brentq(lambda v, l2=l2: v - 10 / (1 + math.exp(2 * v)) / l2, 0, 100, xtol=1e-14)
        probe = Regression(features, targets, 2).fit(l2, tolerance=1e-12)
        assert probe.weight[:, 0].tolist() == pytest.approx([-v, v], abs=1e-9)
        assert (probe.bias[1] - probe.bias[0]).item() == pytest.approx(-2 * v * 5, abs=1e-8)  # none in the middle


def draw_features(images=60, width=7, classes=3, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(images) % classes
    centres = spread * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(1, -1, width, dtype=torch.float64)
    noise = torch.randn(images, width, generator=generator, dtype=torch.float64)
    return (noise + centres[targets]) * scales + 3, targets


def slope(features, targets, probe):
    """The largest slope of the definition there, by autograd, as a share of the largest one at weights of zero.

    Which is the sum of cross entropies plus l2 / 2 times the sum of squared weights.
    """
    nothing = LinearProbe(0 * probe.weight, 0 * probe.bias, probe.l2)
    there, first = (slopes(features, targets, one).abs().max() for one in (probe, nothing))
    return float(there / first)


def slopes(features, targets, probe):
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    logits = features @ weight.T + bias
    loss = F.cross_entropy(logits, targets, reduction="sum") + probe.l2 / 2 * weight.square().sum()
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, (weight, bias))])


@pytest.mark.parametrize("images", [60, 5])  # and fewer than there are features
@pytest.mark.parametrize("most", [2**25, 24])  # all at once, or eight at a time
def test_a_regression_is_at_its_optimum(images, most, monkeypatch):
    """The problem is convex: where the slopes of the definition are 0, it is. From another optimum, too."""
    monkeypatch.setattr(linear, "MOST_LOGITS", most)
    features, targets = draw_features(images)
    regression = Regression(features, targets, 3)
    probe = regression.fit(2.0, tolerance=1e-11)
    assert slope(features, targets, probe) < 1e-8
    again = regression.fit(0.05, start=probe, tolerance=1e-11)
    assert slope(features, targets, again) < 1e-8
    cold = regression.fit(0.05, tolerance=1e-11)
    assert (again.weight - cold.weight).abs().max() < 1e-6 * cold.weight.abs().max()
    assert again.weight.abs().sum() > 1.1 * probe.weight.abs().sum()


def test_the_penalty_is_chosen_on_held_out_images(monkeypatch):
    """By the definition of the search, each fit on its own; what comes out is fitted to all images."""
    monkeypatch.setattr(linear, "TOLERANCE", 1e-8)
    monkeypatch.setattr(Regression.fit, "__defaults__", (None, 1e-8))
    features, targets = draw_features(150, width=16, classes=5, spread=0.3)
    is_held_out = torch.arange(150) % 3 == 0
    ticks = []
    probe = fit_linear_probe(features, targets, 5, is_held_out, lambda: ticks.append(1))
    assert slope(features, targets, probe) < 1e-6
    regression, merits = Regression(features[~is_held_out], targets[~is_held_out], 5), {}

    def merit(exponent):
        if exponent not in merits:
            logits = regression.fit(10.0**exponent)(features[is_held_out])
            right = (logits.argmax(1) == targets[is_held_out]).sum().item()
            merits[exponent] = right, -F.cross_entropy(logits, targets[is_held_out]).item()
        return merits[exponent]

    best = max(range(-6, 7, 2), key=merit)
    for step in (1, 1 / 2, 1 / 4, 1 / 8):
        best = max((e for e in (best, best + step, best - step) if -6 <= e <= 6), key=merit)
    assert probe.l2 == pytest.approx(10**best)
    assert -6 < best < 6  # it is no matter of the ends
    assert len(ticks) == len(merits) + 1 <= linear.FITS


# Protocol
def test_a_protocol_scores_what_its_parts_say():
    """The mean over seeds of what neighbours and probe make of chosen images; of all images only the probe varies."""
    features, targets = draw_features(120, width=10, classes=4, spread=0.4)
    train, test = (features[:80], targets[:80]), (features[80:], targets[80:])
    names = list("abcd")
    scores = Protocol(neighbours=(3, 9), seeds=(5, 6)).score(train, test, names)
    expected = predict_by_neighbours(test[0], *train, 4, (3, 9))
    assert {*scores} == {"knn3", "knn9", "linear", "linear_std", "l2"}
    for k in (3, 9):
        assert scores[f"knn{k}"] == pytest.approx((expected[k] == test[1]).double().mean().item(), abs=1e-12)
    assert len(scores["l2"]) == 2
    few = Protocol(probes=("knn",), neighbours=(3,), seeds=(5, 6), shots=6)
    each = []
    for seed in (5, 6):
        chosen = few.choose(train[1], names, seed)
        assert torch.equal(train[1][chosen].bincount(), torch.tensor([6, 6, 6, 6]))
        assert torch.equal(chosen, few.choose(train[1], names, seed))
        voted = predict_by_neighbours(test[0], train[0][chosen], train[1][chosen], 4, (3,))[3]
        each.append((voted == test[1]).double().mean().item())
    assert not torch.equal(few.choose(train[1], names, 5), chosen)
    assert few.score(train, test, names) == {
        "knn3": pytest.approx(np.mean(each)), "knn3_std": pytest.approx(np.std(each, ddof=1)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": ("knn", "nearest")}, "unknown probe 'nearest'"),
        ({"neighbours": (0,)}, "each number of neighbours must be at least 1, got 0"),
        ({"seeds": (1, 1)}, "seeds must be one or more different ones"),
        ({"shots": 1}, "shots must be at least 2, got 1"),
        ({"temperature": 0}, "temperature must be above 0"),
    ],
)
def test_a_protocol_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**arguments)


def test_too_few_images_are_said():
    targets = [0, 0, 0, 1, 1]
    for arguments, message in [
        ({"probes": ("knn",), "neighbours": (6,)}, "neighbours must be at most 5, the training images, got 6"),
        ({"neighbours": (2,), "shots": 3}, "shots must be at most 2, the images of class 'b', got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            Protocol(**arguments).check(targets, ["a", "b"])
    with pytest.raises(ValueError, match="class 'b' has 1 image, too few to split"):
        Protocol(neighbours=(2,)).check(targets[:4], ["a", "b"])


# Features
COLUMN = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
SMALL = {
    "vit_tiny_patch16_224": COLUMN,  # the class token
    "vit_base_patch16_xp_224": COLUMN,  # the mean of tokens, normalized after
    "deit_tiny_distilled_patch16_224": COLUMN,  # two tokens, and a head for each
    "eva02_tiny_patch14_224": COLUMN,
    "cait_xxs24_224": COLUMN,
    "convnext_atto": STAGES,  # normalized in its head
    "resnet10t": {"channels": [8, 8, 8, 16]},  # no transformer
    "resnetv2_50": {
        "layers": (1, 1, 1, 1),
        "channels": (8, 8, 8, 16),
        "stem_chs": 8,
    },  # its classifier is a convolution
}


@pytest.mark.parametrize("name", SMALL)
def test_features_are_what_the_classifier_sees(name):
    """Of a residual model, and of one with connections, which has the same at its initial values."""
    model = randomize(timm.create_model(name, num_classes=5, **SMALL[name])).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    features = pre_logits(model, images)
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    for head in heads:
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    model(images)
    assert torch.allclose(features, sum(seen) / len(seen), atol=1e-6)
    if not name.startswith("resnet"):
        connected = convert(model, "dhc2")
        assert torch.allclose(pre_logits(connected, images), features, atol=1e-5)


def test_features_of_all_images(image_folder, tiny):
    """In their order and without augmentation, the last batch too; classes beside them; bf16 is close."""
    data = ImageData(root=str(image_folder), num_workers=0, batch_size=16, img_size=32, scale=(0.1, 0.2), hflip=1.0)
    frozen = open_model("vit_tiny_patch16_224", 3, "dhc2", model_args=tiny)
    frozen.module.train()
    features, targets = collect(frozen.module, data, "train", "cpu")
    assert targets.tolist() == [0] * 24 + [1] * 24 + [2] * 24
    other = ImageData(root=str(image_folder), num_workers=0, batch_size=72, img_size=32, val_split="train")
    config = frozen.module.data_config
    (batch,) = other.evaluation_loader("val", config)
    with torch.no_grad():
        expected = frozen.module.model.forward_features(batch.images)[:, 0]
    assert torch.allclose(features, expected, atol=1e-5)
    test = collect(frozen.module, data, "test", "cpu")
    assert len(test[0]) == 39
    assert len(test[1].unique()) == 3
    half = collect(frozen.module, data, "test", "cpu", "bf16-mixed")[0]
    assert 0 < (half - test[0]).abs().max() < 0.1


def test_a_table_of_probes():
    """Its columns stand in the order of k, in percent."""
    line = {
        "model": "m",
        "connection": "dhc2",
        "data": "x/y",
        "images": 4,
        "knn20": 0.25,
        "knn5": 0.5,
        "linear_std": 0.01,
    }
    table = tabulate([line | {"linear": 0.125}])
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == [
        "data",
        "images",
        "knn5",
        "knn20",
        "linear",
        "linear_std",
    ]
    assert [cell.strip() for cell in table[2].split("|")[1:-1]][2:] == ["50.00 %", "25.00 %", "12.50 %", "1.00 %"]
