"""The part of decoding that conversion shares with the loader needs no torch, and its reasons are always the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ssmvl
from ssmvl.errors import DataError
from ssmvl.processing.image_decoding import shrunk
from ssmvl.processing.transforms import read_image


def test_decoding_and_what_converts_import_no_torch() -> None:
    code = "import sys, ssmvl.processing.image_decoding, ssmvl.data.conversion.sources; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_a_reason_holds_no_address() -> None:
    for read in (read_image, lambda data: shrunk(data, 20)):
        with pytest.raises(DataError, match=r"cannot identify image file\)") as raised:
            read(b"\xff\xd8\xff no image \xff\xd9")
        assert "0x" not in str(raised.value)


def test_images_are_opened_in_this_room_only() -> None:
    root = Path(ssmvl.__file__).parent
    opening = {path.relative_to(root).parts[0] for path in root.rglob("*.py") if "Image.open(" in path.read_text()}
    assert opening == {"processing"}
