import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from hcvision.data import machine
from hcvision.data.folders import split_by_class
from hcvision.data.images import BadImage, Batch, collate, mode_of, posterize, to_mode
from hcvision.data.module import ImageData

NAN = float("nan")


def test_folder_gives_every_validation_image_once_in_order(image_folder):
    module = ImageData(root=str(image_folder), batch_size=8, eval_batch_size=10, num_workers=0)
    module.setup()
    assert module.num_classes == 3
    assert module.class_names == ["left-out", "müller straße", "zebra"]
    targets = torch.cat([batch.targets for batch in module.val_dataloader()])
    assert targets.tolist() == [0] * 13 + [1] * 13 + [2] * 13
    assert len(module.train_dataloader()) == 72 // 8


def test_images_are_resized_and_normalised_as_asked(image_folder):
    module = ImageData(
        root=str(image_folder), num_workers=0, img_size=32, mean=[0.5, 0.25, 0.1], std=[0.5, 0.2, 0.1],
        crop_pct=1.0, batch_size=8,
    )  # fmt: skip
    module.setup()
    image = next(iter(module.val_dataloader())).images[0]
    raw = module.stages["val"][0][0][0]
    expected = torch.tensor(np.asarray(raw)).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor([0.5, 0.25, 0.1]).view(3, 1, 1)) / torch.tensor([0.5, 0.2, 0.1]).view(3, 1, 1)
    torch.testing.assert_close(image, expected)


def test_size_channels_and_statistics_come_from_the_model(image_folder, tiny, trainer_args):
    from hcvision.training.classification import ImageClassifier

    module = ImageData(root=str(image_folder), num_workers=0, batch_size=8)
    model = ImageClassifier("vit_tiny_patch16_224_dhc2", num_classes=3, model_args={**tiny, "in_chans": 1})
    trainer = pl.Trainer(max_epochs=1, **trainer_args)
    trainer.fit(model, module)
    config = module.data_config()
    assert config["input_size"] == (1, 32, 32)
    assert config["mean"] == (0.5,)
    assert next(iter(module.val_dataloader())).images.shape == (8, 1, 32, 32)


def test_order_depends_on_seed_and_epoch_alone(image_folder):
    def order(seed, epoch):
        module = ImageData(root=str(image_folder), num_workers=0, batch_size=8, seed=seed, no_aug=True)
        module.setup()
        torch.rand(seed + 7)  # the global generator must not matter
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch.targets for batch in loader]).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)


def test_augmentation_depends_on_seed_epoch_and_image_alone(image_folder):
    def batches(workers, seed=0, epoch=1, noise=0):
        module = ImageData(
            root=str(image_folder), num_workers=workers, batch_size=24, seed=seed, img_size=32, re_prob=1
        )
        module.setup()
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        out = []
        for batch in loader:
            torch.rand(noise), np.random.rand(noise)  # noqa: NPY002 - dropout and mixup draw as well
            out.append(batch.images)
        return torch.cat(out)

    first = batches(0)
    assert torch.equal(first, batches(0, noise=3))
    assert torch.equal(first, batches(2))
    assert not torch.equal(first.sort(0)[0], batches(0, epoch=2).sort(0)[0])
    assert not torch.equal(first.sort(0)[0], batches(0, seed=1).sort(0)[0])
    state = torch.get_rng_state()
    batches(0)
    assert torch.equal(torch.get_rng_state(), state)  # and takes nothing from the others


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_images_without_repeating_any(image_folder, world, monkeypatch):
    seen = []
    for rank in range(world):
        module = ImageData(root=str(image_folder), num_workers=0, batch_size=4)
        module.setup()
        module.trainer = type("T", (), {"world_size": world, "global_rank": rank, "lightning_module": None})()
        seen += list(module.val_dataloader().sampler)
    assert sorted(seen) == list(range(39))  # 39 is not divisible by 2


def test_split_by_class_is_stratified_and_seeded():
    targets = [0] * 40 + [1] * 10 + [2] * 2
    train, val = split_by_class(targets, 0.1, seed=3)
    assert sorted(train + val) == list(range(52))
    assert [sum(targets[i] == c for i in val) for c in range(3)] == [4, 1, 1]
    assert split_by_class(targets, 0.1, seed=3) == (train, val)
    assert split_by_class(targets, 0.1, seed=4) != (train, val)


