"""The rules on which tests of all rules run. A new rule has a line here, and no other list."""

from __future__ import annotations

from typing import Any

CAREFUL = {"horizon": True, "beginnings": True, "clip_squares": 10.0, "trained_starts": True}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor": ("geodesic_rnn", {"hidden": 5}),
    "basis": ("geodesic_rnn", {"hidden": 5, "basis": 9}),
    "every": ("geodesic_rnn", {"hidden": 5, "every": 3}),
    "careful": ("geodesic_rnn", {"hidden": 5} | CAREFUL),
    "horizon": (
        "geodesic_rnn",
        {"hidden": 5, "basis": 9, "every": 3, "renew": 2, "decay": 0.1} | CAREFUL,
    ),
    "lstm": ("coordinatewise_lstm", {"hidden": 4}),
    "scheduled": ("scheduled", {"base_config": {"hidden": 5}, "hidden": 3}),
    "scheduled lstm": (
        "scheduled",
        {"base": "coordinatewise_lstm", "base_config": {"hidden": 4, "output_scale": 0.1}},
    ),
    "rnnprop": ("rnnprop", {"hidden": 4}),
}
# Rules by themselves, with one option each; and as optimizers, with all of them together.
ALONE = [name for name in RULES if name != "horizon"]
DROP_IN = [name for name in RULES if name not in ("careful", "scheduled lstm")]
