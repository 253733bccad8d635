"""The engine against `transformers.generate` on the same folder, and against itself one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from folders import EVERY, random_weights, write_folder
from patches import Replace

from moe_dist.config import ModelConfig
from moe_dist.data.tokenizer import ByteTokenizer
from moe_dist.generate import engine as engine_module
from moe_dist.generate.engine import MoEInferenceEngine
from moe_dist.generate.options import SamplingOptions
from moe_dist.generate.sampling import BeamSearch, probabilities
from moe_dist.models.transformer import Transformer
from moe_dist.pretrained.inference import find_model, open_model

transformers = pytest.importorskip("transformers")

FAMILIES = ("qwen3_moe-0", "mixtral-2", "qwen2_moe-0", "deepseek_v3-0", "gpt_oss-0")
"""With a window, a shared expert, latents, sinks."""
PROMPTS = ([1, 2, 3], list(range(40, 75)), [5], [7, 7, 7, 9, 9, 200, 31])
EOS = 3
Pair = tuple[MoEInferenceEngine, Any]


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Our engine and their model on one folder."""

    @cache
    def make(name: str) -> Pair:
        config = EVERY[name].model_copy(update={"attn_implementation": "eager"} if "gpt" in name else {})
        folder = write_folder(tmp_path_factory.mktemp("hf") / "m", config, random_weights(config))
        model, _ = open_model(find_model(str(folder)))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        engine = MoEInferenceEngine(model)
        engine.eos_ids = frozenset({EOS})
        return engine, theirs.eval()

    return make


