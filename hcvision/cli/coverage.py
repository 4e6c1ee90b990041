"""``hcvision coverage``."""

import argparse
from collections import Counter, defaultdict

import timm
from tqdm import tqdm

from hcvision.models import coverage


def count_coverage(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hcvision coverage",
        description="Build every timm architecture on the meta device and convert it: which work, why not the others.",
    )
    parser.add_argument("pattern", nargs="?", default="", help="only names that match, such as 'vit_*'")
    parser.add_argument("--names", action="store_true", help="list every name")
    options = parser.parse_args(arguments)
    total = len(timm.list_models(options.pattern))
    works: Counter[str] = Counter()
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for name, module, reason in tqdm(coverage(options.pattern), total=total, disable=None, leave=False):
        if reason:
            reasons[reason].append(name)
        else:
            works[module] += 1
        if options.names:
            tqdm.write(f"{'no ' if reason else 'yes'} {name}{f': {reason}' if reason else ''}")
    yes, no = sum(works.values()), sum(map(len, reasons.values()))
    if not yes + no:
        raise ValueError(f"no timm name matches {options.pattern!r}")
    print(f"{yes} of {yes + no} timm names take connections\n")
    for module, count in works.most_common():
        print(f"{count:5} {module}")
    if reasons:
        print("\nthe others:\n")
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"{len(names):5} {reason} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})")
