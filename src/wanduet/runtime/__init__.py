"""The loaded models and the devices they run on."""
