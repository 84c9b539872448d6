"""Lists the commands."""

from __future__ import annotations

import difflib
import sys

from mass_dpo_jax.cli.help import HELP, echo, exit_with_error

# Each is a module, and the text is the first line of its docstring.
COMMANDS = {
    "data": "Shows what a dataset looks like to a model: pools, lengths, cuts, first prompts.",
    "train": "Trains a policy on preferences with several negatives.",
    "evaluate": "Measures how a model ranks and rewards the full candidate lists of a split.",
    "score": "Writes log-probabilities and rewards of every response, one JSON line per example.",
    "select": "Chooses negatives without training, for people who train elsewhere.",
    "mine": "Mines negatives for each prompt from a whole catalogue of responses.",
    "export": "Writes a run's policy as a Hugging Face folder, for transformers, vLLM and others.",
    "compare": "Compares runs on the same test examples, with baselines, and draws their curves.",
    "report": "Writes the paper's tables and figures from run folders, with paired comparisons.",
}


def main() -> None:
    """Prints the commands, or refuses words that are none."""
    if words := [word for word in sys.argv[1:] if word not in HELP]:
        (near,) = difflib.get_close_matches(words[0], COMMANDS, n=1, cutoff=0.0)
        exit_with_error(f"{words[0]}: use a dot: python -m mass_dpo_jax.{near}", "")
    lines = [f"  {name:12} {summary}" for name, summary in COMMANDS.items()]
    echo("Commands (python -m mass_dpo_jax.COMMAND --help describes one):\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
