"""OpenAI's own client against a server process: its answers are the engine's, its errors OpenAI's."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.generate.requests import Completion
from moe_dist.pretrained.inference import find_model, open_model

PROMPT = "def f1(x):"
EVERY: Any = {"ignore_eos": True}


@pytest.fixture(scope="module")
def engine(run: Path) -> MoEInferenceEngine:
    return MoEInferenceEngine(*open_model(find_model(str(run))))


def client_of(server: Any, name: str = "alice") -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=server.keys.get(name, name), max_retries=0, timeout=60)


def ask(client: OpenAI, **changes: Any) -> Any:
    wanted = {"model": "run", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "extra_body": EVERY}
    return client.completions.create(**wanted | changes)


def ours(engine: MoEInferenceEngine, prompt: str = PROMPT, **options: Any) -> Completion:
    return engine.generate([prompt], SamplingOptions(**{"max_tokens": 20, "ignore_eos": True} | options))[0]


def test_a_completion_is_the_engines(server: Any, engine: MoEInferenceEngine) -> None:
    said, wanted = ask(client_of(server), logprobs=3), ours(engine, logprobs=3)
    [choice] = said.choices
    assert choice.text == wanted.text
    assert choice.finish_reason == wanted.finished == "length"
    assert choice.logprobs.token_logprobs == pytest.approx([value for value, _ in wanted.logprobs])
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == 20
    assert (said.usage.prompt_tokens, said.usage.completion_tokens, said.usage.total_tokens) == (10, 20, 30)
    several = ask(client_of(server), prompt=[PROMPT, "x"])
    assert [choice.text for choice in several.choices] == [wanted.text, ours(engine, "x").text]


def test_a_stream_is_the_whole_in_pieces(server: Any, engine: MoEInferenceEngine) -> None:
    pieces = list(ask(client_of(server), stream=True, stream_options={"include_usage": True}, logprobs=0))
    *said, last = pieces
    assert "".join(piece.choices[0].text for piece in said) == ours(engine).text
    assert len(said) == 20
    assert [piece.choices[0].finish_reason for piece in said] == [None] * 19 + ["length"]
    values = [value for piece in said for value in piece.choices[0].logprobs.token_logprobs]
    assert values == pytest.approx([value for value, _ in ours(engine, logprobs=0).logprobs])
    assert last.choices == []
    assert last.usage.completion_tokens == 20


def test_a_chat_whole_and_in_pieces(server: Any, engine: MoEInferenceEngine) -> None:
    """Bytes have the form in which conversations are learned."""
    client = client_of(server)
    wanted: Any = {
        "model": "run",
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
        "max_completion_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": EVERY,
    }
    whole = client.chat.completions.create(**wanted)
    expected = ours(engine, "System: a\nUser: b\nAssistant:", max_tokens=12, logprobs=2)
    assert whole.choices[0].message.content == expected.text
    found = whole.choices[0].logprobs.content
    assert [one.logprob for one in found] == pytest.approx([value for value, _ in expected.logprobs])
    assert [one.bytes for one in found] == [[token] if token < 256 else [] for token in expected.tokens]
    assert all(len(one.top_logprobs) == 2 for one in found)
    pieces = list(client.chat.completions.create(**wanted, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
    assert pieces[-1].choices[0].finish_reason == "length"


def test_stop_and_seed(server: Any, engine: MoEInferenceEngine) -> None:
    client, whole = client_of(server), ours(engine).text
    stop = whole[7:9]
    said = ask(client, stop=[stop])
    assert said.choices[0].text == whole[: whole.index(stop)]
    assert said.choices[0].finish_reason == "stop"
    drawn = [ask(client, temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_json_by_a_schema(server: Any) -> None:
    """As OpenAI's client asks for it: a class in, an object of it out, whole within few tokens of noise."""
    pytest.importorskip("llguidance")

    class Person(BaseModel):
        name: str
        age: int
        tags: list[str]

    client = client_of(server)
    said: Any = {"model": "run", "messages": [{"role": "user", "content": "who?"}], "max_completion_tokens": 60}
    for seed in range(3):
        found = client.chat.completions.parse(**said, response_format=Person, seed=seed)
        assert found.choices[0].finish_reason == "stop"
        assert isinstance(found.choices[0].message.parsed, Person)
    anything = client.chat.completions.create(**said, response_format={"type": "json_object"})
    assert isinstance(json.loads(anything.choices[0].message.content), dict)
    for schema, words in (
        ({"type": "nothing"}, "Invalid type"),
        ({"minLength": 90, "type": "string"}, "shortest answer"),
    ):
        wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.UnprocessableEntityError, match=words) as raised:
            client.chat.completions.create(**said, response_format=wanted)
        assert raised.value.body["param"] == "response_format"  # type: ignore[index]


