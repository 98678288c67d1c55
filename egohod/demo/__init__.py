"""The embedded demo world: a procedural first-person kitchen with narrated hand-object motions.

Frames, narrations, boxes and questions all follow from one seed; nothing is downloaded.
"""

from egohod.demo.write import make_world, plan

__all__ = ["make_world", "plan"]
