"""FuxiCTR's side, run by the Python of its own environment: ``fuxictr_worker.py DATA.npz MODEL SEED OUT.npy [STEPS]``.

With STEPS, prints the rows/s of so many steps; else trains and writes the predictions of the held-out rows after every epoch
[epochs, rows]. Its wheel has the layers and the training step but not these models, so they are composed here.
"""

import sys
import tempfile
import time
from collections import OrderedDict

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import (
    BilinearInteractionV2,
    CompressedInteractionNet,
    CrossNet,
    CrossNetMix,
    CrossNetV2,
    FeatureEmbedding,
    InnerProductInteraction,
    LogisticRegression,
    MLP_Block,
    ScaledDotProductAttention,
    SqueezeExcitation,
)
from fuxictr.pytorch.models import BaseModel
from torch import nn

HIDDEN, GATE_HIDDEN = [400, 400, 400], 800


class Concat(nn.Module):
    """What several layers make of one input, side by side."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return torch.cat([layer(x).flatten(1) for layer in self.layers], dim=1)


class Sum(nn.Module):
    def forward(self, x):
        return x.flatten(1).sum(dim=1, keepdim=True)


class Attention(nn.Module):
    """An interacting layer of AutoInt on FuxiCTR's dot-product attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.residual = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.attention = ScaledDotProductAttention()

    def forward(self, x):
        rows, fields, width = x.shape
        query, key, value = (
            linear(x).view(rows, fields, self.heads, -1).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        mixed, _ = self.attention(query, key, value)
        return torch.relu(mixed.transpose(1, 2).reshape(rows, fields, width) + self.residual(x))


class AttentionPooling(nn.Module):
    """AFM's attention over the pairs of fields."""

    def __init__(self, fields, dim, hidden):
        super().__init__()
        self.pairs = InnerProductInteraction(fields, output="elementwise_product")
        self.score = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 1, bias=False), nn.Softmax(dim=1))
        self.out = nn.Linear(dim, 1, bias=False)

    def forward(self, x):
        pairs = self.pairs(x)
        return self.out((self.score(pairs) * pairs).sum(dim=1))


class FinalMLP(nn.Module):
    """FinalMLP with one head of bilinear fusion."""

    def __init__(self, flat, dim):
        super().__init__()
        self.context = nn.ParameterList(nn.Parameter(torch.zeros(1, dim)) for _ in range(2))
        self.gates = nn.ModuleList(MLP_Block(dim, [GATE_HIDDEN], output_dim=flat, output_activation="Sigmoid") for _ in "ab")
        self.streams = nn.ModuleList(MLP_Block(flat, HIDDEN) for _ in "ab")
        self.first, self.second = nn.Linear(HIDDEN[-1], 1), nn.Linear(HIDDEN[-1], 1)
        self.bilinear = nn.Parameter(torch.randn(HIDDEN[-1], HIDDEN[-1]) * 0.01)

    def forward(self, x):
        flat = x.flatten(1)
        a, b = (
            stream(flat * 2 * gate(context.repeat(len(flat), 1)))
            for stream, gate, context in zip(self.streams, self.gates, self.context, strict=True)
        )
        return self.first(a) + self.second(b) + ((a @ self.bilinear) * b).sum(1, keepdim=True)


