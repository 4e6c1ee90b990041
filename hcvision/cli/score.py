"""``hcvision score``."""

from pathlib import Path

from hcvision.cli.parsing import StudyParser
from hcvision.data import ImageData, check_number, pick_device, write_json
from hcvision.diffusion import describe_samples
from hcvision.studies import (
    FEWEST,
    Extractor,
    Inception,
    SmallClassifier,
    compare_features,
    count_samples,
    look_at_data,
    look_at_samples,
    open_samples,
    train_classifier,
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
    parser.add_argument("--inception", type=str | None, default=None, help="file of Inception's weights, or download")
    parser.add_argument(
        "--classifier",
        type=str | None,
        default=None,
        help="without Inception: folder of the small classifier, trained there if need be (beside the samples)",
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
    extractor: Extractor
    if options.inception:
        extractor = Inception(None if options.inception == "download" else options.inception, device)
    else:
        folder = Path(options.classifier) if options.classifier else path.parent / "classifier"
        train_classifier(folder, data, input_size, device=device)
        extractor = SmallClassifier(folder, device)
    drawn = look_at_samples(extractor, path, options.number)
    images = ImageData(**data)
    images.prepare_data()
    real = look_at_data(extractor, images, "train", input_size, options.real_images)
    scores = {"samples": len(drawn.features), "real": len(real.features), "network": extractor.name}
    how = describe_samples(path) if path.is_dir() else None
    scores |= {"drawn": how, **compare_features(drawn, real)}
    print(f"drawn by {how or 'what the .npz does not say'}")
    print(f"{scores['samples']:,} samples against {scores['real']:,} training images, seen by {extractor.name}")
    labels = {"distance": extractor.distance, "score": extractor.score, "accuracy": "in the class they were drawn as"}
    for name in ("distance", "score", "precision", "recall", "accuracy"):
        if name in scores:
            print(f"{scores[name]:9.4f}  {labels.get(name, name)}")
    number, features = min(len(drawn.features), len(real.features)), drawn.features.shape[1]
    if number <= features:
        print(
            f"the distance says little: {features} features have no covariance of {number} images; more would be needed"
        )
    file = path / "scores.json" if path.is_dir() else path.with_suffix(".scores.json")
    try:
        write_json(file, scores)
        print(f"written to {file}")
    except OSError as error:
        print(f"the scores cannot be kept in {file}: {error.strerror}")
