"""Rotating and un-rotating by a model's own rotary embedding, at integer or fractional positions."""

# Shape legend: L positions, D head dim, b batch rows.

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
MATRICES = 16  # rotations kept as matrices: two a decode step


class Rotary:
    """A view of a model's rotary embedding module: its frequencies, its scaling of cos and sin, its layout.

    The module is read at every call, so moving the model moves this too. The first ``2 * len(inv_freq)`` dimensions
    are rotated, in pairs (i, i + half) or, ``interleaved``, (2i, 2i + 1); the others are left as they are. A module
    that rotates each kind of layer by frequencies of its own is told the ``layer_type``.

    Raises:
        ValueError: the module's frequencies change with the length of the input (dynamic RoPE, longrope).
    """

    def __init__(self, module: nn.Module, interleaved: bool = False, layer_type: str | None = None) -> None:
        rope_type = getattr(module, "rope_type", "default")
        rope_type = rope_type[layer_type] if isinstance(rope_type, dict) else rope_type
        if rope_type not in STATIC_ROPE_TYPES:
            raise ValueError(
                f"rope_type={rope_type!r} is not supported by sparse attention: its frequencies change with the "
                "length; "
                f"supported: {', '.join(STATIC_ROPE_TYPES)}"
            )
        self.module = module
        self.interleaved = interleaved
        self.prefix = "" if layer_type is None else f"{layer_type}_"
        self._matrices: dict[tuple[object, ...], Tensor] = {}

    @property
    def _inv_freq(self) -> Tensor:
        return cast(Tensor, getattr(self.module, f"{self.prefix}inv_freq"))

    @property
    def dim(self) -> int:
        """Number of rotated dimensions."""
        return 2 * int(self._inv_freq.shape[-1])

    def _angles(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        # bfloat16 cannot tell neighbouring positions above 256 apart
        inv_freq = self._inv_freq.to(device=device, dtype=torch.float32)
        angle = positions.to(device=device, dtype=torch.float32)[..., None] * inv_freq
        return angle.cos(), angle.sin()

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor, scaling: float) -> Tensor:
        rotated, rest = x[..., : self.dim].float(), x[..., self.dim :]
        if self.interleaved:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            turned = torch.stack(_turn_pair(a, b, cos, sin), -1).flatten(-2)
        else:
            a, b = rotated.chunk(2, -1)
            turned = torch.cat(_turn_pair(a, b, cos, sin), -1)
        turned = turned * scaling if scaling != 1.0 else turned
        return torch.cat([turned, rest.float()], -1) if rest.shape[-1] else turned

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` [..., L, D] at ``positions`` [..., L] (broadcastable, may be fractional) -> float32 [..., L, D]."""
        cos, sin = self._angles(positions, x.device)
        return self._turn(x, cos, sin, self._scaling)

    # A rotation is orthogonal: its inverse has −sin. By what YaRN scales cos and sin, the inverse divides.
    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Inverse of `rotate`: float32 [..., L, D]."""
        cos, sin = self._angles(positions, x.device)
        return self._turn(x, cos, -sin, 1.0 / self._scaling)

    def relative(self, offsets: Tensor, dim: int) -> Tensor:
        """Inverse rotations by ``offsets`` [L] without the embedding's scaling, as matrices:
        x @ matrix, float32 [L, dim, dim].
        """
        cos, sin = self._angles(offsets[:, None], offsets.device)
        return self._turn(
            torch.eye(dim, device=offsets.device, dtype=torch.float32).expand(len(offsets), -1, -1), cos, -sin, 1.0
        )

    def rotation(self, positions: Tensor, dim: int) -> Tensor:
        """``rotate`` of ``dim``-dimensional rows at ``positions`` [b, 1] as a matrix:
        x @ matrix, float32 [b, dim, dim].
        """
        return self._as_matrix(self.rotate, positions, dim)

    def unrotation(self, positions: Tensor, dim: int) -> Tensor:
        """Inverse of `rotation`."""
        return self._as_matrix(self.unrotate, positions, dim)

    def _as_matrix(self, turn: Callable[[Tensor, Tensor], Tensor], positions: Tensor, dim: int) -> Tensor:
        # reading positions back would wait for the device
        if positions.device.type != "cpu" or torch.compiler.is_compiling():
            return turn(
                torch.eye(dim, device=positions.device, dtype=torch.float32).expand(len(positions), -1, -1), positions
            )
        key = (turn.__name__, dim, *positions[:, 0].tolist())
        if key not in self._matrices:  # every layer of a step asks for the same two
            if len(self._matrices) >= MATRICES:
                self._matrices.clear()
            self._matrices[key] = turn(
                torch.eye(dim, dtype=torch.float32, device="cpu").expand(len(positions), -1, -1), positions
            )
        return self._matrices[key]

    @property
    def _scaling(self) -> float:
        return float(getattr(self.module, f"{self.prefix}attention_scaling", 1.0))


# RoPE: (a, b) -> (a · cos − b · sin, b · cos + a · sin) for each pair of dimensions
# (RoFormer, arXiv 2104.09864, section 3.4.2).
def _turn_pair(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)


def find_rotary(model: nn.Module, site: nn.Module, name: str, interleaved: bool) -> Rotary | None:
    """The rotary embedding of the attention module ``site``, called ``name`` in ``model``; None if it has none.

    It is the one that stands nearest: in the module itself, else in the module around it, and so on.

    Raises:
        ValueError: several stand equally near.
    """
    parts = name.split(".")
    for depth in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:depth]))
        held = (around, *around.children()) if depth < len(parts) else (site, *site.children())
        # one module that hangs at two places counts once
        modules = list({id(m): m for m in held if _frequencies(m)}.values())
        if len(modules) > 1:
            names = ", ".join(sorted({type(m).__name__ for m in modules}))
            raise ValueError(
                f"{type(site).__name__} has {len(modules)} rotary embeddings at hand ({names}); sparse attention "
                "supports one"
            )
        if modules:
            layer_type = None if "inv_freq" in _frequencies(modules[0]) else _layer_type(site)
            return Rotary(modules[0], interleaved, layer_type)
    return None


def _frequencies(module: nn.Module) -> list[str]:
    # `original_inv_freq` is a copy that Transformers keeps to go back to
    return [
        name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq") and "original" not in name
    ]


def _layer_type(site: nn.Module) -> str:
    layer_type = getattr(site, "layer_type", None)
    return cast(str, layer_type or site.config.layer_types[site.layer_idx])  # type: ignore[union-attr, index]
