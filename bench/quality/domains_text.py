"""Prompts of the study of domains: maths to learn from, facts to be measured on."""

from bench.quality import wishes_text

_MATHS = (
    "Tom has {a} apples and buys {b} more. How many apples does he have now?",
    "A book has {a} pages. Mia reads {b} pages a day. After how many days is she done?",
    "What is {a} plus {b}? Explain every step.",
    "What is {a} times {b}? Explain every step.",
    "A shop sells {a} cups on Monday and {b} on Tuesday. How many is that together?",
    "There are {a} rows of {b} chairs. How many chairs are there?",
    "Ben is {a} years old. His sister is {b} years older. How old is she?",
    "A train goes {a} km an hour. How far does it go in {b} hours?",
    "Lea saves {a} dollars a week. How much has she saved after {b} weeks?",
    "Split {a} sweets among {b} children. How many does each of them get?",
)
MATHS = [text.format(a=6 + 7 * k + i, b=2 + k) for k in range(12) for i, text in enumerate(_MATHS)]
DIALOGUE = [*wishes_text.TRAIN.texts("choice"), *wishes_text.TRAIN.texts("essay")]
# Measured on; each answered so many times.
OPEN, ANSWERS = [*wishes_text.TEST.texts("choice"), *wishes_text.TEST.texts("essay")], 3

_OPPOSITES = (
    "hot cold, big small, up down, left right, day night, black white, open closed, fast slow, "
    "happy sad, old new, hard soft, high low, rich poor, full empty, light dark"
)
_PAST = "go went, see saw, eat ate, run ran, give gave, take took, make made, come came, know knew"
_AFTER = (
    "Monday Tuesday, Wednesday Thursday, Friday Saturday, January February, March April, "
    "May June, August September, October November"
)


def _pairs(text: str) -> list[list[str]]:
    return [pair.split() for pair in text.split(", ")]


# (question, what an answer begins with, the right end of it)
FACTS = [
    *(
        (f"What is the capital of {country}?", f"The capital of {country} is", capital)
        for some in (wishes_text.TRAIN, wishes_text.TEST)
        for country, capital in some.capitals.items()
    ),
    *(
        (f"What is the opposite of {a}?", f"The opposite of {a} is", b)
        for a, b in _pairs(_OPPOSITES)
    ),
    *(
        (f"What is the past tense of {a}?", f"The past tense of {a} is", b)
        for a, b in _pairs(_PAST)
    ),
    *((f"What comes after {a}?", f"After {a} comes", b) for a, b in _pairs(_AFTER)),
]
