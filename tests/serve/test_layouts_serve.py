"""A server in front of experts, layers and replicas on several ranks: each client hears what one process says."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from ranks import run_ranks
from tiny import mesh_of, tiny_config

from moe_dist.data.tokenizer import ByteTokenizer
from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.parallel.parallelize import build_part
from moe_dist.serve.app import Service
from moe_dist.serve.engine_thread import EngineThread, step_for_ever
from moe_dist.serve.gate import Limits
from moe_dist.serve.server import listen
from moe_dist.serve.server import run as run_server

BODIES: list[dict[str, Any]] = [
    {"prompt": prompt, "max_tokens": 6 + 2 * number, "temperature": number % 2, "seed": number}
    for number, prompt in enumerate(["def f", "x", "a somewhat longer prompt", "end", "y" * 20, "z"])
]
BODIES += [{"prompt": ["one", "two", "three"], "max_tokens": 5, "temperature": 0, "logprobs": 1}]
if importlib.util.find_spec("llguidance") is not None:
    WANTED = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    BODIES += [{"prompt": "x", "max_tokens": 24, "temperature": 1, "seed": 3, "response_format": WANTED}]


def served(overrides: tuple[str, ...]) -> Any:
    """What clients of rank 0 hear who all ask at once, whole and in pieces; and the load of experts. None elsewhere."""
    config = tiny_config("model.vocab_size=272", "model.num_hidden_layers=4", "max_position_embeddings=64", *overrides)
    mesh = mesh_of(config.parallel.ep_size, None, config.parallel.pp_size)
    model = build_part(config, mesh)
    model.initialize(5)
    engine = MoEInferenceEngine(model, ByteTokenizer(), mesh=mesh, max_rows=4)
    if mesh.rank != 0:
        step_for_ever(engine, lambda is_busy: [], lambda news: None)
        return None
    service = Service(EngineThread(engine, 64), "m", limits=Limits(), keys=None, audit=None)
    place, found = listen("127.0.0.1", 0), []

    def clients() -> None:
        try:
            limits = httpx.Limits(max_connections=32)
            url = f"http://127.0.0.1:{place.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=60, limits=limits) as client, ThreadPoolExecutor(16) as pool:
                found.extend(pool.map(lambda body: _whole(client, body), BODIES))
                found.extend(pool.map(lambda body: _pieces(client, body), BODIES))
                lines = client.get("/metrics").text.splitlines()
                found.append(sum(float(line.split()[-1]) for line in lines if "_expert_tokens_total{" in line))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=clients)
    assert run_server(service, place, ready=asking.start) == signal.SIGTERM
    asking.join(10)
    assert engine.pool.num_used == 0
    return found


def _whole(client: httpx.Client, body: dict[str, Any]) -> Any:
    reply = client.post("/v1/completions", json={"model": "m", **body}).json()
    return [_rounded(choice) for choice in reply["choices"]], reply["usage"]


def _rounded(choice: dict[str, Any]) -> Any:
    logs = choice["logprobs"] and [round(value, 4) for value in choice["logprobs"]["token_logprobs"]]
    return choice["index"], choice["text"], choice["finish_reason"], logs


def _pieces(client: httpx.Client, body: dict[str, Any]) -> dict[int, str]:
    found: dict[int, str] = {}
    with client.stream("POST", "/v1/completions", json={"model": "m", "stream": True, **body}) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


LAYOUTS = {
    "pp2": (2, ("pp_size=2", "gradient_accumulation_steps=2")),
    "ep2-replicas2": (4, ("ep_size=2",)),
    "pp2-replicas2": (4, ("pp_size=2", "gradient_accumulation_steps=2")),
}


@pytest.mark.proof
@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clients_hear_what_one_process_says(layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    first, *others = run_ranks(served, world, overrides)
    assert first == served(())
    assert others == [None] * (world - 1)
