"""Generation with Qwen3: checkpoints, prefill and greedy decode by several drivers, and whether the tokens are right."""
