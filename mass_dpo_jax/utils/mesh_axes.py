"""Names of the mesh's axes, which models, selection and training split arrays over."""

from __future__ import annotations

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = AXES[:2]  # The axes that examples are split over.
