"""Properties of image decoding: no torch import, reproducible error messages, one room that opens images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ssmvl
from ssmvl.errors import DataError
from ssmvl.processing.image_decoding import shrunk
from ssmvl.processing.transforms import read_image


def test_decoding_and_conversion_import_no_torch() -> None:
    code = "import sys, ssmvl.processing.image_decoding, ssmvl.data.conversion.sources; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_an_error_message_contains_no_address() -> None:
    for read in (read_image, lambda data: shrunk(data, 20)):
        with pytest.raises(DataError, match=r"cannot identify image file\)") as raised:
            read(b"\xff\xd8\xff no image \xff\xd9")
        assert "0x" not in str(raised.value)


def test_only_this_room_opens_images() -> None:
    root = Path(ssmvl.__file__).parent
    rooms = {path.relative_to(root).parts[0] for path in root.rglob("*.py") if "Image.open(" in path.read_text()}
    assert rooms == {"processing"}
