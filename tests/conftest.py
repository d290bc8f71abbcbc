"""For all tests."""

import signal

# A runner in the background ignores Ctrl-C, and what it starts would inherit that; here it must be heard.
signal.signal(signal.SIGINT, signal.default_int_handler)
