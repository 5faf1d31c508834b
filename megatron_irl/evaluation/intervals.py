"""What a number of few items that are right or wrong lets one say."""

import math

import numpy as np

Z = 1.96  # half the width of a 95% interval, in standard errors


def wilson_interval(count: float, total: int, z: float = Z) -> tuple[float, float]:
    """Return Wilson's score interval of a share, 95% by default (Wilson, 1927).

    Unlike the normal approximation it stays inside [0, 1] and has a width at 0 and at ``total``.
    Items that count half make it no narrower than it should be.
    """
    assert 0 <= count <= total and total > 0, f"{count} of {total}"
    share = count / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At the ends the interval closes on the share itself; rounding must not push it outside.
    return (0.0 if count == 0 else centre - half), (1.0 if count == total else centre + half)


def paired_share_error(differences: np.ndarray) -> float:
    """Standard error of a change of shares, of items that both models answered.

    Half a pair is added to each of the four ways in which a pair can turn out (Agresti and Min,
    2005): where all pairs are alike, their deviation of zero would claim a certainty. It is given
    about the plain mean difference, which is then so many errors from zero as theirs is.

    Args:
        differences: float64 [pairs], in [-1, 1].
    """
    total = len(differences) + 2
    mean = differences.sum() / total
    variance = (np.square(differences).sum() + 1) / total - mean * mean
    return math.sqrt(variance / total) * total / len(differences)
