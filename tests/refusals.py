"""What a user is told."""

import pytest


def one_line(call, *words: str, error=ValueError) -> None:
    """A call is refused, in one line with these words."""
    with pytest.raises(error) as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
