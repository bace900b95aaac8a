"""BST: a Transformer layer over the last behaviours and the candidate (arXiv:1905.06874)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, check_choice, fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import Axes, Interaction, build, evaluating, numbered
from ctrlib.interactions.mlp import MLP
from ctrlib.models.behaviours import need_target, one_history, read_behaviours
from ctrlib.models.ctr import Head, ModelComponent, initialize
from ctrlib.schema import BatchLayout, FieldLayout

Read = Literal["concat", "target", "mean"]


class BST(ModelComponent):
    """logits = head(interaction([fields; y])), y = layers([candidate, last behaviour, last but one, …] + positions).

    Shape: Batch → Output(logits [B] or [B, T]). A place of the sequence has the A attributes side by side, W = A·D, to which
    the vector of its position is added; 0 is the candidate, 1 the last behaviour. A layer is

        z = norm(x + dropout(attention(x))),   y = norm(z + dropout(leaky_relu(z W_1 + b_1) W_2 + b_2)),

    attention in heads of W/num_heads, softmax(q kᵀ / √(W/num_heads)) v. Behaviours before the last ``max_length`` are not read:
    memory is that of a block [B, 1 + max_length, W], and the attention's [B, num_heads, (1 + max_length)²].
    """

    # NOTE[DIFF] the paper's positions are time gaps, as a feature of the item; here places, learned vectors. A history with
    # gaps has the gap as an attribute besides.

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            history: the history to read; ``None``: the only one.
            max_length: behaviours that are read, the most recent ones.
            num_layers, num_heads: of the Transformer.
            ffn_dim: hidden units of a layer; ``None``: 4·W.
            dropout: in the layers.
            read: what of y the interaction gets: the outputs at all places, in order and 0 where there is none (``concat``);
                that at the candidate's (``target``); or their mean over the places that there are.
            interaction: the block between tokens and head.
        """

        history: str | None = None
        max_length: int = 20
        num_layers: int = 1
        num_heads: int = 8
        ffn_dim: int | None = None
        dropout: float = 0.2
        read: Read = "concat"
        interaction: Interaction.Config = field(
            default_factory=lambda: MLP.Config(hidden_units=(1024, 512, 256), activation="leaky_relu")
        )

        def __post_init__(self) -> None:
            positive("BST.max_length", self.max_length)
            positive("BST.num_layers", self.num_layers)
            positive("BST.num_heads", self.num_heads)
            if self.ffn_dim is not None:
                positive("BST.ffn_dim", self.ffn_dim)
            fraction("BST.dropout", self.dropout)
            check_choice("BST.read", self.read, get_args(Read))

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        history = one_history("BST", layout, config.history, config.embedding.fields)
        need_target("BST", history, config.embedding.fields)
        self.history = history.name
        self.embedding = FeatureEmbedding(config.embedding, layout, (self.history,))
        attributes = self.embedding.attributes(self.history)
        width = attributes.width
        if width % config.num_heads:
            raise ConfigError(
                f"BST.num_heads is {config.num_heads}, which does not divide the width of a behaviour, {width} "
                f"({attributes.num_fields} attributes of width {attributes.dim}); choose a divisor"
            )
        self.places = ("target", *numbered("recent", config.max_length))
        self.position = nn.Parameter(torch.randn(len(self.places), width) * config.embedding.init_std)
        ffn_dim = config.ffn_dim or 4 * width
        self.layers = nn.ModuleList(_Layer(width, config.num_heads, ffn_dim, config.dropout) for _ in range(config.num_layers))
        read = self.places if config.read == "concat" else (config.read,)
        names = [f"{attribute}_{place}" for place in read for attribute in attributes.names]
        tokens = FieldLayout((*self.embedding.out.names, *names), attributes.dim)
        self.interaction = build(config.interaction, tokens)
        self.head = Head(Head.Config(), self.interaction.out, len(layout.labels))
        initialize(self, config.weight_init)

    def sequence(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the first layer reads: [B, L, W], the candidate first; and [B, L], whether there is something."""
        steps = read_behaviours(self.embedding, batch, self.history)
        recent_BLW, there_BL = steps.recent(steps.h_NW, self.config.max_length)
        target_B1W = self.embedding.targets(batch, self.history).flatten(1).unsqueeze(1)
        x_BLW = torch.cat([target_B1W, recent_BLW], dim=1) + self.position
        return x_BLW, F.pad(there_BL, (1, 0), value=True)

    def tokens(self, batch: Batch) -> Tensor:
        """What the interaction reads: [B, F, D]."""
        y_BLW, there_BL = self.sequence(batch)
        for layer in self.layers:
            y_BLW = layer(y_BLW, there_BL)
        if self.config.read == "target":
            y_BLW = y_BLW[:, :1]
        else:
            y_BLW = torch.where(there_BL.unsqueeze(2), y_BLW, 0.0)
            if self.config.read == "mean":
                y_BLW = y_BLW.sum(1, keepdim=True) / there_BL.sum(1).view(-1, 1, 1)
        x_BFD = self.embedding(batch)
        return torch.cat([x_BFD, torch.unflatten(y_BLW.flatten(1), 1, (-1, x_BFD.shape[2]))], dim=1)

    def forward(self, batch: Batch) -> Output:
        logits_BT = cast(Tensor, self.head(self.interaction(self.tokens(batch))))
        return Output(logits_BT.squeeze(1) if logits_BT.shape[1] == 1 else logits_BT)

    @property
    def axes(self) -> Axes:
        """Those of the interaction, and of ``"history/attention/0"``: heads, asking places, places read."""
        heads = numbered("head", self.config.num_heads)
        shown = {f"{self.history}/attention/{i}": (heads, self.places, self.places) for i in range(len(self.layers))}
        return {**self.interaction.axes, **shown}

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What the interaction shows, and ``"history/attention/0"`` [B, H, L, L]: the attention of every layer."""
        shown = self.interaction.explain(self.tokens(batch))
        y_BLW, there_BL = self.sequence(batch)
        for i, layer in enumerate(self.layers):
            shown[f"{self.history}/attention/{i}"] = cast(_Layer, layer).attention(y_BLW, there_BL)
            y_BLW = layer(y_BLW, there_BL)
        return shown


class _Layer(nn.Module):
    """One layer, normalised after each half. Shape: [B, L, W], there [B, L] → [B, L, W]."""

    def __init__(self, width: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = math.sqrt(num_heads / width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_dim), nn.LeakyReLU(), nn.Linear(ffn_dim, width))
        self.dropout = Dropout(dropout)

    def heads(self, y_BLW: Tensor) -> Tensor:
        """[B, L, W] → [B, H, L, W/H]."""
        return torch.unflatten(y_BLW, -1, (self.num_heads, -1)).transpose(1, 2)

    def attention(self, x_BLW: Tensor, there_BL: Tensor) -> Tensor:
        """[B, H, L, L]: each sums to 1 over the places that there are."""
        scores_BHLL = self.heads(self.query(x_BLW)) @ self.heads(self.key(x_BLW)).transpose(-2, -1) * self.scale
        return scores_BHLL.masked_fill(~there_BL[:, None, None], -math.inf).softmax(dim=-1)

    def forward(self, x_BLW: Tensor, there_BL: Tensor) -> Tensor:
        mixed_BHLd = self.attention(x_BLW, there_BL) @ self.heads(self.value(x_BLW))
        z_BLW = self.norm_attention(x_BLW + self.dropout(self.output(mixed_BHLd.transpose(1, 2).flatten(2))))
        return cast(Tensor, self.norm_ffn(z_BLW + self.dropout(self.ffn(z_BLW))))
