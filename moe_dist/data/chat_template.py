"""Conversations to tokens by a tokenizer's own chat template, with labels on what the assistant says alone.

Where the template marks what is generated (`{% generation %}`) its marks decide. Elsewhere a turn is what comes between
the conversation before it, with the prompt to generate, and the conversation up to its end; both must be beginnings of
the whole text, or nobody could say where the turn lies, and the conversation is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moe_dist.data.conversations import Completion, Conversation, Preference
from moe_dist.data.preferences import SIDES
from moe_dist.data.tokenised import IGNORE_INDEX, TokenRow
from moe_dist.data.tokenizer import HuggingFaceTokenizer, Tokenizer

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWERS = "Assistant:"
_Encoded = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]
"""Token ids (n,), and which of them are learned."""
_PLAIN = "plain: Role, colon, content, a line each; version 1"


class Overlong(ValueError):
    """A sample that is longer than `max_seq_length` where that is an error."""


@dataclass(frozen=True)
class ChatEncoder:
    """Conversations, completions and preferences as token ids with labels.

    `on_overlong`: what becomes of more than `max_seq_length` tokens (None: no limit). `turns`: "last" learns only the
    last of the turns that would be learned.
    """

    tokenizer: Tokenizer
    max_seq_length: int | None = None
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    turns: Literal["all", "last"] = "all"

    @property
    def stamp(self) -> str:
        """Equal for what gives equal rows, as far as the tokenizer's own fingerprint does not tell."""
        template = _template_of(self.tokenizer, None) or _PLAIN
        digest = hashlib.sha256(template.encode()).hexdigest()
        return f"chat|{digest}|{self.max_seq_length}|{self.on_overlong}|{self.turns}"

    def __call__(self, said: Conversation | Completion | Preference) -> TokenRow:
        """Token ids with labels, the end not added. Raises ValueError for what cannot be learned, naming why."""
        if isinstance(said, Preference):
            return self._preference(said)
        return self._fitting(*self._encoded(said))

    def _encoded(self, said: Conversation | Completion) -> _Encoded:
        if isinstance(said, Completion):
            ids, learned = self._completion(said)
        else:
            if self.turns == "last":
                said = _last_only(said)
            ids, learned = self._conversation(said)
        if not learned.any():
            raise ValueError("the template leaves no token to learn")
        return ids, learned

    def _preference(self, said: Preference) -> TokenRow:
        """Both answers, each with the prompt: cut off or left out together, or not at all."""
        sides = {name: self._encoded(getattr(said, name)) for name in SIDES}
        limit = self.max_seq_length
        over = [name for name, (ids, _) in sides.items() if limit is not None and len(ids) > limit]
        note = None
        if over:
            lengths = " and ".join(f"{name!r} has {len(sides[name][0]):,} tokens" for name in over)
            what = f"{lengths}, and max_seq_length is {limit:,}"
            self._may_be_cut(what)
            kept = {name: (int(learned[1:limit].sum()), int(learned.sum())) for name, (_, learned) in sides.items()}
            if lost := [name for name, (count, _) in kept.items() if not count]:
                raise ValueError(f"{what}: nothing of the answer in {lost[0]!r} is left")
            words = ", ".join(f"{count:,} of {of:,} learned tokens of {name!r}" for name, (count, of) in kept.items())
            note = f"{what}: cut off, {words} stay"
            sides = {name: (ids[:limit], learned[:limit]) for name, (ids, learned) in sides.items()}
        chosen, rejected = (
            TokenRow(ids, np.where(learned, ids, IGNORE_INDEX), whole=True) for ids, learned in sides.values()
        )
        if np.array_equal(chosen.ids, rejected.ids):
            raise ValueError(f"{'what is left of ' if over else ''}'chosen' and 'rejected' are the same tokens")
        return chosen._replace(note=note, rejected=rejected)

    def _completion(self, said: Completion) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        # Apart, as they come when text is generated; together a token could lie across the border.
        parts = [np.asarray(self.tokenizer.encode(text), dtype=np.int64) for text in (said.prompt, said.completion)]
        ids = np.concatenate([*parts, np.array([self.tokenizer.eos_id])])
        return ids, np.arange(len(ids)) >= len(parts[0])

    def _conversation(self, said: Conversation) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            return _by_template(self.tokenizer, said)
        return _plain(self.tokenizer, said)

    def _fitting(self, ids: npt.NDArray[np.int64], learned: npt.NDArray[np.bool_]) -> TokenRow:
        note = None
        limit = self.max_seq_length
        if limit is not None and len(ids) > limit:
            what = f"{len(ids):,} tokens, and max_seq_length is {limit:,}"
            self._may_be_cut(what)
            kept = int(learned[1:limit].sum())
            if not kept:
                raise ValueError(f"{what}: nothing to learn is left of it")
            note = f"{what}: cut off, {kept:,} of {int(learned.sum()):,} learned tokens stay"
            ids, learned = ids[:limit], learned[:limit]
        return TokenRow(ids, np.where(learned, ids, IGNORE_INDEX), whole=True, note=note)

    def _may_be_cut(self, what: str) -> None:
        if self.on_overlong == "error":
            raise Overlong(f"{what} (on_overlong=error; truncate and drop are the others)")
        if self.on_overlong == "drop":
            raise ValueError(f"{what}: dropped (on_overlong=drop)")


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant begins, in the form in which it is learned.

    `messages`: `{"role": ..., "content": text}` each. A tokenizer from files that has no chat template has no form:
    contents follow each other, a line each. Raises ValueError for what a template refuses.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        if tokenizer.has_chat_template:
            return tokenizer.encode_chat(messages)
        return [int(token) for token in tokenizer.encode("".join(f"{one['content']}\n" for one in messages))]
    turns = [dict(one) for one in messages]
    ids, _ = _plain(tokenizer, Conversation(turns, [False] * len(turns)))
    return [*map(int, ids), *map(int, tokenizer.encode(_ANSWERS))]


