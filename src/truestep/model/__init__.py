"""The reference model and how it writes: one transformer in the layouts of Llama and Qwen3."""
