"""Philox4x32-10 and the Gumbel noise made from it: the integers are those of `kernels/philox.py`.

In numpy, because most calls are for a handful of tokens, where an array costs a third of a tensor.
"""

import numpy as np

_ROUND = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_WORD = np.array([[0], [32]], dtype=np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64)[:, None, None]


def philox4x32(key: np.ndarray, c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray) -> np.ndarray:
    """Ten rounds of Philox4x32.

    Args:
        key: `[n]` 64-bit keys, int64 or uint64.
        c0, c1, c2, c3: the counter's words, integers whose low 32 bits count, that broadcast with `key`.

    Returns:
        `[4, n]` uint64 with values below 2³².
    """
    keys = ((key.astype(np.uint64) >> _WORD & _LOW) + _WEYL * _ROUNDS) & _LOW  # [10, 2, n]
    even, odd = np.empty((2, 2, len(key)), np.uint64)  # words 0 and 2, words 1 and 3
    even[0], even[1], odd[0], odd[1] = c0, c2, c1, c3
    even &= _LOW
    odd &= _LOW
    for k in keys:
        product = even * _ROUND
        even = (product >> _HALF)[::-1] ^ odd ^ k
        odd = (product & _LOW)[::-1]
    words = np.empty((2, 2, len(key)), np.uint64)
    words[:, 0], words[:, 1] = even, odd
    return words.reshape(4, -1)


def uniform_bits(seed: np.ndarray, position: np.ndarray, stream: np.ndarray, ids: np.ndarray, domain: int = 0) -> np.ndarray:
    """The 32-bit integer of each token id, `[n]` uint64; all `[n]` int64. One Philox serves four neighbouring ids.

    Neighbours in the arrays whose id // 4 and row (seed, position, stream) are equal share their Philox, so ids should
    come row by row, in ascending order.
    """
    group = ids >> 2
    new = np.empty(len(ids), dtype=bool)
    new[:1] = True
    np.not_equal(group[1:], group[:-1], out=new[1:])
    for row in (seed, position, stream):
        new[1:] |= row[1:] != row[:-1]
    first = new.nonzero()[0]
    words = philox4x32(seed[first], group[first], position[first], stream[first], domain)
    return words[ids & 3, new.cumsum() - 1]


def gumbel(seed: np.ndarray, position: np.ndarray, stream: np.ndarray, ids: np.ndarray, domain: int = 0) -> np.ndarray:
    """Gumbel noise of each token id, `[n]` fp32: `−log(−log1p(−u))`, `u = (r + ½)·2⁻³²` kept below 1."""
    u = uniform_bits(seed, position, stream, ids, domain).astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-32)
    np.minimum(u, np.float32(1 - 2.0**-24), out=u)
    return -np.log(-np.log1p(-u))
