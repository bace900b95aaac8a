"""The service over HTTP: right answers, wrong requests, fuzz, load, swaps. Everything on loopback and bounded in time."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx2")
pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from ctrlib import artifact
from ctrlib.calibration import Calibration
from ctrlib.data.encoder import Encoder
from ctrlib.data.requests import RequestEncoder
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import preset
from ctrlib.ranking import Ranker
from ctrlib.schema import DataError
from ctrlib.service import Engine, Limits, create_app
from ctrlib.service import app as app_module
from ctrlib.service import engine as engine_module
from tests.data.test_requests import HISTORY
from tests.models.small import awake, shrunk
from tests.test_ranking import offline, requests, save

LIMITS = Limits(body_bytes=20_000, candidates=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A link to an artifact."""
    place = tmp_path_factory.mktemp("artifacts")
    save(place / "first", "dnn")
    (place / "now").symlink_to(place / "first")
    return place


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with TestClient(create_app(folder / "now", LIMITS)) as client:
        yield client


@pytest.fixture(scope="module")
def multiplying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that multiplies its numbers, so that large ones overflow."""
    return save(tmp_path_factory.mktemp("artifacts") / "deepfm", "deepfm")


def body(seed: int = 1, count: int = 4) -> dict[str, Any]:
    context, candidates = requests(1, count, seed=seed)[0]
    return {"context": context, "candidates": candidates}


def test_scores_are_those_of_evaluation(client: TestClient, folder: Path) -> None:
    loaded = artifact.load(folder / "first")
    for context, candidates in requests(5, 4):
        answer = client.post("/score", json={"context": context, "candidates": candidates})
        assert answer.status_code == 200
        np.testing.assert_allclose(answer.json()["probabilities"], offline(loaded, (context, candidates)), rtol=0, atol=1e-6)
        best = client.post("/rank", json={"context": context, "candidates": candidates, "top_k": 2}).json()["candidates"]
        order = np.argsort([-p for p in answer.json()["probabilities"]], kind="stable")[:2]
        assert [entry["index"] for entry in best] == order.tolist()
    assert client.post("/score", json={**body(), "candidates": []}).json()["probabilities"] == []


def test_other_pages(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    about = client.get("/metadata").json()
    assert about["context"] == ["user", "age", "genres"]
    assert about["labels"] == ["label"]
    assert client.post("/score", json=about["example"]).status_code == 200
    text = client.get("/metrics").text
    assert 'ctrlib_requests_total{path="/healthz",status="200"}' in text
    assert f'ctrlib_model_info{{model="{about["model"]}"}} 1' in text
    operations = client.get("/openapi.json").json()["paths"]
    assert operations["/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]["required"]
    assert "<textarea" in client.get("/").text
    assert client.get("/score").status_code == 405
    assert client.get("/nothing").status_code == 404


def test_request_ids(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    made = client.get("/healthz", headers={"x-request-id": "a b\t"}).headers["x-request-id"]
    assert len(made) == 32


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe{}", 400, "not UTF-8"),
        (b"[" * 9_000, 400, "nested too deeply|not JSON"),
        (b'{"context": {"user": NaN}, "candidates": []}', 400, "NaN is no JSON number"),
        (b'{"context": {"user": -Infinity}}', 400, "-Infinity is no JSON number"),
        (b"9" * 5_000, 400, "not JSON"),
        (b"[]", 422, "is a list"),
        (b"x" * 30_000, 413, "larger than 20000 bytes"),
        (b'{"context": {}, "candidates": [' + b"{}," * 60 + b"{}]}", 413, "61 candidates; at most 50"),
    ],
)
def test_bodies_that_are_refused(client: TestClient, content: bytes, status: int, reason: str) -> None:
    answer = client.post("/score", content=content)
    assert answer.status_code == status
    assert any(part in answer.json()["error"] for part in reason.split("|"))
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_errors_name_every_field(client: TestClient) -> None:
    wrong = body()
    wrong["context"] = {"user": "007", "age": "x", "genres": "\ud800"}
    wrong["candidates"][2] = {"city": 1.5}
    answer = client.post("/score", content=json.dumps(wrong))
    assert answer.status_code == 422
    found = {entry["field"]: entry["message"] for entry in answer.json()["errors"]}
    assert set(found) == {"user", "age", "genres", "city", "price"}
    assert "the context" in found["age"]
    assert "candidate 3" in found["city"]
    assert "candidate 3 has no field 'price'" in found["price"]
    for change, field in (
        ({"context": 3}, "context"),
        ({"candidates": {}}, "candidates"),
        ({"candidates": [3]}, "candidates"),
        ({"top_k": 1}, "top_k"),
    ):
        answer = client.post("/score", json=body() | change)
        assert answer.status_code == 422
        assert [entry["field"] for entry in answer.json()["errors"]] == [field]
    wrong_options: list[dict[str, Any]] = [{"top_k": 0}, {"top_k": True}, {"top_k": 1.0}, {"label": "x"}, {"label": []}]
    for change in wrong_options:
        answer = client.post("/rank", json=body() | change)
        assert [entry["field"] for entry in answer.json()["errors"]] == list(change)


def test_keys_that_are_no_text(client: TestClient) -> None:
    answer = client.post("/score", content=b'{"\\ud800": 1, "context": {}, "candidates": []}')
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "\\ud800"
    context = '{"user": 1, "age": 1, "\\ud800": 1}'
    answer = client.post("/score", content=f'{{"context": {context}, "candidates": []}}')
    assert [entry["field"] for entry in answer.json()["errors"]] == ["genres"]


def test_many_unknown_keys_are_not_all_looked_at(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def counting(key: str, choices: Any) -> str:
        looked.append(key)
        return ""

    monkeypatch.setattr(app_module, "suggest", counting)
    answer = client.post("/score", json={f"k{i}": 0 for i in range(1000)} | body())
    assert answer.status_code == 422
    assert [entry["field"] for entry in answer.json()["errors"]] == looked == [f"k{i}" for i in range(16)]


KEYS = st.text(max_size=5) | st.just("\ud800")
ODD: list[Any] = ["g1|g2", "Stadt 1", "\ud800", "a\udfff", 2**63, 2**64, 10**30, -(10**400), 1e20, -1e20, 3e38, 1e300]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
ROWS = st.fixed_dictionaries({}, optional={"city": VALUES, "price": VALUES, "extra": VALUES})
BODIES = st.one_of(
    VALUES.map(json.dumps),
    st.binary(max_size=200),
    st.fixed_dictionaries(
        {
            "context": st.fixed_dictionaries({"user": VALUES, "age": VALUES, "genres": VALUES}),
            "candidates": st.lists(st.fixed_dictionaries({"city": VALUES, "price": VALUES}), max_size=4),
        },
        optional={"top_k": VALUES, "label": VALUES},
    ).map(json.dumps),
    st.fixed_dictionaries({}, optional={"context": VALUES, "candidates": st.lists(ROWS, max_size=3)}).map(json.dumps),
)


PAST: dict[str, Any] = {"clicked": [1, 2, 3, 4], "words": [["a"], [], ["b", "c"], ["a"]], "when": [1, 5, 8, 12], "now": 10}
HISTORIES = st.fixed_dictionaries(
    {
        "context": st.fixed_dictionaries({name: st.just(value) | VALUES for name, value in PAST.items()}),
        "candidates": st.lists(st.fixed_dictionaries({"item": st.integers(0, 6) | VALUES}), max_size=4),
    },
    optional={"\ud800": VALUES},
).map(json.dumps)
REQUESTS = st.one_of(st.tuples(st.sampled_from(["dnn", "deepfm"]), BODIES), st.tuples(st.just("din"), HISTORIES))


@pytest.fixture(scope="module")
def clients(client: TestClient, multiplying: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, TestClient]]:
    """Models that add up, that multiply, and that read a history."""
    encoder = Encoder.fit(HISTORY, [{**PAST, "item": i % 5, "label": i % 2} for i in range(20)])
    config = shrunk(preset("din"))
    place = tmp_path_factory.mktemp("artifacts") / "din"
    artifact.save(place, encoder, awake(build_model(config, encoder.layout)).eval(), config)
    with TestClient(create_app(multiplying, LIMITS)) as deepfm, TestClient(create_app(place, LIMITS)) as din:
        yield {"dnn": client, "deepfm": deepfm, "din": din}


def fuzz(client: TestClient, content: str | bytes, path: str) -> None:
    answer = client.post(path, content=content)
    assert answer.status_code in (200, 400, 413, 422), (answer.status_code, content)
    if answer.status_code == 200:
        numbers = answer.json().get("probabilities", [])
        assert all(math.isfinite(p) and 0 <= p <= 1 for p in numbers)
    else:
        assert answer.json()["error"]


COMMON: Any = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=100, **COMMON)
@given(asked=REQUESTS, path=st.sampled_from(["/score", "/rank"]))
def test_no_body_makes_an_error_of_ours(clients: dict[str, TestClient], asked: tuple[str, str | bytes], path: str) -> None:
    fuzz(clients[asked[0]], asked[1], path)


@pytest.mark.slow
@settings(max_examples=3000, **COMMON)
@given(asked=REQUESTS, path=st.sampled_from(["/score", "/rank"]))
def test_no_body_of_many_makes_an_error_of_ours(
    clients: dict[str, TestClient], asked: tuple[str, str | bytes], path: str
) -> None:
    fuzz(clients[asked[0]], asked[1], path)


def test_a_history_that_cannot_be_read_is_named_beside_other_fields(clients: dict[str, TestClient]) -> None:
    wrong = {"context": PAST | {"when": "x", "words": 3}, "candidates": [{"item": "007"}]}
    answer = clients["din"].post("/score", json=wrong)
    assert answer.status_code == 422
    assert [entry["field"] for entry in answer.json()["errors"]] == ["words", "when", "item"]
    answer = clients["din"].post("/score", json={"context": PAST | {"clicked": [1]}, "candidates": [{"item": 1}]})
    assert [entry["field"] for entry in answer.json()["errors"]] == ["words"]


def test_requests_that_come_together_get_their_own_answers(folder: Path) -> None:
    ranker = Ranker.load(folder / "first", hoisting=False)
    many = requests(40, 3, seed=3)
    wrong: tuple[dict[str, Any], list[dict[str, Any]]] = ({"user": [], "age": None, "genres": None}, [])

    async def run() -> list[Any]:
        engine = Engine(folder / "first")
        engine.start()
        calls = [engine.score(*request) for request in [*many, wrong]]
        found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        await engine.stop()
        assert "ctrlib_batches_total 2\n" in engine.metrics.text("m", 0)
        return found

    *answers, refused = asyncio.run(run())
    assert "field 'user'" in str(refused)
    for request, (_, shown) in zip(many, answers, strict=True):
        np.testing.assert_allclose(shown, ranker.score(*request), rtol=0, atol=1e-6)


def test_a_fault_with_one_request_is_no_fault_of_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = requests(5, 3, seed=3)
    encode = RequestEncoder.encode

    def faulty(self: RequestEncoder, context: Any, candidates: Any) -> Any:
        if context == many[2][0]:
            raise OverflowError("beyond")
        return encode(self, context, candidates)

    async def run() -> list[Any]:
        engine = Engine(folder / "first")
        engine.start()
        monkeypatch.setattr(RequestEncoder, "encode", faulty)
        found = await asyncio.wait_for(asyncio.gather(*(engine.score(*r) for r in many), return_exceptions=True), 60)
        await engine.stop()
        return found

    assert [type(answer) for answer in asyncio.run(run())] == [tuple, tuple, OverflowError, tuple, tuple]


def test_too_many_waiting_are_told_so(folder: Path) -> None:
    async def run() -> list[Any]:
        engine = Engine(folder / "first", Limits(waiting=2, seconds=30))
        engine.start()
        calls = [engine.score(*request) for request in requests(6, 2)]
        found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        await engine.stop()
        return found

    answers = asyncio.run(run())
    assert sum(isinstance(a, engine_module.BusyError) for a in answers) == 4


def test_too_many_bytes_waiting_are_told_so(folder: Path) -> None:
    async def run() -> list[Any]:
        engine = Engine(folder / "first", Limits(waiting_bytes=100, seconds=30))
        engine.start()
        calls = [engine.score(*request, 40) for request in requests(6, 2)]
        found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        later = await engine.score(*requests(1, 2)[0], 100)  # none is held any more
        await engine.stop()
        return [*found, later]

    answers = asyncio.run(run())
    assert [isinstance(a, engine_module.BusyError) for a in answers] == [False, False, True, True, True, True, False]


def test_a_swap_drops_and_mixes_nothing(folder: Path) -> None:
    """Requests without a pause, while the model changes: each answer is that of the model that it names."""
    place = folder / "swapped"
    save(folder / "second", "dnn")
    artifact.calibrate(folder / "second", {"label": Calibration(method="platt", slope=1.0, intercept=2.0)})
    place.symlink_to(folder / "first")
    many = requests(6, 3, seed=8)

    async def run() -> tuple[list[tuple[int, str, Any]], list[str]]:
        engine = Engine(place)
        engine.start()
        answers: list[tuple[int, str, Any]] = []
        done = asyncio.Event()

        async def ask() -> None:
            while not done.is_set():
                for at, request in enumerate(many):
                    serving, shown = await engine.score(*request)
                    answers.append((at, serving.version, shown))

        asking = asyncio.create_task(ask())
        versions = [engine.serving.version]
        for target in ("second", "first"):
            (folder / "next").symlink_to(folder / target)
            (folder / "next").replace(place)
            versions.append(await engine.reload())
            await asyncio.sleep(0.2)
        (folder / "next").symlink_to(folder / "nothing")
        (folder / "next").replace(place)
        with pytest.raises(DataError, match="there is no such folder"):
            await engine.reload()
        assert engine.serving.version == versions[0]
        done.set()
        await asking
        await engine.stop()
        return answers, versions

    answers, versions = asyncio.run(run())
    assert versions[0] == versions[2] != versions[1]
    expected = {
        version: [Ranker.load(folder / name, hoisting=False).score(*request) for request in many]
        for version, name in zip(versions[:2], ("first", "second"), strict=True)
    }
    assert {version for _, version, _ in answers} == set(expected)
    for at, version, shown in answers:
        np.testing.assert_allclose(shown, expected[version][at], rtol=0, atol=1e-6)


def test_reload_over_http(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = client.get("/healthz").json()["model"]
    damaged = folder / "damaged"
    damaged.symlink_to(folder / "nowhere")
    damaged.replace(folder / "now")
    answer = client.post("/reload")
    assert answer.status_code == 409
    assert "the model before goes on" in answer.json()["error"]
    assert client.post("/score", json=body()).json()["model"] == before
    damaged.symlink_to(folder / "first")
    damaged.replace(folder / "now")
    with monkeypatch.context() as patch:

        def broken(*given: Any, **options: Any) -> Ranker:
            raise KeyError("of a block of one's own")

        patch.setattr(Ranker, "load", broken)
        answer = client.post("/reload")
    assert answer.status_code == 409
    assert client.post("/score", json=body()).json()["model"] == before
    assert client.post("/reload").json()["model"] == before
    assert "ctrlib_reloads_total 1" in client.get("/metrics").text


def test_a_number_that_overflows_in_the_model_is_refused(multiplying: Path) -> None:
    with TestClient(create_app(multiplying, LIMITS)) as client:
        large = body()
        large["candidates"][2]["price"] = 1e20
        for path in ("/score", "/rank"):
            answer = client.post(path, json=large)
            assert answer.status_code == 422, answer.text
            assert "candidate 3: the model's numbers overflow" in answer.json()["errors"][0]["message"]

    async def run() -> list[Any]:
        engine = Engine(multiplying)
        engine.start()
        calls = [engine.score(b["context"], b["candidates"]) for b in (body(), large, body(2))]
        found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        await engine.stop()
        return found

    first, refused, last = asyncio.run(run())
    assert "overflow" in str(refused)
    ranker = Ranker.load(multiplying, hoisting=False)
    for seed, (_, shown) in ((1, first), (2, last)):  # whoever came at the same time has an answer
        b = body(seed)
        np.testing.assert_allclose(shown, ranker.score(b["context"], b["candidates"]), rtol=0, atol=1e-6)
