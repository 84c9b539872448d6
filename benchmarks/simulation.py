r"""What selection does to the error of what is learnt, where the truth is known.

    python -m benchmarks.simulation --output=theory.png
    python -m benchmarks.simulation --output=quick.png --seeds=2
    python -m benchmarks.simulation --output=docs/theory.png --seeds=24

Theorem 5.1 of MASS-DPO says that the logit error of a log-linear policy falls as n, the number of
selected negatives, grows. It says so of one prompt, where it cannot (docs/theory.md); what happens
with many is measured here. The policy is $\pi_\theta(y|x) \propto \exp(\theta^\top h(x, y))$, with
a reference that is uniform and beta = 1, so that rewards are logits. The setting:

- features h on the unit sphere in d dimensions, C = 20 candidates a prompt, 500 prompts; iid, or
  in `clusters`: each candidate near one of 5 centres of its prompt, so that many are redundant.
- theta* in a random direction, with norm 1.5 sqrt(d), so that logits have a standard deviation of
  1.5 in any d and are equally hard to learn. The chosen response is drawn from the Plackett-Luce
  model, that is the softmax of the true logits; the other N = 19 are the pool of negatives.
- training from theta = 0 with the gradient of all prompts at once: 300 steps of Adam, step size 0.1
  with cosine decay, which reaches the minimum of a loss whose sets stay fixed (tests/).
- the ridge is 0.1.

The measure is the relative logit error on 500 fresh prompts: the root mean square, over prompts
and pairs of candidates, of the difference between learnt and true logits' differences, over that
of the true ones. 0 is perfect; 1 is what theta = 0 has. Two parts of it: the scale of the learnt
logits, their regression on the true ones, 1 if right; and the error that is left when they are
multiplied by the best number, which is all of it that matters to a ranking.

Sets are chosen once at the start, where the policy is the reference and all scores are 0; or again
every 20 steps; or at every step. `pl_sampled` draws n negatives from the pool weights p and weights
them so that beta (1 - sigma(Z)) sum_j w_j phi_j, Z of the whole pool, is an unbiased estimate of
the gradient of the loss on all negatives.
"""

from __future__ import annotations

from collections.abc import Sequence

from mass_dpo_jax.cli.parser import Parser, png_path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: tables in Markdown to the terminal, a picture to `--output`."""
    parser = Parser(__doc__)
    parser.add_argument("--output", type=png_path, required=True, help="the PNG to write")
    parser.add_argument("--seeds", type=int, default=8, help="worlds, at least 2 (default: 8)")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: errors are over seeds")
    from benchmarks import simulation_worlds

    by_size, by_dimension = simulation_worlds.run(options.seeds)
    print(simulation_worlds.tables(by_size, by_dimension, options.seeds))
    with parser.user_errors(options.output):
        simulation_worlds.plot(by_size, by_dimension, options.output)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
