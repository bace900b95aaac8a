"""AW-MoE: the design's formula row by row, its hand cases, invariances and limits, and the contrastive loss on its gates."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Ragged
from ctrlib.config import ConfigError, override
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.autoint import AutoInt
from ctrlib.interactions.mlp import MLP
from ctrlib.interactions.token_linear import TokenLinear
from ctrlib.losses import info_nce, total_loss
from ctrlib.models.aw_moe import AWMoE, GateContrast, utilisation
from ctrlib.models.behaviours import ActivationUnit, Steps, TargetAttention
from ctrlib.models.din import DIN
from ctrlib.models.moe import Experts
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.ragged import segment_ids
from ctrlib.schema import HistoryColumn
from tests.models.histories import LAYOUT, TWO_LABELS, behaviours, rows, with_behaviours
from tests.models.small import awake, make
from tests.reference import aw_moe as reference

Array = npt.NDArray[np.float64]
UNIT = ActivationUnit.Config(hidden_units=(5, 3), activation="tanh")
HISTORY = LAYOUT.histories[0]


def aw_moe(layout: Any = LAYOUT, contrast: GateContrast | None = None, awaken: bool = True, **options: Any) -> AWMoE:
    chosen: dict[str, Any] = {
        "embedding": FeatureEmbedding.Config(dim=4, init_std=0.5),
        "attention": TargetAttention.Config(unit=UNIT),
        "gate_unit": UNIT,
        "activation_unit": UNIT,
        "experts": Experts.Config(count=3, expert=MLP.Config(hidden_units=(6, 4), activation="tanh")),
        "contrast": contrast or GateContrast(),
    }
    model = make(AWMoE.Config(**(chosen | options)), layout)
    return cast(AWMoE, awake(model) if awaken else model)


def layers(module: nn.Module) -> list[tuple[Array, Array]]:
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return [(m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in linears]


def expert_layers(module: nn.Module, k: int) -> list[tuple[Array, Array]]:
    linears = [m for m in module.modules() if isinstance(m, TokenLinear)]
    return [(m.weight[k].T.detach().double().numpy(), cast(Tensor, m.bias)[k].detach().double().numpy()) for m in linears]


def gates(model: AWMoE, batch: Batch) -> Tensor:
    """g with gradients."""
    steps, c_BW, _ = model.read(batch)
    return model.gate(steps, c_BW, *model.units(steps, c_BW))


def test_is_the_formula() -> None:
    model, batch = aw_moe(), rows(6)
    fields = model.embedding(batch).detach().double().numpy()
    found = model.embedding.behaviours(batch, "history")
    h_NW = found.x_NAD.detach().flatten(1).double().numpy()
    c_BW = model.embedding.targets(batch, "history").detach().flatten(1).double().numpy()
    assert model.activation_unit is not None
    assert model.default_gate is not None
    expected = [
        reference.logit(
            fields[b],
            h_NW[first:last],
            c_BW[b],
            attention=layers(model.attention),
            gate_unit=layers(model.gate_unit),
            activation_unit=layers(model.activation_unit),
            experts=[expert_layers(model.experts, k) for k in range(3)],
            empty=model.default_gate.detach().double().numpy(),
            activation="tanh",
        )
        for b, (first, last) in enumerate(zip(found.offsets_B1, found.offsets_B1[1:], strict=False))
    ]
    np.testing.assert_allclose(model(batch).logits.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def two_steps() -> Steps:
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    return Steps(torch.ones(2, 12), offsets, segment_ids(offsets, 2), torch.ones(2, dtype=torch.bool))


def test_the_gate_by_hand() -> None:
    a_N, r_NK = torch.tensor([0.5, 2.0]), torch.tensor([[1.0, 0, 2], [0, 3, 1]])
    context = torch.zeros(1, 12)
    assert aw_moe().gate(two_steps(), context, a_N, r_NK).tolist() == [[0.5, 6.0, 3.0]]
    assert aw_moe(pool="mean").gate(two_steps(), context, a_N, r_NK).tolist() == [[0.25, 3.0, 1.5]]
    found = aw_moe(pool="sqrt").gate(two_steps(), context, a_N, r_NK)
    torch.testing.assert_close(found, torch.tensor([[0.5, 6.0, 3.0]]) / 2**0.5)
    found = aw_moe(gate_norm="softmax").gate(two_steps(), context, a_N, r_NK)
    torch.testing.assert_close(found, torch.tensor([[0.5, 6.0, 3.0]]).softmax(1))
    found = aw_moe(gate_norm="topk", top_k=1).gate(two_steps(), context, a_N, r_NK)
    assert found.tolist() == [[0.0, 1.0, 0.0]]


def test_sums_of_behaviours_add_up() -> None:
    model, batch = aw_moe(empty_gate="zeros"), rows(5, lengths=[4] * 5)
    lists = behaviours(batch)
    parts = [gates(model, with_behaviours(batch, [row[a:b] for row in lists])) for a, b in ((0, 1), (1, 4))]
    torch.testing.assert_close(parts[0] + parts[1], gates(model, batch))


@pytest.mark.parametrize("options", [{}, {"use_gate_unit": False}, {"item_mlp": MLP.Config(hidden_units=(6,))}], ids=str)
def test_order_and_padding_do_not_matter(options: dict[str, Any]) -> None:
    model, batch = aw_moe(**options), rows(6)
    expected, gate = model(batch).logits, gates(model, batch)
    lists = behaviours(batch)
    for changed in ([row[::-1] for row in lists], [[(0, 0, 0), *row, (0, 0, 0)] for row in lists]):
        other = with_behaviours(batch, changed)
        torch.testing.assert_close(model(other).logits, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gates(model, other), gate, rtol=1e-5, atol=1e-6)


def test_padding_is_not_read_whatever_its_vectors_are() -> None:
    model, batch = aw_moe().double(), rows(5)
    batch = replace(batch, dense=batch.dense.double())
    steps, c_BW, x_BFD = model.read(batch)
    lengths = steps.offsets_B1.diff().tolist()
    huge = 1e4 * torch.randn(5, 3, 12, dtype=torch.float64)
    h_NW = torch.cat([torch.cat([h, huge[b]]) for b, h in enumerate(torch.split(steps.h_NW, lengths))])
    offsets = torch.tensor([0, *(n + 3 for n in lengths)]).cumsum(0).to(torch.int32)
    real_N = torch.tensor([i < n for n in lengths for i in range(n + 3)])
    padded = Steps(h_NW, offsets, segment_ids(offsets, len(h_NW)), real_N)
    outputs = []
    for s in (steps, padded):
        g_BK = model.gate(s, c_BW, *model.units(s, c_BW))
        pooled_BW = model.attention(s, c_BW)
        outputs.append((g_BK, pooled_BW, (g_BK.unsqueeze(2) * model.scores(x_BFD, pooled_BW)).sum(1)))
    for found, expected in zip(*reversed(outputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


class Constant(nn.Module):
    """An activation unit that says the same of every behaviour: a number, or one for each row."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, h_NW: Tensor, c_BW: Tensor, row_N: Tensor) -> Tensor:
        return self.value.expand(c_BW.shape[0], 1)[row_N]


