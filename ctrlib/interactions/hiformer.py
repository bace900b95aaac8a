"""Hiformer and its relatives: attention between fields whose weights know which field they serve (Gui et al. 2023,
arXiv:2311.05884).

============ =============================================================== =========================
attention    projections                                                     K, V parameters of a layer
============ =============================================================== =========================
shared       one matrix for all tokens: the vanilla Transformer              d·H(d_k + d_v)
hetero       a matrix for each token: HeteroAtt                              L·d·H(d_k + d_v)
composite    each key or value is linear in *all* tokens: Hiformer           L²·d·H(d_k + d_v)
============ =============================================================== =========================

L counts the fields and the task tokens, d is the width of all of them.

NOTE[DIFF] the full text was not at hand: equations come from notes on it, and what the notes leave open (residuals, norms,
biases) from what reproduces the parameter counts of the paper's tables; see docs/papers/hiformer.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.interactions.token_linear import Composite, TokenLinear, TokenNorm
from ctrlib.schema import FieldLayout


class Hiformer(Interaction):
    """A stack of attention layers over [fields, task tokens]; the task tokens are learned vectors. Per head, for token i,

        a_ij = softmax_j (q_i k_jᵀ / √d_k);   o_i = [Σ_j a_ij v_j]_heads O_i
        y_i  = LN(x_i + o_i);   z_i = LN(y_i + FFN_i(y_i)),   FFN_i(y) = GELU(y W_1 + b_1) W_2 + b_2

    with q_i = x_i Q_i, k_j = x_j K_j, v_j = x_j V_j, or for the names in ``composite`` [k_1, …, k_L] = vec(x) K̂. Given a rank,
    K̂ is a product of two matrices: r(Ld + L·H·d_k) parameters, with ``share_factors``.

    Shape: [B, F, D] → [B, T, D] of the task tokens ``"task_0"``, …, or with ``prune_last=False`` [B, F + T, D] of all tokens.
    Parameters besides K and V for each token that a layer returns: d·H·d_k (query), H·d_v·d (O), 2·d·d_f + d_f + d (FFN).
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; the defaults are the paper's production model.

        Attributes:
            attention: see the table at the top.
            composite: which of q, k and v are composite when ``attention`` is.
            rank_key: rank of composite keys (and queries); ``None`` for full matrices. A rank r saves something only where
                r·(L·d + L·H·d_k) < L·d · L·H·d_k: of few tokens full matrices are smaller.
            rank_value: rank of composite values, of which the same holds with d_v.
            share_factors: all heads share one factorisation, as the paper's parameter counts say; else one per head.
            num_layers: attention layers.
            prune_last: the last layer returns the task tokens only, and has queries, O and FFN for no other. Same numbers.
            num_tasks: T.
            num_heads, key_dim, value_dim: H, and d_k and d_v of one head; both are independent of d.
            ffn: one FFN for all tokens, for each its own, or none.
            ffn_dim: d_f; ``None`` for 4·d.
            residual: add the input of attention and of FFN to their output.
            norm: LayerNorm after each residual sum, or before attention and FFN, or none.
            norm_per_token: gain and shift of their own for every token.
            position_bias: a learned vector per token is added to the input ("Transformer+PE").
            attention_dropout: on the attention weights.
            dropout: on what attention and FFN return.

        Raises:
            ConfigError: a size below 1, a dropout outside [0, 1), composite attention of nothing.
        """

        attention: Literal["shared", "hetero", "composite"] = "composite"
        composite: tuple[Literal["q", "k", "v"], ...] = ("k", "v")
        rank_key: int | None = 128
        rank_value: int | None = 1024
        share_factors: bool = True
        num_layers: int = 1
        prune_last: bool = True
        num_tasks: int = 1
        num_heads: int = 4
        key_dim: int = 16
        value_dim: int = 64
        ffn: Literal["shared", "per_token", "none"] = "per_token"
        ffn_dim: int | None = None
        residual: bool = True
        norm: Literal["post", "pre", "none"] = "post"
        norm_per_token: bool = False
        position_bias: bool = False
        attention_dropout: float = 0.0
        dropout: float = 0.0

        def __post_init__(self) -> None:
            for name in ("num_layers", "num_tasks", "num_heads", "key_dim", "value_dim"):
                positive(f"Hiformer.{name}", getattr(self, name))
            for name in ("rank_key", "rank_value", "ffn_dim"):
                if getattr(self, name) is not None:
                    positive(f"Hiformer.{name}", getattr(self, name))
            fraction("Hiformer.attention_dropout", self.attention_dropout)
            fraction("Hiformer.dropout", self.dropout)
            if self.attention == "composite" and not self.composite:
                raise ConfigError("Hiformer.composite is empty; name some of q, k and v, or choose attention='hetero'")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        tasks = numbered("task", config.num_tasks)
        num_tokens = layout.num_fields + config.num_tasks
        self.tasks = nn.Parameter(0.02 * torch.randn(config.num_tasks, layout.dim))
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, layout.dim)) if config.position_bias else None
        outputs = [num_tokens] * (config.num_layers - 1) + [config.num_tasks if config.prune_last else num_tokens]
        self.layers = nn.ModuleList(HiformerLayer(config, layout.dim, num_tokens, count) for count in outputs)
        tokens = layout.names + tasks
        self.out = FieldLayout(tasks if config.prune_last else tokens, layout.dim)
        heads = numbered("head", config.num_heads)
        self.axes = {f"attention/{i}": (heads, tokens[-count:], tokens) for i, count in enumerate(outputs)}

    def tokens(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F + T, D], what the first layer reads."""
        x_BLD = torch.cat([x_BFD, self.tasks.expand(x_BFD.shape[0], -1, -1)], dim=1)
        return x_BLD if self.position is None else x_BLD + self.position

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, T, D] or [B, F + T, D]."""
        x_BLD = self.tokens(x_BFD)
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return x_BLD

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """Attention weights before dropout, ``"attention/0"``, ... [B, H, Q, L]: what each of the Q tokens that the layer
        returns reads. Composite keys are mixtures of all fields, so there these are not importances of fields."""
        shown: dict[str, Tensor] = {}
        x_BLD = self.tokens(x_BFD)
        for i, layer in enumerate(self.layers):
            shown[f"attention/{i}"] = cast(HiformerLayer, layer).attention(cast(HiformerLayer, layer).before(x_BLD))
            x_BLD = layer(x_BLD)
        return shown

    def strengths(self) -> dict[str, Tensor]:
        """Frobenius norms of weights, the same for all rows. ``"pair/0"``, ... [H, Q, L]: ‖Q_i K_jᵀ‖, how strongly token j can
        draw the attention of i, of plain queries and keys ([H, 1, 1] where all tokens share them); ``"key/0"``, ``"value/0"``,
        ... [H, L, L]: how much of token i (row) is in composite j."""
        shown: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            shown |= {f"{name}/{i}": value for name, value in cast(HiformerLayer, layer).strengths().items()}
        return shown


class HiformerLayer(nn.Module):
    """One layer of :class:`Hiformer`, which returns the last Q tokens. Shape: [B, L, D] → [B, Q, D]."""

    def __init__(self, config: Hiformer.Config, width: int, num_tokens: int, num_outputs: int) -> None:
        super().__init__()
        self.num_heads, self.num_tokens, self.num_outputs = config.num_heads, num_tokens, num_outputs
        self.scale = 1 / math.sqrt(config.key_dim)
        ffn_dim = config.ffn_dim or 4 * width

        def projection(name: Literal["q", "k", "v"], count: int, head_dim: int, rank: int | None) -> nn.Module:
            if config.attention == "shared":
                return nn.Linear(width, config.num_heads * head_dim, bias=False)
            if config.attention == "composite" and name in config.composite:
                return Composite(num_tokens * width, count, config.num_heads, head_dim, rank, shared=config.share_factors)
            return TokenLinear(count, width, config.num_heads * head_dim, bias=False)

        def linear(width_in: int, width_out: int, *, shared: bool, bias: bool) -> nn.Module:
            if shared:
                return nn.Linear(width_in, width_out, bias=bias)
            return TokenLinear(num_outputs, width_in, width_out, bias=bias)

        def norm(count: int) -> nn.Module:
            if config.norm == "none":
                return nn.Identity()
            return TokenNorm(count, width) if config.norm_per_token else nn.LayerNorm(width)

        self.query = projection("q", num_outputs, config.key_dim, config.rank_key)
        self.key = projection("k", num_tokens, config.key_dim, config.rank_key)
        self.value = projection("v", num_tokens, config.value_dim, config.rank_value)
        self.output = linear(config.num_heads * config.value_dim, width, shared=config.attention == "shared", bias=False)
        self.has_residual = config.residual
        # NOTE[DIFF] the notes name neither residuals nor norms; re-implementations have both, mostly after the sum.
        self.norm_first = config.norm == "pre"
        self.norm_attention = norm(num_tokens if self.norm_first else num_outputs)
        self.ffn: nn.Module | None = None
        if config.ffn != "none":
            shared = config.ffn == "shared"
            self.ffn = nn.Sequential(
                linear(width, ffn_dim, shared=shared, bias=True), nn.GELU(), linear(ffn_dim, width, shared=shared, bias=True)
            )
            self.norm_ffn = norm(num_outputs)
        self.attention_dropout = Dropout(config.attention_dropout)
        self.dropout = Dropout(config.dropout)

    def before(self, x_BLD: Tensor) -> Tensor:
        """What attention reads: the tokens, normalised if the norm comes first."""
        return cast(Tensor, self.norm_attention(x_BLD)) if self.norm_first else x_BLD

    def heads(self, y_BLA: Tensor) -> Tensor:
        """[B, L, H·d] → [B, H, L, d]."""
        return torch.unflatten(y_BLA, -1, (self.num_heads, -1)).transpose(1, 2)

    def attention(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] → weights [B, H, Q, L]; each row sums to 1."""
        # A composite query is linear in all tokens, a plain one in the token that asks.
        asking_BLD = x_BLD if isinstance(self.query, Composite) else x_BLD[:, self.num_tokens - self.num_outputs :]
        query_BHQd = self.heads(self.query(asking_BLD)) * self.scale
        # Keys on the last axis but one: a CPU's softmax over a short last axis is several times slower.
        scores_BHLQ = self.heads(self.key(x_BLD)) @ query_BHQd.transpose(-2, -1)
        return scores_BHLQ.softmax(dim=-2).transpose(-2, -1)

    def forward(self, x_BLD: Tensor) -> Tensor:
        normed_BLD = self.before(x_BLD)
        mixed_BHQd = self.attention_dropout(self.attention(normed_BLD)) @ self.heads(self.value(normed_BLD))
        y_BQD = self.dropout(self.output(mixed_BHQd.transpose(1, 2).flatten(2)))
        if self.has_residual:
            y_BQD = y_BQD + x_BLD[:, self.num_tokens - self.num_outputs :]
        if not self.norm_first:
            y_BQD = self.norm_attention(y_BQD)
        if self.ffn is None:
            return cast(Tensor, y_BQD)
        z_BQD = self.dropout(self.ffn(self.norm_ffn(y_BQD) if self.norm_first else y_BQD))
        if self.has_residual:
            z_BQD = z_BQD + y_BQD
        return cast(Tensor, z_BQD if self.norm_first else self.norm_ffn(z_BQD))

    def strengths(self) -> dict[str, Tensor]:
        """See :meth:`Hiformer.strengths`."""
        shown: dict[str, Tensor] = {}
        if not isinstance(self.query, Composite) and not isinstance(self.key, Composite):
            query_QHAd, key_LHAd = (self._by_head(p) for p in (self.query, self.key))
            # ‖Q Kᵀ‖² = ⟨QᵀQ, KᵀK⟩: no D × D matrix per pair.
            squared_HQL = torch.einsum(
                "qhde,lhde->hql", query_QHAd.transpose(-2, -1) @ query_QHAd, key_LHAd.transpose(-2, -1) @ key_LHAd
            )
            shown["pair"] = squared_HQL.sqrt()
        for name, projection in (("key", self.key), ("value", self.value)):
            if isinstance(projection, Composite):
                matrix_LDLHd = torch.unflatten(projection.matrix(), 0, (self.num_tokens, -1))
                shown[name] = torch.linalg.vector_norm(matrix_LDLHd, dim=(1, 4)).permute(2, 0, 1)
        return shown

    def _by_head(self, projection: nn.Module) -> Tensor:
        """The weights of a plain projection as [tokens or 1, H, D, d]."""
        weight = projection.weight if isinstance(projection, TokenLinear) else cast(nn.Linear, projection).weight.T[None]
        return torch.unflatten(weight, -1, (self.num_heads, -1)).transpose(1, 2)
