"""The page that tries a request, in Chromium: skipped without browser, chromedriver or selenium. Loopback alone."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("selenium")

import uvicorn
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from ctrlib.ranking import Ranker
from ctrlib.service import Limits, create_app
from tests.test_ranking import requests, save

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(DRIVER is None or BROWSER is None, reason="no chromedriver or no Chromium")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "artifact"
    save(folder, "dnn")
    return folder


@pytest.fixture(scope="module")
def url(artifact: Path) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(artifact, Limits()), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        end = time.monotonic() + 30
        while not server.started and time.monotonic() < end:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for option in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{option}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    driver = Chrome(options, ChromeService(DRIVER))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


def answer(browser: Chrome, button: str, body: str) -> dict[str, object]:
    """What the page shows after a click."""
    area = browser.find_element(By.ID, "body")
    area.clear()
    area.send_keys(body)
    browser.execute_script("document.getElementById('answer').textContent = ''")
    browser.find_element(By.ID, button).click()
    shown = browser.find_element(By.ID, "answer")
    WebDriverWait(browser, 30).until(lambda _: shown.text != "")
    found: dict[str, object] = json.loads(shown.text)
    return found


def test_a_request_by_hand(browser: Chrome, url: str, artifact: Path) -> None:
    browser.get(url)
    area = browser.find_element(By.ID, "body")
    WebDriverWait(browser, 30).until(lambda _: area.get_property("value") != "")
    example = json.loads(str(area.get_property("value")))
    assert set(example) == {"context", "candidates"}
    assert "3 fields of the context" in browser.find_element(By.ID, "about").text
    browser.find_element(By.ID, "score").click()  # the example as it stands
    shown = browser.find_element(By.ID, "answer")
    WebDriverWait(browser, 30).until(lambda _: "probabilities" in shown.text)

    context, candidates = requests(1, 4)[0]
    body = {"context": context, "candidates": candidates}
    expected = Ranker.load(artifact).score(context, candidates).tolist()
    assert answer(browser, "score", json.dumps(body))["probabilities"] == pytest.approx(expected, abs=1e-6)
    best = answer(browser, "rank", json.dumps({**body, "top_k": 1}))["candidates"]
    assert best == [{"index": expected.index(max(expected)), "probability": pytest.approx(max(expected), abs=1e-6)}]
    assert "not JSON" in str(answer(browser, "score", "{")["error"])
