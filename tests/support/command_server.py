"""Runs commands in forks of one process that has imported what they need.

    python tests/support/command_server.py

reads a line of JSON for each command, `[module, words, folder]`, runs `python -m module words...`
there, and writes a line with its exit status, standard output and standard error. To import JAX,
Flax and transformers takes two seconds, most of what a command takes that refuses its input.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile

# What commands import where they do their work; not commands, which a fork is to import itself.
import mass_dpo_jax.estimate.dry_run
import mass_dpo_jax.training.export
import mass_dpo_jax.training.loop
import mass_dpo_jax.training.offline_selection  # noqa: F401


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in iter(sys.stdin.readline, ""):
        module, words, folder = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                answers.close()
                break
            _, status = os.waitpid(child, 0)
            printed = []
            for file in (out, err):
                file.seek(0)
                printed.append(file.read().decode())
        print(json.dumps([os.waitstatus_to_exitcode(status), *printed]), file=answers)
    else:
        return
    # In the child, which ends as the command does.
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
