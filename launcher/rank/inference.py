"""What every rank does for the commands that use a model. Torch is imported where there is work."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from launcher.connect.environment import Environment
from launcher.connect.output import clean
from launcher.connect.rank_job import Inference
from launcher.rank.opening import opened
from moe_dist.config import Config

if TYPE_CHECKING:
    from moe_dist.data.tokenizer import Tokenizer
    from moe_dist.generate.engine import MoEInferenceEngine
    from moe_dist.generate.options import SamplingOptions
    from moe_dist.generate.requests import Completion
    from moe_dist.models.transformer import Transformer
    from moe_dist.parallel.mesh import Mesh


def infer(config: Config, environment: Environment, wanted: Inference) -> int:
    """Open the model on all ranks and do what is wanted; returns the exit code."""
    if wanted.verb == "serve":
        from launcher.rank.serving import serve

        return serve(config, environment, wanted)
    from launcher.connect.process_groups import connected

    with connected(config, environment) as mesh:
        model, tokenizer = opened(config, mesh, wanted)
        if wanted.verb == "generate":
            from moe_dist.generate.engine import MoEInferenceEngine

            engine = MoEInferenceEngine(model, tokenizer, mesh=mesh, **wanted.options.get("engine", {}))
            return _generate(engine, wanted.options)
        if wanted.verb == "experts":
            return _experts(config, model, tokenizer, mesh, wanted)
        return _evaluate(config, model, tokenizer, mesh, wanted)


def _evaluate(config: Config, model: Transformer, tokenizer: Tokenizer, mesh: Mesh, wanted: Inference) -> int:
    from moe_dist.evaluate.evaluation import evaluate_model, evaluate_unigram

    text = {name: wanted.options[name] for name in ("data", "max_samples")}
    tasks = {name: wanted.options[name] for name in ("tasks", "chat_template")}
    found = evaluate_model(config, model, tokenizer, mesh, **text, **tasks)
    if mesh.rank == 0:
        sums = wanted.options["sums"]
        found.write(wanted.options["name"], Path(wanted.options["result"]), None if sums is None else Path(sums))
        if (baseline := wanted.options["unigram"]) is not None:
            evaluate_unigram(config, tokenizer, **text).write("unigram", *map(Path, baseline))
    return 0


def _experts(config: Config, model: Transformer, tokenizer: Tokenizer, mesh: Mesh, wanted: Inference) -> int:
    from moe_dist.evaluate.expert_study import lines, study
    from moe_dist.evaluate.held_out_text import held_out_text

    samples = held_out_text(config, tokenizer, wanted.options["data"], wanted.options["max_samples"])
    found = study(model, samples, tokenizer, mesh, batch_size=config.train.per_device_eval_batch_size or 4)
    if mesh.rank == 0:
        if wanted.options["as_json"]:
            print(json.dumps(found.to_json(), ensure_ascii=False, indent=1), flush=True)
        else:
            print("\n".join(lines(found)), flush=True)
        if wanted.options["page"]:
            from moe_dist.evaluate.experts_page import write_experts_page

            write_experts_page(found, wanted.options["name"], Path(wanted.options["page"]))
            print(wanted.options["page"], file=sys.stderr)
    return 0


def _generate(engine: MoEInferenceEngine, options: dict[str, Any]) -> int:
    from moe_dist.generate.options import SamplingOptions

    how = dict(options["sampling"])
    sampling = SamplingOptions(**how | {"stop": tuple(how.get("stop", ()))})
    if options.get("chat"):
        from launcher.rank.chat import chat

        return chat(engine, sampling, options.get("system"))
    prompts = options["prompts"]
    if options.get("show_experts"):
        from launcher.rank.shown_experts import show_experts

        return show_experts(engine, prompts, sampling)
    if options.get("as_json"):
        _write_rows(engine, prompts, sampling, options.get("output"))
    else:
        _stream(engine, prompts, sampling)
    if engine.mesh.rank == 0 and (stats := engine.expert_cache_stats) is not None:
        print(
            f"experts: {stats.hits:,} hits, {stats.misses:,} misses ({stats.hit_rate:.1%} hit), "
            f"{stats.bytes_loaded / 1e6:,.1f} MB loaded",
            file=sys.stderr,
        )
    return 0


def _stream(engine: MoEInferenceEngine, prompts: Sequence[str], sampling: SamplingOptions) -> None:
    """Every prompt with its answer as it comes, one after the other."""
    speaks = engine.mesh.rank == 0
    for number, prompt in enumerate(prompts):
        request = engine.add(prompt, sampling)
        if speaks:
            print(("\n" if number else "") + clean(prompt), end="", flush=True)
        for event in engine.run():
            if speaks and event.request == request:
                print(clean(event.text), end="", flush=True)
        if speaks:
            print(flush=True)


def _write_rows(
    engine: MoEInferenceEngine, prompts: Sequence[str], sampling: SamplingOptions, output: str | None
) -> None:
    """All prompts in one batch; a line of JSON for each, in their order, as soon as it and those before are done."""
    from moe_dist.generate.requests import Completion

    numbers = [engine.add(prompt, sampling) for prompt in prompts]
    answers = {number: Completion(len(engine.encode(prompt))) for number, prompt in zip(numbers, prompts, strict=True)}
    written = 0
    speaks = engine.mesh.rank == 0
    with ExitStack() as stack:
        file: TextIO = sys.stdout
        if speaks and output:
            file = stack.enter_context(Path(output).open("w", encoding="utf-8"))
        for event in engine.run():
            answers[event.request].add(event)
            while speaks and written < len(prompts) and answers[numbers[written]].finished:
                _write_row(file, written, prompts[written], answers[numbers[written]])
                written += 1
    if speaks and output:
        print(f"{written} answers in {output}", file=sys.stderr)


def _write_row(file: TextIO, index: int, prompt: str, answer: Completion) -> None:
    row = {
        "index": index,
        "prompt": prompt,
        "text": answer.text,
        "finish_reason": answer.finished,
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": len(answer.tokens),
    }
    print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
