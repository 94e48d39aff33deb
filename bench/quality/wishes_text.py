"""Prompts and wordings of the study of wishes: what heads are trained on, and what they never saw.

Heads see the templates and items of TRAIN with the package's wordings; they are measured on those
of TEST with the wordings here.
"""

from dataclasses import dataclass

LESS = (
    "Use as little randomness as possible.",
    "Just the standard reply, please.",
    "Be conservative and careful.",
)
MORE = (
    "Use as much randomness as possible.",
    "Surprise me with something nobody expects.",
    "Be bold and experimental.",
)
# No wish at all: what else stands there must not move T.
OTHER = (
    "Thank you in advance.",
    "Answer in English.",
    "I am writing from my phone.",
)


@dataclass(frozen=True)
class Prompts:
    """Templates, each with what is put into it; and what the capital of a country is."""

    kinds: tuple[str, ...]
    choice: tuple[str, ...]  # templates with a kind of thing: many answers are right
    topics: tuple[str, ...]
    essay: tuple[str, ...]  # templates with a topic
    capitals: dict[str, str]
    fact: tuple[str, ...]  # templates with a country: one answer is right

    def texts(self, what: str) -> list[str]:
        """All of a sort, `choice`, `essay` or `fact`."""
        items = {"choice": self.kinds, "essay": self.topics, "fact": tuple(self.capitals)}[what]
        return [template.format(item) for item in items for template in getattr(self, what)]

    def all(self) -> list[str]:
        return [text for what in ("choice", "essay", "fact") for text in self.texts(what)]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


TRAIN = Prompts(
    kinds=_words(
        "fruit, animal, color, country, river, city, sport, book, song, drink, dish, tree, tool, "
        "language, job, hobby, planet, vegetable, instrument, movie"
    ),
    choice=("Name one {}.", "Pick a random {}.", "Tell me your favorite {}."),
    topics=_words(
        "rain, the sea, trains, cats, winter, bread, music, the moon, school, gardens, bicycles, "
        "old houses, coffee, birds, mountains, markets, letters, dreams, bridges, football"
    ),
    essay=(
        "Write a sentence about {}.",
        "Tell me a short story about {}.",
        "Why do people like {}?",
    ),
    capitals={
        "France": "Paris",
        "Italy": "Rome",
        "Japan": "Tokyo",
        "Spain": "Madrid",
        "Germany": "Berlin",
        "Egypt": "Cairo",
        "Greece": "Athens",
        "Russia": "Moscow",
        "Poland": "Warsaw",
        "Cuba": "Havana",
        "Kenya": "Nairobi",
        "Norway": "Oslo",
        "Peru": "Lima",
        "Iran": "Tehran",
        "Iraq": "Baghdad",
    },
    fact=("What is the capital of {}?", "Which city is the capital of {}?"),
)
TEST = Prompts(
    kinds=_words("flower, bird, insect, island, lake, game, dance, spice, dessert, king"),
    choice=("Suggest a {}.",),
    topics=_words("snow, horses, lighthouses, soup, clocks, forests, ships, night, paint, bees"),
    essay=("Describe {} in two sentences.",),
    capitals={
        "Portugal": "Lisbon",
        "Austria": "Vienna",
        "China": "Beijing",
        "England": "London",
        "Sweden": "Stockholm",
        "Denmark": "Copenhagen",
        "Hungary": "Budapest",
        "Ireland": "Dublin",
        "Finland": "Helsinki",
        "Thailand": "Bangkok",
    },
    fact=("Tell me the capital city of {}.",),
)
