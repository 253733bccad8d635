"""Conversations in samples: whole ones, each for itself, as if it were alone; too long ones by data.on_overlong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config

from moe_dist.data import ByteTokenizer, PackedDataset, StreamingPackedDataset, documents_from, load_documents, pack
from moe_dist.data.batch import collate
from moe_dist.data.chat_template import ChatEncoder
from moe_dist.data.losses import cut_off
from moe_dist.models.transformer import Transformer
from moe_dist.train.passes import model_inputs

LENGTH = 64


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [talk("abc" * (n % 4), "xyz" * (1 + n % 5)) for n in range(1, 12, 2)] + [talk("q", "a") for _ in range(10)]


def corpus(rows: list[dict[str, Any]] = ROWS, **options: Any) -> Any:
    return documents_from(rows, chat=ChatEncoder(ByteTokenizer(), LENGTH, **options))


@pytest.mark.parametrize("streaming", [False, True])
def test_no_conversation_is_cut(streaming: bool) -> None:
    """Seen red: cut at every 64th token, so that answers lost their questions."""
    documents = [np.asarray(document.tokens).tolist() for document in corpus()]
    if streaming:
        import datasets

        rows = documents_from(
            datasets.Dataset.from_list(ROWS).to_iterable_dataset(), chat=ChatEncoder(ByteTokenizer(), LENGTH)
        )
        samples = list(StreamingPackedDataset(rows, ByteTokenizer(), max_seq_length=LENGTH, repeat=False))
    else:
        packed = pack(corpus(), ByteTokenizer(), max_seq_length=LENGTH)
        samples = [packed.sample(index) for index in range(len(packed))]
        assert packed.num_tokens == sum(map(len, documents))
    found = []
    for sample in samples:
        ids, numbers = sample["input_ids"], sample["document_ids"]
        assert (ids[numbers < 0] == ByteTokenizer.pad_id).all()
        assert (sample["labels"][numbers < 0] == -100).all()
        found += [ids[numbers == number].tolist() for number in dict.fromkeys(numbers[numbers >= 0].tolist())]
    assert found == documents
    assert 1 < len(samples) < len(documents)


def losses(model: Transformer, packed: PackedDataset) -> tuple[dict[int, float], torch.Tensor]:
    """The loss of each document by its number, and the gradient of the embedding, both sums over labels."""
    found: dict[int, float] = {}
    model.zero_grad()
    for index in range(len(packed)):
        batch = collate([packed.sample(index)], [index], 0)
        logits = model(**model_inputs(batch, document_mask=True))
        each = torch.nn.functional.cross_entropy(
            logits.double().flatten(0, 1), batch.labels.flatten(), reduction="none"
        )
        each.sum().backward()
        numbers = batch.document_ids.flatten() if batch.document_ids is not None else torch.full_like(each, index)
        for number, loss in zip(numbers.tolist(), each.tolist(), strict=True):
            found[int(number)] = found.get(int(number), 0.0) + loss
    assert model.embed_tokens is not None
    gradient = model.embed_tokens.weight.grad
    assert gradient is not None
    found.pop(-1, None)
    return found, gradient.clone()


def test_packed_equals_unpacked() -> None:
    """Seen red with document_mask=False on both sides."""
    # Losses of balance are of a whole micro-batch, whatever lies in it.
    config = tiny_config("model.vocab_size=258", "balance.router_aux_loss_coef=0", "balance.router_z_loss_coef=0")
    model = Transformer(config.model, config.balance).double()
    model.initialize(0, torch.device("cpu"))
    together, alone = (pack(corpus(), ByteTokenizer(), max_seq_length=LENGTH, packed=one) for one in (True, False))
    assert len(alone) == len(ROWS) >= 2 * len(together)
    (packed, one), (single, other) = losses(model, together), losses(model, alone)
    assert packed.keys() == single.keys()
    assert [packed[key] for key in packed] == pytest.approx([single[key] for key in packed], abs=1e-6)
    assert all(loss > 1 for loss in packed.values())
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


LONG = [talk("short", "ok"), talk("q", "long " * 30), talk("long " * 30, "never seen")]


def test_what_is_too_long_is_cut_off_dropped_or_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, LONG)))
    tokenizer = ByteTokenizer()

    def read(policy: Any) -> Any:
        return load_documents("jsonl", path=tmp_path / "rows.jsonl", chat=ChatEncoder(tokenizer, LENGTH, policy))

    cut = read("truncate")
    lengths = [len(np.asarray(document.tokens)) for document in cut]
    assert lengths == [len("User: short\nAssistant: ok") + 1, LENGTH]
    packed = pack(cut, tokenizer, max_seq_length=LENGTH)
    (truncated,) = packed.truncated
    assert "rows.jsonl, line 2" in truncated.reason
    assert "170 tokens, and max_seq_length is 64: cut off, 46 of 152 learned tokens stay" in truncated.reason
    assert "1 conversation was cut off at max_seq_length, the first: " in cut_off(packed.truncated)
    (lost,) = packed.skipped
    assert "rows.jsonl, line 3" in lost.reason
    assert "nothing to learn is left of it" in lost.reason

    dropped = read("drop")
    assert len(list(dropped)) == 1
    assert [entry.reason.count("dropped (on_overlong=drop)") for entry in dropped.skipped] == [1, 1]

    with pytest.raises(ValueError, match=r"rows.jsonl, line 2, byte \d+: 170 tokens, and max_seq_length is 64"):
        list(read("error"))


class KeptTokenizer(ByteTokenizer):
    fingerprint = "kept"


def test_the_cache_knows_what_was_cut_off_and_by_which_rules(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, LONG)))

    def build(length: int, policy: Any = "truncate") -> PackedDataset:
        chat = ChatEncoder(KeptTokenizer(), length, policy)
        found = load_documents("jsonl", path=tmp_path / "rows.jsonl", chat=chat)
        return pack(found, KeptTokenizer(), max_seq_length=length, cache_dir=tmp_path / "cache")

    first, again = build(LENGTH), build(LENGTH)
    assert isinstance(again.labels, np.memmap)
    assert again.truncated == first.truncated != []
    assert [again.sample(n)["labels"].tolist() for n in range(2)] == [
        first.sample(n)["labels"].tolist() for n in range(2)
    ]
    assert build(200).truncated == []
    assert len(build(LENGTH, "drop").skipped) == 2


def test_a_stream_of_conversations_resumes() -> None:
    import datasets

    def build(packed: bool) -> StreamingPackedDataset:
        rows = documents_from(
            datasets.Dataset.from_list(ROWS).to_iterable_dataset(), chat=ChatEncoder(ByteTokenizer(), LENGTH)
        )
        return StreamingPackedDataset(rows, ByteTokenizer(), max_seq_length=LENGTH, packed=packed)

    for packed in (True, False):
        reference = [next(build_all)["input_ids"].tolist() for build_all in [build(packed)] for _ in range(9)]
        for stop in (1, 3, 7):
            first, second = build(packed), build(packed)
            first.skip(stop)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert [next(second)["input_ids"].tolist() for _ in range(9 - stop)] == reference[stop:]


def test_texts_without_packing_have_samples_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        packed = pack(documents_from(["a" * 100, "b"]), ByteTokenizer(), max_seq_length=LENGTH, packed=False)
    assert [int((packed.sample(n)["document_ids"] >= 0).sum()) for n in range(len(packed))] == [64, 37, 2]
    assert packed.num_labels() == 101
    assert packed.num_labels(1) == 64
