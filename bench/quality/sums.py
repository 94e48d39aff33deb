"""A language of worked sums: forced tokens beside free ones, and a rule that says what is right.

    #Ann 7 pens +5=12 -3=9 ;9 red

Free: the name, the number to start from, the thing, how many operations, each operand and its sign,
the colour. Forced: spaces, results and the total. A text is valid if it has this form and every
number follows. In the language each of five features takes all its values equally often.
"""

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hal Ida Jon Kim Leo".split()
THINGS = "pens cups hats keys maps nuts pies toys".split()
COLOURS = "red blue pink gold grey jade lime teal".split()
LOWEST, HIGHEST = 0, 40
START = range(1, 21)
OPERATIONS, OPERANDS = range(1, 5), range(1, 10)
FEATURES = ("name", "start", "thing", "operations", "colour")
VALUES = {  # feature → how many values there are
    **{"name": len(NAMES), "start": len(START), "thing": len(THINGS)},
    **{"operations": len(OPERATIONS), "colour": len(COLOURS)},
}
BEGIN, END = "#", "\n"
ALPHABET = sorted(set(BEGIN + END + " ;+-=0123456789" + "".join(NAMES + THINGS + COLOURS)))
_FORM = re.compile(
    rf"#({'|'.join(NAMES)}) (\d+) ({'|'.join(THINGS)})((?: [+-]\d=\d+)+) ;(\d+) "
    rf"({'|'.join(COLOURS)})\n?"
)
_STEP = re.compile(r" ([+-])(\d)=(\d+)")


class Text(NamedTuple):
    """A text of the language, and what the language says of it."""

    text: str
    nats: float  # −ln of its probability
    free: list[bool]  # of each character: whether another could stand there


def _equally(options: Iterable[str]) -> dict[str, float]:
    found = list(options)
    return dict.fromkeys(found, 1 / len(found))


def _after(total: int, done: int) -> dict[str, float]:
    """What may follow so many operations, with its probability: another, or the end."""
    moves = [s * n for s in (1, -1) for n in OPERANDS if LOWEST <= total + s * n <= HIGHEST]
    end = 1 / (OPERATIONS[-1] - done + 1) if done else 0.0
    chances = {f" {move:+d}={total + move}": (1 - end) / len(moves) for move in moves}
    chances[f" ;{total} "] = end
    return {piece: chance for piece, chance in chances.items() if chance}


def _pieces(rng: random.Random) -> Iterator[tuple[str, dict[str, float]]]:
    """The pieces of a text, each with what it was drawn from."""

    def drawn(options: dict[str, float]) -> tuple[str, dict[str, float]]:
        return rng.choices(list(options), list(options.values()))[0], options

    yield drawn(_equally(f"{name} " for name in NAMES))
    yield (start := drawn(_equally(f"{start} " for start in START)))
    yield drawn(_equally(THINGS))
    total = int(start[0])
    for done in range(OPERATIONS[-1] + 1):
        yield (step := drawn(_after(total, done)))
        if ";" in step[0]:
            break
        total = int(step[0].partition("=")[2])
    yield drawn(_equally(f"{colour}{END}" for colour in COLOURS))


def written(rng: random.Random) -> Text:
    """One text of the language, with its end."""
    text, nats, free = BEGIN, 0.0, [False]
    for piece, options in _pieces(rng):
        text += piece
        nats -= math.log(options[piece])
        for i in range(len(piece)):
            free.append(len({o[i] for o in options if o[:i] == piece[:i]}) > 1)
    return Text(text, nats, free)


def text(rng: random.Random) -> str:
    """One text of the language, with its end."""
    return written(rng).text


def parse(line: str) -> dict[str, object] | None:
    """The features of a valid text, None for another."""
    found = _FORM.fullmatch(line)
    if not found:
        return None
    name, start, thing, steps, end, colour = found.groups()
    total, steps = int(start), _STEP.findall(steps)
    if total not in START or len(steps) not in OPERATIONS:
        return None
    for sign, operand, result in steps:
        total += int(sign + operand)
        if total != int(result) or not LOWEST <= total <= HIGHEST or operand == "0":
            return None
    if total != int(end):
        return None
    return dict(zip(FEATURES, (name, start, thing, len(steps), colour)))


def validity(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """A reward and a scorer: 1 for a valid text, else 0."""
    return [float(parse(p + c.rstrip(END) + END) is not None) for p, c in zip(prompts, completions)]
