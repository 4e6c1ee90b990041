"""ImageNet's relatives in tiny folders of the same layout, and subsets of classes."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from hcvision.data.module import ImageData
from hcvision.data.relatives import list_classes, pick_label, read_real_labels
from hcvision.data.subsets import leave_out, list_synsets, read_classes

SYNSETS = list_synsets()


def write_image(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number % 256, number // 256, 9)).save(path)


def write_layout(root, names):
    """A folder per name, an image each, which says which one it is of."""
    for number, name in enumerate(names):
        write_image(root / name / "a.jpg.png", number)
    return root


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    return write_layout(tmp_path_factory.mktemp("v2"), [str(number) for number in range(1000)])


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    write_layout(root / "val", SYNSETS)
    return root


@pytest.fixture(scope="module")
def r(tmp_path_factory):
    root = write_layout(tmp_path_factory.mktemp("r"), [SYNSETS[number] for number in list_classes("r")])
    (root / "README.txt").write_text("as it is distributed")
    return root


def images_of(data):
    data.setup("validate")
    base, indices = data.stages["val"]
    return [base[index] for index in indices]


def number_of(image):
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def test_v2_is_numbered(v2):
    """Folder 10 is class 10, and not that behind 1, as sorting texts would have it."""
    data = ImageData(root=str(v2), relative="v2")
    found = images_of(data)
    assert len(found) == data.num_classes == 1000
    assert all(number_of(image) == target for image, target in found)
    assert data.class_names == list(SYNSETS)
    assert data.chosen is None


def test_r_has_200_classes(r):
    """Each has the number that it has among the 1,000."""
    data = ImageData(root=str(r), relative="r")
    found = images_of(data)
    assert [target for _, target in found] == data.chosen == list_classes("r")
    assert len(data.chosen) == 200
    assert data.num_classes == 1000
    assert SYNSETS[data.chosen[0]] == "n01443537"
    assert data.chosen[0] == 1
    assert data.variant == "r"


def test_lists_of_timm():
    """Numbers and WordNet ids are two files there; what they have in common are 200 classes each."""
    assert len(list_classes("a")) == len(list_classes("r")) == 200
    assert list_classes("a")[:3] == [6, 11, 13]
    assert list_classes("sketch") == list(range(1000))
    assert list(SYNSETS) == sorted(SYNSETS)


def test_some_classes_of_a_relative(r, val):
    """The same ones are clean in ImageNet's validation images; classes that the relative has not are left out."""
    own = [SYNSETS[1], SYNSETS[0]]  # R has no tench
    data = ImageData(root=str(r), relative="r", classes=own)
    assert [target for _, target in images_of(data)] == data.chosen == [1]
    clean = ImageData(root=str(val), relative="val", classes="imagenet-r")
    assert [target for _, target in images_of(clean)] == clean.chosen == list_classes("r")
    assert all(number_of(image) == target for image, target in images_of(clean))
    with pytest.raises(ValueError, match="ImageNet-R has none of the classes; it has 200, n01443537"):
        ImageData(root=str(r), relative="r", classes=[SYNSETS[0]])


def test_real(tmp_path):
    """Every label of ReaL, in folders or not; images without labels are not scored."""
    labels = read_real_labels()
    assert len(labels) == 50000
    none, two, one = ([len(own) for own in labels].index(count) for count in (0, 2, 1))
    for number, place in ((none, ""), (two, "n01440764/"), (one, "")):
        write_image(tmp_path / "val" / f"{place}ILSVRC2012_val_{number + 1:08}.png", number)
    for path in list(tmp_path.rglob("*.png")):
        path.rename(path.with_suffix(".JPEG"))
    with pytest.warns(UserWarning, match="has 3 of ImageNet's 50,000 validation images"):
        data = ImageData(root=str(tmp_path), relative="real")
    found = {tuple(target.nonzero().flatten().tolist()): number_of(image) for image, target in images_of(data)}
    assert found == {tuple(sorted(labels[number])): number % 65536 for number in (two, one)}
    assert labels[:3] == [[], [970, 795], [230, 231]]  # in the order of the files' names


def test_the_label_that_counts():
    """Of two labels the more probable one: the image is right in the first k exactly if any of them is."""
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    is_label = torch.tensor([[False, False, True, True], [True, True, False, True]])
    assert pick_label(logits, is_label).tolist() == [2, 3]
    many, labels = torch.randn(50, 9), torch.rand(50, 9) < 0.3
    labels[:, 0] |= ~labels.any(1)
    for k in (1, 2, 5):
        first = many.topk(k).indices
        expected = [bool(own[top].any()) for own, top in zip(labels, first, strict=True)]
        assert (first == pick_label(many, labels)[:, None]).any(1).tolist() == expected


