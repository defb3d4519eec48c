"""`ssmvl doctor [--clean]`."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ssmvl", "torch", "torchvision", "numpy", "timm", "open_clip_torch", "omegaconf", "pluggy", "tokenizers")
TRAINING = ("mosaicml", "mosaicml-streaming", "transformers", "tensorboard")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument: a flag to remove stale shared memory."""
    parser.add_argument("--clean", action="store_true", help="remove shared memory left behind by dead runs")


def run(options: argparse.Namespace) -> int:
    """Print the report. Returns 1 if a plugin is broken or a core package is missing."""
    import torch

    from ssmvl.data.shared_memory import clean_stale_segments, stale_segments
    from ssmvl.ops.backends import describe
    from ssmvl.plugins import components

    print(f"python          {platform.python_version()} on {platform.platform()}")
    missing = [name for name in PACKAGES if not _print_version(name, "MISSING: pip install -e .")]
    for name in TRAINING:
        _print_version(name, "not installed: pip install 'ssmvl[train]'")
    cuda = f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no device"
    print(f"cuda            {cuda}")
    for op, choice in describe("cuda" if torch.cuda.is_available() else "cpu").items():
        print(f"backend         {op}: {choice}")
    registry = components()
    for source in sorted({entry.source for entry in registry.entries()}):
        print(f"plugin          {source}")
    for entries in registry.conflicts():
        print(f"conflict        {entries[0].kind} {entries[0].name!r}: {' and '.join(e.source for e in entries)}")
    for failure in registry.failures:
        print(f"broken plugin   {failure}")
    for disabled in registry.disabled:
        print(f"disabled plugin {disabled}")
    for remark in registry.unknown:
        print(f"unknown plugin  {remark}")
    stale = clean_stale_segments() if options.clean else stale_segments()
    status = "removed" if options.clean else "left behind by dead runs; remove them with ssmvl doctor --clean"
    print(f"shared memory   {f'{len(stale)} files {status}' if stale else 'nothing left behind by dead runs'}")
    return 1 if registry.failures or missing else 0


def _print_version(name: str, fallback: str) -> bool:
    """Print the version of a package, or `fallback` if it is missing. Returns True if it is installed."""
    try:
        print(f"{name:15} {version(name)}")
    except PackageNotFoundError:
        print(f"{name:15} {fallback}")
        return False
    return True
