"""The ViT names registered with timm: ``<timm name>_<connection>``, for example ``vit_base_patch16_224_dhc2``."""

from hcvision.connections import NAMES as CONNECTIONS
from hcvision.models.names import register_name

BASES = tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))

NAMES = tuple(register_name(base, connection) for base in BASES for connection in (*CONNECTIONS, "mudd"))
