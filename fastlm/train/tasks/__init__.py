"""What each `--task` trains, on what, and how it is judged."""

from fastlm.train.tasks.lm import LanguageModelling
from fastlm.train.tasks.task import Data, Measure, Model, Source, Task, count_targets, count_tokens

TASKS: dict[str, Task] = {task.name: task for task in (LanguageModelling(),)}


def find_task(model: Model) -> Task:
    """The task a model is for."""
    return TASKS["lm"]


__all__ = ["TASKS", "Data", "Measure", "Model", "Source", "Task", "count_targets", "count_tokens", "find_task"]
