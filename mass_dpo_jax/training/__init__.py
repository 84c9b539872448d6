"""Training: from a configuration to a finished run.

From the outside in:

    loop.py               a run: what is checked, restored, updated, evaluated and saved, in order
    prepare.py, setup.py  the configuration taken apart: data, policy, method (`Setup`)
    updates.py            the batches of a run, and one update after another
    step.py               the train step, one compiled program: score, choose, loss, average, update
    methods.py            what `config.method` means: loss, criterion, reference
    scorer.py             the decoder as a function of weights and a batch
    negatives.py          negatives that are kept for more than a step (`selection.refresh`)
    prompts.py            which prompts an epoch trains on (`selection.prompts`)
    mined_negatives.py    negatives that are mined between epochs (`mine`)
    optimizer.py          AdamW, its schedule, and updates that are skipped

Around it:

    policy.py, open_policy.py, model_paths.py   a decoder with its tokenizer, and its origin
    checkpoint.py, checkpoint_reading.py        the state of a run on disk
    evaluator.py, step_log.py, advice.py        metrics of a run, and what it prints
    draw_noise.py                               how much of a gradient's noise the draw makes
    interruption.py                             signals that end a run after the current step
    mesh.py                                     devices, and how arrays are split over them
    data_checks.py                              whether the data has what the method needs

Without training:

    scored_model.py, scoring.py              passes of a model over a whole split
    mining.py, mining_sources.py             negatives from a whole catalogue
    offline_selection.py, feature_files.py   negatives selected by a model, or from given features
    export.py                                a run as a Hugging Face folder
"""
