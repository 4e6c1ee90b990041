import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from hcvision import data
from hcvision.data import ImageData
from hcvision.images import BadImage, Batch, collate, posterize, split_by_class


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
    from hcvision.training import ImageClassifier

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
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"train_samples": 0}, "train_samples must be at least 1"),
        ({"dataset": "mnist1d"}, "dataset must be one of folder, csv, fashion_mnist, cifar10"),
        ({"dataset": "hfds/uoft-cs/cifar10"}, "num_classes must be given"),
        ({"num_classes": 4}, "num_classes must be 3"),
    ],
)
def test_wrong_arguments(image_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**{"root": str(image_folder), **arguments})


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
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr[-2000:]


def test_cores_of_a_container(tmp_path, monkeypatch):
    """A quota counts like an affinity; without either file or function all cores of the machine do."""
    monkeypatch.setattr(data, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert data.count_cores() == 6
    for text, cores in (("max 100000", 6), ("250000 100000", 3), ("20000 100000", 1), ("9900000 100000", 6)):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert data.count_cores() == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert data.count_cores() == 16
    assert [data.count_workers(wanted) for wanted in (None, 0, 3)] == [8, 0, 3]


@pytest.mark.parametrize(("gpu", "workers"), [(False, 0), (True, 5)])
def test_images_in_memory_need_no_loading_process(monkeypatch, gpu, workers):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(data, "count_cores", lambda: 5)
    assert ImageData("fashion_mnist").num_workers == workers
    assert ImageData("cifar10", num_workers=2).num_workers == 2
