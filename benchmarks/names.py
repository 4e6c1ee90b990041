"""What importing hcvision registers with timm, and what that costs.

    python benchmarks/names.py

What: names that timm lists once hcvision is imported and not before, and entries of its table of pretrained
configurations (a name, or a name with a tag). The time is that of ``import hcvision`` where torch and timm are
imported already, in a process of its own each time: processor time, the median of ``--rounds``.
"""

import argparse
import statistics
import subprocess
import sys

IMPORT = """
import time, torch, timm
start = time.process_time()
import hcvision
print(time.process_time() - start)
"""

COUNT = """
import timm
before = {*timm.list_models(), *timm.list_models(include_tags=True)}
bare = set(timm.list_models())
import hcvision
families = {"ViT": hcvision.vit_names, "DiT": hcvision.dit_names}
for family, names in families.items():
    tags = [tagged for name in names for tagged in timm.list_pretrained(name)]
    print(f"{family}: {len(names)} names, {len(tags)} pretrained tags of their bases")
new = set(timm.list_models()) - bare
entries = {*timm.list_models(), *timm.list_models(include_tags=True)} - before
print(f"{len(bare)} names of timm's own, {len(new)} more; {len(entries)} entries with tags")
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    print(run(COUNT), end="")
    seconds = [float(run(IMPORT)) for _ in range(options.rounds)]
    print(f"import hcvision: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main()
