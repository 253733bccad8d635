"""Rows of chat data as one form: turns with a role and a text, and which of them are learned.

What is known: `messages` (OpenAI), `conversations` (ShareGPT), `prompt` with `completion` (texts or turns),
`instruction`, `input`, `output` (Alpaca), and `prompt` with a `chosen` and a `rejected` answer (`preferences.py`). A
row that does not fit is refused in words that name the turn; whoever reads it adds file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETION, INSTRUCTION, PREFERENCE = "chat", "prompt_completion", "instruction", "preference"
TALKS = ("messages", "conversations", "conversation")
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Conversation:
    """Turns as a chat template takes them; `learned[i]`: turn i is the assistant's, and is to be learned."""

    turns: list[dict[str, Any]]
    learned: list[bool]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Completion:
    """A text, and how it goes on, which alone is learned; no template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Preference:
    """One prompt with two answers, of which the first is the better one; both learned alike, and both differ."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion


@dataclass
class Turns:
    """Of a row, while it is read."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)


def formats_in(columns: Iterable[str]) -> dict[str, str]:
    """The formats that a row with these columns could be, each with the columns that say so."""
    names = set(columns)
    found: dict[str, str] = {}
    talks = [name for name in TALKS if name in names]
    if talks:
        found[CHAT] = ", ".join(talks)
    if {"prompt", "completion"} <= names:
        found[COMPLETION] = "prompt, completion"
    if {"instruction", "output"} <= names:
        found[INSTRUCTION] = ", ".join(name for name in ("instruction", "input", "output") if name in names)
    if {"chosen", "rejected"} <= names:
        found[PREFERENCE] = "chosen, rejected"
    return found


def columns_of(format_: str) -> tuple[str, ...]:
    """The columns that rows of a format may have."""
    return {
        CHAT: (*TALKS, "system", "tools"),
        COMPLETION: ("prompt", "completion", "tools"),
        INSTRUCTION: ("instruction", "input", "output", "system"),
        PREFERENCE: ("prompt", "chosen", "rejected", "tools"),
    }[format_]


def conversation_of(row: Mapping[str, Any], format_: str) -> Conversation | Completion:
    """What a row of `format_` says, which is not `preference`. Raises ValueError naming the turn or the column that
    does not fit."""
    if format_ == CHAT:
        return _chat(row)
    if format_ == COMPLETION:
        return _prompt_completion(row)
    return _instruction(row)


def _chat(row: Mapping[str, Any]) -> Conversation:
    names = [name for name in TALKS if row.get(name) is not None]
    if not names:
        raise ValueError(f"no {' or '.join(TALKS[:2])} (fields: {sorted(map(str, row))})")
    if len(names) > 1:
        raise ValueError(f"both {' and '.join(names)}; which one? Remove one, or data.ignored_columns=[{names[1]}]")
    found = Turns()
    system = text_of(row.get("system"), "'system'") if row.get("system") is not None else ""
    add_turns(found, row[names[0]], repr(names[0]))
    if system.strip():
        if found.turns[0]["role"] == "system":
            raise ValueError("a column 'system', and a first turn that is one too; remove one")
        found.turns.insert(0, {"role": "system", "content": system})
        found.learned.insert(0, False)
    return checked(found, row)


def _prompt_completion(row: Mapping[str, Any]) -> Conversation | Completion:
    for name in ("prompt", "completion"):
        if row.get(name) is None:
            raise ValueError(f"no {name!r} (fields: {sorted(map(str, row))})")
    if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        raise ValueError("of 'prompt' and 'completion' one is a text, the other turns; make them alike")
    if isinstance(row["prompt"], str):
        if not row["completion"]:
            raise ValueError("'completion' is empty: nothing to learn")
        return Completion(text_of(row["prompt"], "'prompt'"), text_of(row["completion"], "'completion'"))
    found = Turns()
    add_turns(found, row["prompt"], "'prompt'")
    found.learned = [False] * len(found.learned)
    add_turns(found, row["completion"], "'completion'")
    return checked(found, row)


def _instruction(row: Mapping[str, Any]) -> Conversation:
    for name in ("instruction", "output"):
        if row.get(name) is None:
            raise ValueError(f"no {name!r} (fields: {sorted(map(str, row))})")
    texts = {name: text_of(row.get(name) or "", repr(name)) for name in ("system", "instruction", "input", "output")}
    asked = "\n\n".join(texts[name] for name in ("instruction", "input") if texts[name].strip())
    turns = [{"role": "system", "content": texts["system"]}] if texts["system"].strip() else []
    turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": texts["output"]}]
    found = Turns()
    add_turns(found, turns, "the row")
    return checked(found, row)


def add_turns(found: Turns, turns: Any, where: str) -> None:
    """Put `turns`, as a row has them, behind those found. Raises ValueError naming `where`."""
    turns = _parsed(turns, where) if isinstance(turns, str) else turns
    if not _is_list(turns):
        raise ValueError(f"{where} is {type(turns).__name__}, not a list of turns")
    if not len(turns):
        raise ValueError(f"{where} is empty")
    for number, turn in enumerate(turns, start=1):
        _add(found, turn, f"{where}, turn {number}")


def _add(found: Turns, turn: Any, where: str) -> None:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is {type(turn).__name__}, not an object with role and content")
    turn = {str(key): value for key, value in turn.items() if value is not None}
    if "role" in turn:
        said, given = turn.get("role"), turn.get("content")
        role = said if said in ROLES else None
    elif "from" in turn:
        said, given = turn.get("from"), turn.get("value")
        role = _SHAREGPT.get(said) if isinstance(said, str) else None
    else:
        raise ValueError(f"{where} has no 'role' (or 'from'); it has {sorted(turn)}")
    if role is None:
        raise ValueError(f"{where}: role {said!r} is unknown; known: {', '.join(sorted({*ROLES, *_SHAREGPT}))}")
    where = f"{where} ({role})"
    calls = _calls(turn.get("tool_calls"), where)
    if said == "function_call":
        calls, given = [_call(_parsed(text_of(given, where), where), where)], ""
    if given is None and not calls:
        raise ValueError(f"{where} has no content")
    content = text_of("" if given is None else given, where)
    if role == "system" and not content.strip():
        return  # it says nothing
    if not content.strip() and not calls and role != "tool":
        raise ValueError(f"{where} is empty")
    made = {"role": role, "content": content}
    made |= {name: text_of(turn[name], f"{where}: {name!r}") for name in _KEPT if name in turn}
    if calls:
        made["tool_calls"] = calls
    found.turns.append(made)
    found.learned.append(role == "assistant" and _is_learned(turn, where))
    if role != "assistant" and any(turn.get(name) for name in ("train", "weight")):
        raise ValueError(f"{where}: only what the assistant says is learned; remove its 'train' or 'weight'")


def _is_learned(turn: Mapping[str, Any], where: str) -> bool:
    """Whether neither `train` nor OpenAI's `weight` forbids it."""
    for name in ("train", "weight"):
        value = turn.get(name, True)
        if value not in (0, 1) or isinstance(value, str):
            raise ValueError(f"{where}: {name!r} is {value!r}; allowed: true and false, 1 and 0")
        if not value:
            return False
    return True


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not _is_list(calls):
        raise ValueError(f"{where}: 'tool_calls' is {type(calls).__name__}, not a list")
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    """One call as templates want it: arguments as an object, where OpenAI writes them as text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: a tool call without a function's name")
    arguments = function.get("arguments") or {}
    arguments = (
        _parsed(arguments, f"{where}: arguments of {function['name']}") if isinstance(arguments, str) else arguments
    )
    made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        made["id"] = call["id"]
    return made


def checked(found: Turns, row: Mapping[str, Any]) -> Conversation:
    """The turns as a conversation, with the tools of the row. Raises ValueError for an order that templates spoil."""
    systems = [number for number, turn in enumerate(found.turns) if turn["role"] in ("system", "developer")]
    if len(systems) > 1:
        raise ValueError(f"turn {systems[1] + 1} is a second system turn; templates drop or misplace it: join them")
    if systems and systems[0]:
        raise ValueError(f"turn {systems[0] + 1} is a system turn, and not the first")
    if not any(turn["role"] == "assistant" for turn in found.turns):
        raise ValueError("no turn of the assistant: nothing to learn")
    if not any(found.learned):
        raise ValueError("no turn that is learned: every one of the assistant has train=false or weight=0")
    tools = row.get("tools")
    tools = _parsed(tools, "'tools'") if isinstance(tools, str) and tools.strip() else tools
    if tools and not _is_list(tools):
        raise ValueError(f"'tools' is {type(tools).__name__}, not a list")
    return Conversation(found.turns, found.learned, list(tools) if tools else None)


def text_of(value: Any, where: str) -> str:
    """`value`, or the texts of a list of parts, joined."""
    if _is_list(value):
        parts = []
        for part in value:
            if (
                not isinstance(part, Mapping)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise ValueError(f"{where}: a part of its content is {kind}, not text")
            parts.append(part["text"])
        value = "".join(parts)
    if not isinstance(value, str):
        raise ValueError(f"{where}: its content is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: lone surrogate at character {error.start}") from None
    return value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: a text that is not JSON ({error})") from None


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | bytes | Mapping)
