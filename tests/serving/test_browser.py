"""The chat page in a real browser, served by the command line to a headless Chromium."""

import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from dreamllm_jax.checkpoints.saved import write_description, write_params
from dreamllm_jax.data import images
from dreamllm_jax.data.document import Image, Text
from dreamllm_jax.generation.documents import png
from dreamllm_jax.generation.prompts import Painted, Written
from dreamllm_jax.serving.conversation import read_settings
from dreamllm_jax.serving.server import make_reply
from tests.painter import TOKENIZER, model_that_paints
from tests.tiny import DREAM_SIZE

ROOT = Path(__file__).parent.parent.parent
ARTIFACTS = Path(os.environ.get("DREAMLLM_JAX_ARTIFACTS", ROOT / "artifacts"))  # screenshots stay here
PATIENCE = 240  # seconds, on a busy machine
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: apt-get install chromium chromium-driver"),
]


@pytest.fixture(scope="module")
def model():
    return model_that_paints()


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """Of a server that was started as people start it."""
    directory = tmp_path_factory.mktemp("model")
    write_description(directory, model[0].config, TOKENIZER)
    write_params(directory, {path: np.asarray(leaf) for path, leaf in flatten_dict(model[1], sep="/").items()})
    command = [sys.executable, "-m", "dreamllm_jax.generate", "serve", f"--checkpoint={directory}", "--port=0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield re.match(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, "Ctrl-C ends it without a fuss"


@contextlib.contextmanager
def browser(width: int, height: int):
    """A window of so many pixels; a narrow one is a phone's."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Many containers cannot have a sandbox.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield driver
        severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        # What was refused is told on the page too; nothing was blocked by the policy, nothing failed in the script.
        assert all("status of 4" in message for message in severe), severe
    finally:
        driver.quit()


def shown(driver, selector: str) -> list:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def until(driver, condition) -> None:
    WebDriverWait(driver, PATIENCE, poll_frequency=0.1).until(lambda _: condition())


def idle(driver) -> bool:
    return driver.find_element(By.ID, "send").is_displayed()


def is_drawn(driver, image) -> bool:
    return driver.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", image)


def data_of(image) -> bytes:
    return base64.b64decode(image.get_attribute("src").partition("base64,")[2])


def choose(driver, **settings) -> None:
    if not driver.find_element(By.ID, "settings").is_displayed():
        driver.find_element(By.ID, "choose").click()
    for name, value in settings.items():
        setting = driver.find_element(By.NAME, name)
        setting.clear()
        setting.send_keys(str(value))
    driver.find_element(By.ID, "choose").click()


def keep(driver, name: str) -> None:
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    assert driver.save_screenshot(str(ARTIFACTS / name))


def test_a_conversation_with_pictures(address, model, tmp_path):
    red = np.full((48, 64, 3), (220, 30, 30), np.uint8)
    (tmp_path / "red.png").write_bytes(png(red))
    (tmp_path / "letter.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(png(red)[:60])
    chosen = {"steps": 3, "max_tokens": 40, "max_images": 1}
    with browser(400, 800) as driver:
        driver.get(address)
        until(driver, lambda: shown(driver, "#settings input"))
        file, text = driver.find_element(By.ID, "file"), driver.find_element(By.ID, "text")

        # Bad uploads are told of, each by its name, and nothing else happens.
        file.send_keys("\n".join(str(tmp_path / name) for name in ("letter.png", "cut.png")))
        until(driver, lambda: len(shown(driver, ".error")) == 2)
        first, second = (error.text for error in shown(driver, ".error"))
        assert first.startswith("letter.png cannot be attached: not an image of a known format")
        assert second.startswith("cut.png cannot be attached: ")
        assert not shown(driver, "#attached img")
        choose(driver, **chosen, temperature=7)
        text.send_keys("hello\n")
        assert shown(driver, "#settings input:invalid") and not shown(driver, ".turn"), "beyond its limit"
        choose(driver, temperature=0)
        text.clear()

        # The model replies to a picture and a text that looks like HTML.
        said = "fox <img src=x onerror=alert(1)>"
        file.send_keys(str(tmp_path / "red.png"))
        until(driver, lambda: shown(driver, "#attached img"))
        text.send_keys(f"{said}\n")
        until(driver, lambda: shown(driver, ".turn.assistant") and idle(driver))
        assert [part.text for part in shown(driver, ".turn.user p")] == [said]
        assert not shown(driver, "img[src=x]")
        (attached,) = shown(driver, ".turn.user img")
        assert is_drawn(driver, attached)

        # What the page shows is what the model gives, texts and pictures, over two turns.
        text.send_keys("a red fox\n")
        until(driver, lambda: len(shown(driver, ".turn.assistant")) == 2 and idle(driver))
        reply, conversation = make_reply(*model, TOKENIZER, size=DREAM_SIZE), [Image(data_of(attached), "user")]
        for words in (said, "a red fox"):
            conversation.append(Text(words, "user"))
            conversation += [event.segment for event in reply(conversation, read_settings(chosen)) if event.complete]
        written = [segment.text for segment in conversation if isinstance(segment, Written) and segment.text]
        painted = [segment.data for segment in conversation if isinstance(segment, Painted)]
        assert written and painted, "the model does both"
        assert [part.text for part in shown(driver, ".turn.assistant p")] == written
        pictures = shown(driver, ".turn.assistant img")
        for picture, data in zip(pictures, painted, strict=True):
            assert is_drawn(driver, picture)
            same = [np.asarray(images.decode(one)).astype(int) for one in (data_of(picture), data)]
            assert np.abs(same[0] - same[1]).max() <= 1
        keep(driver, "chat-phone.png")

        # Painting is shown, and stopped; a new conversation begins with nothing.
        text.send_keys("fox")
        choose(driver, steps=100, max_images=8)
        text.send_keys("\n")
        until(driver, lambda: shown(driver, ".canvas"))
        driver.find_element(By.ID, "stop").click()
        until(driver, lambda: idle(driver))
        assert not shown(driver, ".canvas") and len(shown(driver, ".error")) == 2, "no more than before"
        driver.find_element(By.ID, "new").click()
        assert not shown(driver, ".turn")
