"""Rows of preference data, in trl's forms: a prompt with a chosen and a rejected answer, as texts or as turns.

Without `prompt` it is what both answers begin with. Where that border lies makes no difference to what is learned: what
both have in common is as probable in one as in the other, and falls out of the margin between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_dist.data.conversations import Completion, Preference, Turns, add_turns, checked, text_of

SIDES = ("chosen", "rejected")


def preference_of(row: Mapping[str, Any]) -> Preference:
    """What a row says. Raises ValueError naming what does not fit, or could be meant in two ways."""
    for name in SIDES:
        if row.get(name) is None:
            raise ValueError(f"no {name!r} (fields: {sorted(map(str, row))})")
    are_texts = [isinstance(row[name], str) for name in SIDES]
    if are_texts[0] != are_texts[1]:
        raise ValueError("of 'chosen' and 'rejected' one is a text, the other turns; make them alike")
    return _of_texts(row) if are_texts[0] else _of_turns(row)


def _of_texts(row: Mapping[str, Any]) -> Preference:
    chosen, rejected = (text_of(row[name], repr(name)) for name in SIDES)
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same: nothing to prefer")
    prompt = row.get("prompt")
    if prompt is None:
        prompt = _common_beginning(chosen, rejected)
        if not prompt:
            raise ValueError("no 'prompt', and 'chosen' and 'rejected' have no beginning in common that could be it")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif not isinstance(prompt, str):
        raise ValueError("'prompt' is turns, 'chosen' and 'rejected' are texts; make them alike")
    elif not prompt:
        raise ValueError("'prompt' is empty: the first token of an answer would have nothing before it")
    elif chosen.startswith(prompt) and rejected.startswith(prompt):
        raise ValueError(
            "'chosen' and 'rejected' begin with the prompt, which would be there twice; take it out of them, or leave "
            "it out by data.ignored_columns=[prompt]"
        )
    for name, text in zip(SIDES, (chosen, rejected), strict=True):
        if not text:
            raise ValueError(f"{name!r} has no answer: nothing comes after the prompt")
    text_of(prompt, "'prompt'")
    return Preference(Completion(prompt, chosen), Completion(prompt, rejected))


def _common_beginning(chosen: str, rejected: str) -> str:
    """What both begin with, up to the last white space: a word is not cut in two, and brings its space along."""
    common = chosen[: _num_alike(chosen, rejected)]
    return common[: max(common.rfind(" "), common.rfind("\n"), 0)]


def _of_turns(row: Mapping[str, Any]) -> Preference:
    sides = [Turns(), Turns()]
    for name, side in zip(SIDES, sides, strict=True):
        add_turns(side, row[name], repr(name))
    chosen, rejected = sides
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same: nothing to prefer")
    prompt, common = Turns(), _num_alike(chosen.turns, rejected.turns)
    given = row.get("prompt")
    answers_alone = all(side.turns[0]["role"] == "assistant" for side in sides)
    if isinstance(given, str) and not answers_alone:
        # As in many data sets: the turns have everything, and the prompt stands beside them once more.
        asked = [turn["content"].strip() for turn in chosen.turns[:common] if turn["role"] == "user"]
        if given.strip() not in asked:
            raise ValueError("'prompt' is a text that is not what a user asks in both 'chosen' and 'rejected'")
    elif isinstance(given, str):
        add_turns(prompt, [{"role": "user", "content": given}], "'prompt'")
    elif given is not None:
        add_turns(prompt, given, "'prompt'")
        if prompt.turns == chosen.turns[: len(prompt.turns)] == rejected.turns[: len(prompt.turns)]:
            prompt = Turns()  # they have it, too
        elif not answers_alone:
            raise ValueError("'chosen' and 'rejected' begin with other turns than the assistant's or those of 'prompt'")
    if not prompt.turns:
        _check_common(sides, common)
        prompt = Turns(chosen.turns[:common])
        sides = [Turns(side.turns[common:], side.learned[common:]) for side in sides]
    not_learned = [False] * len(prompt.turns)
    whole = [Turns(prompt.turns + side.turns, not_learned + side.learned) for side in sides]
    return Preference(*(_named(name, side, row) for name, side in zip(SIDES, whole, strict=True)))


def _check_common(sides: list[Turns], common: int) -> None:
    """That what comes after the common turns is an answer on either side."""
    if not common:
        raise ValueError("no 'prompt', and 'chosen' and 'rejected' have no turn in common that could be it")
    for name, side in zip(SIDES, sides, strict=True):
        if common == len(side.turns):
            raise ValueError(f"{name!r} has no answer: all its {common} turns are in the other one, too")
        if side.turns[common]["role"] != "assistant":
            raise ValueError(
                f"turn {common + 1} of 'chosen' and 'rejected' differs, and is not the assistant's: they answer "
                "different prompts"
            )


def _num_alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Entries at the front of both that are the same."""
    different = (number for number, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(different, min(len(one), len(other)))


def _named(name: str, side: Turns, row: Mapping[str, Any]) -> Any:
    try:
        return checked(side, row)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
