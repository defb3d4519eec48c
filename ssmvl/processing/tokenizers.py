"""Tokenizers: two byte-level ones that need no download, any `tokenizer.json`, or a model's in the hub."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from ssmvl.checkpoints.hub import ID, local
from ssmvl.errors import CheckpointError

__all__ = ["load_tokenizer", "byte_tokenizer", "END"]

END = "<|endoftext|>"
WORDS = Path(__file__).with_name("words.json")  # made by scripts/make_words.py
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
ALLOWED = f"Allowed are `bytes`, `words`, a {TOKENIZER_FILE}, or a folder or a model of the hub that holds one"


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens and the end token: 257 ids, every text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer


def load_tokenizer(name: str) -> tuple[Tokenizer, str]:
    """A tokenizer and its token that ends an answer.

    The end is the `eos_token` of the `tokenizer_config.json` beside a `tokenizer.json`, or `<|endoftext|>` where that
    names none. Truncation, padding and dropout in the file are disabled with a warning. A BOS token that the
    post-processor adds is kept, unless the config's `add_bos_token` says otherwise.

    Args:
        name: `bytes`; `words`, which is `bytes` with the words of the quickstart's questions as tokens of their own;
            the path of a `tokenizer.json` or of a folder that holds one; or a model's id in the hub, `owner/name`,
            from which the two files are fetched unless they are in its cache.

    Raises:
        CheckpointError: there is no such file or model, a file is damaged, or the tokenizer has no such token.
    """
    if name == "bytes":
        return byte_tokenizer(), END
    try:
        path = WORDS if name == "words" else local(name, TOKENIZER_FILE, CONFIG_FILE)
    except CheckpointError as error:
        raise CheckpointError(f"no tokenizer: {error}. {ALLOWED}") from error
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(
            f"no tokenizer {name!r}: {path} does not exist. {ALLOWED}. Where a model has only a tokenizer.model, "
            "AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER) of transformers writes one"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error})") from error
    _drop_what_changes_texts(tokenizer, path)
    config = _config(path.with_name(CONFIG_FILE))
    _follow_add_bos_token(tokenizer, config, path)
    ids = tokenizer.get_vocab().values()
    if max(ids, default=0) >= tokenizer.get_vocab_size():
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.get_vocab_size()} tokens, but the id {max(ids)}; ids must be 0, 1, "
            "2, … without gaps, as a language model has them"
        )
    end = config.get("eos_token") or END
    if end not in [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]:
        raise CheckpointError(
            f"{path}: the tokenizer has no special token {end} to end an answer with; "
            f"a {CONFIG_FILE} beside it names another as `eos_token`"
        )
    return tokenizer, end


def tokenizer_here(name: str) -> Path | None:
    """Where `load_tokenizer` finds this tokenizer without fetching it: a path of that name, or in the hub's cache.

    None if it is a model's id and the cache lacks one of the two files.
    """
    path = Path(name)
    if not ID.fullmatch(name) or path.exists() or path.parent.is_dir():
        return path
    try:
        files = [try_to_load_from_cache(name, file) for file in (TOKENIZER_FILE, CONFIG_FILE)]
    except ValueError:  # no id of the hub: `load_tokenizer` says so
        return path
    folders = [Path(file).parent for file in files if isinstance(file, str)]
    return folders[0] if len(folders) == len(files) else None


def config_text(end: str) -> str:
    """The `tokenizer_config.json` with which `load_tokenizer` and transformers' AutoTokenizer find this end."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,  # without one transformers makes no batches
        "model_input_names": ["input_ids", "attention_mask"],  # what its models of one text take
    }
    return json.dumps(config, indent=2) + "\n"


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer's post-processor prepends to a text: usually none, or BOS, such as Llama's `<s>`."""
    for text in ("a", "the", "0"):
        if plain := tokenizer.encode(text, add_special_tokens=False).ids:
            whole = tokenizer.encode(text).ids
            places = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
            return list(whole[: next(places, 0)])
    return []


def _drop_what_changes_texts(tokenizer: Tokenizer, path: Path) -> None:
    """Drop settings of a file that cut, pad or vary texts, with a warning."""
    dropped = []
    if tokenizer.truncation is not None:
        dropped.append(f"truncation to {tokenizer.truncation['max_length']} tokens")
        tokenizer.no_truncation()
    if tokenizer.padding is not None:
        dropped.append("padding")
        tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        dropped.append(f"dropout of merges, {tokenizer.model.dropout:g}")
        tokenizer.model.dropout = None
    if dropped:
        what = f"{path} carries {' and '.join(dropped)}"
        warnings.warn(f"{what}: dropped, so that texts are read whole", stacklevel=3)


def _follow_add_bos_token(tokenizer: Tokenizer, config: dict[str, Any], path: Path) -> None:
    """Add or remove the BOS token as the config's `add_bos_token` says; if that is unset, change nothing.

    Raises:
        CheckpointError: the tokenizer does not have the config's `bos_token`, or its post-processor adds another token.
    """
    add, bos, begin = config.get("add_bos_token"), config.get("bos_token"), beginning(tokenizer)
    id_ = tokenizer.token_to_id(bos or "")
    if not isinstance(add, bool) or add == (begin == [id_]):
        return
    if not add:
        return without_beginning(tokenizer) if begin == [id_] else None
    if id_ is None or begin:
        has = f"adds {[tokenizer.id_to_token(number) for number in begin]}" if begin else "has no such token"
        raise CheckpointError(f"{path}: {CONFIG_FILE} adds the bos_token {bos!r}, but the tokenizer {has}")
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    with suppress(ValueError):  # a token that is spelled like a template variable
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, id_)])
    if tokenizer.encode("a").ids != [id_, *plain]:
        raise CheckpointError(f"{path}: the bos_token {bos!r} cannot be put before a text; rename it")


def without_beginning(tokenizer: Tokenizer) -> None:
    """Stop a tokenizer from prepending BOS."""
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # one that adds nothing


def _config(path: Path) -> dict[str, Any]:
    """Read a `tokenizer_config.json`, its `eos_token` and `bos_token` as strings; empty if the file is missing."""
    if not path.is_file():
        return {}
    try:
        config = dict(json.loads(path.read_bytes()).items())
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    for name in ("eos_token", "bos_token"):
        named = config.get(name)
        config[name] = named.get("content") if isinstance(named, dict) else named
        if not isinstance(config[name], str | None):
            raise CheckpointError(f"{path}: {name} must be a text, or a mapping with its `content`; is {named!r}")
    return config
