"""The paper's tables and figures from run folders: what `python -m mass_dpo_jax.report` writes."""
