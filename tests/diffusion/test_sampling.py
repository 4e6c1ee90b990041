import json

import numpy as np
import pytest
import torch
from conftest import randomize

from hcvision.diffusion.objectives import DDPM, LinearPath, SeededNoise, guide
from hcvision.diffusion.sampling import (
    Sampling,
    columns_of,
    describe_samples,
    draw_samples,
    enlarge,
    gaps,
    grid,
    read_samples,
    to_uint8,
    write_npz,
)
from hcvision.training.generation import ImageGenerator

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
PLAN = Sampling(steps=3, sampler="ddpm", guidance=2.0, seed=5)


@pytest.fixture
def module(tiny_dit):
    """Random everywhere, so that class, time and noise all show."""
    return randomize(ImageGenerator("dit_tiny_patch4_pixel", num_classes=3, model_args=tiny_dit), 0.1).eval()


def draw(module, out, number=7, classes=(0, 2), batch_size=3, plan=PLAN):
    return read_samples(draw_samples(module, out, plan, number, classes, batch_size, QUIET), number)


def test_an_image_depends_on_seed_and_number_alone(module, tmp_path):
    """Whatever the batch size, and however many are drawn."""
    seven = draw(module, tmp_path / "a")
    assert seven.shape == (7, 16, 16, 3)
    assert seven.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in seven}) == 7
    assert torch.equal(draw(module, tmp_path / "b", batch_size=7), seven)
    assert torch.equal(draw(module, tmp_path / "c", number=4), seven[:4])
    other = Sampling(steps=3, sampler="ddpm", guidance=2.0, seed=6)
    assert not torch.equal(draw(module, tmp_path / "d", plan=other), seven)
    # image i is of class classes[i % 2], and the class matters
    alone = draw(module, tmp_path / "e", classes=(2,))
    assert torch.equal(alone[1::2], seven[1::2])
    assert not torch.equal(alone[::2], seven[::2])


def test_a_run_that_stopped_goes_on(module, tmp_path, monkeypatch):
    whole = draw(module, tmp_path / "whole")
    step, calls = ImageGenerator.predict_step, []

    def failing(self, batch, batch_idx):
        calls.append(batch[0].tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ImageGenerator, "predict_step", failing)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        draw(module, tmp_path / "stopped")
    assert torch.equal(draw(module, tmp_path / "stopped", batch_size=2), whole)
    assert calls == [[0, 1, 2], [3, 4, 5], [3, 4], [5, 6]]
    assert torch.equal(draw(module, tmp_path / "stopped"), whole)  # nothing left to draw
    assert len(calls) == 4
    assert len(draw(module, tmp_path / "stopped", number=9)) == 9  # more of the same
    assert calls[4:] == [[7, 8]]


def test_other_settings_or_weights_in_the_same_folder(module, tiny_dit, tmp_path):
    draw(module, tmp_path / "a", number=1)
    with pytest.raises(ValueError, match=r"begun with other plan .*give another folder"):
        draw(module, tmp_path / "a", plan=Sampling(steps=4))
    with pytest.raises(ValueError, match="begun with other classes"):
        draw(module, tmp_path / "a", classes=(1,))
    other = ImageGenerator("dit_tiny_patch4_pixel", num_classes=3, model_args=tiny_dit, objective="velocity").eval()
    other.load_state_dict(module.state_dict())
    draw(module, tmp_path / "c", number=1, plan=Sampling(steps=1))
    with pytest.raises(ValueError, match="begun with other plan"):  # the sampler is another one
        draw(other, tmp_path / "c", number=1, plan=Sampling(steps=1))
    draw(module, tmp_path / "d", number=1, plan=Sampling(sampler="ddim"))
    draw(module, tmp_path / "d", number=1, plan=Sampling(sampler="ddim", steps=250))  # the default, said
    with torch.no_grad():
        module.model.blocks[0].attn.qkv.bias[5] += 1
    with pytest.raises(ValueError, match="begun with other weights"):
        draw(module, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else"):
        draw(module, tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"number": 0}, "at least 1, got 0 and 3"),
        ({"classes": (0, 3)}, r"classes must be one or more of 0 to 2, got \[0, 3\]"),
        ({"classes": ()}, "classes must be one or more"),
        ({"plan": Sampling(sampler="heun")}, "ddpm, ddim, dpm\\+\\+ or unipc for this objective, got 'heun'"),
        ({"plan": Sampling(steps=1001)}, "steps must be between 1 and 1000, got 1001"),
        ({"plan": Sampling(guidance=-1.0)}, "guidance needs scale >= 0"),
        ({"plan": Sampling(last_step=0.1)}, "last_step is for the sampler sde, got 0.1 for ddpm"),
        ({"plan": Sampling(coefficient="path")}, "coefficient is for the sampler sde, got path for ddpm"),
        ({"plan": Sampling(guidance_interval=(0, 1))}, r"is for guidance, got \[0, 1\] with guidance 1"),
    ],
)
def test_wrong_arguments(module, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(module, tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("done", "missing"),
    [
        ([], [range(0, 4), range(4, 8), range(8, 10)]),
        ([range(0, 4)], [range(4, 8), range(8, 10)]),
        ([range(2, 3), range(5, 9)], [range(0, 2), range(3, 5), range(9, 10)]),
        ([range(0, 12)], []),
    ],
)
def test_gaps(done, missing):
    assert gaps(done, 10, 4) == missing


def test_npz_is_what_adms_evaluator_reads(module, tmp_path):
    images = draw(module, tmp_path / "a", number=7)
    write_npz(tmp_path / "a.npz", tmp_path / "a" / "parts", 5)
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == ["arr_0"]
        array = file["arr_0"]
    assert array.dtype == np.uint8
    assert np.array_equal(array, images[:5].numpy())


def test_gray_becomes_rgb_in_the_npz(tmp_path):
    (tmp_path / "parts").mkdir()
    gray = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    np.save(tmp_path / "parts" / "000000000-000000002.npy", gray)
    write_npz(tmp_path / "a.npz", tmp_path / "parts", 2)
    array = np.load(tmp_path / "a.npz")["arr_0"]
    assert array.shape == (2, 4, 4, 3)
    assert all(np.array_equal(array[..., [channel]], gray) for channel in range(3))


def test_pixels_come_back():
    pixels = torch.randint(0, 256, (2, 5, 6, 3), dtype=torch.uint8)
    mean, std = (0.2, 0.5, 0.6), (0.3, 0.5, 0.1)
    shape = (1, 3, 1, 1)
    normal = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    assert torch.equal(to_uint8(normal, mean, std), pixels)
    for far, end in ((50.0, 255), (-50.0, 0)):  # clamped, not wrapped
        assert to_uint8(torch.full((1, 3, 2, 2), far), mean, std).unique().tolist() == [end]


def test_grid_and_enlarge():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 4, 4, 1)
    picture = grid(images, columns=3)
    assert picture.shape == (3, 2 * 4 + 3 * 2, 3 * 4 + 4 * 2)
    assert picture[:, 2, 2].tolist() == [0] * 3  # the first, then its neighbour, then the one below, and white between
    assert (picture[0, 2, 8], picture[0, 8, 2], picture[0, 0, 0]) == (1, 3, 255)
    large = np.asarray(enlarge(picture, 62))
    assert large.shape == (14 * 3, 20 * 3, 3)
    assert np.array_equal(large[::3, ::3], picture.permute(1, 2, 0).numpy())
    assert [columns_of(range(n)) for n in (1, 10, 16, 17)] == [8, 10, 16, 8]


