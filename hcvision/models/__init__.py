"""timm's models with connections, and diffusion transformers: what each block adds, conversion, names.

``convert`` swaps the classes of a model and of its blocks for subclasses that only differ in what stands where the
residual adds were: no module is moved, so the keys of the state dict, hooks, ``isinstance`` and the weights stay.
``families.py`` has a row for each class of timm; ``blocks.py``, ``column_blocks.py`` and ``stage_blocks.py`` say what
their blocks add; ``stages.py`` finds a model's blocks, ``connected.py`` is the model around them, ``conversion.py``
puts it all together, and ``names.py`` makes it a name of timm. ``vit.py`` and ``dit.py`` are the names registered here.
``frozen.py`` is a model that looks at images and is not trained.
"""

from hcvision.models.blocks import ConnectedBlock
from hcvision.models.borders import connections_of
from hcvision.models.connected import ConnectedModel
from hcvision.models.conversion import convert, recompute_streams, set_stream_dtype
from hcvision.models.dit import NAMES as dit_names
from hcvision.models.dit import TRUNK, DiT, read_sizes
from hcvision.models.families import BLOCKS
from hcvision.models.frozen import FrozenModel, open_encoder
from hcvision.models.grafting import own_class
from hcvision.models.names import (
    checkpoint_filter_fn,
    coverage,
    create_model,
    hcvision_converted,
    register,
    register_if_new,
)
from hcvision.models.stages import stages
from hcvision.models.vit import NAMES as vit_names

__all__ = [
    "BLOCKS",
    "TRUNK",
    "ConnectedBlock",
    "ConnectedModel",
    "DiT",
    "FrozenModel",
    "checkpoint_filter_fn",
    "connections_of",
    "convert",
    "coverage",
    "create_model",
    "dit_names",
    "hcvision_converted",
    "open_encoder",
    "own_class",
    "read_sizes",
    "recompute_streams",
    "register",
    "register_if_new",
    "set_stream_dtype",
    "stages",
    "vit_names",
]
