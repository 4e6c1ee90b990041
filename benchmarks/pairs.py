"""Twins of a study held against each other, seed by seed: the differences of scores and of the validation loss.

    python benchmarks/pairs.py docs/results/fashion_mnist_stream_dtype
    python benchmarks/pairs.py FOLDER dhc2-bf16:dhc2 dfc4-bf16:dfc4

A report holds every variant against the first one. Without names each variant NAME-SOMETHING is held against NAME. An
interval is that of the mean difference, 95 %, Student's t, as in a report.
"""

import argparse
import csv
import statistics
from pathlib import Path

from hcvision.data import markdown
from hcvision.studies import interval

COLUMNS = {  # of results.csv, those that there are: heading, factor, digits
    "top1": ("top-1, points", 100.0, 2),
    "distance": ("Fréchet distance", 1.0, 2),
    "val_loss": ("validation loss", 1.0, 4),
}


def find_pairs(variants: list[str]) -> list[tuple[str, str]]:
    """Each variant NAME-SOMETHING and NAME."""
    return [(one, other) for one in variants for other in variants if one.startswith(f"{other}-")]


def compare(rows: list[dict[str, str]], one: str, other: str) -> list[str]:
    """A row of the table: the pair, its seeds, and the mean difference of each column with its interval."""
    cells = {(row["variant"], row["seed"]): row for row in rows}
    seeds = sorted(
        {seed for variant, seed in cells if variant == one} & {seed for v, seed in cells if v == other}, key=int
    )
    if len(seeds) < 2:
        raise SystemExit(f"{one} and {other} have {len(seeds)} seeds in common; an interval needs two at least")
    shown = [f"{one} - {other}", str(len(seeds))]
    for name, (_, factor, digits) in COLUMNS.items():
        if name not in rows[0]:
            continue
        differences = [factor * (float(cells[one, seed][name]) - float(cells[other, seed][name])) for seed in seeds]
        mean, half = statistics.mean(differences), interval(differences)
        shown.append(f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]")
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with results.csv of a study")
    parser.add_argument("pairs", nargs="*", metavar="ONE:OTHER")
    options = parser.parse_args(arguments)
    path = options.folder / "results.csv"
    if not path.is_file():
        parser.error(f"{options.folder} holds no results.csv of a study")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    pairs = [tuple(pair.split(":")) for pair in options.pairs] or find_pairs(variants)
    wrong = [":".join(pair) for pair in pairs if len(pair) != 2 or not set(pair) <= set(variants)]
    if wrong or not pairs:
        parser.error(f"pairs must be ONE:OTHER of {', '.join(variants)}, got {', '.join(wrong) or 'none'}")
    heading = ["pair", "seeds", *(about for name, (about, *_) in COLUMNS.items() if name in rows[0])]
    print("\n".join(markdown([heading, *(compare(rows, *pair) for pair in pairs)])))


if __name__ == "__main__":
    main()
