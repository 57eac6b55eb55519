"""Calibrations: budgets by layer, KV head and length that a model was checked at, in a file beside its config.

The file says which model, routers, settings and version of this package it was made with, and is refused with others.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils.hub import cached_file

from ..architectures.versions import VERSION
from ..config import KEY, MOST_KEYS, SparseAttentionConfig
from ..router.head_budgets import HeadBudgets
from ..system.files import read_json, write_json
from .adapters import refuse_adapters
from .attach import check_places, is_of_router, routers
from .config_dispatch import write_settings

logger = logging.getLogger(__name__)

FILE = "sparse_calibration.json"
FORMAT = 2
SAMPLES = 256  # weights of a tensor that its fingerprint reads
# settings that a calibration takes the place of
UNUSED = ("density", "min_keys", "max_keys", "mass_threshold", "retrieval_heads", "bookkeeping")


class CalibrationError(ValueError):
    """A calibration that cannot be made, read or used; the message says why and what to do."""


@dataclass(frozen=True)
class Calibration:
    """Budgets of a model, what they were made with, and what was found with them on other windows.

    ``shares`` maps the layer to rows of shares of the visible keys, or of keys where ``mass`` is None, see
    `HeadBudgets`; ``retrieval_heads`` holds pairs (layer, KV head), as the settings do, in whose place they stand;
    ``made_with`` holds the fingerprints of backbone and routers, the settings and the version; ``fit`` and ``verified``
    are figures.
    """

    preset: str | None
    # share of the softmax mass that 95 % of the tiles keep; None if an average number of keys was shared out
    mass: float | None
    ends: tuple[int, ...]
    shares: Mapping[int, tuple[tuple[float, ...], ...]]
    retrieval_heads: tuple[tuple[int, int], ...]
    made_with: Mapping[str, Any]
    fit: Mapping[str, Any]
    verified: Mapping[str, Any]

    def budgets(self, layer: int) -> HeadBudgets:
        return HeadBudgets(self.ends, self.shares[layer], in_keys=self.mass is None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict, with the hash of all it holds."""
        values = {**asdict(self), "shares": {str(layer): rows for layer, rows in self.shares.items()}, "format": FORMAT}
        return {**values, "sha256": _hash(values)}


def _hash(values: Mapping[str, Any]) -> str:
    # sorted: the same hash in whatever order a file names its fields
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_calibration(path: str | Path) -> Calibration:
    """Read a file. Raises CalibrationError if it is cut off, was changed by hand or has another layout."""
    try:
        values = read_json(path)
    except ValueError as error:
        raise CalibrationError(str(error)) from error
    except RecursionError as error:
        raise CalibrationError(
            f"{path} is nested too deep for a calibration: make it anew with hf-sparse-attn calibrate"
        ) from error
    known = {f.name for f in fields(Calibration)}
    if not isinstance(values, dict) or set(values) != known | {"format", "sha256"} or values["format"] != FORMAT:
        raise CalibrationError(
            f"{path} is no calibration of format {FORMAT}: make it anew with hf-sparse-attn calibrate"
        )
    written = values.pop("sha256")
    if written != _hash(values):
        raise CalibrationError(
            f"{path} does not have the hash that it was written with: it was changed. Make it anew with "
            "hf-sparse-attn calibrate"
        )
    del values["format"]
    try:
        return _calibration(values)
    except ValueError as error:
        raise CalibrationError(
            f"{path} is no calibration: {error}. Make it anew with hf-sparse-attn calibrate"
        ) from error


def _calibration(values: dict[str, Any]) -> Calibration:
    """The calibration that the values of a file make.
    Raises ValueError, naming the field, for one that no calibration has.
    """
    for name in ("shares", "made_with", "fit", "verified"):
        if not isinstance(values[name], dict):
            raise ValueError(f"{name} is {values[name]!r:.60}: must be a mapping")
    preset, mass, ends = values["preset"], values["mass"], values["ends"]
    if not (preset is None or isinstance(preset, str)):
        raise ValueError(f"preset is {preset!r:.60}: must be a text or null")
    # type() instead of isinstance(): a bool is an int
    if mass is not None and not (type(mass) in (int, float) and 0 < mass <= 1):
        raise ValueError(f"mass is {mass!r:.60}: must be a share in (0, 1] or null")
    if not (isinstance(ends, list) and all(type(end) is int and end <= MOST_KEYS for end in ends)):
        raise ValueError(f"ends is {ends!r:.60}: must be a list of numbers of keys")
    shares = {}
    for layer, rows in values["shares"].items():
        if not layer.isdecimal() or len(layer) > 6:
            raise ValueError(f"shares has the layer {layer!r:.60}: must be a layer's index")
        whole = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
        if not whole or not all(
            type(share) in (int, float) and 0 < share <= MOST_KEYS for row in rows for share in row
        ):
            raise ValueError(f"shares.{layer} is {rows!r:.60}: must be rows of a share for every KV head")
        shares[int(layer)] = tuple(map(tuple, rows))
    heads = SparseAttentionConfig(retrieval_heads=values["retrieval_heads"]).retrieval_heads  # raises
    calibration = Calibration(**{**values, "ends": tuple(ends), "shares": shares, "retrieval_heads": heads})
    # a file is checked whole when it is read, not when a layer first asks for its budgets
    for layer in shares:
        calibration.budgets(layer)  # raises
    return calibration