def test_one_folder_with_a_fraction(image_folder):
    module = ImageData(root=str(image_folder / "train"), val_fraction=0.25, batch_size=8, num_workers=0)
    module.setup()
    (_, train), (_, val) = module.stages["train"], module.stages["val"]
    assert (len(train), len(val)) == (54, 18)
    assert not set(train) & set(val)


def test_train_samples_are_a_seeded_choice(image_folder):
    chosen = []
    for _ in range(2):
        module = ImageData(root=str(image_folder), train_samples=20, batch_size=4, num_workers=0)
        module.setup()
        module.setup()  # Lightning calls it once per stage
        chosen.append(module.stages["train"][1])
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 20


@pytest.fixture
def damaged_folder(image_folder, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(image_folder, root)
    bad = root / "train" / "zebra" / "007.png"
    bad.write_bytes(bad.read_bytes()[:200])
    return root, bad


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_with_its_path(damaged_folder, workers):
    root, bad = damaged_folder
    module = ImageData(root=str(root), batch_size=72, num_workers=workers, img_size=32)
    module.setup()
    (batch,) = module.train_dataloader()
    with pytest.raises(ValueError, match=rf"cannot read image {bad}: .*skip_bad_images"):
        module.on_before_batch_transfer(batch, 0)


def test_a_bad_image_is_left_out_if_asked_and_named_once(damaged_folder):
    root, bad = damaged_folder
    module = ImageData(root=str(root), batch_size=72, num_workers=0, img_size=32, skip_bad_images=True)
    module.setup()
    (batch,) = module.train_dataloader()
    with pytest.warns(UserWarning, match=f"left out: cannot read image {bad}"):
        images, targets = module.on_before_batch_transfer(batch, 0)
    assert len(images) == len(targets) == 71
    module.on_before_batch_transfer(batch, 0)  # warnings are errors here: no second one


def test_bad_batch_types_round_trip():
    batch = collate([BadImage("a.png", "broken")])
    assert isinstance(batch, Batch)
    assert len(batch.images) == len(batch.targets) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, got -1"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"val_fraction": 1.0}, "val_fraction must be above 0 and below 1"),
        ({"train_samples": 0}, "train_samples must be at least 1"),
        ({"dataset": "mnist1d"}, "dataset must be one of folder, csv, fashion_mnist, cifar10"),
        ({"dataset": "hfds/uoft-cs/cifar10"}, "num_classes must be given"),
        ({"num_classes": 4}, "num_classes must be 3"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"batch_size": 8.0}, "batch_size must be a whole number, got 8.0"),
        ({"num_workers": "2"}, "num_workers must be a whole number, got '2'"),
        ({"val_fraction": NAN}, "val_fraction must be above 0 and below 1, got nan"),
        ({"img_size": 0}, "img_size must be at least 1, got 0"),
        ({"img_size": -32}, "img_size must be at least 1, got -32"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"split_seed": 0.5}, "split_seed must be a whole number, got 0.5"),
        ({"hflip": 5}, "hflip must be at least 0 and at most 1, got 5"),
        ({"hflip": -0.5}, "hflip must be at least 0 and at most 1, got -0.5"),
        ({"hflip": True}, "hflip must be a number, got True"),
        ({"re_prob": -1}, "re_prob must be at least 0 and at most 1, got -1"),
        ({"re_prob": NAN}, "re_prob must be at least 0 and at most 1, got nan"),
        ({"color_jitter": -0.4}, "color_jitter must be at least 0, got -0.4"),
        ({"crop_pct": 0}, "crop_pct must be above 0 and at most 1, got 0"),
        ({"crop_pct": 87.5}, "crop_pct must be above 0 and at most 1, got 87.5"),
        ({"scale": (2, 1)}, "each number of scale must be above 0 and at most 1, got 2"),
        ({"scale": (1, 0.5)}, r"scale must be the smaller number and then the larger one, got \(1, 0.5\)"),
        ({"scale": (0, 1)}, "each number of scale must be above 0 and at most 1, got 0"),
        ({"scale": 0.5}, "scale must be a list of 2 numbers, got 0.5"),
        ({"ratio": (4 / 3, 3 / 4)}, "ratio must be the smaller number and then the larger one"),
        ({"ratio": (-1, 1)}, "each number of ratio must be above 0, got -1"),
        ({"mean": []}, r"mean must be a list of one or more numbers, got \[\]"),
        ({"mean": 0.5}, "mean must be a list of one or more numbers, got 0.5"),
        ({"mean": [0.5, NAN, 0.5]}, "each number of mean must be finite, got nan"),
        ({"std": [0.5, 0, 0.5]}, "each number of std must be above 0, got 0"),
        ({"std": ["0.5"]}, "each number of std must be a number, got '0.5'"),
        *(
            ({"interpolation": wrong}, f"interpolation must be one of nearest, .*lanczos, or null for .*got '{wrong}'")
            for wrong in ("bicubicc", "random", "None", "")
        ),
        *(
            ({"auto_augment": wrong}, f"auto_augment must be a policy of timm such as rand-m9.* or null.*got '{wrong}'")
            for wrong in ("randaug", "autoaugment", "None", "rand-m", "rand-m-5", "rand-m9-foo", "rand-p7", "rand-n0")
        ),
        *(
            ({"auto_augment": wrong}, "auto_augment must be a policy of timm")
            for wrong in ("rand-tnone", "rand-m9-x3", "rand_m9", "augmix-w0", "v0-m5", "original-", "v1", "", 9, True)
        ),
    ],
)
def test_wrong_arguments(image_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**{"root": str(image_folder), **arguments})


