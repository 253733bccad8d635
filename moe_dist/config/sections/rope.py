"""How rotary positions are stretched past those a model was made for: the keys of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LENGTH = "original_max_position_embeddings"
_LISTS = ("short_factor", "long_factor")
_SWITCHES = ("truncate",)
YARN_BOUNDS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""What the two are where a yarn leaves them out."""
# Kind -> (keys it needs, keys it may have).
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {_LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {_LENGTH}),
    "longrope": (set(_LISTS), {"factor", _LENGTH, "attention_factor"}),
}


def check_rope_scaling(scaling: Mapping[str, Any], max_positions: int, rotary_size: int) -> dict[str, Any]:
    """The same with `original_max_position_embeddings` written out, where its kind has that.

    `rotary_size`: how much of a head is turned. Raises ValueError naming the key that does not fit.
    """
    kind = scaling.get("rope_type")
    if kind not in _KEYS:
        raise ValueError(f"rope_scaling: rope_type={kind}: one of {', '.join(_KEYS)}; null for plain positions")
    needed, optional = _KEYS[kind]
    values = {key: value for key, value in scaling.items() if value is not None and key != "rope_type"}
    for key in needed - values.keys():
        raise ValueError(f"rope_scaling: rope_type={kind} needs {key}")
    for key, value in values.items():
        if key not in needed | optional:
            takes = ", ".join(sorted(needed | optional))
            raise ValueError(f"rope_scaling: {key}: rope_type={kind} takes {takes}")
        if key in _LISTS:
            is_right = isinstance(value, list) and len(value) == rotary_size // 2 and all(map(_is_positive, value))
            what = f"{rotary_size // 2} numbers above 0, one for each pair of a head that is turned"
        elif key in _SWITCHES:
            is_right, what = isinstance(value, bool), "true or false"
        else:
            is_right, what = _is_positive(value), "a number above 0"
        if not is_right:
            raise ValueError(f"rope_scaling: {key}={value}: {what}")
    if values.get("factor", 1) < 1:
        raise ValueError(f"rope_scaling: factor={values['factor']}: at least 1")
    if _LENGTH in optional:
        values.setdefault(_LENGTH, max_positions)
    return {"rope_type": kind, **values}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
