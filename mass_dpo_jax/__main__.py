"""Lists the commands."""

from __future__ import annotations

import ast
from pathlib import Path

from mass_dpo_jax.help import say


def main() -> None:
    """The command: names and first lines of the modules that are commands."""
    package = Path(__file__).parent
    lines = []
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path != Path(__file__) and "\nif __name__ ==" in source:
            name = ".".join(path.relative_to(package).with_suffix("").parts)
            about = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
            lines.append(f"  {name.removesuffix('.__main__'):12} {about}")
    say("Commands, as in python -m mass_dpo_jax.train --help:\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