@pytest.mark.parametrize(
    "policy",
    [
        *(
            "rand",
            "rand-m9-mstd0.5-inc1",
            "rand-m15-n3-p0.5-mmax20",
            "rand-tweights-mstd101",
            "rand-t3a-t3aw",
            "augmix",
        ),
        *("augmix-m5-w4-d2", "augmix-a1-b1", "original-mstd0.5", "originalr", "v0", "v0r", "3a"),
    ],
)
def test_policies_of_timm(image_folder, policy):
    data = ImageData(root=str(image_folder), auto_augment=policy, batch_size=8, num_workers=0, img_size=16)
    assert next(iter(data.train_dataloader())).bad == []


@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_are_of_as_many_channels_as_the_images(image_folder, name):
    model = {"input_size": (4, 8, 8), "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}

    def config(values=None, channels=4):
        data = ImageData(root=str(image_folder), **({name: values} if values else {}))
        return data.data_config(model | {"input_size": (channels, 8, 8)})[name]

    assert config() == (*model[name], 0.5)  # of the colours as the model has them
    assert config(channels=1) == pytest.approx([sum(model[name]) / 3])
    assert config([0.7]) == (0.7,) * 4
    assert config([0.7, 0.6, 0.5, 0.4]) == (0.7, 0.6, 0.5, 0.4)
    with pytest.raises(
        ValueError, match=rf"{name} must be of 1 or 4 numbers, as the model takes images, got \[0.7, 0.6"
    ):
        config([0.7, 0.6, 0.5])


def view(data, size, **more):
    """Have images prepared for a model of that size (C, H, W), to [0, 1]."""
    config = data.data_config({"input_size": size, "mean": (0.0,), "std": (1.0,), "crop_pct": 1.0, **more})
    data.data_config = lambda model=None: config
    return data


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (24, 24), (10, 35)])
@pytest.mark.parametrize("image", [(16, 32), (40, 36), (32, 16), (24, 24), (7, 50), (33, 64)])
def test_training_for_drawing_sees_what_evaluation_sees(tmp_path, size, image):
    """For every shape of model and image: nothing is stretched, and nothing cut off that evaluation sees."""
    pixels = np.random.default_rng(0).integers(0, 256, (*image, 3), dtype=np.uint8)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "1.png")
    options = {"root": str(tmp_path), "batch_size": 1, "num_workers": 0, "hflip": 0.0}
    for more in ({"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}, {"no_aug": True}):
        data = view(ImageData(**options, **more), (3, *size))
        seen = [next(iter(loader)).images for loader in (data.train_dataloader(), data.val_dataloader())]
        assert torch.equal(*seen), more
        assert seen[0].shape == (1, 3, *size)
        plain = next(iter(data.plain_loader("train", (3, *size)))).images
        torch.testing.assert_close(plain, seen[0] * 2 - 1)
    mirrored = view(ImageData(**{**options, "hflip": 1.0}, scale=(1, 1), ratio=(1, 1)), (3, *size))
    assert torch.equal(next(iter(mirrored.train_dataloader())).images, seen[1].flip(-1))


@pytest.mark.parametrize(("channels", "stored"), [(4, "RGBA"), (4, "RGB"), (4, "L"), (1, "RGB"), (3, "RGBA")])
def test_images_have_as_many_channels_as_the_model_takes(tmp_path, channels, stored):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).convert(stored).save(tmp_path / split / "a" / "1.png")
    data = view(ImageData(root=str(tmp_path), batch_size=1, num_workers=0, no_aug=True), (channels, 8, 8))
    image = Image.fromarray(pixels).convert(stored)
    expected = np.asarray(to_mode(image, mode_of(channels))).reshape(8, 8, channels) / np.float32(255)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        np.testing.assert_array_equal(next(iter(loader)).images[0].permute(1, 2, 0), expected)
    if stored == "RGBA" and channels == 4:
        np.testing.assert_array_equal(expected, pixels / np.float32(255))


def test_channels_that_images_cannot_have(image_folder):
    data = ImageData(root=str(image_folder), auto_augment="rand-m9", num_workers=0)
    data.check_images({"input_size": (3, 8, 8)})
    for channels in (2, 5):
        with pytest.raises(ValueError, match=f"images are read with 1 .* 3 .* or 4 .*, the model takes {channels}"):
            ImageData(root=str(image_folder)).check_images({"input_size": (channels, 8, 8)})
    with pytest.raises(ValueError, match="auto_augment works on gray and RGB images, the model takes 4 channels"):
        data.check_images({"input_size": (4, 8, 8)})


def hand_out(image_folder, root, kind, test):
    """train and val with classes, and a test split as competitions hand it out; how to open them."""
    if kind == "folder":
        shutil.copytree(image_folder, root)
        for name in test:
            (root / "test" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image_folder / "val" / "zebra" / "000.png", root / "test" / name)
        return {"root": str(root)}
    write_tables(image_folder, root, "a file per split")
    image = image_folder / "val" / "zebra" / "000.png"
    rows = [f"{image},{'' if name[0] == '/' else name.partition('/')[0]}" for name in (f"{n}" for n in test)]
    if kind == "table":
        (root / "test.csv").write_text("\n".join(["file,label", *rows]))
    elif kind == "table without labels":
        (root / "test.csv").write_text("\n".join(["file", *(row.partition(",")[0] for row in rows)]))
    else:
        lines = [
            f"{line},{split}"
            for split in ("train", "val")
            for line in (root / f"{split}.csv").read_text().splitlines()[1:]
        ]
        (root / "all.csv").write_text("\n".join(["file,label,split", *lines, *(f"{row},test" for row in rows)]))
        return {"dataset": "csv", "root": str(root / "all.csv")}
    return {"dataset": "csv", "root": str(root)}


class Testing:
    """A trainer that tests."""

    world_size, global_rank, lightning_module, predicting = 1, 0, None, False


@pytest.mark.filterwarnings("ignore:the val images are of:UserWarning")
@pytest.mark.parametrize(
    ("kind", "test", "reason"),
    [
        ("folder", ["1.png"], "there is no class folder in .*test; it must hold one subfolder per class"),
        ("folder", ["unicorn/1.png"], "the class folders of train and test differ: unicorn"),
        ("folder", ["zebra/notes.txt"], "there is no image in the class folder .*test/left-out"),
        ("table", ["/1.png"], "test.csv, line 2: no label|there is no label of"),
        ("table", ["unicorn/1.png"], "the label 'unicorn' of .* is not among those of the training images"),
        ("table without labels", ["zebra/1.png"], "test.csv must have the columns file and label in its first line"),
        ("one table", ["/1.png"], "there is no label of .*000.png"),
        ("one table", ["unicorn/1.png"], "the label 'unicorn' of .* is not among those of the training images"),
    ],
)
def test_only_testing_needs_the_classes_of_the_test_images(image_folder, tmp_path, kind, test, reason):
    data = ImageData(**hand_out(image_folder, tmp_path / "d", kind, test), batch_size=8, num_workers=0)
    data.setup("fit")
    assert [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader())] == [72, 39]
    for ask in (data.test_dataloader, lambda: data.plain_loader("test", (3, 8, 8))):
        with pytest.raises(
            ValueError, match=rf"the test images need the classes of .*({reason}).*--data.test_split names"
        ):
            ask()


