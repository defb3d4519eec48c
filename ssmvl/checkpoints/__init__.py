"""Weights in files: our own folders and everybody's layouts, read strictly; of a pickle, its tensors only."""

from ssmvl.checkpoints.files import BYTES as BYTES
from ssmvl.checkpoints.files import WEIGHTS_FILE as WEIGHTS_FILE
from ssmvl.checkpoints.files import flush as flush
from ssmvl.checkpoints.files import read_tensors as read_tensors
from ssmvl.checkpoints.files import write_folder as write_folder
from ssmvl.checkpoints.files import write_tensors as write_tensors
from ssmvl.checkpoints.files import written_whole as written_whole
from ssmvl.checkpoints.foreign import Foreign as Foreign
from ssmvl.checkpoints.foreign import open_checkpoint as open_checkpoint
from ssmvl.checkpoints.foreign import read_json as read_json
from ssmvl.checkpoints.layouts import Layout as Layout
from ssmvl.checkpoints.layouts import copy_into as copy_into
from ssmvl.checkpoints.layouts import need as need
from ssmvl.checkpoints.modules import settings as settings