def test_one_expert_with_a_gate_of_one_is_din() -> None:
    mlp = MLP.Config(hidden_units=(6, 4), activation="tanh")
    model = aw_moe(experts=Experts.Config(count=1, expert=mlp))
    config = DIN.Config(embedding=model.config.embedding, attention=model.config.attention, interaction=mlp)
    din, batch = cast(DIN, make(config, LAYOUT)), rows(6, lengths=[1, 2, 3, 4, 1, 2])
    state = {name: value for name, value in model.state_dict().items() if name.startswith("embedding.")}
    state |= {f"attended.attention.0.{n}": v for n, v in model.attention.state_dict().items()}
    experts = [m for m in model.experts.modules() if isinstance(m, TokenLinear)]
    for target, source in zip(("interaction.layers.0", "interaction.layers.2", "head.linear"), experts, strict=True):
        state |= {f"{target}.weight": source.weight[0].T, f"{target}.bias": cast(Tensor, source.bias)[0]}
    din.load_state_dict(state)
    model.gate_unit = cast(Any, Constant(torch.ones(1, 1)))
    model.activation_unit = cast(Any, Constant(1 / torch.tensor([[1.0], [2], [3], [4], [1], [2]])))
    torch.testing.assert_close(model(batch).logits, din(batch).logits)


