from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.mask_net import MaskBlock, ParallelMaskNet, SerialMaskNet
from ctrlib.interactions.token_linear import TokenNorm
from ctrlib.schema import FieldLayout
from tests.reference import mask_net as reference

LAYOUT = FieldLayout(("user", "item", "hour"), 2)

CONTRACT: dict[str, Interaction.Config] = {
    "mask_net_serial": SerialMaskNet.Config(hidden_units=(16, 8), dropout=0.2),
    "mask_net_serial_plain": SerialMaskNet.Config(hidden_units=(16, 8), embedding_norm=False),
    "mask_net_parallel": ParallelMaskNet.Config(num_blocks=2, block_dim=8, dropout=0.2),
}


def fields(count: int, dim: int = 10) -> FieldLayout:
    return FieldLayout(tuple(f"f{i}" for i in range(count)), dim)


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def stir(block: nn.Module) -> None:
    """Gains and biases away from one and zero."""
    for p in block.parameters():
        if p.ndim == 1 or p.shape == (3, 2):
            nn.init.normal_(p)


def numbers(tensor: Tensor) -> reference.Array:
    return tensor.detach().numpy()


def arrays(block: nn.Module) -> reference.Block:
    assert isinstance(block, MaskBlock)
    first, _, last = block.mask
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return reference.Block(
        w1=numbers(first.weight),
        b1=numbers(first.bias),
        w2=numbers(last.weight),
        b2=numbers(last.bias),
        w=numbers(block.hidden.weight),
        gain=numbers(block.norm.weight),
        shift=numbers(block.norm.bias),
    )


def start(norm: TokenNorm | None, x: Tensor) -> reference.Array:
    return numbers(x).flatten() if norm is None else reference.field_norm(numbers(x), numbers(norm.weight), numbers(norm.bias))


