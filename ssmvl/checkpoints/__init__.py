"""Reading and writing of weights: safetensors files, tensors of torch checkpoints, and strict layouts."""

from functools import partial
from typing import TYPE_CHECKING

from ssmvl._moved import moved_name
from ssmvl.checkpoints.files import read_tensors, write_tensors
from ssmvl.checkpoints.foreign import OpenedCheckpoint, open_checkpoint
from ssmvl.checkpoints.layouts import Layout, copy_into, need

__all__ = ["Layout", "need", "copy_into", "OpenedCheckpoint", "open_checkpoint", "read_tensors", "write_tensors"]

if not TYPE_CHECKING:
    __getattr__ = partial(moved_name, __name__)