def test_rows_without_behaviours() -> None:
    """A plain sum would give every candidate of a user without behaviours the same score, one half."""
    batch = rows(6, lengths=[0] * 6)
    logits = aw_moe()(batch).logits
    assert logits.isfinite().all()
    assert len(set(logits.tolist())) == 6
    model = aw_moe(empty_gate="zeros")
    assert not model(batch).logits.any()
    for norm in ("softmax", "topk"):
        assert not aw_moe(empty_gate="zeros", gate_norm=norm)(batch).logits.any()
    model = aw_moe(empty_gate="zeros", expert_dim=5)
    assert model.head is not None
    torch.testing.assert_close(model(batch).logits, model.head.linear.bias.expand(6))
    model = aw_moe(empty_gate="uniform")
    torch.testing.assert_close(gates(model, batch), torch.full((6, 3), 1 / 3))
    mean = model.explain(batch)["score"].mean(1).squeeze(1)
    torch.testing.assert_close(model(batch).logits, mean)


def test_the_default_gate_is_that_of_empty_rows_or_of_all() -> None:
    batch = rows(4)  # the first row is empty
    learned, zeros, biased = (aw_moe(**o) for o in ({}, {"empty_gate": "zeros"}, {"gate_bias": True}))
    assert zeros.default_gate is None
    assert learned.default_gate is not None
    for model in (zeros, biased):
        model.load_state_dict(learned.state_dict(), strict=False)
    default = learned.default_gate.detach()
    plain = gates(zeros, batch)
    assert not plain[0].any()
    torch.testing.assert_close(gates(learned, batch), torch.cat([default.unsqueeze(0), plain[1:]]))
    torch.testing.assert_close(gates(biased, batch), plain + default)
    fresh = aw_moe(awaken=False)
    torch.testing.assert_close(cast(Tensor, fresh.default_gate).detach(), torch.full((3,), 1 / 3))


def test_parameters_as_designed() -> None:
    def unit(width: int, first: int, second: int, outputs: int) -> int:
        return 4 * width * first + first + first * second + second + second * outputs + outputs

    relu = ActivationUnit.Config(activation="relu")
    expert = MLP.Config(hidden_units=(80, 40))
    for count in (2, 8):
        model = aw_moe(
            attention=TargetAttention.Config(unit=relu),
            gate_unit=relu,
            activation_unit=relu,
            experts=Experts.Config(count=count, expert=expert),
        )
        d, inputs = 3 * 4, (6 + 3) * 4
        ffn = inputs * 80 + 80 + 80 * 40 + 40 + 40 + 1
        expected = 2 * unit(d, 80, 40, 1) + unit(d, 80, 40, count) + count * ffn + count
        rest = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embedding."))
        assert rest == expected


def test_phi_networks() -> None:
    model, batch = (
        aw_moe(
            query=("hour",),
            item_mlp=MLP.Config(hidden_units=(7,)),
            query_mlp=MLP.Config(hidden_units=(5,)),
            other_mlp=MLP.Config(hidden_units=(3,)),
        ),
        rows(5),
    )
    steps, c_BW, x_B1W = model.read(batch)
    assert (steps.h_NW.shape[1], c_BW.shape, x_B1W.shape) == (7, (5, 7), (5, 1, 7 + 5 + 3))
    assert model.item is not None
    targets = model.embedding.targets(batch, "history")
    torch.testing.assert_close(c_BW, model.item(targets).squeeze(1))  # behaviours and candidate share the network
    first = model.embedding.behaviours(batch, "history").x_NAD[:1]
    torch.testing.assert_close(steps.h_NW[:1], model.item(first).squeeze(1))
    assert model.other_at.tolist() == [model.embedding.out.names.index(name) for name in ("user", "price", "tags")]
    assert model(batch).logits.isfinite().all()


@pytest.mark.parametrize("context", ["query", "target_and_query"])
def test_contexts(context: Any) -> None:
    model, batch = aw_moe(query=("hour", "user"), context=context), rows(6)
    gate = gates(model, batch)
    moved = replace(batch, sparse=batch.sparse.clone())
    moved.sparse[:, 1] = moved.sparse[:, 1] % 11 + 1  # another candidate
    changed = (gates(model, moved) - gate).abs().amax(1)[1:]
    assert (not changed.any()) if context == "query" else (changed.min() > 1e-5)
    moved = replace(batch, sparse=batch.sparse.clone())
    moved.sparse[:, 3] = moved.sparse[:, 3] % 4 + 1  # another query
    assert (gates(model, moved) - gate).abs().amax(1)[1:].min() > 1e-5
    if context == "query":  # needs no candidate to compare with
        alone = replace(LAYOUT, histories=(HistoryColumn("history", HISTORY.fields, (None, None, None)),))
        assert aw_moe(alone, query=("hour",), context=context)(batch).logits.isfinite().all()


