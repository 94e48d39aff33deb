"""What intervals are of: bootstrap resamples of draws or questions, and of a head's seeds.

A head's seeds were trained apart and draw with noise of their own, so their errors are independent
values, each with the luck of its training and of its draws in it. Resampling the seeds is then all
there is to do. Of two heads the seeds of one number go together: they had the same noise.

Seeds are few. A bootstrap of n values has (n − 1)/n of their variance, and its quantiles are those
of a normal distribution where they should be Student's: deviations are widened for both.
"""

import numpy as np

NORMAL = 1.960  # 97.5 % quantile
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of 2, 3, … values


def seed_deviations(values: np.ndarray, resamples: int) -> np.ndarray:
    """How far the mean over seeds may be off: resamples of it less itself, widened, the same seeds
    for every head with as many.

    Args:
        values: `[seeds, …]`.

    Returns:
        `[resamples, …]`, zeros for one seed.

    Raises:
        ValueError: for more seeds than there are quantiles.
    """
    n = len(values)
    if not 0 < n <= len(STUDENT) + 1:
        raise ValueError(f"seeds must be 1 to {len(STUDENT) + 1}, got {n}")
    wider = 1.0 if n == 1 else STUDENT[n - 2] / NORMAL * (n / (n - 1)) ** 0.5
    picks = np.random.default_rng(n).integers(n, size=(resamples, n))
    return wider * (values[picks].mean(1) - values.mean(0))


def interval(values: np.ndarray) -> list[float]:
    """95 %, of resamples behind the value of all there is."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return [float(low), float(high)]
