"""From run folders to the paper's tables and figures: what `mass_dpo_jax.report` is made of.

And the simulation of its Theorem 5.1, which `benchmarks.simulation` runs.
"""