def _last_only(said: Conversation) -> Conversation:
    last = max(number for number, learned in enumerate(said.learned) if learned)
    return Conversation(said.turns, [number == last for number in range(len(said.turns))], said.tools)


def _plain(tokenizer: Tokenizer, said: Conversation) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """For tokenizers without files of their own: `User: ...` on a line, and the end of document after each answer."""
    if said.tools or any("tool_calls" in turn for turn in said.turns):
        raise ValueError(f"tokenizer {tokenizer.name!r} has no form for tools; take one with a chat template")
    ids: list[npt.NDArray[np.int64]] = []
    learned: list[npt.NDArray[np.bool_]] = []

    def add(tokens: Any, learn: bool) -> None:
        ids.append(np.asarray(tokens, dtype=np.int64))
        learned.append(np.full(len(ids[-1]), learn))

    for turn, learn in zip(said.turns, said.learned, strict=True):
        if turn["role"] != "assistant":
            add(tokenizer.encode(f"{turn['role'].capitalize()}: {turn['content']}\n"), False)
            continue
        add(tokenizer.encode(_ANSWERS), False)
        add(tokenizer.encode(f" {turn['content']}"), learn)
        add([tokenizer.eos_id], learn)
    return np.concatenate(ids), np.concatenate(learned)


def _template_of(tokenizer: Tokenizer, tools: list[Any] | None) -> str | None:
    inner = getattr(tokenizer, "inner", None)
    if inner is None or not getattr(inner, "chat_template", None):
        return None
    return str(inner.get_chat_template(None, tools))


