"""Formats `--help`: only what is needed to use a flag. docs/cli.md also lists the environment variables."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

EVERYWHERE = "Flags can also be set in the environment (WANDUET_NUM_FRAMES=17) or in wanduet.toml (num_frames = 17)."


def concise(console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
    """Print a panel without environment variables; for a switch that is off, only the form that enables it."""
    from cyclopts.help import DefaultFormatter

    DefaultFormatter()(console, options, panel.copy(entries=[_shortened(entry) for entry in panel.entries]))


def _shortened(entry: "HelpEntry") -> "HelpEntry":
    if entry.default == "False":  # a switch that is off by default
        return entry.copy(env_var=None, default=None, negative_names=())
    return entry.copy(env_var=None)
