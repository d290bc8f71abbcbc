"""Reads LoRA files of every spelling, also LoHa, LoKr, DoRA and whole differences, as updates of a transformer's parameters."""
