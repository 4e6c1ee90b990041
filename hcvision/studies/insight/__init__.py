"""What a model's connections do with images: who reads whom, what the streams hold, what depends on the class.

A model without connections is looked at as what it is: ``shc1`` at its initial values is the residual add.
``unfolding.py`` is the mathematics, ``notes.py`` what is noted of each stage, ``diversity.py`` how different streams
are, ``depth.py`` what each block is worth, ``inspection.py`` the command.

Letters in shapes: B batch, N tokens, L sub-layers, S streams, V views, E stream width, I images, K classes.
"""

from hcvision.studies.insight.callback import LogConnections
from hcvision.studies.insight.diversity import StreamDiversity
from hcvision.studies.insight.inspection import inspect
from hcvision.studies.insight.unfolding import unfolded_matrix

__all__ = ["LogConnections", "StreamDiversity", "inspect", "unfolded_matrix"]