def made_with(model: Any) -> dict[str, Any]:
    """What a calibration of ``model`` depends on.

    The backbone's fingerprint reads 256 weights of each tensor as bfloat16, so that it is the same in every dtype a
    checkpoint is loaded in; that of the routers reads all of theirs.

    Raises:
        CalibrationError: a weight is not in memory.
    """
    layer_routers = routers(model)
    values = layer_routers[0].config.to_dict()
    backbone = {
        name: weight
        for name, weight in getattr(model, "base_model", model).named_parameters()
        if not is_of_router(name)
    }
    weights = {
        f"{router.layer}.{name}": weight for router in layer_routers for name, weight in router.named_parameters()
    }
    return {
        "version": VERSION,
        "backbone": _fingerprint(backbone, SAMPLES),
        "routers": _fingerprint(weights, None),
        "settings": {name: value for name, value in values.items() if name not in UNUSED},
    }


def _fingerprint(weights: Mapping[str, Tensor], samples: int | None) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        if weight.device.type == "meta":
            raise CalibrationError(
                f"the weight {name} is not in memory (offloaded or sharded): load the model whole to use its "
                "calibration"
            )
        flat = weight.detach().flatten()
        # evenly spread weights: a fingerprint is to tell checkpoints apart, not to find one changed weight
        read = flat if samples is None else flat[:: max(1, len(flat) // samples)][:samples].bfloat16()
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(read.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def use_calibration(model: Any, calibration: Calibration) -> None:
    """Give every router the budgets of ``calibration``, which must be one of this model.

    Raises:
        CalibrationError: it was made with other weights, routers, settings or another version; the model has adapters.
    """
    try:
        refuse_adapters(model, "use_calibration")
    except ValueError as error:
        raise CalibrationError(str(error)) from error
    # all checks come before the first router changes
    identity, known = made_with(model), calibration.made_with
    wrong = [name for name in identity if identity[name] != known.get(name)]
    if wrong:
        raise CalibrationError(
            f"the calibration was made with another {' and other '.join(wrong)} than this model has: calibrate it with "
            "hf-sparse-attn calibrate, or take bookkeeping.calibration out of sparse_attention in config.json"
        )
    for router in routers(model):
        found_heads = {len(row) for row in calibration.shares.get(router.layer, ())}
        if found_heads != {router.groups}:
            raise CalibrationError(
                f"the calibration has shares of {sorted(found_heads) or 'no'} heads for layer {router.layer}, which "
                f"has {router.groups} "
                "KV heads: make it anew with hf-sparse-attn calibrate"
            )
    settings = replace(routers(model)[0].config, retrieval_heads=calibration.retrieval_heads)
    try:
        check_places(settings, routers(model))
    except ValueError as error:
        raise CalibrationError(str(error)) from error
    write_settings(model, settings)
    for router in routers(model):
        router.budgets = calibration.budgets(router.layer)
    model.calibration = calibration
    _refer(model, FILE)


def _refer(model: Any, file: str | None) -> None:
    """Write the name of the calibration's file, or that there is none, into the model's settings."""
    config = routers(model)[0].config
    write_settings(model, replace(config, bookkeeping=replace(config.bookkeeping, calibration=file)))


def remove_calibration(model: Any) -> None:
    """Take the budgets of a calibration out; those of the config hold again. Its retrieval heads stay in the
    settings.
    """
    for router in routers(model):
        router.budgets = None
    model.calibration = None
    _refer(model, None)


def load_calibration(model: Any, name: str, checkpoint: str | None, options: Mapping[str, Any]) -> None:
    """Use the calibration ``name`` that the settings of a loaded model name.
    Raises CalibrationError as `use_calibration` does.
    """
    if checkpoint is None:
        raise CalibrationError(
            f"the config refers to the calibration {name}, but the model was loaded from a state_dict, which has no "
            "files: take "
            "bookkeeping.calibration out of config.sparse_attention, and give it to the model with "
            "hf_sparse_attn.use_calibration"
        )
    try:
        path = str(cached_file(checkpoint, name, **options))
    except OSError as error:
        raise CalibrationError(
            f"{checkpoint} refers to the calibration {name}, which is not there: calibrate the model anew, or take "
            "bookkeeping.calibration out of sparse_attention in config.json"
        ) from error
    use_calibration(model, read_calibration(path))


def save_calibration(model: Any, folder: Path) -> None:
    """Write the calibration of ``model`` into ``folder``;
    where its weights have changed since it is taken out, which is said.
    """
    calibration = getattr(model, "calibration", None)
    if calibration is None or made_with(model) == calibration.made_with:
        if calibration is not None:
            write_json(folder / FILE, calibration.to_dict())
        elif routers(model)[0].config.bookkeeping.calibration is not None:
            _refer(model, None)
        return
    logger.warning(
        "the weights have changed since this model was calibrated: it is saved without its calibration. Calibrate it "
        "anew"
    )
    remove_calibration(model)


def write_calibration(folder: str | Path, calibration: Calibration) -> None:
    """Put a calibration beside the weights of a saved model, and its name into ``config.json``, last.

    Raises:
        CalibrationError: ``folder`` holds no sparse model.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    parts = [
        part for part in (values, values.get("text_config")) if isinstance(part, dict) and part.get(KEY) is not None
    ]
    if not parts:
        raise CalibrationError(f"{folder} holds no sparse model: its config.json has no {KEY}")
    for part in parts:
        config = SparseAttentionConfig.from_dict(part[KEY])
        part[KEY] = replace(config, bookkeeping=replace(config.bookkeeping, calibration=FILE)).to_dict()
    # the config last: a file that nothing refers to does no harm, a reference without a file would be refused
    write_json(folder / FILE, calibration.to_dict())
    write_json(folder / "config.json", values)
