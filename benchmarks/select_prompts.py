r"""How long does it take to choose k of a million prompts by design, and how much memory?

    python -m benchmarks.select_prompts
    python -m benchmarks.select_prompts --prompts=100000 --k=5000 --width=256

Random features of prompts with n negatives each, the policy being the reference. Beside
`select_prompts` stands the greedy search as it is written: the gains of all prompts at every
choice, log det(I + V H^-1 V'), with H^-1 [D, D] updated after each; in float32 NumPy, of the first
--paper_k choices, its time multiplied. `Touched` is the share of the prompts that ours reads at a
choice. Both must choose the same.
"""

from __future__ import annotations

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import machine
from mass_dpo_jax import cli
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Settings, prompts, sharded_search, shards

RIDGE = Settings().ridge
BLOCK = 100_000  # Prompts whose gains NumPy computes at a time.


def make_vectors(size: int, num_negatives: int, width: int) -> np.ndarray:
    """Makes the information vectors of random features, float32 [M, N, D]; directions 1/k."""
    decay = np.arange(1, width + 1, dtype=np.float32) ** -1.0
    parts = []
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        rng = np.random.default_rng([0, start])
        h = rng.standard_normal((count, num_negatives + 1, width), dtype=np.float32) * decay
        scores, mask = jnp.zeros((count, num_negatives)), jnp.ones((count, num_negatives), bool)
        parts.append(np.asarray(prompts.information_vectors(jnp.asarray(h), scores, mask)))
    return np.concatenate(parts)


def choose_plainly(vectors: np.ndarray, k: int) -> tuple[list[int], float]:
    """Returns the first k choices, every gain computed at each of them, and the seconds taken."""
    began = time.perf_counter()
    inverse = np.eye(vectors.shape[2], dtype=np.float32) / np.float32(RIDGE)
    unit = np.eye(vectors.shape[1], dtype=np.float32)
    chosen: list[int] = []
    for _ in range(k):
        gains = np.concatenate(
            [
                np.linalg.slogdet(unit + (v @ inverse) @ v.transpose(0, 2, 1))[1]
                for v in (vectors[i : i + BLOCK] for i in range(0, len(vectors), BLOCK))
            ]
        )
        gains[chosen] = -np.inf
        best = int(gains.argmax())
        chosen.append(best)
        v = vectors[best]
        left = inverse @ v.T
        inverse -= left @ np.linalg.solve(unit + v @ left, left.T)
    return chosen, time.perf_counter() - began


def main() -> None:
    size, k = flags.FLAGS.prompts, flags.FLAGS.k
    if k > size:
        raise UserError(f"--k={k}: expected at most --prompts={size}")
    busy = machine.check_quiet(_ALLOW_BUSY.value)
    vectors = make_vectors(size, flags.FLAGS.num_negatives, flags.FLAGS.width)
    mesh = shards.make_mesh()
    arrays = shards.shard_rows(mesh, vectors), shards.shard_rows(mesh, np.ones(size, bool))

    def choose() -> tuple[np.ndarray, int]:
        picks, sweeps = prompts.search(*arrays, jnp.float32(1 / RIDGE), k, mesh)
        return np.asarray(picks.indices), int(sweeps)

    indices, sweeps = choose()  # Compiles.
    seconds = []
    for _ in range(flags.FLAGS.rounds):
        began = time.perf_counter()
        choose()
        seconds.append(time.perf_counter() - began)
    plain, plain_seconds = choose_plainly(vectors, min(k, flags.FLAGS.paper_k))
    same = int(np.argmin(np.append(indices[: len(plain)] == plain, False)))
    room = sharded_search.shortlist_size(size // mesh.size) * mesh.size
    figures = {
        "prompts": size,
        "k": k,
        "vectors_gb": round(vectors.nbytes / 1e9, 2),
        "seconds": round(float(np.median(seconds)), 2),
        "plain_seconds": round(plain_seconds * k / len(plain), 1),
        "same_first_choices": f"{same} of {len(plain)}",
        "touched": round((room * k + (sweeps - 1) * size) / (size * k), 4),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "devices": jax.device_count(),
    }
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    machine.record(_OUTPUT.value, busy, figures)


if __name__ == "__main__":
    _OUTPUT, _ALLOW_BUSY = machine.define_flags()
    for name, default, text in (
        ("prompts", 1_000_000, "How many there are."),
        ("k", 1000, "How many to choose."),
        ("num_negatives", 3, "Of each prompt's set."),
        ("width", 64, "Of the features."),
        ("rounds", 3, "How often ours runs."),
        ("paper_k", 5, "Choices of the search as it is written."),
    ):
        flags.DEFINE_integer(name, default, text, lower_bound=1)
    cli.run(main)
