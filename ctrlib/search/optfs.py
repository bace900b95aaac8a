"""OptFS: which values of the fields are worth an embedding row (Lyu et al., "Optimizing Feature Set for Click-Through Rate
Prediction", WWW 2023, arXiv:2301.10909).

Every value k has a gate g_k on its vectors, trained with the weights and hardened from epoch to epoch:

    x_k = g_k·e_k,   g_k = σ(τ·g_c,k) / σ(g_c⁰),   min over g_c and all weights of  BCE + λ·Σ_k σ(τ·g_c,k),   τ → γ

Then values with g_c ≤ 0 are dropped, the weights are put back to what they were after epoch T_c, and the smaller model is
trained from there. Where a model multiplies vectors (FM, IPNN), gating them gates the pairs: g_i g_j ⟨e_i, e_j⟩.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, check_choice, check_not_negative, positive, to_json
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader
from ctrlib.data.source import BLOCK_ROWS
from ctrlib.data.store import Store
from ctrlib.data.vocabulary import Vocabulary
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.optim import EmbeddingOptimizerName, Optimizer, OptimizerConfig, build_optimizer
from ctrlib.search.gates import ClosedGates, GatedModel, ValueGates, Values, embeddings
from ctrlib.search.passes import train_pass
from ctrlib.search.selection import Selection, check_encoder, refuse_crosses
from ctrlib.training import FitConfig, seed_everything

Schedule = Literal["code", "paper"]
Regulariser = Literal["sigmoid", "gate"]
KeepScale = Literal["gate", "one"]
Start = Literal["rewind", "same_seed", "random", "none"]

_log = logging.getLogger("ctrlib")

_NEAR = 0.05  # a logit this close to 0 might have the other sign with another seed


@dataclass(frozen=True, kw_only=True, slots=True)
class OptFSConfig:
    """How OptFS searches.

    The defaults of ``schedule``, ``regulariser`` and ``keep_scale`` are the released code's, with which the published settings
    were tuned; :meth:`paper` has the paper's equations. docs/papers/optfs.md has the published settings and how to choose λ.

    Args:
        penalty: λ. It competes with the gradient of the data, which grows with a value's frequency, and with ε.
        gamma: γ, the last temperature.
        epochs: T, of the search.
        rewind: T_c, the epochs after which the weights are kept for re-training; 0: the initial ones.
        schedule: τ in epoch t = 1..T; ``code``: γ^((t−1)/(T−1)), ``paper``: γ^(t/T).
        regulariser: what λ multiplies; ``sigmoid``: Σ σ(τ·g_c), ``gate``: Σ g, which is larger by 1/σ(g_c⁰).
        keep_scale: of the kept rows where re-training starts; ``gate``: 1/σ(g_c⁰), to which their gates tend, ``one``: 1. For
            ``start="none"`` take ``gate``, with which the net was trained.
        gate_init: g_c⁰.
        learning_rate: of the gates' Adam; ``None``: that of the net. A logit moves by about this much a step at most: where an
            epoch has few steps, it takes a higher one to get from g_c⁰ below 0 in the first two or three.
        epsilon: of the gates' Adam. Part of the method: λ is of its size, and it decides whether unseen values are dropped.
        embedding: optimizer of the tables during the search. ``dense``, as in the released code, has the rate
            ``embedding_learning_rate`` of ``fit.optimizer``, or ``learning_rate`` where that is unset, also where ``fit``
            itself has ``adagrad`` at a higher one. ``None``: as ``fit`` has it.
        start: weights in the result, for re-training; ``rewind``: after epoch T_c; ``same_seed``: the initial ones (the
            paper's l.t.h.); ``random``: none (r.i.); ``none``: the last ones, for use without re-training (w.o.).

    Raises:
        ConfigError: a value out of range.
    """

    penalty: float = 1e-8
    gamma: float = 2000.0
    epochs: int = 5
    rewind: int = 1
    schedule: Schedule = "code"
    regulariser: Regulariser = "sigmoid"
    keep_scale: KeepScale = "gate"
    gate_init: float = 0.5
    learning_rate: float | None = None
    epsilon: float = 1e-8
    embedding: EmbeddingOptimizerName | None = "dense"
    start: Start = "rewind"

    def __post_init__(self) -> None:
        check_choice("optfs.schedule", self.schedule, get_args(Schedule))
        check_choice("optfs.regulariser", self.regulariser, get_args(Regulariser))
        check_choice("optfs.keep_scale", self.keep_scale, get_args(KeepScale))
        check_choice("optfs.start", self.start, get_args(Start))
        if self.embedding is not None:
            check_choice("optfs.embedding", self.embedding, get_args(EmbeddingOptimizerName))
        check_not_negative("optfs.penalty", self.penalty)
        positive("optfs.epochs", self.epochs)
        positive("optfs.gate_init", self.gate_init)  # else every gate starts closed
        positive("optfs.epsilon", self.epsilon)
        if self.learning_rate is not None:
            positive("optfs.learning_rate", self.learning_rate)
        if not self.gamma >= 1:
            raise ConfigError(f"optfs.gamma is {self.gamma}; expected 1 or more: gates harden as the temperature grows")
        if self.schedule == "code" and self.epochs < 2:
            raise ConfigError(
                "optfs.epochs is 1, and the schedule 'code' goes from τ = 1 in the first epoch to γ in the last; set epochs to "
                "2 or more, or schedule to 'paper'"
            )
        if not 0 <= self.rewind < self.epochs:
            raise ConfigError(
                f"optfs.rewind is {self.rewind} with {self.epochs} epochs; expected 0 to {self.epochs - 1}: weights to go back "
                "to are kept before the last epoch"
            )

    @classmethod
    def paper(cls) -> OptFSConfig:
        """The equations of the paper: τ = γ^(t/T), λ‖g‖₁, gates of 0 and 1 in re-training."""
        return cls(schedule="paper", regulariser="gate", keep_scale="one")

    @classmethod
    def released_code(cls) -> OptFSConfig:
        """What the authors' code does instead: τ from 1, λ Σ σ(τ·g_c), kept rows times 1/σ(g_c⁰)."""
        return cls(schedule="code", regulariser="sigmoid", keep_scale="gate")

    @property
    def temperatures(self) -> list[float]:
        """τ, epoch by epoch."""
        if self.schedule == "paper":
            return [self.gamma ** (t / self.epochs) for t in range(1, self.epochs + 1)]
        return [self.gamma ** (t / (self.epochs - 1)) for t in range(self.epochs)]


# NOTE[DIFF] to the released code: it leaves biases of cross networks out when it rewinds, gates IPNN at τ = 1 to the end and
# even in re-training, does not reshuffle the training rows, and learns vocabularies from all rows; here the whole state_dict
# goes back, all models are gated alike, epochs are shuffled, and vocabularies are the encoder's, of training rows.
# NOTE[DIFF] backbones of the released code have no first-order weights; here those share the gates of their values.
# NOTE[DIFF] kept rows are multiplied by ``keep_scale`` once, where re-training starts, instead of in every step: the same
# model, whose rows then take Adam's steps at their new scale.
def search_optfs(
    model: ModelComponent.Config,
    store: Store,
    config: OptFSConfig,
    *,
    fit: FitConfig,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Selection:
    """Search for the values to keep; reads training rows only.

    Gates are of learned vocabularies, those of sparse and sequence fields and ``criteo_log`` numbers. Hashed fields and
    ``bucket`` numbers have no vocabulary to prune: they are not gated. OOV has a gate in each vocabulary; a closed one sends
    unseen values to padding.

    Args:
        model: the backbone.
        store: with a ``train`` split.
        config: see :class:`OptFSConfig`.
        fit: its ``optimizer`` (of the weights; see ``config.embedding``) and ``precision`` are used, nothing else.
        batch_size: of the search.
        seed: of weights, dropout and the order of rows.
        device: where the model is trained.

    Returns:
        The kept values, the model, and weights to re-train from (``config.start``), kept rows scaled (``config.keep_scale``).
        In the report: ``settings``; ``seconds``; ``values`` (``total``, ``kept``, and ``rows_kept``, the share of their
        occurrences in the training rows); ``epochs`` (each with ``temperature``, ``loss``, penalty included, ``kept``, a share,
        and ``logits``, the five quartiles); ``fields`` (``values`` and ``kept`` by vocabulary); ``frequency`` (the same by
        occurrences ``from``–``to``); ``margin`` (of the ``nearest`` logit to 0, and ``near``, the share within 0.05).

    Raises:
        ConfigError: the model reads no learned vocabulary, has frozen ones (a search loads no pretrained vectors) or bfloat16
            tables that are to be trained by a ``dense`` optimizer; or every gate closed.
        DataError: the store has no training rows, or crosses, whose keys are made of ids.
        TrainingDivergedError: a loss is not finite.
    """
    started = time.perf_counter()
    encoder = store.encoder
    refuse_crosses("OptFS", encoder.schema.fields)
    sizes: dict[str, int] = {}
    network, loader, optimizer = _set_up(model, store, config, fit, batch_size, seed, device)
    for embedding in embeddings(network):
        known = (name for name in embedding.vocabularies if isinstance(encoder.vocabularies.get(name), Vocabulary))
        sizes |= {name: encoder.vocabularies[name].size for name in known}
    if not sizes:
        raise ConfigError(
            "OptFS gates the values of learned vocabularies, and the model reads none (hashed fields and numbers have no "
            "values to drop); give it a sparse or sequence field without hash_size"
        )
    gates = ValueGates(sizes, config.gate_init).to(device)
    strength = config.penalty * (gates.scale if config.regulariser == "gate" else 1.0)
    gated = GatedModel(network, gates, strength)
    rate = fit.optimizer.learning_rate if config.learning_rate is None else config.learning_rate
    gate_optimizer = torch.optim.Adam([gates.logits], lr=rate, eps=config.epsilon)

    after = {"rewind": config.rewind, "same_seed": 0, "none": config.epochs, "random": None}[config.start]
    weights = _snapshot(network) if after == 0 else None
    history: list[dict[str, Any]] = []
    try:
        for epoch, temperature in enumerate(config.temperatures, 1):
            gates.temperature.fill_(temperature)
            title = f"OptFS epoch {epoch}/{config.epochs}"
            loss = train_pass(gated, loader, [optimizer, gate_optimizer], title=title, precision=fit.precision)
            history.append({"temperature": temperature, "loss": loss, **_shares(gates)})
            if epoch == after:
                weights = _snapshot(network)
    finally:
        optimizer.close()
    values = gates.kept()
    if not any(kept.any() for kept in values.values()):
        raise ConfigError(
            f"OptFS closed the gates of all {gates.count} values: penalty {config.penalty:g} outweighs what the data says; "
            "lower it (ten times at first), or take fewer steps (epochs), or a lower learning_rate of the gates"
        )
    if all(kept[1:].all() for kept in values.values()):
        _log.warning(
            "OptFS dropped no value: the lowest logit is %.3g after %d steps at learning rate %g; raise penalty (%g), or the "
            "learning_rate of the gates where the steps are few",
            history[-1]["logits"][0],
            config.epochs * len(loader),
            rate,
            config.penalty,
        )
    if weights is not None:
        weights = _scaled(network, weights, gates, gates.scale if config.keep_scale == "gate" else 1.0)
    return Selection(
        method="optfs",
        encoder_hash=encoder.hash,
        values=values,
        model=model,
        weights=weights,
        report={
            "settings": {**to_json(config), "batch_size": batch_size, "seed": seed},
            "seconds": time.perf_counter() - started,
            "epochs": history,
            **_report(gates, values, _occurrences(store, sizes)),
        },
    )


def control_weights(
    model: ModelComponent.Config,
    store: Store,
    config: OptFSConfig,
    *,
    fit: FitConfig,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The weights of the plain model after ``config.rewind`` epochs of the search's training, without gates.

    Training on from them with a new optimizer is what OptFS's re-training is to be compared with: part of what it gains over
    one training run, it gains by starting from trained weights.

    Args:
        model, store, config, fit, batch_size, seed, device: see :func:`search_optfs`.

    Raises:
        ConfigError: see :func:`search_optfs`.
    """
    network, loader, optimizer = _set_up(model, store, config, fit, batch_size, seed, device)
    try:
        for epoch in range(config.rewind):
            train_pass(network, loader, [optimizer], title=f"control epoch {epoch + 1}", precision=fit.precision)
    finally:
        optimizer.close()
    return _snapshot(network)


def ticket(selection: Selection, encoder: Encoder, model: ModelComponent.Config | None = None) -> GatedModel:
    """The model that is to be re-trained, before compaction: all rows in place, those of dropped values behind closed gates.

    Args:
        selection: of values.
        encoder: the one that it was made with.
        model: another model, which gets the values but not the weights (a transfer); ``None``: the selection's own.

    Raises:
        DataError: another encoder.
        ConfigError: the selection has no values; or neither it nor the caller has a model.
    """
    check_encoder(selection, encoder)
    config = model or selection.model
    if selection.values is None or config is None:
        missing = "values" if selection.values is None else "model"
        raise ConfigError(f"the selection by {selection.method} has no {missing}; expected one by optfs, or a model beside it")
    network = build_model(config, encoder.layout)
    if selection.weights is not None and config == selection.model:
        network.load_state_dict(dict(selection.weights))
    read = {name for embedding in embeddings(network) for name in embedding.vocabularies}
    return GatedModel(network, ClosedGates({name: kept for name, kept in selection.values.items() if name in read}))


def _set_up(
    model: ModelComponent.Config,
    store: Store,
    config: OptFSConfig,
    fit: FitConfig,
    batch_size: int,
    seed: int,
    device: torch.device | str,
) -> tuple[ModelComponent, Loader, Optimizer]:
    if model.embedding.frozen:
        raise ConfigError(
            f"model.embedding.frozen names {', '.join(model.embedding.frozen)}, but the search has no pretrained vectors, so "
            "these rows would be zeros; leave frozen out"
        )
    settings: OptimizerConfig = fit.optimizer
    if config.embedding not in (None, settings.embedding):
        settings = replace(settings, embedding=config.embedding, embedding_l2_mode=None)
    if model.embedding.row_dtype == "bfloat16" and settings.embedding == "dense":
        raise ConfigError("bfloat16 tables need a row-wise optimizer; set optfs.embedding, e.g. to 'lazy_adam'")
    pin = torch.device(device).type == "cuda"
    loader = Loader(store.split("train"), batch_size, shuffle=True, seed=seed, pin_memory=pin)
    seed_everything(seed)
    network = build_model(model, store.encoder.layout).to(device)
    return network, loader, build_optimizer(network, settings)


def _snapshot(network: nn.Module) -> dict[str, Tensor]:
    """Current weights, each a tensor of its own, in main memory."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in network.state_dict().items()}


def _scaled(network: ModelComponent, weights: dict[str, Tensor], gates: ValueGates, scale: float) -> dict[str, Tensor]:
    """The weights with all rows of gated vocabularies times ``scale``."""
    network.load_state_dict(weights)
    for embedding in embeddings(network):
        for name, rows in embedding.vocabularies.items():
            if name in gates.sizes:
                rows.mul_(scale)
    return _snapshot(network)


def _shares(gates: ValueGates) -> dict[str, Any]:
    logits = gates.logits.detach()[1:, 0].cpu().double().numpy()
    return {"kept": float((logits > 0).mean()), "logits": np.quantile(logits, [0, 0.25, 0.5, 0.75, 1]).tolist()}


def _occurrences(store: Store, sizes: dict[str, int]) -> dict[str, npt.NDArray[np.int64]]:
    """How often every id of these vocabularies occurs in the training rows."""
    split, layout = store.split("train"), store.encoder.layout
    counts = {name: np.zeros(size, np.int64) for name, size in sizes.items()}
    for start in range(0, split.num_rows, BLOCK_ROWS):
        block = split.sparse[start : start + BLOCK_ROWS].numpy()
        for i, column in enumerate(layout.sparse):
            if column.table in sizes:
                counts[column.table] += np.bincount(block[:, i], minlength=sizes[column.table])
    for sequence in layout.sequences:
        if sequence.table in sizes:
            values = split.sequences[sequence.name][0].numpy()
            for start in range(0, len(values), BLOCK_ROWS):
                counts[sequence.table] += np.bincount(values[start : start + BLOCK_ROWS], minlength=sizes[sequence.table])
    return counts


def _report(gates: ValueGates, values: Values, counts: dict[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
    """What was kept: of all, by vocabulary, by frequency; and how clearly. Padding is no value."""
    kept_M = np.concatenate([kept[1:] for kept in values.values()])
    counts_M = np.concatenate([counts[name][1:] for name in values])
    logits = gates.logits.detach()[1:, 0].abs()
    bucket_M = np.frexp(counts_M)[1]  # 0; 1; 2–3; 4–7; …: the number of bits
    frequency = [
        {"from": 2**bits // 2, "to": max(2**bits - 1, 0), "values": int(at.sum()), "kept": int(kept_M[at].sum())}
        for bits in np.unique(bucket_M).tolist()
        for at in [bucket_M == bits]
    ]
    return {
        "values": {
            "total": len(kept_M),
            "kept": int(kept_M.sum()),
            "rows_kept": float(counts_M[kept_M].sum() / max(counts_M.sum(), 1)),
        },
        "fields": {name: {"values": len(kept) - 1, "kept": int(kept.sum())} for name, kept in values.items()},
        "frequency": frequency,
        "margin": {"nearest": logits.min().item(), "near": (logits < _NEAR).double().mean().item()},
    }
