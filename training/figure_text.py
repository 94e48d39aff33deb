"""Names in figures, as they are: matplotlib reads formulas between $ signs, and leaves out of a
legend what begins with an underscore."""

_NO_SPACE = "\u200b"  # not seen, and before an underscore no underscore


def as_it_is(name: str) -> str:
    """What matplotlib shows as this name."""
    name = name.replace("$", r"\$")
    return _NO_SPACE + name if name.startswith("_") else name
