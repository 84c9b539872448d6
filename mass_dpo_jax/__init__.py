"""Active negative selection for multi-negative preference optimization, in JAX and Flax."""

import os

__version__ = "0.2.0"

# Of transformers only the tokenizers are used here: no advice to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
