"""What a reward is worth as a judge of preferences: accuracy, calibration, bias by length."""

from collections.abc import Sequence

import numpy as np

from megatron_irl.evaluation.measurements import Measurement, mean_of

BINS = 10
SET = "preferences"


def expected_calibration_error(margins: np.ndarray, bins: int = BINS) -> float:
    """ECE of sigmoid(|margin|), the probability that the better-rewarded answer is the chosen one.

    Confidences lie in [0.5, 1] and fall into ``bins`` of equal width; the result is the mean over
    pairs of |share right - mean confidence| of their bin (Guo et al., 2017). Ties count half.

    Args:
        margins: float64 [pairs], reward of the chosen answer less that of the rejected one.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + 0.5 * (margins == 0)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(right[place == b].sum() - confidence[place == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(margins))


def length_correlation(rewards: np.ndarray, lengths: np.ndarray) -> float:
    """Pearson's correlation of reward and length within pairs: of their differences from the pair's
    mean, so that prompts with long answers do not matter. 0 where one of them never differs.

    Args:
        rewards, lengths: [pairs, 2]; lengths in tokens.
    """
    a = np.asarray(rewards, np.float64) - np.mean(rewards, axis=1, keepdims=True)
    b = np.asarray(lengths, np.float64) - np.mean(lengths, axis=1, keepdims=True)
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def preference_rows(
    rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]
) -> list[Measurement]:
    """Accuracy (ties count half), also where the chosen answer is the shorter and the longer one;
    ECE; correlation with length; and as a rival the accuracy of preferring the longer answer.

    Args:
        rewards: [pairs, 2], chosen and rejected.
        lengths: [pairs, 2], tokens of the two.
    """
    reward_P2, length_P2 = np.asarray(rewards, np.float64), np.asarray(lengths, np.int64)
    margin_P = reward_P2[:, 0] - reward_P2[:, 1]
    longer_P = length_P2[:, 0] - length_P2[:, 1]
    right_P = (margin_P > 0) + 0.5 * (margin_P == 0)
    rows = [mean_of(SET, "accuracy", "higher", right_P, is_share=True)]
    for name, of in (("accuracy, chosen is shorter", longer_P < 0),
                     ("accuracy, chosen is longer", longer_P > 0)):
        if of.any():
            rows.append(mean_of(SET, name, "higher", right_P[of], is_share=True))
    rows.append(mean_of(SET, "margin", None, margin_P))
    count = len(margin_P)
    rows += [
        Measurement(SET, "calibration error", "lower", expected_calibration_error(margin_P), None,
                    count),
        Measurement(SET, "correlation with length", None, length_correlation(reward_P2, length_P2),
                    None, count),
        mean_of(SET, "longer answer chosen", None, (longer_P > 0) + 0.5 * (longer_P == 0),
                is_share=True),
    ]
    return rows
