"""Philox4x32-10 and the Gumbel noise made from it: the integers are those of `kernels/philox.py`.

In numpy, because most calls are for a handful of tokens, where an array costs less than a tensor.
"""

import numpy as np

_ROUND = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_WORD = np.array([[0], [32]], dtype=np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64)[:, None, None]
_64 = (1 << 64) - 1


def _words(value: np.ndarray | int) -> np.ndarray | np.uint64:
    """64 bits, unsigned."""
    return value.astype(np.uint64) if isinstance(value, np.ndarray) else np.uint64(value & _64)


def philox4x32(key, c0: np.ndarray, c1, c2, c3) -> np.ndarray:
    """Ten rounds of Philox4x32.

    Args:
        key: 64-bit keys, `[n]` int64 or a number.
        c0: `[n]` int64, as the rest of which the low 32 bits count.
        c1, c2, c3: the counter's other words, `[n]` int64 or numbers.

    Returns:
        `[4, n]` uint64 below 2³².
    """
    keys = (_words(key) >> _WORD & _LOW) + _WEYL * _ROUNDS & _LOW  # [10, 2, n or 1]
    even, odd = np.empty((2, 2, len(c0)), np.uint64)  # words 0 and 2, words 1 and 3
    for place, word in ((even[0], c0), (odd[0], c1), (even[1], c2), (odd[1], c3)):
        place[:] = _words(word) & _LOW
    for k in keys:
        product = even * _ROUND
        even = (product >> _HALF)[::-1] ^ odd ^ k
        odd = (product & _LOW)[::-1]
    words = np.empty((2, 2, len(c0)), np.uint64)
    words[:, 0], words[:, 1] = even, odd
    return words.reshape(4, -1)


def at(value: np.ndarray | float, index: np.ndarray) -> np.ndarray | float:
    """A row's parameter at these rows: `value[index]`, or the number that all rows share."""
    return value[index] if isinstance(value, np.ndarray) else value


def uniform_bits(seed, position, stream, row: np.ndarray, ids: np.ndarray, domain: int = 0) -> np.ndarray:
    """The 32-bit integer of each token id, `[n]` uint64. One Philox serves four neighbouring ids.

    Args:
        seed, position, stream: `[B]` int64 or numbers.
        row, ids: `[n]` int64; ids should come row by row, in ascending order, so that neighbours share their Philox.
    """
    group = ids >> 2
    code = (row << 32) + group
    new = np.empty(len(ids), dtype=bool)
    new[:1] = True
    np.not_equal(code[1:], code[:-1], out=new[1:])
    first = new.nonzero()[0]
    rows = row[first]
    words = philox4x32(at(seed, rows), group[first], at(position, rows), at(stream, rows), domain)
    return words[ids & 3, new.cumsum() - 1]


def gumbel(seed, position, stream, row: np.ndarray, ids: np.ndarray, domain: int = 0) -> np.ndarray:
    """Gumbel noise of each token id, `[n]` fp32: `−log(−log1p(−u))`, `u = (r + ½)·2⁻³²` kept below 1."""
    u = uniform_bits(seed, position, stream, row, ids, domain).astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(-(2.0**-32))
    np.maximum(u, np.float32(2.0**-24 - 1), out=u)  # −u
    np.log1p(u, out=u)
    np.negative(u, out=u)
    np.log(u, out=u)
    return np.negative(u, out=u)
