"""The command line: one file a command, imported when the command is given, so that `mmkd --help` answers at once.

A command's module has `add_arguments(parser)` and `run(arguments) -> exit code`, and imports what is heavy inside `run`.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import sys
import traceback
from contextlib import nullcontext
from importlib import import_module
from typing import NoReturn

from mmkd.base.bars import BesideBars, Printable, quiet_libraries
from mmkd.base.distributed import end_process, lost_connection, world_size
from mmkd.base.peers import watching_peers
from mmkd.base.stopping import CODE, Terminated, listening
from mmkd.errors import MmkdError, one_line, printable

# Of each command its module and what it does. Modules to the right of this package are found by these names alone.
COMMANDS = {
    "init": ("mmkd.cli.init", "Write a recipe for your own data, teacher and student."),
    "show": ("mmkd.cli.show", "Show samples of a recipe as student and teachers read them, and what is learnt."),
    "distill": ("mmkd.cli.distill", "Run the stages of a recipe, then compare teacher, SFT control and student."),
    "write": ("mmkd.cli.write", "Let models write the data of a recipe's write stages, alone or with others."),
    "cache": ("mmkd.cli.cache", "Run the teacher of a recipe once and store what the terms compare with."),
    "estimate": ("mmkd.cli.estimate", "Measure a few steps: memory by part, time, disk, what to change."),
    "rank": ("mmkd.cli.rank", "Distil a dual encoder by ranking, or train a cross-encoder for it; compare recall."),
    "evaluate": ("mmkd.cli.evaluate", "Score a model on benchmarks."),
    "ask": ("mmkd.cli.ask", "Ask one or several models a question about a picture."),
    "pairs": ("mmkd.cli.pairs", "Make preference pairs: right answers of one model, wrong ones of others."),
    "preferences": ("mmkd.cli.preferences", "Count how often a model prefers the chosen answers of pairs."),
    "report": ("mmkd.cli.report", "Write the HTML report of a run again."),
    "export": ("mmkd.cli.export", "Write a student as vLLM or llama.cpp reads it, and check what comes out."),
    "push": ("mmkd.cli.push", "Send a student to the hub, or list what would be sent."),
    "compare": ("mmkd.cli.compare", "Compare models on the same questions: differences, agreement, one report for all."),
    "check": ("mmkd.testing.command", "Check that a model works as a tower, or replay a step that was not finite."),
    "list": ("mmkd.cli.list", "List cards, or what a recipe can name: terms, formats, metrics and their like."),
    "sample": ("mmkd.sample.command", "Write the embedded sample: two data sets in the benchmarks' own formats."),
}

SHARED = {"distill", "cache", "rank", "evaluate"}  # what several processes of a launcher do together
TIMED = {*SHARED, "write"}  # whose lines of the log begin with day and time

# What the file system refuses, and the way out. Any other OSError is a bug and keeps its traceback.
_ROOM = "make room or take another output folder; the same command then goes on"
_OTHER = "take an output folder that can be made and written to"
REFUSED = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), _OTHER),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "take a shorter path"),
    **dict.fromkeys((errno.ENOENT, errno.ESTALE), "it was there before; put it back, and the same command goes on"),
    **dict.fromkeys((errno.EIO, errno.ETIMEDOUT, errno.ENXIO), "look at the disk, or take a copy of the file"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; a user's mistake is one message on stderr and exit code 2 (3: a value is not finite)."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    handler = BesideBars()
    times = arguments.command.prog.split()[-1] in TIMED
    handler.setFormatter(Printable("%(asctime)s %(message)s" if times else "%(message)s", "%m-%d %H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("mmkd").setLevel(logging.INFO)
    # bitsandbytes warns at import about a kernel that only 4-bit models on a CPU would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with listening(), watching_peers() if arguments.command.prog.split()[-1] in SHARED else nullcontext():
            return arguments.run(arguments)
    except MmkdError as error:
        print(printable(f"mmkd: {error}"), file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("mmkd: stopped; the same command goes on from what is on the disk", file=sys.stderr)
        return 130
    except Terminated as stop:
        done = f" {stop};" if str(stop) else ""
        print(f"mmkd: asked to end (SIGTERM);{done} the same command goes on from what is on the disk", file=sys.stderr)
        return CODE
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        from mmkd.base.files import is_full

        message = _refusal(error) if isinstance(error, OSError) or is_full(error) else None
        message, code = (lost_connection(error), 1) if message is None else (message, 2)
        if message is None:
            raise
        print(printable(f"mmkd: {message}"), file=sys.stderr)
        return code


def run() -> NoReturn:
    """The `mmkd` command."""
    try:
        code = main()
    except Exception:  # a bug; one of several processes must end all the same, since the others wait for it
        if world_size() == 1:
            raise
        traceback.print_exc()
        code = 1
    end_process(code)


def _refusal(error: Exception) -> str | None:
    """What the file system refused, with the way out; None for failures that it did not cause."""
    if not isinstance(error, OSError):
        return f"{one_line(error)}; {_ROOM}"
    if isinstance(error, shutil.Error):  # of a folder that was copied: (from, to, text) of each file
        _, target, text = error.args[0][0]
        number = next((n for n in REFUSED if f"[Errno {n}]" in text), None)
        return None if number is None else f"{os.strerror(number)}: {target}; {REFUSED[number]}"
    if error.errno not in REFUSED:
        return None
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror}{where}; {REFUSED[error.errno]}"


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of the command line. argparse ends a list at the first option; what follows is added to it here."""
    arguments, rest = _parser(argv).parse_known_args(argv)
    options = [text for text in rest if text.startswith("-")]
    if options:
        arguments.command.error(f"there is no option {', '.join(options)}; `{arguments.command.prog} --help` lists them")
    if rest and arguments.listed is None:
        arguments.command.error(f"{', '.join(rest)}: more than this command takes")
    if rest:
        setattr(arguments, arguments.listed, [*getattr(arguments, arguments.listed), *rest])
    return arguments


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """Knows all commands by name, and the arguments of the one that is given."""
    parser = argparse.ArgumentParser(prog="mmkd", description="Distil a large vision-language model into a tiny one.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    given = next((text for text in argv if text in COMMANDS), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == given:
            found = import_module(module)
            command.set_defaults(run=found.run, command=command, listed=None)
            found.add_arguments(command)
    return parser
