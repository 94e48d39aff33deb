"""Wishes for less or more randomness, in words, from which a head learns to follow them.

A scan with wishes takes every example three times, as three documents in a row: as it is, with a
wish for less randomness at the end of its last prompt, with one for more. The answer is the same in
all three, so nothing but the words tells them apart. Training then asks for another λ in each:

    λ (1 + s)  behind a wish for less        λ  without one        λ (1 − s)  behind one for more

Their mean is λ: as far as hidden states do not tell wishes apart, the head learns what it would
have learned without any.

Other wordings than these follow as far as the model's hidden states carry what is meant; measure
on wordings that are not here.
"""

from collections.abc import Iterable, Iterator

LESS = (
    "Answer with low randomness.",
    "Be as predictable as you can.",
    "Give the most likely answer.",
    "Do not be creative, stick to the obvious.",
    "Be precise and consistent.",
    "I want a safe answer without surprises.",
    "Always answer this in the same way.",
    "Please keep it plain and certain.",
    "Use a low temperature.",
    "Choose the most common words.",
)
MORE = (
    "Answer with high randomness.",
    "Be as varied as you can.",
    "Give an answer that is hardly likely.",
    "Be creative, stay away from the obvious.",
    "Be playful and unusual.",
    "I want a wild answer full of surprises.",
    "Answer this in a different way every time.",
    "Please make it colourful and strange.",
    "Use a high temperature.",
    "Choose the rarest words.",
)
NONE, FOR_LESS, FOR_MORE = range(3)  # an example's documents, in this order
VARIANTS = 3


def with_wish(example: dict, wish: str) -> dict:
    """The example, the wish at the end of its last prompt: of text, or of what a user says last.

    Raises:
        ValueError: for an example without a prompt.
    """
    if isinstance(example.get("prompt"), str):
        return {**example, "prompt": _joined(example["prompt"], wish)}
    name = "messages" if "messages" in example else "prompt"
    messages = list(example.get(name, ()))
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users or not isinstance(messages[users[-1]]["content"], str):
        raise ValueError(
            "wishes need examples with a prompt, or messages in which a user says something, got "
            f"one with {', '.join(sorted(example))}"
        )
    last = messages[users[-1]]
    messages[users[-1]] = {**last, "content": _joined(last["content"], wish)}
    return {**example, name: messages}


def _joined(prompt: str, wish: str) -> str:
    """With the space between that the prompt ends with, if it ends with one."""
    bare = prompt.rstrip()
    return f"{bare} {wish}{prompt[len(bare) :]}"


def augmented(examples: Iterable[dict]) -> Iterator[dict]:
    """Every example three times; example k has wording k of those above, and from the first again.

    Raises:
        ValueError: as `with_wish`.
    """
    for k, example in enumerate(examples):
        wished = [with_wish(example, wordings[k % len(wordings)]) for wordings in (LESS, MORE)]
        yield example
        yield from wished


def gravities_of(gravity: float, shift: float) -> tuple[float, float, float]:
    """λ of the tokens of an example's three documents."""
    return gravity, gravity * (1 + shift), gravity * (1 - shift)
