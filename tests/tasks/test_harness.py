"""Tasks of lm-evaluation-harness on our model against its own `HFLM` on the exported one, task by task."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chat_tokenizers import save_tokenizer, tokenizer_of
from command_line import Say
from patches import Replace

from moe_dist.data.tokenizer import HuggingFaceTokenizer
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.pretrained.inference import find_model, open_model
from moe_dist.tasks.result import TaskResult
from moe_dist.tasks.run import run_tasks
from moe_dist.tasks.whole_model import WholeModel
from moe_dist.train import MoETrainer

TASKS = Path(__file__).parents[2] / "configs" / "tasks"
NAMES = ("agreement", "sums", "prose")
MODEL = {
    "vocab_size": len(tokenizer_of(None)),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 48,  # whole texts need windows, and prompts of three examples lose their beginning
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model as a Hugging Face folder; its tokenizers are beside it."""
    place = tmp_path_factory.mktemp("harness")
    plain, marked = tokenizer_of(None), tokenizer_of(None)
    from tokenizers.processors import TemplateProcessing

    marked.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", marked.bos_token_id)]
    )
    plain.save_pretrained(place / "plain")
    marked.save_pretrained(place / "marked")
    save_tokenizer(place / "llama3", "llama3")
    options = {"tokenizer": f"{place}/plain", "max_seq_length": 48, "max_steps": 3, "learning_rate": 1e-2}
    quiet: dict[str, Any] = {"progress": "none", "tensorboard": False, "save_steps": 3, "sample_tokens": 0}
    texts = ["The keys to the cabinet are on the table.\n2 + 3 = 5\n4 + 5 = 9\n" * 4] * 6
    MoETrainer({}, model_config=MODEL, training_config=options | quiet, output_dir=place / "run").train(texts)
    return place


def theirs(folder: Path, tokenizer: Path, *, chat: bool = False) -> dict[str, Any]:
    """What the harness' own class for `transformers` finds."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    specs: list[Any] = []
    for name in NAMES:
        spec = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
        spec["dataset_kwargs"]["data_files"] = {"test": str(TASKS / f"{name}.jsonl")}
        specs.append(spec)
    model = HFLM(pretrained=str(folder), tokenizer=str(tokenizer), device="cpu", dtype="float32", batch_size=3)
    manager = TaskManager(include_defaults=False)
    tasks = manager.load(specs)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=1234)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return evaluate(model, tasks, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat)


def loaded(exported: Path, tokenizer: str, *, chat: bool = False) -> WholeModel:
    model, _ = open_model(find_model(str(exported / "run")))
    from transformers import AutoTokenizer

    inner = AutoTokenizer.from_pretrained(exported / tokenizer)
    return WholeModel(model, HuggingFaceTokenizer(inner, tokenizer), Mesh.single(), batch_size=4, chat_template=chat)


def ours(model: WholeModel) -> dict[str, TaskResult]:
    return run_tasks(model, [str(TASKS / f"{name}.yaml") for name in NAMES])


@pytest.mark.parametrize("tokenizer", ["plain", "llama3", pytest.param("marked", marks=pytest.mark.slow)])
def test_every_number_is_that_of_the_harness(exported: Path, tokenizer: str, tmp_path: Path, say: Say) -> None:
    """The parity table, with a tokenizer that sets marks, one that does not, and by a chat template."""
    chat = tokenizer == "llama3"
    assert say("export", exported / "run", "--output", tmp_path / "hf", "--no-logits").code == 0
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = ours(loaded(exported, tokenizer, chat=chat))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after  # a task in the middle of a training leaves nothing behind
    wanted = theirs(tmp_path / "hf", exported / tokenizer, chat=chat)
    table = []
    for name in NAMES:
        right = {
            key.partition(",")[0]: value for key, value in wanted["results"][name].items() if key.endswith(",none")
        }
        for metric in sorted(right.keys() - {key for key in right if key.endswith("_stderr")}):
            table.append((name, metric, found[name].metrics[metric], right[metric]))
    print("\n".join(map(str, table)))
    assert [row[:2] for row in table] == [
        *(("agreement", "acc"), ("agreement", "acc_norm"), ("sums", "bleu"), ("sums", "exact_match")),
        *(("prose", "bits_per_byte"), ("prose", "byte_perplexity"), ("prose", "word_perplexity")),
    ]
    for name, metric, mine, right in table:
        exact = metric in ("acc", "acc_norm", "exact_match", "bleu")
        assert mine == right if exact else mine == pytest.approx(right, rel=1e-5), (name, metric)
    for name in NAMES:
        assert found[name].num_rows == len(wanted["samples"][name])
    if chat:
        assert ours(loaded(exported, tokenizer))["agreement"].metrics != found["agreement"].metrics


def test_a_chat_template_asks_tasks(exported: Path, tmp_path: Path, say: Say) -> None:
    """Rows of a file too; what the model sees is the question as a user's turn, and few-shot examples are turns."""
    model = loaded(exported, "llama3", chat=True)
    assert model.asked("a").endswith(
        "user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    row = {"prompt": "The keys", "choices": [" are", " is"], "label": 0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    seen: list[list[int]] = []
    score = model.score
    model.score = lambda requests: (seen.extend(ids for ids, _ in requests), score(requests))[1]  # type: ignore[method-assign]
    run_tasks(model, [str(tmp_path / "rows.jsonl")])
    text = model.tokenizer.inner.decode(seen[0])  # type: ignore[attr-defined]
    assert text == model.asked("The keys") + " are"
    said = say("evaluate", exported / "run", "--tasks", TASKS / "agreement.yaml", "--apply-chat-template")
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1), said
    assert "has no chat template" in said.err
    said = say("evaluate", exported / "run", "--apply-chat-template")
    assert (said.code, said.err) == (2, "moe-dist: error: --apply-chat-template: only with --tasks\n"), said


