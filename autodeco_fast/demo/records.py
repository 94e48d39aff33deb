"""Small tasks with a score: one more line of a list of JSON records, after a heading, examples and
the line's first key.

Syntax and keys are forced, values are free. A record is valid if it parses and has exactly these
keys. Heads are trained on some schemas with rewards, settings are chosen on others, and those that
measure were fixed before any was run.

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


def _schemas(table: str) -> tuple[Schema, ...]:
    """One a line: heading, fields, values of two examples; numbers are numbers."""
    found = []
    for line in table.strip().splitlines():
        heading, fields, *rows = (part.strip() for part in line.split("|"))
        values = ([_value(cell.strip()) for cell in row.split(";")] for row in rows)
        examples = tuple(dict(zip(fields.split(), row)) for row in values)
        whole = f"A list of {heading}, one JSON object per line:"
        found.append(Schema(heading.split()[-1], whole, examples))
    return tuple(found)


def _value(cell: str) -> str | int:
    return int(cell) if cell.isdigit() else cell


TRAIN = _schemas(
    """
    cities | city country population | Lyon; France; 520000 | Osaka; Japan; 2700000
    songs | song artist seconds | Blue Morning; The Larks; 214 | Run Home; Ella Stone; 187
    plants | plant color height_cm | tulip; yellow; 40 | lavender; purple; 60
    games | game players place | chess; 2; indoors | football; 22; stadium
    pets | pet name age | cat; Luna; 4 | parrot; Rio; 11
    trips | from to hours | Berlin; Prague; 5 | Rome; Athens; 2
    students | student subject grade | Tom Baker; history; 87 | Lucy Chen; physics; 93
    drinks | drink served price | green tea; hot; 3 | lemonade; cold; 4
    tools | tool use weight_g | hammer; driving nails; 600 | screwdriver; turning screws; 150
    countries | country capital language | Italy; Rome; Italian | Egypt; Cairo; Arabic
    rivers | river length_km ends_in | Danube; 2850; Black Sea | Loire; 1006; Atlantic Ocean
    friends | name hobby | Sara; painting | Omar; climbing
    orders | order item quantity | 1041; notebook; 3 | 1042; blue pen; 12
    houses | street rooms rent | Mill Lane; 4; 1200 | Park Road; 2; 850
    planets | planet type moons | Mars; rocky; 2 | Saturn; gas giant; 83
    teams | team sport city wins | Red Hawks; hockey; Boston; 31 | Sharks; rugby; Durban; 18
    emails | subject sender urgent | Lunch on Friday; Peter; no | Server is down; Alice; yes
    recipes | recipe main_ingredient servings | lentil stew; lentils; 4 | apple pie; apples; 8
    phones | model storage_gb price | Nova 5; 128; 399 | Pixel Star; 256; 649
    museums | museum town founded | Sea Museum; Brighton; 1931 | Clock House; Geneva; 1888
    birds | bird color eggs | robin; red and brown; 5 | heron; grey; 4
    flights | flight departs gate | LX318; 07:45; A4 | BA902; 18:20; C11
    words | word language meaning | casa; Spanish; house | wasser; German; water
    tasks | task owner days | write report; Nina; 3 | test website; Karl; 5
    shoes | shoe size color | running shoe; 42; white | leather boot; 39; black
    paintings | painting painter year | The Harbor; Jan Vos; 1672 | Red Field; Mia Lund; 1954
    courses | course teacher room hours | algebra; Mr. Hill; 12; 4 | drama; Ms. Roy; 7; 2
    festivals | festival town month | Light Week; Lisbon; May | Snow Days; Oslo; January
    weather reports | city weather temperature | Madrid; sunny; 31 | Dublin; rainy; 14
    teachers | teacher school years | Ann Price; Hill School; 12 | Leo Grant; West College; 3
    snacks | snack calories taste | popcorn; 110; salty | fruit bar; 140; sweet
    islands | island ocean area_km2 | Madeira; Atlantic; 801 | Tahiti; Pacific; 1045
    """
)

VALIDATION = _schemas(
    """
    people | name age city | Maria Lopez; 34; Madrid | John Smith; 52; Chicago
    books | title author year | The Old Harbor; Anna Weber; 1987 | Winter Roads; David Cohen; 2004
    products in a shop | product price stock | wooden chair; 49; 12 | desk lamp; 25; 40
    mountains | mountain country height_m | Matterhorn; Switzerland; 4478 | Elbrus; Russia; 5642
    hotels | hotel city stars | Grand Sea; Nice; 4 | Pine Inn; Denver; 3
    concerts | band hall tickets | The Foxes; Town Hall; 350 | Low Tide; Apollo; 1200
    """
)

TEST = _schemas(
    """
    animals | animal habitat weight_kg | brown bear; forest; 300 | dolphin; ocean; 150
    used cars | brand color year | Toyota; red; 2015 | Volvo; dark blue; 2009
    movies | title genre year | The Silent River; drama; 1994 | Night Train; thriller; 2011
    dishes | dish country minutes | onion soup; France; 60 | fried rice; China; 25
    open positions | job company salary | nurse; City Hospital; 52000 | electrician; Bright Homes; 47000
    events | event month visitors | book fair; March; 1200 | jazz night; October; 300
    """  # noqa: E501 -- a table
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
