"""Tab completion: commands and options are typer's, the keys of a run file after CONFIG are ours."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from moe_dist.config import FIELDS, HOMES


class RunCommand(TyperCommand):
    """A command that takes `key=value` after CONFIG."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """What may follow `incomplete`: options, and keys by their full name or, once begun, alone."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-") or "=" in incomplete or not ctx.params.get("config"):
            return found
        from moe_dist.config.names import meaning

        names = {key: key for key in FIELDS} | (HOMES if incomplete else {})
        item = _item_class()
        return found + [
            item(f"{name}=", help=meaning(FIELDS[full])) for name, full in names.items() if name.startswith(incomplete)
        ]


def _item_class() -> Any:
    """What a shell gets; newer releases of typer have a copy of click inside."""
    try:
        from typer._click.shell_completion import CompletionItem
    except ImportError:
        from click.shell_completion import CompletionItem  # type: ignore[assignment]
    return CompletionItem
