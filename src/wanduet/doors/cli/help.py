"""Formats `--help`: only what is needed to use a flag. docs/cli.md also lists the environment variables."""

from typing import TYPE_CHECKING

from cyclopts import App, Group

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

EVERYWHERE = "Flags can also be set in the environment (WANDUET_NUM_FRAMES=17) or in wanduet.toml (num_frames = 17)."

# The groups of `wanduet --help`, and the order of the commands in them.
MAKE = Group("Make videos", sort_key=1)
LOOK = Group("Look before and after", sort_key=2)
SERVE = Group("Serve", sort_key=3)
KEEP = Group("Look after", sort_key=4)
ORDER = (
    "generate", "batch", "encode", "decode", "plan", "inspect", "verify", "bench", "price", "serve", "ui", "jobs",
    "keys", "cluster", "doctor", "download",
)  # fmt: skip


def plain_overview(app: App) -> None:
    """Make the app's own help plain text; the help of its commands stays Markdown, whose renderer takes long to import."""
    app.help_format = "plaintext"
    for name in app:
        app[name].help_format = "markdown"


def concise(console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
    """Print a panel without environment variables; for a switch that is off, only the form that enables it."""
    from cyclopts.help import DefaultFormatter

    entries = [_shortened(entry) for entry in panel.entries]
    if panel.format == "command":
        entries.sort(key=lambda entry: ORDER.index(entry.names[0]) if entry.names[0] in ORDER else len(ORDER))
    DefaultFormatter()(console, options, panel.copy(entries=entries))


def _shortened(entry: "HelpEntry") -> "HelpEntry":
    if entry.default == "False":  # a switch that is off by default
        return entry.copy(env_var=None, default=None, negative_names=())
    return entry.copy(env_var=None)
