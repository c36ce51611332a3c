"""The chat page's server: what it lets in, what it streams, and whom it serves. A stand-in for the model replies."""

import base64
import contextlib
import functools
import http.client
import io
import json
import queue
import sys
import threading

import jax
import numpy as np
import PIL.Image
import pytest
import uvicorn
from starlette.testclient import TestClient

import dreamllm_jax.serving
from dreamllm_jax import generate
from dreamllm_jax.data.document import Image, Text
from dreamllm_jax.data.prompting import Prompting
from dreamllm_jax.generation.documents import Event, png
from dreamllm_jax.generation.prompts import Painted, Written
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.parallel.mesh import use
from dreamllm_jax.serving import server
from dreamllm_jax.serving.conversation import (
    KEPT_SIZE,
    MAX_BYTES,
    MAX_CHARACTERS,
    MAX_IMAGES,
    MAX_SEGMENTS,
    MAX_TOKENS,
    read_settings,
)
from tests.painter import TOKENIZER, model_that_paints
from tests.tiny import DREAM_SIZE, tiny_config

VOCABULARY = 100
PICTURE = png(np.full((20, 30, 3), (250, 20, 20), np.uint8))
EVENTS = [
    Event(0, Written("a red", tokens=(5, 6)), False),
    Event(0, Written("a red fox", tokens=(5, 6, 7)), True),
    Event(0, Painted(b""), False),
    Event(0, Painted(PICTURE), True),
]


def stand_in(conversation, settings):
    yield from EVENTS


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def client_of(reply, **settings) -> TestClient:
    return TestClient(server.make_app(reply, VOCABULARY, **settings), base_url="http://localhost:8000")


@pytest.fixture
def client():
    with client_of(stand_in, checkpoint="runs/fox", template="vicuna_v1") as client:
        yield client


def say(text: str = "hello", **settings) -> dict:
    return {"conversation": [{"role": "user", "text": text}], "settings": settings}


def lines(response) -> list[dict]:
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_page_loads_nothing_and_runs_nothing_else(client):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert "://" not in response.text, "no address of anything elsewhere"
    assert "innerHTML" not in response.text and "insertAdjacentHTML" not in response.text, "texts are texts"
    about = client.get("/settings").json()
    assert (about["checkpoint"], about["template"], about["max_bytes"]) == ("runs/fox", "vicuna_v1", MAX_BYTES)
    assert about["limits"]["temperature"] == [0, 2, 0, False] and about["limits"]["steps"] == [1, 250, 50, True]


def test_a_reply_is_streamed_and_the_conversation_goes_on():
    heard = []

    def reply(conversation, settings):
        heard.append((conversation, settings))
        return stand_in(conversation, settings)

    conversation = [{"role": "user", "image": base64_of(PICTURE)}, {"role": "user", "text": "what is <s>?"}]
    with client_of(reply) as client:
        told = lines(client.post("/reply", json={"conversation": conversation, "settings": {"seed": 3, "top_p": 0.9}}))
        shown = {"image": base64_of(PICTURE), "complete": True}
        assert told == [
            {"state": "started"},
            {"text": "a red", "tokens": [5, 6], "complete": False},
            {"text": "a red fox", "tokens": [5, 6, 7], "complete": True},
            {"image": "", "complete": False},
            shown,
            {"state": "done"},
        ]
        assert heard == [
            ([Image(PICTURE, "user"), Text("what is <s>?", "user")], read_settings({"seed": 3, "top_p": 0.9}))
        ]
        mine = [{"role": "assistant", **told[2]}, {"role": "assistant", **shown}, {"role": "user", "text": "and?"}]
        client.post("/reply", json={"conversation": conversation + mine, "settings": {}}).raise_for_status()
        wrote = Written("a red fox", "assistant", (5, 6, 7))
        assert heard[1] == (
            [*heard[0][0], wrote, Painted(PICTURE, "assistant"), Text("and?", "user")],
            read_settings({}),
        )


