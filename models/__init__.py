"""Hugging Face models whose token mixing is a plain PyTorch recurrence."""
