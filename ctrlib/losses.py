"""What training minimises: weighted log loss, auxiliary losses, and the gradients of L2 penalties."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.batch import Batch, Output, embedding_parameters
from ctrlib.config import ConfigError
from ctrlib.schema import DataError

EmbeddingL2Mode = Literal["full_table", "batch_rows", "elapsed"]


def bce_loss(logits: Tensor, labels_BT: Tensor, weight: Tensor | None = None) -> Tensor:
    """Binary cross entropy of logits: per task Σ_b w_b·l_b / Σ_b w_b, averaged over tasks.

    Computed in float32 at least, whatever the precision of the model. A batch whose weights are all 0 gives 0.

    Args:
        logits: [B] for one task, or [B, T].
        labels_BT: [B, T] of 0 and 1.
        weight: [B]; ``None``: every row weighs 1.

    Returns:
        A scalar.

    Raises:
        ConfigError: the model and the data have different numbers of tasks.
    """
    logits_BT = logits.unsqueeze(1) if logits.ndim == 1 else logits
    if logits_BT.shape != labels_BT.shape:
        raise ConfigError(
            f"the model returns logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels_BT.shape)}; "
            "expected one logit for every row and label: give the model as many outputs as the schema has labels"
        )
    logits_BT = logits_BT.to(torch.promote_types(logits.dtype, torch.float32))
    labels_BT = labels_BT.to(logits_BT.dtype)
    if weight is None:
        return F.binary_cross_entropy_with_logits(logits_BT, labels_BT)
    losses_BT = F.binary_cross_entropy_with_logits(logits_BT, labels_BT, reduction="none")
    weight_B = weight.to(logits_BT.dtype)
    losses_T = (weight_B.unsqueeze(1) * losses_BT).sum(0) / weight_B.sum().clamp(min=torch.finfo(weight_B.dtype).tiny)
    return losses_T.mean()


def total_loss(output: Output, batch: Batch) -> Tensor:
    """:func:`bce_loss` plus the model's auxiliary losses; a scalar.

    Raises:
        DataError: the batch has no labels.
    """
    if batch.labels is None:
        raise DataError("the batch has no labels; training needs the label columns that the schema names")
    loss = bce_loss(output.logits, batch.labels, batch.weight)
    for auxiliary in output.auxiliary.values():
        loss = loss + auxiliary
    return loss


@torch.no_grad()
def add_embedding_l2(tables: Iterable[nn.Parameter], strength: float, mode: Literal["full_table", "batch_rows"]) -> None:
    """Add the gradient of an L2 penalty to embedding tables with dense gradients; call after ``backward``, before clipping.

    ``full_table`` adds λ·W to the gradient of every table: exactly the gradient of (λ/2)·‖W‖² in the loss, as FuxiCTR has
    it, without building the penalty. Rows absent from the batch shrink too. ``batch_rows`` adds it only to rows that have a
    non-zero gradient in this step.
    """
    for table in tables:
        if mode == "full_table":
            _add_l2(table, strength)
        elif table.grad is not None:
            rows = (table.grad != 0).any(1).nonzero().squeeze(1)
            table.grad.index_add_(0, rows, table[rows], alpha=strength)


@torch.no_grad()
def add_net_l2(model: nn.Module, strength: float, without: Iterable[nn.Parameter] = ()) -> None:
    """The same with ``full_table`` for every trainable parameter that is not an embedding table, biases and norms included.

    Args:
        without: parameters that do not pay.
    """
    others = {id(parameter) for parameter in (*embedding_parameters(model), *without)}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in others:
            _add_l2(parameter, strength)


def _add_l2(parameter: nn.Parameter, strength: float) -> None:
    if parameter.grad is None:
        parameter.grad = strength * parameter
    else:
        parameter.grad.add_(parameter, alpha=strength)
