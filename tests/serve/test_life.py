"""How a server starts and ends, whom it lets in, what it writes about it, and what it holds when many come."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import signal
import socket
import ssl
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from argon2 import PasswordHasher
from command_line import Say
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.pretrained.inference import find_model, open_model
from moe_dist.serve.app import Service
from moe_dist.serve.audit import AuditLog
from moe_dist.serve.engine_thread import EngineFailedError, EngineThread
from moe_dist.serve.errors import Refused
from moe_dist.serve.gate import Limits
from moe_dist.serve.keys import Bucket, KeyRing, new_key, read_keys
from moe_dist.serve.server import listen
from moe_dist.serve.server import run as run_server

PROMPT = {"model": "run", "prompt": "def ", "temperature": 0, "ignore_eos": True}


def certificate(folder: Path) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    encoded = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(encoded)
    return folder / "cert.pem", folder / "key.pem"


def _go_on_asking(url: str, trusted: ssl.SSLContext) -> None:
    """Until nobody is let in any more."""
    for _ in range(500):
        httpx.get(url, verify=trusted)
        time.sleep(0.02)


def test_sigterm_lets_answers_end(run: Path, tmp_path: Path, serving: Any) -> None:
    """Over TLS, without keys: the stream under way comes whole, nobody new is let in, and the exit code is 0. Experts
    are int8, in files, and six of eight in memory."""
    cert, key = certificate(tmp_path)
    tls = ("--tls-certificate", cert, "--tls-key", key, "--audit-log", tmp_path / "audit.jsonl", "--audit-text")
    cached = ("--int8", "--expert-cache-gb", 6e-6, "--expert-folder", tmp_path)
    with serving(run, tmp_path, *tls, *cached) as server:
        assert server.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=server.url, verify=trusted, timeout=60) as client:
            foreign = client.post("/v1/completions", json=PROMPT, headers={"host": "evil.example:1"})
            assert foreign.status_code == 403  # of a page whose name leads here
            assert client.post("/v1/completions", json=PROMPT | {"max_tokens": 9}).status_code == 200
            hits = [line for line in client.get("/metrics").text.splitlines() if "_expert_cache_" in line]
            assert all(float(line.split()[-1]) > 0 for line in hits if not line.startswith("#")), hits
            assert len(list(tmp_path.glob("*/layer-*.safetensors"))) == 2
            with client.stream("POST", "/v1/completions", json=PROMPT | {"stream": True, "max_tokens": 300}) as reply:
                lines = reply.iter_lines()
                first = next(lines)
                server.process.send_signal(signal.SIGTERM)
                with pytest.raises(httpx.TransportError):
                    _go_on_asking(f"{server.url}/readyz", trusted)
                pieces = [line for line in [first, *lines] if line]
        assert pieces[-1] == "data: [DONE]"
        assert len(pieces) == 301
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log.read_text()
        *_, audited = server.audited()
        assert audited["prompt"] == "def "
        assert audited["completion_tokens"] == 300
        assert (tmp_path / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_every_request_has_a_line_without_what_was_said(server: Any) -> None:
    before = len(server.audited())
    headers = {"authorization": f"Bearer {server.keys['alice']}"}
    body = PROMPT | {"max_tokens": 3, "prompt": "a secret"}
    for given in (headers, {}):
        reply = httpx.post(f"{server.url}/v1/completions", json=body, headers=given, timeout=60)
    good, bad = server.audited(before + 2)[before:]
    assert (good["key"], good["role"], good["status"], good["path"]) == ("alice", "user", 200, "/v1/completions")
    assert (good["prompt_tokens"], good["completion_tokens"], good["finish_reason"]) == (8, 3, "length")
    assert (bad["key"], bad["role"], bad["status"]) == ("-", "-", 401)
    assert bad["request"] == reply.headers["x-request-id"]
    assert "secret" not in server.audit.read_text()
    assert server.keys["alice"] not in server.audit.read_text() + server.log.read_text()


def test_an_audit_log_is_rotated(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a", max_bytes=1000, keep=2)
    for number in range(60):
        log.write({"number": number, "filling": "x" * 40}, {"prompt": "no"})
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.1", "a.2"]
    kept = [json.loads(line)["number"] for name in ("a.2", "a.1", "a") for line in (tmp_path / name).open()]
    assert kept == list(range(kept[0], 60))
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())


def test_a_bucket_refills() -> None:
    now = [0.0]
    bucket = Bucket(60, clock=lambda: now[0])
    bucket.spend(60)
    assert bucket.wait() == pytest.approx(1)
    now[0] = 1.0
    assert bucket.wait() == 0
    bucket.spend(121)  # more than there was: tokens are counted afterwards
    assert bucket.wait() == pytest.approx(121)
    now[0] = 10_000.0
    bucket.wait()
    assert bucket.level == 60


@pytest.fixture
def ring(tmp_path: Path) -> tuple[KeyRing, Path, dict[str, str]]:
    """Of bob and carol, its file, and their keys. The hashes cost little."""
    keys, lines = {}, []
    for name in ("bob", "carol"):
        keys[name] = f"{name}.{'x' * 20}"
        lines.append(f"{name} user {PasswordHasher(1, 64, 1).hash(keys[name])} requests_per_minute=5")
    (tmp_path / "keys").write_text("\n".join(lines))
    return KeyRing(tmp_path / "keys"), tmp_path / "keys", keys


@pytest.mark.parametrize("guessed", ["bob", "nobody"])
def test_a_burst_of_one_key_is_one_check_and_many_keys_are_too_many(
    ring: tuple[KeyRing, Path, dict[str, str]], guessed: str
) -> None:
    """Nobody can tell whether the name of a guess is known. Planted: without a check for unknown names all are 401."""
    found, _, keys = ring

    async def ask() -> None:
        assert {one.name for one in await asyncio.gather(*(found.client(f"Bearer {keys['bob']}") for _ in range(40)))}
        guesses = (found.client(f"Bearer {guessed}.{number}") for number in range(12))
        *wrong, right = await asyncio.gather(*guesses, found.client(f"bearer {keys['bob']}"), return_exceptions=True)
        assert [error.status for error in wrong if isinstance(error, Refused)] == [401] * 8 + [429] * 4
        assert right is found.clients["bob"]

    asyncio.run(ask())


def test_a_key_file_that_changes_is_read_again(
    ring: tuple[KeyRing, Path, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Who is gone from it is out, known or not; who stays keeps his limits; one that is wrong changes nothing."""
    found, file, keys = ring
    bob, carol = file.read_text().splitlines()

    async def status(name: str) -> int:
        try:
            await found.client(f"Bearer {keys[name]}")
        except Refused as refused:
            return refused.status
        return 200

    async def ask() -> None:
        assert [await status("bob"), await status("carol")] == [200, 200]
        for _ in range(5):
            found.clients["bob"].begin()
        file.write_text(f"{bob}\n")
        assert [await status("bob"), await status("carol")] == [200, 401]
        with pytest.raises(Refused, match="requests_per_minute=5"):
            found.clients["bob"].begin()
        file.write_text(f"{bob}\ncarol king")
        assert [await status("bob"), await status("carol")] == [200, 401]
        assert "the keys stay as they were" in caplog.text
        file.unlink()
        assert await status("bob") == 200
        file.write_text(f"{carol}\n{bob.replace('=5', '=6')}")
        assert [await status("bob"), await status("carol")] == [200, 200]
        found.clients["bob"].begin()
        file.write_text(f"{carol}\n{bob.replace('=5', '=7')}")
        checking = asyncio.create_task(status("bob"))
        await asyncio.sleep(0)
        file.write_text(carol)
        assert await status("carol") == 200
        assert await checking == 401

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no key"),
        ("alice user", "line 1: NAME ROLE HASH"),
        ("alice king HASH", "line 1: 'king' is no role"),
        ("# x\nalice user plain", "line 2: alice has no argon2 hash"),
        ("alice user HASH\nalice user HASH", "line 2: alice is there twice"),
        ("alice user HASH requests_per_minute=0", "N of 1 or more"),
        ("alice user HASH speed=1", "requests_per_minute=N"),
    ],
)
def test_a_file_of_keys_that_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    hashed = "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ$4nKvFRW7W3o0XQ"
    (tmp_path / "keys").write_text(text.replace("HASH", hashed))
    with pytest.raises(ValueError, match=words):
        read_keys(tmp_path / "keys")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0: others can reach it; say who may ask by --keys FILE"),
        (("--host", "::"), "--host ::"),
        (("--keys", "nowhere"), "--keys nowhere: cannot be read"),
        (("--tls-key", "x"), "both, or neither"),
        (("--audit-text",), "--audit-log"),
        (("--expert-folder", "x"), "--expert-folder: only with --expert-cache-gb"),
        (("--hash-key", "a b"), "--hash-key 'a b': a key's name"),
        (("--hash-key", "a:king"), "'king': no role"),
    ],
)
def test_what_is_refused_before_anything_is_opened(say: Say, words: tuple[str, ...], said: str) -> None:
    found = say("serve", "nowhere", *words)
    assert found.code == 2
    assert said in found.err
    assert len(found.err.splitlines()) == 1


