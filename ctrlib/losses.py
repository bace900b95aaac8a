"""What training minimises: weighted log loss, auxiliary and contrastive losses, and the gradients of L2 penalties."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.batch import Batch, Output, embedding_parameters
from ctrlib.config import ConfigError, check_choice, positive
from ctrlib.schema import DataError

EmbeddingL2Mode = Literal["full_table", "batch_rows", "elapsed"]
Similarity = Literal["dot", "cosine"]
NegativesFrom = Literal["anchor", "positive"]


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


def class_loss(logits_BC: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross entropy of classes that exclude one another: Σ_b w_b·(−ln softmax(z_b)[y_b]) / Σ_b w_b.

    Computed in float32 at least. A batch whose weights are all 0 gives 0; the label of such a row is not read, but must be a
    class.

    Args:
        logits_BC: [B, C].
        labels: [B] int64 from 0 to C − 1.
        weight: [B]; ``None``: every row weighs 1.

    Returns:
        A scalar.

    Raises:
        ConfigError: the labels are no classes.
    """
    if labels.is_floating_point() or labels.shape != logits_BC.shape[:1]:
        raise ConfigError(
            f"the model returns logits of classes, {tuple(logits_BC.shape)}, for labels {labels.dtype} of shape "
            f"{tuple(labels.shape)}; expected the number of one class for every row: train it on nodes of a graph"
        )
    losses_B = F.cross_entropy(logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32)), labels, reduction="none")
    if weight is None:
        return losses_B.mean()
    weight_B = weight.to(losses_B.dtype)
    return (weight_B * losses_B).sum() / weight_B.sum().clamp(min=torch.finfo(weight_B.dtype).tiny)


def total_loss(output: Output, batch: Batch) -> Tensor:
    """:func:`bce_loss` (of classes :func:`class_loss`) plus the model's auxiliary losses; a scalar.

    Raises:
        DataError: the batch has no labels.
    """
    if batch.labels is None:
        raise DataError("the batch has no labels; training needs the label columns that the schema names")
    loss = (class_loss if output.classes else bce_loss)(output.logits, batch.labels, batch.weight)
    for auxiliary in output.auxiliary.values():
        loss = loss + auxiliary
    return loss


