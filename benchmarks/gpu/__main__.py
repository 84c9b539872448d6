"""`python -m benchmarks.gpu`: see the package's docstring."""

import importlib.util
import sys

# Before they are imported: this runs on whatever Python a machine with a card has.
NEEDED = (
    "absl flax huggingface_hub jax jaxtyping jinja2 ml_collections numpy optax orbax qwix "
    "safetensors tensorstore tokenizers torch tqdm transformers"
).split()

if __name__ == "__main__":
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: {sys.executable} has no {', '.join(missing)}, which benchmarks.gpu needs")
    import benchmarks.gpu
    from benchmarks.gpu.command import start

    __doc__ = benchmarks.gpu.__doc__  # What --help says.
    start()
