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
from deepctr_torch.models import (  # noqa: E402
    AFM,
    AFN,
    DCN,
    IFM,
    NFM,
    ONN,
    PNN,
    WDL,
    AutoInt,
    DCNMix,
    DeepFM,
    FiBiNET,
    xDeepFM,
)

HIDDEN = (400, 400, 400)


def build(name, columns, seed):
    """The model at the sizes of ``benchmarks/models.py``; first-order weights where ctrlib's has them, no L2."""
    plain = {"l2_reg_embedding": 0.0, "seed": seed}
    deep = {"dnn_hidden_units": HIDDEN}
    without, also = {**plain, "l2_reg_linear": 0.0}, (columns, columns)
    cross = {"cross_num": 3, "l2_reg_cross": 0.0, **deep, **without}
    attention = {"att_layer_num": 3, "att_head_num": 2, **plain}
    cin = {"cin_layer_size": (64, 64, 64), "cin_split_half": False, "cin_activation": "linear", **without}
    models = {
        "lr": lambda: WDL(columns, [], dnn_hidden_units=(), **without),
        "fm": lambda: DeepFM(*also, dnn_hidden_units=(), **without),
        "dnn": lambda: WDL([], columns, **deep, **without),
        "wide_deep": lambda: WDL(*also, **deep, **without),
        "deepfm": lambda: DeepFM(*also, **deep, **without),
        "dcn": lambda: DCN([], columns, **cross),
        "dcnv2": lambda: DCN([], columns, cross_parameterization="matrix", **cross),
        "dcn_mix": lambda: DCNMix([], columns, **cross),
        "autoint_tied": lambda: AutoInt([], columns, dnn_hidden_units=(), **attention),
        "autoint_plus": lambda: AutoInt([], columns, **deep, **attention),
        "ipnn": lambda: PNN(columns, **deep, **plain),
        "opnn": lambda: PNN(columns, use_inner=False, use_outter=True, **deep, **plain),
        "pnn": lambda: PNN(columns, use_outter=True, **deep, **plain),
        "onn": lambda: ONN([], columns, **deep, **without),
        "cin": lambda: xDeepFM(*also, dnn_hidden_units=(), **cin),
        "xdeepfm": lambda: xDeepFM(*also, **deep, **cin),
        "fibinet": lambda: FiBiNET(*also, **deep, **without),
        "afn": lambda: AFN([], columns, ltl_hidden_size=600, afn_dnn_hidden_units=HIDDEN, **without),
        "ifm": lambda: IFM(*also, **without),
        "afm": lambda: AFM(*also, attention_factor=16, l2_reg_att=0.0, **without),
        "nfm": lambda: NFM(*also, **deep, **without),
    }
    return models[name]()


def main():
    path, name, seed, out, *steps = sys.argv[1:]
    data = np.load(path)
    names = [f"f{i}" for i in range(len(data["sizes"]))]
    dim, batch = 4 if name == "onn" else int(data["dim"]), int(data["batch"])
    columns = [SparseFeat(f, int(size) + 2, embedding_dim=dim) for f, size in zip(names, data["sizes"], strict=True)]
    model = build(name, columns, int(seed))
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
