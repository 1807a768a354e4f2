"""The one training loop, its step, optimizers, metrics, and the settings of a run."""
