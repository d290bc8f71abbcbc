"""Durable jobs: a store whose commits survive kills, leases independent of clocks, a worker that resumes jobs."""
