r"""A training step, ours and as people write it in PyTorch, side by side.

    python -m benchmarks.step --workloads=W1,W3 --output=step.json
    python -m benchmarks.step --data=LASTFM --tokenizer=Llama-3.2-3B-Instruct
    python -m benchmarks.step --workloads=W1 --change=pool=7,response=64

W1: short responses to long prompts. W2: LastFM's lengths. W3: long responses. One model, the same
weights for everybody, and nobody's step has its data loading in it. Programs:

- ours: the package's train step, MASS-DPO: scores the pool, selects, trains, updates; with the
  faster `model.remat`. "Negatives given" leaves scoring and selection out: our S-DPO.
- (a) PyTorch S-DPO, transformers: policy and reference on 1 + n rows, random negatives.
- (b) the same with the reference's log-probs cached.
- (c) PyTorch MASS-DPO: scores 1 + N rows, selects with d x d inverses, trains on 1 + n.
- (d) as (b), prompts encoded once: a 4-D mask and position ids.
- (e) our own step with a copy of the prompt for every response.

Before anything is timed, all losses on the same negatives, (c)'s choice and the first updates are
compared with ours. The floor is what real tokens cost (benchmarks/cost.py) at the rate of a
1480 x 384 x 1024 product; PyTorch's programs run with the number of threads that suits each best.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import cost, machine
from benchmarks.workloads import WORKLOADS, Case, Ours, Workload, changed
from mass_dpo_jax import cli, selection
from mass_dpo_jax.errors import UserError

# What is hoped for: peer / ours, at least; and ours / floor, at most.
GOALS = {"W1": {"a": 4.5, "c": 10.0}, "W2": {"a": 5.0, "c": 10.0}, "W3": {"c": 2.0}}
FLOOR_GOAL = 1.2
PEERS = {
    "a": "(a) PyTorch S-DPO",
    "b": "(b) PyTorch S-DPO, cached reference",
    "c": "(c) PyTorch MASS-DPO",
    "d": "(d) PyTorch S-DPO, shared prefix",
    "e": "(e) ours, prompts repeated",
}
GIVEN, SELECTION, FIGURES = "ours, negatives given", "selection", "selection with its figures"
REPEATS = 10  # Of programs that take milliseconds, in one measurement.
# Matrix products whose rates are printed, and how often one measurement has them.
PRODUCTS = {"1480 x 384 x 1024": ((1480, 384, 1024), REPEATS), "square": ((2048, 2048, 2048), 1)}
FLOOR_PRODUCT = "1480 x 384 x 1024"
LOSS_ERROR, UPDATE_ERROR, NORM_ERROR = 1e-4, 0.02, 1e-3


def remat_name(remat: str) -> str:
    return f"ours, remat {remat}"


class Bench:
    """All programs of one workload, on the same batches and the same negatives."""

    def __init__(self, case: Case):
        from benchmarks import peers  # Needs PyTorch.

        self.case = case
        self.ours = {
            remat_name(remat): Ours(case, case.program("mass_dpo", remat))
            for remat in ("dots", "full")
        }
        self.given = Ours(case, case.program("mass_dpo", "dots"))
        self.repeated = Ours(case, case.program("mass_dpo", "dots", shared=False))
        make = functools.partial(self._peer, peers)
        self.peers = {
            "a": make(peers.Peer, reference=peers.to_torch(case.model, case.reference)),
            "b": make(peers.Peer),
            "c": make(peers.MassDpo),
            "d": make(peers.Peer, shared=True),
        }
        self.pools = [peers.Pool(batch) for batch in case.batches]
        rng = np.random.default_rng(0)
        shape, n = case.workload, case.workload.negatives
        self.random = [
            np.argsort(rng.random((shape.batch, pool.lengths.shape[1] - 1)), 1)[:, :n] + 1
            for pool in self.pools
        ]
        self.everyone = [
            self.peers["c"].collate(
                pool, np.arange(1, pool.lengths.shape[1])[None].repeat(len(pool.lengths), 0)
            )[0]
            for pool in self.pools
        ]

    def _peer(self, peers: Any, kind: Any, **more: Any) -> Any:
        case, train = self.case, self.case.config.train
        model = peers.to_torch(case.model, case.params)
        return kind(model, case.config.beta, train.learning_rate, train.clip, **more)

    def agree(self) -> dict[str, float]:
        """Compares everybody's first update; the largest differences of each kind.

        Raises:
          RuntimeError: somebody computes something else.
        """
        import torch

        from benchmarks.peers import from_torch

        torch.set_num_threads(1)  # Two would wait for each other where a core is taken.
        case, pool = self.case, self.pools[0]
        before, others = _by_path(case.params), [*self.ours.values(), self.repeated]
        first = others.pop(0)
        used, figures = first.step(0)
        numbers, after = np.asarray(used[0]), _by_path(first.state.params)
        found = {"loss": 0.0, "gradient norm": 0.0, "update": 0.0}

        def same(name: str, what: str, error: float, most: float) -> None:
            if not error <= most:  # Nor is a NaN.
                raise RuntimeError(f"{name}: {what}: off by {error:.2g}, expected at most {most}")
            found[what] = max(found.get(what, 0.0), error)

        def same_update(name: str, norm: float, weights: Mapping[tuple[str, ...], Any]) -> None:
            same(name, "gradient norm", abs(norm / figures["grad_norm"].item() - 1), NORM_ERROR)
            theirs, ours = (
                np.concatenate([(new[path] - old).ravel() for path, old in before.items()])
                for new in (weights, after)
            )
            error = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
            same(name, "update", float(error), UPDATE_ERROR)

        ridge, n = case.config.selection.ridge, case.workload.negatives
        chosen = self.peers["c"].choose(pool, self.everyone[0], n, ridge).numpy()
        same(PEERS["c"], "picks", float((chosen != numbers).sum()), 0.0)
        for letter, peer in self.peers.items():
            inputs = peer.collate(pool, numbers)
            loss = peer.loss(*inputs).item()
            same(PEERS[letter], "loss", abs(loss - figures["loss"].item()), LOSS_ERROR)
            same_update(PEERS[letter], peer.step(*inputs), from_torch(case.model, peer.model))
        for ours in (*others, self.given):
            used, theirs = ours.step(0, numbers if ours is self.given else None)
            same("ours", "picks", float((np.asarray(used[0]) != numbers).sum()), 0.0)
            same("ours", "loss", abs((theirs["loss"] - figures["loss"]).item()), LOSS_ERROR)
            same_update("ours", theirs["grad_norm"].item(), _by_path(ours.state.params))
        return found

    def programs(self) -> dict[str, Callable[[], Any]]:
        """What is timed: each runs a step on every batch, and waits."""
        found: dict[str, Callable[[], Any]] = {
            name: functools.partial(self._run_ours, ours, False) for name, ours in self.ours.items()
        }
        found[GIVEN] = functools.partial(self._run_ours, self.given, True)
        found[PEERS["e"]] = functools.partial(self._run_ours, self.repeated, False)
        for name, figures in ((SELECTION, False), (FIGURES, True)):
            found[name] = self._selection(figures)
        inputs = {
            name: [
                self.peers[name].collate(pool, numbers)
                for pool, numbers in zip(self.pools, self.random, strict=True)
            ]
            for name in ("a", "b", "d")
        }
        for name, ready in inputs.items():
            step = self.peers[name].step
            found[PEERS[name]] = _threaded(functools.partial(_each, step, ready))
        found[PEERS["c"]] = _threaded(self._run_c)
        for name, (sizes, times) in PRODUCTS.items():
            found[f"jax {name}"] = _often(machine.jax_product(*sizes), times)
            found[f"torch {name}"] = _threaded(_often(machine.torch_product(*sizes), times))
        return found

    def _run_ours(self, ours: Ours, given: bool) -> None:
        for i, numbers in enumerate(self.random):
            ours.step(i, numbers if given else None)
        jax.block_until_ready(ours.state)

    def _run_c(self) -> None:
        w, ridge = self.case.workload, self.case.config.selection.ridge
        for pool, everyone in zip(self.pools, self.everyone, strict=True):
            self.peers["c"].select_and_step(pool, everyone, w.negatives, ridge)

    def _selection(self, figures: bool) -> Callable[[], Any]:
        """Selection alone, from features and scores that are there."""
        program = self.case.program("mass_dpo", "dots")
        settings, n = program.method.selection, program.method.num_negatives

        @jax.jit
        def scored(params: Any, batch: Any) -> Any:
            return program.scorer(params, batch, features=True)

        @jax.jit
        def select(features: jax.Array, rewards: jax.Array, mask: jax.Array, keys: Any) -> Any:
            grams = selection.compute_grams(features, mask, settings)
            pools = selection.Pool(grams, rewards[:, 1:] - rewards[:, :1], mask, keys)
            chosen = selection.select(pools, n, settings)
            return chosen, selection.diagnose(pools, chosen, settings) if figures else None

        ready = []
        for batch in self.case.batches:
            found = scored(self.case.params, batch)
            keys = jax.random.split(jax.random.key(0), len(found.logps))
            rewards = self.case.config.beta * (found.logps - batch.ref_logps)
            ready.append((found.features, rewards, batch.response_lengths[:, 1:] > 0, keys))
        return _often(lambda: jax.block_until_ready([select(*x) for x in ready]), REPEATS)

    def flops(self) -> dict[str, float]:
        """Of a step on each batch, together, by program; and `useful`, the floor's."""
        case, model = self.case, self.case.model
        total: dict[str, float] = {}

        def add(name: str, flops: float) -> None:
            total[name] = total.get(name, 0.0) + flops

        for pool, numbers, shape in zip(self.pools, self.random, case.shapes, strict=True):
            sets = _lengths(pool.lengths, numbers)
            whole, some = case.passes(shape)
            for remat in ("dots", "full"):
                train = cost.train_ours(model, some, remat, recorded=True)
                add(remat_name(remat), cost.forward(model, whole) + train)
            add(GIVEN, cost.train_ours(model, some, "dots"))
            whole, some = case.passes(shape, shared=False)
            flops = cost.forward(model, whole) + cost.train_ours(model, some, "dots")
            add(PEERS["e"], flops)
            rows = cost.rows(pool.prompts, sets)
            train = cost.train_flash(model, rows)
            add(PEERS["a"], train + cost.forward(model, rows))
            add(PEERS["b"], train)
            whole = cost.rows(pool.prompts, pool.lengths)
            add(PEERS["c"], train + cost.forward(model, whole))
            add(PEERS["d"], cost.train_flash(model, cost.masked(pool.prompts, sets)))
            least = cost.useful(pool.prompts, pool.lengths)
            some = cost.useful(pool.prompts, sets)
            add("useful", cost.forward(model, least) + 2 * cost.forward(model, some))
        return total

    def useful_tokens(self) -> tuple[float, float]:
        """Shares of real tokens among those processed, when scoring the pool and when training."""
        sums = np.zeros((2, 2))
        for pool, numbers, shape in zip(self.pools, self.random, self.case.shapes, strict=True):
            real = cost.useful(pool.prompts, pool.lengths).tokens
            trained = cost.useful(pool.prompts, _lengths(pool.lengths, numbers)).tokens
            sums += [[real, trained], [size.tokens for size in self.case.passes(shape)]]
        whole, some = sums[0] / sums[1]
        return float(whole), float(some)


