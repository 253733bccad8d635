"""Small tokenizers with chat templates of the kinds that models bring, for the tests of chat data."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "fixtures" / "chat_templates"
KINDS = ("chatml", "llama3", "mistral", "qwen3", "gemma", "tools")
SPECIALS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
)


@cache
def _words() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        ["user assistant system model\n\n", "the answer is seven and the question is what"], trainer
    )
    return tokenizer


def tokenizer_of(kind: str | None, marked: bool = False) -> Any:
    """A `transformers` tokenizer with a template of this kind, its generation marks in or out; None: without one."""
    from transformers import PreTrainedTokenizerFast

    template = None
    if kind is not None:
        template = (TEMPLATES / f"{kind}.jinja").read_text("utf-8").removesuffix("\n")
        if not marked:
            template = re.sub(r"\{%- (end)?generation %\}\n", "", template)
    return PreTrainedTokenizerFast(
        tokenizer_object=_words(),
        bos_token="<s>",
        eos_token="<|im_end|>" if kind in ("chatml", "qwen3", "tools") else "</s>",
        chat_template=template,
    )


def save_tokenizer(folder: Path, kind: str | None, marked: bool = False) -> str:
    """Such a tokenizer as a folder that a run can name."""
    tokenizer_of(kind, marked).save_pretrained(folder)
    return str(folder)