def test_ablations_of_the_units() -> None:
    batch = rows(5)
    model = aw_moe(use_activation_unit=False)
    steps, c_BW, _ = model.read(batch)
    r_NK = model.gate_unit(steps.h_NW, c_BW, steps.row_N)
    torch.testing.assert_close(gates(model, batch)[1:], steps.pool(r_NK)[1:])

    model = aw_moe(share_activation_unit=True)
    assert model.activation_unit is None
    a_N, r = model.units(steps, c_BW)
    assert r is not None
    torch.testing.assert_close(a_N, model.attention.scores(steps, c_BW))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in aw_moe().parameters())

    model = aw_moe(use_gate_unit=False)
    assert model.activation_unit is not None
    a_N = model.activation_unit(steps.h_NW, c_BW, steps.row_N).squeeze(1)
    pooled_BW = steps.pool(steps.h_NW, a_N)
    expected = model.gate_unit(pooled_BW, c_BW, torch.arange(5))
    torch.testing.assert_close(gates(model, batch)[1:], expected[1:])


def test_experts_of_another_kind_and_vectors_of_experts() -> None:
    batch = rows(5, num_labels=2)
    attention = Experts.Config(count=2, expert=AutoInt.Config(num_layers=1, num_heads=2, head_dim=3))
    assert aw_moe(experts=attention)(batch).logits.shape == (5,)
    model = aw_moe(TWO_LABELS, expert_dim=7)
    steps, c_BW, x_BFD = model.read(batch)
    s_BKE = model.scores(x_BFD, model.attention(steps, c_BW))
    assert s_BKE.shape == (5, 3, 7)
    assert model.head is not None
    expected = model.head((gates(model, batch).unsqueeze(2) * s_BKE).sum(1, keepdim=True))
    torch.testing.assert_close(model(batch).logits, expected)
    shared = aw_moe(TWO_LABELS)
    s_BKT = shared.explain(batch)["score"]
    torch.testing.assert_close(shared(batch).logits, torch.einsum("bk,bkt->bt", gates(shared, batch), s_BKT))


# The contrastive loss


def train(model: AWMoE, batch: Batch) -> Tensor:
    return model.train()(batch).auxiliary["contrastive"]


def test_only_training_has_the_loss() -> None:
    model, batch = aw_moe(), rows(6)
    assert model(batch).auxiliary == {}
    before = torch.get_rng_state()
    model(batch)
    model.explain(batch)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is masked
    output = model.train()(batch)
    assert set(output.auxiliary) == {"contrastive"}
    assert output.auxiliary["contrastive"] > 0
    plain = total_loss(replace(output, auxiliary={}), batch)
    torch.testing.assert_close(total_loss(output, batch), plain + output.auxiliary["contrastive"])


def fitted(config: GateContrast) -> tuple[dict[str, Tensor], Tensor, list[float]]:
    """Weights, state of the random numbers and losses after some steps."""
    options: dict[str, Any] = {"embedding": FeatureEmbedding.Config(dim=4, dropout=0.1, token_dropout=0.1)}
    torch.manual_seed(7)
    model = aw_moe(contrast=config, awaken=False, **options).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(5):
        batch = rows(12, seed=step)
        optimizer.zero_grad()
        loss = total_loss(model(batch), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return model.state_dict(), torch.get_rng_state(), losses


def test_weight_zero_is_bit_identical_whatever_the_other_options_are() -> None:
    off = GateContrast(weight=0.0)
    expected, random, losses = fitted(off)
    for other in (GateContrast(weight=0.0, mask=0.9, negatives=1, temperature=0.01, detach=True),):
        found, after, again = fitted(other)
        assert losses == again
        assert torch.equal(after, random)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    on = fitted(GateContrast())
    assert on[2] != losses
    # and with a weight, the random numbers of a step are those of the mask alone, after those of everything else
    batch, model = rows(6), aw_moe(contrast=GateContrast()).train()
    torch.manual_seed(3)
    with_loss = model(batch).logits
    model.config = replace(model.config, contrast=off)
    torch.manual_seed(3)
    assert torch.equal(model(batch).logits, with_loss)


def counted(calls: list[str], name: str, method: Any, *arguments: Any) -> Any:
    calls.append(name)
    return method(*arguments)


def test_there_is_one_pass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = aw_moe().train(), rows(6)
    calls: list[str] = []
    for name in ("behaviours", "targets"):
        method = getattr(model.embedding, name)
        monkeypatch.setattr(model.embedding, name, partial(counted, calls, name, method))
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, n=name: calls.append(n))
    model.attention.unit.register_forward_hook(lambda *_: calls.append("unit"))
    assert model(batch).auxiliary["contrastive"] > 0
    once = ["embedding", "behaviours", "targets", "unit", "experts", "gate_unit", "activation_unit"]
    assert sorted(calls) == sorted(once)


