"""Files written whole or not at all, and what is said where they cannot be."""

import csv
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

UNREADABLE = (  # what torch.load says of files that are something else, or damaged
    *(RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error),
    *(ValueError, TypeError, LookupError, AttributeError),
)


def write_whole(path: Path, content: Any) -> None:
    """Write bytes into a file, whole or not at all; what was there before stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # what is left of it where that failed


def check_writable(folder: Path, instead: str) -> None:
    """Look at a folder, or at the one in which it is to be made, before long work.

    Args:
        folder: into which something is to be written.
        instead: what would work, for the error.

    Raises:
        PermissionError: nothing can be written there.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    effective = os.access in os.supports_effective_ids
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK, effective_ids=effective):
        raise PermissionError(f"nothing can be written into {there}; {instead}")


def write_json(path: Path, value: Any) -> None:
    """Write it whole or not at all."""
    write_whole(path, json.dumps(value, indent=1).encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys, whole or not at all."""
    write_cells(path, [[*rows[0]], *([*row.values()] for row in rows)])


def write_cells(path: Path, rows: list[list[Any]]) -> None:
    """Write a CSV file of a header and rows, whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def markdown(rows: list[list[str]]) -> list[str]:
    """A table in Markdown of a header and rows, aligned so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(line)} |" for line in lines]


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """The first difference between two trees of plain values, in words, or None."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            difference = first_difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return None
    return None if there == here else f"{name} is {there!r} there and {here!r} here"
