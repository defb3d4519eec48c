"""Write the tokenizer `words`: bytes, with the words of the quickstart's questions as tokens of their own.

    python scripts/make_words.py

Digits stay single. The merges come from training questions; run it again when the questions change.
"""

import tempfile

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ssmvl.data.scenes import digit_scenes
from ssmvl.data.streams import read_records
from ssmvl.text.prompts import MambaPrompt
from ssmvl.text.tokenizers import END, WORDS


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
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
