"""From a configuration to the parts of a run: data, model, optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.config import Config, DataConfig
from moe_dist.data.chat_template import ChatEncoder
from moe_dist.data.corpus import Corpus, SkippedDocument, documents_from, load_documents
from moe_dist.data.identity import identity
from moe_dist.data.loader import GlobalLoader
from moe_dist.data.packing import PackedDataset, pack
from moe_dist.data.split import split_corpus
from moe_dist.data.streaming import StreamingPackedDataset
from moe_dist.data.tokenizer import Tokenizer, load_tokenizer
from moe_dist.models.registry import Registry
from moe_dist.models.transformer import Transformer
from moe_dist.parallel.comm_timer import Clock
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.parallelize import build_part
from moe_dist.parallel.state_bytes import trained_by_pp_rank

logger = logging.getLogger("moe_dist")
SOURCES: Registry[Callable[[], Any]] = Registry("data.source", "data source")


def build_model(
    config: Config, mesh: Mesh, clock: Clock | None = None, given: Transformer | None = None
) -> Transformer:
    """This rank's part of the model, on its device, whole, with the initial weights of `train.seed`.

    `given`: a whole model whose parameters it shares instead of having its own, so that training moves them.
    """
    trained_by_pp_rank(config)  # which refuses stages that have nothing to train, on every rank
    model = build_part(config, mesh, clock)
    model.initialize(config.train.seed, mesh.device)
    if given is not None:
        _share_weights(model, given, mesh)
    return model


def _share_weights(model: Transformer, given: Transformer, mesh: Mesh) -> None:
    """Put the parameters and buffers of `given` into `model`. Raises ValueError where that cannot be."""
    if mesh.layout.world_size > 1:
        raise ValueError(
            f"model=Transformer: a model in memory is trained in one process, not in {mesh.layout.world_size}; give "
            "its config, as model=transformer.config"
        )
    if any(tensor.is_meta for tensor in given.state_dict().values()):
        raise ValueError("model=Transformer: it has no weights yet (device meta); call its initialize(seed)")
    given.to(mesh.device)
    for name, part in given.named_modules():
        mine = model.get_submodule(name)
        if part._parameters.keys() != mine._parameters.keys():
            raise ValueError(f"model=Transformer: {name} ({type(part).__name__}) is another than its config says")
        for key, parameter in part._parameters.items():
            if parameter is not None and not mine._parameters[key].requires_grad:  # type: ignore[union-attr]
                parameter.requires_grad_(False)
        mine._parameters.update(part._parameters)
        mine._buffers.update(part._buffers)


@dataclass(frozen=True)
class Datasets:
    """Training and held-out samples."""

    tokenizer: Tokenizer
    train: PackedDataset | StreamingPackedDataset
    validation: PackedDataset | None
    files: Mapping[str, Sequence[tuple[str, str]]]
    """(id, path) of what `train` and `validation` were read from, where it was files."""

    def identities(self, num_evaluated: int | None) -> dict[str, Any]:
        """By which a later start knows whether its data is this; of the validation set what is evaluated."""
        found = {"train": identity(self.train, self.files["train"])}
        if self.validation is not None:
            found["validation"] = identity(self.validation, self.files["validation"], num_evaluated)
        return found

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the sources of the training data; empty unless there are several."""
        return self.train.domains if isinstance(self.train, PackedDataset) else ()

    @property
    def num_documents(self) -> int | None:
        """Documents that were read; None of a stream, which reads some again."""
        if not isinstance(self.train, PackedDataset):
            return None
        return self.train.num_documents + (0 if self.validation is None else self.validation.num_documents)

    @property
    def truncated(self) -> list[SkippedDocument]:
        """Conversations that were cut off to fit; of a stream, so far."""
        return [entry for part in (self.train, self.validation) if part is not None for entry in part.truncated]

    @property
    def skipped(self) -> list[SkippedDocument]:
        """Documents that could not be read; of a stream, so far."""
        parts = (self.train, self.validation)
        return list({entry.id: entry for part in parts if part is not None for entry in part.skipped}.values())


def given(data: DataConfig) -> DataConfig:
    """The section for data that a program gives: it must not speak of a source that nothing is read from."""
    nothing = {"path": None, "name": None, "config_name": None}
    return data.model_copy(update={"source": "memory", **nothing})


