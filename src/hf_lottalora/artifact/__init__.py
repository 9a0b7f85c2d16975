"""What is on disk and on the hub: its manifest, its files, its card, and loading a model from nothing else."""

from .. import config
from . import files

config.artifact_files = files
