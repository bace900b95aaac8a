"""The models that are compared with others: ctrlib's, and three written plainly as CTR code in torch usually is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.config import override
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.optim import ScheduleConfig
from ctrlib.schema import BatchLayout, SparseColumn
from ctrlib.training import FitConfig, Precision

HIDDEN, GATE_HIDDEN = (400, 400, 400), 800
_HIDDEN = ",".join(str(units) for units in HIDDEN)


def _mlp(path: str, norm: str = "none") -> dict[str, str]:
    """Settings of the MLP at this path: the benchmarks' layers, no dropout."""
    return {f"{path}.hidden_units": _HIDDEN, f"{path}.norm": norm, f"{path}.dropout": "0"}


SETTINGS: dict[str, dict[str, str]] = {
    "lr": {"embedding.dim": "1"},
    "fm": {},
    "dnn": _mlp("interaction"),
    "wide_deep": _mlp("interaction"),
    "deepfm": _mlp("interaction.streams.1"),
    "dcn": {"interaction.streams.0.num_layers": "3"} | _mlp("interaction.streams.1"),
    "dcnv2": {"interaction.streams.0.num_layers": "3"} | _mlp("interaction.streams.1"),
    "dcn_mix": {"interaction.streams.0.num_layers": "3"} | _mlp("interaction.streams.1"),
    "cross_net_v2": {"interaction.num_layers": "3"},
    "autoint": {},
    "autoint_tied": {"interaction.head_dim": "{half}"},
    "autoint_plus": {"interaction.streams.0.blocks.0.head_dim": "{half}"} | _mlp("interaction.streams.1"),
    "dual_mlp": _mlp("interaction.streams.0") | _mlp("interaction.streams.1"),
    "final_mlp": {"block.mlp1.hidden_units": _HIDDEN, "block.mlp1.norm": "none", "block.mlp2.hidden_units": _HIDDEN,
                  "block.mlp2.norm": "none", "block.num_heads": "1", "block.fs_hidden_units": "800"},
    "ipnn": _mlp("interaction.blocks.1"),
    "opnn": {"interaction.blocks.0.kernel": "matrix"} | _mlp("interaction.blocks.1"),
    "pnn": {"interaction.blocks.0.streams.1.kernel": "matrix"} | _mlp("interaction.blocks.1"),
    "fwfm": {},
    "fmfm": {},
    "onn": {"embedding.dim": "4"} | _mlp("interaction.blocks.1"),
    "ifm": {"embedding.dim": "{more}"},
    "cin": {"interaction.hidden_units": "64,64,64", "interaction.bias": "true"},
    "xdeepfm": {"interaction.streams.0.blocks.0.hidden_units": "64,64,64", "interaction.streams.0.blocks.0.bias": "true"}
    | _mlp("interaction.streams.1"),
    "fibinet": {"interaction.blocks.0.share_bilinear": "true"} | _mlp("interaction.blocks.1"),
    "dlrm": _mlp("interaction.blocks.1"),
    "afn": {"interaction.blocks.0.bias": "true"} | _mlp("interaction.blocks.1", norm="batch"),
    "afm": {"interaction.blocks.0.dropout": "0"},
    "nfm": {"interaction.blocks.0.norm": "none", "interaction.blocks.0.dropout": "0"} | _mlp("interaction.blocks.1"),
}  # fmt: skip
"""By preset, the sizes at which every library has the same model; ``_tied`` is not part of a preset's name."""


def layout(sizes: Sequence[int]) -> BatchLayout:
    """Sparse fields f0, f1, … of so many values each; ids from 2."""
    columns = tuple(SparseColumn(f"f{i}", size + 2, f"f{i}") for i, size in enumerate(sizes))
    return BatchLayout(columns, (), (), ("label",))


