"""AW-MoE: experts weighed by the behaviours of the user, and a contrastive loss on these weights (arXiv:2306.05011).

NOTE[DIFF] only the paper's abstract was at hand. Inputs, sizes and norms of the units are a reference design, not the paper's,
and no number measured with it may be called the paper's; docs/papers/aw_moe.md says what is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, check_choice, check_not_negative, positive
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import Axes, evaluating, numbered
from ctrlib.interactions.dice import unrecorded
from ctrlib.interactions.mlp import MLP
from ctrlib.losses import NegativesFrom, Similarity, info_nce
from ctrlib.models.behaviours import (
    RECENT,
    SHOWN,
    ActivationUnit,
    Pool,
    Steps,
    TargetAttention,
    need_target,
    one_history,
    read_behaviours,
)
from ctrlib.models.ctr import Head, ModelComponent
from ctrlib.models.moe import Experts, GateNorm, initialize_experts, normed_gate
from ctrlib.ragged import expand, segment_max
from ctrlib.schema import PADDING_ID, BatchLayout, FieldLayout, suggest

Context = Literal["target", "query", "target_and_query"]
EmptyGate = Literal["learned", "uniform", "zeros"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateContrast:
    """The contrastive loss on gates: two views of a row are its gate and that of a history of which some behaviours are masked.

    Args:
        weight: λ; 0: no such loss, and no random number is drawn. The default is the best of .001, .01 and .1 on validation
            rows of ``experiments/amazon_grocery``.
        mask: chance that a behaviour is masked in the second view.
        keep_one: leave a row one behaviour, drawn at random, where all would be masked.
        similarity, temperature, negatives_from, symmetric: see :func:`~ctrlib.losses.info_nce`.
        negatives: rows drawn as negatives of each; ``None``: all rows of other users.
        exclude_same_user: rows of one user are no negatives of each other.
        user: the sparse field that tells users apart, of which all unseen ones are one, and a dropped id (``id_dropout`` of
            :func:`~ctrlib.models.contrastive.contrastive`) may be any; ``None``: the group of the rows, which must then be the
            user. Name the field where the group is a session.
        detach: this loss trains the units of the gate alone, not the vectors of behaviours and context, which are then run
            through the units once more.
    """

    weight: float = 0.001
    mask: float = 0.5
    keep_one: bool = True
    similarity: Similarity = "cosine"
    temperature: float = 0.1
    negatives: int | None = None
    negatives_from: NegativesFrom = "anchor"
    exclude_same_user: bool = True
    user: str | None = None
    symmetric: bool = False
    detach: bool = False

    def __post_init__(self) -> None:
        check_not_negative("AWMoE.contrast.weight", self.weight)
        if not 0 <= self.mask <= 1:
            raise ConfigError(f"AWMoE.contrast.mask is {self.mask}; expected a chance from 0 to 1")
        check_choice("AWMoE.contrast.similarity", self.similarity, get_args(Similarity))
        check_choice("AWMoE.contrast.negatives_from", self.negatives_from, get_args(NegativesFrom))
        positive("AWMoE.contrast.temperature", self.temperature)
        if self.negatives is not None:
            positive("AWMoE.contrast.negatives", self.negatives)


class AWMoE(ModelComponent):
    """Experts weighed by the history. Shape: Batch → Output(logits [B] or [B, T], in training with {"contrastive": λ·L}).

    With the vectors h_j of the behaviours and h_t of the candidate, and the context c:

        input    h_u = Σ_j norm(AU_in(h_j, c)) h_j;   x = [h_u, h_t, h_q, h_o]
        experts  s_k = FFN_k(x)
        gate     g = Σ_j a_j r_j,   a_j = AU_g(h_j, c) ∈ R,   r_j = GU(h_j, c) ∈ R^K
        logit    Σ_k g_k s_k

    Behaviours are read once: the second view of the contrastive loss sums the same a_j r_j over those that are not masked.
    Without φ networks x are the tokens of all fields and of the attended history, which any interaction block can read; with a
    network x is one flat vector.

    Parameters beside tables: AU_in, AU_g and GU (:class:`~ctrlib.models.behaviours.ActivationUnit`), K networks of width |x|,
    K for the gate of empty histories, and the φ networks.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            history: the history to read; others are pooled as any sequence. ``None``: the only one.
            query: fields of the query (search words, page, hour) that make h_q.
            context: c is h_t, or a linear map of h_q or of both. With the query alone the gate is the same for all candidates.
            item_mlp: φ of behaviours and candidate; ``None``: their attributes side by side.
            query_mlp: φ of the query's fields; ``None`` likewise.
            other_mlp: φ of all other fields; ``None`` likewise.
            attention: of the input network.
            experts: K and the networks.
            expert_dim: width of s_k; a linear layer makes logits of the weighed sum. ``None``: a score for every label.
            gate_unit: GU.
            activation_unit: AU_g.
            use_gate_unit: off, the gate is one GU of the pooled history, GU(Σ_j a_j h_j, c).
            use_activation_unit: off, all a_j are 1.
            share_activation_unit: AU_g is AU_in (before its norm).
            pool: Σ_j as it is, over n, or over √n; of the gate alone.
            gate_norm: of g: none, softmax, or softmax over the ``top_k`` largest.
            top_k: see ``gate_norm``.
            empty_gate: g of a row without behaviours: a learned vector, 1/K for all, or zeros, by which all its logits are 0
                (with ``expert_dim`` the constant of the last layer).
            gate_bias: add the learned vector to every gate, not only to empty ones; needs a learned ``empty_gate``.
            contrast: the contrastive loss.
        """

        history: str | None = None
        query: tuple[str, ...] = ()
        context: Context = "target"
        item_mlp: MLP.Config | None = None
        query_mlp: MLP.Config | None = None
        other_mlp: MLP.Config | None = None
        attention: TargetAttention.Config = field(default_factory=TargetAttention.Config)
        experts: Experts.Config = field(default_factory=Experts.Config)
        expert_dim: int | None = None
        gate_unit: ActivationUnit.Config = field(default_factory=ActivationUnit.Config)
        activation_unit: ActivationUnit.Config = field(default_factory=ActivationUnit.Config)
        use_gate_unit: bool = True
        use_activation_unit: bool = True
        share_activation_unit: bool = False
        pool: Pool = "sum"
        gate_norm: GateNorm = "none"
        top_k: int = 2
        empty_gate: EmptyGate = "learned"
        gate_bias: bool = False
        contrast: GateContrast = field(default_factory=GateContrast)

        def __post_init__(self) -> None:
            check_choice("AWMoE.context", self.context, get_args(Context))
            check_choice("AWMoE.pool", self.pool, get_args(Pool))
            check_choice("AWMoE.gate_norm", self.gate_norm, get_args(GateNorm))
            check_choice("AWMoE.empty_gate", self.empty_gate, get_args(EmptyGate))
            positive("AWMoE.top_k", self.top_k)
            if self.expert_dim is not None:
                positive("AWMoE.expert_dim", self.expert_dim)
            if self.context != "target" and not self.query:
                raise ConfigError(f"AWMoE.context is {self.context!r}, but query names no field; name the fields of the query")
            if self.gate_bias and self.empty_gate != "learned":
                raise ConfigError(
                    f"AWMoE.gate_bias adds a learned vector to every gate, but empty_gate {self.empty_gate!r} fixes those of "
                    "empty histories; set empty_gate to 'learned', or gate_bias to false"
                )
            if self.item_mlp is not None and self.item_mlp.norm == "batch":
                raise ConfigError(
                    "AWMoE.item_mlp has batch norms, which fail on a batch with a single behaviour; set its norm to 'layer'"
                )
            if self.share_activation_unit and not self.use_activation_unit:
                raise ConfigError("AWMoE.share_activation_unit needs use_activation_unit; set one of the two otherwise")

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        history = one_history("AWMoE", layout, config.history, config.embedding.fields)
        if config.context != "query":
            need_target("AWMoE", history, config.embedding.fields)
        self.history = history.name
        self.embedding = FeatureEmbedding(config.embedding, layout, (self.history,))
        attributes, fields = self.embedding.attributes(self.history), self.embedding.out
        for name in config.query:
            if name not in fields.names:
                raise ConfigError(f"AWMoE.query names {name!r}, which the model does not read{suggest(name, fields.names)}")
        compared = [target for name, target in zip(history.fields, history.targets, strict=True) if name in attributes.names]
        others = [n for n in fields.names if n not in (*config.query, *compared)]
        self.query_at: Tensor
        self.other_at: Tensor
        for buffer, names in (("query_at", list(config.query)), ("other_at", others)):
            at = torch.tensor([fields.names.index(name) for name in names], dtype=torch.int64)
            self.register_buffer(buffer, at, persistent=False)

        self.item = None if config.item_mlp is None else MLP(config.item_mlp, attributes)
        width = attributes.width if self.item is None else self.item.out.width
        self.query, query_width = _phi(config.query_mlp, config.query, fields.dim)
        self.other, other_width = _phi(config.other_mlp, tuple(others), fields.dim)
        self.flat = (config.item_mlp, config.query_mlp, config.other_mlp) != (None, None, None)
        inputs = FieldLayout(fields.names + attributes.names, fields.dim)
        if self.flat:
            inputs = FieldLayout(("input",), 2 * width + query_width + other_width)
        self.context: nn.Linear | None = None
        if config.context != "target":
            self.context = nn.Linear(query_width + (width if config.context == "target_and_query" else 0), width)

        count, num_labels = config.experts.count, len(layout.labels)
        self.attention = TargetAttention(config.attention, width)
        self.experts = Experts(config.experts, inputs, config.expert_dim or num_labels)
        self.gate_unit = ActivationUnit(config.gate_unit, width, count)
        own = config.use_activation_unit and not config.share_activation_unit
        self.activation_unit = ActivationUnit(config.activation_unit, width, 1) if own else None
        # NOTE[DIFF] a plain sum gives users without behaviours the logit 0 whatever the candidate; this vector takes its place
        self.default_gate = nn.Parameter(torch.full((count,), 1 / count)) if config.empty_gate == "learned" else None
        score = FieldLayout(("score",), self.experts.dim)
        self.head = None if config.expert_dim is None else Head(Head.Config(), score, num_labels)
        self.user = self._user_column(layout)
        initialize_experts(self, config.weight_init)

    def _user_column(self, layout: BatchLayout) -> int | None:
        user = self.config.contrast.user
        names = [c.name for c in layout.sparse]
        if user is not None and user not in names:
            raise ConfigError(f"AWMoE.contrast.user names {user!r}, which is no sparse field of the data{suggest(user, names)}")
        return None if user is None else names.index(user)

    def read(self, batch: Batch) -> tuple[Steps, Tensor, Tensor]:
        """Behaviours [N, d], context [B, d], and the experts' input but for the attended history: [B, F, D], or [B, 1, W]."""
        x_BFD = self.embedding(batch)
        steps = read_behaviours(self.embedding, batch, self.history)
        target_BAD = self.embedding.targets(batch, self.history)
        target_BW = target_BAD.flatten(1)
        if self.item is not None:
            steps = steps.replaced(self.item(steps.h_NW.unsqueeze(1)).squeeze(1))
            target_BW = self.item(target_BAD).squeeze(1)
        query_BFD = x_BFD.index_select(1, self.query_at)
        query_BW = query_BFD.flatten(1) if self.query is None else self.query(query_BFD).squeeze(1)
        if self.context is None:
            context_BW = target_BW
        else:
            parts = [target_BW, query_BW] if self.config.context == "target_and_query" else [query_BW]
            context_BW = self.context(torch.cat(parts, dim=1))
        if self.flat:
            other_BFD = x_BFD.index_select(1, self.other_at)
            other_BW = other_BFD.flatten(1) if self.other is None else self.other(other_BFD).squeeze(1)
            x_BFD = torch.cat([target_BW, query_BW, other_BW], dim=1).unsqueeze(1)
        return steps, context_BW, x_BFD

    def scores(self, x_BFD: Tensor, pooled_BW: Tensor) -> Tensor:
        """s [B, K, E] from the rest of the input and h_u."""
        if self.flat:
            return self.experts(torch.cat([pooled_BW.unsqueeze(1), x_BFD], dim=2))
        return self.experts(torch.cat([x_BFD, torch.unflatten(pooled_BW, 1, (-1, x_BFD.shape[2]))], dim=1))

    def units(self, steps: Steps, context_BW: Tensor, score_N: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """a [N] and r [N, K] (``None`` without gate unit); ``score_N`` is what AU_in said, where that is known."""
        r_NK = self.gate_unit(steps.h_NW, context_BW, steps.row_N) if self.config.use_gate_unit else None
        if self.config.share_activation_unit:
            return self.attention.scores(steps, context_BW) if score_N is None else score_N, r_NK
        if self.activation_unit is None:
            return steps.h_NW.new_ones(steps.h_NW.shape[0]), r_NK
        return self.activation_unit(steps.h_NW, context_BW, steps.row_N).squeeze(1), r_NK

    def gate(self, steps: Steps, context_BW: Tensor, a_N: Tensor, r_NK: Tensor | None) -> Tensor:
        """g [B, K] of the behaviours that are not padding."""
        config = self.config
        if r_NK is not None:
            g_BK = steps.pool(r_NK, a_N, config.pool)
        else:
            pooled_BW = steps.pool(steps.h_NW, a_N, config.pool)
            g_BK = self.gate_unit(pooled_BW, context_BW, torch.arange(context_BW.shape[0], device=context_BW.device))
        empty_B1 = (steps.count() == 0).unsqueeze(1)
        if self.default_gate is not None:
            g_BK = torch.where(empty_B1, 0.0, g_BK)
            g_BK = g_BK + (self.default_gate if config.gate_bias else empty_B1 * self.default_gate)
        g_BK = normed_gate(g_BK, config.gate_norm, config.top_k)
        if config.empty_gate == "learned":
            return g_BK
        return torch.where(empty_B1, 1 / g_BK.shape[1] if config.empty_gate == "uniform" else 0.0, g_BK)

    def keep(self, steps: Steps) -> Tensor:
        """Which behaviours the second view has, [N]; drawn anew every time."""
        contrast = self.config.contrast
        drawn_N = torch.rand(steps.row_N.shape, device=steps.row_N.device)
        keep_N = drawn_N >= contrast.mask
        if not contrast.keep_one:
            return keep_N
        drawn_N = torch.where(steps.real_N, drawn_N, -1.0)
        return keep_N | (drawn_N == expand(segment_max(drawn_N, steps.offsets_B1), steps.row_N))

    def contrastive(
        self, steps: Steps, context_BW: Tensor, a_N: Tensor, r_NK: Tensor | None, g_BK: Tensor, batch: Batch
    ) -> Tensor:
        """L of the gates of a batch; rows without behaviours, and rows of weight 0, are left out of it."""
        contrast = self.config.contrast
        with unrecorded(self):  # running statistics are those of whole histories, each counted once
            if contrast.detach:
                steps, context_BW = steps.replaced(steps.h_NW.detach()), context_BW.detach()
                a_N, r_NK = self.units(steps, context_BW)
                g_BK = self.gate(steps, context_BW, a_N, r_NK)
            masked_BK = self.gate(steps.kept(self.keep(steps)), context_BW, a_N, r_NK)
        rows_B = steps.count() > 0
        if batch.counted is not None:
            rows_B = rows_B & batch.counted
        return info_nce(
            g_BK,
            masked_BK,
            similarity=contrast.similarity,
            temperature=contrast.temperature,
            exclude_BB=self.same_user(batch) if contrast.exclude_same_user else None,
            rows_B=rows_B,
            num_negatives=contrast.negatives,
            negatives_from=contrast.negatives_from,
            symmetric=contrast.symmetric,
        )

    def same_user(self, batch: Batch) -> Tensor:
        """[B, B]: whether two rows are of one user, or may be: an id that was dropped is anybody's.

        Raises:
            ConfigError: the batch does not tell.
        """
        if self.user is not None:
            id_B = batch.sparse[:, self.user]
            gone_B = id_B == PADDING_ID
            return (id_B.unsqueeze(1) == id_B.unsqueeze(0)) | gone_B.unsqueeze(1) | gone_B.unsqueeze(0)
        user_B = batch.group
        if user_B is None:
            raise ConfigError(
                "AWMoE's contrastive loss must know which rows are of one user, and the data has no group; name the column "
                "in the schema (group, or --group), or set contrast.user to a sparse field, contrast.exclude_same_user to "
                "false, or contrast.weight to 0"
            )
        return user_B.unsqueeze(1) == user_B.unsqueeze(0)

    def forward(self, batch: Batch) -> Output:
        steps, context_BW, x_BFD = self.read(batch)
        score_N = self.attention.scores(steps, context_BW)
        s_BKE = self.scores(x_BFD, steps.pool(steps.h_NW, self.attention.weights(steps, score_N)))
        a_N, r_NK = self.units(steps, context_BW, score_N)
        g_BK = self.gate(steps, context_BW, a_N, r_NK)
        logits_BT = (g_BK.unsqueeze(2) * s_BKE).sum(1)
        if self.head is not None:
            logits_BT = cast(Tensor, self.head(logits_BT.unsqueeze(1)))
        logits = logits_BT.squeeze(1) if logits_BT.shape[1] == 1 else logits_BT
        weight = self.config.contrast.weight
        if not self.training or weight == 0:
            return Output(logits)
        return Output(logits, {"contrastive": weight * self.contrastive(steps, context_BW, a_N, r_NK, g_BK, batch)})

    @property
    def axes(self) -> Axes:
        """Of what :meth:`explain` shows: experts, coordinates of their scores, recent behaviours."""
        experts = numbered("expert", self.experts.count)
        axes: dict[str, tuple[tuple[str, ...], ...]] = {
            "gate": (experts,),
            "utilisation": (experts,),
            "score": (experts, numbered("score", self.experts.dim)),
            f"{self.history}/weight": (RECENT,),
            f"{self.history}/activation": (RECENT,),
        }
        if self.config.use_gate_unit:
            axes[f"{self.history}/contribution"] = (RECENT, experts)
        return axes

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """How a row chooses its experts.

        * ``"gate"`` [B, K]: g, a row of the heat map users × experts;
        * ``"utilisation"`` [B, K]: |g_k| / Σ_l |g_l|; :func:`utilisation` sums it up over rows;
        * ``"score"`` [B, K, E]: what the experts say;
        * ``"history/weight"``, ``"history/activation"`` [B, 50]: the weights in h_u, and a_j, of the most recent behaviours;
        * ``"history/contribution"`` [B, 50, K]: a_j r_jk, whose sum over all behaviours is the gate, where ``pool`` is
          ``"sum"`` and there is neither norm nor bias; only with the gate unit. :meth:`contributions` has all behaviours.
        """
        steps, context_BW, x_BFD = self.read(batch)
        score_N = self.attention.scores(steps, context_BW)
        weight_N = self.attention.weights(steps, score_N)
        a_N, r_NK = self.units(steps, context_BW, score_N)
        g_BK = self.gate(steps, context_BW, a_N, r_NK)
        shown = {
            "gate": g_BK,
            "utilisation": _shares(g_BK),
            "score": self.scores(x_BFD, steps.pool(steps.h_NW, weight_N)),
            f"{self.history}/weight": steps.recent(weight_N.unsqueeze(1), SHOWN)[0].squeeze(2),
            f"{self.history}/activation": steps.recent(a_N.unsqueeze(1), SHOWN)[0].squeeze(2),
        }
        if r_NK is not None:
            shown[f"{self.history}/contribution"] = steps.recent(a_N.unsqueeze(1) * r_NK, SHOWN)[0]
        return shown

    @evaluating
    def contributions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """a_j r_jk of every behaviour [N, K], 0 for padding, and the offsets [B + 1] of the rows.

        Raises:
            ConfigError: the model has no gate unit, and so one gate a row that is no sum over behaviours.
        """
        if not self.config.use_gate_unit:
            raise ConfigError("AWMoE.use_gate_unit is off: the gate is no sum over behaviours, which so contribute nothing")
        steps, context_BW, _ = self.read(batch)
        a_N, r_NK = self.units(steps, context_BW)
        assert r_NK is not None
        return torch.where(steps.real_N.unsqueeze(1), a_N.unsqueeze(1) * r_NK, 0.0), steps.offsets_B1


def utilisation(gate_BK: Tensor) -> tuple[Tensor, float]:
    """How much use is made of every expert: the mean over rows of |g_k| / Σ_l |g_l| [K], and the entropy of these shares over
    ln K: 1 if all are used alike, 0 if one alone is. Rows whose gate is all zeros count for nothing."""
    shares_BK = _shares(gate_BK)
    used_K = shares_BK.sum(0) / shares_BK.sum().clamp(min=torch.finfo(shares_BK.dtype).tiny)
    entropy = -torch.xlogy(used_K, used_K).sum()
    return used_K, float(entropy / torch.log(torch.tensor(float(max(len(used_K), 2)))))


def _shares(gate_BK: Tensor) -> Tensor:
    size_BK = gate_BK.abs()
    return size_BK / size_BK.sum(1, keepdim=True).clamp(min=torch.finfo(size_BK.dtype).tiny)


def _phi(config: MLP.Config | None, names: tuple[str, ...], dim: int) -> tuple[MLP | None, int]:
    """The network of some fields and how wide they are after it; there is none where there are no fields."""
    layout = FieldLayout(names, dim)
    if config is None or not names:
        return None, layout.width
    phi = MLP(config, layout)
    return phi, phi.out.width
