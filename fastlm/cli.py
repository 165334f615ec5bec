"""The command `fastlm`: demo, train, generate, info."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm import UnsupportedError, info, tune_malloc
from fastlm._version import __version__

if TYPE_CHECKING:
    from fastlm.train import Result

USAGE = """\
usage: fastlm VERB ...

  demo      train a small model on real text, about two minutes
  train     train a model on text of your own
  generate  continue a text with a trained model
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
Trains a language model on text files or folders of them, in UTF-8. \
One file: its last tenth is kept for validation. Several: a tenth of the files.

Start from a preset and change what you like:
  fastlm train input.txt --preset shakespeare-char-cpu
  fastlm train my_texts/ --minutes 30 --width 256

Ctrl-C saves and prints the command that goes on from there."""


def _train(arguments: list[str]) -> int:
    from fastlm.data import from_paths
    from fastlm.train import PRESETS, Recipe, make_reporter
    from fastlm.train.options import TrainOptions
    from fastlm.train.run import finish, resume, saved_recipe, start, summary

    preset, folder = _value("preset", arguments), _value("resume", arguments)
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if preset is not None and folder is not None:
        raise UsageError("--preset and --resume exclude each other: a resumed run keeps its own settings")
    base: Recipe = saved_recipe(folder) if folder is not None else PRESETS[preset or "default"]()

    options: TrainOptions = _parse(
        TrainOptions, TrainOptions(text=base.text, model=base.model, train=base.train), "train", TRAIN_DESCRIPTION,
        arguments,
    )  # fmt: skip
    recipe, reporter = Recipe(options.text, options.model, options.train), make_reporter()
    if folder is None:
        if not options.data:
            raise UsageError("data is missing: give text files or folders, as in: fastlm train input.txt")
        run = start(recipe, from_paths(options.data), reporter, overwrite=options.overwrite)
    else:
        if options.data:
            raise UsageError(f"a resumed run has its data in {Path(folder) / 'data'}; leave out {options.data[0]}")
        if recipe.text != base.text:
            raise UsageError("tokenizer and vocab cannot change when a run is resumed")
        run = resume(recipe, reporter)
    facts = run.data.info
    reporter.message(
        f"{facts['train_tokens']:,} tokens to train on, {facts['validation_tokens']:,} to validate, vocabulary "
        f"{facts['vocab_size']} ({facts['tokenizer']}); {run.trainer.model.num_parameters():,} weights on "
        f"{run.trainer.device}; run in {run.folder}"
    )
    result = run.trainer.fit()
    if result.stopped == "finished":
        reporter.message(summary(run, result))
        reporter.message(f"time             {result.seconds:.1f} s for {result.steps} steps")
        reporter.message(f"checkpoint {run.folder / 'best'}, plot {finish(run)}")
    return _end(result, f"fastlm train --resume {shlex.quote(str(run.folder))}")


def _value(name: str, arguments: list[str]) -> str | None:
    """What follows --name, wanted before the other options can be given their defaults."""
    for i, argument in enumerate(arguments):
        if argument == f"--{name}" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
    return None


def _generate(arguments: list[str]) -> int:
    from fastlm.train.generate import load_model, stream_text
    from fastlm.train.options import GenerateOptions
    from fastlm.train.trainer import pick_device

    options: GenerateOptions = _parse(
        GenerateOptions, None, "generate", "Continues a text with a trained model and prints it as it comes.", arguments
    )
    tune_malloc()
    model, tokenizer = load_model(options.folder, str(pick_device(options.device)))
    pieces = stream_text(
        model, tokenizer, options.prompt, options.tokens, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, seed=options.seed,
    )  # fmt: skip
    print(options.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
