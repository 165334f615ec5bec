"""The command `fastlm`: demo, train, generate, info."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastlm import UnsupportedError, info, tune_malloc
from fastlm._version import __version__

if TYPE_CHECKING:
    from fastlm.train import Recipe, Result

USAGE = """\
usage: fastlm VERB ...

  demo      train a small model on real text, about two minutes
  train     train a model on data of your own
  generate  continue, translate or label a text with a trained model
  info      what is installed, what runs here, what does not and why

fastlm VERB --help tells more.
"""
EXTRA = ("tyro", "rich", "tokenizers", "safetensors", "matplotlib", "tensorboard")


class UsageError(Exception):
    """The command line cannot be understood."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 wrong input, 130 Ctrl-C, 143 SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if verb in ("-V", "--version"):
        print(f"fastlm {__version__}")
        return 0
    verbs: dict[str, Callable[[list[str]], int]] = {
        "demo": _demo, "train": _train, "generate": _generate, "info": info.main,
    }  # fmt: skip
    try:
        if verb not in verbs:
            raise UsageError(f"verb must be one of {', '.join(verbs)}, got {verb!r}")
        if verb != "info":
            _need_extra(verb)
        return verbs[verb](arguments)
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as in: fastlm generate ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would complain when it flushes at exit
        return 1
    except (UsageError, ValueError, UnsupportedError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        code = 2
        problem: Exception = error
    except (OSError, ArithmeticError) as error:
        code, problem = 1, error
    if sys.flags.dev_mode:  # python -X dev -m fastlm.cli ... shows where
        raise problem
    print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


def _need_extra(verb: str) -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f'fastlm {verb} needs {", ".join(missing)}, not installed here: pip install "fastlm[train]" '
            "(fastlm info works without)"
        )


