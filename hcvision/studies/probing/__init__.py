"""How good frozen features are: k nearest neighbours and a linear probe on what a model hands to its head.

``features.py`` looks at images, ``neighbours.py`` and ``linear.py`` are the mathematics, ``protocol.py`` what is done
with seeds, ``command.py`` the command.
"""

from hcvision.studies.probing.command import check_data, probe
from hcvision.studies.probing.features import collect, open_model
from hcvision.studies.probing.protocol import Protocol

__all__ = ["Protocol", "check_data", "collect", "open_model", "probe"]
