"""AutoFIS: which pairs of fields an FM needs (Liu et al., KDD 2020, arXiv:2003.11235), by an optimizer that ends at zeros
(GRDA: Chao et al., NeurIPS 2020, arXiv:2006.08967)."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.config import ConfigError, check_choice, check_not_negative, positive, to_json
from ctrlib.data.loader import Loader
from ctrlib.data.store import Store
from ctrlib.interactions.auto_fis import AutoFIS
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.optim import build_optimizer
from ctrlib.schema import BatchLayout, DataError
from ctrlib.search.passes import train_pass
from ctrlib.search.selection import Choice, Selection
from ctrlib.training import FitConfig, seed_everything

T = TypeVar("T")
Alpha = Literal["kept", "one"]

_log = logging.getLogger("ctrlib")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoFISConfig:
    """
    Args:
        epochs: passes over the training rows.
        learning_rate: γ of GRDA.
        c, mu: of GRDA; larger ones close more pairs. A pair whose weight has no gradient goes from 0.6 to 0 in (0.6/c)^(1/μ)
            steps, with the defaults (the authors' for Avazu) in 7,063: set ``c`` for the number of steps of the data.
        alpha: of the kept pairs in re-training: ``kept`` trains them on from what the search found; ``one`` leaves them out.
    """

    epochs: int = 1
    learning_rate: float = 1.0
    c: float = 5e-4
    mu: float = 0.8
    alpha: Alpha = "kept"

    def __post_init__(self) -> None:
        positive("auto_fis.epochs", self.epochs)
        positive("auto_fis.learning_rate", self.learning_rate)
        check_not_negative("auto_fis.c", self.c)
        check_not_negative("auto_fis.mu", self.mu)
        check_choice("auto_fis.alpha", self.alpha, get_args(Alpha))


class GRDA:
    """Generalised regularised dual averaging, which brings weights exactly to zero and lets them come back:

        v_0 = α_0,   v_t = v_{t−1} − γ g_t,   α_t = sign(v_t) · max(|v_t| − c γ^(½+μ) t^μ, 0)

    Args:
        parameters: with dense gradients.
        learning_rate, c, mu: γ, c, μ.

    Attributes:
        steps: taken so far, t.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, learning_rate: float = 1.0, c: float = 5e-4, mu: float = 0.8
    ) -> None:
        self._parameters = tuple(parameters)
        self._duals = [p.detach().clone() for p in self._parameters]
        self._learning_rate, self._c, self._mu = learning_rate, c, mu
        self.steps = 0

    @property
    def threshold(self) -> float:
        """What is taken off |v| now."""
        return float(self._c * self._learning_rate ** (0.5 + self._mu) * self.steps**self._mu)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update from the gradients.

        Raises:
            ConfigError: a gradient is sparse. The released code leaves such parameters out without a word.
        """
        self.steps += 1
        for parameter, dual in zip(self._parameters, self._duals, strict=True):
            if parameter.grad is not None:
                if parameter.grad.is_sparse:
                    raise ConfigError("GRDA got a sparse gradient, as of an embedding table; give it dense parameters only")
                dual.sub_(parameter.grad, alpha=self._learning_rate)
            parameter.copy_(F.softshrink(dual, self.threshold))


def search_auto_fis(
    model: ModelComponent.Config,
    store: Store,
    config: AutoFISConfig,
    *,
    fit: FitConfig,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Selection:
    """Train a model and the weights α of its pairs together, α by :class:`GRDA`, and drop the pairs whose weight is zero.

    One level: both learn from the same batches of all training rows. ``pairs`` says "factorize" of what is kept and "naive" of
    the rest, ``scores`` has |α|, and ``model`` is the config to re-train from scratch, with the kept pairs alone.

    Args:
        model: with one :class:`~ctrlib.interactions.auto_fis.AutoFIS` block, such as in ``auto_fm`` and ``auto_deepfm``.
        store: of which only the training rows are read.
        config: see :class:`AutoFISConfig`.
        fit: its ``optimizer`` and ``precision`` are those of the other parameters; the rest is for re-training.
        batch_size: rows a step.
        seed: of weights and order of rows.
        device: where the model is trained.

    Raises:
        ConfigError: the model has no such block, or several, or its α is not trained; every pair was closed.
        DataError: the data has crosses.
        TrainingDivergedError: a loss is not finite.
    """
    started = time.perf_counter()
    layout = store.encoder.layout
    crosses = [c.name for c in layout.sparse if c.parts is not None]
    if crosses:
        raise DataError(
            f"AutoFIS weighs products of fields; a cross ({', '.join(crosses[:3])}) bears the name of such a pair; expected "
            "data without crosses: leave them out, or choose among crosses with optinter"
        )
    seed_everything(seed)
    built = build_model(model, layout).to(device)
    block = auto_fis_block(built)
    if not block.alpha_P.requires_grad:
        raise ConfigError("AutoFIS.learn_alpha is False, so there is nothing to search; set it to True")
    rows = Loader(store.split("train"), batch_size, shuffle=True, seed=seed)
    gates = GRDA([block.alpha_P], learning_rate=config.learning_rate, c=config.c, mu=config.mu)
    optimizer = build_optimizer(built, fit.optimizer, without=[block.alpha_P])
    epochs: list[dict[str, Any]] = []
    try:
        for epoch in range(config.epochs):
            title = f"auto_fis {epoch + 1}/{config.epochs}"
            loss = train_pass(built, rows, [optimizer, gates], title=title, precision=fit.precision)
            epochs.append({"loss": loss, "kept": int((block.alpha_P != 0).sum())})
    finally:
        optimizer.close()
    alpha = dict(zip(block.names, block.alpha_P.tolist(), strict=True))
    kept = tuple(name for name, value in alpha.items() if value)
    if not kept:
        raise ConfigError(
            f"AutoFIS closed all {len(alpha)} pairs in {gates.steps} steps; lower auto_fis.c ({config.c}), auto_fis.mu "
            f"({config.mu}) or auto_fis.epochs ({config.epochs})"
        )
    _log.info("autofis keeps %d of %d pairs", len(kept), len(alpha))
    values = tuple(alpha[name] if config.alpha == "kept" else 1.0 for name in kept)
    final = replace(block.config, pairs=kept, alpha=values, learn_alpha=config.alpha == "kept")
    choices: dict[str, Choice] = {name: "factorize" if value else "naive" for name, value in alpha.items()}
    report = {
        "settings": to_json(config),
        "steps": gates.steps,
        "threshold": gates.threshold,
        "alpha": alpha,
        "epochs": epochs,
        "seconds": time.perf_counter() - started,
    }
    return Selection(
        method="autofis",
        encoder_hash=store.encoder.hash,
        pairs=choices,
        scores={name: abs(value) for name, value in alpha.items()},
        model=_with_block(model, final),
        report=report,
    )


def without_closed_pairs(model: ModelComponent, config: ModelComponent.Config, layout: BatchLayout) -> ModelComponent:
    """The same function with fewer pairs: those with α = 0 are left out.

    Args:
        model: with one AutoFIS block.
        config: from which it was built.
        layout: for which it was built.

    Raises:
        ConfigError: the model has no such block, or several; all its pairs are closed.
    """
    block = auto_fis_block(model)
    at = block.alpha_P.detach().nonzero().flatten()
    kept = tuple(block.names[int(p)] for p in at)
    weights = model.state_dict()
    place = next(name for name, module in model.named_modules() if module is block)

    def sliced(name: str, value: Tensor) -> Tensor:
        mine = name.startswith(f"{place}.") and value.shape == block.alpha_P.shape
        return value[at] if mine else value

    smaller = _with_block(config, replace(block.config, pairs=kept, alpha=tuple(block.alpha_P[at].tolist())))
    built = build_model(smaller, layout).to(block.alpha_P.device)
    built.load_state_dict({name: sliced(name, value) for name, value in weights.items()})
    return built.train(model.training)


def auto_fis_block(model: nn.Module) -> AutoFIS:
    blocks = [module for module in model.modules() if isinstance(module, AutoFIS)]
    if len(blocks) != 1:
        raise ConfigError(
            f"the model has {len(blocks)} AutoFIS blocks; expected one: take the preset auto_fm or auto_deepfm, or put "
            "AutoFIS where the model has FM"
        )
    return blocks[0]


def _with_block(node: T, block: AutoFIS.Config) -> T:
    """A config with its AutoFIS block replaced, wherever it is."""
    found: Any = node
    if isinstance(found, AutoFIS.Config):
        found = block
    elif isinstance(found, tuple):
        found = tuple(_with_block(item, block) for item in found)
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        changes = {f.name: _with_block(getattr(found, f.name), block) for f in dataclasses.fields(found)}
        found = replace(found, **changes)
    return found  # type: ignore[no-any-return]
