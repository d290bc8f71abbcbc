"""What `wanduet` and `python -m wanduet` start: the command line, with Ctrl-C heard while it is still being imported."""

import os
import sys


def main() -> None:
    """Run and exit."""
    try:
        from wanduet.frontends.cli import main as run
    except KeyboardInterrupt:
        if "--json" in sys.argv:
            print('{"error": {"message": "Interrupted.", "code": "cancelled", "param": null}}', flush=True)
        print("Interrupted.", file=sys.stderr, flush=True)
        os._exit(130)  # half-imported modules have nothing to put in order
    run()


if __name__ == "__main__":
    main()
