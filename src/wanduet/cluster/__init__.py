"""The same jobs on many machines: replicas on Ray, one queue on PostgreSQL."""