def ctrlib_model(name: str, sizes: Sequence[int], dim: int) -> ModelComponent:
    """ctrlib's model at the benchmark's sizes."""
    # DeepCTR-Torch ties the width of AutoInt's two heads to that of the embedding; IFM's has the first-order weight, too.
    settings = {path: value.format(half=dim // 2, more=dim + 1) for path, value in SETTINGS[name].items()}
    config = override(preset(name.removesuffix("_tied")), {"embedding.dim": str(dim), **settings}, COMPONENTS)
    return build_model(config, layout(sizes))


def ctrlib_fit(epochs: int, precision: Precision) -> FitConfig:
    """Default optimizer, constant learning rate, clipping at 10, no validation."""
    return FitConfig(epochs=epochs, schedule=ScheduleConfig(name="constant"), precision=precision, patience=None)


class Repeated:
    """The same batches over and over, ``steps`` an epoch: training without loading."""

    def __init__(self, ids: Tensor, labels: Tensor, steps: int) -> None:
        empty = torch.zeros(ids.shape[1], 0)
        self._batches = [Batch(sparse=i, dense=empty, labels=y) for i, y in zip(ids, labels, strict=True)]
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        return (self._batches[step % len(self._batches)] for step in range(self._steps))


def mlp(width: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear and ReLU, again and again."""
    layers: list[nn.Module] = []
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    return nn.Sequential(*layers)


class UsualModel(nn.Module):
    """One ``nn.Embedding`` a field, and one of three interactions."""

    def __init__(self, name: str, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        self.name, self.dim = name, dim
        self.tables = nn.ModuleList(nn.Embedding(size + 2, dim) for size in sizes)
        flat = len(sizes) * dim
        if name == "dcnv2":
            self.cross = nn.ModuleList(nn.Linear(flat, flat) for _ in range(3))
            self.deep = mlp(flat, HIDDEN)
            self.out = nn.Linear(flat + HIDDEN[-1], 1)
        elif name == "final_mlp":
            self.context = nn.ParameterList(nn.Parameter(torch.zeros(1, dim)) for _ in range(2))
            self.gates = nn.ModuleList(
                nn.Sequential(nn.Linear(dim, GATE_HIDDEN), nn.ReLU(), nn.Linear(GATE_HIDDEN, flat), nn.Sigmoid())
                for _ in range(2)
            )
            self.streams = nn.ModuleList(mlp(flat, HIDDEN) for _ in range(2))
            self.first, self.second = nn.Linear(HIDDEN[-1], 1), nn.Linear(HIDDEN[-1], 1)
            self.bilinear = nn.Parameter(torch.randn(HIDDEN[-1], HIDDEN[-1]) * 0.01)
        else:
            widths = [dim, 64, 64]
            self.qkvr = nn.ModuleList(nn.ModuleList(nn.Linear(w, 64, bias=False) for _ in range(4)) for w in widths)
            self.out = nn.Linear(len(sizes) * 64, 1)

    def forward(self, ids_BF: Tensor) -> Tensor:
        x = torch.stack([table(ids_BF[:, i]) for i, table in enumerate(self.tables)], dim=1)
        flat = x.flatten(1)
        if self.name == "dcnv2":
            crossed = flat
            for layer in self.cross:
                crossed = crossed + flat * layer(crossed)
            logits: Tensor = self.out(torch.cat([crossed, self.deep(flat)], dim=1))
        elif self.name == "final_mlp":
            a, b = (
                stream(flat * 2 * gate(context.expand(len(flat), -1)))
                for stream, gate, context in zip(self.streams, self.gates, self.context, strict=True)
            )
            logits = self.first(a) + self.second(b) + ((a @ self.bilinear) * b).sum(1, keepdim=True)
        else:
            for layer in self.qkvr:
                query, key, value, residual = (m(x) for m in layer.children())
                heads = [torch.stack(m.split(32, dim=2)) for m in (query, key, value)]  # [H, B, F, 32], as the released code
                weights = torch.einsum("hbfd,hbgd->hbfg", heads[0], heads[1]).softmax(dim=-1)
                mixed = torch.einsum("hbfg,hbgd->hbfd", weights, heads[2])
                x = torch.relu(torch.cat(list(mixed), dim=2) + residual)
            logits = self.out(x.flatten(1))
        return logits.squeeze(1)
