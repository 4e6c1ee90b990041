"""Train from a checkout: ``python train.py fit --config configs/...`` is ``hcvision fit --config configs/...``."""

from hcvision.cli import main

if __name__ == "__main__":
    main()
