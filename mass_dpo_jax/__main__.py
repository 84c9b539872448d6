"""Lists the commands."""

from __future__ import annotations

import ast
import difflib
import sys
from pathlib import Path

from mass_dpo_jax.cli.help import HELP, refuse, say


def main() -> None:
    """The command: names and first lines of the modules that are commands."""
    package = Path(__file__).parent
    commands = {}
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path != Path(__file__) and "\nif __name__ ==" in source:
            name = ".".join(path.relative_to(package).with_suffix("").parts)
            about = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
            commands[name.removesuffix(".__main__")] = about
    if words := [word for word in sys.argv[1:] if word not in HELP]:
        near = difflib.get_close_matches(words[0], commands, n=1, cutoff=0.0)[0]
        refuse(
            f"{words[0]}: expected a command behind a dot, as in python -m mass_dpo_jax.{near}", ""
        )
    lines = [f"  {name:12} {about}" for name, about in commands.items()]
    say("Commands, as in python -m mass_dpo_jax.train --help:\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
