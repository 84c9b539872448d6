"""Faults that the tests must notice, each a text of the package and what stands in its place.

`mutations.py` runs the tests on them. A text is looked for in the whole package, where it must be
once: so code may move between files. Names begin with the area.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PACKAGE = "mass_dpo_jax"


class Mutation(NamedTuple):
    """A fault.

    name: what is wrong then.
    old, new: source texts.
    notice: test files or functions that should notice, fast ones first, with spaces between.
    """

    name: str
    old: str
    new: str
    notice: str

    @property
    def area(self) -> str:
        return self.name.partition(":")[0]

    @property
    def tests(self) -> list[str]:
        """As pytest takes them, in the root of the project."""
        return [f"tests/{test}" for test in self.notice.split()]


def locate(text: str, tree: Path) -> Path:
    """Finds the one file of the package in `tree` that has the text, once.

    Raises:
        ValueError: there is none, or more.
    """
    paths = sorted((tree / PACKAGE).rglob("*.py"))
    places = [path for path in paths for _ in range(path.read_text().count(text))]
    if len(places) != 1:
        raise ValueError(f"{text!r}: found {len(places)} times in {tree / PACKAGE}, expected once")
    return places[0]


MUTATIONS = (
    Mutation(
        "losses: beta is left out",
        "rewards = beta * _at_least_float32(log_ratios)",
        "rewards = _at_least_float32(log_ratios)",
        "test_losses.py",
    ),
    Mutation(
        "losses: masked negatives take part in Plackett-Luce's sum",
        "jax.nn.logsumexp(scores, axis=-1, where=counted)",
        "jax.nn.logsumexp(scores, axis=-1)",
        "test_losses.py",
    ),
    Mutation(
        "losses: a row without negatives costs log 2",
        "return jnp.where(some, loss, 0.0)",
        "return loss",
        "test_losses.py",
    ),
    Mutation(
        "losses: the mean over pairs counts masked ones",
        "return total / jnp.maximum(negatives.sum(axis=-1), 1)",
        "return total / negatives.shape[-1]",
        "test_losses.py",
    ),
    Mutation(
        "losses: ODPO's margin has the other sign",
        "jax.nn.softplus(scores + margins)",
        "jax.nn.softplus(scores - margins)",
        "test_losses.py",
    ),
    Mutation(
        "losses: MPPO's likelihoods are not per token",
        "jnp.exp(logps / jnp.maximum(num_tokens, 1))",
        "jnp.exp(logps)",
        "test_losses.py",
    ),
    Mutation(
        "losses: the gradient of drawn negatives lacks 1 - sigma(Z)",
        "linear = -jnp.expm1(-loss) * jnp.sum(weights * scores, axis=-1)",
        "linear = jnp.sum(weights * scores, axis=-1)",
        "test_losses.py",
    ),
    Mutation(
        "losses: half precision is computed as it comes",
        "return x.astype(jnp.promote_types(x.dtype, jnp.float32))",
        "return x",
        "test_losses.py::test_half_precision_is_computed_in_float32",
    ),
    Mutation(
        "methods: ODPO's alpha is ignored",
        "margins = m.odpo_alpha * jnp.log(",
        "margins = jnp.log(",
        "test_train.py::test_losses_at_the_reference",
    ),
    Mutation(
        "methods: the supervised term's weight is ignored",
        "loss += self.sft_weight * losses.supervised(",
        "loss += losses.supervised(",
        "test_train.py::test_a_supervised_term_adds_its_weight",
    ),
    Mutation(
        "methods: drawn sets may outlive a step",
        'if criterion == "sampled" and config.selection.refresh != "step":',
        'if criterion == "sampled" and config.selection.refresh == "epoch":',
        "test_train.py::test_pl_sampled_draws_at_every_step",
    ),
    Mutation(
        "methods: the reference's features are not used",
        'frozen_features=config.selection.features == "reference" and settings.needs_features',
        "frozen_features=False",
        "test_train.py::test_frozen_features_are_those_of_the_reference",
    ),
    Mutation(
        "methods: the loss does not see the reference",
        "log_ratios=jnp.where(valid, logps - of_chosen(batch.ref_logps), 0.0)",
        "log_ratios=jnp.where(valid, logps, 0.0)",
        "test_train.py::test_losses_at_the_reference",
    ),
    Mutation(
        "methods: pools are scored without the reference",
        "rewards = self.method.beta * (scored.logps - batch.ref_logps)",
        "rewards = self.method.beta * scored.logps",
        "test_train.py::test_losses_at_the_reference",
    ),
    Mutation(
        "methods: random negatives are drawn alike for all prompts",
        "lambda row: jax.random.fold_in(key, row))(batch.index)",
        "lambda row: jax.random.fold_in(key, 0 * row))(batch.index)",
        "test_train.py::test_random_sets_are_each_prompts_own_and_last_a_window",
    ),
    Mutation(
        "selection: greedy choice takes a candidate again",
        "/ (1.0 + gain), free.at[best].set(False), chosen",
        "/ (1.0 + gain), free, chosen",
        "test_selection.py::test_every_pick_adds_the_most_and_its_gain_is_the_growth_of_the_determinant",
    ),
    Mutation(
        "selection: the largest norms first, without Sherman and Morrison's update",
        "return gram - jnp.outer(column, column) / (1.0 + gain), free.at",
        "return gram, free.at",
        "test_selection.py::test_every_pick_adds_the_most_and_its_gain_is_the_growth_of_the_determinant",
    ),
    Mutation(
        "selection: the update lacks its denominator",
        "jnp.outer(column, column) / (1.0 + gain), free.at",
        "jnp.outer(column, column), free.at",
        "test_selection.py::test_every_pick_adds_the_most_and_its_gain_is_the_growth_of_the_determinant",
    ),
    Mutation(
        "selection: rounding decides between ties",
        "best = jnp.argmax(free & (diagonal >= most * (1 - TIE)))",
        "best = jnp.argmax(free & (diagonal >= most))",
        "test_selection.py::test_what_rounding_adds_to_a_gain_decides_nothing",
    ),
    Mutation(
        "selection: masked features reach the Gram matrix",
        "features = jnp.where(present, features - features[1 + jnp.argmax(mask)][None], 0.0)",
        "features = features - features[1 + jnp.argmax(mask)][None]",
        "test_selection.py::test_what_is_masked_changes_nothing",
    ),
    Mutation(
        "selection: features are multiplied with their common vector",
        "features = jnp.where(present, features - features[1 + jnp.argmax(mask)][None], 0.0)\n",
        "return jnp.einsum('id,jd->ij', features, features, precision=lax.Precision.HIGHEST)\n",
        "test_selection.py::test_picks_are_those_of_algorithm_1_with_inverses_in_float64",
    ),
    Mutation(
        "selection: l2 leaves features as they are",
        'if feature_norm == "l2":',
        'if feature_norm == "l1":',
        "test_selection.py::test_every_pick_adds_the_most_and_its_gain_is_the_growth_of_the_determinant",
    ),
    Mutation(
        "selection: design vectors are weighted by p and not by its root",
        "return roots[:, None] * roots[None, :] * centred",
        "return weights[:, None] * weights[None, :] * centred",
        "test_selection.py::test_every_pick_adds_the_most_and_its_gain_is_the_growth_of_the_determinant",
    ),
    Mutation(
        "selection: exchange is greedy choice",
        'return _exchange(value, chosen, mask) if how == "exchange" else chosen',
        "return chosen",
        "test_criteria.py::test_exchange_improves_some_greedy_sets_and_never_spoils_one",
    ),
    Mutation(
        "selection: an exhaustive search may take fewer than there are",
        "full = present.sum(1) == jnp.minimum(room, mask.sum())",
        "full = present.sum(1) <= jnp.minimum(room, mask.sum())",
        "test_criteria.py::test_an_exhaustive_search_takes_n_where_fewer_have_a_larger_value",
    ),
    Mutation(
        "selection: a selection has one too many where the pool is small",
        "valid = jnp.arange(n) < jnp.sum(mask)",
        "valid = jnp.arange(n) <= jnp.sum(mask)",
        "test_criteria.py::test_what_is_masked_changes_nothing_for_the_other_criteria",
    ),
    Mutation(
        "selection: masked scores lower all pool weights",
        "jnp.exp(scores - jnp.max(scores, where=mask, initial=-jnp.inf))",
        "jnp.exp(scores - jnp.max(scores))",
        "test_criteria.py::test_pool_weights_are_a_softmax_wherever_scores_lie",
    ),
    Mutation(
        "selection: Equation 11's factor is sigma(Z)",
        "return beta**2 * jax.nn.sigmoid(jax.nn.logsumexp(scores))",
        "return beta**2 * jax.nn.sigmoid(-jax.nn.logsumexp(scores))",
        "test_selection.py::test_equation_11_divides_the_ridge_by_its_factor",
    ),
    Mutation(
        "selection: contrast measures from the mean",
        "products = designs.from_origin(pool.gram, 0)[1:, 1:]",
        "products = pool.gram[1:, 1:]",
        "test_criteria.py::test_searches_against_brute_force_in_float64",
    ),
    Mutation(
        "selection: set_fisher leaves out the chosen response",
        "present = jnp.pad(valid, (1, 0), constant_values=True)",
        "present = jnp.pad(valid, (1, 0), constant_values=False)",
        "test_criteria.py::test_searches_against_brute_force_in_float64",
    ),
    Mutation(
        "selection: the hardest are the easiest",
        "-scores, ~pool.mask",
        "scores, ~pool.mask",
        "test_criteria.py::test_hardest_takes_the_largest_scores",
    ),
    Mutation(
        "selection: kappa is the smallest that was drawn",
        "kappa = values[min(n, size)]",
        "kappa = values[min(n, size) - 1]",
        "test_criteria.py::test_drawn_weights_estimate_any_sum_over_the_pool",
    ),
    Mutation(
        "selection: what was drawn twice counts once",
        "weights = counts / n",
        "weights = jnp.minimum(counts, 1) / n",
        "test_criteria.py::test_drawn_weights_estimate_any_sum_over_the_pool",
    ),
    Mutation(
        "selection: padding changes what is drawn",
        "jax.random.uniform(jax.random.fold_in(pool.key, i))",
        "jax.random.uniform(jax.random.fold_in(pool.key, size - i))",
        "test_criteria.py::test_random_does_not_depend_on_padding_and_grows_by_adding",
    ),
    Mutation(
        "selection: choices by NaN pass",
        "bad = ~(beyond <= 1)",
        "bad = beyond > 1",
        "test_selection.py::test_the_library_refuses_what_no_choice_can_be_made_by",
    ),
    Mutation(
        "selection: a ridge of 0 passes",
        "if not value > 0:",
        "if not value >= 0:",
        "test_selection.py::test_settings_that_cannot_be_are_errors_in_one_line",
    ),
    Mutation(
        "selection: overlap with random counts places that are not valid",
        "hits = jnp.sum(mine.valid & theirs[mine.indices])",
        "hits = jnp.sum(theirs[mine.indices])",
        "test_selection.py::test_diagnostics",
    ),
    Mutation(
        "catalogue: the shortlist is trusted when better ones are outside",
        "safe = lax.pmax(listed.outside, part.axes) < most * (1 - TIE)",
        "safe = most >= 0",
        "test_catalogue.py::test_picks_are_those_of_inverses_in_float64",
    ),
    Mutation(
        "catalogue: candidates are numbered by device",
        "jnp.where(ties, self.first + places, NOBODY)",
        "jnp.where(ties, places, NOBODY)",
        "test_catalogue.py::test_eight_devices_choose_what_one_does",
    ),
    Mutation(
        "catalogue: rows that two chunks share count twice",
        "begin + places >= i * rows)",
        "begin + places >= 0)",
        "test_catalogue.py::test_eight_devices_choose_what_one_does",
    ),
    Mutation(
        "catalogue: contrast does not normalise the chosen response",
        "origin=raw.read(chosen)",
        "origin=chosen.astype(jnp.float32)",
        "test_catalogue.py::test_picks_are_those_of_inverses_in_float64",
    ),
    Mutation(
        "catalogue: what is masked is chosen in the end",
        "start = choices, jnp.where(mask, 0.0, TAKEN), zero, zero",
        "start = choices, jnp.zeros(part.size), zero, zero",
        "test_catalogue.py::test_eight_devices_choose_what_one_does",
    ),
    Mutation(
        "masks: a token sees the one after it",
        "scores = jnp.where(jnp.tri(length, dtype=bool), scores, MASKED)",
        "scores = jnp.where(jnp.tri(length, k=1, dtype=bool), scores, MASKED)",
        "test_models_transformers.py::test_random_models",
    ),
    Mutation(
        "masks: within a response, a token sees the one after it",
        "same &= jnp.tri(group_length, dtype=bool)[None, None]",
        "same &= jnp.tri(group_length, k=1, dtype=bool)[None, None]",
        "test_shared_prefix.py::test_what_a_response_depends_on",
    ),
    Mutation(
        "masks: a response sees those before it",
        "same = segments[..., :, None] == segments[..., None, :]",
        "same = segments[..., :, None] >= segments[..., None, :]",
        "test_shared_prefix.py::test_all_layouts_equal_one_row_per_response",
    ),
    Mutation(
        "masks: responses see one token of the prompt's padding",
        "real = jnp.arange(prompt_key.shape[2])[None] < prompt_lengths[:, None]",
        "real = jnp.arange(prompt_key.shape[2])[None] <= prompt_lengths[:, None]",
        "test_shared_prefix.py::test_what_a_response_depends_on",
    ),
    Mutation(
        "masks: the prompt's last token sees itself twice",
        "alone = attention.behind_prompt(last, ",
        "alone = attention.behind_prompt(prompt_lengths, ",
        "test_shared_prefix.py::test_a_response_is_scored_as_if_it_were_plain_text",
    ),
    Mutation(
        "masks: the fused kernel shows one token of the prompt's padding",
        "real = jnp.arange(prompt_size)[None] < prompt_lengths[:, None]",
        "real = jnp.arange(prompt_size)[None] <= prompt_lengths[:, None]",
        "test_fused_attention.py::test_scores_equal_plain_attention",
    ),
    Mutation(
        "positions: pairs turn the wrong way",
        "second * cos + first * sin]",
        "second * cos - first * sin]",
        "test_models_transformers.py::test_random_models",
    ),
    Mutation(
        "positions: Llama 3's wavelengths lack 2 pi",
        "scaling.original_max_positions * frequencies / (2 * jnp.pi)",
        "scaling.original_max_positions * frequencies",
        "test_models_transformers.py::test_llama3_frequencies",
    ),
    Mutation(
        "positions: responses begin one too far",
        "(prompt_lengths[:, None, None] + groups.offsets)",
        "(prompt_lengths[:, None, None] + 1 + groups.offsets)",
        "test_shared_prefix.py::test_a_response_is_scored_as_if_it_were_plain_text",
    ),
    Mutation(
        "positions: responses go on from the longest prompt of the batch",
        "(prompt_lengths[:, None, None] + groups.offsets).reshape",
        "(prompt_lengths[:, None, None] * 0 + prompt_lengths.max() + groups.offsets).reshape",
        "test_shared_prefix.py::test_a_response_is_scored_as_if_it_were_plain_text",
    ),
    Mutation(
        "positions: layers without positions get half of them",
        "jnp.where(has_positions, sin, 0.0)",
        "sin",
        "test_models_transformers.py::test_random_models",
    ),
    Mutation(
        "positions: other layers go without",
        "return tuple((layer + 1) % interval != 0",
        "return tuple(layer % interval != 0",
        "test_models_config.py",
    ),
    Mutation(
        "responses: the first token is predicted from the response before",
        "before = jnp.where((groups.offsets == 0)[..., None], last, before)",
        "before = jnp.where((groups.offsets == -1)[..., None], last, before)",
        "test_shared_prefix.py",
    ),
    Mutation(
        "responses: a response begins at the last token of the one before",
        "segments = jnp.sum(places[..., None] >= ends[:, None, :], axis=-1)",
        "segments = jnp.sum(places[..., None] > ends[:, None, :], axis=-1)",
        "test_shared_prefix.py",
    ),
    Mutation(
        "responses: picks that are not valid keep their tokens",
        "lengths = jnp.where(picks.valid, lengths, 0)",
        "lengths = lengths * 1",
        "test_shared_prefix.py test_replay.py",
    ),
    Mutation(
        "responses: candidates are not counted from 0 in later chunks",
        "// candidate_chunk * candidate_chunk",
        "// candidate_chunk",
        "test_shared_prefix.py",
    ),
    Mutation(
        "responses: features of prompt and response are divided by the response's length",
        "count = count + prompt.lengths[:, None]",
        "count = count * 1",
        "test_shared_prefix.py::test_a_response_is_scored_as_if_it_were_plain_text",
    ),
    Mutation(
        "replay: the last layer's weights get no gradient",
        "carry = gradient, jax.tree.map(_set(last), found, of_weights)",
        "carry = gradient, found",
        "test_replay.py::test_gradients_are_those_of_a_pass_of_its_own",
    ),
    Mutation(
        "replay: the layers run forwards",
        "scanned, reverse=True)",
        "scanned, reverse=False)",
        "test_replay.py::test_gradients_are_those_of_a_pass_of_its_own",
    ),
    Mutation(
        "replay: wanted places are off by one",
        "places[:, ends.start :] - ends.start + 1, ((0, 0), (1, 0)))",
        "places[:, ends.start :] - ends.start, ((0, 0), (1, 0)))",
        "test_replay.py::test_gradients_are_those_of_a_pass_of_its_own",
    ),
    Mutation(
        "replay: picks are looked up at the beginning of the pool",
        "first = jnp.take_along_axis(_starts(response_lengths), picks.candidates, axis=1)",
        "first = _starts(lengths)",
        "test_replay.py::test_gradients_are_those_of_a_pass_of_its_own",
    ),
    Mutation(
        "replay: what is known is computed again",
        "    del function, args\n    return value",
        "    return function(*args)",
        "test_replay.py::test_known_computes_nothing_forward",
    ),
    Mutation(
        "log-probs: of several rows in chunks, they come in another order",
        "return jnp.moveaxis(logps, 0, 1).reshape(batch, -1)[:, :length]",
        "return logps.reshape(batch, -1)[:, :length]",
        "test_models_decoder.py::test_logps_in_chunks",
    ),
    Mutation(
        "log-probs: large logits overflow",
        "shifted = logits - highest",
        "shifted = logits",
        "test_models_decoder.py::test_extreme_logits_stay_finite",
    ),
    Mutation(
        "log-probs: a response's tokens are averaged",
        "logps = jnp.where(owner, of_tokens[..., None], 0.0).sum(axis=1)",
        "logps = jnp.where(owner, of_tokens[..., None], 0.0).mean(axis=1)",
        "test_shared_prefix.py::test_all_layouts_equal_one_row_per_response",
    ),
    Mutation(
        "models: queries are not scaled",
        "query = rotate(query, *angles, scale=self.head_dim**-0.5)",
        "query = rotate(query, *angles)",
        "test_models_transformers.py::test_random_models",
    ),
    Mutation(
        "models: queries and keys swap their norms",
        "self.query_norm(query), self.key_norm(key)",
        "self.key_norm(query), self.query_norm(key)",
        "test_models_transformers.py::test_random_models",
    ),
    Mutation(
        "models: the norm's epsilon is outside of the root",
        "jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)",
        "1 / (jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True)) + self.eps)",
        "test_models_transformers.py::test_random_models",
    ),
    Mutation(
        "models: the gate is linear",
        'jax.nn.silu(recorded("gate", y)) * recorded("up", y)',
        'recorded("gate", y) * jax.nn.silu(recorded("up", y))',
        "test_models_transformers.py::test_random_models",
    ),
    Mutation(
        "models: SmolLM3's embedding is not tied where its file does not say",
        'read.flag("tie_word_embeddings", family.tie_embeddings)',
        'read.flag("tie_word_embeddings", False)',
        "test_models_config.py",
    ),
    Mutation(
        "models: a rotary base outside wins over the one inside",
        'read.positive("rope_theta", rope.get("rope_theta", default_theta))',
        'read.positive("rope_theta", config.get("rope_theta", rope.get("rope_theta", 1e4)))',
        "test_models_config.py",
    ),
    Mutation(
        "models: sliding windows are ignored",
        'for field in ("attention_bias", "mlp_bias", "use_sliding_window"):',
        'for field in ("attention_bias", "mlp_bias"):',
        "test_models_config.py",
    ),
    Mutation(
        "models: unknown tensors are ignored",
        'if name.endswith("rotary_emb.inv_freq"):',
        'if name.endswith(("rotary_emb.inv_freq", "weight", "bias")):',
        "test_models_weights.py",
    ),
    Mutation(
        "models: another head than the embeddings is dropped",
        "                self._check_tied(config)\n",
        "",
        "test_models_weights.py",
    ),
    Mutation(
        "models: weights may be NaN",
        "                check_finite(part, files.paths[name], name)\n",
        "",
        "test_models_weights.py",
    ),
    Mutation(
        "models: ids outside of the vocabulary are tokens",
        "outside = [v for v in values if not 0 <= v < size]",
        "outside = [v for v in values if v < -1]",
        "test_models_config.py",
    ),
    Mutation(
        "models: files of a folder are what their names say",
        'if start.startswith(b"version https://git-lfs"):',
        'if start.startswith(b"git-lfs"):',
        "test_models_folder.py",
    ),
    Mutation(
        "tokens: a special token that is named null is config.json's",
        "        if field in named:\n",
        "        if named.get(field):\n",
        "test_data_tokenizer.py",
    ),
    Mutation(
        "export: generation ends with null",
        "return [x for x in ids if type(x) is int and 0 <= x < decoder.vocab_size]",
        "return list(ids)",
        "test_export.py::test_generation_ends_with_tokens_that_there_are",
    ),
    Mutation(
        "export: a file may be over its limit by a tensor",
        "if files[-1] and size + count * dtype.itemsize > max_bytes:",
        "if files[-1] and size > max_bytes:",
        "test_export.py::test_no_more_than_a_file_is_held",
    ),
    Mutation(
        "export: generation does not end where responses did",
        'settings["eos_token_id"] = ends if end in ends else [*ends, end]',
        'settings["eos_token_id"] = ends',
        "test_export.py::test_a_trained_run",
    ),
    Mutation(
        "export: weights are float32 whatever the run computed in",
        "dtype = dtype or config.model.dtype",
        'dtype = dtype or "float32"',
        "test_export.py::test_steps_and_types",
    ),
    Mutation(
        "export: every layer's digest is that of the first one",
        "sums = scoring.sums_of_part(part, (layer or 0) * part.size)",
        "sums = scoring.sums_of_part(part, 0)",
        "test_export.py::test_steps_and_types",
    ),
    Mutation(
        "lora: adapters are scaled by the rank's root",
        "factor = self.alpha / self.rank",
        "factor = self.alpha / self.rank**0.5",
        "test_lora_peft.py::test_log_probs_equal_pytorchs",
    ),
    Mutation(
        "lora: adapters are merged unscaled",
        'adapters = lora.scaled(params["adapters"])',
        'adapters = params["adapters"]',
        "test_lora.py::test_log_probs_are_those_of_merged_weights",
    ),
    Mutation(
        "lora: PEFT's folder gets the rank as alpha",
        '"lora_alpha": lora.alpha,',
        '"lora_alpha": lora.rank,',
        "test_lora_peft.py::test_log_probs_equal_pytorchs",
    ),
    Mutation(
        "lora: rank-stabilized adapters are read as plain ones",
        "alpha *= math.sqrt(rank)",
        "alpha *= 1",
        "test_lora_peft.py",
    ),
    Mutation(
        "lora: settings that nobody knows are harmless",
        "if any(type(value) is type(k) and value == k for k in known):",
        "if not known or any(type(value) is type(k) and value == k for k in known):",
        "test_lora_peft.py",
    ),
    Mutation(
        "lora: an initialization that changes the base is harmless",
        '"init_lora_weights": (True, "gaussian", "orthogonal", "eva"),',
        '"init_lora_weights": (True, "gaussian", "orthogonal", "eva", "pissa"),',
        "test_lora_peft.py",
    ),
    Mutation(
        "lora: a new adapter changes the model",
        "b = jnp.zeros((layers, rank, shape[1]), jnp.float32)",
        "b = jnp.full((layers, rank, shape[1]), 0.01, jnp.float32)",
        "test_lora_runs.py::test_the_reference_does_not_depend_on_what_was_drawn",
    ),
    Mutation(
        "lora: one scale for all weights of a column",
        "tile = math.gcd(weights.shape[0], TILE)",
        "tile = weights.shape[0]",
        "test_lora.py::test_quantized_weights_are_near_and_small",
    ),
    Mutation(
        "lora: frozen norms are rounded",
        'if kind == "float32" or path[-1] == "scale":',
        'if kind == "float32":',
        "test_lora.py::test_quantized_weights_are_near_and_small",
    ),
    Mutation(
        "optimizer: small gradients are scaled up",
        "factor = clip / jnp.maximum(optax.tree.norm(updates), clip)",
        "factor = clip / optax.tree.norm(updates)",
        "test_optimizer.py::test_it_is_adamw_with_a_clipped_gradient",
    ),
    Mutation(
        "optimizer: weights do not decay",
        "optax.add_decayed_weights(weight_decay)",
        "optax.identity()",
        "test_optimizer.py::test_it_is_adamw_with_a_clipped_gradient",
    ),
    Mutation(
        "optimizer: the learning rate does not warm up",
        "init_value=0.0 if warmup else peak",
        "init_value=peak",
        "test_optimizer.py::test_the_learning_rate_grows_to_its_peak_and_falls_to_zero",
    ),
    Mutation(
        "optimizer: the learning rate is not 0 at the end",
        "decay_steps=max(total_steps, warmup + 1)",
        "decay_steps=2 * max(total_steps, warmup + 1)",
        "test_optimizer.py::test_the_learning_rate_grows_to_its_peak_and_falls_to_zero",
    ),
    Mutation(
        "optimizer: moments in bfloat16 are rounded down",
        "_round(x, b >> 16)",
        "_round(x, b * 0)",
        "test_optimizer.py::test_bfloat16_moments_are_float32s_on_average",
    ),
    Mutation(
        "optimizer: moments stay on the device",
        "jax.device_put(x, jax.memory.Space.Host)",
        "x",
        "test_optimizer.py::test_moments_on_the_host_change_nothing",
    ),
    Mutation(
        "optimizer: a gradient with NaN enters the moments",
        "updates, state = jax.lax.cond(\n            finite,",
        "updates, state = jax.lax.cond(\n            True,",
        "test_reliability.py::test_an_update_with_nan_is_skipped",
    ),
    Mutation(
        "steps: weights take an update with NaN",
        "lambda a, b: jnp.where(finite, a, b), updated, state.params)",
        "lambda a, b: a, updated, state.params)",
        "test_reliability.py::test_an_update_with_nan_is_skipped",
    ),
    Mutation(
        "steps: a gradient that is not finite is not noticed",
        'finite = jnp.isfinite(figures["loss"]) & jnp.isfinite(figures["grad_norm"])',
        'finite = jnp.isfinite(figures["loss"])',
        "test_reliability.py::test_an_update_with_an_infinite_gradient_is_skipped",
    ),
    Mutation(
        "steps: micro-batches are added and not averaged",
        "jax.tree.map(lambda x: x / count, total)",
        "total",
        "test_train.py::test_micro_batches_change_nothing_but_memory",
    ),
    Mutation(
        "steps: skipped updates are not counted in a row",
        'self._skipped = self._skipped + 1 if figures["skipped"] else 0',
        'self._skipped = self._skipped + int(figures["skipped"])',
        "test_reliability.py::test_only_updates_skipped_in_a_row_end_a_run",
    ),
    Mutation(
        "refresh: sets are chosen at every step",
        "if not (since and known):",
        "if True:",
        "test_train.py::test_sets_are_kept_within_a_window",
    ),
    Mutation(
        "refresh: the last step of a window trains on old sets",
        "steps = range(step, min(end, self._total))",
        "steps = range(step, min(end - 1, self._total))",
        "test_train.py::test_a_window_chooses_for_every_row_it_trains_on_with_the_policy_at_its_start",
    ),
    Mutation(
        "refresh: a run that goes on has forgotten its sets",
        "self._restored = restored is not None",
        "self._restored = False",
        "test_train.py::test_interrupted_run_goes_on_bit_for_bit",
    ),
    Mutation(
        "refresh: a state hands on no sets",
        "return state._replace(sets=sets), used, figures",
        "return state, used, figures",
        "test_api.py::test_another_step_function_goes_on_inside_a_window",
    ),
    Mutation(
        "refresh: sets of another window are trained on",
        "known = self._window == window and",
        "known = self._window is not None and",
        "test_train.py::test_sets_that_are_not_there_are_chosen_with_a_warning",
    ),
    Mutation(
        "refresh: random sets change within a window",
        "setup.key(batch.step // self.sets.window)",
        "setup.key(batch.step)",
        "test_train.py::test_random_sets_are_each_prompts_own_and_last_a_window",
    ),
    Mutation(
        "refresh: a set in another order counts as changed",
        "differ = (np.sort(self._last[rows]) != np.sort(new)).any(1)",
        "differ = (self._last[rows] != new).any(1)",
        "test_train.py::test_a_set_in_another_order_has_not_changed",
    ),
    Mutation(
        "checkpoint: what is read is not checked",
        "if digest != digests[name]:",
        "if len(digest) != len(digests[name]):",
        "test_checkpoint.py::test_single_bits",
    ),
    Mutation(
        "checkpoint: of equally good ones the oldest is kept",
        "return max(reversed(known), key=values.__getitem__, default=None)",
        "return max(known, key=values.__getitem__, default=None)",
        "test_checkpoint.py::test_the_best_is_kept_beside_the_newest",
    ),
    Mutation(
        "checkpoint: only the newest is kept",
        "policies.LatestN(keep)",
        "policies.LatestN(1)",
        "test_export.py::test_refusals_leave_nothing_behind",
    ),
    Mutation(
        "checkpoint: an export does not check what it reads",
        'if found != written["params"]:',
        "if not found:",
        "test_checkpoint.py::test_an_export_notices_a_flipped_bit",
    ),
    Mutation(
        "resume: another beta may go on with a run",
        '    "train.keep_",\n',
        '    "train.keep_",\n    "beta",\n',
        "test_train.py::test_workdir_of_another_run_is_refused_and_kept",
    ),
    Mutation(
        "resume: other data may go on with a run",
        'known = about(workdir).get("data")',
        'known = about(workdir).get("rows")',
        "test_reliability.py::test_a_run_does_not_go_on_with_other_data",
    ),
    Mutation(
        "origin: other weights of a base pass",
        "if known.get(name, digest) != digest:",
        "if False:",
        "test_origin.py::test_what_a_run_reads_again_is_refused_where_it_has_changed",
    ),
    Mutation(
        "origin: a base is known by its weights as they are kept",
        "array.shape, scoring.sums_of(array)",
        "array.shape, scoring.sums_of(array.astype(jnp.int8))",
        "test_lora_runs.py::test_a_run_does_not_go_on_with_other_weights",
    ),
    Mutation(
        "origin: edited files of a run pass",
        "if differ := sorted(n for n in {*there, *wanted} if there.get(n) != wanted.get(n)):",
        "if differ := sorted({*there} - {*wanted}):",
        "test_origin.py::test_what_a_run_reads_again_is_refused_where_it_has_changed",
    ),
    Mutation(
        "origin: adapters are read where they lay",
        "    if (workdir / ADAPTERS).is_dir():\n        found",
        "    if False:\n        found",
        "test_origin.py::test_what_a_run_has_itself_may_change_outside",
    ),
    Mutation(
        "origin: a run's template is read where it lay",
        'found.data.chat_template = "tokenizer"',
        "pass",
        "test_origin.py",
    ),
    Mutation(
        "origin: a run remembers paths as they were typed only",
        "found.update_from_flattened_dict({name: path})",
        "pass",
        "test_origin.py::test_what_a_run_has_itself_may_change_outside",
    ),
    Mutation(
        "origin: the reference is drawn with another seed",
        "setup.policy.read(reference, own.seed, adapters)",
        "setup.policy.read(reference, config.seed, adapters)",
        "test_origin.py::test_a_scratch_run_keeps_the_reference_that_was_drawn_for_it",
    ),
    Mutation(
        "origin: the cache of references does not know alpha",
        '"adapters": lora.scaled(params["adapters"])',
        '"adapters": params["adapters"]',
        "test_origin.py::test_the_reference_in_the_cache_is_that_of_these_adapters",
    ),
    Mutation(
        "origin: micro-batches may not change when a run goes on",
        '    "train.micro_batch_size",\n    "train.reuse_scoring",\n',
        "",
        "test_origin.py::test_settings_that_only_split_an_update_may_change",
    ),
    Mutation(
        "resume: the log loses the step that was saved",
        'if step and line["step"] <= step]',
        'if step and line["step"] < step]',
        "test_reliability.py::test_an_interruption_costs_no_evaluation",
    ),
    Mutation(
        "resume: every epoch has the same order",
        "rng = np.random.default_rng([self._seed, epoch])",
        "rng = np.random.default_rng([self._seed])",
        "test_data_batches.py",
    ),
    Mutation(
        "resume: an earlier epoch is taken for the one at hand",
        "if self._last[0] != epoch:",
        "if self._last[0] < epoch:",
        "test_data_batches.py",
    ),
    Mutation(
        "resume: two trainings share a folder",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "test_reliability.py::test_two_trainings_do_not_share_a_folder",
    ),
    Mutation(
        "loaders: a prompt in common keeps the space before the responses",
        'if length and chosen[length - 1] == " ":',
        'if length and chosen[length - 1] == "\\t":',
        "test_data_jsonl.py",
    ),
    Mutation(
        "loaders: a chosen response may be rejected, too, but first",
        "        if response == chosen:",
        "        if response == chosen and i == 0:",
        "test_data_jsonl.py",
    ),
    Mutation(
        "loaders: more scores than rejected responses pass",
        "if len(rejected) != count:",
        "if len(rejected) < count:",
        "test_data_jsonl.py",
    ),
    Mutation(
        "loaders: rows that are held out are trained on",
        'if is_out == (part == "held_out")]',
        'if is_out or part == "rest"]',
        "test_data_jsonl.py",
    ),
    Mutation(
        "loaders: the first rows are used and not any",
        "return [rows[i] for i in sorted(chosen)]",
        "return rows[:most]",
        "test_data_jsonl.py",
    ),
    Mutation(
        "loaders: LastFM's order tells the answer",
        "shuffled = [sorted(items)[i] for i in order]",
        "shuffled = list(items)",
        "test_data_lastfm.py",
    ),
    Mutation(
        "loaders: a history ends with the answer",
        "taken[max(0, k - MOST) : k]]",
        "taken[max(0, k - MOST) : k + 1]]",
        "test_data_sequences.py",
    ),
    Mutation(
        "loaders: what was taken long ago is a candidate",
        "for event in taken[: k + 1]]",
        "for event in taken[max(0, k - MOST) : k + 1]]",
        "test_data_sequences.py",
    ),
    Mutation(
        "loaders: items come in the order of the file",
        "for event in sorted(events):",
        "for event in events:",
        "test_data_sequences.py",
    ),
    Mutation(
        "loaders: MedMCQA counts options from 1 always",
        "answer = options[cop - first]",
        "answer = options[cop - 1]",
        "test_data_medmcqa.py",
    ),
    Mutation(
        "loaders: MedMCQA is evaluated on enlarged pools",
        'enlarge = split in ("train", "all") or not data.native_eval',
        "enlarge = True",
        "test_data_medmcqa.py",
    ),
    Mutation(
        "loaders: QASC's answer may be a wrong choice, too",
        "if len(wrong) < len(questions.distinct(texts)):",
        "if not texts:",
        "test_data_qasc.py",
    ),
    Mutation(
        "loaders: texts that differ in case are two",
        'return " ".join(text.casefold().split())',
        'return " ".join(text.split())',
        "test_data_medmcqa.py",
    ),
    Mutation(
        "loaders: a skipped row is not counted",
        "self._skipped += 1",
        "self.count -= 1",
        "test_data_jsonl.py",
    ),
    Mutation(
        "tokens: a response has what the template writes behind its end",
        "text[: text.index(end) + len(end)]",
        "text",
        "test_data_render.py",
    ),
    Mutation(
        "tokens: a user's template arguments are overruled",
        '{"enable_thinking": False, "date_string": data.date, **given}',
        '{**given, "enable_thinking": False, "date_string": data.date}',
        "test_data_render.py",
    ),
    Mutation(
        "tokens: long prompts lose their end",
        "keep = position >= np.repeat(self.lengths - limit, self.lengths)",
        "keep = position < limit",
        "test_data_tokens.py",
    ),
    Mutation(
        "tokens: a history loses one item too many",
        "np.flatnonzero(enough - too_few > 1)",
        "np.flatnonzero(enough - too_few > 2)",
        "test_data_tokens.py",
    ),
    Mutation(
        "tokens: an example stays without negatives",
        "keep &= (keep[:, 0] & keep[:, 1:].any(1))[:, None]",
        "keep &= keep[:, :1]",
        "test_data_tokens.py",
    ),
    Mutation(
        "tokens: the digest does not know where a response ends",
        "            self.response_lengths,\n            self.response_tokens,",
        "            self.response_tokens,",
        "test_data_tokens.py",
    ),
    Mutation(
        "tokens: cached ones are of examples with other scores",
        "example.rejected, example.scores]",
        "example.rejected]",
        "test_data_token_cache.py",
    ),
    Mutation(
        "tokens: cached ones are of other lengths",
        '"max_prompt_length", "max_response_length",',
        '"max_response_length",',
        "test_data_token_cache.py",
    ),
    Mutation(
        "batches: left-over rows have no room",
        "max(most[_next(sizes, g)], most[g])",
        "most[_next(sizes, g)]",
        "test_data_batches.py",
    ),
    Mutation(
        "batches: candidates that are not there have a reference",
        "reference[:] = np.where(response_lengths > 0, ref_logps[indices], 0)",
        "reference[:] = ref_logps[indices]",
        "test_data_batches.py",
    ),
    Mutation(
        "batches: the last one is filled up with the first row",
        "batch_size - len(batch)), constant_values=-1)",
        "batch_size - len(batch)), constant_values=0)",
        "test_data_batches.py",
    ),
    Mutation(
        "metrics: a tie counts for the model",
        "below = scores[:, 1:] < scores[:, :1]",
        "below = scores[:, 1:] <= scores[:, :1]",
        "test_metrics.py",
    ),
    Mutation(
        "metrics: candidates that are not there have a rank",
        "np.sum(valid[:, 1:] & ~below, axis=1)",
        "np.sum(~below, axis=1)",
        "test_metrics.py",
    ),
    Mutation(
        "metrics: NDCG has the wrong logarithm",
        "1.0 / np.log2(1.0 + ranks)",
        "1.0 / np.log(1.0 + ranks)",
        "test_metrics.py",
    ),
    Mutation(
        "metrics: standard errors divide by M",
        "np.std(values, ddof=1)",
        "np.std(values)",
        "test_metrics.py",
    ),
    Mutation(
        "metrics: pairs have the error of one side",
        "return float(np.mean(difference)), standard_error(difference)",
        "return float(np.mean(difference)), standard_error(ours)",
        "test_metrics.py",
    ),
    Mutation(
        "metrics: an equal reward is a win",
        "wins = (present & (rejected < chosen))",
        "wins = (present & (rejected <= chosen))",
        "test_metrics.py",
    ),
    Mutation(
        "mesh: devices may be left over",
        "if len(devices) % given or (not unknown and given != len(devices)):",
        "if len(devices) % given:",
        "test_mesh.py::test_meshes_that_do_not_fit",
    ),
    Mutation(
        "mesh: uneven batches pass",
        "    if size % ways:",
        "    if size * 4 < ways:",
        "test_mesh.py::test_batches_must_split_evenly",
    ),
    Mutation(
        "mesh: hidden units are not split",
        '    "mlp": "tensor",\n',
        "",
        "test_mesh.py::test_eight_devices_equal_one",
    ),
    Mutation(
        "hosts: a process may have a number beyond the last",
        "if not 0 <= self.process < self.processes:",
        "if not 0 <= self.process <= self.processes:",
        "test_hosts.py::test_flags_by_half",
    ),
    Mutation(
        "hosts: one flag of three is enough",
        "if 0 < len(missing) < len(given):",
        "if 0 < len(missing) < len(given) - 1:",
        "test_hosts.py::test_flags_by_half",
    ),
    Mutation(
        "hosts: all axes lie across hosts",
        "groups //= across[axis]",
        "groups //= 1",
        "test_hosts.py::test_data_goes_across_hosts_before_fsdp_and_tensor",
    ),
    Mutation(
        "hosts: a mistake of one process is printed by none",
        '            print(f"error: {message}", file=sys.stderr, flush=True)\n',
        "",
        "test_hosts.py::test_a_mistake_of_one_process_ends_all_and_is_said_once",
    ),
    Mutation(
        "config: batches need be no multiple of micro-batches",
        "    if batch % micro:",
        "    if batch < micro:",
        "test_bad_input.py::test_settings_that_no_run_could_use",
    ),
    Mutation(
        "config: true is a number",
        "if type(found) is not kind and not",
        "if not isinstance(found, kind) and not",
        "test_bad_input.py::test_settings_of_a_run",
    ),
    Mutation(
        "config: all rows may be held out",
        "if not 0 <= fields[name] < 1:",
        "if not 0 <= fields[name] <= 1:",
        "test_bad_input.py::test_settings_that_no_run_could_use",
    ),
    Mutation(
        "config: a window of 0 steps is the whole run",
        "and int(refresh) > 0:",
        "and int(refresh) >= 0:",
        "test_bad_input.py::test_settings_that_no_run_could_use",
    ),
    Mutation(
        "config: a model in place of a run is not told apart",
        'if "model_type" in stored:',
        'if "model_type" in stored and "method" in stored:',
        "test_train.py::test_a_folder_of_something_else_is_refused_and_kept",
    ),
    Mutation(
        "cli: of two values the first counts",
        "given = dict(pairs)  # Of several values the last.",
        "given = dict(reversed(pairs))",
        "test_commands.py::test_of_two_run_folders_the_last",
    ),
    Mutation(
        "config: a field that does not exist may be set",
        "if self.is_locked and key not in self:",
        "if False:",
        "test_config.py::test_an_unknown_field_is_refused_when_it_is_set",
    ),
    Mutation(
        "config: a field that it was unlocked for trains",
        "if name not in NAMES:",
        "if False:",
        "test_config.py::test_a_field_for_which_it_was_unlocked_is_refused_before_anything_is_written",
    ),
    Mutation(
        "files: a home is not looked up where a folder ~ is there",
        'if path == "~" or path.startswith("~/"):',
        'if path == "~":',
        "test_files.py",
    ),
    Mutation(
        "files: a variable that is not set is a part of the name",
        "if unset := re.search(",
        "if unset := re.match(",
        "test_files.py",
    ),
    Mutation(
        "cli: half a step is a whole one",
        "if number is not None and number.is_integer():",
        "if number is not None:",
        "test_command_line.py::test_a_mistake_is_one_line_with_what_to_type",
    ),
    Mutation(
        "cli: a checkpoint is taken for a new run's folder",
        "if run := _around(workdir):",
        "if run := None:",
        "test_run_paths.py::test_where_no_run_can_be_written",
    ),
    Mutation(
        "reports: a key that W&B cannot find is missed after the data are read",
        "if hosts.first() and not _has_key():",
        "if False:",
        "test_loggers.py::test_without_a_key_a_run_is_refused_before_its_data_are_read",
    ),
    Mutation(
        "reports: W&B ends a run",
        "except Exception as error:  # Of a library",
        "except UserError as error:  # Of a library",
        "test_loggers.py",
    ),
    Mutation(
        "cli: an input may be written over through a link",
        "path.samefile(read)",
        "path == Path(read)",
        "test_commands.py::test_what_an_output_must_not_be",
    ),
    Mutation(
        "cli: a mistake ends with status 1",
        "    raise SystemExit(2)",
        "    raise SystemExit(1)",
        "test_commands.py::test_mistakes_on_the_command_line",
    ),
    Mutation(
        "help: settings are printed without quotes",
        "shlex.quote(str(values[name]))",
        "str(values[name])",
        "test_help.py::test_what_print_shows_can_be_given_back",
    ),
    Mutation(
        "help: a comment after a setting is not shown",
        "for n in range(last + 1, end + 1) if n in lines)",
        "for n in range(last + 1, end) if n in lines)",
        "test_help.py::test_every_setting_has_type_default_comment_and_choices",
    ),
    Mutation(
        "files: what could not be written is left there",
        "    finally:\n        temporary.unlink(missing_ok=True)",
        "    finally:\n        pass",
        "test_bad_input.py",
    ),
    Mutation(
        "files: links may lead out of a model's folder",
        "if not (target := path.resolve()).is_relative_to(home):",
        "if not (target := path.resolve()).exists():",
        "test_security.py::test_links_out_of_a_model_folder_are_refused",
    ),
    Mutation(
        "account: one micro-batch has sums, too",
        "sums=parameters if micro_batches > 1 else 0",
        "sums=parameters",
        "test_account.py::test_peak_with_an_offloaded_state_and_several_micro_batches",
    ),
    Mutation(
        "account: attention counts half of its products",
        "return 4 * m.queries * (",
        "return 2 * m.queries * (",
        "test_account.py::test_flops_are_those_of_the_programs_products",
    ),
    Mutation(
        "account: tokens see all of their response",
        "pairs = r * p[:, None] + r * (r + 1) / 2",
        "pairs = r * p[:, None] + r * r",
        "test_account.py::test_useful_flops_count_pairs_that_see_each_other",
    ),
    Mutation(
        "account: the last layer keeps nothing",
        "return (at.tokens * (m.hidden + keys) + at.ends * (rest + m.hidden)) * m.itemsize",
        "return at.tokens * m.hidden * m.itemsize",
        "test_account.py::test_kept_bytes_are_the_record_and_what_differentiation_saves",
    ),
    Mutation(
        "account: four bits take a byte",
        "bits = 4 if x.dtype == jnp.uint4 else 8 * x.dtype.itemsize",
        "bits = 8 * x.dtype.itemsize",
        "test_lora_account.py::test_models_of_billions_of_weights_fit_a_card_of_24_gb",
    ),
    Mutation(
        "reports: other test rows are compared",
        'if not metrics_.get("digest") or metrics_["digest"] != found[0].get("digest"):',
        'if not metrics_.get("digest"):',
        "test_compare.py",
    ),
    Mutation(
        "reports: a gain has the other sign",
        "metrics.paired_difference(*correct)",
        "metrics.paired_difference(*correct[::-1])",
        "test_compare.py",
    ),
    Mutation(
        "reports: runs on other rows are paired",
        "if b is None or not digests[0] or digests[0] != digests[1]:",
        "if b is None or not digests[0]:",
        "test_report.py",
    ),
    Mutation(
        "reports: an interval is of 90%",
        "[2.5, 97.5]",
        "[5, 95]",
        "test_report.py",
    ),
    Mutation(
        "reports: the error over seeds is their spread",
        "spread = metrics.standard_error(np.array(values))",
        "spread = float(np.std(values, ddof=1))",
        "test_report.py",
    ),
    Mutation(
        "reports: TensorBoard forgets the step that was saved",
        "purge_step=step + 1 if step else 0",
        "purge_step=step",
        "test_loggers.py",
    ),
    Mutation(
        "model card: figures are of another step",
        'found.get("finished") and found.get("step") == step and found.get("final")',
        'found.get("finished") and found.get("final")',
        "test_export.py::test_steps_and_types",
    ),
    Mutation(
        "model card: a supervised term is not told",
        "if config.sft_weight:",
        "if config.sft_weight > 1:",
        "test_export.py::test_every_method_has_its_words",
    ),
)
