"""`ssmvl generate FOLDER --image x.png --prompt "…"`."""

from __future__ import annotations

import argparse

from ssmvl.cli.common import require_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """A folder, an image and a prompt."""
    parser.add_argument("folder", help="a run folder, or a folder that save_pretrained wrote")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--image", help="an image file")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")


def run(options: argparse.Namespace) -> int:
    """Print the answer."""
    require_path(options.folder, "folder, and not a model of the hub, which is named owner/model")
    if options.image is not None:
        require_path(options.image, "image")
    from ssmvl.generation.assistant import load

    assistant = load(options.folder)
    (answer,) = assistant.generate([options.prompt], [options.image], max_new_tokens=options.max_new_tokens)
    print(answer)
    return 0
