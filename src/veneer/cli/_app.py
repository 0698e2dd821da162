"""The command itself: finds the file of a command by its name, and turns errors into messages and exit codes.

0: done. 1: an error that the message explains. 2: the command was not understood (usage, unknown names and
options). 130: interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from veneer.cli._common import STATE, say, show_notes
from veneer.cli._page import COMMANDS, folded, page
from veneer.errors import BadOption, UnknownMethod, UnknownName, UnknownOption, VeneerError, nearest

USAGE = (BadOption, UnknownMethod, UnknownName, UnknownOption)
UsageError: Any = typer.BadParameter.__mro__[1]  # typer's own base class of what it cannot understand


class Commands(TyperGroup):
    """Commands are looked up in files of their name, so that `veneer predict` imports nothing of `compare`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"veneer.cli.{name}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(
            name,
            help=_help(module, name),
            epilog=_epilog(module),
            context_settings={
                "help_option_names": ["-h", "--help"],
                "max_content_width": 100,
                **getattr(module, "SETTINGS", {}),
            },
        )(getattr(module, name))
        command: Any = typer.main.get_command(single)
        command.format_epilog = lambda ctx, formatter: formatter.write(_epilog(module))
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and name not in COMMANDS:
            raise UnknownName(
                f"veneer has no command '{name}'.",
                nearest=nearest(name, COMMANDS),
                next_step="veneer --help    lists all of them",
            )
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(formatter.width) + "\n")

    def invoke(self, ctx: Any) -> Any:
        """Run a command; leave with the code that its end deserves."""
        STATE.reset()
        STATE.debug = bool(ctx.params.get("debug"))
        try:
            with show_notes():
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except BrokenPipeError:
            # The reader has what it wanted; what is left in the buffer goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except UsageError as error:
            print_error(_explained(error))
            raise typer.Exit(2) from None
        except Exception as error:
            print_error(error)
            raise typer.Exit(2 if isinstance(error, USAGE) else 1) from None
        finally:
            STATE.restore()


def print_error(error: BaseException) -> None:
    """The four parts of an error on standard error; the traceback is for --debug."""
    if STATE.debug:
        traceback.print_exception(error)
    if isinstance(error, VeneerError):
        say(f"{type(error).__name__}: {error}")
    else:
        say(
            f"{type(error).__name__}: {error}\n  next:    the same command with --debug shows where it happened"
        )


def _explained(error: Any) -> VeneerError:
    """A usage error of typer's in the form of all others."""
    ctx = getattr(error, "ctx", None)
    path = getattr(ctx, "command_path", "veneer")
    step = f"{path} --help"
    wrong = getattr(error, "option_name", None)
    if wrong is not None and ctx is not None:
        known = [name for p in ctx.command.params for name in getattr(p, "opts", ())]
        return UnknownOption(
            f"{path} has no option '{wrong}'.", nearest=nearest(wrong, known), next_step=step
        )
    message = error.format_message().strip().rstrip(".")
    return BadOption(f"{path}: {message[:1].lower()}{message[1:]}.", next_step=step)


def _help(module: Any, name: str) -> str:
    return (getattr(module, name).__doc__ or COMMANDS[name]).strip()


def _epilog(module: Any) -> str:
    lines = ["", "examples:"]
    for example in module.EXAMPLES:
        lines += folded(example, 96)
    return "\n".join(lines) + "\n"


app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
def root(
    version: bool = typer.Option(False, "--version", help="print the version and leave"),
    debug: bool = typer.Option(False, "--debug", help="show tracebacks"),
) -> None:
    if version:
        import veneer

        print(f"veneer {veneer.__version__}")
