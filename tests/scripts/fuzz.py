r"""Coverage-guided fuzzing of everything that reads files, by atheris. No pytest.

    pip install ".[fuzz]"
    python -m tests.scripts.fuzz --seconds=600 jsonl lastfm    # no name: all targets

An input is a file of a target's folder, how it is spoilt, and its new content; `corruptions` makes
new ones from those that reached code no other did. Anything but success or a `UserError` that says
where is printed once for each place in the code that it comes from, with the input that did it;
the exit status is then 1. Targets run one after the other, in a process each.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fuzz(name: str, seconds: float, seed: int) -> None:
    """Never returns: ends the process, with status 1 where there were failures."""
    import atheris

    folder = Path(tempfile.mkdtemp(prefix=f"mass_dpo_jax_fuzz_{name}_"))
    os.environ.update(HF_HOME=str(folder / "hf"), XDG_CACHE_HOME=str(folder / "cache"))
    tempfile.tempdir = str(folder)
    with atheris.instrument_imports(include=["mass_dpo_jax"], enable_loader_override=False):
        from tests.scripts import fuzz_targets
    from tests.scripts import corruptions

    fuzz_targets.quiet()
    spoiler = fuzz_targets.Spoiler(name, folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(spoiler.whole):
        (corpus / str(number)).write_bytes(bytes([number % 256, 0]) + content)
    failures: dict[tuple[object, ...], int] = {}
    inputs, end = 0, time.monotonic() + seconds

    def one(data: bytes) -> None:
        nonlocal inputs
        if time.monotonic() > end:
            print(f"{name}: {inputs} inputs, {len(failures)} kinds of failure", flush=True)
            if not failures:
                shutil.rmtree(folder)
            os._exit(1 if failures else 0)
        inputs += 1
        if len(data) < 2:
            return
        number = data[0] % len(spoiler.files)
        kind = fuzz_targets.KINDS[data[1] % 64] if data[1] % 64 < 4 else "content"
        try:
            spoiler.read(number, kind, data[2:])
        except Exception as error:
            places = traceback.extract_tb(error.__traceback__)
            key = (type(error), *((p.filename, p.lineno) for p in places))
            if key not in failures:
                path = folder / f"failure-{len(failures)}"
                path.write_bytes(data)
                where = f"{spoiler.files[number].relative_to(spoiler.folder)}, {kind}"
                print(f"{name}: {where}, in {path}", flush=True)
                traceback.print_exception(error, limit=-6)
            failures[key] = failures.get(key, 0) + 1

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        number, kind = rng.randrange(256), rng.randrange(256)
        if len(data) < 2 or rng.random() < 0.2:
            data = bytes([number, kind]) + spoiler.whole[number % len(spoiler.files)]
        return (data[:2] + corruptions.mutate(data[2:], rng))[:most]

    words = ["fuzz", f"-seed={seed}", "-max_len=200000", "-rss_limit_mb=0", "-timeout=120"]
    atheris.Setup([*words, "-verbosity=0", str(corpus)], one, custom_mutator=mutated)
    atheris.Fuzz()


def main() -> int:
    from tests.scripts import fuzz_targets

    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", nargs="*", help=", ".join(fuzz_targets.TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    status = 0
    for name in arguments.target or fuzz_targets.TARGETS:
        fuzz_one = ["-m", "tests.scripts.fuzz", "--one", name]
        words = [sys.executable, *fuzz_one, arguments.seconds, arguments.seed]
        status |= subprocess.run([str(word) for word in words], check=False).returncode != 0
    return status


if __name__ == "__main__":
    # Read when JAX and the Hugging Face libraries are first imported.
    os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
    sys.exit(main())
