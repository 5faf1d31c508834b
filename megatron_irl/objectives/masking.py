"""Token log-probabilities to sequence log-probabilities.

Shape suffixes: R response rows, S sequences.
"""

import torch
from torch import Tensor


def sequence_logprobs(logprobs_R: Tensor, segment_R: Tensor, num_sequences: int) -> Tensor:
    """Sum token log-probabilities over each sequence's response.

    logp[s] = sum over rows r with segment[r] = s of logprobs[r]

    Sums and not means: the log-ratio of the implicit reward is one of whole responses.

    Args:
        logprobs_R: [R] nats, log-probability of each response token, EOS included where there is
            one; prompt and padding tokens have no row.
        segment_R: [R] int64, the sequence each row belongs to; non-decreasing, as ``pack`` lays
            sequences one after the other.
        num_sequences: S.

    Returns:
        [S] nats, float32 (float64 if the input is); a sequence without rows has 0.

    Gradient: through logprobs_R, 1 for every row.
    Collectives: none.

    Raises:
        ValueError: The two inputs differ in shape; the segments decrease (seen on the CPU only).
    """
    if logprobs_R.shape != segment_R.shape or logprobs_R.dim() != 1:
        raise ValueError(f"logprobs_R has shape {tuple(logprobs_R.shape)} and segment_R "
                         f"{tuple(segment_R.shape)}; both must be [R].")
    if segment_R.is_cpu and bool((segment_R.diff() < 0).any()):  # elsewhere this would be a sync
        raise ValueError("segment_R decreases; the rows of a sequence must stand together.")
    terms_R = at_least_float32(logprobs_R)
    # ``index_add`` would add in no fixed order on CUDA. Here each sequence is a run of rows, added
    # from its first to its last: on the CPU to the same bits as ``index_add``.
    edges = torch.arange(num_sequences + 1, device=segment_R.device)
    offsets = torch.searchsorted(segment_R, edges)  # where each sequence's rows begin; no sync
    return torch.segment_reduce(terms_R, "sum", offsets=offsets, unsafe=True)


def at_least_float32(values: Tensor) -> Tensor:
    """Widen half precision to float32; float32 and float64 pass as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
