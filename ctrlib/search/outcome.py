"""What a finished search found: who is trained again, and what the report says of the search itself."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ctrlib.config import ConfigError
from ctrlib.files import json_text
from ctrlib.search.fidelity import active_rungs, one_epoch
from ctrlib.search.finish import Finalist, trained_again
from ctrlib.search.sampling import TOO_SLOW, failure, others_of, trial_scores
from ctrlib.search.trials import Metric, sign
from ctrlib.search.worker import Work, after_one_epoch

_log = logging.getLogger("ctrlib")


def finalists(study: Study, work: Work) -> tuple[list[Finalist], list[Finalist]]:
    """The best trials on all rows that there is time to train again, and those on the front of quality, latency and size; and
    the points of the front that there is no time for. Where no trial came to all rows, the best of the highest rung.

    Raises:
        ConfigError: there is none; says why trials failed.
    """
    trials = _compared(study, work)
    if not trials:
        ended = [failure(t) or t.user_attrs.get("stopped") for t in study.get_trials(deepcopy=False)]
        reasons = list(dict.fromkeys(str(reason) for reason in ended if reason))
        latencies = [t.user_attrs["latency_ms"] for t in study.get_trials(deepcopy=False) if "latency_ms" in t.user_attrs]
        fastest = f" The fastest model took {min(latencies):.3g} ms." if work.config.latency_ms and latencies else ""
        raise ConfigError(f"no trial succeeded: {'; '.join(reasons[:3]) or 'there was no time for any'}.{fastest}")
    best: dict[str, FrozenTrial] = {}  # the same settings once
    for trial in sorted(trials, key=lambda t: -sign(work.config.metric) * float(t.value or 0)):
        best.setdefault(json_text(trial.params), trial)
    ranked = [_finalist(t, work, main=True) for t in best.values()]
    used = time.time() - work.began
    done = trained_again(work.journal.parent, ranked, work.study, work.config.finish_seeds)
    costs = [0.0 if t.number in done else _seconds(t, work) for t in best.values()]
    chosen = ranked[: work.budget.affordable(used, costs)]
    front = [f for f in ranked if not any(_dominates(other, f, work.config.metric) for other in ranked)]
    extra = [replace(f, main=False) for f in front if f.number not in {c.number for c in chosen}]
    seconds = {t.number: _seconds(t, work) for t in best.values()}
    count = work.budget.extra(used, [seconds[f.number] for f in chosen], [seconds[f.number] for f in extra])
    return [*chosen, *extra[:count]], extra[count:]


def _compared(study: Study, work: Work) -> list[FrozenTrial]:
    """Trials on the highest rung that any came to: one that is not too slow for all rows, and did not fail."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    trials = [t for t in ended if t.intermediate_values and t.value is not None and not t.user_attrs.get(TOO_SLOW)]
    highest = max((t.last_step or 0 for t in trials), default=0)
    return [t for t in trials if t.last_step == highest]


def _seconds(trial: FrozenTrial, work: Work) -> float:
    """On all rows; of a trial that did not come to them, and of one of an earlier version, by the rows that it had."""
    if "whole_seconds" in trial.user_attrs:
        return float(trial.user_attrs["whole_seconds"])
    shares = sum(work.rungs[rung] for rung in trial.intermediate_values)
    return float(trial.user_attrs.get("seconds", 0.0)) / max(shares, work.rungs[0])


def _finalist(trial: FrozenTrial, work: Work, main: bool) -> Finalist:
    return Finalist(
        number=trial.number,
        name=str(trial.user_attrs["name"]),
        params=dict(trial.params),
        value=float(trial.value or 0.0),
        single_epoch=bool(trial.user_attrs["single_epoch"]),
        latency_ms=float(trial.user_attrs["latency_ms"]),
        parameters=int(trial.user_attrs["parameters"]),
        main=main,
    )


def _dominates(a: Finalist, b: Finalist, metric: Metric) -> bool:
    first, second = ((sign(metric) * f.value, -f.latency_ms, -f.parameters) for f in (a, b))
    return all(x >= y for x, y in zip(first, second, strict=True)) and first != second


def facts(study: Study, work: Work, left_out: Sequence[Finalist]) -> dict[str, Any]:
    """What the report says of the search itself; ``left_out``: points of the front, see :func:`finalists`."""
    trials = study.get_trials(deepcopy=False)
    scores = trial_scores(others_of(study), sign(work.config.metric))
    active = active_rungs(len(work.rungs), scores)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    compared = max((t.last_step or 0 for t in _compared(study, work)), default=0)
    curve = [
        {"seconds": t.user_attrs["at"], "trial": t.number, "value": t.value}
        for t in sorted(complete, key=lambda t: t.number)
        if "at" in t.user_attrs
    ]
    return {
        "metric": work.config.metric,
        "method": work.config.method,
        "study": work.study,
        "trials": {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState},
        "compared_on": work.rungs[compared],  # of the training rows, before the best are trained on all of them
        "rungs": [{"share": share, "used": i in active} for i, share in enumerate(work.rungs)],
        "noise": study.user_attrs.get("noise"),
        "one_epoch": one_epoch(*after_one_epoch(others_of(study), work)),
        "importance": _importance(study, complete),
        "curve": sorted(curve, key=lambda point: float(point["seconds"] or 0)),
        "failures": [
            {"trial": t.number, "params": t.params, "reason": reason} for t in trials if (reason := failure(t)) is not None
        ],
        "stopped": [
            {"trial": t.number, "name": t.user_attrs.get("name"), "reason": t.user_attrs["stopped"]}
            for t in trials
            if "stopped" in t.user_attrs
        ],
        "left_out": [{"trial": f.number, "name": f.name, "search": f.value} for f in left_out],
        "lost": len({t.user_attrs["continues"] for t in trials if "continues" in t.user_attrs}),
    }


def _importance(study: Study, complete: Sequence[FrozenTrial]) -> dict[str, float]:
    """Of the parameters that all trials on all rows have, by PED-ANOVA (arXiv:2304.10255); empty of fewer than four trials."""
    if len(complete) < 4:
        return {}
    try:
        with warnings.catch_warnings():  # that some values have few trials
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError) as error:  # such as trials of one and the same value
        _log.info("no importance of parameters: %s", error)
        return {}
    return {name: float(share) for name, share in found.items()}
