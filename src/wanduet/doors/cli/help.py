"""What `--help` shows: of each flag what is needed to use it. docs/cli.md has the environment variables, too."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

EVERYWHERE = "Flags can also be set in the environment (WANDUET_NUM_FRAMES=17) or in wanduet.toml (num_frames = 17)."


def concise(console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
    """Print a panel: of a switch that is off only the form that turns it on, and no environment variables."""
    from cyclopts.help import DefaultFormatter

    DefaultFormatter()(console, options, panel.copy(entries=[_shortened(entry) for entry in panel.entries]))


def _shortened(entry: "HelpEntry") -> "HelpEntry":
    if entry.default == "False":  # a switch that is off
        return entry.copy(env_var=None, default=None, negative_names=())
    return entry.copy(env_var=None)