def test_a_text_in_and_a_text_out(server: Any, engine: MoEInferenceEngine) -> None:
    headers = {"authorization": f"Bearer {server.keys['alice']}"}
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    said = httpx.post(f"{server.url}/infer", json=body, headers=headers, timeout=60).json()
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
    assert said == {"text": ours(engine).text, "finish_reason": "length", "usage": usage}


def test_models_and_probes(server: Any) -> None:
    client = client_of(server)
    assert [model.id for model in client.models.list()] == ["run"]
    assert client.models.retrieve("run").id == "run"
    assert "ready" in server.get("/readyz")
    assert "ok" in server.get("/healthz")
    assert '"/v1/chat/completions"' in server.get("/openapi.json")


@pytest.mark.parametrize(
    ("kind", "name", "changes", "words"),
    [
        (openai.AuthenticationError, "alice.wrong", {}, "not known"),
        (openai.AuthenticationError, "nobody", {}, "not known"),
        (openai.PermissionDeniedError, "watch", {}, "role metrics"),
        (openai.NotFoundError, "alice", {"model": "gpt"}, "'gpt' is not here"),
        (openai.UnprocessableEntityError, "alice", {"temperature": 3}, "temperature"),
        (openai.UnprocessableEntityError, "alice", {"n": 2}, "n: "),
        (openai.UnprocessableEntityError, "alice", {"extra_body": {"tools": []}}, "tools"),
        (openai.BadRequestError, "alice", {"max_tokens": 1501}, "max_tokens=1501: at most 1500"),
        (openai.BadRequestError, "alice", {"prompt": "x" * 3000}, "max_position_embeddings"),
        (openai.APIStatusError, "alice", {"prompt": "x" * 20_001}, "20,000 bytes"),
    ],
)
def test_errors_are_openais(server: Any, kind: Any, name: str, changes: Any, words: str) -> None:
    with pytest.raises(kind) as raised:
        ask(client_of(server, name), **changes)
    assert words in raised.value.body["message"]
    assert set(raised.value.body) == {"message", "type", "param", "code"}
    if kind is openai.APIStatusError:
        assert raised.value.status_code == 413


def test_metrics_want_a_role_and_everything_a_key(server: Any) -> None:
    for key, status in ((None, 401), ("alice", 403), ("watch", 200)):
        headers = {"authorization": f"Bearer {server.keys[key]}"} if key else {}
        assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == status
    assert httpx.get(f"{server.url}/nothing").status_code == 401


def test_a_key_has_its_limit(server: Any) -> None:
    poor = client_of(server, "poor")
    ask(poor, max_tokens=1)
    with pytest.raises(openai.RateLimitError) as raised:
        ask(poor, max_tokens=1)
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 61
    ask(client_of(server), max_tokens=1)  # others have their own


def test_a_client_that_goes_frees_its_place(server: Any) -> None:
    """Eight streams, and eight that wait for a whole answer, leave: batch and queue are empty."""
    server.wait_for("live_requests", 0)
    before = server.metric("cancelled_requests_total")
    clients = [client_of(server).with_options(timeout=0.5) for _ in range(8)]

    def wait_too_short(client: OpenAI) -> None:
        with pytest.raises(openai.APITimeoutError):
            ask(client, max_tokens=1500)

    streams = [ask(client_of(server), max_tokens=1500, stream=True) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(wait_too_short, clients))
    for stream in streams:
        stream.close()
    server.wait_for("live_requests", 0)
    server.wait_for("waiting_requests", 0)
    server.wait_for("cache_blocks", 0)
    assert server.metric("cancelled_requests_total") == before + 16
    assert ask(client_of(server)).choices[0].finish_reason == "length"


def test_more_than_may_wait_is_told_to_come_again(server: Any) -> None:
    def one(number: int) -> str | None:
        try:
            ask(client_of(server), max_tokens=60)
        except openai.RateLimitError as error:
            return f"{error.code} {error.response.headers['retry-after']}"
        return None

    with ThreadPoolExecutor(48) as pool:
        found = list(pool.map(one, range(48)))
    assert set(found) == {None, "server_overloaded 2"}
    assert found.count(None) >= 32
