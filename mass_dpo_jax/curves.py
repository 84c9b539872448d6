"""A picture of training: loss, accuracy, margins and rewards of one or several runs.

Writes one PNG; runs may still be going on:

    python -m mass_dpo_jax.curves runs/mine
    python -m mass_dpo_jax.curves runs/sdpo runs/mass-dpo --output=both.png
    python -m mass_dpo_jax.curves runs/*/ --output=all.png
"""

from __future__ import annotations

from pathlib import Path

from mass_dpo_jax.cli.help import Parser, path, png
from mass_dpo_jax.utils.files import short_names
from mass_dpo_jax.utils.run_paths import check_run


def main() -> None:
    """The command: run folders in, a PNG out."""
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="+", type=path, help="folder of a run")
    parser.add_argument("--output", type=png, default=Path("curves.png"), help="the PNG to write")
    arguments = parser.parse_args()
    from mass_dpo_jax.reports import curves

    with parser.refusing(arguments.output):
        for run in arguments.run:
            if not (run / "metrics.jsonl").exists():
                check_run(run)
        logs = [run / "metrics.jsonl" for run in arguments.run]
        curves.plot(dict(zip(short_names(arguments.run), logs, strict=True)), arguments.output)
    print(f"Curves: {arguments.output}")


if __name__ == "__main__":
    main()
