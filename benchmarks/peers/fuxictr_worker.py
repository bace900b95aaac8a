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
from fuxictr.pytorch.layers import CrossNetV2, FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import nn

HIDDEN, GATE_HIDDEN = [400, 400, 400], 800


class Net(BaseModel):
    def __init__(self, name, feature_map, dim):
        super().__init__(feature_map, model_id=name, gpu=-1, verbose=0, model_root=tempfile.mkdtemp(), metrics=["AUC"])
        self.name = name
        self.embedding_layer = FeatureEmbedding(feature_map, dim)
        flat = feature_map.num_fields * dim
        if name == "dcnv2":
            self.cross, self.deep = CrossNetV2(flat, 3), MLP_Block(flat, HIDDEN)
            self.out = nn.Linear(flat + HIDDEN[-1], 1)
        elif name == "deepfm":
            self.fm, self.deep = FactorizationMachine(feature_map), MLP_Block(flat, HIDDEN, output_dim=1)
        else:
            self.context = nn.ParameterList(nn.Parameter(torch.zeros(1, dim)) for _ in range(2))
            self.gates = nn.ModuleList(
                MLP_Block(dim, [GATE_HIDDEN], output_dim=flat, output_activation="Sigmoid") for _ in "ab"
            )
            self.streams = nn.ModuleList(MLP_Block(flat, HIDDEN) for _ in "ab")
            self.first, self.second = nn.Linear(HIDDEN[-1], 1), nn.Linear(HIDDEN[-1], 1)
            self.bilinear = nn.Parameter(torch.randn(HIDDEN[-1], HIDDEN[-1]) * 0.01)
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()
        self.model_to_device()
        self._max_gradient_norm = 10.0

    def forward(self, inputs):
        features = self.get_inputs(inputs)
        x = self.embedding_layer(features)
        flat = x.flatten(1)
        if self.name == "dcnv2":
            logits = self.out(torch.cat([self.cross(flat), self.deep(flat)], dim=-1))
        elif self.name == "deepfm":
            logits = self.fm(features, x) + self.deep(flat)
        else:
            a, b = (
                stream(flat * 2 * gate(context.repeat(len(flat), 1)))
                for stream, gate, context in zip(self.streams, self.gates, self.context, strict=True)
            )
            logits = self.first(a) + self.second(b) + ((a @ self.bilinear) * b).sum(1, keepdim=True)
        return {"y_pred": self.output_activation(logits)}


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
