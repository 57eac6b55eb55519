"""Tables of settings, read from the dataclasses that validate them: name, default, and the comment beside or above."""

from __future__ import annotations

import inspect
import re

from .markdown import table

FIELD = re.compile(r"    (?P<name>\w+): .+? = (?P<default>.+?)(?:  # (?P<what>.*))?")
FACTORIES = {"field(default_factory=dict)": "{}"}
UNSAID = {  # fields whose names say it in the code
    "seed": "of what is drawn at random",
    "max_grad_norm": "gradients are clipped to this norm",
    "target_modules": "modules that LoRA changes",
}
INTERNAL = {"bookkeeping"}  # what the library writes, not what a user sets


def rows(cls: type) -> list[list[str]]:
    """Name, default and meaning of each field that ``cls`` declares.

    Raises:
        ValueError: a field has no comment that says what it is.
    """
    fields, above = [], ""
    for line in inspect.getsource(cls).splitlines():
        if match := FIELD.fullmatch(line):
            fields.append({**match.groupdict(), "what": match["what"] or above})
        comment = line.strip().removeprefix("# ")
        above = f"{above} {comment}".strip() if line.startswith("    # ") else ""
    shown = [
        {**field, "what": field["what"] or UNSAID.get(field["name"])}
        for field in fields
        if field["name"] not in INTERNAL
    ]
    if missing := [field["name"] for field in shown if not field["what"]]:
        raise ValueError(
            f"{cls.__name__}: {', '.join(missing)} has no comment that says what it is; write one beside or above "
            "the field"
        )
    return [
        [
            f"`{field['name']}`",
            f"`{FACTORIES.get(field['default'], field['default'])}`",
            field["what"].replace("*", r"\*"),
        ]
        for field in shown
    ]


def _shown(*classes: type) -> list[str]:
    return table(["field", "default", "what"], [row for cls in classes for row in rows(cls)])


def sparse_attention() -> list[str]:
    """All fields of `SparseAttentionConfig`."""
    from hf_sparse_attn import SparseAttentionConfig

    return _shown(SparseAttentionConfig)


def distillation() -> list[str]:
    """All fields of `DistillationConfig`."""
    from hf_sparse_attn import DistillationConfig

    return _shown(DistillationConfig)


def joint_stage() -> list[str]:
    """All fields of `SparseTrainingConfig`, then those that `AdaptationConfig` adds."""
    from hf_sparse_attn import AdaptationConfig, SparseTrainingConfig

    return _shown(SparseTrainingConfig, AdaptationConfig)