def test_wrong_layouts(v2, r, tmp_path):
    """One line that says what was expected, and what is there."""

    def say(root, relative, **more):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            ImageData(root=str(root), relative=relative, **more)
        return str(error.value)

    assert "must hold ImageNet-R as it is distributed, 200 folders of WordNet ids (n01443537, ...); got 0" in say(
        v2, "r"
    )
    assert "ImageNet-V2 as it is distributed, 1,000 folders 0 to 999; got n01443537 and 199 others" in say(r, "v2")
    assert "ImageNet-Sketch as it is distributed, 1,000 folders of WordNet ids" in say(r, "sketch")
    assert "800 are missing, n01440764 among them" in say(r, "sketch")
    above = tmp_path / "above"
    above.mkdir()
    (above / "round").symlink_to(above / "round")  # leads nowhere
    (above / "inner").symlink_to(r)
    assert say(above, "r").endswith(f"{above / 'inner'} does")
    assert "there is no folder" in say(tmp_path / "no", "a")
    assert "relative must be one of v2, a, r, sketch, real, val, got 'c'" in say(r, "c")
    assert "--data.dataset folder" in say(r, "r", dataset="cifar10")
    assert "has no ReaL label: files must be named as ImageNet's validation images are" in say(r, "real")
    empty = write_layout(tmp_path / "r", [SYNSETS[number] for number in list_classes("r")])
    (empty / SYNSETS[4] / "a.jpg.png").unlink()
    assert say(empty, "r") == f"there is no image in the class folder {empty / SYNSETS[4]}"
    assert len(images_of(ImageData(root=str(empty), relative="r", classes=[SYNSETS[1]]))) == 1


def test_evaluation_alone(r, image_folder):
    for more in ({"relative": "r", "root": str(r)}, {"classes": "zebra", "root": str(image_folder)},
                 {"corruption": "jpeg", "root": str(image_folder)}):  # fmt: skip
        with pytest.raises(ValueError, match="is for validate and test, not for training"):
            ImageData(batch_size=4, **more).setup("fit")


# Classes
def targets_of(data, stage="val"):
    data.setup("validate")
    base, indices = data.stages[stage]
    return [base.targets[index] for index in indices]


@pytest.mark.parametrize("kind", ["list", "file", "word"])
def test_classes(image_folder, tmp_path, kind):
    """Images of these alone, and the numbers that they have among all."""
    (tmp_path / "some.txt").write_text("zebra\n\nleft-out\n")
    classes = {"list": ["zebra", "left-out"], "file": str(tmp_path / "some.txt"), "word": "zebra"}[kind]
    data = ImageData(root=str(image_folder), classes=classes, num_workers=0)
    chosen = [2] if kind == "word" else [0, 2]
    assert targets_of(data) == [number for number in chosen for _ in range(13)]
    assert data.chosen == chosen
    assert data.num_classes == 3
    assert data.variant == {"list": "chosen", "file": "some", "word": "zebra"}[kind]
    assert len(data.stages["train"][1]) == 72


def test_unknown_classes(image_folder, tmp_path):
    def say(classes, **more):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is looked at
            ImageData(root=str(image_folder), classes=classes, **more)
        return str(error.value)

    assert say(["zebra", "zebr", "cat"]) == "'zebr' is no class of the data (nor are 1 more); did you mean zebra?"
    assert say("x/y.txt") == "there is no file x/y.txt of classes"
    assert say(["0"]) == "'0' is no class of the data; they are left-out, müller straße, zebra"
    assert "must name one class or more" in say([])
    assert "'n01498041' is no class of the data (nor are 199 more)" in say("imagenet-a")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "is no text" in say(str(tmp_path / "bytes"))


def test_names_of_lists():
    assert read_classes("imagenet-a") == [SYNSETS[number] for number in list_classes("a")]
    assert read_classes(["b", "a"]) == ["b", "a"]


def test_logits_that_are_left_out(image_folder):
    """Their probability is 0, and the others share theirs as before."""
    logits = torch.randn(5, 3)
    left = leave_out(logits, [0, 2])
    assert torch.equal(left[:, [0, 2]], logits[:, [0, 2]])
    torch.testing.assert_close(left.softmax(1)[:, [0, 2]], logits[:, [0, 2]].softmax(1))
    assert left.softmax(1)[:, 1].tolist() == [0] * 5
    kept = ImageData(root=str(image_folder), classes=["zebra"], other_logits="keep")
    assert torch.equal(kept.leave_out(logits), logits)
    assert kept.variant == "chosen-all-logits"
    only = ImageData(root=str(image_folder), classes=["zebra"]).leave_out(logits)
    assert only.argmax(1).tolist() == [2] * 5


def test_classes_of_tables_and_of_images_in_memory(image_folder, tmp_path, monkeypatch):
    """A table's as a folder's; those of sets that torchvision downloads are known when they are opened."""
    rows = [f"{path},{path.parent.name},{path.parent.parent.name}" for path in sorted(image_folder.glob("*/*/*.png"))]
    (tmp_path / "t.csv").write_text("\n".join(["file,label,split", *rows]))
    table = ImageData("csv", root=str(tmp_path / "t.csv"), classes=["zebra"], num_workers=0)
    assert targets_of(table) == [2] * 13
    with pytest.raises(ValueError, match="classes cannot be chosen with several labels per image"):
        ImageData("csv", root=str(tmp_path / "t.csv"), classes=["zebra"], multi_label=True)

    class Small(SimpleNamespace):
        def __len__(self):
            return 4

    monkeypatch.setattr(
        ImageData, "_torchvision", lambda *_, **__: Small(classes=list("abcdefghij"), targets=[3, 1, 3, 0])
    )
    data = ImageData("cifar10", classes=["d", "b"], num_workers=0)
    assert targets_of(data) == [3, 1, 3]
    assert data.chosen == [1, 3]
    assert targets_of(data.corrupted("jpeg", 1)) == [3, 1, 3]
    with pytest.raises(ValueError, match="there are no val images of c"):
        ImageData("cifar10", classes=["c"], num_workers=0).setup("validate")
