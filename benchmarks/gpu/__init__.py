r"""A step of a 3B model on one card, ours and PyTorch's, each in a process of its own.

    python -m benchmarks.gpu --output=gpu.json
    python -m benchmarks.gpu --workloads=G1 --remat=full --batch=64
    python -m benchmarks.gpu --model=tiny --dtype=float32 --device=cpu

Llama 3.2 3B's sizes with random weights, all of them trained. G1: prompts of 160 tokens, pools of
19 negatives of 10 tokens, n = 3. G2: prompts of 128, 7 negatives of 256, n = 3. Programs:

- ours: MASS-DPO, scores the pool, selects, trains, updates. The batch is the largest that fits, by
  the package's memory estimate with a margin; `model.remat` and `train.reuse_scoring` are those
  that take the fewest operations a prompt then; what turns out too large is planned again.
- (a) PyTorch S-DPO with the reference beside the policy, (b) with the reference's log-probs
  cached, (c) PyTorch MASS-DPO, all of benchmarks/peers.py, on as many prompts. Each in as few parts
  as fit, gradients accumulated, with and without gradient checkpointing: the faster of the two.

Everybody has float32 weights, gradients and Adam moments and multiplies in bfloat16: ours casts
weights where they are used, PyTorch's run under autocast, as transformers' Trainer with bf16=True
(its stream between layers is then float32). (a)'s reference has bfloat16 weights. Attention is
cuDNN's fused kernel, and PyTorch's own (SDPA).

Before anything is timed, ours and PyTorch's have to agree in float32 on a tiny model, (a) to (c) on
the card: losses, picks, gradient norms; and a run's first loss is log(1 + n), up to bfloat16.
Utilisation counts useful operations only (benchmarks/cost.py: no padding, nothing twice, prompts
once, scoring a pool is the forward pass on its sets), also PyTorch's. What does not fit, or not
into the time, is reported as not run.
"""