def their_tokens(model: Any, prompt: list[int], options: SamplingOptions) -> list[int]:
    given = torch.tensor([prompt])
    settings = {
        "max_new_tokens": options.max_tokens,
        "num_beams": options.num_beams,
        "length_penalty": options.length_penalty,
        "repetition_penalty": options.repetition_penalty,
        "do_sample": False,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    out = model.generate(given, attention_mask=torch.ones_like(given), **settings)[0, len(prompt) :].tolist()
    return out[: out.index(EOS) + 1] if EOS in out else out


HOW = {
    "greedy": SamplingOptions(40),
    "penalised": SamplingOptions(40, repetition_penalty=1.3),
    "beams": SamplingOptions(20, num_beams=3),
    "long-beams": SamplingOptions(20, num_beams=4, length_penalty=1.7, repetition_penalty=1.1),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_transformers(name: str, how: str, pair_of: Callable[[str], Pair]) -> None:
    """All prompts in one batch here, each alone there."""
    engine, theirs = pair_of(name)
    answers = engine.generate(PROMPTS, HOW[how])
    assert [answer.tokens for answer in answers] == [their_tokens(theirs, prompt, HOW[how]) for prompt in PROMPTS]
    assert engine.pool.num_used == 0


def test_beams_end_where_theirs_end(pair_of: Callable[[str], Pair]) -> None:
    """With every likely token an end token: scores of finished beams, and when none can improve, decide."""
    engine, theirs = pair_of("qwen3_moe-0")
    ended = 0
    for eos in engine.generate([PROMPTS[0]], SamplingOptions(12))[0].tokens[2:8]:
        engine.eos_ids = frozenset({eos})
        for penalty in (0.0, 1.0, 2.0):
            options = SamplingOptions(12, num_beams=3, length_penalty=penalty)
            [answer] = engine.generate([PROMPTS[0]], options)
            settings = {"num_beams": 3, "length_penalty": penalty, "eos_token_id": eos, "pad_token_id": 0}
            given = torch.tensor([PROMPTS[0]])
            out = theirs.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False, **settings
            )
            expected = out[0, 3:].tolist()
            expected = expected[: expected.index(eos) + 1] if eos in expected else expected
            assert answer.tokens == expected
            ended += answer.finished == "stop"
    engine.eos_ids = frozenset({EOS})
    assert ended >= 6


def test_wrong_beams_are_seen(pair_of: Callable[[str], Pair], replace: Replace) -> None:
    """Planted: beams that stay with the cache of another one."""
    engine, theirs = pair_of("qwen3_moe-0")
    right = BeamSearch.take

    def mixed(self: BeamSearch, *arguments: Any) -> tuple[list[int], bool]:
        parents, is_over = right(self, *arguments)
        return parents[::-1], is_over

    replace(BeamSearch, "take", mixed)
    options = HOW["beams"]
    answers = [answer.tokens for answer in engine.generate(PROMPTS, options)]
    assert answers != [their_tokens(theirs, prompt, options) for prompt in PROMPTS]


@cache
def bytes_engine(**changes: Any) -> MoEInferenceEngine:
    """A model of bytes with random weights."""
    config = ModelConfig.model_validate(EVERY["qwen3_moe-0"].model_dump() | {"initializer_range": 0.2} | changes)
    model = Transformer(config)
    model.initialize(seed=3)
    return MoEInferenceEngine(model, ByteTokenizer(), max_rows=6, max_prompt_tokens=16)


DRAWN = SamplingOptions(24, temperature=1.1, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=5)


@pytest.mark.parametrize("options", [SamplingOptions(24), DRAWN, SamplingOptions(12, num_beams=3)])
def test_a_batch_says_what_each_prompt_alone_gets(options: SamplingOptions) -> None:
    """More requests than rows, and prompts longer than what one pass reads: they wait, join and leave."""
    engine = bytes_engine()
    prompts = ["a", "some longer prompt " * 3, "", "xyz", "def f(x):", "0" * 17, "end"]
    together = engine.generate(prompts, options)
    alone = [engine.generate([prompt], options)[0] for prompt in prompts]
    assert together == alone
    assert engine.occupied.blocks == engine.occupied.live == engine.occupied.waiting == 0


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(1, temperature=1.0),
        SamplingOptions(1, temperature=0.7, top_k=20, repetition_penalty=1.4),
        SamplingOptions(1, temperature=1.3, top_p=0.8),
        SamplingOptions(1, temperature=1.0, min_p=0.05),
        SamplingOptions(1, temperature=1.2, top_k=60, top_p=0.95, min_p=0.02),
    ],
)
@torch.no_grad()
def test_draws_have_the_exact_probabilities(options: SamplingOptions) -> None:
    """Chi-squared over 4,000 draws, each with a seed of its own, against probabilities from `transformers`' own
    processors in float64; and nothing is drawn that they shut out.
    """
    from dataclasses import replace as with_values

    engine = bytes_engine()
    prompt = [104, 105, 32]
    logits = engine.model(torch.tensor([prompt]))[0, -1, : engine.vocab_size].double()[None]
    ids = torch.tensor([prompt])
    steps: list[Any] = []
    if options.repetition_penalty != 1.0:
        steps.append(transformers.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    steps.append(transformers.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        steps.append(transformers.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(transformers.TopPLogitsWarper(options.top_p))
    if options.min_p:
        steps.append(transformers.MinPLogitsWarper(options.min_p))
    for step in steps:
        logits = step(ids, logits)
    exact = logits[0].softmax(-1)
    torch.testing.assert_close(
        probabilities(engine.model(ids)[0, -1, : engine.vocab_size], prompt, options).double(), exact
    )
    count = 4000
    asked = [with_values(options, seed=seed) for seed in range(count)]
    engine.max_rows, before = 500, engine.max_rows
    engine.max_prompt_tokens, room = 1500, engine.max_prompt_tokens
    drawn = torch.tensor([answer.tokens[0] for answer in engine.generate([prompt] * count, asked)])
    engine.max_rows, engine.max_prompt_tokens = before, room
    counts = drawn.bincount(minlength=len(exact)).double()
    assert counts[exact == 0].sum() == 0
    expected = exact * count
    common = expected >= 5
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi = float(((observed - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    assert degrees >= 5
    assert chi < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations
    flat = torch.full_like(expected, count / len(expected))  # planted: draws that know nothing of the weights
    assert float(((observed - flat) ** 2 / flat).sum()) > degrees + 4 * (2 * degrees) ** 0.5


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    """Seen to fail without the bound: logits / 1e-320 are no numbers."""
    engine = bytes_engine()
    cold, greedy = (
        engine.generate(["ab"], SamplingOptions(8, temperature=temperature))[0].tokens for temperature in (1e-320, 0.0)
    )
    assert cold == greedy


def test_stop_texts_end_an_answer_and_are_not_part_of_it() -> None:
    engine = bytes_engine()
    [whole] = engine.generate(["ab"], SamplingOptions(40, ignore_eos=True))
    text = whole.text
    assert len(text) > 12
    stop = text[6:9]
    first = text.index(stop)
    numbers = engine.add("ab", SamplingOptions(40, ignore_eos=True, stop=("never this", stop)))
    events = list(engine.run())
    assert {event.request for event in events} == {numbers}
    assert "".join(event.text for event in events) == text[:first]
    assert events[-1].finished == "stop"
    assert all(event.finished is None for event in events[:-1])


def test_logprobs_are_those_of_the_model() -> None:
    engine = bytes_engine()
    [answer] = engine.generate([[1, 2, 3]], SamplingOptions(5, logprobs=3))
    tokens = [1, 2, 3, *answer.tokens]
    with torch.no_grad():
        logs = engine.model(torch.tensor([tokens]))[0, :, : engine.vocab_size].double().log_softmax(-1)
    for place, (logprob, best) in enumerate(answer.logprobs, 2):
        assert logprob == pytest.approx(float(logs[place, tokens[place + 1]]), abs=1e-5)
        assert best[0] == (tokens[place + 1], logprob)
        assert [one for one, _ in best] == logs[place].topk(3).indices.tolist()


def test_a_cancelled_request_leaves_nothing() -> None:
    engine = bytes_engine()
    one, two = engine.add("abc", SamplingOptions(30)), engine.add("xyz", SamplingOptions(3))
    engine.step()
    engine.cancel(one)
    events = list(engine.run())
    assert [event.request for event in events if event.finished == "cancelled"] == [one]
    assert [event.request for event in events if event.finished == "length"] == [two]
    assert engine.pool.num_used == 0


def test_what_cannot_be_is_refused_before_it_begins() -> None:
    engine = bytes_engine()
    for prompt, options, said in (
        ([], SamplingOptions(), "one or more"),
        ([999], SamplingOptions(), "below 264"),
        ("x" * 256, SamplingOptions(), "at most 255"),
        ("x", SamplingOptions(num_beams=7), "max_rows=6"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.add(prompt, options)
    small = MoEInferenceEngine(engine.model, ByteTokenizer(), cache_tokens=32)
    with pytest.raises(ValueError, match="cache_tokens"):
        small.add("x", SamplingOptions(100))
    for wrong in ({"temperature": -1}, {"top_p": 0.0}, {"min_p": 2.0}, {"max_tokens": 0}, {"stop": ("",)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingOptions(**wrong)


def test_answers_end_where_positions_end() -> None:
    engine = bytes_engine()
    [answer] = engine.generate(["x" * 250], SamplingOptions(100, ignore_eos=True))
    assert (len(answer.tokens), answer.finished) == (6, "length")


def test_long_rope_is_computed_anew_past_its_length() -> None:
    """All keys turn by other angles once a sequence is longer than the pretraining was."""
    factors = {"long_factor": [3.0, 5.0, 7.0], "short_factor": [1.0, 1.1, 1.2]}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 20, "factor": 12.8, **factors}
    engine = bytes_engine.__wrapped__(rope_scaling=scaling)
    prompts = [[1, 2, 3] * 5, list(range(60, 90))]
    answers = engine.generate(prompts, SamplingOptions(16, ignore_eos=True))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(16):
                token = engine.model(ids)[:, -1, : engine.vocab_size].argmax(-1)
                ids = torch.cat((ids, token[None]), dim=1)
        assert answer.tokens == ids[0, len(prompt) :].tolist()


def test_characters_of_several_tokens_come_whole() -> None:
    stream = engine_module.TextStream(ByteTokenizer().decode, ("END",))
    pieces = [stream.push([byte]) for byte in "aé€EN".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "", ""]
    assert stream.push(list(b"x")) == "ENx"
    assert stream.push(list(b"E")) == ""
    assert stream.push([], last=True) == "E"
