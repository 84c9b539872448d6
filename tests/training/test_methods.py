"""The table of methods, and what other parts of the package read from it."""

from __future__ import annotations

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.losses.one_chosen import LINKS
from mass_dpo_jax.training.methods import METHODS


def test_settings_and_help_know_the_methods_of_the_table() -> None:
    assert list(METHODS) == list(config_lib.CHOICES["method"])
    assert list(METHODS) == list(config_lib.METHOD_SUMMARIES)
    assert all(spec.description.endswith(".") for spec in METHODS.values())
    of_lists = [name for name, spec in METHODS.items() if spec.uses_order]
    assert of_lists == list(config_lib.LIST_METHODS)
    assert all(METHODS[name].criterion == "all" for name in of_lists)
    assert config_lib.CHOICES["loss.link"] == LINKS