def info_nce(
    anchor_BD: Tensor,
    positive_BD: Tensor,
    *,
    similarity: Similarity = "cosine",
    temperature: float = 0.1,
    exclude_BB: Tensor | None = None,
    rows_B: Tensor | None = None,
    num_negatives: int | None = None,
    negatives_from: NegativesFrom = "positive",
    symmetric: bool = False,
) -> Tensor:
    """Contrastive loss of two views of each row against the other rows of the batch (InfoNCE, arXiv:1807.03748).

        L = −(1/n) Σ_i ln( e^{s(a_i, p_i)/τ} / (e^{s(a_i, p_i)/τ} + Σ_{l ∈ N(i)} e^{s(a_i, x_l)/τ}) )

    with x the positives or the anchors, s the dot product or the cosine, and N(i) the rows l ≠ i that are not excluded. A row
    without negatives loses 0; so does a batch without rows. Computed in float32 at least, in memory of some [B, B] tensors.

    Args:
        anchor_BD, positive_BD: the views; the cosine of a zero vector is 0.
        similarity: s.
        temperature: τ.
        exclude_BB: True at (i, l) where row l must not be a negative of row i, such as rows of one user.
        rows_B: False for rows that are left out, as anchors and as negatives; ``None``: all count.
        num_negatives: as many rows, drawn anew for every anchor from N(i); ``None``: all, and no random number is drawn.
        negatives_from: x, the positives or the anchors of the other rows.
        symmetric: the mean of the loss and of that with anchors and positives exchanged.

    Returns:
        A scalar.

    Raises:
        ConfigError: an unknown option, a temperature or a number that is not above 0, views of different shapes.
    """
    check_choice("similarity", similarity, get_args(Similarity))
    check_choice("negatives_from", negatives_from, get_args(NegativesFrom))
    positive("temperature", temperature)
    if num_negatives is not None:
        positive("num_negatives", num_negatives)
    if anchor_BD.ndim != 2 or anchor_BD.shape != positive_BD.shape:
        raise ConfigError(
            f"the two views have shapes {tuple(anchor_BD.shape)} and {tuple(positive_BD.shape)}; expected one vector for every "
            "row in each, of the same width"
        )
    if not len(anchor_BD):
        return (anchor_BD * positive_BD).sum()
    # No autocast: a similarity rounded to half precision and divided by a small temperature is off by whole units.
    with torch.autocast(anchor_BD.device.type, enabled=False):
        dtype = torch.promote_types(anchor_BD.dtype, torch.float32)
        anchor_BD, positive_BD = anchor_BD.to(dtype), positive_BD.to(dtype)
        if similarity == "cosine":
            anchor_BD, positive_BD = (F.normalize(x_BD, dim=1, eps=1e-6) for x_BD in (anchor_BD, positive_BD))
        closed_BB = torch.eye(anchor_BD.shape[0], dtype=torch.bool, device=anchor_BD.device)
        if exclude_BB is not None:
            closed_BB = closed_BB | exclude_BB
        if rows_B is not None:
            closed_BB = closed_BB | ~rows_B
        views = [(anchor_BD, positive_BD), (positive_BD, anchor_BD)] if symmetric else [(anchor_BD, positive_BD)]
        losses = []
        for a_BD, p_BD in views:
            own_B = (a_BD * p_BD).sum(1) / temperature
            others_BD = p_BD if negatives_from == "positive" else a_BD
            shut_BB = closed_BB
            if num_negatives is not None:
                keys_BB = torch.rand(closed_BB.shape, device=a_BD.device).masked_fill_(closed_BB, -1.0)
                chosen_BN = keys_BB.topk(min(num_negatives, len(keys_BB)), dim=1).indices
                shut_BB = torch.ones_like(closed_BB).scatter(1, chosen_BN, closed_BB.gather(1, chosen_BN))
            apply: Any = _LogSumExp.apply
            # ln(e^own + e^rest) − own = −ln σ(own − rest)
            loss_B = -F.logsigmoid(own_B - apply(a_BD / temperature, others_BD, shut_BB))
            losses.append(loss_B if rows_B is None else torch.where(rows_B, loss_B, 0.0))
        count = max(anchor_BD.shape[0], 1) if rows_B is None else rows_B.sum().clamp(min=1)
        return torch.stack(losses).mean(0).sum() / count


class _LogSumExp(torch.autograd.Function):
    """ln Σ e^{⟨a_i, o_l⟩} over the l that are not closed to i, −∞ where all are: [B, D], [B, D], [B, B] → [B].

    What is kept is the softmax, so that the gradient is two products; that of the single steps reads and writes [B, B] numbers
    many times more.
    """

    @staticmethod
    def forward(ctx: Any, a_BD: Tensor, o_BD: Tensor, closed_BB: Tensor) -> Tensor:
        share_BB = a_BD @ o_BD.T
        top_B1 = share_BB.masked_fill(closed_BB, torch.finfo(a_BD.dtype).min).amax(1, keepdim=True)
        # Zeros are put in after the exponential: that of −∞ takes five times as long.
        share_BB = share_BB.sub_(top_B1).clamp_(max=0.0).exp_().masked_fill_(closed_BB, 0.0)
        total_B1 = share_BB.sum(1, keepdim=True)
        ctx.save_for_backward(a_BD, o_BD, share_BB.div_(total_B1.clamp(min=torch.finfo(a_BD.dtype).tiny)))
        return (total_B1.log() + top_B1).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a_BD, o_BD, share_BB = ctx.saved_tensors
        grad_B1 = grads[0].unsqueeze(1)
        return grad_B1 * (share_BB @ o_BD), share_BB.T @ (grad_B1 * a_BD), None


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
