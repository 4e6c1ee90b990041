"""``hcvision score``."""

from pathlib import Path
from typing import Any

from hcvision.cli.parsing import StudyParser
from hcvision.data import ImageData, check_number, pick_device, write_json
from hcvision.diffusion import describe_samples
from hcvision.studies import (
    FEWEST,
    Extractor,
    Inception,
    SmallClassifier,
    TimmNetwork,
    compare_features,
    count_samples,
    look_at_data,
    look_at_samples,
    open_samples,
    train_classifier,
    warn_of_few,
)


def score(arguments: list[str]) -> None:
    parser = StudyParser(
        prog="hcvision score",
        description="Compare drawn images with real ones. The real ones are the training images of --data.",
    )
    parser.add_argument(
        "samples", type=str, help="a folder of `hcvision sample`, or an .npz with arr_0 (N, H, W, C) uint8"
    )
    parser.add_argument("--number", type=int | None, default=None, help="score the first so many samples")
    parser.add_argument("--real_images", type=int, default=10000, help="training images to compare with")
    parser.add_argument(
        "--networks",
        type=list[str] | None,
        default=None,
        help="whose features to compare: inception, classifier, any timm name, NAME=FILE for weights in a file, or "
        "local-dir:FOLDER of `hcvision export` (default: inception where it is given, else classifier)",
    )
    parser.add_argument("--inception", type=str | None, default=None, help="file of Inception's weights, or download")
    parser.add_argument(
        "--classifier",
        type=str | None,
        default=None,
        help="folder of the small classifier, trained there if need be (default: beside the samples)",
    )
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, ...; auto takes a GPU if there is one")
    parser.add_class_arguments(ImageData, "data", instantiate=False)
    options = parser.parse_args(arguments)
    path = Path(options.samples)
    count_samples(path, options.number)
    check_number("real_images", options.real_images, least=FEWEST, whole=True)
    shape = open_samples(path)[0].shape
    device = pick_device(options.device)
    input_size = (shape[3], *shape[1:3])
    data = options.data.as_dict()
    names = options.networks or ["inception" if options.inception else "classifier"]
    if len(set(names)) < len(names):
        raise ValueError(f"networks must be different ones, got {', '.join(names)}")

    def open_network(name: str) -> Extractor:
        if name == "inception":
            given = options.inception or "download"
            return Inception(None if given == "download" else given, device)
        if name != "classifier":
            return TimmNetwork(name, device)
        folder = Path(options.classifier) if options.classifier else path.parent / "classifier"
        train_classifier(folder, data, input_size, device=device)
        return SmallClassifier(folder, device)

    # the classifier last: it may have to be trained
    networks = {name: open_network(name) for name in sorted(names, key=lambda name: name == "classifier")}
    images = ImageData(**data)
    images.prepare_data()
    how = describe_samples(path) if path.is_dir() else None
    print(f"drawn by {how or 'what the .npz does not say'}")
    found = []
    for extractor in (networks[name] for name in names):
        drawn = look_at_samples(extractor, path, options.number)
        real = look_at_data(extractor, images, "train", input_size, options.real_images)
        about = {"samples": len(drawn.features), "real": len(real.features), "network": extractor.name, "drawn": how}
        found.append({**about, **compare_features(drawn, real)})
        say_scores(extractor, found[-1], warn_of_few(drawn, real))
    scores = {**found[0], "others": found[1:]} if found[1:] else found[0]
    file = path / "scores.json" if path.is_dir() else path.with_suffix(".scores.json")
    try:
        write_json(file, scores)
        print(f"written to {file}")
    except OSError as error:
        print(f"the scores cannot be kept in {file}: {error.strerror}")


def say_scores(extractor: Extractor, scores: dict[str, Any], few: str | None) -> None:
    """Print the scores on the features of a network, and what is wrong with so few images."""
    print(f"{scores['samples']:,} samples against {scores['real']:,} training images, seen by {extractor.name}")
    labels = {"distance": extractor.distance, "kernel_distance": extractor.kernel, "score": extractor.score}
    labels["accuracy"] = "in the class they were drawn as"
    for name in ("distance", "kernel_distance", "score", "precision", "recall", "accuracy"):
        if name in scores:
            digits = 6 if name == "kernel_distance" else 4
            print(f"{scores[name]:9.{digits}f}  {labels.get(name, name)}")
    if few:
        print(few)