def _by_path(params: Any) -> dict[tuple[str, ...], np.ndarray]:
    leaves = jax.tree.leaves_with_path(params)
    return {tuple(str(key.key) for key in path): np.asarray(x) for path, x in leaves}


def _lengths(lengths: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Of the chosen response and some negatives: int [B, 1 + n]."""
    return np.take_along_axis(lengths, np.pad(numbers, ((0, 0), (1, 0))), 1)


def _each(step: Callable[..., Any], inputs: Sequence[Any]) -> None:
    for x in inputs:
        step(*x)


def _often(program: Callable[[], Any], times: int) -> Callable[[], Any]:
    return lambda: [program() for _ in range(times)]


def _threaded(program: Callable[[], Any]) -> Callable[[], Any]:
    """A program of PyTorch's with the number of threads that suits it best."""
    import torch

    threads = machine.best_threads(program, runs=1)

    def run() -> Any:
        torch.set_num_threads(threads)
        return program()

    return run


def measure(bench: Bench, name: str, rounds: int) -> dict[str, Any]:
    """Times everything; the figures of a workload, as they are written to JSON."""
    seconds = machine.measure(bench.programs(), rounds)
    flops, batches = bench.flops(), len(bench.case.batches)
    best = min(bench.ours, key=lambda key: float(np.median(seconds[key])))
    ours = seconds[best]
    goals = GOALS.get(name, {})
    programs = {}
    for key in (*bench.ours, GIVEN, *PEERS.values()):
        letter = key[1] if key.startswith("(") else ""
        programs[key] = {
            "milliseconds": 1e3 * float(np.median(seconds[key])) / batches,
            "ratio": machine.ratio(seconds[key], ours)._asdict(),
            "gflop": flops[key] / batches / 1e9,
            "flop_ratio": flops[key] / flops[best],
            "goal": goals.get(letter),
        }
    work = {kind: 2.0 * math.prod(size) * times for kind, (size, times) in PRODUCTS.items()}
    rates = {
        f"{library} {kind}": flop / np.median(seconds[f"{library} {kind}"])
        for kind, flop in work.items()
        for library in ("jax", "torch")
    }
    floor = flops["useful"] / work[FLOOR_PRODUCT] * seconds[f"jax {FLOOR_PRODUCT}"]
    whole, some = bench.useful_tokens()
    return {
        "ours": best,
        "programs": programs,
        "gflops_per_second": {key: float(rate) / 1e9 for key, rate in rates.items()},
        "floor": {
            "milliseconds": 1e3 * float(np.median(floor)) / batches,
            "ratio": machine.ratio(ours, floor)._asdict(),
            "gflop": flops["useful"] / batches / 1e9,
            "goal": FLOOR_GOAL,
        },
        "useful_tokens": {"scoring": whole, "training": some},
        "selection_share": {
            key: float(np.median(seconds[key] / REPEATS / ours)) for key in (SELECTION, FIGURES)
        },
    }


def describe(name: str, found: Mapping[str, Any]) -> str:
    """The figures of a workload as text."""
    rows = []
    for key, x in {**found["programs"], "floor": found["floor"]}.items():
        ratio = machine.Ratio(**x["ratio"])
        # The floor's ratio is ours over it, everybody else's theirs over ours.
        sign = "at most" if key == "floor" else "at least"
        goal = f"{sign} {x['goal']}" if x["goal"] else ""
        flops = f"{x['flop_ratio']:.2f}" if "flop_ratio" in x else ""
        label = "**ours**: " + key if key == found["ours"] else key
        shown = f"ours is {ratio}" if key == "floor" else str(ratio)
        rows.append([label, f"{x['milliseconds']:.1f}", shown, goal, f"{x['gflop']:.1f}", flops])
    header = ["program", "ms a step", "times ours", "goal", "GFLOP", "times ours'"]
    tokens, share = found["useful_tokens"], found["selection_share"]
    rates = ", ".join(f"{key} {rate:.0f}" for key, rate in found["gflops_per_second"].items())
    return "\n".join(
        [
            f"{name}",
            machine.table(header, rows),
            f"products, GFLOP/s: {rates}",
            f"useful / processed tokens: scoring {tokens['scoring']:.3f}, "
            f"training {tokens['training']:.3f}",
            f"share of the step: selection {share[SELECTION]:.2%}, with its figures "
            f"{share[FIGURES]:.2%}",
        ]
    )


def run(
    workloads: Mapping[str, Workload],
    rounds: int,
    allow_busy: bool = False,
    output: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Measures and prints; the figures by workload.

    Raises:
      UserError: the machine is busy, or the data is not what it should be.
      RuntimeError: programs that should compute the same do not.
    """
    busy = machine.check_quiet(allow_busy)
    figures: dict[str, Any] = {}
    for name, workload in workloads.items():
        if workload.lastfm and not (data and tokenizer):
            print(f"{name}: skipped: give --data=FOLDER (LastFM) and --tokenizer=FOLDER")
            continue
        bench = Bench(Case.make(workload, data, tokenizer))
        errors = bench.agree()
        print(f"{name}: largest differences: ", {k: float(f"{v:.2g}") for k, v in errors.items()})
        figures[name] = {"differences": errors, **measure(bench, name, rounds)}
        print(describe(name, figures[name]))
    machine.record(output, busy, {"rounds": rounds, "workloads": figures})
    return figures


def chosen(names: Sequence[str]) -> dict[str, Workload]:
    """Workloads by name.

    Raises:
      UserError: an unknown one.
    """
    for name in names:
        if name not in WORKLOADS:
            raise UserError(f"--workloads: no {name!r}; expected {', '.join(WORKLOADS)}")
    return {name: WORKLOADS[name] for name in names}


def main() -> None:
    workloads = {k: changed(w, _CHANGE.value) for k, w in chosen(_WORKLOADS.value).items()}
    run(workloads, _ROUNDS.value, _BUSY.value, _OUTPUT.value, _DATA.value, _TOKENIZER.value)


if __name__ == "__main__":
    _WORKLOADS = flags.DEFINE_list("workloads", list(WORKLOADS), "Which.")
    _CHANGE = flags.DEFINE_list("change", [], "Other sizes for all of them: pool=7,response=64.")
    _ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each program is timed.", lower_bound=1)
    _DATA = flags.DEFINE_string("data", None, "The folder with LastFM's files, for W2.")
    _TOKENIZER = flags.DEFINE_string("tokenizer", None, "A Hugging Face folder, for W2's lengths.")
    _OUTPUT, _BUSY = machine.define_flags()
    cli.run(main)
