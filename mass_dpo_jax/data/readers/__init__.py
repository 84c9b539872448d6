"""Readers of datasets: `load(data, split, seed)` in the module that `config.data.name` names.

hub, jsonl, lastfm, medmcqa, movielens, qasc and synthetic are such modules; the others are what
several of them share.

The arguments are those of `load_examples`: the configuration's `data`, of which `load` says what it
reads; "train", "validation", "test" or "all"; and the seed of all that is held out, drawn and
shuffled.
"""
