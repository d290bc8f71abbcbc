"""The engine: runs jobs through overlapping stages, on the devices that the plan names."""
