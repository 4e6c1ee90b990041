"""Train from a checkout: ``python train.py fit --config configs/...`` is ``hcvision fit --config configs/...``."""

from hcvision_command import main

if __name__ == "__main__":
    main()
