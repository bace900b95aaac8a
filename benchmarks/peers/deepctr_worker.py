"""DeepCTR-Torch's side, run by the Python of its own environment: ``deepctr_worker.py DATA.npz MODEL SEED OUT.npy [STEPS]``.

With STEPS, prints the rows/s of so many steps of its ``fit``, loading included, as its users run it; else trains and writes the
predictions of the held-out rows after every epoch [epochs, rows].
"""

import sys
import time
import types

import numpy as np
import torch

offline = types.ModuleType("requests")  # on import, the library asks the network for its newest version
offline.get = None
sys.modules["requests"] = offline

from deepctr_torch.inputs import SparseFeat  # noqa: E402
from deepctr_torch.models import DCN, AutoInt, DeepFM  # noqa: E402


def main():
    path, name, seed, out, *steps = sys.argv[1:]
    data = np.load(path)
    names = [f"f{i}" for i in range(len(data["sizes"]))]
    dim, batch = int(data["dim"]), int(data["batch"])
    columns = [SparseFeat(f, int(size) + 2, embedding_dim=dim) for f, size in zip(names, data["sizes"], strict=True)]
    none = {"l2_reg_embedding": 0.0, "seed": int(seed)}
    if name == "deepfm":
        model = DeepFM(columns, columns, dnn_hidden_units=(400, 400, 400), l2_reg_linear=0.0, **none)
    elif name == "dcnv2":
        model = DCN(columns, columns, cross_num=3, cross_parameterization="matrix", dnn_hidden_units=(400, 400, 400),
                    l2_reg_linear=0.0, l2_reg_cross=0.0, **none)  # fmt: skip
    else:
        model = AutoInt(columns, columns, att_layer_num=3, att_head_num=2, dnn_hidden_units=(), **none)
    torch.manual_seed(int(seed))
    model.compile("adam", "binary_crossentropy")

    def inputs(ids):
        return {f: ids[:, i] for i, f in enumerate(names)}

    if steps:
        rows = np.resize(np.arange(len(data["ids"])), int(steps[0]) * batch)
        few = rows[: 3 * batch]
        model.fit(inputs(data["ids"][few]), data["labels"][few], batch_size=batch, epochs=1, verbose=0)
        start = time.perf_counter()
        model.fit(inputs(data["ids"][rows]), data["labels"][rows], batch_size=batch, epochs=1, verbose=0)
        print(len(rows) / (time.perf_counter() - start))
        return
    found = []
    for _ in range(int(data["epochs"])):
        model.fit(inputs(data["ids"]), data["labels"], batch_size=batch, epochs=1, verbose=0)
        found.append(model.predict(inputs(data["held_out_ids"]), 8192)[:, 0])
    np.save(out, np.stack(found))


if __name__ == "__main__":
    main()