def test_a_port_that_is_taken(say: Say, run: Path, server: Any) -> None:
    found = say("serve", run, "--port", server.url.rpartition(":")[2])
    assert found.code == 2
    assert "Address already in use" in found.err


def test_a_key_that_is_made_is_known(say: Say, tmp_path: Path) -> None:
    found = say("serve", "--hash-key", "bob:metrics")
    (tmp_path / "keys").write_text(found.out)
    assert read_keys(tmp_path / "keys")["bob"].role == "metrics"
    key = found.err.split()[-1]
    assert key.startswith("bob.")
    assert key not in found.out
    assert len({new_key("bob", "user")[0] for _ in range(3)}) == 3


def test_load_of_experts_is_that_of_served_tokens(server: Any) -> None:
    """Prompts of different lengths in one batch are padded; padding counts nowhere."""
    server.wait_for("live_requests", 0)
    before = [server.metric(name) for name in ("expert_tokens_total", "prompt_tokens_total", "inference_tokens_total")]
    body = PROMPT | {"prompt": ["a", "b" * 50, "c" * 7], "max_tokens": 5}
    headers = {"authorization": f"Bearer {server.keys['alice']}"}
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    after = [server.metric(name) for name in ("expert_tokens_total", "prompt_tokens_total", "inference_tokens_total")]
    pairs, prompt, new = (b - a for a, b in zip(before, after, strict=True))
    assert (prompt, new) == (58, 15)
    assert pairs == 2 * 2 * (58 + 15 - 3)  # layers, experts of a token; the last token of an answer is not read


