"""A language of worked sums: forced tokens beside free ones, and a rule that says what is right.

    #Ann 7 pens +5=12 -3=9 ;9 red

Free: the name, the number to start from, the thing, how many operations, each operand and its sign,
the colour. Forced: spaces, results and the total. A text is valid if it has this form and every
number follows. In the language each of five features takes all its values equally often.
"""

import random
import re
from collections.abc import Sequence

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


def text(rng: random.Random) -> str:
    """One text of the language, with its end."""
    total = start = rng.choice(START)
    steps = ""
    for _ in range(rng.choice(OPERATIONS)):
        moves = [s * n for s in (1, -1) for n in OPERANDS if LOWEST <= total + s * n <= HIGHEST]
        move = rng.choice(moves)
        total += move
        steps += f" {move:+d}={total}"
    name, thing, colour = (rng.choice(of) for of in (NAMES, THINGS, COLOURS))
    return f"{BEGIN}{name} {start} {thing}{steps} ;{total} {colour}{END}"


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
