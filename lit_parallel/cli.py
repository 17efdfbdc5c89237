"""The command line of train.py and sample.py: flags, ``key=value`` overrides, and help made from the schema."""

import contextlib
import difflib
import functools
import importlib.metadata
import inspect
import json
import logging
import math
import os
import re
import select
import signal
import sys
import textwrap
import threading
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from lit_parallel.config import load_config
from lit_parallel.errors import UserError, did_you_mean, first_line
from lit_parallel.options import Group, Option, describe_type, fields_of, iterate_groups, join_key, option_keys

Schema = TypeVar("Schema")

# The options that stand in no group are listed under this name.
_TOP = "general"
_PIPED_WIDTH = 100
_AT_ONCE_SECONDS = 2.0
_STOPPED: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_NO_ANSWER = re.compile(r"gloo/transport/\w+/(pair|buffer|unbound_buffer)\.cc|ncclRemoteError")
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 3.0
_FLAG_OF_SUFFIX = {".yaml": "--config", ".yml": "--config", ".ckpt": "--checkpoint"}


@dataclass(frozen=True)
class _Program:
    """What the help page of one program says."""

    name: str
    schema: type
    description: str
    examples: Sequence[str]
    default_config: str | Path | None
    resumes: bool

    @property
    def flags(self) -> dict[str, tuple[str, str]]:
        """Each flag with the name of its value and its explanation."""
        # The folder's name is enough to find the file, and an absolute path would not fit the line.
        default = f" (default: {Path(*Path(self.default_config).parts[-2:])})" if self.default_config else ""
        flags = {"--config": ("PATH", f"a YAML file of options{default}")}
        if "checkpoint" in fields_of(self.schema):
            flags["--checkpoint"] = ("PATH", "the same as checkpoint=PATH")
        if self.resumes:
            flags["--resume"] = ("PATH", "go on with the interrupted run in this folder")
        flags["--help"] = ("[GROUP]", "this page, the options of one group, or all (--help all)")
        flags["--version"] = ("", "the version of lit-parallel")
        return flags


def parse_arguments(
    schema: type[Schema],
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    examples: Sequence[str],
    default_config: str | Path | None = None,
    resume: Callable[[str, Sequence[str]], Schema] | None = None,
) -> Schema:
    """Turn the arguments of a command into a config; ``--help`` and ``--version`` print and exit instead.

    Args:
        schema: The dataclass of options.
        argv: The arguments, without the program's name.
        program: The command as a user types it, such as ``"python train.py"``.
        description: One line that says what the command does.
        examples: Complete command lines for the help page, at most three.
        default_config: The config file that is read unless ``--config`` names another one.
        resume: Gives the config after ``--resume PATH``, from the path and the overrides; without it there is no such
            flag.

    Raises:
        UserError: An argument is not understood, or the config cannot be loaded.
        SystemExit: After ``--help`` or ``--version``, with status 0.
    """
    page = _Program(program, schema, description, examples, default_config, resume is not None)
    paths, overrides = {}, []
    arguments = ["--help" if argument == "-h" else argument for argument in argv]
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("-"):
            forgotten = _FLAG_OF_SUFFIX.get(Path(argument).suffix)
            if forgotten in page.flags and "=" not in argument:
                raise UserError(f"'{argument}' needs a flag: {forgotten} {argument}")
            overrides.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if flag not in page.flags:
            raise UserError(_unknown_flag(page, flag, value if equals else next(iter(arguments), "")))
        metavar, _ = page.flags[flag]
        if not equals and metavar and arguments and (metavar == "PATH" or _names_group(arguments[0])):
            value = arguments.pop(0)
        if flag == "--help":
            _leave(functools.partial(_print_help, page, value))
        elif flag == "--version":
            _leave(functools.partial(print, _version()))
        elif not value:
            raise UserError(f"{flag} needs a path, as in {flag} PATH.")
        elif flag in ("--config", "--resume"):
            paths[flag] = value
        else:
            # In quotes, so that a path with '#' or '[' in it is not taken for YAML.
            overrides.append(f"checkpoint={json.dumps(value)}")
    if resume is None or "--resume" not in paths:
        return load_config(schema, paths.get("--config", default_config), overrides)
    if "--config" in paths:
        raise UserError("a run goes on with its own config: leave out --config, or --resume.")
    return resume(paths["--resume"], overrides)