def test_answers_are_sent_at_once() -> None:
    """asyncio sets TCP_NODELAY for sockets that say what they are. Without, an answer took 40 ms more."""
    place = listen("127.0.0.1", 0)
    place.listen()

    async def accepted() -> int:
        found = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda reader, writer: found.set_result(writer), sock=place)
        _, ours = await asyncio.open_connection(*place.getsockname())
        told = (await found).get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        ours.close()
        server.close()
        return int(told)

    assert asyncio.run(accepted()) != 0


def resident(pid: int) -> int:
    """KiB of memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4


def ask_many(url: str, key: str, numbers: list[int]) -> list[float]:
    """Seconds of each request, of one client process with eight at once."""
    limits = httpx.Limits(max_connections=8)
    headers = {"authorization": f"Bearer {key}"}
    with (
        httpx.Client(base_url=url, headers=headers, timeout=120, limits=limits) as client,
        ThreadPoolExecutor(8) as pool,
    ):

        def one(number: int) -> float:
            begun = time.monotonic()
            body = PROMPT | {"max_tokens": 8, "prompt": "x" * (1 + number % 40)}
            reply = client.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            assert reply.json()["usage"]["completion_tokens"] == 8
            return time.monotonic() - begun

        return list(pool.map(one, numbers))


@pytest.mark.slow
def test_500_requests_at_32_at_once(server: Any) -> None:
    """Of four client processes. No error, nobody waits much longer than others, and memory stays where it was."""
    pid, begun = server.process.pid, len(server.audited())
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as clients:

        def load(numbers: range) -> list[float]:
            asked = [clients.submit(ask_many, server.url, server.keys["alice"], list(numbers[i::4])) for i in range(4)]
            return sorted(seconds for one in asked for seconds in one.result())

        load(range(200))
        early = resident(pid)
        times = load(range(200, 500))
    more, median = resident(pid) - early, times[len(times) // 2]
    print(f"300 of 500 answers: {median:.3f} s (median), {times[-1]:.3f} s (last); {more} KiB more than after 200")
    assert more < 20_000
    assert times[-1] < 6 * median
    lines = server.audited(begun + 500)[begun:]
    assert [line["status"] for line in lines] == [200] * 500
    server.wait_for("live_requests", 0)
    server.wait_for("cache_blocks", 0)


NUMBERS = [2**63, -(2**70), 1e308, -0.0, 1e-320, 1e-40, float("nan"), float("-inf"), 0.5, -1, 0, 1, 3]
TEXTS = ["", "\ud800", "\0", "run", "x" * 99, "é\u2028"]
OPTIONS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stream", "logprobs"]
OPTIONS += ["stream_options", "n", "ignore_eos", "user", "metadata", "echo", "max_tokens", "model", "\ud800"]


_JSON = {"content-type": "application/json"}
_SMALL = {"model": "run", "prompt": "a", "max_tokens": 2}


def _random_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [_random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 8:
        return {draw.choice(["role", "content", "type", "text", "\ud800", ""]): _random_value(draw, depth + 1)}
    lists: list[Any] = [[], [[]], [0], [257, 263]]
    return draw.choice([None, True, {}, draw.choice(NUMBERS), draw.choice(TEXTS), draw.choice(lists)])


def _random_request(draw: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    path = draw.choice(["/v1/completions", "/v1/chat/completions"] * 4 + ["/v1/models", "/", "/v1/models/%00"])
    method = draw.choice(["POST"] * 8 + ["GET", "PUT", "DELETE", "HEAD", "OPTIONS"])
    body: dict[str, Any] = dict(_SMALL)
    if "chat" in path:
        body = {"model": "run", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]}
    keys = [*OPTIONS, "top_logprobs", "logit_bias", "prompt", "messages"]
    for key in draw.sample(keys, draw.randrange(1, 4)):
        body[key] = _random_value(draw)
    body |= {"max_completion_tokens": 2} if "chat" in path else {}  # by default it would write as much as it may
    raw = json.dumps(body).encode()
    damage = draw.randrange(8)
    if damage == 0:
        raw = raw[: draw.randrange(len(raw))]
    elif damage == 1:
        raw = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    elif damage == 2:
        raw = b"[" * draw.choice([10, 15_000])
    kind = draw.choice([*["application/json"] * 6, "text/plain", "", "application/json; charset=x"])
    return method, path, {"content-type": kind}, raw


def test_1000_malformed_requests(server: Any) -> None:
    """None is answered with 5xx, none leaves a traceback, all errors have OpenAI's shape, each has its line in the
    audit log, and the server lives on."""
    draw, found = random.Random(7), []
    begun = len(server.audited())
    headers = {"authorization": f"Bearer {server.keys['alice']}"}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        every: list[Any] = [
            ("POST", "/v1/completions", _JSON, json.dumps(_SMALL | {key: value}).encode())
            for key in ["prompt", *OPTIONS]
            for value in [*NUMBERS, *TEXTS]
        ]
        every += [_random_request(draw) for _ in range(1000 - len(every))]
        for method, path, more, raw in every:
            reply = client.request(method, path, headers=headers | more, content=raw)
            found.append(reply.status_code)
            assert reply.status_code < 500, (method, path, more, raw, reply.text)
            if reply.status_code >= 400 and method != "HEAD":
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}, (method, path, raw)
    assert {200, 400, 404, 405, 422} <= set(found)
    lines = server.audited(begun + len(every))[begun:]
    assert [(line["method"], line["status"]) for line in lines] == list(
        zip([one[0] for one in every], found, strict=True)
    )
    assert "Traceback" not in server.log.read_text()
    assert "error" not in server.log.read_text()
    server.wait_for("live_requests", 0)
    assert "ready" in server.get("/readyz")


def test_an_engine_that_fails_says_so_and_ends(run: Path) -> None:
    """Whoever waits gets 503, and `run` raises what has happened."""
    engine = MoEInferenceEngine(*open_model(find_model(str(run))))
    thread = EngineThread(engine, 8)
    service = Service(thread, "run", limits=Limits(), keys=None, audit=None)
    place = listen("127.0.0.1", 0)
    found: list[int] = []

    def broken(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("no memory is left")

    def clients() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{place.getsockname()[1]}", timeout=30) as client:
            found.append(client.get("/readyz").status_code)
            engine.model.forward = broken  # type: ignore[method-assign]
            reply = client.post("/v1/completions", json=PROMPT)
            found.append(reply.status_code)
            assert reply.json()["error"]["code"] == "engine_failed"

    asking = threading.Thread(target=clients)
    with pytest.raises(EngineFailedError, match="RuntimeError: no memory is left"):
        run_server(service, place, ready=asking.start)
    asking.join(10)
    assert found == [200, 503]
    assert not service.is_ready
