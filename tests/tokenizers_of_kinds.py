"""Small tokenizers of every kind of decoder that treats spaces and broken characters otherwise."""

from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "Die Größe der Tür: 東京 naïve 😀. The cat sat on the mat"


def _byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["The cat sat."], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    )
    return made


def _metaspace() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([TEXT] * 20, trainer)
    return made


def _llama() -> Tokenizer:
    """As SentencePiece's BPE: bytes where a character is unknown, one space taken off the front."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = "▁ e a t h c s m o n i d r f . : ▁t ▁c ▁s ▁m he ▁the at ▁cat ▁sat ▁mat ▁on".split()
    letters = sorted(set("DieGrdrTuvThcatsonm") - set(words))
    merges = [("▁", "t"), ("▁", "c"), ("▁", "s"), ("▁", "m"), ("h", "e"), ("▁t", "he"), ("a", "t"),
              ("▁c", "at"), ("▁s", "at"), ("▁m", "at"), ("▁", "o"), ("▁o", "n")]  # fmt: skip
    names = dict.fromkeys(["<unk>", *byte_tokens, *words, "▁o", *letters])
    made = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


_MADE = {"byte-level": _byte_level, "metaspace": _metaspace, "llama": _llama}
every_tokenizer = pytest.mark.parametrize("kind", sorted(_MADE))


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=_MADE[kind]())
