"""What `wanduet` and `python -m wanduet` start: the command line, with Ctrl-C heard while it is still being imported."""

import os
import sys


def main() -> None:
    """Run and exit."""
    from wanduet.doors.cli.stopping import print_failure, stop_signals

    as_json = "--json" in sys.argv
    with stop_signals(as_json) as stops:
        try:
            from wanduet.doors.cli.main import main as run
        except KeyboardInterrupt:
            stops.answered = True
            print_failure("Interrupted.", "cancelled", as_json)
            os._exit(stops.exit_code)  # half-imported modules have nothing to put in order
        run()


if __name__ == "__main__":
    main()
