"""What two rows of logits say about each other: losses, divergence, agreement. Knows logits and target tokens; refuses to know models and text.

On a CPU a compiled loop reads each row twice and writes no probabilities, where torch makes several copies of all logits;
`by_torch` is the oracle and what other devices have.
"""

import torch
from torch import Tensor

from bitpress.kernels import cpu_build

TYPES = (torch.bfloat16, torch.float32)


def compare(dense_PV: Tensor, other_PV: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of P positions over V tokens, each [P]: NLL of dense and of other in nats, KL of other from dense in nats, whether their likeliest token is the same.

    Sums are float32. KL is cut at zero, below which only rounding can bring it.
    """
    found = _by_loop(dense_PV, other_PV, targets_P)
    return by_torch(dense_PV, other_PV, targets_P) if found is None else (found[0], found[1], found[2], found[3].bool())


def losses(logits_PV: Tensor, targets_P: Tensor) -> Tensor:
    """NLL of each target in nats, [P]."""
    found = _by_loop(logits_PV, None, targets_P)
    return _nll(logits_PV.float().log_softmax(-1), targets_P) if found is None else found[0]


def by_torch(dense_PV: Tensor, other_PV: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `compare`, by torch: on any device and in any type."""
    logp_PV, logq_PV = dense_PV.float().log_softmax(-1), other_PV.float().log_softmax(-1)
    same_P = dense_PV.max(-1).indices == other_PV.max(-1).indices  # a quarter of the time of argmax on a CPU
    nll_dense_P, nll_P = _nll(logp_PV, targets_P), _nll(logq_PV, targets_P)
    # In place, and in the buffers at hand: a divergence written plainly holds six copies of the logits.
    gap_PV = torch.sub(logp_PV, logq_PV, out=logq_PV)
    kl_P = gap_PV.mul_(logp_PV.exp_()).sum(-1)
    return nll_dense_P, nll_P, kl_P.clamp_min(0.0), same_P


def _nll(logp_PV: Tensor, targets_P: Tensor) -> Tensor:
    return -logp_PV.gather(-1, targets_P[:, None])[:, 0]


def _by_loop(logits_PV: Tensor, other_PV: Tensor | None, targets_P: Tensor) -> Tensor | None:
    """[4, P] of which one model alone has the first row only; None where the loop is not for these tensors."""
    lib = cpu_build.library() if logits_PV.device.type == "cpu" and logits_PV.dtype in TYPES else None
    if lib is None or logits_PV.numel() == 0 or (other_PV is not None and other_PV.dtype != logits_PV.dtype):
        return None
    logits_PV, targets_P = logits_PV.contiguous(), targets_P.contiguous()
    rows, count = logits_PV.shape
    if not 0 <= int(targets_P.min()) <= int(targets_P.max()) < count:
        raise IndexError(f"a target is not one of {count} tokens")
    found = torch.zeros(4, rows)
    other_PV = None if other_PV is None else other_PV.contiguous()
    other = None if other_PV is None else other_PV.data_ptr()
    is_bf16 = logits_PV.dtype == torch.bfloat16
    lib.bitpress_compare(logits_PV.data_ptr(), other, is_bf16, rows, count, targets_P.data_ptr(), found.data_ptr(), torch.get_num_threads())
    return found
