"""The README's Python runs, in order, and its commands name files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert capsys.readouterr().out.split("\n")[:2] == ["torch.Size([2, 17, 4, 5])", "torch.Size([2, 17, 4])"]


def test_files_and_targets_exist():
    for path in re.findall(r"(?:configs|docs)/[\w./-]+\.\w+", README):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def cells_of(line):
    return tuple(cell.strip() for cell in line.strip("| ").split("|"))


@pytest.mark.parametrize("page", ["README.md", "docs/results/README.md"])
def test_tables_of_studies_are_those_of_their_reports(page):
    """Every row of a table with paired differences stands in a report that the committed CSV files make."""
    reports = (ROOT / "docs" / "results").glob("*/report.md")
    known = {cells_of(line) for path in reports for line in path.read_text().splitlines() if line.startswith("|")}
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(), re.MULTILINE)
    rows = [
        line for table in tables if "| minus " in table for line in table.splitlines() if not line.startswith("| -")
    ]
    assert rows
    assert [row for row in rows if cells_of(row) not in known] == []
