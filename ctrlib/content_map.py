"""What a cold item may take from all known items: a ridge regression of what training made of them on their content.

The abstract of Hu, An, Yu, Du & Luo (arXiv:2502.03664) names a module that mines relations between items; the text of the
paper could not be read. This is the linear map from attributes to factors of Gantner, Drumond, Freudenthaler, Rendle &
Schmidt-Thieme (*Learning attribute-to-feature mappings for cold-start recommendations*, ICDM 2010), here in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctrlib.config import ConfigError, positive


class ContentMap:
    """Vectors, or scores, of items from their content, as known items have them.

        W   = argmin Σ_n ‖(z_n − z̄) − (c_n − c̄)W‖² + λ‖W‖²    over the known items; z̄ and c̄ are their means
        z_i ← (1 − η)·z_i + η·(z̄ + (c_i − c̄)W)                 for the cold items

    The same is z̄ + Σ_n w_in (z_n − z̄): relations w of a cold item with every known one, which the content alone decides
    (:meth:`relations`). As it is linear in z, to map the item vectors of two towers is to map their scores.

    Args:
        content_IC: features of every item, such as multi-hot genres. What is close in it should be liked by the same people:
            give smooth features of a number, not one-hot values of it.
        cold: [M], int64, the items that have no clicks.
        known: [A], int64, those whose vectors have been trained.
        ridge: λ. Larger, and all cold items are nearer to the average one.

    Memory: C × A floats. Time: C³ + A·C².

    Raises:
        ConfigError: ``ridge`` is not positive, ``known`` is empty, or an item is both cold and known.
    """

    def __init__(self, content_IC: Tensor, cold: Tensor, known: Tensor, *, ridge: float = 1.0) -> None:
        positive("ridge", ridge)
        if not len(known):
            raise ConfigError("known is empty; expected the items whose vectors training has made")
        both = cold[torch.isin(cold, known)]
        if len(both):
            raise ConfigError(f"item {both[0]} is both cold and known; expected every item in one of the two at most")
        self.cold, self.known = cold, known
        content_AC = content_IC[known].double()
        mean_C = content_AC.mean(0)
        content_AC = content_AC - mean_C
        self._cold_MC = content_IC[cold].double() - mean_C
        gram_CC = content_AC.T @ content_AC
        gram_CC.diagonal().add_(ridge)
        self._solve_CA = torch.cholesky_solve(content_AC.T, torch.linalg.cholesky(gram_CC))

    def relations(self) -> Tensor:
        """w, [M, A]: how much each cold item takes of each known one, more or less than the average; rows need not sum to 1."""
        return self._cold_MC @ self._solve_CA

    def spread(self, values_IK: Tensor, share: float = 1.0) -> Tensor:
        """[I, k] → [I, k], in which the cold items have new values, and all others their own.

        Args:
            values_IK: vectors of all items, or anything linear in them, such as the scores of I items for K users.
            share: η, from 0 (the cold item's own) to 1 (only what its content says).

        Raises:
            ConfigError: ``share`` is outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"share is {share}; expected a number from 0 (the item's own) to 1 (what its content says)")
        known_AK = values_IK[self.known].double()
        mean_K = known_AK.mean(0)
        mapped_MK = (mean_K + self._cold_MC @ (self._solve_CA @ (known_AK - mean_K))).to(values_IK.dtype)
        return values_IK.index_copy(0, self.cold, (1 - share) * values_IK[self.cold] + share * mapped_MK)