def second_pass(model: AWMoE, batch: Batch, keep_N: Tensor) -> Tensor:
    """The gate of the rows with masked behaviours taken out, from the ids on."""
    kept = iter(keep_N.tolist())
    return gates(model, with_behaviours(batch, [[b for b in row if next(kept)] for row in behaviours(batch)]))


@pytest.mark.parametrize("options", [{}, {"pool": "mean"}, {"use_gate_unit": False}, {"gate_norm": "softmax"}], ids=str)
def test_reusing_the_units_is_a_second_pass(options: dict[str, Any]) -> None:
    batch = rows(8)
    for contrast in (GateContrast(mask=0.5), GateContrast(mask=0.7, keep_one=False), GateContrast(mask=1.0, keep_one=False)):
        model = aw_moe(contrast=contrast, **options)
        steps, _, _ = model.read(batch)
        torch.manual_seed(11)
        keep_N = model.keep(steps)
        torch.manual_seed(11)
        expected = info_nce(
            gates(model, batch),
            second_pass(model, batch, keep_N),
            temperature=0.1,
            negatives_from="anchor",
            rows_B=torch.tensor([False] + [True] * 7),
        )
        torch.manual_seed(11)
        torch.testing.assert_close(train(model, batch), model.config.contrast.weight * expected)


def test_masks() -> None:
    batch = rows(200, lengths=[5] * 200)
    steps, _, _ = aw_moe().read(batch)
    for p in (0.2, 0.7):
        keep_N = aw_moe(contrast=GateContrast(mask=p, keep_one=False)).keep(steps)
        assert float((~keep_N).float().mean()) == pytest.approx(p, abs=0.05)
    one = aw_moe(contrast=GateContrast(mask=1.0)).keep(steps).view(200, 5)
    assert (one.sum(1) == 1).all()
    assert len(set(one.float().argmax(1).tolist())) == 5  # any of them
    assert aw_moe(contrast=GateContrast(mask=0.0)).keep(steps).all()
    padded = Steps(steps.h_NW, steps.offsets_B1, steps.row_N, torch.arange(1000) % 5 == 2)
    assert (aw_moe(contrast=GateContrast(mask=1.0)).keep(padded) & padded.real_N).view(200, 5).sum(1).eq(1).all()


def test_limits_of_the_mask() -> None:
    batch = rows(6, lengths=[0, 1, 2, 3, 4, 2])
    unmasked = aw_moe(contrast=GateContrast(mask=0.0, weight=1.0))
    steps, c_BW, _ = unmasked.read(batch)
    a_N, r_NK = unmasked.units(steps, c_BW)
    expected = unmasked.gate(steps, c_BW, a_N, r_NK)
    assert torch.equal(unmasked.gate(steps.kept(unmasked.keep(steps)), c_BW, a_N, r_NK), expected)
    one_user = replace(batch, group=torch.zeros(6, dtype=torch.int64))
    assert train(unmasked, one_user).item() == 0.0
    alone = aw_moe(contrast=GateContrast(weight=1.0))
    assert train(alone, rows(1, lengths=[3])).item() == 0.0  # one user in the batch
    assert train(alone, rows(4, lengths=[0] * 4)).item() == 0.0  # no behaviours at all
    for empty in ("learned", "uniform", "zeros"):
        for similarity in ("dot", "cosine"):
            contrast = GateContrast(mask=1.0, keep_one=False, similarity=cast(Any, similarity), weight=1.0)
            model = aw_moe(contrast=contrast, empty_gate=empty)
            loss = train(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            assert loss.isfinite()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{"use_gate_unit": False}, {}], ids=str)