def check_template(tokenizer: Tokenizer) -> None:
    """Raises ValueError for a tokenizer that cannot put conversations into tokens."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return
    if not tokenizer.has_chat_template:
        raise ValueError(
            f"data.tokenizer={tokenizer.name}: it has no chat template, and the data are conversations; take the "
            "tokenizer of an instruction-tuned model, put chat_template.jinja into its folder, or give prompt and "
            "completion as texts"
        )
    if not tokenizer.inner.is_fast:
        raise ValueError(
            f"data.tokenizer={tokenizer.name}: it cannot tell where its tokens lie in the text (not a fast tokenizer), "
            "and the assistant's would not be known; take one with tokenizer.json"
        )


def _by_template(
    tokenizer: HuggingFaceTokenizer, said: Conversation
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    check_template(tokenizer)
    template = _template_of(tokenizer, said.tools) or ""
    text = _rendered(tokenizer, said, len(said.turns), prompt=False)
    for number, turn in enumerate(said.turns, start=1):
        # A role that a template does not know is left out without a word.
        if turn["role"] in ("system", "developer", "user") and turn["content"].strip() not in text:
            raise ValueError(
                f"turn {number} ({turn['role']}): the chat template of {tokenizer.name!r} leaves its content out"
            )
    if _MARKED.search(template):
        return _by_marks(tokenizer, said)
    spans = [_span(tokenizer, said, number, text) for number, learn in enumerate(said.learned) if learn]
    encoded = tokenizer.inner(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    # A token across the border is part of the prompt: generation begins after it.
    learned = np.zeros(len(offsets), dtype=bool)
    for begin, end in spans:
        learned |= (offsets[:, 0] >= begin) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
    return np.asarray(encoded["input_ids"], dtype=np.int64), learned


def _by_marks(
    tokenizer: HuggingFaceTokenizer, said: Conversation
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    made = tokenizer.inner.apply_chat_template(
        said.turns, tools=said.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = np.asarray(made["input_ids"], dtype=np.int64)
    learned = np.asarray(made["assistant_masks"], dtype=np.int64) == 1
    mine = [learn for turn, learn in zip(said.turns, said.learned, strict=True) if turn["role"] == "assistant"]
    if all(mine):
        return ids, learned
    begins = np.flatnonzero(learned & ~np.concatenate([[False], learned[:-1]]))
    if len(begins) != len(mine):
        raise ValueError(
            f"the chat template of {tokenizer.name!r} marks {len(begins)} stretches for {len(mine)} turns of the "
            "assistant: it is not known which one is not to be learned; remove train=false"
        )
    turn_of = np.cumsum(np.isin(np.arange(len(ids)), begins)) - 1
    return ids, learned & np.array(mine)[np.maximum(turn_of, 0)]


def _span(tokenizer: HuggingFaceTokenizer, said: Conversation, number: int, text: str) -> tuple[int, int]:
    """Where in `text` turn `number` lies, from the first character the assistant writes to the end of its turn."""
    named = f"turn {number + 1} (assistant): the chat template of {tokenizer.name!r}"
    if not number:
        raise ValueError(
            f"{named} cannot say where it begins, since it is the first; begin with a user's or a system's"
        )
    before = _rendered(tokenizer, said, number, prompt=True)
    until = _rendered(tokenizer, said, number + 1, prompt=False)
    if not until.startswith(before) or not text.startswith(until):
        raise ValueError(
            f"{named} writes it otherwise than the turns before it lead to (thinking that is left out of earlier "
            "turns?), so its tokens are not known; set data.assistant_turns=last, or train=false for the turn"
        )
    end = len(until)
    closed = until.rstrip()
    if any(closed.endswith(str(token)) for token in tokenizer.inner.added_tokens_decoder.values()):
        end = len(closed)  # the line end after the token that ends the turn is nobody's
    return len(before), end


def _rendered(tokenizer: HuggingFaceTokenizer, said: Conversation, number: int, prompt: bool) -> str:
    """The first `number` turns as the template writes them, `prompt`: up to where the assistant's begins."""
    try:
        return str(
            tokenizer.inner.apply_chat_template(
                said.turns[:number], tools=said.tools, tokenize=False, add_generation_prompt=prompt
            )
        )
    except Exception as error:  # of jinja, in the words of whoever wrote the template
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template of {tokenizer.name!r} refuses this: {reason}") from None
