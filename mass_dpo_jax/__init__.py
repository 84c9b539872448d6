"""Active negative selection for multi-negative preference optimization, in JAX and Flax."""

__version__ = "0.1.0"
