"""Names and definitions of the metrics that a stage records.

A stage writes one JSON object per step to `metrics.jsonl`:

    {"step": 20, "loss": 4.81, "lr": 0.02, "tokens": 40960, "tokens_per_second": 9812.0, "seconds": 4.2}

and what it measured at its end to `eval.json`, a tree of numbers in which an interval is `{"value": v, "low": l, "high": h, "n": n}`.
"""

STEP = "step"
LOSS = "loss"
VAL_LOSS = "val_loss"
BPB = "bpb"
LEARNING_RATE = "lr"
GRAD_NORM = "grad_norm"
TOKENS = "tokens"
STEP_TOKENS = "step_tokens"
TOKENS_PER_SECOND = "tokens_per_second"
MFU = "mfu"
SECONDS = "seconds"
SKIPPED_UPDATES = "skipped_updates"
REWARD = "reward"
REWARD_STD = "reward_std"
ZERO_STD = "frac_reward_zero_std"
MEAN_LENGTH = "completions/mean_length"
CLIPPED_RATIO = "completions/clipped_ratio"
ENTROPY = "entropy"
KL = "kl"
CLIP_RATIO = "clip_ratio/region_mean"
PASS_AT_1 = "eval/pass@1"
PASS_AT_K = "eval/pass@k"

DEFINITIONS = {
    STEP: "optimizer steps taken since the stage began",
    LOSS: "training loss of the step: sum(w * -log p) / N in nats, before the update; in RL, w are advantages: no measure of progress",
    VAL_LOSS: "the same on held-out rows, in nats per target",
    BPB: "bits per byte on held-out text: bits to encode it divided by its bytes, so tokenizers compare; lower is better",
    LEARNING_RATE: "learning rate of the first parameter group in this step",
    GRAD_NORM: "2-norm of all gradients before clipping",
    TOKENS: "tokens trained on since the stage began, all processes together",
    STEP_TOKENS: "tokens trained on in this step, all processes together",
    TOKENS_PER_SECOND: "tokens trained on per second of this step, all processes together, data and rollouts included",
    MFU: "model-FLOPs utilisation: FLOPs of the step's forward and backward, per second, as a share of the devices' peak",
    SECONDS: "seconds of work since the stage began, restarts added up",
    SKIPPED_UPDATES: "updates of the step that changed nothing: no target had a weight (all rewards equal, say), or fp16 overflowed",
    REWARD: "mean reward of the step's completions on training problems; 1 is right, 0 is wrong",
    REWARD_STD: "standard deviation of the reward over the step's completions",
    ZERO_STD: "share of prompts whose completions all got the same reward, so that nothing is learnt from them",
    MEAN_LENGTH: "mean length of completions in tokens",
    CLIPPED_RATIO: "share of completions cut off by the token limit",
    ENTROPY: "mean entropy of the next-token distribution where the model sampled, in nats; near 0 means no exploration left",
    KL: "divergence from the reference model (k3 estimate), mean over sampled tokens and updates of the step, in nats",
    CLIP_RATIO: "share of sampled tokens whose probability ratio was clipped, over all updates of the step",
    PASS_AT_1: "share of samples that are right on held-out problems, mean over problems",
    PASS_AT_K: "share of held-out problems that at least one of k samples solves, k the largest power of two in --eval-samples",
}
