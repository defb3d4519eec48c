"""Train the tokenizer `words`: byte-level BPE in which the words of the quickstart's questions are single tokens.

    python scripts/make_words.py

A digit or word includes the space before it, punctuation the space after it. The merges are learned from the training
questions and answers; rerun the script when they change.
"""

import tempfile

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ssmvl.data.scenes.scenes import digit_scenes
from ssmvl.data.streams import read_records
from ssmvl.processing.prompts import MambaPrompt
from ssmvl.processing.tokenizers import END, WORDS

WORD = r" ?\d| ?[A-Za-z]+|[^\sA-Za-z\d]+ ?|\s+"


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        records = read_records(digit_scenes("train", train_size=2_000, folder=folder))
    pieces = [MambaPrompt().pieces(record["conversation"], "") for record in records]
    trainer = trainers.BpeTrainer(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator((piece.text for each in pieces for piece in each), trainer)
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tokenizer.save(str(WORDS))
    print(f"{WORDS}: {tokenizer.get_vocab_size()} ids")


if __name__ == "__main__":
    main()
