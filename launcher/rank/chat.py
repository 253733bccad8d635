"""A conversation in the terminal. In one process: the model's template, streaming, commands that begin with /."""

from __future__ import annotations

import json
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.connect.output import clean

if TYPE_CHECKING:
    from moe_dist.generate.engine import MoEInferenceEngine
    from moe_dist.generate.options import SamplingOptions

_HELP = """/help             this
/clear            forget the conversation
/undo             forget the last question and its answer
/retry            answer the last question again
/system TEXT      say how to answer; starts afresh
/set NAME VALUE   a sampling option, such as temperature 0.7; without a name: show all
/save FILE        the conversation as JSON
/exit             leave (Ctrl-D too); Ctrl-C ends an answer"""


class Chat:
    """One conversation. Without a chat template the text so far is simply continued."""

    def __init__(self, engine: MoEInferenceEngine, sampling: SamplingOptions, system: str | None = None) -> None:
        self.engine, self.sampling = engine, sampling
        self.messages: list[dict[str, str]] = []
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget all but how to answer."""
        self.system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def prompt(self) -> list[int]:
        """Token ids of the conversation. Raises ValueError."""
        from moe_dist.data.chat_template import chat_prompt

        assert self.engine.tokenizer is not None
        return chat_prompt(self.engine.tokenizer, self.messages)

    @property
    def has_form(self) -> bool:
        """Whether its tokenizer says how a conversation is written; those without files have one of their own."""
        return bool(getattr(self.engine.tokenizer, "has_chat_template", True))

    def ask(self, question: str) -> None:
        """Print the answer as it comes, and remember both. What is refused is forgotten."""
        self.messages.append({"role": "user", "content": question})
        try:
            request = self.engine.add(self.prompt(), self.sampling)
        except ValueError:
            self.messages.pop()
            raise
        answer = ""
        try:
            for event in self.engine.run():
                answer += event.text
                print(clean(event.text), end="", flush=True)
        except KeyboardInterrupt:
            self.engine.cancel(request)
            print(" [ended]", end="")
        print(flush=True)
        self.messages.append({"role": "assistant", "content": answer})

    def command(self, line: str) -> bool:
        """Do what a line with / says; False to leave. Raises ValueError."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("exit", "quit"):
            return False
        if name == "help":
            print(_HELP)
        elif name == "clear":
            self.begin(self.system)
        elif name in ("undo", "retry"):
            question = self._take_back()
            if name == "retry":
                self.ask(question)
        elif name == "system":
            self.begin(rest or None)
        elif name == "set":
            self._set(*rest.split(None, 1))
        elif name == "save":
            if not rest:
                raise ValueError("/save FILE: which file?")
            Path(rest).expanduser().write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", "utf-8")
        else:
            raise ValueError(f"/{name}: no such command; /help lists them")
        return True

    def _take_back(self) -> str:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("nothing has been asked yet")
        self.messages.pop()
        return self.messages.pop()["content"]

    def _set(self, name: str = "", value: str = "") -> None:
        if not name:
            for field in fields(self.sampling):
                print(f"{field.name:<20}{getattr(self.sampling, field.name)}")
            return
        now = getattr(self.sampling, name.replace("-", "_"), self)
        if now is self or not value:
            raise ValueError(f"/set {name} {value}: /set lists what there is, and each needs a value")
        try:
            read: Any = (value,) if isinstance(now, tuple) else json.loads(value.lower())
            if isinstance(now, int) and not isinstance(now, bool) and not isinstance(read, int):
                raise ValueError("a whole number")
            if isinstance(now, float) and not isinstance(read, (int, float)):
                raise ValueError("a number")
        except ValueError as error:
            raise ValueError(f"/set {name} {value}: {error}") from error
        self.sampling = replace(self.sampling, **{name.replace("-", "_"): read})


def chat(engine: MoEInferenceEngine, sampling: SamplingOptions, system: str | None) -> int:
    """Read, answer, until the end of input."""
    talk = Chat(engine, sampling, system)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # until now it ends the process
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # earlier lines by the arrow keys
        print("moe-dist: /help lists commands; Ctrl-D leaves" + ("" if talk.has_form else "; no chat template"))
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if not line:
            continue
        try:
            if not line.startswith("/"):
                talk.ask(line)
            elif not talk.command(line):
                return 0
        except (ValueError, OSError) as error:
            print(f"moe-dist: {error}", file=sys.stderr, flush=True)
