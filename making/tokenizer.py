"""The bundled model's tokenizer: byte-level BPE in which a year is two tokens, century and year of the century.

Digits are split into pairs from the left before merging, so " 1732" becomes " 17" + "32", as it does in GPT-2.
"""

from collections.abc import Iterable
from itertools import chain

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 128
DIGIT_PAIRS = " ?[0-9]{1,2}"
YEARS_OF_CENTURY = [f"{year:02d}" for year in range(100)]
CENTURIES = [f" {century}" for century in range(10, 21)]
REPEATS = 10_000  # each pair must be frequent enough in the sample to win a merge


def train_tokenizer(texts: Iterable[str], entries: int, context: int) -> PreTrainedTokenizerFast:
    """Train on `texts`; the separator (BOS and EOS in one) gets the last of the `entries` ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGIT_PAIRS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # "x" keeps "17" free of a leading space; a space inside CENTURIES makes " 17".
    pairs = ["x".join(["", *YEARS_OF_CENTURY]) + "x" + "x".join(CENTURIES)] * REPEATS
    tokenizer.train_from_iterator(chain(texts, pairs), trainer)

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    check(fast, entries)
    return fast


def check(tokenizer: PreTrainedTokenizerFast, entries: int) -> None:
    """Raise unless the ids, the year tokens and the round trip are as the greater-than task needs them."""
    if len(tokenizer) != entries or tokenizer.bos_token_id != entries - 1:
        raise ValueError(f"{len(tokenizer)} entries instead of {entries}: the text is too small for that many")
    split = [pair for pair in YEARS_OF_CENTURY + CENTURIES if len(tokenizer.encode(pair)) != 1]
    if split:
        raise ValueError(f"not single tokens: {split}")
    example = "In the year 1732, naïve – “quoted”\n\n\tÆthelred  (d. 1016) paid £5;  <ok> 12% . !"
    if tokenizer.decode(tokenizer.encode(example)) != example:
        raise ValueError("decoding does not restore the text")
