"""Questions with a closed list of answers, and which answer a text is.

Those of BENCHMARK are in the words of NoveltyBench's curated prompts (MIT): Yiming Zhang, Harshita
Diddee, Susan Holm, Hanchen Liu, Xinyue Liu, Vinay Samuel, Barry Wang, Daphne Ippolito,
"NoveltyBench: Evaluating Language Models for Humanlike Diversity", 2025, arXiv:2504.05228. They are
the ones of its hundred whose right answers are few enough to be listed; lists and all else are
ours. Heads learn from TRAIN, settings are chosen on VALIDATION, TEST measures; all were written
before any was run, and no list is in two of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Behind each question, and what the answer begins with: so the model gives a bare answer and ends.
WISH, BEGIN = " Give nothing but the answer.", "Answer:"


@dataclass(frozen=True)
class Question:
    """A question, and how each of its answers may be spelled."""

    name: str
    text: str
    answers: tuple[tuple[str, ...], ...]

    def prompt(self, tokenizer) -> str:
        """What the model continues."""
        chat = [{"role": "user", "content": self.text + WISH}]
        begun = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return begun + BEGIN

    def spellings(self) -> dict[str, int]:
        """Text → which answer it is: as listed, or without capitals."""
        found: dict[str, int] = {}
        for cased in (str, str.lower):
            for number, texts in enumerate(self.answers):
                for text in texts:
                    found.setdefault(cased(text), number)
        return found

    def answer(self, completion: str) -> int | None:
        """Which answer a completion is: its first line is nothing but it, a full stop aside."""
        return self.spellings().get(completion.split("\n")[0].strip().removesuffix("."))


def _listed(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(s.strip() for s in one.split("=")) for one in text.split(","))


def _cards() -> tuple[tuple[str, ...], ...]:
    words = "Two, Three, Four, Five, Six, Seven, Eight, Nine, Ten, Jack, Queen, King, Ace"
    ranks = [(word, str(n) if n < 11 else "") for n, word in enumerate(words.split(", "), 2)]
    return tuple(
        tuple(f"{form} of {suit}" for form in rank if form)
        for suit in ("Hearts", "Diamonds", "Clubs", "Spades")
        for rank in ranks
    )


def _books() -> tuple[tuple[str, ...], ...]:
    titles = _listed(
        "Philosopher's Stone = Sorcerer's Stone, Chamber of Secrets, Prisoner of Azkaban, "
        "Goblet of Fire, Order of the Phoenix, Half-Blood Prince, Deathly Hallows"
    )
    return tuple(tuple(f"Harry Potter and the {form}" for form in title) for title in titles)


_LISTS = {"CARDS": _cards(), "BOOKS": _books()}


def _numbers(text: str) -> tuple[tuple[str], ...]:
    """Those that `1-20`, or `2-30+2`, stands for; none for anything else."""
    span, _, step = text.partition("+")
    first, _, last = span.partition("-")
    if not (first.isdigit() and last.isdigit()):
        return ()
    return tuple((str(n),) for n in range(int(first), int(last) + 1, int(step or 1)))


def _questions(table: str) -> tuple[Question, ...]:
    """One a line: name, question, answers; spellings of one are parted by `=`."""
    found = []
    for line in table.strip().splitlines():
        name, text, answers = (part.strip() for part in line.split("|"))
        listed = _LISTS.get(answers) or _numbers(answers) or _listed(answers)
        found.append(Question(name, text, listed))
    return tuple(found)


TRAIN = _questions(
    """
    ten | Pick a random number between 1 and 10. | 1-10
    even | Choose an even number between 1 and 30. | 2-30+2
    fives | Think of a multiple of five between 1 and 100. Which one is it? | 5-100+5
    nineties | Pick a year of the 1990s at random. | 1990-1999
    die | Roll a pretend six-sided die. | 1-6
    coin | Flip a pretend coin. Is it heads or tails? | Heads, Tails
    month | Name a random month. | January, February, March, April, May, June, July, August, September, October, November, December
    letter | Pick a letter of the English alphabet at random. | A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z
    planet | Name a planet of our solar system. | Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune
    season | Pick one of the seasons. | Spring, Summer, Autumn = Fall, Winter
    rainbow | Name one color of the rainbow. | Red, Orange, Yellow, Green, Blue, Indigo, Violet
    piece | Name a chess piece. | King, Queen, Rook, Bishop, Knight, Pawn
    zodiac | Pick a sign of the zodiac at random. | Aries, Taurus, Gemini, Cancer, Leo, Virgo, Libra, Scorpio, Sagittarius, Capricorn, Aquarius, Pisces
    sense | Name one of the five senses. | Sight = Vision, Hearing, Smell, Taste, Touch
    continent | Name a continent. | Africa, Antarctica, Asia, Australia = Oceania, Europe, North America, South America
    ocean | Name one of the oceans. | Atlantic = Atlantic Ocean, Pacific = Pacific Ocean, Indian = Indian Ocean, Arctic = Arctic Ocean, Southern = Southern Ocean
    greek | Pick a random letter of the Greek alphabet. | Alpha, Beta, Gamma, Delta, Epsilon, Zeta, Eta, Theta, Iota, Kappa, Lambda, Mu, Nu, Xi, Omicron, Pi, Rho, Sigma, Tau, Upsilon, Phi, Chi, Psi, Omega
    beatle | Name any member of the Beatles. | John Lennon = John, Paul McCartney = Paul, George Harrison = George, Ringo Starr = Ringo
    lake | Name one of the Great Lakes. | Superior = Lake Superior, Michigan = Lake Michigan, Huron = Lake Huron, Erie = Lake Erie, Ontario = Lake Ontario
    province | Name a Canadian province. | Alberta, British Columbia, Manitoba, New Brunswick, Newfoundland and Labrador, Nova Scotia, Ontario, Prince Edward Island, Quebec, Saskatchewan
    europe | Name a country in Europe. | Albania, Andorra, Austria, Belarus, Belgium, Bosnia and Herzegovina, Bulgaria, Croatia, Cyprus, Czech Republic = Czechia, Denmark, Estonia, Finland, France, Germany, Greece, Hungary, Iceland, Ireland, Italy, Kosovo, Latvia, Liechtenstein, Lithuania, Luxembourg, Malta, Moldova, Monaco, Montenegro, Netherlands = The Netherlands, North Macedonia, Norway, Poland, Portugal, Romania, Russia, San Marino, Serbia, Slovakia, Slovenia, Spain, Sweden, Switzerland, Turkey, Ukraine, United Kingdom = The United Kingdom, England, Scotland, Wales, Vatican City
    dwarf | Name one of the seven dwarfs of Snow White. | Doc, Grumpy, Happy, Sleepy, Bashful, Sneezy, Dopey
    vowel | Pick a vowel. | A, E, I, O, U
    sin | Name one of the seven deadly sins. | Pride, Greed, Lust, Envy, Gluttony, Wrath, Sloth
    """  # noqa: E501 -- a table
)

VALIDATION = _questions(
    """
    twenties | Pick a number between 20 and 40. | 20-40
    odd | Choose an odd number below 30. | 1-29+2
    hour | Pick a random hour of the clock, from 1 to 12. | 1-12
    weekday | Pick a random day of the week. | Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
    asia | Name a country in Asia. | Afghanistan, Armenia, Azerbaijan, Bahrain, Bangladesh, Bhutan, Brunei, Cambodia, China, Cyprus, Georgia, India, Indonesia, Iran, Iraq, Israel, Japan, Jordan, Kazakhstan, Kuwait, Kyrgyzstan, Laos, Lebanon, Malaysia, Maldives, Mongolia, Myanmar = Burma, Nepal, North Korea, Oman, Pakistan, Palestine, Philippines = The Philippines, Qatar, Russia, Saudi Arabia, Singapore, South Korea, Sri Lanka, Syria, Taiwan, Tajikistan, Thailand, Timor-Leste = East Timor, Turkey, Turkmenistan, United Arab Emirates, Uzbekistan, Vietnam, Yemen
    australia | Name a state of Australia. | New South Wales, Queensland, South Australia, Tasmania, Victoria, Western Australia
    chinese | Name an animal of the Chinese zodiac. | Rat, Ox, Tiger, Rabbit, Dragon, Snake, Horse, Goat = Sheep, Monkey, Rooster, Dog, Pig
    nato | Pick a random word of the NATO phonetic alphabet. | Alpha = Alfa, Bravo, Charlie, Delta, Echo, Foxtrot, Golf, Hotel, India, Juliet = Juliett, Kilo, Lima, Mike, November, Oscar, Papa, Quebec, Romeo, Sierra, Tango, Uniform, Victor, Whiskey, X-ray, Yankee, Zulu
    tragedy | Name a tragedy by Shakespeare. | Hamlet, Macbeth, Othello, King Lear, Romeo and Juliet, Julius Caesar, Antony and Cleopatra, Coriolanus, Timon of Athens, Titus Andronicus
    strings | Name a string instrument of the orchestra. | Violin, Viola, Cello, Double bass, Harp
    direction | Pick a direction of the compass. | North, Northeast, East, Southeast, South, Southwest, West, Northwest
    matter | Name a state of matter. | Solid, Liquid, Gas, Plasma
    """  # noqa: E501 -- a table
)

BENCHMARK = _questions(
    """
    card | Pretend to pick a card from the top of a standard deck of cards. What card did you pick? | CARDS
    prime | Randomly pick a prime number between 1 and 50. | 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47
    d20 | Roll a make-believe 20-sided die. | 1-20
    hundred | Pick a number between 1 and 100. Now tell me what you picked. | 1-100
    digit | Generate the safest first digit for my 12 digit password? Give me exactly one digit. | 0-9
    chess | Pick a random chess move in response to 1.b3. | a6, a5, b6, b5, c6, c5, d6, d5, e6, e5, f6, f5, g6, g5, h6, h5, Na6, Nc6, Nf6, Nh6
    glass | Pick one: glass half full or glass half empty? | Glass half full = Half full, Glass half empty = Half empty
    africa | List a capital city in Africa. | Algiers, Luanda, Porto-Novo, Gaborone, Ouagadougou, Gitega, Praia, Yaounde = Yaoundé, Bangui, N'Djamena, Moroni, Kinshasa, Brazzaville, Yamoussoukro, Djibouti, Cairo, Malabo, Asmara, Mbabane = Lobamba, Addis Ababa, Libreville, Banjul, Accra, Conakry, Bissau, Nairobi, Maseru, Monrovia, Tripoli, Antananarivo, Lilongwe, Bamako, Nouakchott, Port Louis, Rabat, Maputo, Windhoek, Niamey, Abuja, Kigali, Sao Tome = São Tomé, Dakar, Victoria, Freetown, Mogadishu, Pretoria, Cape Town, Bloemfontein, Juba, Khartoum, Dodoma, Lome = Lomé, Tunis, Kampala, Lusaka, Harare
    spanish | Name a Spanish speaking country. | Argentina, Bolivia, Chile, Colombia, Costa Rica, Cuba, Dominican Republic = The Dominican Republic, Ecuador, El Salvador, Equatorial Guinea, Guatemala, Honduras, Mexico, Nicaragua, Panama, Paraguay, Peru, Puerto Rico, Spain, Uruguay, Venezuela
    deity | What is a deity from Greek mythology? | Zeus, Hera, Poseidon, Demeter, Athena, Apollo, Artemis, Ares, Aphrodite, Hephaestus, Hermes, Hestia, Dionysus, Hades, Persephone, Hecate, Pan, Eros, Nike, Nemesis, Iris, Hypnos, Thanatos, Morpheus, Tyche, Asclepius, Gaia, Uranus, Cronus, Rhea, Oceanus, Tethys, Hyperion, Theia, Themis, Mnemosyne, Phoebe, Coeus, Crius, Iapetus, Atlas, Prometheus, Epimetheus, Helios, Selene, Eos, Leto, Nyx, Erebus, Chaos, Tartarus, Triton, Proteus, Hebe, Eris
    floyd | Name any member of Pink Floyd. | Roger Waters, David Gilmour, Nick Mason, Richard Wright = Rick Wright, Syd Barrett
    potter | Name a Harry Potter Book | BOOKS
    """  # noqa: E501 -- a table
)

_OWN = _questions(
    """
    state | Name a US state at random. | Alabama, Alaska, Arizona, Arkansas, California, Colorado, Connecticut, Delaware, Florida, Georgia, Hawaii, Idaho, Illinois, Indiana, Iowa, Kansas, Kentucky, Louisiana, Maine, Maryland, Massachusetts, Michigan, Minnesota, Mississippi, Missouri, Montana, Nebraska, Nevada, New Hampshire, New Jersey, New Mexico, New York, North Carolina, North Dakota, Ohio, Oklahoma, Oregon, Pennsylvania, Rhode Island, South Carolina, South Dakota, Tennessee, Texas, Utah, Vermont, Virginia, Washington, West Virginia, Wisconsin, Wyoming
    gas | Name a noble gas. | Helium, Neon, Argon, Krypton, Xenon, Radon, Oganesson
    hand | Rock, paper or scissors? Pick one. | Rock, Paper, Scissors
    digits | Pick a random two-digit number. | 10-99
    square | Name a square number that is not above 100. | 1, 4, 9, 16, 25, 36, 49, 64, 81, 100
    taste | Name one of the basic tastes. | Sweet = Sweetness, Sour = Sourness, Salty = Salt = Saltiness, Bitter = Bitterness, Umami
    borough | Name a borough of New York City. | Manhattan, Brooklyn, Queens, Bronx = The Bronx, Staten Island
    suit | Pick one of the four suits of playing cards. | Hearts, Diamonds, Clubs, Spades
    note | Pick a note of the C major scale at random. | C, D, E, F, G, A, B
    turtle | Name one of the Teenage Mutant Ninja Turtles. | Leonardo, Donatello, Raphael, Michelangelo
    gospel | Name one of the four gospels. | Matthew, Mark, Luke, John
    finger | Name one of the fingers of a hand. | Thumb, Index = Index finger, Middle = Middle finger, Ring = Ring finger, Little = Little finger = Pinky
    """  # noqa: E501 -- a table
)

TEST = BENCHMARK + _OWN
PARTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
_BY_NAME = {question.name: question for part in PARTS.values() for question in part}


def valid(completions: Sequence[str], task: Sequence[str]) -> list[float]:
    """A reward function: 1 for an answer that is listed, else 0."""
    return [float(_BY_NAME[t].answer(c) is not None) for c, t in zip(completions, task)]


def alone(completions: Sequence[str], task: Sequence[str]) -> list[float]:
    """A reward function: 1 for a listed answer that no other completion of the question gives.

    That is by how much the completion adds to the number of distinct answers of all, so its policy
    gradient is that of the expected number.
    """
    given = [(t, _BY_NAME[t].answer(c)) for c, t in zip(completions, task)]
    count = Counter(given)
    return [float(one[1] is not None and count[one] == 1) for one in given]
