"""How work is spread over devices."""
