"""Samplers of Optuna as ``ctrlib search`` sets them. Needs optuna (``pip install 'ctrlib[search]'``)."""

from __future__ import annotations

import warnings

import optuna

_STARTUP = 8


def tpe_sampler(seed: int) -> optuna.samplers.TPESampler:
    """TPE with everything that differs between versions of Optuna said out loud.

    ``multivariate`` with ``group``: parameters that are there together are sampled together, so that settings of one block do
    not speak for those of another; without ``group`` only parameters of all trials would be. ``constant_liar``: workers side
    by side do not all try the same.
    """
    with warnings.catch_warnings():  # that these options are experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=_STARTUP, multivariate=True, group=True, constant_liar=True
        )