def _parse(kind: Any, default: Any, verb: str, description: str, arguments: list[str]) -> Any:
    """Arguments as a dataclass. tyro draws a box around what is wrong; a line is enough."""
    import tyro

    if "-h" in arguments or "--help" in arguments:  # tyro would not wrap it
        width = shutil.get_terminal_size().columns
        for line in description.split("\n"):
            print(line if line.startswith("  ") else textwrap.fill(line, width))
        print()
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            return tyro.cli(
                kind, prog=f"fastlm {verb}", description="", args=arguments,
                default=tyro.MISSING_NONPROP if default is None else default,
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│| ") for line in drawn.getvalue().splitlines()]
    body = [line for line in lines if line and line[0] not in "╭╰+"]
    if len(body) > 2 and not body[1].strip("-"):  # drawn in ASCII, the title has a line of its own
        body = body[2:]
    rules = [i for i, line in enumerate(body) if not line.strip("─-")] or [len(body)]
    hint = [line.split()[0] for line in body[rules[0] :] if line.startswith("--") and line.strip("-")]
    perhaps = f" (perhaps {hint[0].rstrip(',')}?)" if hint and "Unrecognized" in body[0] else ""
    raise UsageError(f"{' '.join(body[: rules[0]])}{perhaps}; see fastlm {verb} --help")


def _demo(arguments: list[str]) -> int:
    from fastlm.train import demo, make_reporter
    from fastlm.train.demonstration import run_demo
    from fastlm.train.options import DemoOptions
    from fastlm.train.run import saved_recipe

    options: DemoOptions = _parse(
        DemoOptions, None, "demo",
        "Trains a small language model on the sources of Python's standard library, shows how it goes and what it "
        "has learned. Takes about two minutes and a half; downloads nothing.",
        arguments,
    )  # fmt: skip
    recipe = demo()
    train = replace(recipe.train, minutes=options.minutes, out=options.out, device=options.device, seed=options.seed)
    recipe = replace(recipe, train=train)
    if options.resume:
        saved = saved_recipe(options.out)
        given = {name: getattr(options, name) for name in ("minutes", "device") if _given(name, arguments)}
        recipe = replace(saved, train=replace(saved.train, **given))
    run, result = run_demo(recipe, make_reporter(), again=options.resume)
    return _end(result, f"fastlm demo --resume{_unless_default(run.folder, 'runs/demo')}")


def _given(name: str, arguments: list[str]) -> bool:
    return any(a == f"--{name}" or a.startswith(f"--{name}=") for a in arguments)


def _unless_default(folder: Path, default: str) -> str:
    return "" if folder == Path(default) else f" --out {shlex.quote(str(folder))}"


def _end(result: Result, again: str) -> int:
    """Say how a run ended, and how to go on with it."""
    if result.stopped == "finished":
        return 0
    print(f"Saved {result.checkpoint} at step {result.steps}. To resume: {again}", flush=True)
    return 130 if result.stopped == "interrupted" else 143


TRAIN_DESCRIPTION = """\
Trains a model on files in UTF-8. Without --validation, a tenth of the data is kept for it: of one text its last \
tenth, of several a tenth of the files.

Start from a task or a preset and change what you like:
  fastlm train input.txt --preset shakespeare-char-cpu
  fastlm train my_texts/ --minutes 30 --width 256
  fastlm train my_texts/ --task mlm
  fastlm train train.tsv --task classify
  fastlm train train.conll --task tag
  fastlm train train.en train.de --task seq2seq

Ctrl-C saves and prints the command that goes on from there."""


def _train(arguments: list[str]) -> int:
    from fastlm.train import make_reporter
    from fastlm.train.config import Recipe
    from fastlm.train.options import TrainOptions
    from fastlm.train.run import finish, resume, start, summary
    from fastlm.train.tasks import Source

    folder = _value("resume", arguments)
    base = _base(arguments, folder)
    options: TrainOptions = _parse(
        TrainOptions,
        TrainOptions(task=cast(Any, base.task), init=base.init, text=base.text, model=base.model, train=base.train),
        "train", TRAIN_DESCRIPTION, arguments,
    )  # fmt: skip
    recipe, reporter = Recipe(options.text, options.model, options.train, base.task, options.init), make_reporter()
    if folder is None:
        if not options.data:
            raise UsageError("data is missing: give text files or folders, as in: fastlm train input.txt")
        if options.init.init:
            _unchanged(base, recipe, f"with --init: it is that of {options.init.init}", ("text", "model"), ("dropout",))
        run = start(recipe, Source(options.data, options.validation), reporter, overwrite=options.overwrite)
    else:
        for path in (*options.data, *options.validation):
            raise UsageError(f"a resumed run has its data in {Path(folder) / 'data'}; leave out {path}")
        rooms = ("text", "init", "model") if base.init.init else ("text", "init")
        _unchanged(base, recipe, "when a run is resumed", rooms)
        run = resume(recipe, reporter)
    reporter.message(
        f"{run.task.facts(run.data)}; {run.trainer.model.num_parameters():,} weights on {run.trainer.device}; "
        f"run in {run.folder}"
    )
    result = run.trainer.fit()
    if result.stopped == "finished":
        reporter.message(summary(run, result))
        reporter.message(f"time             {result.seconds:.1f} s for {result.steps} steps")
        reporter.message(f"checkpoint {run.folder / 'best'}, plot {finish(run)}")
    return _end(result, f"fastlm train --resume {shlex.quote(str(run.folder))}")


def _base(arguments: list[str], folder: str | None) -> Recipe:
    """What the other options change: the preset, the task's own, or the run that is resumed."""
    from fastlm.train import PRESETS
    from fastlm.train.run import saved_recipe
    from fastlm.train.tasks import TASKS

    preset, task = _value("preset", arguments), _value("task", arguments)
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if task is not None and task not in TASKS:
        raise UsageError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if preset is not None and folder is not None:
        raise UsageError("--preset and --resume exclude each other: a resumed run keeps its own settings")
    if folder is not None:
        base = saved_recipe(folder)
    else:
        base = PRESETS[preset or (task if task in PRESETS else "default")]()
    if task is not None and task != base.task:
        raise UsageError(
            f"{f'the run in {folder}' if folder else f'preset {preset}'} is of task {base.task}, not {task}"
        )
    return base


def _unchanged(base: Recipe, recipe: Recipe, why: str, rooms: Sequence[str], free: Sequence[str] = ()) -> None:
    """Raises UsageError for options that were given although they cannot count."""
    for room in rooms:
        for name, value in vars(getattr(recipe, room)).items():
            if value != getattr(getattr(base, room), name) and name not in free:
                raise UsageError(f"{name} cannot change {why}")


def _value(name: str, arguments: list[str]) -> str | None:
    """What follows --name, wanted before the other options can be given their defaults."""
    for i, argument in enumerate(arguments):
        if argument == f"--{name}" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
    return None


def _generate(arguments: list[str]) -> int:
    from fastlm.models import CausalLM
    from fastlm.train.generate import load_model, stream_text
    from fastlm.train.options import GenerateOptions
    from fastlm.train.trainer import pick_device

    options: GenerateOptions = _parse(
        GenerateOptions, None, "generate",
        "Continues a text with a trained model and prints it as it comes; or translates, labels, tags or fills in.",
        arguments,
    )  # fmt: skip
    tune_malloc()
    trained = load_model(options.folder, str(pick_device(options.device)))
    if isinstance(trained.model, CausalLM):
        print(options.prompt, end="", flush=True)
        for piece in stream_text(
            trained.model, trained.tokenizer, options.prompt, options.tokens, temperature=options.temperature,
            top_k=options.top_k, top_p=options.top_p, seed=options.seed,
        ):  # fmt: skip
            print(piece, end="", flush=True)
        print()
        return 0
    lines = iter([options.prompt]) if options.prompt else (line.rstrip("\n") for line in sys.stdin)
    size = 1 if sys.stdin.isatty() else 32  # who types waits for an answer to each line
    while some := list(itertools.islice(lines, size)):
        for answer in trained.answers(some, options.beams, options.tokens):
            print(answer, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
