"""Shards made here: flat pictures of 8 x 8 whose red says which image it is."""

import csv
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import processes
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from hcvision.data import streaming
from hcvision.data.images import to_mode
from hcvision.data.module import ImageData
from hcvision.training.classification import ImageClassifier
from hcvision.training.loading import run_data

TRAIN, VAL = (30, 20, 22), (20, 12, 7)
EXACT = {"img_size": 8, "mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": 1.0, "no_aug": True, "seed": 1}
datasets.disable_progress_bars()
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # few cores


def picture(number, mode="RGB"):
    return Image.new("RGB", (8, 8), (number, 7 * number % 256, 80)).convert(mode)


def encode(image, kind="png"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_tar(path, samples):
    """Samples are (key, {suffix: content})."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def pictures(first, count):
    return [(f"{n:03}", {"png": encode(picture(n)), "cls": b"%d" % (n % 3)}) for n in range(first, first + count)]


def write_tars(root):
    splits = {}
    for split, lengths in (("train", TRAIN), ("val", VAL)):
        names = [f"{split}-{shard}.tar" for shard in range(len(lengths))]
        for shard, name in enumerate(names):
            write_tar(root / name, pictures(sum(lengths[:shard]), lengths[shard]))
        splits[split] = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))


def write_parquet(path, rows, **columns):
    features = {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"]), **columns}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(str(path))


def rows(first, count):
    return [
        {"picture": {"bytes": encode(picture(n)), "path": None}, "label": n % 3} for n in range(first, first + count)
    ]


def write_hub(root, train, val):
    """A folder as a dataset of the hub is; as with most of them, nothing says how long its files are."""
    counts = []
    for split, lengths in (("train", train), ("validation", val)):
        counts.append({"name": split, "num_examples": sum(lengths), "num_bytes": 1})
        for shard, length in enumerate(lengths):
            path = root / f"{split}-{shard:05}-of-{len(lengths):05}.parquet"
            write_parquet(path, rows(sum(lengths[:shard]), length))
    features = [{"name": "picture", "dtype": "image"}]
    features += [{"name": "label", "dtype": {"class_label": {"names": {"0": "a", "1": "b", "2": "c"}}}}]
    about = {"dataset_info": {"features": features, "splits": counts}}
    (root / "README.md").write_text(f"---\n{json.dumps(about)}\n---\n")


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Arguments of ImageData for the same images in several forms."""
    root = tmp_path_factory.mktemp("streams")
    for name in ("tars", "hub", "one", "cache"):
        (root / name).mkdir()
    write_tars(root / "tars")
    write_hub(root / "hub", TRAIN, VAL)
    write_hub(root / "one", (72,), (39,))
    (root / "plain").mkdir()
    for path in (root / "tars").glob("*.tar"):
        shutil.copy(path, root / "plain")
    patterns = {"train_split": "train-{0..2}.tar|72", "val_split": "val-{0..2}.tar|39"}
    cache = {"root": str(root / "cache"), "val_split": "validation"}
    return {
        "tars": {"dataset": "wds/x", "root": str(root / "tars")},
        "pattern": {"dataset": "wds/x", "root": str(root / "plain"), **patterns},
        "hub": {"dataset": f"hfids/{root / 'hub'}", **cache},
        "one": {"dataset": f"hfids/{root / 'one'}", **cache},
        "rows": {"dataset": f"hfds/{root / 'hub'}", **cache},
    }


def open_data(source, world=1, rank=0, predicting=False, **more):
    arguments = {"num_classes": 3, "batch_size": 4, "num_workers": 0, **EXACT, **source, **more}
    data = ImageData(**arguments)
    about = {"world_size": world, "global_rank": rank, "lightning_module": None, "predicting": predicting}
    data.trainer = type("T", (), about)()
    data.setup("fit")
    return data


def numbers(loader, data=None):
    """Which images there are in each batch."""
    found, batches = [], list(loader)
    if data:
        loader._iterator = None  # its processes stop now; found among garbage, each of them takes 5 seconds
    for batch in batches:
        images, targets = data.on_before_batch_transfer(batch, 0) if data else (batch.images, batch.targets)
        which = ((images.flatten(1)[:, 0] if len(images) else images) * 255).round().int()
        assert targets.tolist() == (which % 3).tolist()
        found.append(which.tolist())
    return found


def epoch(loader, number):
    loader.sampler.set_epoch(number)
    return numbers(loader)


def together(batches):
    return [number for batch in batches for number in batch]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 0), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("source", ["tars", "pattern", "hub", "one"])