class Stopped(SystemExit):
    """What SIGINT (Ctrl-C) and SIGTERM raise, so that everything is closed on the way out.

    Not ``KeyboardInterrupt``, after which Lightning closes less.

    Args:
        number: Of the signal; the exit status is 128 more.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


@contextlib.contextmanager
def says_when_interrupted(hint: Callable[[], str]) -> Iterator[None]:
    """Let :func:`run_command` add a hint to its line when a signal, or a full disk, ends what is done inside.

    Args:
        hint: What the user may do now; asked for at that moment.
    """
    try:
        yield
    except BaseException as error:
        error.add_note(hint())
        raise


def run_command(main: Callable[[Sequence[str]], Any], argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 after a user's mistake, 130 after Ctrl-C, 143 after SIGTERM.

    A mistake is told in one line on stderr, without a traceback, and so is another process of the run that does not
    answer (status 1); any other exception is a defect and propagates. Where nobody reads any more what is printed
    (``| head``), the command ends silently, with status 141.

    Args:
        main: The command; called with the arguments.
        argv: The arguments (default: those of this process).
    """
    with _ending_after_the_first_process(), _stoppable() as received:
        try:
            main(sys.argv[1:] if argv is None else argv)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                received.append(signal.SIGINT)
            if received:  # whatever else has failed on the way out
                _complain(error, _STOPPED[received[0]])
                return 128 + received[0]
            if isinstance(error, UserError):
                _complain(error, f"error: {' '.join(str(error).splitlines())}", with_hint=False)
            elif isinstance(error, BrokenPipeError) and _is_read_no_more():
                return 128 + signal.SIGPIPE
            elif isinstance(error, OSError):
                reason = error.strerror or first_line(error)
                _complain(error, f"error: {reason}: '{error.filename or 'is the disk full?'}'")
            elif _is_left_alone(error):
                line = "error: another process of the run has ended (and said why, unless it was killed)"
                _complain(error, f"{line} or cannot be reached", by_all=True)
                return 1
            else:
                raise
            return 2
    return 0


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Let SIGINT and SIGTERM raise :class:`Stopped` inside; yields a list that will hold the first one's number.

    Others are ignored for a moment, since terminals and launchers may send several at once; after that, who asks again
    does not want to wait for what is still being closed.
    """
    received: list[int] = []
    latest = -math.inf

    def stop(number: int, _: Any) -> None:
        nonlocal latest
        if time.monotonic() - latest > _AT_ONCE_SECONDS and not _is_ended_by_the_first_process():
            latest = time.monotonic()
            received.append(number)
            raise Stopped(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # the only one that may ask for signals
        before = {number: signal.getsignal(number) for number in _STOPPED}
    ours = [number for number, handler in before.items() if handler not in (None, signal.SIG_IGN)]  # nohup stays nohup
    for number in ours:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextlib.contextmanager
def messages_shown() -> Iterator[None]:
    """Show what is logged about the run, such as which solver was chosen; by the first process only."""
    from pytorch_lightning.utilities import rank_zero_only

    logger, handler = logging.getLogger("lit_parallel"), logging.StreamHandler()
    level = logger.level
    logger.setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.CRITICAL)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _is_read_no_more() -> bool:
    """Whether nobody reads what is printed any more, as after ``| head``; what is still to come is dropped then."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError):
        return False
    ends = select.poll()
    ends.register(output, 0)
    if not any(event & select.POLLERR for _, event in ends.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # the interpreter flushes once more
    return True


def _is_first_process() -> bool:
    # Lightning starts the other processes of a run with the same command line and these variables.
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def _is_ended_by_the_first_process() -> bool:
    # Started by Lightning, which sets no RANK, unlike torchrun. To end by itself would leave the first one waiting.
    return os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" not in os.environ


@contextlib.contextmanager
def _ending_after_the_first_process() -> Iterator[None]:
    """End this process, if the first one has started it, soon after that one was killed and could not do it itself.

    It may be waiting for the first one, on a GPU for many minutes, or be writing where the next command will.
    """
    first, left = os.getppid(), threading.Event()

    def watch() -> None:
        while os.getppid() == first:
            if left.wait(_LOOK_SECONDS):
                return
        if not left.wait(_GRACE_SECONDS):  # it may be about to end by itself
            print(f"process {_number()}: error: the first process has ended", file=sys.stderr, flush=True)
            os._exit(1)

    if _is_ended_by_the_first_process():
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _is_left_alone(error: BaseException) -> bool:
    """Whether another process of the run does not answer, which torch tells in the words of what connects them."""
    from torch import distributed

    unreachable = getattr(distributed, "DistNetworkError", ())
    return isinstance(error, unreachable) or (isinstance(error, RuntimeError) and bool(_NO_ANSWER.search(str(error))))


def _complain(error: BaseException, line: str, *, with_hint: bool = True, by_all: bool = False) -> None:
    """Tell of an error in one line: the first process all, the others what may have happened to them alone."""
    hints = getattr(error, "__notes__", [])
    if _is_first_process():
        print("; ".join([line, *hints] if with_hint else [line]), file=sys.stderr)
    elif by_all or (hints and not isinstance(error, Stopped)):
        print(f"process {_number()}: {line}", file=sys.stderr)


def _number() -> str | None:
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK")


def _leave(show: Callable[[], None]) -> typing.NoReturn:
    if _is_first_process():
        show()
    raise SystemExit(0)


def _version() -> str:
    try:
        return f"lit-parallel {importlib.metadata.version('lit-parallel')}"
    except importlib.metadata.PackageNotFoundError:
        return "lit-parallel (not installed: run 'pip install -e .' in its folder)"


def _names_group(argument: str) -> bool:
    return not argument.startswith("-") and "=" not in argument


def _unknown_flag(page: _Program, flag: str, value: str) -> str:
    """Say what an unknown flag should have been: another flag, or an option as ``key=value``."""
    assignment = value if value and not value.startswith("-") and "=" not in value else "..."
    corrections = {}
    for key in reversed(option_keys(page.schema())):  # reversed: of two options of one name, the first one is meant
        corrections[key] = corrections[key.rpartition(".")[2]] = f"{key}={assignment}"
    corrections |= {name.lstrip("-"): name for name in page.flags}
    near = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), corrections, n=1)
    hint = f"Did you mean '{corrections[near[0]]}'?" if near else f"Known: {', '.join(page.flags)}, and key=value."
    return f"Unknown flag '{flag}'. {hint}"


