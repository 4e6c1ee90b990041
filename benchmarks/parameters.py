"""How many parameters each kind of connection adds to a model, counted on the meta device.

python benchmarks/parameters.py
python benchmarks/parameters.py --model vit_base_patch16_224 --names sihc8 mhc4
"""

import argparse

import hcvision
from hcvision.connections import NAMES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm name")
    parser.add_argument("--names", nargs="+", default=NAMES, metavar="CONNECTION")
    options = parser.parse_args(arguments)
    sizes = {
        name: sum(p.numel() for p in hcvision.create_model(options.model, name, device="meta").parameters())
        for name in ("residual", *options.names)
    }
    whole = sizes.pop("residual")
    print(f"{options.model}: {whole:,} parameters")
    for name, size in sizes.items():
        print(f"{name}: {size - whole:,} ({(size - whole) / whole:.2%})")


if __name__ == "__main__":
    main()