def test_evaluation_counts_each_image_once(sources, source, world, workers):
    counted, lengths = [], []
    for rank in range(world):
        loader = open_data(sources[source], world, rank, num_workers=workers).val_dataloader()
        batches = numbers(loader)
        assert len(batches) == len(loader)
        assert numbers(loader) == batches
        counted += together(batches)
        lengths.append(len(together(batches)))
    assert Counter(counted) == Counter(range(39))
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 1), (3, 2)])
@pytest.mark.parametrize("source", ["tars", "pattern", "hub", "one"])
def test_training_shares(sources, source, world, workers):
    """The same number of batches everywhere, as the loader says; no image twice where the shards' lengths are known."""
    seen = []
    for rank in range(world):
        loader = open_data(sources[source], world, rank, num_workers=workers, batch_size=5).train_dataloader()
        batches = numbers(loader)
        assert len(batches) == len(loader) == 72 // world // 5
        assert {len(batch) for batch in batches} == {5}
        seen += together(batches)
    assert seen != sorted(seen)
    if source in ("tars", "one"):
        assert max(Counter(seen).values()) == 1
    else:
        assert len(set(seen)) >= 0.6 * len(seen)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 7])
def test_shards_of_unknown_lengths_are_shared_out(sources, lanes):
    """Each image belongs to one lane, be there more shards or more lanes."""
    shards = open_data(sources["pattern"]).stages["train"][0]
    shares = [[name for name, _ in shards.share([2, 0, 1], lane, lanes)] for lane in range(lanes)]
    assert max(Counter(together(shares)).values()) == 1
    assert len(together(shares)) == 72
    assert min(map(len, shares)) > 0


@pytest.mark.parametrize("source", ["tars", "hub", "one"])
def test_order_depends_on_seed_and_epoch(sources, source):
    """The epoch reaches loading processes that are there already."""

    def order(seed, *epochs):
        loader = open_data(sources[source], 2, 1, num_workers=2, seed=seed).train_dataloader()
        return [epoch(loader, number) for number in epochs]

    first, second, again = order(1, 0, 1, 0)
    assert first == again
    assert first != second
    assert order(1, 1) == [second]
    assert order(2, 0) != [first]


@pytest.mark.parametrize("source", ["tars", "hub"])
def test_a_run_goes_on_in_the_middle_of_an_epoch(sources, source):
    """Bit for bit, augmentation included."""

    def batches(skipped):
        data = open_data(sources[source], 2, 1, num_workers=2, no_aug=False, re_prob=1.0, train_split=split)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(3)
        data.skip_batches(skipped)
        return [batch.images for batch in loader]

    split = "train"
    whole = batches(0)
    for skipped in (1, 4):
        rest = batches(skipped)
        assert len(rest) == len(whole) - skipped
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[skipped:], strict=True))


def test_small_buffers_shuffle_too(sources, monkeypatch):
    monkeypatch.setattr("timm.data.readers.reader_wds.SAMPLE_SHUFFLE_SIZE", 6)
    monkeypatch.setattr("timm.data.readers.reader_wds.SAMPLE_INITIAL_SIZE", 2)
    data = open_data(sources["tars"])
    assert data.stages["train"][0].buffer == (6, 2)
    loader = data.train_dataloader()
    first, second = together(epoch(loader, 0)), together(epoch(loader, 1))
    assert sorted(first) == sorted(second) == list(range(72))
    assert first != second
    data.stages["train"][0].buffer = (1, 1)
    ends = {tuple(together(epoch(loader, number))[::71]) for number in range(6)}
    assert len(ends) > 2  # the shards come in another order
    assert ends <= {(a, b) for a in (0, 30, 50) for b in (29, 49, 71)}


