"""Runs jobs on many machines: replicas on Ray, one queue in PostgreSQL."""
