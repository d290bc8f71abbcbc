"""Durable jobs: a store that survives kills, leases that survive clocks, a worker that goes on where it was."""