@pytest.mark.parametrize("source", ["tars", "pattern", "hub"])
def test_predictions_are_in_order(sources, source):
    """Row r + W n of a table of predictions is image r + W n of the shards."""
    for rank in range(2):
        data = open_data(sources[source], 2, rank, predicting=True, num_workers=3)
        assert together(numbers(data.predict_dataloader())) == list(range(rank, 39, 2))


@pytest.fixture
def tars(sources, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(sources["tars"]["root"], tmp_path / "tars")
    return tmp_path / "tars"


def damage(root, case):
    path = root / "val-1.tar"
    if case == "image":
        samples = pictures(20, 12)
        samples[3][1]["png"] = samples[3][1]["png"][:45]
        write_tar(path, samples)
    elif case == "no image":
        samples = pictures(20, 12)
        samples[3][1]["xml"] = samples[3][1].pop("png")
        write_tar(path, samples)
    elif case == "cut":
        path.write_bytes(path.read_bytes()[: 2048 * 7 + 700])
    elif case == "short":
        write_tar(path, pictures(20, 9))
    elif case == "long":
        write_tar(path, pictures(20, 13))


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(
    ("case", "message", "lost"),
    [
        ("image", r"val-1.tar: 023: ", [23]),
        ("no image", r"val-1.tar: 023: there is no image, only cls, xml", [23]),
        ("cut", r"val-1.tar: the shard is damaged after 7 images: unexpected end of data", range(27, 32)),
        ("short", r"val-1.tar: there are 9 images, not 12", range(29, 32)),
        ("long", r"val-1.tar: there are more than 12 images", [31]),
    ],
)
def test_bad_images_stop_or_are_left_out(tars, case, message, lost, workers):
    damage(tars, case)
    source = {"dataset": "wds/x", "root": str(tars)}
    data = open_data(source, num_workers=workers)
    with pytest.raises(ValueError, match=f"cannot read image .*{message}.*skip_bad_images") as error:
        numbers(data.val_dataloader(), data)
    assert "\n" not in str(error.value)
    data = open_data(source, num_workers=workers, skip_bad_images=True)
    with pytest.warns(UserWarning, match=f"left out: .*{message}") as caught:
        found = together(numbers(data.val_dataloader(), data))
    assert len([warning for warning in caught if "left out" in str(warning.message)]) == 1
    assert sorted(found) == [n for n in range(39) if n not in lost]


def test_a_split_of_a_pattern_must_have_as_many_images_as_it_says(sources):
    for said, message in ((38, "there are more than 38 images"), (41, "there are 39 images, not 41")):
        data = open_data({**sources["pattern"], "val_split": f"val-{{0..2}}.tar|{said}"}, num_workers=3)
        with pytest.raises(ValueError, match=f"of the split: {message}"):
            numbers(data.val_dataloader(), data)


def test_a_damaged_shard_does_not_stop_training_where_images_may_be_left_out(sources, tmp_path):
    root = tmp_path / "tars"
    shutil.copytree(sources["pattern"]["root"], root)
    path = root / "train-1.tar"
    path.write_bytes(path.read_bytes()[: 2048 * 7 + 700])
    data = open_data({**sources["pattern"], "root": str(root)}, 2, 1, skip_bad_images=True, num_workers=1)
    with pytest.warns(UserWarning, match=r"left out: cannot read image .*train-1.tar: the shard is damaged after 7"):
        assert len(numbers(data.train_dataloader(), data)) == 72 // 2 // 4


def test_a_loading_process_without_images(tmp_path):
    write_tar(tmp_path / "a.tar", pictures(0, 5))
    data = open_data(
        {"dataset": "wds/x", "root": str(tmp_path), "train_split": "a.tar|24", "val_split": "a.tar|5"}, num_workers=6
    )
    with pytest.raises(ValueError, match="too few images for 1 x 6 loading processes"):
        numbers(data.train_dataloader(), data)


def test_every_kind_of_picture(tmp_path):
    sixteen = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    kinds = [
        (picture(9, "L"), "png"), (picture(9, "CMYK"), "jpeg"), (picture(9, "RGBA"), "webp"), (picture(9, "P"), "png"),
        (sixteen, "png"),
    ]  # fmt: skip
    stored = [encode(image, kind) for image, kind in kinds]
    samples = [
        (f"{n}", {kind: content, "cls": b"0"}) for n, (content, (_, kind)) in enumerate(zip(stored, kinds, strict=True))
    ]
    write_tar(tmp_path / "a.tar", samples)
    source = {"dataset": "wds/x", "root": str(tmp_path), "train_split": "a.tar|5", "val_split": "a.tar|5"}
    data = open_data(source)
    (first, second) = data.val_dataloader()
    for image, content in zip(torch.cat([first.images, second.images]), stored, strict=True):
        expected = np.asarray(to_mode(Image.open(io.BytesIO(content)), "RGB"))
        np.testing.assert_array_equal((image * 255).round().numpy().transpose(1, 2, 0), expected)


def test_bad_images_of_a_hub_dataset(sources, tmp_path):
    """Streamed or not; timm would put the next image in the place of a bad one."""
    root = tmp_path / "hub"
    shutil.copytree(sources["hub"]["dataset"].removeprefix("hfids/"), root)
    bad = rows(20, 12)
    bad[3]["picture"]["bytes"] = b"nothing"
    bad[4]["picture"] = None
    write_parquet(root / "validation-00001-of-00003.parquet", bad)
    for kind in ("hfids", "hfds"):
        source = {"dataset": f"{kind}/{root}", "root": str(tmp_path / "cache"), "val_split": "validation"}
        data = open_data(source)
        with pytest.raises(
            ValueError, match=r"cannot read image .*(shard 1, image 3|number 23): it is no image, or of"
        ):
            numbers(data.val_dataloader(), data)
        data = open_data(source, skip_bad_images=True, num_workers=1)
        with pytest.warns(UserWarning, match="left out: cannot read image") as caught:
            found = together(numbers(data.val_dataloader(), data))
        assert "there is no image in its row" in str(caught[1].message)
        assert sorted(found) == [n for n in range(39) if n not in (23, 24)]


def test_rows_of_the_hub_have_everything_that_folders_have(sources):
    data = open_data(sources["rows"], 2, 1)
    assert data.class_names == ["a", "b", "c"]
    assert together(numbers(data.val_dataloader())) == list(range(1, 39, 2))
    loader = data.train_dataloader()
    assert epoch(loader, 0) == epoch(loader, 0) != epoch(loader, 1)


def test_labels_have_to_be_classes(sources, tmp_path):
    data = open_data(sources["tars"], num_classes=2)
    (batch, *_) = list(data.val_dataloader())
    with pytest.raises(ValueError, match="an image has the label 2: with num_classes 2 it must be 0 to 1"):
        data.on_before_batch_transfer(batch, 0)
    write_tar(tmp_path / "a.tar", [("0", {"jpg": encode(picture(1))})] * 1)
    source = {"dataset": "wds/x", "root": str(tmp_path), "train_split": "a.tar|4", "val_split": "a.tar|1"}
    data = open_data(source)
    (batch,) = data.val_dataloader()
    with pytest.raises(ValueError, match="has the label -1"):
        data.on_before_batch_transfer(batch, 0)
    data.trainer.predicting = True  # then nobody asks for labels
    data.on_before_batch_transfer(batch, 0)


def bad_sources(sources, root):
    tars, hub = sources["tars"], sources["hub"]
    yield {**tars, "root": str(root / "nowhere")}, f"split train of wds/x in {root / 'nowhere'}: .*not found"
    yield {**tars, "val_split": "vall"}, "split vall of wds/x in .*not found"
    yield {**tars, "val_split": "val-{0..9}.tar"}, r"there is no shard .*val-3.tar \(nor 6 more\)"
    yield {**sources["pattern"], "val_split": "val-{0..2}.tar"}, r"nothing says how many images .*\.tar\|50000 would"
    yield {**hub, "val_split": "vall"}, "cannot open the split vall of hfids/.*: .*vall"
    yield {**hub, "dataset": "hfids/no/where"}, "cannot open the split train of hfids/no/where"
    yield {**hub, "dataset": "hfds/no/where"}, "cannot open the split train of hfds/no/where"
    yield (
        {**hub, "label_column": "fine"},
        r"its column fine \(--data.label_column\) must hold class numbers, got picture",
    )
    yield {**hub, "num_classes": 5}, "num_classes must be 3 for hfids/.*, got 5"
    yield {**tars, "dataset": "torch/cifar10"}, "cannot open the split train of torch/cifar10"
    yield {**tars, "batch_size": 73}, "batch_size must be at most 72"


def test_wrong_arguments_get_one_line(sources, tmp_path):
    for source, message in bad_sources(sources, tmp_path):
        with pytest.raises(ValueError, match=message) as error:
            open_data(source)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "package"), [("wds/x", "webdataset"), ("hfids/x/y", "datasets"), ("hfds/x", "datasets")]
)
def test_a_missing_package_is_named(name, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'hcvision\[streaming\]'"):
        streaming.open_dataset(name, str(tmp_path), "train")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_two_processes_fit_and_validate(sources, tmp_path, tiny, trainer_args):
    """DDP over gloo, three loading processes each: their accuracy is that of one process, to the last bit."""
    run = tmp_path / "run"
    model = {**tiny, "img_size": 8, "patch_size": 4}
    processes.run_twice(
        "fit", f"--run={run}", "--data.dataset=wds/x",
        f"--data.root={sources['tars']['root']}", "--data.num_classes=3", "--data.batch_size=4",
        "--data.num_workers=3", "--model.model=vit_tiny_patch16_224", "--model.connection=dhc2",
        f"--model.model_args={json.dumps(model)}", "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--trainer.strategy=ddp", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    *_, last = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    written = [
        row["val_top1"] for row in csv.DictReader((run / "metrics.csv").read_text().splitlines()) if row["val_top1"]
    ]
    assert last["step"] == str(2 * (72 // 2 // 4) - 1)
    checkpoint = run / "checkpoints" / "last.ckpt"
    classifier = ImageClassifier("vit_tiny_patch16_224", connection="dhc2", num_classes=3, model_args=model)
    data = ImageData(**sources["tars"], num_classes=3, batch_size=4, num_workers=0)
    (scores,) = pl.Trainer(**trainer_args).validate(classifier, data, str(checkpoint), verbose=False, weights_only=True)
    assert scores["val_top1"] == float(written[-1])


def lying(number=5):
    """A picture whose left half is red, and the bytes of it turned, with a note of that in EXIF."""
    image = Image.new("RGB", (8, 8), (0, 0, number))
    image.paste((255, 0, 0), (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(file, "png", exif=exif)
    return np.asarray(image), file.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["tars", "hfids", "hfds", "torch"])
def test_streams_are_read_as_files_are(tmp_path, kind, monkeypatch):
    """Upright, of the same kinds, without what other programs leave, and with nothing that is run or unpickled."""
    monkeypatch.setattr(subprocess, "Popen", None)
    upright, stored = lying()
    tampered = pickle.dumps(Payload(tmp_path / "it_ran"))
    root = tmp_path / "d"
    root.mkdir()
    if kind == "tars":
        more = {"pickle": tampered, "pyd": tampered, "npy": tampered, "json": b"{}"}
        samples = [
            ("0", {"png": stored, "cls": b"1", **more}), ("dir/._0", {"png": b"\0\5"}), ("__MACOSX/._0", {"png": b""}),
            ("1", {"jpg": POSTSCRIPT, "cls": b"0", **more}),
        ]  # fmt: skip
        write_tar(root / "a.tar", samples)
        source = {"dataset": "wds/x", "root": str(root), "train_split": "a.tar|2", "val_split": "a.tar|2"}
    elif kind == "torch":
        for split in ("train", "val"):
            for name, content in (
                ("a/1.jpg", POSTSCRIPT),
                ("b/0.png", stored),
                (".hidden/0.png", stored),
                ("b/._0.png", b""),
            ):
                (root / split / name).parent.mkdir(parents=True, exist_ok=True)
                (root / split / name).write_bytes(content)
        source = {"dataset": "torch/image_folder", "root": str(root)}
    else:
        pictures = [
            {"picture": {"bytes": content, "path": None}, "label": label, "other": {"bytes": POSTSCRIPT, "path": None}}
            for content, label in ((stored, 1), (POSTSCRIPT, 0))
        ]
        write_parquet(root / "train.parquet", pictures, other=datasets.Image())
        write_parquet(root / "validation.parquet", pictures, other=datasets.Image())
        for split in ("train", "validation"):  # the column of images is the one that is called so
            table = datasets.Dataset.from_parquet(str(root / f"{split}.parquet"), cache_dir=str(tmp_path / "c"))
            table.rename_column("picture", "image").to_parquet(str(root / f"{split}.parquet"))
        sizes = "".join(
            f"\n  - name: {split}\n    num_examples: 2\n    num_bytes: 1" for split in ("train", "validation")
        )
        (root / "README.md").write_text(f"---\ndataset_info:\n  splits:{sizes}\n---\n")
        source = {"dataset": f"{kind}/{root}", "root": str(tmp_path / "cache"), "val_split": "validation"}
    data = open_data(source, batch_size=2, skip_bad_images=True, num_classes=2 if kind == "torch" else 3)
    (batch,) = data.val_dataloader()
    (bad,) = batch.bad
    assert bad.reason == "it is no image, or of a kind that is not read"
    assert batch.targets.tolist() == [1]
    assert ((batch.images[0] * 255).round().permute(1, 2, 0).numpy() == upright).all()
    assert not (tmp_path / "it_ran").exists()


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "it ran"))


@pytest.mark.parametrize("command", ["pipe:touch {}", "PIPE:touch {}", " pipe:touch {}"])
def test_a_file_about_shards_starts_no_program(sources, tmp_path, command):
    shutil.copytree(sources["tars"]["root"], tmp_path / "tars")
    path = tmp_path / "tars" / "_info.json"
    about = json.loads(path.read_text())
    about["splits"]["train"]["filenames"][0] = command.format(tmp_path / "it_ran")
    path.write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=r"_info.json names a command \(' ?(pipe|PIPE):touch .*which only the command line may"
    ):
        open_data({**sources["tars"], "root": str(tmp_path / "tars")})
    assert not (tmp_path / "it_ran").exists()


def test_a_config_of_a_run_starts_no_program(tmp_path):
    """Who looks at a run that others trained reads its data."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("root", "train_split"):
        own = {"dataset": "wds/x", "num_classes": 3, name: f"pipe:touch {tmp_path / 'it_ran'} #.tar|9"}
        (tmp_path / "config.yaml").write_text(json.dumps({"data": own}))
        with pytest.raises(ValueError, match=r"config.yaml names a command, which only the command line may"):
            run_data(str(tmp_path))
        assert not (tmp_path / "it_ran").exists()