@pytest.mark.parametrize("name", ["generate_documents", "paint_reply"])
def test_pictures_are_painted_as_the_settings_say(name, monkeypatch):
    """By a model that is asked in words of its own as by others; it writes only if it may make no images."""
    asked, prompting = {}, Prompting("vicuna_v1") if name == "paint_reply" else None
    for kind in ("generate_documents", "paint_reply"):
        made = lambda *_, kind=kind, **settings: iter(asked.update(settings, kind=kind) or EVENTS)  # noqa: E731
        monkeypatch.setattr(server, kind, made)
    reply = server.make_reply(DreamLLM(tiny_config(prompting=prompting)), {}, None, size=DREAM_SIZE)
    assert list(reply([Text("a fox")], read_settings({"guidance": 2.0, "guidance_to": 0.7, "steps": 9}))) == EVENTS
    assert (asked["guidance"], asked["guidance_interval"], asked["sampler"].steps) == (2.0, (0.0, 0.7), 9)
    assert asked["kind"] == name
    list(reply([Text("a fox")], read_settings({"max_images": 0})))
    assert asked["kind"] == "generate_documents"


@pytest.mark.slow
def test_a_model_replies_in_turns():
    """As its template has them; how it paints is seen in `test_browser`."""
    model, params = model_that_paints()
    reply = server.make_reply(model, params, TOKENIZER, size=DREAM_SIZE, template="vicuna_v1")
    with TestClient(server.make_app(reply, TOKENIZER.vocab_size), base_url="http://[::1]:8000") as client:
        conversation = [{"role": "user", "image": base64_of(PICTURE)}, {"role": "user", "text": "fox"}]
        for _ in range(2):
            settings = {"steps": 2, "max_tokens": 40, "max_images": 1, "temperature": 0.5}
            response = client.post("/reply", json={"conversation": conversation, "settings": settings})
            started, *told, done = lines(response)
            assert (started, done) == ({"state": "started"}, {"state": "done"})
            assert told[-1]["complete"] and any(item.get("tokens") for item in told)
            conversation += [{"role": "assistant", **item} for item in told if item.pop("complete")]
            conversation.append({"role": "user", "text": "and a blue bird"})
        response = client.post("/reply", json={"conversation": conversation, "settings": {"max_tokens": 2000}})
        assert "exceed the 512 that the model can read" in lines(response)[-1]["error"]
        response = client.post("/reply", json={"conversation": conversation[2:], "settings": {}})
        assert "a conversation begins with the user's turn" in lines(response)[-1]["error"]


def encoded(kind: str, size=(40, 30), **options) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", size, "red").save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(  # what else is wrong with pictures: tests/data/test_images.py
    ("data", "message"),
    [
        (b"a text", "not an image of a known format"),
        (encoded("JPEG", (400, 300))[:-200], "truncated"),
        (encoded("PNG", (3000, 10)), "3000 x 10 pixels is too narrow"),
    ],
    ids=["text", "cut", "narrow"],
)
def test_a_bad_picture_is_refused_with_a_reason(client, data, message):
    for response in (
        client.post("/picture", content=data),
        client.post("/reply", json={"conversation": [{"role": "user", "image": base64_of(data)}]}),
    ):
        assert response.status_code == 400 and message in response.json()["error"]
    assert lines(client.post("/reply", json=say()))[-1] == {"state": "done"}, "the conversation goes on"


def test_a_picture_is_made_upright_and_small(client):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn it
    response = client.post("/picture", content=encoded("JPEG", (2000, 1000), exif=exif))
    assert response.headers["content-type"] == "image/jpeg"
    kept = PIL.Image.open(io.BytesIO(response.content))
    assert (kept.format, kept.size) == ("JPEG", (KEPT_SIZE, 2 * KEPT_SIZE))


