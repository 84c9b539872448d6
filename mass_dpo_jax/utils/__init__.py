"""What everything else may use: files, processes and messages, without models or training.

Its modules:

files.py, file_kinds.py           reading, with a location in errors; atomic writing
run_paths.py                      whether a path is a run folder, and what to give instead
suggestions.py                    what a misspelt name may have meant
cache.py, fingerprint.py          the cache folder; hashes of weights
distributed.py, process_group.py  several processes that run one command
mesh_axes.py                      the names of the mesh's axes
signals.py                        Ctrl-C in one line
"""
