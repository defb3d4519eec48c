"""Tokenizers: two byte-level ones that need no download, or any `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ssmvl.errors import CheckpointError

END = "<|endoftext|>"
WORDS = Path(__file__).with_name("words.json")  # made by scripts/make_words.py


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens and the end token: 257 ids, every text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, `words`, or the path of a `tokenizer.json` or of a folder that holds one. Nothing is downloaded.

    `words` is `bytes` with the words of the quickstart's questions as tokens of their own; other words are bytes.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it has no end token.
    """
    if name == "bytes":
        return byte_tokenizer()
    path = WORDS if name == "words" else Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(
            f"no tokenizer {name!r}: allowed are `bytes`, `words`, a tokenizer.json, or a folder that holds one"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error})") from error
    if tokenizer.token_to_id(END) is None:
        raise CheckpointError(f"{path}: the tokenizer has no token {END}")
    return tokenizer