@pytest.mark.parametrize("detach", [False, True])
def test_the_loss_leaves_running_statistics_alone(options: dict[str, Any], detach: bool) -> None:
    """Those of Dice are of whole histories, as in evaluation: a masked view does not count, nor does a batch count twice."""
    dice = replace(UNIT, activation="dice")
    options |= {"gate_unit": dice, "activation_unit": dice}

    def statistics(weight: float) -> dict[str, Tensor]:
        model = aw_moe(contrast=GateContrast(weight=weight, detach=detach), **options).train()
        for _ in range(5):
            model(rows(12))
        return dict(model.named_buffers())

    plain, found = statistics(0.0), statistics(1.0)
    names = [name for name in plain if name.endswith(".variance")]
    assert names
    assert all(not torch.equal(plain[name], torch.ones_like(plain[name])) for name in names)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_rows_of_weight_zero_are_left_out_of_the_loss() -> None:
    batch = rows(6, lengths=[2] * 6)
    model = aw_moe(contrast=GateContrast(weight=1.0, mask=0.0))
    expected = train(model, rows_of(batch, [0, 2, 3]))
    weighed = replace(batch, weight=torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 0.0]))
    torch.testing.assert_close(train(model, weighed), expected)
    assert train(model, replace(batch, weight=torch.zeros(6))).item() == 0.0


def rows_of(batch: Batch, chosen: list[int]) -> Batch:
    """Some rows of a batch."""
    lists = behaviours(batch)
    assert batch.group is not None
    tags = batch.sequences["tags"]
    kept = replace(
        batch,
        sparse=batch.sparse[chosen],
        dense=batch.dense[chosen],
        sequences={"tags": Ragged(tags.values.view(-1, 2)[chosen].flatten(), torch.arange(len(chosen) + 1).int() * 2)},
        labels=None,
        group=batch.group[chosen],
    )
    return with_behaviours(kept, [lists[i] for i in chosen])


def test_what_the_loss_trains() -> None:
    model, batch = aw_moe(contrast=GateContrast(weight=1.0)), rows(8)
    train(model, batch).backward()  # type: ignore[no-untyped-call]
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"embedding", "gate_unit", "activation_unit"}
    plain, model = (aw_moe(contrast=GateContrast(weight=1.0, detach=detach)) for detach in (False, True))
    torch.manual_seed(5)
    expected = train(plain, batch)
    torch.manual_seed(5)
    loss = train(model, batch)
    assert torch.equal(loss, expected)
    loss.backward()  # type: ignore[no-untyped-call]
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"gate_unit", "activation_unit"}


def test_rows_of_one_user_are_no_negatives() -> None:
    """A user whose row stands twice in the batch adds no term of its own to the denominator."""
    base = rows(4, lengths=[2, 3, 1, 4])
    lists = behaviours(base)
    twice = with_behaviours(
        replace(
            base,
            sparse=base.sparse[[0, 1, 2, 3, 0]],
            dense=base.dense[[0, 1, 2, 3, 0]],
            sequences={"tags": Ragged(torch.ones(5, dtype=torch.int32), torch.arange(6, dtype=torch.int32))},
            labels=None,
            group=torch.tensor([0, 1, 2, 3, 0]),
        ),
        [*lists, lists[0]],
    )
    contrast = GateContrast(mask=0.0, weight=1.0, similarity="dot", temperature=1.0)
    model = aw_moe(contrast=contrast)
    g = gates(model, twice).detach().double()
    same = {(0, 4), (4, 0)}
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i and (i, j) not in same]
        own = math.exp(float(g[i] @ g[i]))
        expected -= math.log(own / (own + sum(math.exp(float(g[i] @ g[j])) for j in others))) / 5
    assert train(model, twice).item() == pytest.approx(expected, rel=1e-4)
    counted = aw_moe(contrast=replace(contrast, exclude_same_user=False))
    assert train(counted, twice).item() > expected + 1e-4
    # told apart by a field; unseen users are one
    named = aw_moe(contrast=replace(contrast, user="user"))
    sparse = twice.sparse.clone()
    sparse[:, 0] = torch.tensor([5, 2, 3, 4, 5])
    known = replace(twice, sparse=sparse)
    assert named.same_user(known).nonzero().tolist() == [[0, 0], [0, 4], [1, 1], [2, 2], [3, 3], [4, 0], [4, 4]]
    with pytest.raises(ConfigError, match=r"which rows are of one user, and the data has no group; name the column"):
        train(model, replace(twice, group=None))
    train(counted, replace(twice, group=None))
    with pytest.raises(
        ConfigError, match=r"contrast\.user names 'usr', which is no sparse field of the data; did you mean 'user'"
    ):
        aw_moe(contrast=GateContrast(user="usr"))


