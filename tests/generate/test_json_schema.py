"""Answers by a JSON schema: whole and valid whatever a model of random weights would rather say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from chat_tokenizers import tokenizer_of
from command_line import Say
from patches import Replace
from tiny import tiny_config

from moe_dist.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.json_schema import JsonSchemas, schema_text
from moe_dist.generate.options import SamplingOptions
from moe_dist.models.transformer import Transformer

pytest.importorskip("llguidance")
TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": ByteTokenizer(),
    "bpe": HuggingFaceTokenizer(tokenizer_of(None), "bpe"),
}
LINKED = {"next": {"$ref": "#/$defs/n"}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "object": {"type": "object"},
    "text": {"type": "string", "minLength": 5, "maxLength": 9},
    "pattern": {"type": "string", "pattern": "^(a|b)*c$"},
    "choice": {"enum": ["x", "yy", 3, None]},
    "constant": {"const": {"a": [1]}},
    "numbers": {
        "type": "array",
        "items": {"type": "integer", "minimum": 3, "maximum": 77},
        "minItems": 2,
        "maxItems": 5,
    },
    "tree": {
        "type": "object",
        "properties": {"v": {"type": "number"}, "c": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["v", "c"],
        "additionalProperties": False,
    },
    "list": {
        "$defs": {"n": {"anyOf": [{"type": "null"}, {"type": "object", "properties": LINKED, "required": ["next"]}]}},
        "$ref": "#/$defs/n",
    },
    "either": {"anyOf": [{"type": "array", "items": {"type": "boolean"}, "minItems": 3}, {"type": "number"}]},
    "date": {"type": "string", "format": "date-time"},
    "more": {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "additionalProperties": {"type": "integer"},
        "required": ["a", "b"],
    },
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def engine(request: pytest.FixtureRequest) -> MoEInferenceEngine:
    tokenizer = TOKENIZERS[request.param]
    config = tiny_config("model.vocab_size=432", "max_position_embeddings=256").model
    model = Transformer(config)
    model.initialize(5)
    return MoEInferenceEngine(model, tokenizer)


def asked(name: str, seed: int, **changes: Any) -> SamplingOptions:
    options = {"max_tokens": 70, "temperature": 1.5, "seed": seed, "json_schema": schema_text(SCHEMAS[name])}
    return SamplingOptions(**options | changes)


def test_every_answer_is_whole_and_valid(engine: MoEInferenceEngine) -> None:
    """Of every schema, drawn and greedy, in batches, with little room and with more. Planted: where `take` gives every
    token its wish, texts and arrays end in the middle.
    """
    every = [(name, 45 + 13 * seed, seed) for name in SCHEMAS for seed in range(3)]
    options = [asked(name, seed, max_tokens=room, temperature=seed / 2) for name, room, seed in every]
    answers = engine.generate(["x"] * len(every), options)
    for (name, room, _), answer in zip(every, answers, strict=True):
        assert answer.finished == "stop", (name, answer.text)
        assert len(answer.tokens) <= room
        jsonschema.validate(json.loads(answer.text), SCHEMAS[name])
    assert len({answer.text for answer in answers}) > 2 * len(SCHEMAS)
    assert engine.pool.num_used == 0


def test_the_shortest_answers_have_room_for_nothing_else(engine: MoEInferenceEngine) -> None:
    for name in SCHEMAS:
        found = JsonSchemas(TOKENIZERS[_name(engine)], engine.vocab_size).answer(schema_text(SCHEMAS[name]), 256)
        room = len(found.way)
        [answer] = engine.generate(["x"], asked(name, 1, max_tokens=room))
        jsonschema.validate(json.loads(answer.text), SCHEMAS[name])
        with pytest.raises(ValueError, match=f"max_tokens={room - 1}: the shortest answer found .* has {room}"):
            engine.add("x", asked(name, 1, max_tokens=room - 1))


def _name(engine: MoEInferenceEngine) -> str:
    return next(name for name, tokenizer in TOKENIZERS.items() if tokenizer is engine.tokenizer)


def test_others_in_the_batch_change_nothing(engine: MoEInferenceEngine) -> None:
    free = SamplingOptions(20, temperature=1.0, seed=4, ignore_eos=True)
    alone = [engine.generate(["x"], one)[0].tokens for one in (asked("tree", 2), free)]
    assert [answer.tokens for answer in engine.generate(["x", "x"], [asked("tree", 2), free])] == alone


def test_log_probabilities_are_the_models(engine: MoEInferenceEngine) -> None:
    """Not those of what the schema leaves."""
    [answer] = engine.generate(["x"], asked("constant", 1, logprobs=1))
    assert all(value < 0 for value, _ in answer.logprobs)
    assert any(best[0][0] != token for token, (_, best) in zip(answer.tokens, answer.logprobs, strict=True))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nothing"}, "Invalid type: nothing"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "http://127.0.0.1:9/y"}, "does not fetch"),
        ({"not": {}}, "not"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "Unsatisfiable"),
        ({"type": "array", "minItems": 2000}, "no answer of up to 1024 tokens"),
        ({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, "no answer"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"const": "\ud800"}, "hex escape"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_one_line(engine: MoEInferenceEngine, schema: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        engine.add("x", SamplingOptions(json_schema=schema_text(schema)))
    assert str(raised.value).startswith("JSON schema: ")
    assert "\n" not in str(raised.value)
    assert not engine.occupied.waiting


def test_a_way_is_gone_when_the_library_gives_up(engine: MoEInferenceEngine, replace: Replace) -> None:
    """States can get too complex for it: what is left is the end that was known before."""
    text = schema_text(SCHEMAS["tree"])
    answer = JsonSchemas(TOKENIZERS[_name(engine)], engine.vocab_size).answer(text, 60)
    replace(JsonSchemas, "allowed", lambda self, state: torch.zeros(self.vocab_size, dtype=torch.bool))
    said: list[int] = []
    while not said or said[-1] != engine.tokenizer.eos_id:  # type: ignore[union-attr]
        [allowed] = answer.allowed().nonzero().flatten().tolist()
        said.append(answer.take(allowed, 60 - len(said)))
    jsonschema.validate(json.loads(engine.tokenizer.decode(said)), SCHEMAS["tree"])  # type: ignore[union-attr]


def test_what_does_not_go_together() -> None:
    for changes in ({"stop": ("x",)}, {"ignore_eos": True}, {"num_beams": 2}):
        with pytest.raises(ValueError, match=rf"{next(iter(changes))}=.*JSON schema ends"):
            SamplingOptions(json_schema="{}", **changes)  # type: ignore[arg-type]
    model = Transformer(tiny_config().model)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        MoEInferenceEngine(model).add([1], SamplingOptions(json_schema="{}"))


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, say: Say, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    hidden = lambda name, *more: None if name == "llguidance" else found(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(ValueError, match=r"pip install 'moe-dist\[json-schema\]'"):
        JsonSchemas(ByteTokenizer(), 258)
    said = say("generate", "nowhere", "--prompt", "x", "--json-schema", tmp_path / "none")
    assert said.code == 2
    assert "moe-dist[json-schema]" in said.err


@pytest.mark.parametrize("text", ["", "{", "NaN"])
def test_a_file_that_is_no_schema(say: Say, tmp_path: Path, text: str) -> None:
    (tmp_path / "schema.json").write_text(text)
    said = say("generate", "nowhere", "--prompt", "x", "--json-schema", tmp_path / "schema.json")
    assert said.code == 2
    assert "--json-schema" in said.err
    assert len(said.err.splitlines()) == 1


def test_a_tokenizer_that_cannot_be_read_is_named() -> None:
    slow = HuggingFaceTokenizer(SimpleNamespace(eos_token_id=1, pad_token_id=1, get_vocab=lambda: {"a": 3}), "slow")
    with pytest.raises(ValueError, match="need a fast tokenizer: 'slow' is none"):
        JsonSchemas(slow, 4)
