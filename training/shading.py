"""Temperatures as shades of text, on a page and on a terminal."""

HOTTEST = 2.0  # the temperature of the deepest shade, where nobody says another
ORANGE = (234, 88, 12)
_DEEPEST = 0.75  # opacity: text can be read on it
BROKEN = "\ufffd"  # what a tokenizer makes of a part of a character


def opacity(temperature: float, hottest: float = HOTTEST) -> float:
    """Of the orange over the page behind a token: 0 at T = 0."""
    return _DEEPEST * min(max(temperature / hottest, 0.0), 1.0)


def colour(temperature: float, hottest: float = HOTTEST) -> str:
    """White at 0 to orange at `hottest`, dark text can be read on it."""
    share = opacity(temperature, hottest)
    mixed = (round(255 + share * (part - 255)) for part in ORANGE)
    return f"rgb({','.join(map(str, mixed))})"


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token; together they are the text of all. A character that several tokens
    make stands with the last of them."""

    def decoded(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)

    # A token is decoded behind the whole characters before it: alone it may lose a space.
    texts, before = [], ""
    start = begun = 0  # of what is decoded; of the tokens that make no whole character yet
    for end in range(1, len(ids) + 1):
        text = decoded(start, end)
        if end < len(ids) and text.endswith(BROKEN):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, begun = begun, end
        before = decoded(start, end)
    return texts