def test_a_subset_of_negatives() -> None:
    batch = rows(30, lengths=[3] * 30)
    losses = []
    for negatives in (1, 5, None):
        torch.manual_seed(1)
        losses.append(train(aw_moe(contrast=GateContrast(negatives=negatives, mask=0.3)), batch).item())
    assert losses[0] < losses[1] < losses[2]


# What it shows


def test_explain() -> None:
    model, batch = aw_moe(), rows(5, lengths=[0, 1, 2, 3, 4])
    shown = model.explain(batch)
    assert model.axes["gate"] == (("expert_0", "expert_1", "expert_2"),)
    assert model.axes["history/contribution"][0][:2] == ("recent_0", "recent_1")
    assert {name: value.shape[1:] for name, value in shown.items()} == {
        name: tuple(map(len, labels)) for name, labels in model.axes.items()
    }
    torch.testing.assert_close(shown["gate"], gates(model, batch).detach())
    torch.testing.assert_close(shown["history/contribution"].sum(1)[1:], shown["gate"][1:])
    assert not shown["history/contribution"][0].any()
    torch.testing.assert_close((shown["gate"].unsqueeze(2) * shown["score"]).sum(1).squeeze(1), model(batch).logits.detach())
    torch.testing.assert_close(shown["utilisation"].sum(1), torch.ones(5))
    parts_NK, offsets = model.contributions(batch)
    assert offsets.tolist() == [0, 0, 1, 3, 6, 10]
    torch.testing.assert_close(shown["history/contribution"][3, :3], parts_NK[3:6].flip(0))  # the last one first
    off = aw_moe(use_gate_unit=False)
    assert "history/contribution" not in off.axes
    assert set(off.explain(batch)) == set(off.axes)
    with pytest.raises(ConfigError, match="use_gate_unit is off"):
        off.contributions(batch)


def test_utilisation_by_hand() -> None:
    used, entropy = utilisation(torch.tensor([[1.0, -1, 2], [0, 3, 0], [0, 0, 0]]))
    torch.testing.assert_close(used, torch.tensor([0.125, 0.625, 0.25]))
    assert entropy == pytest.approx(-sum(p * math.log(p) for p in (0.125, 0.625, 0.25)) / math.log(3))
    assert utilisation(torch.ones(4, 5))[1] == pytest.approx(1.0)
    assert utilisation(torch.tensor([[0.0, 2.0]]))[1] == 0.0
    assert utilisation(torch.ones(3, 1))[1] == 0.0


