"""Set prediction: which query answers for which target (DETR, arXiv 2005.12872; Mask2Former, 2112.01527)."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class Matches(NamedTuple):
    """M = sum over the images of min(Q, n) pairs at each of L levels (a decoder's layers, all supervised).

    image: (L, M) index into the batch
    query: (L, M) index into that image's Q queries
    target: (L, M) index into the batch's targets, concatenated
    """

    image: Tensor
    query: Tensor
    target: Tensor


def hungarian(costs: list[Tensor]) -> Matches:
    """The pairs of least total cost, for every image and level on its own.

    costs: B tensors (L, Q, n), n the number of that image's targets

    A NaN or infinite cost counts as very large: a broken prediction reaches the loss and is reported there.
    Everything crosses to the host in one transfer, and back in one.
    """
    levels = costs[0].shape[0]
    flat = torch.cat([c.flatten() for c in costs]).cpu().numpy()
    flat = np.nan_to_num(flat, nan=1e9, posinf=1e9, neginf=-1e9)
    pairs, begin, first_target = [[] for _ in range(levels)], 0, 0
    for image, cost in enumerate(costs):
        table = flat[begin : begin + cost.numel()].reshape(cost.shape)
        for level in range(levels):
            query, target = linear_sum_assignment(table[level])
            pairs[level].append(np.stack([np.full_like(query, image), query, target + first_target]))
        begin, first_target = begin + cost.numel(), first_target + cost.shape[2]
    stacked = np.stack([np.concatenate(level, 1) for level in pairs], 1)  # (3, L, M)
    return Matches(*torch.from_numpy(stacked).to(costs[0].device, non_blocking=True))
