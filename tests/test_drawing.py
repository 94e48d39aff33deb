"""Completions as text: what scorers and reward functions are shown."""

import torch

from autodeco_fast.training.drawing import StopStrings, completion_text, decode, lead_in
from tests.tokenizers_of_kinds import TEXT, every_tokenizer, tokenizer_of

PLAIN = {"ends": (), "stop": ()}


@every_tokenizer
def test_prompt_and_completion_are_the_text(kind):
    """Wherever a text is cut between characters; the space before a word is the completion's."""
    tokenizer = tokenizer_of(kind)
    ids, cuts = tokenizer(TEXT).input_ids, 0
    assert decode(tokenizer, ids) == TEXT
    for n in range(1, len(ids)):
        prompt = decode(tokenizer, ids[:n])
        if prompt.endswith("\ufffd"):
            continue
        lead = lead_in(tokenizer, prompt, ids[:n])
        cuts += 1
        assert prompt + completion_text(tokenizer, ids[n:], lead=lead, **PLAIN) == TEXT
    assert cuts > 20


def test_byte_level_completions_are_those_decoded_alone():
    tokenizer = tokenizer_of("byte-level")
    ids = tokenizer(TEXT).input_ids
    for n in range(1, len(ids)):
        lead = lead_in(tokenizer, "text", ids[:n])
        assert decode(tokenizer, ids[n:], lead) == tokenizer.decode(ids[n:])


@every_tokenizer
def test_an_answer_of_a_chat_is_decoded_alone(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer("the cat sat").input_ids
    lead = lead_in(tokenizer, [{"role": "user", "content": "the"}], ids[:1])
    text = completion_text(tokenizer, ids[1:], lead=lead, **PLAIN)
    assert text == tokenizer.decode(ids[1:])


@every_tokenizer
def test_a_stop_string_may_begin_with_the_completions_first_space(kind):
    tokenizer = tokenizer_of(kind)
    prompt, ids = (tokenizer(text).input_ids for text in ("the mat", "the mat cat"))
    new = ids[len(prompt) :]
    assert ids[: len(prompt)] == prompt
    lead = lead_in(tokenizer, "the mat", prompt)
    strings = StopStrings(tokenizer, [" cat"], len(tokenizer), torch.device("cpu"))
    found = strings.found(torch.tensor([new]), torch.tensor([False]), [lead])
    assert found.tolist() == [True]
    assert completion_text(tokenizer, new, lead=lead, ends=(), stop=[" cat"]) == ""
