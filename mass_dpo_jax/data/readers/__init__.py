"""Readers of datasets: `load(data, split, seed)` in the module that `config.data.name` names.

lastfm, medmcqa, movielens, preferences, qasc and synthetic are such modules; the others are what
they share.

The arguments are those of `load_examples`: the configuration's `data`, of which `load` says what it
reads; "train", "validation", "test" or "all"; and the seed of all that is held out, drawn and
shuffled.
"""