def test_only_testing_needs_the_files_of_the_test_images(image_folder, tmp_path):
    path = write_tables(image_folder, tmp_path / "t", "a column")
    path.write_text(path.read_text() + "\nnowhere.png,zebra,test")
    data = ImageData("csv", root=str(path), batch_size=8, num_workers=0)
    assert [bad.reason for batch in data.val_dataloader() for bad in batch.bad] == []
    (bad,) = [bad for batch in data.test_dataloader() for bad in batch.bad]
    assert str(bad) == f"cannot read image {path.parent / 'nowhere.png'}: No such file or directory"


@pytest.mark.parametrize("kind", ["folder", "table", "one table"])
def test_test_images_of_some_of_the_classes(image_folder, tmp_path, kind):
    """They keep their numbers; whoever tests is told which classes there are none of."""
    data = ImageData(**hand_out(image_folder, tmp_path / "d", kind, ["zebra/1.png"]), batch_size=8, num_workers=0)
    data.trainer = Testing()
    with pytest.warns(
        UserWarning, match="the test images are of 1 of the 3 classes, without left-out, müller straße .*test_split"
    ):
        (batch,) = data.test_dataloader()
    assert batch.targets.tolist() == [2]


def test_validation_images_of_some_of_the_classes(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "d")
    shutil.rmtree(tmp_path / "d" / "val" / "left-out")
    with pytest.warns(
        UserWarning, match=r"the val images are of 2 of the 3 classes, without left-out .*--data.val_split"
    ):
        data = ImageData(root=str(tmp_path / "d"), batch_size=8, num_workers=0)
    assert data.class_names == ["left-out", "müller straße", "zebra"]
    assert torch.cat([batch.targets for batch in data.val_dataloader()]).tolist() == [1] * 13 + [2] * 13


