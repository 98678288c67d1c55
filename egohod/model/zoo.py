"""Named geometries: the sizes of both towers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from egohod.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """Sizes of both towers."""

    name: str
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    embed_dim: int
    mlp_ratio: float = 4.0
    slowfast: bool = False
    """Two paths with motion adapters, see :mod:`egohod.model.slowfast`."""
    context_length: int = 77
    vocab_size: int = 49408

    @property
    def patches_per_frame(self) -> int:
        """Patch tokens of one frame."""
        return (self.image_size // self.patch_size) ** 2


_PLAIN = (
    Geometry("CLIP_VITB16", 224, 16, 768, 12, 12, 512, 12, 8, 512),
    Geometry("CLIP_VITL14", 224, 14, 1024, 24, 16, 768, 12, 12, 512),
    Geometry("CLIP_VITL14_336PX", 336, 14, 1024, 24, 16, 768, 12, 12, 512),
    # Small enough to learn the demo world from scratch on two CPU cores in minutes.
    Geometry("DEMO", 40, 8, 128, 4, 4, 128, 2, 4, 128),
    # For studies of many runs on the demo world: 257 tokens of 16 frames, half of DEMO's time.
    Geometry("DEMO_SMALL", 32, 8, 96, 3, 2, 96, 2, 4, 96),
)
_SLOWFAST = (replace(plain, name=f"{plain.name}_Slowfast", slowfast=True) for plain in _PLAIN)
GEOMETRIES = {geometry.name: geometry for geometry in (*_PLAIN, *_SLOWFAST)}


def geometry(name: str) -> Geometry:
    """The geometry called ``name``; :class:`UserError` lists the names there are."""
    if name not in GEOMETRIES:
        raise UserError(f"model.name: no geometry '{name}'; there are {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]
