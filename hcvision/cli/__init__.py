"""The command line over all of it, a file a command; ``hcvision_command`` calls ``run``."""

from hcvision.cli.main import run

__all__ = ["run"]
