"""Adapters beside one base on several tasks: one LoRA against each mixture, at equal trained parameters."""
