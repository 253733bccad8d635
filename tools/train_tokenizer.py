"""Train a byte-level BPE tokenizer on a corpus and save it as a folder that `load_tokenizer` reads.

    python tools/train_tokenizer.py --source stdlib --vocab-size 4096 --out tokenizers/python
    python tools/train_tokenizer.py --source text --path 'corpus/**/*.txt' --out tokenizers/mine
 Byte-level BPE (Radford et al., "Language models are unsupervised multitask learners", 2019) has no unknown
token: every text comes back exactly. Prints how many bytes a token stands for on documents kept out of
training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from moe_dist.data import load_documents, load_tokenizer, split_corpus
from moe_dist.data.corpus import Corpus

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
SMALLEST_VOCABULARY = 256 + 2  # every byte, and the two special tokens


def texts_of(corpus: Corpus) -> Iterator[str]:
    """The texts of `corpus`, documents that came tokenised left out."""
    return (document.text for document in corpus if document.text is not None)


def train(texts: Iterator[str], vocab_size: int, out: str) -> None:
    """Train on `texts` and write tokenizer.json and tokenizer_config.json to the folder `out`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"--vocab-size is {vocab_size}; give at least {SMALLEST_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN)
    fast.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer.")
    parser.add_argument("--source", choices=("stdlib", "text", "jsonl", "parquet"), default="stdlib")
    parser.add_argument("--path", nargs="+", help="files or globs, for every source but stdlib")
    parser.add_argument("--text-field", default="text", help="field of the text in jsonl and parquet rows")
    parser.add_argument("--limit", type=int, help="look at the first so many documents only")
    parser.add_argument("--vocab-size", type=int, default=4096, help="special tokens counted")
    parser.add_argument("--out", required=True, help="folder to write")
    options = parser.parse_args(arguments)

    try:
        corpus = load_documents(options.source, path=options.path, text_field=options.text_field, limit=options.limit)
        training, held_out = split_corpus(corpus, validation_split=0.02)
        train(texts_of(training), options.vocab_size, options.out)
    except ValueError as error:
        parser.error(str(error))

    tokenizer = load_tokenizer(options.out)
    num_bytes = num_tokens = 0
    for text in texts_of(held_out):
        num_bytes += len(text.encode("utf-8"))
        num_tokens += len(tokenizer.encode(text))
    print(f"wrote {options.out}: {tokenizer.vocab_size} tokens")
    if num_tokens:
        print(f"held-out text: {num_bytes / num_tokens:.2f} bytes per token ({num_bytes} bytes)")
    else:
        print("held-out text: none (the corpus has a single document)")


if __name__ == "__main__":
    main()
