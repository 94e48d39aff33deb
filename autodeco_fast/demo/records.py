"""Small tasks with a score: one more line of a list of JSON records, after a heading, examples and
the line's first key.

Syntax and keys are forced, values are free. A record is valid if it parses and has exactly these
keys. Which schemas heads are trained on with rewards, which are for choosing
settings and which for measuring was fixed before any was run.

    python -m autodeco_fast.demo.records FOLDER     writes train, validation and test as JSONL
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autodeco_fast.files import write_text
from autodeco_fast.training.scorers import parse_record


@dataclass(frozen=True)
class Schema:
    name: str
    heading: str
    examples: tuple[dict, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.examples[0])

    @property
    def prompt(self) -> str:
        lines = (json.dumps(example, ensure_ascii=False) for example in self.examples)
        return self.heading + "\n" + "".join(line + "\n" for line in lines) + self.opening

    @property
    def opening(self) -> str:
        """Begins the record, so that an empty line is no answer."""
        return f'{{"{self.fields[0]}":'

    @property
    def line(self) -> str:
        """A prompt of an evaluation with `--scorer json`."""
        scored = {"keys": list(self.fields), "prefix": self.opening, "first_line": True}
        return json.dumps({"task": self.name, "prompt": self.prompt, **scored}) + "\n"


def _schema(name: str, heading: str, *rows: tuple) -> Schema:
    fields, *values = rows
    return Schema(name, heading, tuple(dict(zip(fields, row)) for row in values))


TRAIN = (
    _schema(
        "cities",
        "A list of cities, one JSON object per line:",
        ("city", "country", "population"),
        ("Lyon", "France", 520000),
        ("Osaka", "Japan", 2700000),
    ),
    _schema(
        "songs",
        "A list of songs, one JSON object per line:",
        ("song", "artist", "seconds"),
        ("Blue Morning", "The Larks", 214),
        ("Run Home", "Ella Stone", 187),
    ),
    _schema(
        "plants",
        "A list of plants, one JSON object per line:",
        ("plant", "color", "height_cm"),
        ("tulip", "yellow", 40),
        ("lavender", "purple", 60),
    ),
    _schema(
        "games",
        "A list of games, one JSON object per line:",
        ("game", "players", "place"),
        ("chess", 2, "indoors"),
        ("football", 22, "stadium"),
    ),
    _schema(
        "pets",
        "A list of pets, one JSON object per line:",
        ("pet", "name", "age"),
        ("cat", "Luna", 4),
        ("parrot", "Rio", 11),
    ),
    _schema(
        "trips",
        "A list of trips, one JSON object per line:",
        ("from", "to", "hours"),
        ("Berlin", "Prague", 5),
        ("Rome", "Athens", 2),
    ),
    _schema(
        "students",
        "A list of students, one JSON object per line:",
        ("student", "subject", "grade"),
        ("Tom Baker", "history", 87),
        ("Lucy Chen", "physics", 93),
    ),
    _schema(
        "drinks",
        "A list of drinks, one JSON object per line:",
        ("drink", "served", "price"),
        ("green tea", "hot", 3),
        ("lemonade", "cold", 4),
    ),
    _schema(
        "tools",
        "A list of tools, one JSON object per line:",
        ("tool", "use", "weight_g"),
        ("hammer", "driving nails", 600),
        ("screwdriver", "turning screws", 150),
    ),
    _schema(
        "countries",
        "A list of countries, one JSON object per line:",
        ("country", "capital", "language"),
        ("Italy", "Rome", "Italian"),
        ("Egypt", "Cairo", "Arabic"),
    ),
)

VALIDATION = (
    _schema(
        "people",
        "A list of people, one JSON object per line:",
        ("name", "age", "city"),
        ("Maria Lopez", 34, "Madrid"),
        ("John Smith", 52, "Chicago"),
    ),
    _schema(
        "books",
        "A list of books, one JSON object per line:",
        ("title", "author", "year"),
        ("The Old Harbor", "Anna Weber", 1987),
        ("Winter Roads", "David Cohen", 2004),
    ),
    _schema(
        "products",
        "A list of products in a shop, one JSON object per line:",
        ("product", "price", "stock"),
        ("wooden chair", 49, 12),
        ("desk lamp", 25, 40),
    ),
)

TEST = (
    _schema(
        "animals",
        "A list of animals, one JSON object per line:",
        ("animal", "habitat", "weight_kg"),
        ("brown bear", "forest", 300),
        ("dolphin", "ocean", 150),
    ),
    _schema(
        "cars",
        "A list of used cars, one JSON object per line:",
        ("brand", "color", "year"),
        ("Toyota", "red", 2015),
        ("Volvo", "dark blue", 2009),
    ),
    _schema(
        "movies",
        "A list of movies, one JSON object per line:",
        ("title", "genre", "year"),
        ("The Silent River", "drama", 1994),
        ("Night Train", "thriller", 2011),
    ),
    _schema(
        "dishes",
        "A list of dishes, one JSON object per line:",
        ("dish", "country", "minutes"),
        ("onion soup", "France", 60),
        ("fried rice", "China", 25),
    ),
    _schema(
        "jobs",
        "A list of open positions, one JSON object per line:",
        ("job", "company", "salary"),
        ("nurse", "City Hospital", 52000),
        ("electrician", "Bright Homes", 47000),
    ),
    _schema(
        "events",
        "A list of events, one JSON object per line:",
        ("event", "month", "visitors"),
        ("book fair", "March", 1200),
        ("jazz night", "October", 300),
    ),
)


PARTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


def valid(completions: Sequence[str], **fields: list) -> list[float]:
    """A reward function: 1 for a valid record, else 0."""
    lines = [dict(zip(fields, values)) for values in zip(*fields.values())]
    return [float(parse_record(c, line) is not None) for c, line in zip(completions, lines)]


def write(folder: Path) -> None:
    """The parts as prompts of an evaluation, and of training on rewards."""
    for name, part in PARTS.items():
        write_text(folder / f"{name}.jsonl", "".join(schema.line for schema in part))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