def test_mask_block_hand_case() -> None:
    """mask = 2·ReLU(e_1 + e_2) + (1, 0) = (7, 6) for e = (1, 2); times h = (1, −1) is (7, −6); the identity as W, then LN:
    mean .5, deviation 6.5, so (1, −1) but for the epsilon; ReLU."""
    block = MaskBlock(2, 2, 2, reduction_ratio=0.5, dropout=0.0).double()
    block.mask.load_state_dict(
        {
            "0.weight": torch.tensor([[1.0, 1.0]]),
            "0.bias": torch.zeros(1),
            "2.weight": torch.tensor([[2.0], [2.0]]),
            "2.bias": torch.tensor([1.0, 0.0]),
        }
    )
    block.hidden.weight.data = torch.eye(2, dtype=torch.float64)
    e, h = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert block.mask(e).tolist() == [[7.0, 6.0]]
    assert block(e, h)[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("embedding_norm", [True, False])
def test_serial_equals_the_formula(embedding_norm: bool) -> None:
    torch.manual_seed(1)
    config = SerialMaskNet.Config(hidden_units=(5, 4), reduction_ratio=1.5, embedding_norm=embedding_norm)
    block = SerialMaskNet(config, LAYOUT).double()
    stir(block)
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    blocks = [arrays(b) for b in block.blocks]
    expected = [reference.serial(numbers(x), start(block.norm, x), blocks) for x in x_BFD]
    assert block.out == FieldLayout(("mask_net",), 4)
    assert block(x_BFD).shape == (4, 1, 4)
    np.testing.assert_allclose(numbers(block(x_BFD)[:, 0]), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("embedding_norm", [True, False])
def test_parallel_equals_the_formula(embedding_norm: bool) -> None:
    torch.manual_seed(2)
    config = ParallelMaskNet.Config(num_blocks=2, block_dim=5, reduction_ratio=1.5, embedding_norm=embedding_norm)
    block = ParallelMaskNet(config, LAYOUT).double()
    stir(block)
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    blocks = [arrays(b) for b in block.blocks]
    expected = [reference.parallel(numbers(x), start(block.norm, x), blocks) for x in x_BFD]
    assert block.out == FieldLayout(("mask_net_0", "mask_net_1"), 5)
    assert block(x_BFD).shape == (4, 2, 5)
    np.testing.assert_allclose(numbers(block(x_BFD)), expected, rtol=0, atol=1e-10)


def test_masks_read_the_embeddings_as_they_are() -> None:
    """Masks of the normalised embeddings, or of the block before, make another network."""
    torch.manual_seed(3)
    block = SerialMaskNet(SerialMaskNet.Config(hidden_units=(6, 6)), LAYOUT).double()
    x_BFD = torch.randn(8, 3, 2, dtype=torch.float64)
    shown = block(x_BFD)[:, 0]
    assert block.norm is not None
    first, second = block.blocks
    h_0 = block.norm(x_BFD).flatten(1)
    h_1 = first(x_BFD.flatten(1), h_0)
    torch.testing.assert_close(second(x_BFD.flatten(1), h_1), shown, rtol=0, atol=1e-12)
    assert (second(h_1, h_1) - shown).abs().max() > 1e-3
    assert (second(h_0, first(h_0, h_0)) - shown).abs().max() > 1e-3


@pytest.mark.parametrize(
    "config", [SerialMaskNet.Config(hidden_units=(5, 4)), ParallelMaskNet.Config(num_blocks=2, block_dim=5)]
)
def test_explain_shows_the_masks(config: SerialMaskNet.Config | ParallelMaskNet.Config) -> None:
    block = config.component(config, LAYOUT).double()
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    shown = block.explain(x_BFD)
    assert list(shown) == ["mask/0", "mask/1"]
    for i, mask in enumerate(shown.values()):
        expected = [reference.mask(numbers(x).flatten(), arrays(block.blocks[i])) for x in x_BFD]
        np.testing.assert_allclose(numbers(mask.flatten(1)), expected, rtol=0, atol=1e-10)


def test_dropout_acts_in_training() -> None:
    torch.manual_seed(4)
    x_BFD = torch.randn(4, 3, 2)
    for block in (
        SerialMaskNet(SerialMaskNet.Config(hidden_units=(8,), dropout=0.5), LAYOUT),
        ParallelMaskNet(ParallelMaskNet.Config(block_dim=8, dropout=0.5), LAYOUT),
    ):
        assert not torch.equal(block(x_BFD), block(x_BFD))
        block.eval()
        assert torch.equal(block(x_BFD), block(x_BFD))


def test_sizes() -> None:
    parallel = ParallelMaskNet.Config(num_blocks=3, block_dim=50, reduction_ratio=2, embedding_norm=False)
    assert size(ParallelMaskNet(parallel, fields(10))) == 3 * (100 * 200 + 200 + 200 * 100 + 100 + 100 * 50 + 2 * 50)
    serial = SerialMaskNet.Config(hidden_units=(400, 400, 400), reduction_ratio=4, embedding_norm=False)
    assert size(SerialMaskNet(serial, fields(3))) == 1_721_750
    normed = SerialMaskNet.Config(hidden_units=(400, 400, 400), reduction_ratio=4)
    assert size(SerialMaskNet(normed, fields(3))) == 1_721_750 + 60


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        (SerialMaskNet, {"hidden_units": ()}, "SerialMaskNet.hidden_units is empty"),
        (SerialMaskNet, {"hidden_units": (4, 0)}, "SerialMaskNet.hidden_units is 0"),
        (SerialMaskNet, {"reduction_ratio": 0}, "SerialMaskNet.reduction_ratio is 0"),
        (SerialMaskNet, {"dropout": 1.0}, "SerialMaskNet.dropout is 1"),
        (ParallelMaskNet, {"num_blocks": 0}, "ParallelMaskNet.num_blocks is 0"),
        (ParallelMaskNet, {"block_dim": 0}, "ParallelMaskNet.block_dim is 0"),
        (ParallelMaskNet, {"reduction_ratio": -1}, "ParallelMaskNet.reduction_ratio is -1"),
        (ParallelMaskNet, {"dropout": -0.1}, "ParallelMaskNet.dropout is -0.1"),
    ],
)
def test_config_errors(block: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        block.Config(**options)
