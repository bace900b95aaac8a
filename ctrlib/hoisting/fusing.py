"""Layers of fixed weights: packed once in the form in which oneDNN reads them, with the ReLU behind them in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_MIN_OUT = 16  # of narrower layers packing makes the product slower


def fuse(module: fx.GraphModule) -> fx.GraphModule:
    """The module with its layers packed, where torch has the operations that ``torch.compile`` uses for that on a CPU.

    This helps most where rows are few: then the weights are most of what is read, and packing them most of the work.

    Args:
        module: made for inference, on a CPU; it is changed.
    """
    backend: Any = torch.backends.mkldnn  # untyped in torch
    if not backend.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return module
    for node in list(module.graph.nodes):
        if node.target is aten.linear.default and (weight := _fixed(module, node.args[1])) is not None:
            _pack(module, node, weight)
    module.graph.eliminate_dead_code()
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers() if name not in used]:
        delattr(module, name)
    module.recompile()
    return module


def _fixed(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The float32 weight that an argument is, if it is wide enough."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    weight = getattr(module, str(node.target))
    if not isinstance(weight, Tensor) or weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.dim() != 2:
        return None
    return weight if len(weight) >= _MIN_OUT else None


def _pack(module: fx.GraphModule, node: fx.Node, weight: Tensor) -> None:
    name = f"packed_{node.args[1]}"
    if not hasattr(module, name):
        module.register_buffer(name, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()))
    users = list(node.users)
    followed = len(users) == 1 and users[0].target is aten.relu.default
    last = users[0] if followed else node
    with module.graph.inserting_before(last):
        packed = module.graph.get_attr(name)
        bias = node.args[2] if len(node.args) > 2 else None
        arguments: Any = (node.args[0], packed, bias, "relu" if followed else "none", [], "")
        last.replace_all_uses_with(module.graph.call_function(torch.ops.mkldnn._linear_pointwise.default, arguments))
    module.graph.erase_node(last)
    if followed:
        module.graph.erase_node(node)