def build(name, fields, dim):
    """Whether there are first-order weights, and the parts whose sum is the logit; sizes as in ``benchmarks/models.py``."""
    flat, pairs = fields * dim, fields * (fields - 1) // 2
    width = flat + HIDDEN[-1]

    def mlp(inputs):
        return MLP_Block(inputs, HIDDEN, output_dim=1)

    def deep():
        return nn.Sequential(nn.Flatten(), mlp(flat))

    def product(output):
        return InnerProductInteraction(fields, output=output)

    def attention():
        return nn.Sequential(*(Attention(dim, 2) for _ in range(3)), nn.Flatten(), nn.Linear(flat, 1))

    def crossed(cross):
        return nn.Sequential(nn.Flatten(), Concat(cross, MLP_Block(flat, HIDDEN)), nn.Linear(width, 1))

    def fibinet():
        bilinear = BilinearInteractionV2(fields, dim)
        return nn.Sequential(Concat(bilinear, nn.Sequential(SqueezeExcitation(fields), bilinear)), mlp(2 * pairs * dim))

    models = {
        "lr": lambda: (True, []),
        "fm": lambda: (True, [product("product_sum")]),
        "dnn": lambda: (False, [deep()]),
        "wide_deep": lambda: (True, [deep()]),
        "deepfm": lambda: (True, [product("product_sum"), deep()]),
        "dcn": lambda: (False, [crossed(CrossNet(flat, 3))]),
        "dcnv2": lambda: (False, [crossed(CrossNetV2(flat, 3))]),
        "dcn_mix": lambda: (False, [crossed(CrossNetMix(flat, 3))]),
        "cross_net_v2": lambda: (False, [nn.Sequential(nn.Flatten(), CrossNetV2(flat, 3), nn.Linear(flat, 1))]),
        "autoint_tied": lambda: (False, [attention()]),
        "autoint_plus": lambda: (False, [attention(), deep()]),
        "dual_mlp": lambda: (False, [deep(), deep()]),
        "final_mlp": lambda: (False, [FinalMLP(flat, dim)]),
        "ipnn": lambda: (False, [nn.Sequential(Concat(nn.Flatten(), product("inner_product")), mlp(flat + pairs))]),
        "fwfm": lambda: (True, [nn.Sequential(product("inner_product"), nn.Linear(pairs, 1, bias=False))]),
        "fmfm": lambda: (True, [nn.Sequential(BilinearInteractionV2(fields, dim), Sum())]),
        "cin": lambda: (True, [CompressedInteractionNet(fields, [64, 64, 64])]),
        "xdeepfm": lambda: (True, [CompressedInteractionNet(fields, [64, 64, 64]), deep()]),
        "fibinet": lambda: (True, [fibinet()]),
        "dlrm": lambda: (False, [nn.Sequential(product("inner_product"), mlp(pairs))]),
        "afm": lambda: (True, [AttentionPooling(fields, dim, 16)]),
        "nfm": lambda: (True, [nn.Sequential(product("bi_interaction"), mlp(dim))]),
    }
    return models[name]()


class Net(BaseModel):
    def __init__(self, name, feature_map, dim):
        super().__init__(feature_map, model_id=name, gpu=-1, verbose=0, model_root=tempfile.mkdtemp(), metrics=["AUC"])
        wide, parts = build(name, feature_map.num_fields, dim)
        self.embedding_layer = FeatureEmbedding(feature_map, dim) if parts else None
        self.wide = LogisticRegression(feature_map) if wide else None
        self.parts = nn.ModuleList(parts)
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()
        self.model_to_device()
        self._max_gradient_norm = 10.0

    def forward(self, inputs):
        features = self.get_inputs(inputs)
        terms = [] if self.wide is None else [self.wide(features)]
        if self.embedding_layer is not None:
            x = self.embedding_layer(features)
            terms += [part(x) for part in self.parts]
        return {"y_pred": self.output_activation(sum(terms))}


def main():
    path, name, seed, out, *steps = sys.argv[1:]
    data = np.load(path)
    torch.manual_seed(int(seed))
    feature_map = FeatureMap("bench", tempfile.mkdtemp())
    names = [f"f{i}" for i in range(len(data["sizes"]))]
    feature_map.features = OrderedDict(
        (f, {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": int(size) + 2})
        for f, size in zip(names, data["sizes"], strict=True)
    )
    feature_map.labels, feature_map.num_fields = ["label"], len(names)
    model = Net(name, feature_map, int(data["dim"]))
    batch = int(data["batch"])

    def batches(ids, labels, order):
        for at in range(0, len(order), batch):
            rows = order[at : at + batch]
            yield {**{f: ids[rows, i] for i, f in enumerate(names)}, "label": labels[rows]}

    ids, labels = torch.from_numpy(data["ids"]).long(), torch.from_numpy(data["labels"])
    model.train()
    if steps:
        ready = list(batches(ids, labels, torch.arange(len(ids))))
        for i in range(3):
            model.train_step(ready[i % len(ready)])
        start = time.perf_counter()
        for i in range(int(steps[0])):
            model.train_step(ready[i % len(ready)])
        print(int(steps[0]) * batch / (time.perf_counter() - start))
        return
    held_out = torch.from_numpy(data["held_out_ids"]).long()
    found = []
    for _ in range(int(data["epochs"])):
        model.train()
        for one in batches(ids, labels, torch.randperm(len(ids))):
            model.train_step(one)
        model.eval()
        with torch.no_grad():
            rows = batches(held_out, torch.zeros(len(held_out)), torch.arange(len(held_out)))
            found.append(torch.cat([model(one)["y_pred"][:, 0] for one in rows]))
    np.save(out, torch.stack(found).numpy())


if __name__ == "__main__":
    main()
