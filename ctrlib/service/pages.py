"""What the service says of itself: OpenAPI, an example request, and a page to try one."""

from __future__ import annotations

from typing import Any

from ctrlib.ranking import Ranker
from ctrlib.schema import DenseField, Field, SequenceField


def openapi(ranker: Ranker, candidates: int) -> dict[str, Any]:
    """OpenAPI 3.1 of the service, with the fields of the model that it serves."""
    fields = {f.name: f for f in ranker.artifact.schema.fields}

    def side(names: tuple[str, ...]) -> dict[str, Any]:
        return {"type": "object", "required": list(names), "properties": {name: _kind(fields.get(name)) for name in names}}

    request = {
        "type": "object",
        "required": ["context", "candidates"],
        "additionalProperties": False,
        "properties": {
            "context": side(ranker.context_fields),
            "candidates": {"type": "array", "maxItems": candidates, "items": side(ranker.candidate_fields)},
        },
    }
    ranking = {
        **request,
        "properties": {
            **request["properties"],  # type: ignore[dict-item]
            "top_k": {"type": ["integer", "null"], "minimum": 1},
            "label": {"enum": [*ranker.labels, None]},
        },
    }
    one = {"type": "number", "minimum": 0, "maximum": 1}
    several = one if len(ranker.labels) == 1 else {"type": "array", "items": one}
    best = {"type": "object", "properties": {"index": {"type": "integer"}, "probability": one}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ctrlib", "version": str(ranker.artifact.info.get("ctrlib", "0"))},
        "paths": {
            "/score": {"post": _operation("Probabilities, in the order of the candidates", request, "probabilities", several)},
            "/rank": {"post": _operation("The best candidates, best first", ranking, "candidates", best)},
            "/reload": {"post": {"summary": "Load the artifact again", "responses": _answers("409")}},
            "/healthz": {"get": {"summary": "Whether the service is up", "responses": _answers()}},
            "/metadata": {"get": {"summary": "Fields, labels, calibration of the model", "responses": _answers()}},
            "/metrics": {"get": {"summary": "Counters for Prometheus", "responses": _answers()}},
        },
    }


def _answers(*errors: str) -> dict[str, Any]:
    meaning = {
        "400": "the body is not JSON",
        "409": "the new model was refused; the one before goes on",
        "413": "the body or the list of candidates is too large",
        "422": "a field is absent or cannot be what it should: see errors",
        "503": "too many requests wait",
    }
    return {"200": {"description": "done"}, **{status: {"description": meaning[status]} for status in errors}}


def _operation(summary: str, request: dict[str, Any], key: str, items: dict[str, Any]) -> dict[str, Any]:
    shape = {"type": "object", "properties": {key: {"type": "array", "items": items}, "model": {"type": "string"}}}
    answers = _answers("400", "413", "422", "503")
    answers["200"]["content"] = {"application/json": {"schema": shape}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": answers,
    }


def _kind(f: Field | None) -> dict[str, Any]:
    if isinstance(f, DenseField):
        return {"type": ["number", "null"]}
    if isinstance(f, SequenceField):
        text = ["string"] if f.separator is not None else []
        return {"type": ["array", *text, "null"]}
    return {"type": ["string", "integer", "null"]} if f is not None else {}


def example(ranker: Ranker) -> dict[str, Any]:
    """A request with everything missing but lists, which are empty, and times, which are 0 or a day."""
    fields = {f.name: f for f in ranker.artifact.schema.fields}
    time = "2024-01-01T00:00:00" if any(ranker.artifact.encoder.clocks.values()) else 0

    def value(name: str) -> object:
        if name not in fields:
            return time if name == ranker.artifact.schema.time else []
        return [] if isinstance(fields[name], SequenceField) else None

    candidate = {name: value(name) for name in ranker.candidate_fields}
    return {"context": {name: value(name) for name in ranker.context_fields}, "candidates": [candidate, candidate]}


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>ctrlib</title>
<style>body{font:16px system-ui;margin:2em auto;max-width:60em}textarea{width:100%;height:22em;font:14px monospace}
pre{background:#f4f4f4;padding:1em;overflow:auto}button{font:inherit;margin:.5em 1em .5em 0}</style>
<h1>ctrlib</h1><p id="about">…</p>
<textarea id="body" aria-label="request"></textarea><br>
<button id="score">Score</button><button id="rank">Rank</button>
<pre id="answer"></pre>
<script>
const at = id => document.getElementById(id);
const show = value => { at("answer").textContent = JSON.stringify(value, null, 2); };
fetch("metadata").then(r => r.json()).then(m => {
  at("about").textContent = `Model ${m.model}: ${m.labels.join(", ")}; `
    + `${m.context.length} fields of the context, ${m.candidate.length} of each candidate`;
  at("body").value = JSON.stringify(m.example, null, 2);
}).catch(e => show(String(e)));
for (const path of ["score", "rank"]) at(path).onclick = async () => {
  try {
    const r = await fetch(path, {method: "POST", headers: {"content-type": "application/json"}, body: at("body").value});
    show(await r.json());
  } catch (e) { show(String(e)); }
};
</script></html>
"""