def build_datasets(
    config: Config, dataset: Any = None, cache_dir: Path | None = None, sample_of_stream: int | None = None
) -> Datasets:
    """Samples of the configured source, or of `dataset` (texts, token lists, a `datasets` dataset).

    `sample_of_stream`: of a stream only the first so many documents, packed.
    """
    data = config.data
    if data.streaming and sample_of_stream is not None:
        config = config.model_copy(deep=True)
        config.data.limit = min(data.limit or sample_of_stream, sample_of_stream)
    tokenizer = _tokenizer(config)
    corpus, held_out = _documents(config, tokenizer, dataset)
    sizes: dict[str, Any] = {"max_seq_length": data.max_seq_length, "packed": data.packing}
    train: PackedDataset | StreamingPackedDataset
    if data.streaming and sample_of_stream is None:
        train = StreamingPackedDataset(corpus, tokenizer, repeat=True, **sizes)
    else:
        train = pack(corpus, tokenizer, cache_dir=cache_dir, **sizes)
    validation = None if held_out is None else _held_out(config, held_out, tokenizer, cache_dir)
    if isinstance(train, PackedDataset):
        _check_labels(train, "the training data")
    files = {"train": corpus.files, "validation": held_out.files if held_out is not None else ()}
    return Datasets(tokenizer, train, validation, files)


def build_validation(config: Config) -> PackedDataset | None:
    """The held-out samples of the configured source alone, as `build_datasets` has them; None where there are none."""
    if config.learns_preferences:
        raise ValueError(
            "data.format=preference: what the run holds out are pairs of answers, and no text to measure on"
        )
    tokenizer = _tokenizer(config)
    _, held_out = _documents(config, tokenizer, None)
    return None if held_out is None else _held_out(config, held_out, tokenizer, None)


def _tokenizer(config: Config) -> Tokenizer:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer {config.data.tokenizer} needs "
            f"{tokenizer.vocab_size}"
        )
    return tokenizer


def _held_out(config: Config, held_out: Corpus, tokenizer: Tokenizer, cache_dir: Path | None) -> PackedDataset:
    sizes: dict[str, Any] = {"max_seq_length": config.data.max_seq_length, "packed": config.data.packing}
    validation = pack(held_out, tokenizer, keep_tail=True, cache_dir=cache_dir, **sizes)
    _check_labels(validation, "the validation set", config.num_evaluated)
    return validation


def _documents(config: Config, tokenizer: Tokenizer, dataset: Any) -> tuple[Corpus, Corpus | None]:
    """For training, and held out."""
    data = config.data
    options: dict[str, Any] = {"text_field": data.text_field, "on_error": data.on_error}
    options |= {"ignored_columns": data.ignored_columns, "format": data.format}
    options["chat"] = ChatEncoder(tokenizer, data.max_seq_length, data.on_overlong, data.assistant_turns)
    if dataset is None and ":" in data.source:
        dataset = SOURCES.resolve(data.source)()
    if dataset is not None:
        corpus = documents_from(dataset, limit=data.limit, name=data.source, **options)
    elif data.source == "memory":
        raise ValueError(
            "data.source=memory: data that a program gives, as in MoETrainer(config).train(dataset); "
            "choose another source"
        )
    else:
        corpus = load_documents(
            data.source,
            path=data.path,
            name=data.name,
            config_name=data.config_name,
            split=data.split,
            streaming=data.streaming,
            limit=data.limit,
            **options,
        )
    held_out: Corpus | None = None
    if data.validation_path is not None:
        held_out = load_documents(data.validation_source, path=data.validation_path, **options)
    elif data.validation_split > 0 and not data.streaming:
        corpus, held_out = split_corpus(corpus, data.validation_split, config.train.seed)
        if not any(document.text or document.tokens is not None for document in held_out):
            logger.warning(
                "data.validation_split=%s: there is but one document with text, and it is for training; nothing is "
                "evaluated",
                data.validation_split,
            )
            held_out = None
    return corpus, held_out


def _check_labels(dataset: PackedDataset, name: str, num_samples: int | None = None) -> None:
    """Raises ValueError when nothing can be learned from these samples, nor measured on them."""
    if not dataset.num_labels(num_samples):
        of = "" if num_samples is None else f" among the {num_samples} samples of train.eval_batches"
        raise ValueError(
            f"{name} has no label{of}: of {dataset.num_tokens} tokens every one is ignored (-100 in `labels`, 0 in "
            "`completion_mask`) or the first of its document; look at those columns of the data"
        )


def build_loader(config: Config, dataset: PackedDataset | StreamingPackedDataset, mesh: Mesh) -> GlobalLoader:
    """This rank's slice of the one global order."""
    return GlobalLoader(
        dataset,
        micro_batch_size=config.train.per_device_train_batch_size,
        num_replicas=mesh.layout.dp_size,
        replica=mesh.dp_rank,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        num_workers=config.data.dataloader_num_workers,
        pin_memory=config.data.dataloader_pin_memory,
    )