def _print_help(page: _Program, topic: str) -> None:
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    defaults = page.schema()
    if not topic:
        _print_overview(console, page, defaults)
        return
    groups = [(key or _TOP, member) for key, member in iterate_groups(defaults)]
    if topic in option_keys(defaults):
        topic = topic.rpartition(".")[0] or _TOP
    shown = [(key, member) for key, member in groups if topic in ("all", key) or key.startswith(f"{topic}.")]
    if not shown:
        raise UserError(f"There is no help on '{topic}'.{did_you_mean(topic, {'all', *(key for key, _ in groups)})}")
    for key, member in shown:
        _print_group(console, key, member)


def _print_overview(console: Console, page: _Program, defaults: Any) -> None:
    specs = fields_of(defaults)
    general = ", ".join(name for name, spec in specs.items() if isinstance(spec, Option))
    groups = {name: spec.help for name, spec in specs.items() if isinstance(spec, Group)}
    flags = {f"{flag} {metavar}".rstrip(): text for flag, (metavar, text) in page.flags.items()}
    usage = [f"[{flag} {metavar}]" for flag, (metavar, _) in page.flags.items() if metavar == "PATH"]
    _print_text(console, f"usage: {page.name} ", *usage, "[key=value ...]")
    console.print()
    _print_text(console, "", *page.description.split())
    console.print()
    _print_rows(console, flags)
    console.print("\nOptions, set as key=value or GROUP.key=value:")
    _print_rows(console, {_TOP: general, **groups})
    console.print("\nExamples:")
    for example in page.examples:
        console.print(f"  {example}", soft_wrap=True)


def _print_rows(console: Console, rows: dict[str, str]) -> None:
    width = max(len("--checkpoint PATH"), *map(len, rows))
    for name, text in rows.items():
        _print_text(console, f"  {name:<{width}}  ", *text.split())


def _print_text(console: Console, before: str, *words: str) -> None:
    """Print words in lines that end where the terminal does, below one another; a word may have spaces."""
    unbroken = " ".join(word.replace(" ", "\0") for word in words)
    indent = " " * len(before)
    lines = textwrap.wrap(
        unbroken,
        console.width,
        initial_indent=before,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    console.print("\n".join(lines).replace("\0", " "), soft_wrap=True)


def _print_group(console: Console, key: str, member: Any) -> None:
    """Print the options of one group as a table: option, default, explanation with type; it fits 80 columns too."""
    hints = typing.get_type_hints(type(member))
    rows = [(name, spec) for name, spec in fields_of(member).items() if isinstance(spec, Option)]
    if not rows:
        return
    title = "what stands in no group" if key == _TOP else (inspect.getdoc(type(member)) or "").partition("\n")[0]
    console.print(f"{key}: {title}", style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("  option", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=18)
    table.add_column("explanation [type]", overflow="fold", ratio=1)
    for name, spec in rows:
        full_key = name if key == _TOP else join_key(key, name)
        default = getattr(member, name)
        text = f"{spec.help} [{describe_option(hints[name], spec, default)}]"
        table.add_row(f"  {full_key}", format_default(default), text)
    console.print(table)
    console.print()


def describe_option(hint: Any, spec: Option, default: Any) -> str:
    """Put an option's type, or its choices, and its range into words."""
    if spec.choices:
        words = " | ".join(spec.choices)
        return f"list of {words}" if isinstance(default, list) else words
    words = describe_type(hint)
    if default is None:  # the default shows already that null is allowed
        words = words.removesuffix(" or null")
    return f"{words} {spec.limits}".rstrip()


def format_default(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(format_default, value))}]"
    return value if isinstance(value, str) else json.dumps(value)
