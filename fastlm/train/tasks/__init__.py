"""What each `--task` trains, on what, and how it is judged."""

from fastlm.models import MaskedLM, Seq2SeqLM
from fastlm.train.tasks.classify import Classification
from fastlm.train.tasks.lm import LanguageModelling
from fastlm.train.tasks.mlm import MaskedModelling
from fastlm.train.tasks.seq2seq import Translation
from fastlm.train.tasks.tag import Tagging
from fastlm.train.tasks.task import Data, Measure, Model, Source, Task, count_targets, count_tokens

TASKS: dict[str, Task] = {
    task.name: task for task in (LanguageModelling(), MaskedModelling(), Translation(), Classification(), Tagging())
}
"""By the name that --task takes."""


def find_task(model: Model) -> Task:
    """The task a model is for."""
    if isinstance(model, MaskedLM):
        return TASKS[model.config.head]
    return TASKS["seq2seq" if isinstance(model, Seq2SeqLM) else "lm"]


__all__ = ["TASKS", "Data", "Measure", "Model", "Source", "Task", "count_targets", "count_tokens", "find_task"]
