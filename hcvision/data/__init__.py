"""What comes in and what is written: checked arguments, files, images, tables, streams, the Lightning data module.

An image's way: ``folders.py``, ``tables.py``, ``streaming.py``, ``fashion.py`` or ``latents.py`` find it, ``images.py``
reads it and puts it into a batch, ``loading.py`` says in which order, and ``module.py`` is the data module over them.
A test may look at some classes (``subsets.py``), ImageNet's relatives (``relatives.py``) or corrupted images
(``corruptions.py``).
Everybody uses ``arguments.py`` (numbers in range), ``files.py`` (written whole) and ``machine.py`` (cores, devices).
"""

from hcvision.data.arguments import check_name, check_number, check_numbers, check_range, in_one_line, refusals
from hcvision.data.corruptions import CORRUPTIONS
from hcvision.data.files import (
    UNREADABLE,
    check_writable,
    first_difference,
    markdown,
    write_cells,
    write_csv,
    write_json,
    write_whole,
)
from hcvision.data.folders import is_image, is_left_behind, open_folder, split_by_class, walk_files, warn_of_left_out
from hcvision.data.images import BadImage, Images, collate, mode_of, open_image, printable
from hcvision.data.latents import LATENT_FORMAT, LatentShards
from hcvision.data.machine import (
    count_cores,
    count_workers,
    has_compiler,
    is_first_process,
    is_out_of_memory,
    keep_freed_memory,
    pick_device,
)
from hcvision.data.module import ImageData
from hcvision.data.relatives import pick_label
from hcvision.data.sources import TIMM_PREFIXES

__all__ = [
    "CORRUPTIONS",
    "LATENT_FORMAT",
    "TIMM_PREFIXES",
    "UNREADABLE",
    "BadImage",
    "ImageData",
    "Images",
    "LatentShards",
    "check_name",
    "check_number",
    "check_numbers",
    "check_range",
    "check_writable",
    "collate",
    "count_cores",
    "count_workers",
    "first_difference",
    "has_compiler",
    "in_one_line",
    "is_first_process",
    "is_image",
    "is_left_behind",
    "is_out_of_memory",
    "keep_freed_memory",
    "markdown",
    "mode_of",
    "open_folder",
    "open_image",
    "pick_device",
    "pick_label",
    "printable",
    "refusals",
    "split_by_class",
    "walk_files",
    "warn_of_left_out",
    "write_cells",
    "write_csv",
    "write_json",
    "write_whole",
]
