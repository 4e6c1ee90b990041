"""How good frozen features are: k nearest neighbours and a linear probe on what a model hands to its head.

``features.py`` looks at images, ``neighbours.py`` and ``linear.py`` are the mathematics, ``protocol.py`` what is done
with seeds, ``command.py`` the command.
"""

from hcvision.studies.probing.command import probe
from hcvision.studies.probing.features import open_model
from hcvision.studies.probing.protocol import Protocol

__all__ = ["Protocol", "open_model", "probe"]
