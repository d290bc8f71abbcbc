"""Policy: what runs where, and stages that overlap."""
