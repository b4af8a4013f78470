"""Training: Megatron-Core's schedules, DDP and distributed optimizer around a `bridge` model."""