def test_what_a_run_says_about_itself(module, tmp_path):
    draw(module, tmp_path / "a", number=1)
    about = json.loads((tmp_path / "a" / "sampling.json").read_text())
    assert about["plan"] == {"steps": 3, "sampler": "ddpm", "guidance": 2.0, "guided_channels": 3, "seed": 5}
    assert about["classes"] == [0, 2]
    assert about["drawn"] == "ddpm, 3 steps (3 evaluations of the model), guidance 2 on all channels"
    assert describe_samples(tmp_path / "a") == about["drawn"]
    del about["drawn"]  # as a run of an earlier version
    (tmp_path / "a" / "sampling.json").write_text(json.dumps(about))
    assert describe_samples(tmp_path / "a") == "ddpm, 3 steps, guidance 2"
    draw(module, tmp_path / "a", number=2)


@pytest.mark.parametrize(
    ("plan", "objective", "channels", "words"),
    [
        (Sampling(), LinearPath(), 3, "heun, 50 steps (99 evaluations of the model), no guidance"),
        (
            Sampling(20, "sde", 1.5), LinearPath(), 4,
            "sde, 20 steps (coefficient sigma, last step 0.04; 20 evaluations of the model), guidance 1.5 on the first "
            "3 of 4 channels",
        ),
        (
            Sampling(9, "dpm++", 4.0, None, guidance_interval=(0.25, 1)), DDPM(), 4,
            "dpm++, 9 steps (9 evaluations of the model), guidance 4 on all channels from 0.25 to 1 of the way to the "
            "image",
        ),
        (
            Sampling(9, "sde", 2.0, coefficient="path", last_step=0.1), LinearPath(), 1,
            "sde, 9 steps (coefficient path, last step 0.1; 9 evaluations of the model), guidance 2 on all channels",
        ),
    ],
)  # fmt: skip
def test_plans_in_words(plan, objective, channels, words):
    assert plan.describe(objective, channels) == words


@pytest.mark.parametrize(
    "plan",
    [
        Sampling(4, "sde", 1.5, coefficient="path", last_step=0.2), Sampling(4, "sde", last_step=0.1),
        Sampling(4, "euler", 3.0, guidance_interval=(0.3, 0.6)), Sampling(4, "euler", 3.0), Sampling(4, "sde"),
    ],
)  # fmt: skip
def test_what_is_drawn_is_the_plan(plan, tiny_dit, tmp_path):
    """Options reach the sampler: images are those of the objective called by hand."""
    arguments = {"num_classes": 3, "model_args": tiny_dit, "objective": "velocity"}
    module = randomize(ImageGenerator("dit_tiny_patch4_pixel", **arguments), 0.1).eval()
    images = draw(module, tmp_path / "a", number=2, plan=plan)
    noise, classes = SeededNoise(0, [0, 1]), torch.tensor([0, 2])
    start = noise(torch.empty(2, 3, 16, 16))
    predict = guide(module, classes, 3, plan.guidance, 3, plan.guidance_interval)
    own = {"coefficient": plan.coefficient or "sigma", "last_step": plan.last_step or 0.04}
    *_, expected = LinearPath(clip=True).sample(predict, start, 4, plan.sampler, noise, **own)
    assert torch.equal(images, to_uint8(expected, (0.5,) * 3, (0.5,) * 3))


def test_plans_that_cannot_be_meant():
    for given, message in (
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval must be the smaller number and then the larger one"),
        ({"guidance_interval": (0.5, 1.2)}, "each number of guidance_interval must be at least 0 and at most 1"),
        ({"coefficient": "sigmma"}, "unknown coefficient 'sigmma'; did you mean sigma"),
        ({"last_step": 0}, "last_step must be above 0 and below 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**given)