def test_what_other_programs_leave_is_said(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "d")
    for place in ("train/.ipynb_checkpoints", "val/zebra/@eaDir"):
        shutil.copytree(image_folder / "val" / "zebra", tmp_path / "d" / place)
    (tmp_path / "d" / "train" / "zebra" / "._000.png").write_bytes(b"\0\5\x16\7")
    what = r"left out, what other programs leave behind: '\._000\.png', '\.ipynb_checkpoints', '@eaDir' \(3 in .*d\)"
    with pytest.warns(UserWarning, match=what):
        data = ImageData(root=str(tmp_path / "d"), batch_size=8, num_workers=0)
    assert [len(data.stages[stage][0]) for stage in ("train", "val")] == [72, 39]
    assert data.num_classes == 3


def test_wrong_folders(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        ImageData(root=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/train; .* must hold train/ and val/"):
        ImageData(root=str(tmp_path))
    root = tmp_path / "empty"
    shutil.copytree(image_folder, root)
    (root / "train" / "aardvark").mkdir()
    (root / "val" / "aardvark").mkdir()
    with pytest.raises(ValueError, match=r"no image in the class folder .*train/aardvark"):
        ImageData(root=str(root))
    (root / "train" / "aardvark").rmdir()
    shutil.copytree(root / "val" / "zebra", root / "val" / "aardvark", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="class folders of train and val differ: aardvark"):
        ImageData(root=str(root))
    module = ImageData(root=str(image_folder), batch_size=100, num_workers=0)
    with pytest.raises(ValueError, match="batch_size must be at most 72"):
        module.setup("fit")


def test_a_timm_dataset_string(tmp_path, image_folder):
    """torch/image_folder stands for all of timm.data.create_dataset: same reader, no network."""
    module = ImageData("torch/image_folder", root=str(image_folder), num_classes=3, batch_size=8, num_workers=0)
    module.setup("fit")
    assert len(module.train_dataloader().dataset) == 72
    targets = torch.cat([batch.targets for batch in module.val_dataloader()])
    assert targets.bincount().tolist() == [13, 13, 13]


def test_classes_that_a_timm_dataset_numbers_apart(tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / "d")
    shutil.rmtree(tmp_path / "d" / "val" / "left-out")
    with pytest.raises(
        ValueError, match="the classes of train and val of torch/image_folder must be the same ones, got 3 and 2"
    ):
        ImageData("torch/image_folder", root=str(tmp_path / "d"), num_classes=3)


@pytest.mark.parametrize("policy", ["rand-m10-inc1-n8", "original", "originalr", "v0", "3a", "augmix-m10-d6"])
def test_augmentation_at_full_strength(image_folder, policy):
    """timm asks for zero bits there, which Pillow 13 refuses: no image is lost to it, and the rest is timm's."""
    data = ImageData(root=str(image_folder), batch_size=8, num_workers=0, auto_augment=policy, img_size=16)
    for epoch in range(6):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        assert [bad for batch in loader for bad in batch.bad] == []


def test_posterize_keeps_a_bit():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert set(np.unique(posterize(image, 0))) == {0, 128}
    assert len(np.unique(posterize(image, 3))) == 8
    assert posterize(image, 8) is image


def test_an_image_that_cannot_be_transformed_is_not_called_unreadable(image_folder):
    data = ImageData(root=str(image_folder), batch_size=8, num_workers=0)

    def broken(image):
        raise ValueError("no way")

    loader = data.train_dataloader()
    loader.dataset.transform = broken
    (bad, *_) = next(iter(loader)).bad
    assert str(bad).startswith(f"cannot transform image {image_folder}")
    assert str(bad).endswith(": no way")


def write_tables(image_folder, root, layout):
    """The images of image_folder as tables: one with a column split, one without, or one per split."""
    root.mkdir(exist_ok=True)
    rows = {s: [(p, p.parent.name) for p in sorted((image_folder / s).glob("*/*.png"))] for s in ("train", "val")}
    rows["test"] = rows["val"][:5]
    if layout == "a file per split":
        for split, lines in rows.items():
            (root / f"{split}.csv").write_text("\n".join(["file,label", *(f"{p},{label}" for p, label in lines)]))
        return root
    head = "file,label" + ",split" * (layout == "a column")
    lines = [f"{p},{label}" + f",{s}" * (layout == "a column") for s, part in rows.items() for p, label in part]
    (root / "all.csv").write_text("\n".join([head, *lines]))
    return root / "all.csv"


@pytest.mark.parametrize("layout", ["a file per split", "a column"])
def test_tables_give_what_folders_give(image_folder, tmp_path, layout):
    kwargs = {"batch_size": 8, "num_workers": 0, "img_size": 32, "no_aug": True}
    table = ImageData("csv", root=str(write_tables(image_folder, tmp_path / "t", layout)), **kwargs)
    folder = ImageData(root=str(image_folder), **kwargs)
    assert (table.class_names, table.num_classes) == (folder.class_names, 3)
    for which in ("train_dataloader", "val_dataloader"):
        for ours, theirs in zip(getattr(table, which)(), getattr(folder, which)(), strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.targets, theirs.targets)
    assert sum(len(batch.targets) for batch in table.test_dataloader()) == 5


def test_a_fraction_of_a_table(image_folder, tmp_path):
    path = write_tables(image_folder, tmp_path / "t", "one")
    data = ImageData("csv", root=str(path), val_fraction=0.25, batch_size=8)
    train, val = (set(data.stages[stage][1]) for stage in ("train", "val"))
    assert train | val == set(range(116))
    assert not train & val
    assert len(val) == 10 + 9 + 9  # a quarter of each class


def test_wrong_tables(image_folder, tmp_path):
    one = write_tables(image_folder, tmp_path / "t", "one")
    with pytest.raises(
        ValueError, match="must have a column split of train and val, got none, or val_fraction must say"
    ):
        ImageData("csv", root=str(one))
    with pytest.raises(FileNotFoundError, match=r"there is no .*train.csv; .* must hold train.csv and val.csv"):
        ImageData("csv", root=str(tmp_path / "t"))
    with pytest.raises(
        FileNotFoundError, match=r"there is no .*nowhere; data.root must be a CSV file or a folder of them"
    ):
        ImageData("csv", root=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="multi_label needs a table of labels"):
        ImageData(root=str(image_folder), multi_label=True)


def test_an_epoch_that_begins_in_the_middle(image_folder):
    """The rest of the same order, and whole epochs after it, whatever the number of workers."""

    def targets(data, epochs, skip=0):
        loader = data.train_dataloader()
        data.skip_batches(skip)
        batches = []
        for epoch in range(epochs):
            loader.sampler.set_epoch(epoch + 3)
            batches += [batch.images for batch in loader]
        return batches

    whole, rest = (
        targets(ImageData(root=str(image_folder), batch_size=8, num_workers=n, img_size=32), 2, skip)
        for n, skip in ((0, 0), (1, 4))
    )
    assert (len(whole), len(rest)) == (18, 14)
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_files_that_are_no_images_are_named(image_folder, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    (root / "train" / "zebra" / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match=r"left out, no images by their names: 'notes.txt' \(1 in .*images\)"):
        ImageData(root=str(root), batch_size=8)


def test_rows_of_other_splits_are_named(image_folder, tmp_path):
    path = write_tables(image_folder, tmp_path / "t", "a column")
    image = image_folder / "val" / "zebra" / "000.png"
    path.write_text(path.read_text() + "".join(f"\n{image},zebra,{split}" for split in ("valid", "", "valid")))
    with pytest.warns(UserWarning, match=r"left out, rows of other splits: '\(none\)', 'valid' \(2 in .*all.csv\)"):
        data = ImageData("csv", root=str(path), batch_size=8, num_workers=0)
    assert [len(data.stages[stage][0]) for stage in ("train", "val")] == [72, 39]


def test_rows_for_testing_stay_out_of_training(image_folder, tmp_path):
    """A fraction of a table that says what is for testing is taken of the rest."""
    lines = [
        f"{p},{p.parent.name},{' test ' if p.parent.parent.name == 'val' else ''}"
        for p in image_folder.glob("*/*/*.png")
    ]
    (tmp_path / "t.csv").write_text("\n".join(["file,label,split", *lines]))
    data = ImageData("csv", root=str(tmp_path / "t.csv"), val_fraction=0.25, batch_size=8, num_workers=0)
    for stage, folder, count in (("train", "train", 54), ("val", "train", 18), ("test", "val", 39)):
        base, indices = data.stages[stage]
        assert len(indices) == count
        assert {base.samples[index][0].split("/")[-3] for index in indices} == {folder}
    (tmp_path / "t.csv").write_text("\n".join(["file,label,split", *(line.replace(" test ", "val") for line in lines)]))
    with pytest.raises(
        ValueError, match=r"says which images are for validation \(val\), and val_fraction too; give one"
    ):
        ImageData("csv", root=str(tmp_path / "t.csv"), val_fraction=0.25)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_script_that_keeps_its_loader_ends(image_folder, start):
    """multiprocessing ends loading processes with SIGTERM when a script is over; until then they outlive it."""
    code = (
        "import multiprocessing, os, signal, time\n"
        "from hcvision.data import ImageData\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({start!r})\n"
        f"    data = ImageData(root={str(image_folder)!r}, batch_size=8, num_workers=1, img_size=32)\n"
        "    loader = data.val_dataloader()\n"
        "    batches = iter(loader)\n"
        "    next(batches)\n"
        "    for number in (signal.SIGINT, signal.SIGTERM):\n"
        "        os.kill(loader._iterator._workers[0].pid, number)\n"
        "    print(1 + sum(1 for _ in batches))\n"
    )
    path = image_folder.parent / f"{start}.py"
    path.write_text(code)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr[-2000:]


def test_cores_of_a_container(tmp_path, monkeypatch):
    """A quota counts like an affinity; without either file or function all cores of the machine do."""
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert machine.count_cores() == 6
    for text, cores in (("max 100000", 6), ("250000 100000", 3), ("20000 100000", 1), ("9900000 100000", 6)):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert machine.count_cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert machine.count_cores() == 16
    assert [machine.count_workers(wanted) for wanted in (None, 0, 3)] == [8, 0, 3]


@pytest.mark.parametrize(("gpu", "workers"), [(False, 0), (True, 5)])
def test_images_in_memory_need_no_loading_process(monkeypatch, gpu, workers):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(machine, "count_cores", lambda: 5)
    assert ImageData("fashion_mnist").num_workers == workers
    assert ImageData("cifar10", num_workers=2).num_workers == 2
