"""`wanduet --install-completion`: the shell completes commands, flags and their choices."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from wanduet.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from cyclopts import Group

FLAG = "--install-completion"
Shell = Literal["zsh", "bash", "fish", "powershell"]  # in cyclopts' order: equal unions are cached


def register(app: App, group: "Group") -> None:
    """Add the command to `wanduet`."""

    def install(
        *,
        shell: Annotated[Shell | None, Parameter(help="Default: the shell that runs this.")] = None,
        output: Annotated[
            Path | None, Parameter(name=["--output", "-o"], help="The script's path. Default: the shell's own place.")
        ] = None,
    ) -> None:
        """Let the shell complete commands and flags: bash, zsh, fish, PowerShell.

        ```sh
        wanduet --install-completion
        ```
        """
        from cyclopts.completion.detect import ShellDetectionError, detect_shell

        try:
            name = shell or detect_shell()
            path = app.install_completion(shell=name, output=output, add_to_startup=output is None)
        except ShellDetectionError:
            hint = f"Name it: wanduet {FLAG} --shell bash (or zsh, fish, powershell)."
            raise ConfigError("It is not clear which shell this is.", hint=hint) from None
        except OSError as error:
            raise OutputError(f"The script cannot be written: {error.strerror}.") from error
        print(f"Written for {name}: {path}")
        if output is None:
            print("It works in every shell that is opened from now on.")

    app.command(install, name=FLAG, group=group)
