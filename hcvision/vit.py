"""The ViT names registered with timm: ``<timm name>_<connection>``, for example ``vit_base_patch16_224_dhc2``."""

from hcvision.connections import KINDS
from hcvision.convert import register

BASES = tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
RATES = (2, 4, 8)

NAMES = tuple(register(base, f"{kind}{rate}") for base in BASES for kind in KINDS for rate in RATES)
