"""The command ``trivium``: finds the verb, loads only its file, and turns each foreseeable failure into an exit code.

Data goes to stdout, words to stderr. Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 environment, 4 does not
fit, 5 checkpoint invalid, 130 interrupted, 141 the reader of stdout went away.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from trivium.base.errors import SetupError, TriviumError
from trivium.cli.interrupts import interrupts_held

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130
PIPE_CLOSED = 141

# Verb, the module that registers it, and its line in `trivium --help`. A verb whose module is not there is not shown.
VERBS: tuple[tuple[str, str, str], ...] = (
    ("demo", "trivium.cli.demo", "See it all work on this machine: plan, same hashes, learning, experts, report."),
    ("train", "trivium.cli.train", "Train a language model from a configuration, alone or under torchrun."),
    ("plan", "trivium.cli.plan", "Say what a run would take in bytes and traffic before running it."),
    ("distill", "trivium.cli.distill", "Train a smaller student from a teacher, then on its own."),
    ("generate", "trivium.cli.generate", "Answer a prompt as it comes, or a file of prompts at full speed."),
    ("chat", "trivium.cli.chat", "Talk to a model in the terminal."),
    ("serve", "trivium.cli.serve", "Serve a model to OpenAI clients, with a page to talk to it."),
    ("convert", "trivium.cli.convert", "Turn a checkpoint into Hugging Face layout, or the other way round."),
    ("bench", "trivium.cli.bench", "Measure side by side with other trainers."),
    ("doctor", "trivium.cli.doctor", "Check this machine; each thing that is wrong comes with its fix."),
)

_CONTEXT = {"help_option_names": ["-h", "--help"]}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (default: the process's own) and exit."""
    raise SystemExit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing but a defect of Trivium itself raises."""
    try:
        _never_fail_on_a_letter()
        code = _invoke(list(arguments))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return INTERRUPTED
    except TriviumError as error:
        return _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "trivium"):
            raise
        return _fail(f"the package {package!r} is not installed; trivium doctor says what is missing", 3)
    except SystemExit as done:
        if isinstance(done.__context__, BrokenPipeError):  # rich's way to say so
            return _reader_gone()
        raise
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _reader_gone()
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1)


def verb_of(arguments: Sequence[str]) -> str | None:
    """The first word that is not an option."""
    return next((word for word in arguments if not word.startswith("-")), None)


def build_app(verb: str | None) -> typer.Typer:
    """The app with every verb known by name and help, and only ``verb`` loaded."""
    import typer

    app = typer.Typer(
        name="trivium",
        help="Train models larger than a device, give them experts, and serve them.",
        epilog="trivium --version prints the version; every verb has --help.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings=_CONTEXT,
    )
    app.callback()(_top)
    for name, module, summary in VERBS:
        if importlib.util.find_spec(module) is None:
            continue
        if name == verb:
            with interrupts_held():
                loaded = importlib.import_module(module)
            loaded.register(app)
        else:
            app.command(name, help=summary)(_not_loaded)
    return app


def _top() -> None:
    """Nothing stands before a verb but ``--version``, which is answered without loading anything."""


def _not_loaded() -> None:
    """Stands in for a verb that was not asked for."""


def _invoke(arguments: list[str]) -> int:
    if arguments[:1] in (["--version"], ["-V"]):
        from trivium import __version__

        print(f"trivium {__version__}")
        return 0
    _in_a_folder()
    import typer
    from typer.main import get_command

    # typer may carry its own click: the base of its errors, wherever it lives, is the one of BadParameter.
    click_error: type[Exception] = typer.BadParameter.__mro__[2]
    command: Any = get_command(build_app(verb_of(arguments)))
    try:
        with command.make_context("trivium", arguments) as context:
            command.invoke(context)
    except typer.Exit as done:
        return int(done.exit_code)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except click_error as error:
        return _usage(error)
    return 0


def _in_a_folder() -> None:
    """Raise SetupError where the working folder has been deleted: MKL, loaded late by torch, ends the process there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise SetupError("the working folder has been deleted: cd to one that exists") from None


def _usage(error: Any) -> int:
    """One line on what was wrong, one on where to look; help itself where nothing was asked."""
    context = getattr(error, "ctx", None)
    format_message: Callable[[], str] = error.format_message
    message = format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)
        return int(error.exit_code)
    path = context.command_path if context is not None else "trivium"
    return _fail(f"{' '.join(message.split()).rstrip('.')}; see: {path} --help", int(error.exit_code))


def _fail(message: str, code: int) -> int:
    try:
        print(f"error: {message}", file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _reader_gone()
        raise
    return code


def _reader_gone() -> int:
    """``| head`` has read enough: leave without a word, and without Python's own at exit."""
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(silent, stream.fileno())
        except (OSError, ValueError):
            continue
    return PIPE_CLOSED


def _never_fail_on_a_letter() -> None:
    """A terminal that cannot show Ψ shows ``?``; output is never lost to an encoding."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
