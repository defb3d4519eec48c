"""`ssmvl generate DIR --image x.png --prompt "…"`."""

from __future__ import annotations

import argparse

from ssmvl.cli.common import positive_integer, require_path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: a saved model, images and a prompt."""
    parser.add_argument("folder", metavar="DIR", help="a run folder or a saved model")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    parser.add_argument("--max-new-tokens", type=positive_integer, default=64, metavar="N", help="default: 64")


def run(options: argparse.Namespace) -> int:
    """Print the answer."""
    require_path(options.folder, "directory, and not a Hub model id (owner/model)")
    for image in options.image:
        require_path(image, "image")
    from ssmvl.generation.assistant import load

    assistant = load(options.folder)
    (answer,) = assistant.generate([options.prompt], [options.image], max_new_tokens=options.max_new_tokens)
    print(answer)
    return 0
