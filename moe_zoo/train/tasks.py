"""The task of a run, by its settings."""

from moe_zoo.train.config import TASKS, Config
from moe_zoo.train.language import Language
from moe_zoo.train.task import Task


def make_task(config: Config) -> Task:
    """The task that `config.data` describes, its data read."""
    name = getattr(config.data, "name", None)
    return (Language if name is None else TASKS.get(name))(config)