def test_each_request_is_answered_as_the_harness_answers_it(exported: Path, tmp_path: Path, say: Say) -> None:
    """Every log-probability, whether it is greedy, and every text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from moe_dist.tasks.harness import HarnessModel

    assert say("export", exported / "run", "--output", tmp_path / "hf", "--no-logits").code == 0
    right = HFLM(pretrained=str(tmp_path / "hf"), tokenizer=str(exported / "plain"), device="cpu", dtype="float32")
    mine = HarnessModel(loaded(exported, "plain"))
    pairs = [("2 + 3 =", " 5"), ("a  ", "b"), ("", "the answer"), ("x" * 80, " is seven"), ("4 + 5 = ", "9\n2 + 3")]
    greedy = {"until": ["="], "max_gen_toks": 6, "do_sample": False}

    def asked(kind: str, *each: Any) -> list[Any]:
        return [Instance(kind, {}, one, index, metadata=("t", 0, 1)) for index, one in enumerate(each)]

    first = asked("loglikelihood", *pairs)
    more = right.generate_until(asked("generate_until", ("2 + 3 =", greedy)))[0]
    first += asked("loglikelihood", ("2 + 3 =", more or " 5"))
    for a, b in zip(mine.loglikelihood(first), right.loglikelihood(first), strict=True):
        assert a[0] == pytest.approx(b[0], abs=2e-4)
        assert a[1] == b[1]
    whole = asked("loglikelihood_rolling", ("a short one",), ("the answer is seven " * 30,))
    assert mine.loglikelihood_rolling(whole) == pytest.approx(right.loglikelihood_rolling(whole), rel=1e-5)
    texts = [("2 + 3 =", greedy), ("The keys to the cabinet" * 4, greedy | {"until": ["\n\n"]}), ("4", greedy)]
    asks = asked("generate_until", *texts)
    assert mine.generate_until(asks) == right.generate_until(asks)


def test_a_wrong_shift_is_seen(exported: Path, tmp_path: Path, say: Say, replace: Replace) -> None:
    """Planted: each token is scored where the next one is predicted."""
    forward = Transformer.forward

    def shifted(self: Any, x: Any, *args: Any, **more: Any) -> Any:
        inner = more["head_function"]
        more["head_function"] = lambda hidden, weight: inner(hidden.roll(1, 1), weight)
        return forward(self, x, *args, **more)

    model = loaded(exported, "plain")
    names = [str(TASKS / "prose.yaml")]
    right = run_tasks(model, names)
    replace(Transformer, "forward", shifted)
    assert run_tasks(model, names)["prose"].metrics != right["prose"].metrics


@pytest.mark.parametrize(
    ("task", "part"),
    [
        ("{folder}/none.yaml", "none.yaml"),
        ("{folder}/broken.yaml", "broken.yaml"),
        ("{folder}/odd.yaml", "top_a"),
        ("a={folder}/odd.yaml", "NAME="),
    ],
)
def test_what_is_wrong_with_a_task_is_named(exported: Path, tmp_path: Path, task: str, part: str) -> None:
    (tmp_path / "broken.yaml").write_text("task: x\ndataset_path: json\ndataset_kwargs: {data_files: none.jsonl}\n")
    text = (TASKS / "sums.yaml").read_text().replace("sums.jsonl", f"{TASKS}/sums.jsonl")
    (tmp_path / "odd.yaml").write_text(text.replace("do_sample: false", "top_a: 3"))
    with pytest.raises(ValueError, match=part):
        run_tasks(loaded(exported, "plain"), [task.format(folder=tmp_path)])
