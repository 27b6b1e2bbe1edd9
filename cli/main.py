"""The top of the command: lazy subcommands, and the one place where errors become text and exit codes."""

import importlib
import os
import sys
from typing import Any, NoReturn

import click

from loractl.adapters.errors import LoractlError
from loractl.cli.output import print_error

# name -> "module:attribute"; a module is imported when its command is typed, so help never imports torch.
COMMANDS: dict[str, str] = {
    "train": "loractl.cli.train_commands:train",
    "plan": "loractl.cli.train_commands:plan",
    "data": "loractl.cli.data_commands:data",
    "presets": "loractl.cli.presets_commands:presets",
    "eval": "loractl.cli.eval_command:evaluate",
    "push": "loractl.cli.adapter_commands:push",
    "pull": "loractl.cli.adapter_commands:pull",
    "list": "loractl.cli.adapter_commands:list_adapters",
    "show": "loractl.cli.adapter_commands:show",
    "diff": "loractl.cli.diff_command:diff",
    "promote": "loractl.cli.channel_commands:promote",
    "rollback": "loractl.cli.channel_commands:rollback",
    "history": "loractl.cli.channel_commands:history",
    "yank": "loractl.cli.release_commands:yank",
    "move": "loractl.cli.release_commands:move",
    "delete": "loractl.cli.release_commands:delete",
    "check": "loractl.cli.adapter_commands:check",
    "merge": "loractl.cli.merge_commands:merge",
    "convert": "loractl.cli.merge_commands:convert",
    "hub": "loractl.cli.hub_commands:hub",
    "serve": "loractl.cli.serve_commands:serve",
    "chat": "loractl.cli.chat_command:chat",
    "status": "loractl.cli.status_command:status",
    "bench": "loractl.cli.bench_commands:bench",
    "doctor": "loractl.cli.doctor_command:doctor",
}

# One line each, so that the top help imports nothing; tests compare them with the commands' own.
SUMMARIES: dict[str, str] = {
    "train": "Train LoRA adapters on a base model, one or many at once.",
    "plan": "Say what `train` would do, with memory and steps; loads no weights.",
    "data": "Look at training data: check, show, split, digest.",
    "presets": "Show the settings that training can start from.",
    "eval": "Score adapters and their base on the same rows.",
    "push": "Put an adapter folder into the hub as the next version.",
    "pull": "Fetch an adapter from the hub.",
    "list": "List the adapters in the hub.",
    "show": "Show one adapter: versions, channels, lineage, checks.",
    "diff": "Compare two revisions: recipe, data, metrics, targets, weights.",
    "promote": "Move a channel to a revision.",
    "rollback": "End a canary, or move a channel back to where it was.",
    "history": "Show who moved which channel, when and why.",
    "yank": "Withdraw a version, or take that back.",
    "move": "Give a repo another name; the old one keeps answering.",
    "delete": "Delete a repo with all its versions.",
    "merge": "Merge an adapter into its base, or several adapters into one.",
    "convert": "Move an adapter between W_pack and q_proj, k_proj, v_proj.",
    "check": "Run the hub's checks on an adapter folder, offline.",
    "hub": "Run and look after an adapter hub.",
    "serve": "Serve a base model and its adapters with an OpenAI-compatible API.",
    "chat": "Talk to an adapter, or to two side by side.",
    "status": "Show a server's adapters, queues and speed.",
    "bench": "Measure the engine or any OpenAI-compatible server.",
    "doctor": "Say what this machine can do.",
}


class LazyGroup(click.Group):
    """A group that imports a subcommand's module only when that subcommand is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        target = COMMANDS.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{target} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in COMMANDS])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="loractl", message="loractl %(version)s")
def group() -> None:
    """Train LoRA adapters, keep them in a hub, and serve many of them on one 8-bit base model."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command and exit with its code: 0 done, 2 usage, 3 bad data ... (see `loractl.adapters.errors`)."""
    sys.exit(run(argv))


def run(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code; errors are printed on stderr."""
    _wait_briefly()
    try:
        result: Any = group.main(args=argv, prog_name="loractl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return 130
    except KeyboardInterrupt:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LoractlError as error:
        print_error(error.message, hint=error.hint)
        return error.exit_code
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has gone; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("LORACTL_TRACEBACK"):
            raise
        print_error(
            f"{type(error).__name__}: {error}", hint="this is a bug in loractl; LORACTL_TRACEBACK=1 shows where"
        )
        return 1


def _wait_briefly() -> None:
    """Have torch's threads sleep soon when they wait for each other; read by its OpenMP when torch is imported.

    By default they spin for milliseconds, which takes the processor from the very thread that they wait for wherever
    anything else runs: on two busy cores a step took thirteen times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