def test_options_by_path() -> None:
    config = override(
        preset("aw_moe"),
        {
            "contrast.weight": "0.5",
            "contrast.negatives": "7",
            "experts.count": "8",
            "experts.expert.hidden_units": "512,256",
            "item_mlp": '{"hidden_units": [16]}',
            "query": "hour,user",
        },
        COMPONENTS,
    )
    assert isinstance(config, AWMoE.Config)
    assert (config.contrast.weight, config.contrast.negatives, config.experts.count) == (0.5, 7, 8)
    assert config.item_mlp == MLP.Config(hidden_units=(16,))
    assert config.query == ("hour", "user")
    make(config, LAYOUT)


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: AWMoE.Config(context=cast(Any, "user")), "AWMoE.context is 'user'"),
        (lambda: AWMoE.Config(context="query"), "context is 'query', but query names no field"),
        (lambda: AWMoE.Config(pool=cast(Any, "average")), "AWMoE.pool is 'average'"),
        (lambda: AWMoE.Config(gate_norm=cast(Any, "softmaxx")), "did you mean 'softmax'"),
        (lambda: AWMoE.Config(empty_gate=cast(Any, "zero")), "did you mean 'zeros'"),
        (lambda: AWMoE.Config(empty_gate="zeros", gate_bias=True), "gate_bias adds .* empty_gate 'zeros' fixes those"),
        (lambda: AWMoE.Config(empty_gate="uniform", gate_bias=True), "set empty_gate to 'learned', or gate_bias to false"),
        (lambda: AWMoE.Config(top_k=0), "top_k is 0"),
        (lambda: AWMoE.Config(expert_dim=0), "expert_dim is 0"),
        (lambda: AWMoE.Config(share_activation_unit=True, use_activation_unit=False), "needs use_activation_unit"),
        (lambda: GateContrast(weight=-1.0), "contrast.weight is -1.0"),
        (lambda: GateContrast(mask=1.5), "mask is 1.5; expected a chance from 0 to 1"),
        (lambda: GateContrast(temperature=0.0), "temperature is 0.0"),
        (lambda: GateContrast(negatives=0), "negatives is 0"),
        (lambda: GateContrast(similarity=cast(Any, "cos")), "did you mean 'cosine'"),
    ],
)
def test_options(make_config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config()


def test_every_field_is_read_with_networks_of_their_own_too() -> None:
    """The category of the candidate is compared with no behaviour here, but is a field like any other."""
    fields = ("user", "item", "category", "hist_item")
    flat = aw_moe(embedding=FeatureEmbedding.Config(dim=4, init_std=0.5, fields=fields), item_mlp=MLP.Config(hidden_units=(6,)))
    flat.eval()
    batch = rows(5, lengths=[1, 2, 3, 4, 2])
    for column, name in enumerate(c.name for c in LAYOUT.sparse):
        sparse = batch.sparse.clone()
        sparse[:, column] = torch.where(sparse[:, column] == 2, 3, 2)
        changed = (flat(replace(batch, sparse=sparse)).logits != flat(batch).logits).all()
        assert bool(changed) == (name in fields)


def test_a_dropped_user_may_be_any() -> None:
    model = aw_moe(contrast=GateContrast(user="user"))
    batch = rows(4, lengths=[1, 1, 1, 1])
    batch.sparse[:, 0] = torch.tensor([2, 3, 0, 2])
    same = model.same_user(batch).tolist()
    assert same == [[True, False, True, True], [False, True, True, False], [True] * 4, [True, False, True, True]]


def test_dropout_makes_no_padding() -> None:
    """Of 400 rows with one behaviour of few numbers each, dropout leaves some none that is not zero."""
    alone = replace(LAYOUT, histories=(HistoryColumn("history", ("hist_item",), ("item",)),))
    model = aw_moe(alone, embedding=FeatureEmbedding.Config(dim=2, init_std=0.5, dropout=0.7)).train()
    batch = rows(400, lengths=[1] * 400)
    steps, _, _ = model.read(batch)
    assert (steps.h_NW == 0).all(1).any()
    assert bool((steps.count() == 1).all())


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"AWMoE.item_mlp has batch norms, .* single behaviour; set its norm to 'layer'"):
        aw_moe(item_mlp=MLP.Config(hidden_units=(6,), norm="batch"))
    with pytest.raises(ConfigError, match="AWMoE reads a history of behaviours, but the data has none; declare one"):
        aw_moe(replace(LAYOUT, histories=()))
    two = replace(LAYOUT, histories=(HISTORY, HistoryColumn("views", ("tags",), (None,))))
    with pytest.raises(ConfigError, match="AWMoE reads one history, and the data has history, views; name one in history"):
        aw_moe(two)
    assert aw_moe(two, history="history").history == "history"
    with pytest.raises(ConfigError, match="shares a vocabulary with a field of the candidate; set shares"):
        aw_moe(two, history="views")
    unlike = FeatureEmbedding.Config(fields=("user", "hour", "item", "hist_category", "hist_gap"))
    with pytest.raises(ConfigError, match=r"AWMoE compares .* both of: hist_item and item, hist_category and category"):
        aw_moe(embedding=unlike)
    assert aw_moe(embedding=unlike, context="query", query=("hour",)).history == "history"
    with pytest.raises(ConfigError, match="query names 'our', which the model does not read; did you mean 'hour'"):
        aw_moe(query=("our",))