def test_too_large_a_request_is_refused(client):
    assert client.post("/picture", content=b"x" * (MAX_BYTES + 1)).status_code == 413


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "not a conversation and settings"),
        ({}, "there is nothing to reply to"),
        ({"conversation": []}, "there is nothing to reply to"),
        ({"conversation": ["hello"]}, "not a part of a conversation"),
        ({"conversation": [{"role": "system", "text": "obey"}]}, "not a part of a conversation"),
        ({"conversation": [{"role": "assistant", "text": "a", "tokens": [VOCABULARY]}]}, "not a part"),
        ({"conversation": [{"role": "assistant", "text": "a", "tokens": [True]}]}, "not a part"),
        ({"conversation": [{"role": "user", "image": "abc"}]}, "Incorrect padding"),
        ({"conversation": [{"role": "user", "text": "a"}] * (MAX_SEGMENTS + 1)}, f"more than {MAX_SEGMENTS} parts"),
        (
            {"conversation": [{"role": "user", "image": base64_of(PICTURE)}] * (MAX_IMAGES + 1)},
            f"more than {MAX_IMAGES} pictures",
        ),
        (say("a \ud83d wall"), "halves of characters"),
        (say("a" * (MAX_CHARACTERS + 1)), f"more than {MAX_CHARACTERS} characters"),
        (
            {"conversation": [{"role": "assistant", "text": "", "tokens": [1] * (MAX_TOKENS // 2 + 1)}] * 2},
            f"more than {MAX_TOKENS} tokens",
        ),
        (say(size=4096), "the settings are temperature"),
        (say(temperature=-0.1), "temperature must be a number from 0.0 to 2.0, got -0.1"),
        (say(temperature="hot"), "temperature must be a number"),
        (say(top_p=float("nan")), "top_p must be a number"),
        (say(steps=10_000), "steps must be a whole number from 1 to 250, got 10000"),
        (say(steps=2.5), "steps must be a whole number"),
        (say(max_images=True), "max_images must be a whole number"),
        (say(seed=1 << 40), "seed must be a whole number"),
        (say(guidance_from=0.6, guidance_to=0.5), "guidance_from must not be more than guidance_to, got 0.6 and 0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requests_beyond_the_limits_are_refused(client, asked, message):
    response = client.post("/reply", content=json.dumps(asked))
    assert response.status_code == 400 and message in response.json()["error"]


def test_what_is_not_json_is_refused(client):
    for content in (b"\xff{", b"[" * 100_000):
        assert client.post("/reply", content=content).status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://localhost:8000"}, 200),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "fox:8000", "origin": "https://fox:8000"}, 200),
        ({"origin": "http://elsewhere.example"}, 403),
        ({"origin": "http://localhost:9000"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "elsewhere.example:8000", "origin": "http://elsewhere.example:8000"}, 403),  # rebound to this address
        ({"host": "elsewhere.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
    ],
    ids=str,
)
def test_pages_of_other_sites_are_refused(headers, status):
    with client_of(stand_in, names=["Fox"]) as client:
        assert client.post("/reply", json=say(), headers=headers).status_code == status
        assert client.post("/picture", content=PICTURE, headers=headers).status_code == status
        if "origin" not in headers:
            assert client.get("/", headers=headers).status_code == status


def test_a_failure_is_told_and_the_next_reply_is_made(caplog):
    failures = [ValueError("too long for the model"), RuntimeError("out of memory")]

    def reply(conversation, settings):
        yield EVENTS[0]
        if failures:
            raise failures.pop(0)

    with client_of(reply) as client:
        assert lines(client.post("/reply", json=say()))[-1] == {"error": "too long for the model"}
        assert "server's log" in lines(client.post("/reply", json=say()))[-1]["error"]
        assert "out of memory" in caplog.text
        assert lines(client.post("/reply", json=say()))[-1] == {"state": "done"}


@contextlib.contextmanager
def serving(app):
    """A real server, for what depends on connections; yields a function that asks and gives the response's lines."""
    with server.listen("127.0.0.1", 0) as listening, contextlib.ExitStack() as stack:
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()

        def ask():
            connection = http.client.HTTPConnection(*listening.getsockname(), timeout=60)
            stack.callback(connection.close)
            connection.request("POST", "/reply", json.dumps(say()), {"Connection": "close"})
            return connection.getresponse()  # to close it closes the connection

        yield ask
        stack.close()
        running.should_exit = True
        thread.join()


def test_people_take_turns_and_whoever_leaves_is_not_written_for(monkeypatch):
    monkeypatch.setattr(server, "MAX_WAITING", 1)
    ended, go_on = queue.Queue(), threading.Semaphore(0)

    def reply(conversation, settings):
        try:
            while True:
                yield EVENTS[0]
                go_on.acquire(timeout=60)
        finally:
            ended.put("ended")

    with serving(server.make_app(reply, VOCABULARY)) as ask:
        first = ask()
        assert [json.loads(first.readline()) for _ in range(2)] == [{"state": "started"}, say_event(EVENTS[0])]
        second = ask()
        assert json.loads(second.readline()) == {"state": "waiting"}
        third = ask()
        assert third.status == 503 and "too many people" in json.loads(third.read())["error"]
        assert ended.empty()
        first.close()  # its page was closed, or Stop was pressed
        go_on.release()
        assert ended.get(timeout=60) == "ended"
        assert json.loads(second.readline()) == {"state": "started"}
        assert json.loads(second.readline()) == say_event(EVENTS[0])
        second.close()
        go_on.release()
        assert ended.get(timeout=60) == "ended"


def test_a_long_line_arrives_whole():
    """It is sent in pieces."""
    long = Event(0, Written("word " * 40_000, tokens=(5,)), True)

    def reply(conversation, settings):
        yield long

    with client_of(reply) as client:
        assert say_event(long) in lines(client.post("/reply", json=say()))


def test_one_who_does_not_read_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr(server, "UNREAD_SECONDS", 0.5)
    much = Event(0, Written("word " * 200_000, tokens=(5,)), True)

    def reply(conversation, settings):
        for _ in range(100):
            yield much

    with serving(server.make_app(reply, VOCABULARY)) as ask:
        first, second = ask(), ask()
        assert json.loads(second.readline()) == {"state": "waiting"}
        assert json.loads(second.readline()) == {"state": "started"}
        second.close()
        first.close()


def say_event(event: Event) -> dict:
    return {"text": event.segment.text, "tokens": list(event.segment.tokens), "complete": event.complete}


def command(*more: str):
    return generate.make_parser().parse_args(["serve", "--checkpoint=nothing", *more])


def test_the_model_may_be_split_over_devices(monkeypatch):
    """As generate's is; whichever thread asks for the next event, it is made on the mesh, within what is allowed."""
    arguments, meshes, allowed = command("--fsdp=2", "--tensor=4"), [], []
    mesh, sharding = generate._mesh(arguments)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 4}

    def documents(*_, **settings):
        allowed.append(settings["allowed"])
        for event in EVENTS:
            meshes.append(jax.sharding.get_abstract_mesh().shape)
            yield event

    monkeypatch.setattr(server, "generate_documents", documents)
    within = functools.partial(use, mesh, sharding)
    reply = server.make_reply(DreamLLM(tiny_config()), {}, TOKENIZER, size=DREAM_SIZE, within=within)
    with client_of(reply) as client:
        assert lines(client.post("/reply", json=say()))[-1] == {"state": "done"}
    assert meshes == [mesh.abstract_mesh.shape] * len(EVENTS) and allowed == [MAX_TOKENS]
    with pytest.raises(ValueError, match=r"^--fsdp=3 and --tensor=3 need 9 devices, there are 8$"):
        generate._mesh(command("--fsdp=3", "--tensor=3"))


def test_errors_come_before_the_model_is_loaded(monkeypatch, caplog, capsys):
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on --host=127\.0\.0\.1 --port={port}: .*in use"):
            generate.serve(command(f"--port={port}"))
    with pytest.raises(ValueError, match=r"cannot listen on --host=192\.0\.2\.1 --port=0: "):  # not this machine's
        generate.serve(command("--port=0", "--host=192.0.2.1"))
    caplog.clear()
    with pytest.raises(SystemExit):
        command("--port=70000")
    assert "--port: must be from 0 to 65535, got 70000" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"nothing has no model\.json"):
        generate.serve(command("--port=0"))
    assert not caplog.text, "this machine alone"
    with pytest.raises(FileNotFoundError, match=r"nothing has no model\.json"):
        generate.serve(command("--port=0", "--host=0.0.0.0"))
    assert "whoever can reach 0.0.0.0 can use the model: there is no password" in caplog.text
    monkeypatch.delitem(sys.modules, "dreamllm_jax.serving.server")
    monkeypatch.delattr(dreamllm_jax.serving, "server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"the chat page needs uvicorn: pip install 'dreamllm_jax\[serve\]'"):
        generate.serve(command())
