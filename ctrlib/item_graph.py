"""What a cold item may take from the items most like it: neighbours by content, and one step along them.

The abstract of Hu, An, Yu, Du & Luo (arXiv:2502.03664) names a module that mines relations between items; the text of the
paper could not be read, so the equations are our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrlib.config import ConfigError, positive

_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class ItemGraph:
    """Neighbours of M items among I.

    Args:
        items: [M], int64, the items that have neighbours here.
        near: [M, N], int64, their neighbours.
        weight: [M, N], how much each counts; a row sums to 1, or is 0 where no item is alike.
    """

    items: Tensor
    near: Tensor
    weight: Tensor

    def spread(self, values_IK: Tensor, share: float) -> Tensor:
        """z_i ← (1 − η)·z_i + η·Σ_n w_in·z_n for the items of the graph; all others stay, and those that nothing is like.

        Of vectors z [I, k], or of anything linear in them, such as the scores of I items for K users.

        Args:
            values_IK: of all items.
            share: η, in [0, 1].

        Raises:
            ConfigError: ``share`` is outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"share is {share}; expected a number from 0 (nothing of the neighbours) to 1 (nothing else)")
        weight_MN = self.weight.to(values_IK.dtype)
        mean_MK = torch.einsum("mn,mnk->mk", weight_MN, values_IK[self.near])
        share_M1 = share * weight_MN.sum(1, keepdim=True)
        return values_IK.index_copy(0, self.items, (1 - share_M1) * values_IK[self.items] + share * mean_MK)


def nearest_items(content_IC: Tensor, items: Tensor, among: Tensor, *, neighbours: int = 10) -> ItemGraph:
    """For ``items`` the items of ``among`` with the most similar content, by cosine; never an item itself.

    Args:
        content_IC: features of every item, such as multi-hot words weighed by their rarity.
        items: [M], for which neighbours are wanted: the cold ones.
        among: [A], which may be neighbours: those that training has seen.
        neighbours: N, at most; as many as ``among`` has.

    Returns:
        The neighbours, weighed by their cosines; an item that is alike in nothing (cosine ≤ 0) weighs nothing. Memory beside
        that: 1024 × A floats.

    Raises:
        ConfigError: ``neighbours`` is not positive, or ``among`` is empty.
    """
    positive("neighbours", neighbours)
    if not len(among):
        raise ConfigError("among is empty; expected the items that may be neighbours")
    unit_IC = F.normalize(content_IC, dim=1)
    found = []
    for start in range(0, max(len(items), 1), _BLOCK):
        block = items[start : start + _BLOCK]
        like_BA = unit_IC[block] @ unit_IC[among].T
        like_BA = like_BA.masked_fill(block.unsqueeze(1) == among, 0.0)
        found.append(like_BA.topk(min(neighbours, len(among)), dim=1))
    weight_MN = torch.cat([like.values for like in found]).clamp(min=0)
    near_MN = among[torch.cat([like.indices for like in found])]
    tiny = torch.finfo(weight_MN.dtype).tiny
    return ItemGraph(items, near_MN, weight_MN / weight_MN.sum(1, keepdim=True).clamp(min=tiny))
