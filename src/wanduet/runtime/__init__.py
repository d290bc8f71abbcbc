"""Models on their devices."""
