"""Small tasks with a score: one more line of a list of JSON records, after a heading, examples and
the line's first key.

Syntax and keys are forced, values are free. A record is valid if it parses, has exactly these
keys, texts that are not empty and numbers in a range. Which schemas are for choosing settings and
which for measuring was fixed before any was run.
"""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Schema:
    name: str
    heading: str
    examples: tuple[dict, ...]
    ranges: dict[str, tuple[float, float]]  # of fields that are numbers

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

    def parse(self, completion: str) -> dict | None:
        """The record of a completion's first line; None where it is not valid."""
        try:
            record = json.loads(self.opening + completion.split("\n")[0])
        except (json.JSONDecodeError, RecursionError):
            return None
        if not isinstance(record, dict) or set(record) != set(self.fields):
            return None
        return record if all(self._good(name, record[name]) for name in self.fields) else None

    def _good(self, name: str, value: object) -> bool:
        if name not in self.ranges:
            return isinstance(value, str) and bool(value.strip())
        low, high = self.ranges[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and low <= value <= high


def _schema(name: str, heading: str, *rows: tuple, **ranges: tuple[float, float]) -> Schema:
    fields, *values = rows
    examples = tuple(dict(zip(fields, row)) for row in values)
    return Schema(name, heading, examples, ranges)


VALIDATION = (
    _schema(
        "people",
        "A list of people, one JSON object per line:",
        ("name", "age", "city"),
        ("Maria Lopez", 34, "Madrid"),
        ("John Smith", 52, "Chicago"),
        age=(1, 120),
    ),
    _schema(
        "books",
        "A list of books, one JSON object per line:",
        ("title", "author", "year"),
        ("The Old Harbor", "Anna Weber", 1987),
        ("Winter Roads", "David Cohen", 2004),
        year=(1400, 2030),
    ),
    _schema(
        "products",
        "A list of products in a shop, one JSON object per line:",
        ("product", "price", "stock"),
        ("wooden chair", 49, 12),
        ("desk lamp", 25, 40),
        price=(0.01, 100_000),
        stock=(0, 100_000),
    ),
)

TEST = (
    _schema(
        "animals",
        "A list of animals, one JSON object per line:",
        ("animal", "habitat", "weight_kg"),
        ("brown bear", "forest", 300),
        ("dolphin", "ocean", 150),
        weight_kg=(0.0001, 200_000),
    ),
    _schema(
        "cars",
        "A list of used cars, one JSON object per line:",
        ("brand", "color", "year"),
        ("Toyota", "red", 2015),
        ("Volvo", "dark blue", 2009),
        year=(1900, 2030),
    ),
    _schema(
        "movies",
        "A list of movies, one JSON object per line:",
        ("title", "genre", "year"),
        ("The Silent River", "drama", 1994),
        ("Night Train", "thriller", 2011),
        year=(1880, 2030),
    ),
    _schema(
        "dishes",
        "A list of dishes, one JSON object per line:",
        ("dish", "country", "minutes"),
        ("onion soup", "France", 60),
        ("fried rice", "China", 25),
        minutes=(1, 2000),
    ),
    _schema(
        "jobs",
        "A list of open positions, one JSON object per line:",
        ("job", "company", "salary"),
        ("nurse", "City Hospital", 52000),
        ("electrician", "Bright Homes", 47000),
        salary=(100, 10_000_000),
    ),
    _schema(
        "events",
        "A list of events, one JSON object per line:",
        ("event", "month", "visitors"),
        ("book fair", "March", 1200),
        ("jazz night", "October", 300),
        visitors=(1, 100_000_000),
    ),
)
