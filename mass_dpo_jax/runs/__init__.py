"""The folder of a run: what is in it, and with what the run may be resumed.

Its modules:

run_folder.py     its files and checkpoints by name, and its lock
run_config.py     config.json, with paths that lead to the files from the current folder
origin.py         origin.json: the files and weights that the run began from, by digest
resume.py         the settings and data that it may be resumed with
metrics_files.py  metrics.jsonl and metrics.json, written and read
loggers.py        the figures of a run in metrics.jsonl, TensorBoard and Weights & Biases
"""
