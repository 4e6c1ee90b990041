"""The README's Python runs, in order, and its commands name files that are there."""

import re
from pathlib import Path

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
