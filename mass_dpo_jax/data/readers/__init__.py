"""Readers of data sets: `load(data, split, seed)` in the module that `config.data.name` names.

hub, jsonl, lastfm, medmcqa, movielens, qasc and synthetic are such modules; the others are what
several of them share.
"""
