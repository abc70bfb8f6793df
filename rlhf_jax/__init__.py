"""The ChatGPT recipe in JAX: pretraining, fine-tuning, reward modelling, PPO and people in the loop."""
