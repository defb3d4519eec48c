"""The one way to read and write weights: safetensors, tensors of a pickle, and layouts, applied strictly."""

from functools import partial

from ssmvl._moved import moved_name
from ssmvl.checkpoints.files import BYTES, WEIGHTS_FILE, read_tensors, write_folder, write_tensors
from ssmvl.checkpoints.foreign import Foreign, open_checkpoint, read_json
from ssmvl.checkpoints.layouts import Layout, copy_into, need
from ssmvl.checkpoints.modules import module_settings

__all__ = [
    "Layout",
    "need",
    "copy_into",
    "module_settings",
    "Foreign",
    "open_checkpoint",
    "read_tensors",
    "write_tensors",
    "write_folder",
    "read_json",
    "WEIGHTS_FILE",
    "BYTES",
]

__getattr__ = partial(moved_name, __name__)
