"""Tables of images: CSV files with a column of files and one of labels."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hcvision.data.folders import OF_OTHERS, find_left_behind, say_left_out
from hcvision.data.images import open_image


@dataclass
class Row:
    """A line of a table: an image file, its labels, and the split it belongs to ("" where there is no such column)."""

    file: str
    labels: tuple[str, ...]
    split: str


def read_table(
    path: Path, file_column: str, label_column: str, separator: str | None = None, unlabelled: str | None = None
) -> list[Row]:
    """The rows of a CSV file with a header line; files are relative to its folder.

    Rows of files that other programs leave behind, by their names below the folder of all files, are left out.

    Args:
        path: of the CSV file, in UTF-8.
        file_column: name of the column of files.
        label_column: name of the column of labels.
        separator: between the labels of an image; None for exactly one label an image.
        unlabelled: the split whose rows may be without a label, and whose files need not be there yet.

    Raises:
        ValueError: no such columns, a row without file or label, a file that is not there.
    """
    rows: dict[int, Row] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if file_column not in columns or label_column not in columns:
                raise ValueError(
                    f"{path} must have the columns {file_column} and {label_column} in its first line, got "
                    f"{', '.join(columns) or 'nothing'} (--data.file_column and --data.label_column name others)"
                )
            for cells in reader:
                name, label = (cells[column] or "" for column in (file_column, label_column))
                split = (cells.get("split") or "").strip()
                given = [label] if separator is None else label.split(separator)
                labels = tuple(filter(None, map(str.strip, given)))
                if not name or not (labels or separator or (split and split == unlabelled)):
                    raise ValueError(f"{path}, line {reader.line_num}: no {'label' if name else 'file'}")
                rows[reader.line_num] = Row(str(path.parent / name), labels, split)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error
    left_behind = find_left_behind([row.file for row in rows.values()])
    say_left_out(OF_OTHERS, left_behind, path)
    rows = {line: row for line, row in rows.items() if row.file not in left_behind}
    needed = {line: row.file for line, row in rows.items() if not row.split or row.split != unlabelled}
    missing = [(line, file) for line, file in needed.items() if not os.path.isfile(file)]
    if missing:
        line, name = missing[0]
        more = f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{path}, line {line}: there is no file {name}{more}")
    if not rows:
        raise ValueError(f"there is no image in {path}")
    return list(rows.values())


def find_classes(rows: Sequence[Row]) -> list[str]:
    """The labels of the rows, each once, sorted: as numbers where all are, and by their text where these are equal."""
    labels = sorted({label for row in rows for label in row.labels})
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else labels


class Table(Dataset):
    """The images of a table's rows; a target is a class number, or with ``multi_label`` (K,), one where a label is.

    Raises:
        ValueError: a label that is none of the classes, or a row without a label.
    """

    def __init__(self, rows: Sequence[Row], classes: list[str], multi_label: bool = False):
        self.classes, self.multi_label = classes, multi_label
        bare = None if multi_label else next((row.file for row in rows if not row.labels), None)
        if bare is not None:
            raise ValueError(f"there is no label of {bare}")
        numbers = {name: number for number, name in enumerate(classes)}
        unknown = [(row.file, label) for row in rows for label in row.labels if label not in numbers]
        if unknown:
            raise ValueError(
                f"the label {unknown[0][1]!r} of {unknown[0][0]} is not among those of the training images"
            )
        self.labels = [tuple(numbers[label] for label in row.labels) for row in rows]
        self.targets = [0 if multi_label else labels[0] for labels in self.labels]  # what a split is balanced by
        self.samples = [(row.file, target) for row, target in zip(rows, self.targets, strict=True)]

    @property
    def empty(self) -> list[str]:
        """Names of the classes without images."""
        found = {label for labels in self.labels for label in labels}
        return [name for label, name in enumerate(self.classes) if label not in found]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | Tensor]:
        path, target = self.samples[index]
        if not self.multi_label:
            return open_image(path), target
        return open_image(path), torch.zeros(len(self.classes)).index_fill(
            0, torch.tensor(self.labels[index], dtype=torch.long), 1
        )
