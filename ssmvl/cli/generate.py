"""`ssmvl generate FOLDER --image x.png --prompt "…"`."""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """A folder, an image and a prompt."""
    parser.add_argument("folder", help="a run folder, or a folder that save_pretrained wrote")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--image", help="an image file")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")


def run(options: argparse.Namespace) -> int:
    """Print the answer."""
    from ssmvl.generation.assistant import load

    assistant = load(options.folder)
    (answer,) = assistant.generate([options.prompt], [options.image], max_new_tokens=options.max_new_tokens)
    print(answer)
    return 0
